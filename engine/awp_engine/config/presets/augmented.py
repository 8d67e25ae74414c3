"""Adversarial training whose own part is its augmentation."""

import dataclasses
import functools

from awp_engine.config.presets.paper import paper
from awp_engine.config.presets.preset import TITLES, Preset, short
from awp_engine.config.settings import AverageConfig, Config


def idbh(data: str, model: str, policy: str, *, awp: bool) -> Config:
    """AT by an IDBH augmentation, with an EMA.

    Source: Li, Spratling: Data Augmentation Alone Can Improve Adversarial Training, ICLR 2023, and its public code
    (TreeLLi/DA-Alone-Improves-AT at 38b740a), whose README has the commands of both networks on CIFAR-10. What differs:

    - Their attack begins at the image plus its raw gradient, which is next to nothing: here at the image. Its passes,
      and one clean pass more, move the running statistics there; here the descent's alone.
    - The average's statistics are computed anew over clean augmented images, by `bn_images` of them, not by all.
    - They select by PGD on the test images, here on held-out ones. Their last, smaller batch is left out.
    - [?] The code has no AWP. gamma is the AWP paper's for AT, as the authors' next code (TreeLLi/AROID) gives none.
    - [?] CIFAR-100, which their code does not know. SVHN, for which the README has no command: rate, step and AWP's
      start are the AWP paper's; the code's defaults are a rate of 0.1 and steps of 2/255.

    Args:
        data: "cifar10", "cifar100" or "svhn".
        model: as `--model.name`.
        policy: as `--data.policy`.
        awp: with weight perturbation.
    """
    base = paper(data, model, "at", awp=awp)
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, pad=0, flip=True, policy=policy),  # pyright: ignore[reportArgumentType]
        model=dataclasses.replace(base.model, normalize="none"),
        attack=dataclasses.replace(base.attack, start="none"),
        average=AverageConfig(kind="ema", decay=0.999, ramp=False, statistics="clean"),
    )


PRESETS: dict[str, Preset] = {
    f"{data}-{short(model)}-at{'-awp' if awp else ''}-idbh": (
        f"AT{'-AWP' if awp else ''}, {TITLES[data]}, {policy.replace('idbh', 'IDBH')}.",
        functools.partial(idbh, data, model, policy, awp=awp),
    )
    for data, model, policy, awp in (
        ("cifar10", "wrn-34-10", "idbh-weak", False),
        ("cifar10", "preact-resnet-18", "idbh-strong", True),
        ("cifar100", "preact-resnet-18", "idbh-strong", True),
        ("svhn", "preact-resnet-18", "idbh-svhn", True),
    )
}

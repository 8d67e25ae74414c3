"""Presets: the published recipes, and small ones that run anywhere.

The recipes are those of Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020, its
appendix and its public code, unless a line says otherwise.
"""

import dataclasses
import functools
from collections.abc import Callable

from awp_engine.config.schema import ConfigError, did_you_mean, show
from awp_engine.config.settings import (
    AttackConfig,
    AverageConfig,
    AwpConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
)

_SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN"}


def digits(method: str = "at", gamma: float = 0.005) -> Config:
    """scikit-learn's 8x8 handwritten digits, Linf 0.2; under two minutes on two CPU cores."""
    # Chosen on the held-out part of the training set, never on the test split.
    trained_by_divergence = method != "at"
    return Config(
        method=method,  # pyright: ignore[reportArgumentType]
        data=DataConfig(name="digits", held_out_fraction=0.1, pad=1, flip=False),
        model=ModelConfig(name="preact-resnet-digits", width=16),
        attack=AttackConfig(
            norm="linf",
            epsilon="0.2",
            step_size="0.08",
            steps=5,
            bn_mode="eval" if trained_by_divergence else "train",
            start="normal" if trained_by_divergence else "uniform",
        ),
        awp=AwpConfig(gamma=gamma, warmup=5 if trained_by_divergence else 0),
        optimizer=OptimizerConfig(lr=0.2, schedule="cosine"),
        evaluation=EvaluationConfig(steps=20, evaluate_every=2),
        epochs=50,
        global_batch_size=128,
    )


def paper(data: str, model: str, method: str, *, awp: bool, norm: str = "linf") -> Config:
    """A recipe of the AWP paper.

    Args:
        data: "cifar10", "cifar100" or "svhn".
        model: as `--model.name`.
        method: "at", "trades", "mart" or "rst".
        awp: with weight perturbation.
        norm: "linf" (8/255) or "l2" (128/255).
    """
    at, rst, svhn = method == "at", method == "rst", data == "svhn"
    if norm == "l2":
        epsilon, step_size = "128/255", "15/255"
    else:
        epsilon, step_size = "8/255", "1/255" if svhn else "2/255"
    gamma, warmup = (0.01, 5 if svhn and norm == "linf" else 0) if at else (0.005, 10)
    if rst:
        optimizer = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True, schedule="cosine")
    else:
        optimizer = OptimizerConfig(
            lr=0.01 if svhn else 0.1, momentum=0.9, weight_decay=5e-4, schedule="piecewise", milestones=(0.5, 0.75)
        )
    return Config(
        method=method,  # pyright: ignore[reportArgumentType]
        data=DataConfig(
            name=data,  # pyright: ignore[reportArgumentType]
            # 1,000 of CIFAR's images, as Rice, Wong, Kolter 2020 hold out
            held_out_fraction=0.02,
            pad=0 if svhn else 4,
            flip=not svhn,
            # for RST pseudo-labelled images (--data.extra): 500,000 of 80 Million Tiny Images in the paper
            extra_fraction=0.5,
        ),
        model=ModelConfig(name=model),
        attack=AttackConfig(
            norm=norm,  # pyright: ignore[reportArgumentType]
            epsilon=epsilon,
            step_size=step_size,
            steps=10,
            bn_mode="train" if at else "eval",
            start="uniform" if at else "normal",
        ),
        awp=AwpConfig(gamma=gamma if awp else 0.0, warmup=warmup if awp else 0),
        optimizer=optimizer,
        evaluation=EvaluationConfig(steps=20, step_size=step_size),
        epochs=200,
        global_batch_size=256 if rst else 128,
        log_interval=30.0,
    )


def rwp() -> Config:
    """AT-RWP: ten ascent steps by the samples with a loss below 1.7 (Yu et al., IJCAI 2022)."""
    base = paper("cifar10", "preact-resnet-18", "at", awp=True)
    return dataclasses.replace(base, awp=AwpConfig(gamma=0.01, scope="global", ascent_steps=10, c_min=1.7))


def shared_ascent() -> Config:
    """AT-AWP with the ascent gradient of the attack's last pass: one unit of work instead of three."""
    base = paper("cifar10", "preact-resnet-18", "at", awp=True)
    return dataclasses.replace(base, awp=AwpConfig(gamma=0.01, ascent="shared"))


def fast(kind: str) -> Config:
    """30 epochs of a one-step attack, one-cycle rate (Wong et al., ICLR 2020; de Jorge et al., NeurIPS 2022)."""
    base = paper("cifar10", "preact-resnet-18", "at", awp=False)
    return dataclasses.replace(
        base,
        attack=dataclasses.replace(base.attack, fast=kind),  # pyright: ignore[reportArgumentType]
        optimizer=OptimizerConfig(lr=0.2, momentum=0.9, weight_decay=5e-4, schedule="one-cycle"),
        # a batch is replayed eight times
        epochs=4 if kind == "free" else 30,
    )


def sam() -> Config:
    """SAM: clean images, and a perturbation of length rho = 0.05 over the whole model (Foret et al., ICLR 2021)."""
    base = paper("cifar10", "preact-resnet-18", "at", awp=False)
    return dataclasses.replace(
        base,
        # no attack pass is made for a ball of one point
        attack=dataclasses.replace(base.attack, epsilon="0"),
        awp=AwpConfig(gamma=0.05, scope="global", scale="absolute"),
        evaluation=EvaluationConfig(steps=20, step_size="2/255"),
    )


def imagenet(model: str, *, awp: bool) -> Config:
    """224x224 images, Linf 4/255, two steps of Auto-PGD, heavy augmentation; 50 epochs from a clean model.

    Source: Singh, Croce, Hein: Revisiting Adversarial Training for ImageNet, NeurIPS 2023, and its public code
    (nmndeep/revisiting-at: main.py, parserr.py, run_train.sh), whose 80 images a GPU are those of eight GPUs here.
    There layer norms and layer scales decay, and the attack climbs the smoothed loss. The weights to start from are
    given by --model.pretrained. gamma is the AWP paper's for AT on CIFAR-10, not tuned here.
    """
    return Config(
        method="at",
        label_smoothing=0.1,
        data=DataConfig(
            name="imagenet",
            held_out_fraction=0.01,
            image_size=224,
            center_crop=0.875,
            crop="resized",
            crop_scale=0.08,
            flip=True,
            rand_augment=9.0,
            erase=0.25,
            mixup=0.5,
            mixup_alpha=0.8,
            cutmix=0.5,
        ),
        model=ModelConfig(name=model),
        attack=AttackConfig(kind="apgd", epsilon="4/255", step_size="2/255", steps=2, bn_mode="eval", start="none"),
        awp=AwpConfig(gamma=0.01 if awp else 0.0),
        optimizer=OptimizerConfig(
            kind="adamw",
            lr=1e-3,
            momentum=0.9,
            beta2=0.95,
            weight_decay=0.05,
            decay_all=False,
            schedule="cosine",
            warmup=10.0,
        ),
        average=AverageConfig(kind="ema", decay=0.9999),
        # RobustBench takes 5,000 images of ImageNet
        evaluation=EvaluationConfig(steps=10, batch_size=128, held_out_limit=1000, test_limit=5000),
        epochs=50,
        global_batch_size=640,
        micro_batch_size=80,
        checkpoint_steps=500,
        log_interval=30.0,
    )


def generated(*, awp: bool) -> Config:
    """TRADES on CIFAR-10 with 70% of every batch generated (--data.extra: EDM's images, 1 to 50 million).

    Source: Wang, Pang, Du, Lin, Liu, Yan: Better Diffusion Models Further Improve Adversarial Training, ICML 2023, and
    its public code (wzekai99/DM-Improves-AT: the README's command, train-wa.py, core/utils). Its 400 epochs are of 98
    steps each, as it counts generated images too; 123 passes over the labelled images are as many steps. There the EMA
    begins after the warm-up, batch normalisation has a momentum of 0.01, images are not normalised, and there is no
    AWP, whose gamma and start (after 10 of the 400) here are the AWP paper's for TRADES.
    """
    return Config(
        # TRADES that asks for extra images
        method="rst",
        beta=5.0,
        label_smoothing=0.1,
        data=DataConfig(name="cifar10", held_out_fraction=0.02, pad=4, flip=True, extra_fraction=0.7),
        model=ModelConfig(name="wrn-28-10", activation="silu"),
        attack=AttackConfig(epsilon="8/255", step_size="2/255", steps=10, bn_mode="train", start="uniform"),
        awp=AwpConfig(gamma=0.005 if awp else 0.0, warmup=3 if awp else 0),
        optimizer=OptimizerConfig(
            lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True, schedule="cosine", warmup=0.025 * 123
        ),
        average=AverageConfig(kind="ema", decay=0.995),
        evaluation=EvaluationConfig(steps=20, step_size="2/255"),
        epochs=123,
        global_batch_size=512,
        log_interval=30.0,
    )


DEFAULT = "digits"

_Build = Callable[[], Config]


def _paper_presets() -> dict[str, tuple[str, _Build]]:
    """Every data set, model, method and norm that the paper reports, with and without AWP."""
    norms, methods = ("linf", "l2"), ("at", "trades", "mart")
    grid = [("cifar10", "preact-resnet-18", method, norm) for method in methods for norm in norms]
    grid += [(data, "preact-resnet-18", "at", norm) for data in ("cifar100", "svhn") for norm in norms]
    grid += [("cifar10", "wrn-34-10", method, "linf") for method in methods]
    grid += [("cifar10", "wrn-28-10", "rst", "linf")]
    presets = {}
    for data, model, method, norm in grid:
        for awp in (False, True):
            parts = [data, model.replace("resnet-", "resnet"), method, *["awp"] * awp, *["l2"] * (norm == "l2")]
            ball = "L2 128/255" if norm == "l2" else "Linf 8/255"
            summary = f"{method.upper()}{'-AWP' if awp else ''} on {_SETS[data]}, {ball}."
            presets["-".join(parts)] = (summary, functools.partial(paper, data, model, method, awp=awp, norm=norm))
    return presets


def _larger_presets() -> dict[str, tuple[str, _Build]]:
    """ImageNet, and CIFAR-10 with generated images, with and without AWP."""
    presets = {}
    for awp in (False, True):
        suffix, with_awp = ("-awp", "-AWP") if awp else ("", "")
        for short, model in (("convnext-t", "convnext-tiny-convstem"), ("resnet50", "resnet-50")):
            summary = f"AT{with_awp} on ImageNet, Linf 4/255."
            presets[f"imagenet-{short}-at{suffix}"] = (summary, functools.partial(imagenet, model, awp=awp))
        summary = f"TRADES{with_awp}, generated CIFAR-10 images."
        presets[f"cifar10-wrn-28-10-silu-trades{suffix}-edm"] = (summary, functools.partial(generated, awp=awp))
    return presets


_ALL: dict[str, tuple[str, _Build]] = {
    "digits": ("AT-AWP on handwritten digits.", digits),
    "digits-at": ("The same without weight perturbation.", functools.partial(digits, gamma=0.0)),
    "digits-trades": ("TRADES on the digits.", functools.partial(digits, "trades", 0.0)),
    "digits-trades-awp": ("TRADES-AWP on the digits.", functools.partial(digits, "trades")),
    "digits-mart": ("MART on the digits.", functools.partial(digits, "mart", 0.0)),
    "digits-mart-awp": ("MART-AWP on the digits.", functools.partial(digits, "mart")),
    **_paper_presets(),
    "cifar10-preact-resnet18-at-awp-shared": ("AT-AWP; the attack gives the ascent.", shared_ascent),
    "cifar10-preact-resnet18-at-rwp": ("AT-RWP: ascent by low losses, 10 steps.", rwp),
    "cifar10-preact-resnet18-fgsm-rs": ("FGSM-RS, 30 epochs, one-cycle rate.", functools.partial(fast, "fgsm-rs")),
    "cifar10-preact-resnet18-n-fgsm": ("N-FGSM, 30 epochs, one-cycle rate.", functools.partial(fast, "n-fgsm")),
    "cifar10-preact-resnet18-free": (
        "Free: 4 epochs, each batch 8 times.",
        functools.partial(fast, "free"),
    ),
    "cifar10-preact-resnet18-sam": ("SAM: clean images, rho = 0.05.", sam),
    **_larger_presets(),
}

PRESETS: dict[str, str] = {name: summary for name, (summary, _) in _ALL.items()}
"""Every preset with a line about it."""


def build_preset(name: str) -> Config:
    """The configuration of a preset.

    Raises:
        ConfigError: for a name that is not in `PRESETS`, with the nearest one.
    """
    if name in _ALL:
        return dataclasses.replace(_ALL[name][1](), preset=name)
    # of a beginning some that begin so
    longer = [preset for preset in PRESETS if name and preset.startswith(name)][:3]
    hint = f"did you mean {', '.join(longer)}? " if longer else did_you_mean(name, PRESETS, "")
    told = f"{hint.rstrip()} there is no {show(name)}".lstrip()
    raise ConfigError(f"preset: {told}; awp train --presets lists all {len(PRESETS)}")

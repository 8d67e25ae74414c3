"""Training with generated images.

Two recipes, which share loss, attack, network and average:

- Wang, Pang, Du, Lin, Liu, Yan: Better Diffusion Models Further Improve Adversarial Training, ICML 2023, and its public
  code (wzekai99/DM-Improves-AT at b390f25).
- Bartoldson, Diffenderfer, Parasyris, Kailkhura: Adversarial Robustness Limits via Scaling-Law and Human-Alignment
  Studies, ICML 2024, and its public code (bbartoldson/Adversarial-Robustness-Limits at b22988f).

What differs from their code stands in docs/recipes.md.
"""

import dataclasses
import functools
from typing import NamedTuple

from awp_engine.config.presets.preset import Preset
from awp_engine.config.settings import (
    AttackConfig,
    AverageConfig,
    AwpConfig,
    Config,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
)

# of the epochs, in which the rate rises and the average is a copy
_RISE = 0.025
_HELD_OUT = 1024


class _Set(NamedTuple):
    """A data set: its training images, and the public code's mean and deviation of every channel."""

    images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


_SETS = {
    "cifar10": _Set(50_000, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": _Set(50_000, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": _Set(73_257, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "tiny-imagenet": _Set(100_000, (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
}
# batch size and epochs by data set, network, generated images and norm; [?]: all but the first row, whose values the
# README has, and the 2,000 epochs of WRN-70-16: the others lie in files that could not be read
_WANG = {
    ("cifar10", "28-10", "1m", "linf"): (512, 400),
    ("cifar10", "28-10", "20m", "linf"): (2048, 2400),
    ("cifar10", "70-16", "50m", "linf"): (1024, 2000),
    ("cifar10", "28-10", "50m", "l2"): (2048, 1600),
    ("cifar10", "70-16", "50m", "l2"): (1024, 2000),
    ("cifar100", "28-10", "1m", "linf"): (512, 400),
    ("cifar100", "28-10", "50m", "linf"): (2048, 1600),
    ("cifar100", "70-16", "50m", "linf"): (1024, 2000),
    ("svhn", "28-10", "50m", "linf"): (1024, 800),
    ("tiny-imagenet", "28-10", "1m", "linf"): (512, 400),
}


def wang(data: str, network: str, batch_size: int, epochs: int, *, awp: bool, norm: str = "linf") -> Config:
    """TRADES with 70% of every batch generated (--data.extra: EDM's images), cosine cycles of rate and momentum, EMA.

    [?]: the rate of 0.2 of all rows but the first, as their batch sizes and epochs; the evaluation's step in L2. There
    is no AWP in the paper: gamma and its start (after 10 of 400 epochs) are the AWP paper's for TRADES.

    Args:
        data: a key of `_SETS`.
        network: depth and width of a wide residual network, "28-10".
        batch_size: images of both kinds.
        epochs: of as many images as the data set has, of both kinds.
        awp: with weight perturbation.
        norm: "linf" (8/255) or "l2" (128/255).
    """
    known, l2 = _SETS[data], norm == "l2"
    plain, steps = data == "svhn", -(-known.images // batch_size)
    return Config(
        # TRADES that asks for extra images
        method="rst",
        beta=5.0,
        label_smoothing=0.1,
        data=DataConfig(
            name=data,
            held_out_fraction=_HELD_OUT / known.images,
            pad=0 if plain else 4,
            flip=not plain,
            rotate=15.0 if data == "cifar100" else 0.0,
            extra_fraction=0.7,
            extra_replacement=True,
            epoch_images=known.images,
        ),
        model=ModelConfig(
            name=f"dm-wrn-{network}", activation="silu", mean=known.mean, std=known.std, bn_momentum=0.01
        ),
        attack=AttackConfig(
            norm=norm,  # pyright: ignore[reportArgumentType]
            epsilon="128/255" if l2 else "8/255",
            # of L2 twice epsilon over the number of steps
            step_size="128/1275" if l2 else "2/255",
            steps=10,
            bn_mode="train",
            start="normal" if l2 else "uniform",
        ),
        awp=AwpConfig(gamma=0.005 if awp else 0.0, warmup=round(_RISE * epochs) if awp else 0),
        optimizer=OptimizerConfig(
            lr=0.2,
            weight_decay=5e-4,
            nesterov=True,
            schedule="one-cycle-cosine",
            warmup=_RISE * epochs,
            per_epoch=True,
            cycle_momentum=True,
            decay_norms=False,
        ),
        # the last step of the rise is the first one that is averaged
        average=AverageConfig(kind="ema", decay=0.995, warmup=_RISE * epochs - 1 / steps, statistics="live"),
        evaluation=EvaluationConfig(steps=40, step_size="15/255" if l2 else "2/255", loss="margin"),
        epochs=epochs,
        global_batch_size=batch_size,
        log_interval=30.0,
    )


def bartoldson(network: str, epochs: int, *, alone: int, awp: bool) -> Config:
    """The same at scale: batches of 2,048, no generated image twice before all were seen, 87.5% of a batch generated.

    [?]: that the pools of generated images change with the epoch (EDM, DG, PFGM++, in blocks of 2,000 epochs) is not
    reproduced; give one pool of all by --data.extra.

    Args:
        network: depth and width.
        epochs: of 50,000 images of both kinds.
        alone: epochs at the beginning with generated images alone.
        awp: with weight perturbation.
    """
    base = wang("cifar10", network, 2048, epochs, awp=awp)
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, extra_fraction=0.875, extra_replacement=False, extra_alone=alone),
        optimizer=dataclasses.replace(base.optimizer, lr=0.1),
        distributed=DistributedConfig(sync_batch_norm=True),
    )


def _presets() -> dict[str, Preset]:
    presets = {}
    for awp in (False, True):
        suffix, with_awp = ("-awp", "-AWP") if awp else ("", "")
        for (data, network, images, norm), (size, epochs) in _WANG.items():
            last = "-l2" if norm == "l2" else "" if images == "1m" else f"-{images}"
            # one had its name in earlier versions
            kind = "silu-trades" if (data, images) == ("cifar10", "1m") else "trades"
            name = f"{data}-wrn-{network}-{kind}{suffix}-edm{last}"
            summary = f"TRADES{with_awp}{', L2' * (norm == 'l2')}, {images.upper()} images by EDM."
            presets[name] = (summary, functools.partial(wang, data, network, size, epochs, awp=awp, norm=norm))
        for network, epochs, alone in (("94-16", 10_000, 6_000), ("82-8", 6_820, 0)):
            summary = f"TRADES{with_awp}, {epochs * 50_000 // 10**6}M images seen."
            recipe = functools.partial(bartoldson, network, epochs, alone=alone, awp=awp)
            presets[f"cifar10-wrn-{network}-trades{suffix}-scaled"] = (summary, recipe)
    return presets


PRESETS: dict[str, Preset] = _presets()

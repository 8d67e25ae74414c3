"""FastAT Benchmark: its protocol, with the method that leads it, LIET, and with PGD-AT-WA, what it compares with.

Source: the public code, fzjcdt/FastAT_Benchmark at b99c0de. What differs from it stands in docs/recipes.md.
"""

import dataclasses
import functools

from awp_engine.config.presets.paper import paper
from awp_engine.config.presets.preset import TITLES, Preset
from awp_engine.config.settings import AverageConfig, Config, EvaluationConfig, OptimizerConfig

# weight of the divergence, and label smoothing
_LIET = {"cifar10": (100.0, 0.6), "cifar100": (200.0, 0.8)}


def benchmark(data: str) -> Config:
    """The protocol with its baseline, PGD-AT-WA: AT by PGD-10 in eval mode, label smoothing and averaged weights.

    100 epochs by OneCycleLR, once an epoch; images are not normalised.

    Args:
        data: "cifar10" or "cifar100".
    """
    base = paper(data, "preact-resnet-18", "at", awp=False)
    return dataclasses.replace(
        base,
        label_smoothing=0.4,
        model=dataclasses.replace(base.model, normalize="none"),
        attack=dataclasses.replace(base.attack, bn_mode="eval"),
        optimizer=OptimizerConfig(
            lr=0.1,
            weight_decay=5e-4,
            schedule="one-cycle-cosine",
            warmup=30.0,
            per_epoch=True,
            cycle_momentum=True,
        ),
        average=AverageConfig(kind="ema", decay=0.9995, ramp=False, statistics="averaged"),
        evaluation=EvaluationConfig(steps=10, step_size="2/255"),
        epochs=100,
    )


def liet(data: str) -> Config:
    """LIET: one step of epsilon, by the batch's statistics.

    Args:
        data: "cifar10" or "cifar100".
    """
    base, (beta, smoothing) = benchmark(data), _LIET[data]
    return dataclasses.replace(
        base,
        method="liet",
        beta=beta,
        label_smoothing=smoothing,
        attack=dataclasses.replace(base.attack, step_size="8/255", steps=1, bn_mode="train"),
    )


PRESETS: dict[str, Preset] = {
    **{
        f"{data}-preact-resnet18-liet": (f"LIET on {TITLES[data]}, Linf 8/255.", functools.partial(liet, data))
        for data in _LIET
    },
    "cifar10-preact-resnet18-at-wa": (
        "AT of FastAT on CIFAR-10, averaged.",
        functools.partial(benchmark, "cifar10"),
    ),
}

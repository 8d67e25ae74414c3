"""Cheap attacks."""

import dataclasses
import functools

from awp_engine.config.presets.paper import paper
from awp_engine.config.presets.preset import Preset
from awp_engine.config.settings import (
    Config,
    OptimizerConfig,
)


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


PRESETS: dict[str, Preset] = {
    "cifar10-preact-resnet18-fgsm-rs": ("FGSM-RS, 30 epochs, one-cycle rate.", functools.partial(fast, "fgsm-rs")),
    "cifar10-preact-resnet18-n-fgsm": ("N-FGSM, 30 epochs, one-cycle rate.", functools.partial(fast, "n-fgsm")),
    "cifar10-preact-resnet18-free": ("Free: 4 epochs, each batch 8 times.", functools.partial(fast, "free")),
}

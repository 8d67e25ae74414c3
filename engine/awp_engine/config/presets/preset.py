"""What a preset is."""

from collections.abc import Callable
from typing import TypeAlias

from awp_engine.config.settings import Config

Preset: TypeAlias = tuple[str, Callable[[], Config]]
"""A line about it, and what makes its settings."""

TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN", "tiny-imagenet": "Tiny-ImageNet"}
"""Data sets, as a line about a preset calls them."""


def short(model: str) -> str:
    """A model in a preset's name."""
    return model.replace("resnet-", "resnet")

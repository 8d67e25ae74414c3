"""The ways to make a training step that `bench/step/step.py` compares."""

from collections.abc import Callable

from torch import nn

from .common import NUM_CLASSES, Arm, Settings, necessary_units
from .eager import compile_arm, eager_arm
from .engine import engine_arm, engine_config
from .public import public_arm

ARMS: dict[str, Callable[[Settings, nn.Module], Arm]] = {
    "engine": engine_arm,
    "public": public_arm,
    "eager": eager_arm,
    "compile": compile_arm,
}

__all__ = ["ARMS", "NUM_CLASSES", "Arm", "Settings", "engine_config", "necessary_units"]

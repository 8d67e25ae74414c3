"""Where a run stands, and what an epoch's metrics are made of."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from awp_engine.step.values import StepResult


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Where a run stands: after `epoch` whole epochs and `step` steps of the next one."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_robust: float = -1.0
    best_clean: float = -1.0
    since_best: int = 0
    averaged: int = 0

    def __str__(self) -> str:
        return f"epoch {self.epoch}" + (f" and {self.step} steps" if self.step else "")

    @classmethod
    def read(cls, state: Mapping[str, Any]) -> Self:
        """What a checkpoint's state holds.

        Raises:
            KeyError, ValueError: a number is missing, or none that a run can have.
        """
        found = cls(**{field.name: state[field.name] for field in dataclasses.fields(cls)})
        for name, start in dataclasses.asdict(cls()).items():
            # NaN is not in it either
            if type(state[name]) not in (type(start), int) or not start <= state[name] < 2**63:
                raise ValueError(f"{name} {str(state[name])[:20]!r}; expected a finite number, {start} or more")
        return found


class EpochSums:
    """What an epoch's metrics are made of, added up on the device.

    Attributes:
        values: fp64 [10].
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(10, dtype=torch.float64, device=device)

    def reset_(self) -> None:
        """Begin an epoch."""
        self.values.zero_()

    def add_(self, numbers: Tensor, skipped: Tensor, size: int) -> None:
        """Take a step over `size` images in: what `stacked` tells, but for the last, fp64 [6]."""
        loss, correct, zeros, nonfinite, rise, room = numbers
        trained = torch.where(skipped, 0.0, float(size))
        learned = torch.where(skipped, 0.0, loss * size)
        ones = torch.ones_like(loss)
        # what broke the model says nothing of an epoch's mean
        known = rise.isfinite() & room.isfinite() & (room > 0)
        risen, could = (torch.where(known, value * size, 0.0) for value in (rise, room))
        counted = [learned, trained, correct * size, ones * size, zeros, skipped.double(), ones, nonfinite]
        self.values += torch.stack([*counted, risen, could])

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"sums": self.values}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave; those of earlier versions are shorter."""
        self.reset_()
        self.values[: len(state["sums"])].copy_(state["sums"])

    def metrics(self) -> dict[str, float]:
        """Means over the images, or over the steps; the loss is NaN where no step was taken. Waits for the device."""
        loss, trained, correct, seen, zeros, skipped, steps, nonfinite, rise, room = self.values.tolist()
        return {
            # not 0 where every step was left out
            "loss": loss / trained if trained else math.nan,
            "train_pgd_accuracy": correct / seen,
            "zero_gradients": zeros / steps,
            "nonfinite_gradients": nonfinite / steps,
            "skipped_steps": skipped,
            **({"awp_rise": rise / room} if room else {}),
        }


def stacked(result: StepResult, stop: bool) -> Tensor:
    """What is told of every update of a step, and whether this rank was asked to stop: fp64 [7, updates]."""
    asked = torch.full_like(result.loss, float(stop))
    numbers = [result.loss, result.correct, result.zero_gradients, result.nonfinite_gradients]
    return torch.stack([*numbers, result.rise, result.room, asked]).double().reshape(7, -1)

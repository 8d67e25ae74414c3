"""What goes into a training step and what comes out: a batch and a phase, and a result."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from awp_engine.attack import Attack
from awp_engine.distributed.batch import Batch
from awp_engine.step.noise import Noise


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What the schedule says of one step.

    Attributes:
        attack: how the images are attacked.
        seed: of the attack's noise.
        perturb: whether the weights are perturbed.
        free: whether one pass serves image and weights; see `FreeStep`.
        lr: learning rate; None leaves it as it is.
        momentum: of SGD; None leaves it as it is.
        noise: on the images that the weights are trained by, or None.
        whole_statistics: whether running statistics become those of the batch, as in the first step of a run that has a
            momentum of its own for them.
        layer_seed: of what layers draw from torch's global generator, such as dropout; None leaves that as it is.
        done: part of the run's steps that come before this one.
        epoch: that this step is of, from 1.
        step: of the epoch, from 0.
    """

    attack: Attack
    seed: int = 0
    perturb: bool = True
    free: bool = False
    lr: float | None = None
    momentum: float | None = None
    noise: Noise | None = None
    whole_statistics: bool = False
    layer_seed: int | None = None
    done: float = 0.0
    epoch: int = 1
    step: int = 0


class StepResult(NamedTuple):
    """What a step is logged by; all stay on the device.

    A scalar each, or [updates] where a batch serves for several updates of the weights. Of several ranks each has its
    part of all but `skipped`: their sums are those of the batch.

    Attributes:
        loss: averaged over the batch, at the perturbed weights where there are such; not finite at times where the
            step was skipped.
        correct: part of the attacked images that were classified right in the same forward pass.
        skipped: bool, the same on all ranks: a gradient was not finite, and weights, momentum and statistics were left
            as they were.
        zero_gradients: the part of exactly zero entries in the attack's last gradient; a mask's mark.
        nonfinite_gradients: the part of entries there that are not finite; an overflow's mark.
        rise: how much higher the loss is at the perturbed weights than at w; 0 where it is not known.
        room: how much higher that of guessing is than that at w; likewise.
    """

    loss: Tensor
    correct: Tensor
    skipped: Tensor
    zero_gradients: Tensor
    nonfinite_gradients: Tensor
    rise: Tensor
    room: Tensor


class Step(Protocol):
    """Trains on one batch, or on this rank's part of it."""

    def __call__(self, batch: Batch, phase: Phase) -> StepResult:
        """Attack, climb, descend, update."""
        ...

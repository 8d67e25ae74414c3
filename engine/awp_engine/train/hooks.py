"""What is done between two steps; each hook owns its cadence, and all ranks come to the same conclusion."""

from collections.abc import Callable

import torch
from torch import Tensor

from awp_engine.device import DelayedReadback
from awp_engine.train.schedule import Schedule
from awp_engine.train.state import RunState

# a loss scale that starts too high is halved in each of them
_MOST_SKIPPED = 10


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line that says why and what to do."""


class StopOrDiverge:
    """Ends the run where some rank was asked to stop, or where ten steps in a row were skipped.

    The host reads both a step late on a GPU, and never waits for the step that runs.
    """

    def __init__(self, device: torch.device, stop: Callable[[], object]) -> None:
        self._stop, self._readback = stop, DelayedReadback(device, 2)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)

    def count(self, asked: Tensor, skipped: Tensor) -> None:
        """Take an update in: how many ranks were asked to stop, and whether it was skipped."""
        self._skipped = torch.where(skipped, self._skipped + 1, 0)
        self._readback.push(torch.stack([asked, self._skipped.double()]))

    def __call__(self, state: RunState) -> None:
        """Raise what ends the run."""
        stop, skipped = self._readback.latest()
        if skipped >= _MOST_SKIPPED:
            raise TrainingError(
                f"epoch {state.progress.epoch + 1}, step {state.progress.step}: the gradients of {skipped:.0f} steps "
                "in a row were not finite, and the weights stayed as they were before; start again elsewhere with a "
                "smaller --optimizer.lr"
            )
        if stop:
            self._stop()


class Every:
    """Does something every so many steps of the run; never where that is None."""

    def __init__(self, steps: int | None, schedule: Schedule, act: Callable[[RunState], object]) -> None:
        self._steps, self._schedule, self._act = steps, schedule, act

    def __call__(self, state: RunState) -> None:
        """Do it if it is time."""
        number = self._schedule.number(state.progress.epoch + 1, state.progress.step)
        if self._steps is not None and number % self._steps == 0:
            self._act(state)


def check_replicas(state: RunState) -> None:
    """Compare the ranks' weights."""
    state.check_replicas(f"epoch {state.progress.epoch + 1}, step {state.progress.step}")

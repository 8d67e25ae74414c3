"""Free adversarial training: one pass serves image and weights.

Source: Shafahi et al.: Adversarial Training for Free!, NeurIPS 2019.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from awp_engine.distributed.batch import Batch
from awp_engine.step.awp_step import AwpStep
from awp_engine.step.passes import gradient_marks
from awp_engine.step.values import Phase, Step, StepResult


class FreeStep:
    """Updates the weights several times on a batch, and the images' perturbation with them, which the next one goes on
    from; leaves phases that are not free to the full step.

    Args:
        step: whose passes and update are used.
        otherwise: takes the steps of other phases: `step`, or what captures it.
        replays: updates that a batch serves for.
        memory_format: of the images.
    """

    def __init__(self, step: AwpStep, otherwise: Step, *, replays: int, memory_format: torch.memory_format) -> None:
        self._step, self._otherwise, self._replays = step, otherwise, replays
        self._memory_format = memory_format
        self._delta: Tensor | None = None
        self._whole_size = 0

    def begin_epoch(self) -> None:
        """Start from no perturbation, so that a run resumes exactly."""
        self._delta = None

    def __call__(self, batch: Batch, phase: Phase) -> StepResult:
        """Train on one batch, or on this rank's part of it; the result's fields are [replays] in a free phase."""
        if not phase.free:
            return self._otherwise(batch, phase)
        x = batch.images
        if self._delta is None or self._delta.shape[0] < len(x):
            self._delta, self._whole_size = torch.zeros_like(x), batch.whole_size
        delta, results = self._delta[: len(x)], []
        self._step.passes.prepare(phase)
        for _ in range(self._replays):
            self._step.update.prepare(phase)
            results.append(self.replay(batch, phase, delta))
        return StepResult(*map(torch.stack, zip(*results, strict=True)))

    def replay(self, batch: Batch, phase: Phase, delta: Tensor) -> StepResult:
        """One update, which moves `delta`, [N, C, H, W], in place."""
        passes, x, epsilon = self._step.passes, batch.images, phase.attack.epsilon
        passes.begin(x)
        share = passes.share(len(x), batch.whole_size)
        statistics = self._step.kept()
        with passes.rollback(statistics):
            x_adv = (x + delta).clamp_(0, 1).requires_grad_()
            loss, correct = passes.descend(x_adv, batch, share)
            assert x_adv.grad is not None
            delta.add_(x_adv.grad.sign(), alpha=epsilon).clamp_(-epsilon, epsilon)
            skipped = self._step.update()
            self._step.finish(statistics, share, skipped)
        zeros, nonfinite = gradient_marks(x_adv.grad, x) * share.share
        return StepResult(loss, correct, skipped, zeros, nonfinite, torch.zeros_like(loss), torch.zeros_like(loss))

    def state(self) -> dict[str, Tensor]:
        """The perturbation of all ranks' images, for a checkpoint in mid-epoch; all ranks have to call it."""
        if self._delta is None:
            return {}
        ranks = self._step.passes.ranks
        rows, share = ranks.share(self._whole_size)
        whole = self._delta.new_zeros(self._whole_size, *self._delta.shape[1:])
        whole[rows] = self._delta if self._whole_size >= ranks.world else self._delta * share
        ranks.sum_([whole])
        return {"delta": whole}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave, on any number of ranks."""
        if "delta" in state:
            self._whole_size = len(state["delta"])
            rows, _ = self._step.passes.ranks.share(self._whole_size)
            device = next(self._step.models.model.parameters()).device
            self._delta = state["delta"][rows].to(device).contiguous(memory_format=self._memory_format)

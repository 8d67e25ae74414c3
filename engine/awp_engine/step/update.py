"""The update at w, which a step whose gradient is not finite leaves out whole."""

import torch
from torch import Tensor

from awp_engine.optim.average import WeightAverage
from awp_engine.optim.by_name import WrappedOptimizer
from awp_engine.optim.optimizer import Optimizer, set_learning_rate, set_momentum
from awp_engine.step.precision import LossScale, WorkingModels
from awp_engine.step.values import Phase
from awp_kernels import AdversarialWeightPerturbation, total_norm


class Update:
    """Steps the optimizer, and keeps what hangs on the weights up to date.

    Args:
        optimizer: over the masters, as `build_optimizer` makes it.
        models: whose working copies are written along.
        awp: the weight perturbation, which is told the new norms; or None.
        loss_scale: what gradients were multiplied by, or None.
        clip_norm: largest norm of the gradient, or None.
        average: of the weights, which every step is taken into; or None.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        models: WorkingModels,
        *,
        awp: AdversarialWeightPerturbation | None = None,
        loss_scale: LossScale | None = None,
        clip_norm: float | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self.optimizer, self.clip_norm, self.average = optimizer, clip_norm, average
        self._models, self._awp, self._loss_scale = models, awp, loss_scale

    def prepare(self, phase: Phase) -> None:
        """What the host says of an update to come; the device reads it, in a captured step too."""
        if phase.lr is not None:
            set_learning_rate(self.optimizer, phase.lr)
        if phase.momentum is not None:
            set_momentum(self.optimizer, phase.momentum)
        if self.average is not None:
            self.average.before_step()

    @torch.no_grad()
    def forget_(self) -> None:
        """Have the optimizer go on like a new one."""
        if isinstance(self.optimizer, WrappedOptimizer):
            self.optimizer.optimizer.state.clear()
            return
        # in place, for captured steps
        for state in self.optimizer.state.values():
            for tensor in state.values():
                if isinstance(tensor, Tensor):
                    tensor.zero_()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The optimizer's step, left out if a gradient is not finite; returns, on the device, whether it was."""
        optimizer, loss_scale = self.optimizer, self._loss_scale
        # an ascent that was not followed on some rank shows here as well: its `followed` made all gradients NaN
        norm = total_norm(optimizer.gradients())
        skipped = ~torch.isfinite(norm)
        optimizer.step(
            found_inf=skipped.float(),
            grad_norm=norm,
            max_norm=self.clip_norm,
            grad_scale=None if loss_scale is None else loss_scale.value,
        )
        self._models.refresh_(updated=True)
        if self._awp is not None:
            # the update wrote the working copy anew
            self._awp.forget_()
            self._awp.take_weight_norms(optimizer.weight_norms)
        if loss_scale is not None:
            loss_scale.update_(skipped)
        return skipped

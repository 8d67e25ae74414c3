"""Rebalanced adversarial training (ReBAT)."""

import torch
from torch import Tensor, nn

from awp_engine.step.objectives.adversarial_training import AdversarialTraining
from awp_engine.step.objectives.objective import divergence


class Rebat(AdversarialTraining):
    """Cross-entropy on the attacked images, and a pull of their answers to those of the average of the weights.

    Args:
        beta: weight of the divergence.
        label_smoothing: part of a label that is spread over all classes, in [0, 1).
        average_warmup: epochs in which the average is a copy of the weights; the divergence begins with the first whole
            epoch after them.

    Source: Wang et al.: Balance, Imbalance, and Rebalance: Understanding Robust Overfitting from a Minimax Game
    Perspective, NeurIPS 2023.
    """

    uses_average = True

    def __init__(self, beta: float = 1.0, label_smoothing: float = 0.0, average_warmup: float = 0.0) -> None:
        super().__init__(label_smoothing)
        self.beta, self._average_warmup = beta, average_warmup

    def begin_step(self, done: float, epoch: int, step: int) -> None:
        """Whether the average has begun: before that it is not asked."""
        self.stage = epoch - 1 >= self._average_warmup

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """CE(f(x'), y) + beta * KL(f_ema(x') || f(x')), without gradients through f_ema."""
        losses, logits = super().losses(model, x_adv, x, y)
        if self.stage:
            assert self.average is not None
            with torch.no_grad():
                told = self.average(x_adv)
            losses = losses + self.beta * divergence(logits, told)
        return losses, logits

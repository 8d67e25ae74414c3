"""TRADES, which is also the loss of robust self-training (RST)."""

import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.attack import DivergenceFrom, Loss
from awp_engine.step.objectives.objective import Objective, at_least_fp32, divergence


class Trades(Objective):
    """Cross-entropy on the clean images, and a divergence that holds attacked images to what is said of clean ones.

    Args:
        beta: weight of the divergence.
        label_smoothing: part of a label that is spread over all classes, in [0, 1).

    Source: Zhang et al.: Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019; with
    pseudo-labelled images Carmon et al.: Unlabeled Data Improves Adversarial Robustness, NeurIPS 2019.
    """

    def __init__(self, beta: float = 6.0, label_smoothing: float = 0.0) -> None:
        self.beta, self.label_smoothing = beta, label_smoothing

    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Loss:
        """Summed KL(f(x') vs f(x)); the clean logits do not depend on x' and are computed once."""
        return DivergenceFrom(model(x))

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """CE(f(x), y) + beta * KL(f(x') vs f(x)), with gradients through both; two forward passes, not three."""
        logits_adv, logits = model(x_adv), model(x)
        natural = F.cross_entropy(at_least_fp32(logits), y, reduction="none", label_smoothing=self.label_smoothing)
        return natural + self.beta * divergence(logits_adv, logits), logits_adv

"""AT: cross-entropy on the attacked images."""

import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.step.objectives.objective import Objective, at_least_fp32


class AdversarialTraining(Objective):
    """Cross-entropy on the attacked images.

    Args:
        label_smoothing: part of a label that is spread over all classes, in [0, 1).

    Source: Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """CE(f(x'), y)."""
        logits = model(x_adv)
        return F.cross_entropy(at_least_fp32(logits), y, reduction="none", label_smoothing=self.label_smoothing), logits

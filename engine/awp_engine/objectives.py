"""What a method minimises, given the attacked images."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Objective = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps (model, x_adv, x, y) to the scalar loss and the logits of x_adv, [N, classes]."""


def adversarial_training(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy on the attacked images, averaged over the batch.

    Source: Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
    """
    logits = model(x_adv)
    return F.cross_entropy(logits, y), logits


OBJECTIVES: dict[str, Objective] = {"at": adversarial_training}

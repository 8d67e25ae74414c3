"""What attacks climb."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every sample, [N], at least fp32."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the batch: a mean would underflow in 16 bits, and the step ignores the scale."""
    return cross_entropy_losses(logits, labels).sum()


def summed_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit less the right one, summed over the batch.

    Source: Carlini, Wagner: Towards Evaluating the Robustness of Neural Networks, S&P 2017, without its confidence.
    """
    right = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    wrong = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
    return (wrong - right).sum()


# what is checked to be given logits and labels that fit
OF_LOGITS: tuple[Loss, ...] = (summed_cross_entropy, summed_margin, cross_entropy_losses)

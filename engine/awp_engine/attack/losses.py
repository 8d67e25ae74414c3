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


def margin_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit less the right one, [N].

    Source: Carlini, Wagner: Towards Evaluating the Robustness of Neural Networks, S&P 2017, without its confidence.
    """
    right = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    wrong = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
    return wrong - right


def summed_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """`margin_losses` summed over the batch."""
    return margin_losses(logits, labels).sum()


def log_probabilities(logits: Tensor) -> Tensor:
    """Of logits [N, classes], at least fp32."""
    return F.log_softmax(logits, 1, dtype=torch.promote_types(logits.dtype, torch.float32))


def label_probabilities(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels, int64 [N] or of mixtures [N, classes], as probabilities [N, classes] like logits, at least fp32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if labels.is_floating_point():
        return labels.to(dtype)
    return torch.zeros_like(logits, dtype=dtype).scatter_(1, labels.unsqueeze(1), 1.0)


class DivergenceFrom:
    """Summed KL(p || softmax(logits)), which TRADES' attack climbs.

    Args:
        clean: logits of p, [N, classes], which do not move with the attacked images.
    """

    def __init__(self, clean: Tensor) -> None:
        self.clean = log_probabilities(clean.detach())

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits [N, classes]; whatever the labels."""
        return F.kl_div(log_probabilities(logits), self.clean, reduction="sum", log_target=True)


def target_of(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor | None:
    """The probabilities [N, classes] of which a loss is the summed cross-entropy, but for a constant; None: it is not.

    Minus these is the gradient in the log-probabilities, and the same at every step of an attack.
    """
    if isinstance(loss, DivergenceFrom):
        return loss.clean.exp()
    if loss is not summed_cross_entropy:
        return None
    return label_probabilities(labels, logits)


# what is checked to be given logits and labels that fit
OF_LOGITS: tuple[Loss, ...] = (summed_cross_entropy, summed_margin, cross_entropy_losses, margin_losses)

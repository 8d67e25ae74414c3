"""The interface that all methods share."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.attack import Loss, summed_cross_entropy
from awp_engine.attack.losses import log_probabilities


class Objective(ABC):
    """A method: what the attack climbs, and what weights are trained by.

    The ascent of the weight perturbation climbs `losses` as well, as in the AWP paper.
    """

    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Loss:
        """The loss that the attack on a batch climbs; here cross-entropy.

        Called once a step, without gradients and in the attack's mode of batch normalisation, so that whatever needs
        clean logits computes them once and not once an iteration.

        Args:
            model: the classifier.
            x: [N, C, H, W], clean images.
            y: int64 [N], or fp32 [N, classes] of a mixture.
        """
        return summed_cross_entropy

    @abstractmethod
    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised, after averaging over the batch.

        Args:
            model: the classifier, in train mode.
            x_adv: [N, C, H, W], attacked images.
            x: [N, C, H, W], clean images.
            y: int64 [N], or fp32 [N, classes] of a mixture.

        Returns:
            Losses [N], at least fp32, and the logits of x_adv, [N, classes].
        """


def at_least_fp32(logits: Tensor) -> Tensor:
    """16-bit logits in fp32: divergences and logarithms need its digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def divergence(logits_adv: Tensor, logits_clean: Tensor) -> Tensor:
    """KL(p_clean || p_adv) of every sample, [N]."""
    adv, clean = log_probabilities(logits_adv), log_probabilities(logits_clean)
    return F.kl_div(adv, clean, reduction="none", log_target=True).sum(1)

"""LBGAT: a network that is trained along, on clean images, guides the classifier at attacked ones.

Source: Cui, Liu, Wang, Jia: Learnable Boundary Guided Adversarial Training, ICCV 2021, and its public code,
dvlab-research/LBGAT. What is different from that stands in docs/methods.md.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.step.objectives.objective import at_least_fp32, divergence
from awp_engine.step.objectives.trades import Trades


class Lbgat(Trades):
    """A pull of attacked logits to those of the partner at clean images, cross-entropy of the partner alone, and the
    divergence of TRADES, which the attack climbs.

    Args:
        beta: weight of the divergence.
        partner: which network is trained along, as `Objective.partner_name`.
    """

    def __init__(self, beta: float = 6.0, partner: Any = "auto") -> None:
        super().__init__(beta)
        self.partner_name = partner

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over classes of (f(x') - t(x))^2 + CE(t(x), y) + beta KL(f(x) || f(x')), [N]; gradients through all of
        it in the descent, and through f in the ascent.
        """
        logits_adv, logits, told = model(x_adv), model(x), at_least_fp32(self.ask_partner(x))
        guided = (at_least_fp32(logits_adv) - told).square().mean(1)
        natural = F.cross_entropy(told, y, reduction="none")
        return guided + natural + self.beta * divergence(logits_adv, logits), logits_adv

"""MART."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.step.objectives.objective import Objective, at_least_fp32, divergence


class Mart(Objective):
    """Boosted cross-entropy on attacked images, and a divergence weighted by how wrong the clean image is.

    Args:
        beta: weight of the divergence, the paper's lambda.

    Source: Wang et al.: Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR 2020.
    """

    def __init__(self, beta: float = 6.0) -> None:
        self.beta = beta

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """BCE(f(x'), y) + beta * KL(f(x') vs f(x)) * (1.0000001 - p_clean[y]).

        BCE = CE(f(x'), y) - log(1.0001 - largest wrong p_adv + 1e-12); all of it in fp32 at the least, as 16 bits
        would round 1.0001 to 1 and take the logarithm of 0.
        """
        logits_adv, logits = model(x_adv), model(x)
        adv = at_least_fp32(logits_adv)
        right = y.unsqueeze(1)
        wrong = adv.detach().scatter(1, right, -torch.inf).argmax(1, keepdim=True)
        wrong_probability = adv.softmax(1).gather(1, wrong).squeeze(1)
        boosted = F.cross_entropy(adv, y, reduction="none") - torch.log(1.0001 - wrong_probability + 1e-12)
        right_probability = at_least_fp32(logits).softmax(1).gather(1, right).squeeze(1)
        return boosted + self.beta * divergence(logits_adv, logits) * (1.0000001 - right_probability), logits_adv

"""Methods that learn from a frozen network: robust distillation (ARD, RSLAD, AdaAD), and HAT.

What they say differently from their public code stands in docs/methods.md.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.attack import Loss
from awp_engine.attack.losses import log_probabilities
from awp_engine.step.objectives.objective import Objective, at_least_fp32, divergence, require_number
from awp_engine.step.objectives.trades import Trades

# of temperatures, weights and lengths
_MOST = 1e6


class _Taught(Objective):
    """One that asks a teacher."""

    uses_teacher = True

    @torch.no_grad()
    def told(self, x: Tensor) -> Tensor:
        """What the teacher says of images, logits [N, classes], in the precision of the pass that asks."""
        assert self.teacher is not None
        return at_least_fp32((self.teacher.descent if self.descending else self.teacher.ascent)(x))


class Ard(_Taught):
    """Cross-entropy on clean images, and a pull of attacked answers to the teacher's on clean ones; CE is climbed.

    Args:
        beta: weight of the divergence.
        alpha: share of the divergence in the loss, the cross-entropy having the rest.
        temperature: of both answers; the divergence is multiplied by its square.

    Raises:
        ConfigError: an alpha that is no number in [0, 1], a temperature that is none from 0.01 on.

    Source: Goldblum, Fowl, Feizi, Goldstein: Adversarially Robust Distillation, AAAI 2020.
    """

    def __init__(self, beta: float = 0.1, alpha: Any = 1.0, temperature: Any = 30.0) -> None:
        self.beta, self.alpha = beta, require_number("alpha", alpha, most=1)
        self.temperature = require_number("temperature", temperature, least=0.01, most=_MOST)

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """T^2 alpha beta KL(t(x) / T || f(x') / T) + (1 - alpha) CE(f(x), y)."""
        logits_adv, logits = model(x_adv), model(x)
        pulled = divergence(at_least_fp32(logits_adv) / self.temperature, self.told(x) / self.temperature)
        natural = F.cross_entropy(at_least_fp32(logits), y, reduction="none")
        return self.alpha * self.beta * self.temperature**2 * pulled + (1 - self.alpha) * natural, logits_adv


class Rslad(_Taught):
    """A pull of attacked and clean answers to the teacher's on clean images, which take the place of the labels.

    Args:
        beta: weight of the whole loss.
        alpha: share of attacked images in it.

    Raises:
        ConfigError: an alpha that is no number in [0, 1].

    Source: Zi, Zhao, Ma, Jiang: Revisiting Adversarial Robustness Distillation: Robust Soft Labels Make Student Better,
    ICCV 2021.
    """

    def __init__(self, beta: float = 0.1, alpha: Any = 5 / 6) -> None:
        self.beta, self.alpha = beta, require_number("alpha", alpha, most=1)

    def targets(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """p_t(x), whose cross-entropy the attack climbs: the divergence from it, but for a constant."""
        assert self.teacher is not None
        return at_least_fp32(self.teacher.descent(x)).softmax(1)

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of KL(p_t(x) || p(x')) and KL(p_t(x) || p(x)): beta (alpha, 1 - alpha)."""
        logits_adv, logits = model(x_adv), model(x)
        attacked, natural = (
            F.kl_div(log_probabilities(logits), told, reduction="none").sum(1)
            for logits, told in ((logits_adv, self.of_attacked(x_adv, y)), (logits, y))
        )
        return self.beta * (self.alpha * attacked + (1 - self.alpha) * natural), logits_adv

    def of_attacked(self, x_adv: Tensor, y: Tensor) -> Tensor:
        """What attacked answers are pulled to, [N, classes]."""
        return y


class AdaAd(Rslad):
    """RSLAD whose teacher answers to the attacked images, which are made where both disagree most.

    Args:
        beta, alpha: as in `Rslad`.

    Raises:
        ConfigError: as in `Rslad`.

    Source: Huang, Chen, Wang, Liu, Liu: Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial
    Distillation, CVPR 2023.
    """

    def __init__(self, beta: float = 0.1, alpha: Any = 1.0) -> None:
        super().__init__(beta, alpha)

    def attack_model(self, model: nn.Module, y: Tensor) -> nn.Module:
        """Both networks: the gradient for the images runs through the teacher, too."""
        assert self.teacher is not None
        return _Both(model, self.teacher.attack)

    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Loss:
        """Summed KL(p_t(x') || p(x')) of logits as `_Both` gives them."""
        return _disagreement

    def of_attacked(self, x_adv: Tensor, y: Tensor) -> Tensor:
        """p_t(x')."""
        return self.told(x_adv).softmax(1)


class _Both(nn.Module):
    """A classifier's logits, and behind them a teacher's."""

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        # no module of this one, whose modes an attack sets
        self.model, self._teacher = model, (teacher,)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 2 classes]."""
        return torch.cat([at_least_fp32(self.model(x)), at_least_fp32(self._teacher[0](x))], 1)


def _disagreement(logits: Tensor, labels: Tensor) -> Tensor:
    return divergence(*logits.chunk(2, 1)).sum()


class Hat(_Taught, Trades):
    """TRADES, and cross-entropy beyond the attacked images with what a network of standard training says at them.

    Args:
        beta, label_smoothing: as in `Trades`.
        gamma: weight of that cross-entropy.
        extension: how many times as far as the attacked image the one beyond it lies from the clean one.

    Raises:
        ConfigError: a gamma that is no number >= 0, an extension that is none >= 1.

    Source: Rade, Moosavi-Dezfooli: Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off,
    ICLR 2022.
    """

    def __init__(self, beta: float = 2.5, label_smoothing: float = 0.0, gamma: Any = 0.5, extension: Any = 2.0) -> None:
        super().__init__(beta, label_smoothing)
        self.gamma = require_number("gamma", gamma, most=_MOST)
        self.extension = require_number("extension", extension, least=1, most=_MOST)

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """TRADES' + gamma CE(f(x + extension (x' - x)), argmax h(x')), that image not clipped to [0, 1]."""
        losses, logits = super().losses(model, x_adv, x, y)
        beyond = at_least_fp32(model(x + self.extension * (x_adv - x)))
        return losses + self.gamma * F.cross_entropy(beyond, self.told(x_adv).argmax(1), reduction="none"), logits

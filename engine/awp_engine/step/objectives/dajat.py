"""DAJAT: TRADES on several views of each image, which are held to agree.

Source: Addepalli et al.: Efficient and Effective Augmentation Strategy for Adversarial Training, NeurIPS 2022, and its
public code, val-iisc/DAJAT.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.attack import DivergenceFrom, Loss
from awp_engine.attack.losses import log_probabilities
from awp_engine.config import ConfigError
from awp_engine.config.schema import show
from awp_engine.step.objectives.objective import Objective, at_least_fp32, by_view, divergence, require_number
from awp_engine.step.objectives.trades import Trades

VIEWS = 3
"""Of each image, where nothing else is said."""
# of the mean answer: its logarithm is taken
_LEAST = 1e-7


class Dajat(Objective):
    """The loss of TRADES, averaged over the views, and the Jensen-Shannon divergence between their clean answers.

    The first view is cropped and mirrored alone, and has batch normalisation of its own; the others are augmented more,
    and share a second set. The weight perturbation climbs the loss of TRADES at the first view, without smoothing.

    Args:
        beta: weight of the divergence of TRADES.
        label_smoothing: part of a label that is spread over all classes, in [0, 1).
        js_weight: weight of the divergence between views.
        views: of each image, the first one among them.

    Raises:
        ConfigError: a weight that is no number >= 0, or another number of views than 2 to 8.
    """

    def __init__(
        self, beta: float = 11.0, label_smoothing: float = 0.0, js_weight: float = 2.0, views: int = VIEWS
    ) -> None:
        require_number("js_weight", js_weight)
        if type(views) is not int or not 2 <= views <= 8:
            raise ConfigError(
                f"--method-args: views: expected 2 to 8, got {show(views)}; of one view it is --method trades"
            )
        self.beta, self.label_smoothing, self.js_weight, self.views = beta, label_smoothing, js_weight, views
        self._of_first = Trades(beta)

    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Loss:
        """Summed KL(f(x') vs f(x)) of all views: no view has a part in another's gradient."""
        of_rows = DivergenceFrom(by_view(model(x), self.views))
        return lambda logits, labels: of_rows(by_view(logits, self.views), labels)

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over views of CE(f(x), y) + beta * KL(f(x') vs f(x)) + js_weight * KL(p || m), [N], gradients through
        all; m is the mean of the views' p = softmax f(x). The logits are those of the first view.
        """
        logits_adv = model(x_adv)
        adv, clean = (by_view(at_least_fp32(logits), self.views) for logits in (logits_adv, model(x)))
        labels = y.repeat_interleave(self.views)
        natural = F.cross_entropy(clean, labels, reduction="none", label_smoothing=self.label_smoothing)
        told = log_probabilities(clean).view(len(x), self.views, -1)
        middle = told.exp().mean(1, keepdim=True).clamp_min(_LEAST).log()
        apart = (told.exp() * (told - middle)).sum(2)
        of_views = (natural + self.beta * divergence(adv, clean)).view(-1, self.views) + self.js_weight * apart
        return of_views.mean(1), logits_adv[:, : clean.shape[1]]

    def ascent_losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """CE(f(x), y) + beta * KL(f(x') vs f(x)) of the first view."""
        channels = x.shape[1] // self.views
        return self._of_first.losses(model, x_adv[:, :channels], x[:, :channels], y)

"""OA-AT: TRADES in a ball that grows beyond what people overlook, with attacks that keep to what they see.

Source: Addepalli, Jain, Sriramanan, Babu: Scaling Adversarial Training to Large Perturbation Bounds, ECCV 2022, and its
public code, val-iisc/OAAT at 4e6e344. What is different from that stands in docs/methods.md.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.attack import Attack, Loss, summed_cross_entropy
from awp_engine.attack.losses import log_probabilities
from awp_engine.config import ConfigError
from awp_engine.config.schema import show
from awp_engine.distributed.ranks import Ranks
from awp_engine.step.objectives.objective import at_least_fp32, require_number
from awp_engine.step.objectives.trades import Trades
from awp_engine.step.precision import WorkingModels

# of the average whose features tell how different images look
_DECAY = 0.995
# added to the length of a place's features
_LEAST = 1e-10
_MOST = 1e6


def perceptual_distance(features: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The square root of LPIPS without learned weights, [N]: at every place the features of each layer have length 1,
    and a layer counts by the mean over its places.

    Args:
        features: of one image a row, [N, channels, height, width] for every layer.
        others: of the other images, likewise.

    Source: Zhang, Isola, Efros, Shechtman, Wang: The Unreasonable Effectiveness of Deep Features as a Perceptual
    Metric, CVPR 2018; as Laidlaw, Singla, Feizi: Perceptual Adversarial Robustness, ICLR 2021, take it.
    """
    of_layers = []
    for ours, theirs in zip(features, others, strict=True):
        apart = _direction(ours) - _direction(theirs)
        of_layers.append(torch.linalg.vector_norm(apart.flatten(1), dim=1) / (ours[0, 0].numel() ** 0.5))
    return torch.linalg.vector_norm(torch.stack(of_layers), dim=0)


def _direction(features: Tensor) -> Tensor:
    features = at_least_fp32(features)
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _LEAST)


class Oaat(Trades):
    """OA-AT, in two parts of a run.

    In the first three quarters it is TRADES whose radius grows with the epoch; the weight perturbation climbs at images
    twice as far away. In the last quarter, batches take turns: an attack in a larger ball, whose images are brought
    back to the epoch's and held to a mixture of what is said of the clean and of the far ones; and an attack in the
    epoch's ball that pays for how different the images look to an average of the weights, as it was after the epoch
    before.

    Args:
        beta: weight of the divergence, up to the last quarter.
        label_smoothing: part of a label that is spread over all classes, in the descent alone.
        epochs: of the run.
        device: of the images.
        beta_end: that weight in the last epoch.
        mixing: part of the far images' answers in the mixture, which it comes close to at the end (alpha there).
        far: radius of the far attack, in epsilons, at least 1.
        lpips_weight: of the perceptual distance in the last epoch.
        first: radius of the ball in the first quarter, as a part of epsilon; random starts have at most that, but for
            attacks that pay for looks.
        climbs: what attacks climb, "ce" or "kl", the divergence from clean answers.

    Attributes:
        tracked: an average of the weights with decay 0.995, statistics and all; a copy in the first epoch.
        guide: what `tracked` was when the epoch began, for the attack in its precision.

    Raises:
        ConfigError: an argument that is out of range.
    """

    beta: Any
    tracked: nn.Module
    guide: WorkingModels

    def __init__(
        self,
        beta: float = 1.5,
        label_smoothing: float = 0.0,
        epochs: int = 1,
        device: torch.device | None = None,
        beta_end: Any = 3.0,
        mixing: Any = 0.2,
        far: Any = 1.5,
        lpips_weight: Any = 1.0,
        first: Any = 0.25,
        climbs: Any = "ce",
    ) -> None:
        if climbs not in ("ce", "kl"):
            raise ConfigError(f"--method-args: climbs: expected ce or kl, got {show(climbs)}")
        # read by captured steps
        weight, self._lpips, self._own, self._taken = (
            torch.ones((), dtype=torch.float64, device=device) for _ in range(4)
        )
        super().__init__(weight, label_smoothing)  # pyright: ignore[reportArgumentType]
        self._betas = beta, require_number("beta_end", beta_end, most=_MOST)
        self._mixing = require_number("mixing", mixing, most=1)
        self._lpips_weight = require_number("lpips_weight", lpips_weight, most=_MOST)
        self._reach = require_number("far", far, least=1, most=_MOST)
        self._first = require_number("first", first, most=1, positive=True)
        self._climbs_kl, self._epochs = climbs == "kl", epochs
        self._of_ascent = Trades(self.beta)
        self._epoch, self._quarter, self._late, self._far, self._fresh = 1, False, False, False, True
        self._epsilon = 0.0
        self._clean: list[Tensor] = []
        self.attack_note = (
            f"training attacks in {first:.3g} of --attack.epsilon in the first quarter of the epochs, then in a ball "
            f"that grows with the epoch, and in the last quarter every second batch in {far:.3g} epsilons; accuracies "
            "under attack in training are those of the epoch's own ball"
        )

    def follow(self, models: WorkingModels) -> None:
        """Copy the classifier twice: for the average, and for what it was when an epoch began."""
        self.tracked = copy.deepcopy(models.model).eval().requires_grad_(False)
        self.guide = WorkingModels(copy.deepcopy(self.tracked), models.precision)
        self._pairs = list(zip(self.tracked.state_dict().values(), models.model.state_dict().values(), strict=True))

    def begin_step(self, done: float, epoch: int, step: int) -> None:
        """Part of the run, weights of the losses; at the beginning of an epoch the guide becomes the average."""
        first = 3 * self._epochs // 4
        number, last = epoch - first, self._epochs - first
        self._epoch, self._late = epoch, 4 * epoch > 3 * self._epochs
        self._quarter, self._far = epoch <= self._epochs // 4, self._late and step % 2 == 0
        part = number / last if self._late else 0.0
        self.beta.fill_(self._betas[0] + (self._betas[1] - self._betas[0]) * part)
        self._lpips.fill_(self._lpips_weight * part)
        self._own.fill_(1 - self._mixing * number / (last + 1) if self._late else 1.0)
        self._taken.fill_(1.0 if epoch == 1 else 1 - _DECAY)
        self.fresh_optimizer = self._late and number == 1 and step == 0
        # an epoch has a radius of its own, but in the first quarter
        self.stage = 0 if self._quarter else epoch, self._far
        if step == 0:
            with torch.no_grad():
                for ours, tracked in zip(
                    self.guide.model.state_dict().values(), self.tracked.state_dict().values(), strict=True
                ):
                    ours.copy_(tracked)
        if step == 0 or self._fresh:
            # after a checkpoint was read, too
            self.guide.refresh_()
            self._fresh = False

    def choose(self, attack: Attack) -> Attack:
        """The attack in the epoch's ball, or the far one; in the first quarter half the steps, of twice the length."""
        quarter, first = self._quarter, self._first * attack.epsilon
        self._epsilon = first if quarter else attack.epsilon * self._epoch / self._epochs
        radius = min(self._reach * attack.epsilon, 1.0) if self._far else self._epsilon
        step_size, steps = (attack.step_size or 0.0) * radius / attack.epsilon, attack.steps
        if quarter:
            step_size, steps = 2 * step_size, -(-steps // 2)
        start = radius if self._late and not self._far else min(first, radius)
        return dataclasses.replace(attack, epsilon=radius, step_size=step_size, steps=steps, start_epsilon=start)

    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Loss:
        """Summed cross-entropy, or KL(f(x) || f(x')); of a batch that pays for its looks less their weight times it."""
        climbed = super().attack_loss(model, x, y) if self._climbs_kl else summed_cross_entropy
        if not self._late or self._far:
            return climbed
        self._clean = self._features(x)

        def less_the_distance(answers: Tensor, labels: Tensor) -> Tensor:
            paid = self._lpips.to(answers.dtype) * answers[:, -1]
            return climbed(answers[:, :-1], labels) - paid.sum()

        return less_the_distance

    def attack_model(self, model: nn.Module, y: Tensor) -> nn.Module:
        """The model, or the model and how far images look from the clean ones that `attack_loss` was given."""
        return model if not self._late or self._far else _WithDistance(model, self._features, self._clean)

    @property
    def _features(self) -> Any:
        """Of the guide, in the attack's precision."""
        return self.guide.attack.features

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """CE(f(x), y) + beta KL(f(x) || f(x')); of far images CE + beta KL(a p(x) + (1 - a) p(x') || p(x'')), where x''
        is x' brought back to the ball, and whose logits are x'''s. Gradients through all.
        """
        if not self._far:
            return super().losses(model, x_adv, x, y)
        near = torch.minimum(torch.maximum(x_adv, x - self._epsilon), x + self._epsilon)
        logits_far, logits, logits_near = model(x_adv), model(x), model(near)
        far, clean, own = log_probabilities(logits_far), log_probabilities(logits), self._own.to(x.dtype)
        mixed = torch.logaddexp(own.log() + clean, (-own).log1p() + far)
        pulled = F.kl_div(log_probabilities(logits_near), mixed, reduction="none", log_target=True).sum(1)
        natural = F.cross_entropy(at_least_fp32(logits), y, reduction="none", label_smoothing=self.label_smoothing)
        return natural + self.beta * pulled, logits_near

    def ascent_losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """CE(f(x), y) + beta KL(f(x) || f(x')) without smoothing; before the last quarter at clipped x + 2 (x' - x)."""
        climbed = x_adv if self._late else (x + 2 * (x_adv - x)).clamp(0, 1)
        return self._of_ascent.losses(model, climbed, x, y)

    @torch.no_grad()
    def after_step(self, ranks: Ranks) -> None:
        """Take the weights and statistics into the average, unless the step is left out."""
        assert self.skipped is not None
        for ours, live in self._pairs:
            taken = torch.lerp(ours, live, self._taken.to(ours.dtype)) if ours.is_floating_point() else live
            ours.copy_(torch.where(self.skipped, ours, taken))

    def moved(self) -> list[Tensor]:
        """Nothing: a step that is left out does not write them."""
        return []

    def state(self) -> dict[str, Tensor]:
        """The average, and the guide."""
        networks = {"tracked": self.tracked, "guide": self.guide.model}
        return {f"{which}.{name}": t for which, network in networks.items() for name, t in network.state_dict().items()}


class _WithDistance(nn.Module):
    """A classifier's logits, and behind them how far images look from others: [N, classes + 1].

    Args:
        model: the classifier.
        features: those of another network, by which looks are compared.
        clean: what it gives for the others.
    """

    def __init__(self, model: nn.Module, features: Callable[[Tensor], list[Tensor]], clean: Sequence[Tensor]) -> None:
        super().__init__()
        # the other one is no module of this one, whose modes an attack sets
        self.model, self._features, self._clean = model, features, clean

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, classes + 1]."""
        distance = perceptual_distance(self._features(x), self._clean)
        return torch.cat([at_least_fp32(self.model(x)), distance.unsqueeze(1)], 1)

"""The methods that screen the images of one class, and the rule that makes suspects of their scores.

Each learns from the images, and then gives every image one score or two; the higher, the stranger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from awp_engine.audit.data.autoencoder import Autoencoder, log_density
from awp_engine.audit.data.refine import ROUNDS, percentile, refine
from awp_kernels.philox import mix_seed

if TYPE_CHECKING:
    from torch import Tensor

LATENT, PLAIN_LATENT = 2, 32
PERCENTILE = 90.0
# of the SVM that is a baseline: as many outliers as the rule makes
_BASELINE_NU = 0.1
TITLES = {
    "itsr": "adversarial autoencoder, refined (ITSR)",
    "aae": "adversarial autoencoder",
    "ae": "autoencoder",
    "ocsvm": "one-class SVM",
    "forest": "isolation forest",
}
DEFAULT = ("forest", "ocsvm")
"""They take seconds; the forest was as good as the networks in seven of eight comparisons (docs/audit-data.md)."""
ERROR, DENSITY, DISTANCE = "reconstruction error", "minus log density", "distance"


@dataclass(frozen=True, kw_only=True)
class Epochs:
    """How long the networks learn: the paper's epochs of MNIST."""

    ae: int = 4000
    aae: int = 1000
    pretrain: int = 500
    refine: int = 100
    final: int = 1000

    def scaled(self, factor: float) -> Epochs:
        """Every number times `factor`, at least 1."""
        return Epochs(**{name: max(1, round(number * factor)) for name, number in vars(self).items()})

    def of(self, method: str) -> int:
        """All epochs of one method; 0 of those that have none."""
        refined = self.pretrain + ROUNDS * self.refine + self.final
        return {"itsr": refined, "aae": self.aae, "ae": self.ae}.get(method, 0)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What a method has learnt.

    Attributes:
        score: images fp32 [n, values] -> its scores by name, fp64 [n] each, on the CPU.
        weights: of ITSR: the images' weights in its last training, [n].
    """

    score: Callable[[Tensor], dict[str, Tensor]]
    weights: Tensor | None = None


def fit(
    method: str, x: Tensor, *, seed: int, epochs: Epochs, advance: Callable[[int], None] = lambda _: None
) -> Fitted:
    """Learns from the images of one class.

    Args:
        method: one of `TITLES`.
        x: fp32 [n, values] in [0, 1].
        seed: of everything that is random in it.
        epochs: of the networks.
        advance: is told 1 after every epoch.
    """
    seed = mix_seed(seed, list(TITLES).index(method))
    if method in ("ocsvm", "forest"):
        return _fit_baseline(method, x, seed)
    adversarial, weights = method != "ae", None
    code = LATENT if adversarial else PLAIN_LATENT
    model = Autoencoder(x.shape[1], code=code, adversarial=adversarial, seed=seed, device=x.device)
    if method == "itsr":
        lengths = {"pretrain": epochs.pretrain, "round_epochs": epochs.refine, "final": epochs.final}
        weights = refine(model, x, **lengths, advance=advance)
    else:
        model.train(x, torch.ones(len(x), device=x.device), epochs.of(method), advance)

    def score(images: Tensor) -> dict[str, Tensor]:
        codes, errors = model.score(images)
        found = {ERROR: errors.double().cpu()}
        return found | ({DENSITY: -log_density(codes.double()).cpu()} if adversarial else {})

    return Fitted(score=score, weights=weights)


def _fit_baseline(method: str, x: Tensor, seed: int) -> Fitted:
    from sklearn.ensemble import IsolationForest
    from sklearn.svm import OneClassSVM

    model: Any = (
        # scikit-learn takes 32 bits
        IsolationForest(random_state=seed % 2**32)
        if method == "forest"
        else OneClassSVM(kernel="rbf", gamma="scale", nu=_BASELINE_NU)
    ).fit(x.double().cpu().numpy())

    def score(images: Tensor) -> dict[str, Tensor]:
        return {DISTANCE: -torch.from_numpy(model.decision_function(images.double().cpu().numpy()))}

    return Fitted(score=score)


def thresholds(scores: Mapping[str, Tensor], percent: float = PERCENTILE) -> dict[str, float]:
    """The percentile of every score of the images that a method has learnt from."""
    return {name: percentile(values, percent) for name, values in scores.items()}


def beyond(scores: Mapping[str, Tensor], limits: Mapping[str, float]) -> dict[str, Tensor]:
    """Which images are beyond the limit of each score, bool [n]; a suspect is one that is beyond any."""
    return {name: values > limits[name] for name, values in scores.items()}


def strangeness(scores: Mapping[str, Tensor], learnt: Mapping[str, Tensor]) -> Tensor:
    """One number an image, [n]: the share of the images learnt from that are less strange, by the score that says most.

    Args:
        scores: of the images.
        learnt: of the images that the method has learnt from.
    """
    shares = [
        torch.searchsorted(learnt[name].sort().values, values).double() / len(learnt[name])
        for name, values in scores.items()
    ]
    return torch.stack(shares).amax(0)

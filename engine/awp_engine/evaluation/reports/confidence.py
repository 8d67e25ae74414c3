"""How sure an accuracy is: its interval, and a fitting attack that found less where the plain ones cannot be trusted.

Source: Clopper, Pearson: The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial, 1934;
McNemar: Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages, 1947.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from scipy.special import bdtrc, betaincinv

from awp_engine.evaluation.gates.gate import SLACK

_LEVEL = 0.95
INTERVAL = "95% CI"
"""What tables call it."""
INTERVAL_MEANS = "95% confidence, exact (Clopper, Pearson), of the accuracy on all images like these"


class Interval(NamedTuple):
    """Bounds of a probability, in [0, 1]."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.low:.1f}-{100 * self.high:.1f}%"


def lower_bound(successes: float, trials: int, alpha: float) -> float:
    """The one-sided lower confidence bound of Clopper and Pearson for a binomial probability.

    With probability 1 - alpha at least it is no more than the true one.
    """
    return 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, alpha))


def interval(right: float, images: int) -> Interval:
    """The accuracy on all images like these, where `right` of `images` that were drawn from them were right.

    It covers the true one in at least 95% of all cases, however few images there are.
    """
    tail = (1 - _LEVEL) / 2
    return Interval(lower_bound(right, images, tail), 1.0 - lower_bound(images - right, images, tail))


def chance_of_split(some: int, others: int) -> float:
    """How likely at least `some` of `some + others` heads are: the exact test of McNemar, one-sided."""
    return 1.0 if some == 0 else float(bdtrc(some - 1, some + others, 0.5))


@dataclass(frozen=True, kw_only=True)
class Stronger:
    """What an attack that fits the model left, on the gates' images.

    Attributes:
        attack: what it is.
        right: images; of a random model the mean over its answers.
        images: how many it ran on.
    """

    attack: str
    right: float
    images: int

    def __str__(self) -> str:
        sure = f"{INTERVAL} {interval(self.right, self.images)}"
        return f"at most {self.accuracy:.1%} ({sure}), under {self.attack}, on {self.images} images"

    @property
    def accuracy(self) -> float:
        """In [0, 1]."""
        return self.right / self.images

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        numbers = {"attack": self.attack, "right": self.right, "images": self.images, "accuracy": self.accuracy}
        return numbers | {"confidence_interval": list(interval(self.right, self.images))}


def stronger_attack(adaptive: Mapping[str, Any]) -> Stronger | None:
    """The strongest of the gates' fitting attacks, if it breaks more of their images than plain gradient attacks did.

    Args:
        adaptive: what those gates measured, as `GateReport` has it.
    """
    random, hidden, decision = (adaptive[name] for name in ("randomness", "hidden_gradients", "decision"))
    images, found = random["images"], []
    if eot := random["eot"]:
        best = min(eot["curve"], key=lambda point: point["mean"])
        attack = f"PGD on gradients averaged over {best['draws']} draws (EOT)"
        found.append(Stronger(attack=attack, right=best["mean"], images=eot["images"]))
    for attack, right in (
        ("PGD through what hides the gradient (BPDA)", hidden["bpda"]),
        ("Square, which needs no gradients", hidden["square"]),
        ("PGD on the logits that decide", decision["adapted"]),
    ):
        if right is not None:
            found.append(Stronger(attack=attack, right=right, images=images))
    best = min(found, key=lambda one: one.accuracy)
    return best if best.accuracy < hidden["white_box"] / images - SLACK else None

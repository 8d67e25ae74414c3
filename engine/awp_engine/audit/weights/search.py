"""The smallest budget that is enough: decades first, then bisection, and all that was tried is told."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from awp_engine.evaluation.attacks.named import EvaluationError

Trial = dict[str, Any]
_DECADE = 10.0


@dataclass(frozen=True, kw_only=True)
class Range:
    """Which budgets are tried.

    Attributes:
        smallest, largest: more than 0.
        tolerance: bisection ends when what is enough is at most so many times what was not; more than 1.
    """

    smallest: float
    largest: float
    tolerance: float = 1.2

    def __post_init__(self) -> None:
        for name, value in (("smallest", self.smallest), ("largest", self.largest)):
            if not 0 < value < math.inf:
                raise EvaluationError(f"--{name}: expected a budget above 0, got {value:g}: no edit has a budget of 0")
        if self.smallest >= self.largest:
            raise EvaluationError(
                f"--smallest: expected less than the largest budget, {self.largest:g}, got {self.smallest:g}"
            )
        if not 1 < self.tolerance < math.inf:
            raise EvaluationError(f"--tolerance: expected a factor above 1, such as 1.2, got {self.tolerance:g}")

    @property
    def decades(self) -> list[float]:
        """From the smallest to the largest, at equal factors of about 10."""
        count = max(1, math.ceil(math.log(self.largest / self.smallest, _DECADE) - 1e-9))
        between = [self.smallest * (self.largest / self.smallest) ** (k / count) for k in range(1, count)]
        return [self.smallest, *between, self.largest]

    @property
    def most_trials(self) -> int:
        """How many budgets are tried at most."""
        points = self.decades
        widest = math.log(points[1] / points[0]) / math.log(self.tolerance)
        return len(points) + max(0, math.ceil(math.log2(widest)))


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where the search ended.

    Attributes:
        budget: the smallest one tried that was enough; None: none was.
        not_enough: the largest one below it that was tried; None: the smallest of the range is enough.
        fails_above: budgets above it that were not enough: more is not always better for an edit.
        trials: in the order in which they were made.
    """

    budget: float | None
    not_enough: float | None
    fails_above: list[float]
    trials: list[Trial]


def search(limits: Range, attempt: Callable[[float], Trial]) -> Found:
    """Finds the smallest budget that is enough.

    Whether a larger budget is always enough too is not assumed: the decades are all tried, and bisection goes on below
    the smallest of them that is enough.

    Args:
        limits: which budgets.
        attempt: makes an edit within a budget; its answer says "enough", and "budget".
    """
    trials = [attempt(size) for size in limits.decades]
    enough = [trial["budget"] for trial in trials if trial["enough"]]
    if not enough:
        return Found(budget=None, not_enough=limits.largest, fails_above=[], trials=trials)
    high = min(enough)
    low = max((size for size in limits.decades if size < high), default=None)
    while low is not None and high / low > limits.tolerance:
        trials.append(attempt(math.sqrt(low * high)))
        low, high = (low, trials[-1]["budget"]) if trials[-1]["enough"] else (trials[-1]["budget"], high)
    fails = [trial["budget"] for trial in trials if not trial["enough"] and trial["budget"] > high]
    return Found(budget=high, not_enough=low, fails_above=sorted(fails), trials=trials)

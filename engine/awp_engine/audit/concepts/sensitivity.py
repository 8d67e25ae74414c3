"""What a step along a direction does to the probability of a class, and whether chance does as much."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from awp_engine.audit.concepts.directions import Directions
from awp_engine.audit.concepts.layers import Below, Cut

LEVEL = 0.05
# null directions that are tried first; then twice as many, as most tests end early
_FIRST = 16


def changes(cut: Cut, below: Below, steps: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """S(x) = softmax_k(h + step) - softmax_k(h) of one image, for several steps, in one pass of what is above.

    Args:
        cut: the network.
        below: the image's way up to the layer, whose output h is.
        steps: [D, features].
        number: k, of the class.

    Returns:
        S, fp64 [D]; and whether S >= 0, bool [D], which is decided by log p / (1 - p), as that tells probabilities
        apart that round to 0 or 1.

    Raises:
        ValueError: an answer is not finite.
    """
    moved = below.activation + steps.view(-1, *below.activation.shape[1:])
    # h itself in the same pass: what changes nothing must not seem to, by another batch's rounding
    logits = cut.above(below, torch.cat([below.activation, moved])).double()
    if not bool(logits.isfinite().all()):
        raise ValueError("the network's answers are not finite with a step along a direction; give a smaller --step")
    rest = torch.cat([logits[:, :number], logits[:, number + 1 :]], 1).logsumexp(1)
    odds = logits[:, number] - rest
    p = odds.sigmoid()
    return p[1:] - p[0], odds[1:] >= odds[0]


def statistic(raised: Tensor) -> Tensor:
    """|fraction(S >= 0) - 0.5| over images.

    Args:
        raised: S >= 0, bool [images, D].

    Returns:
        fp64 [D].
    """
    # in whole numbers first: .7 - .5 and .5 - .3 are not the same in floating point
    return (2 * raised.sum(0) - len(raised)).abs().double() / (2 * len(raised))


def most_exceedances(nulls: int, tests: int) -> int:
    """So many nulls at or above the statistic leave no p below .05 after correction, whatever the others are."""
    return math.ceil(LEVEL * nulls / tests)


def least_nulls(tests: int) -> int:
    """Null directions without which no p can be below .05 after correction."""
    # tests / (1 + nulls) < .05
    return math.floor(tests / LEVEL + 1e-9)


def least_images(tests: int) -> int:
    """Images of a class without which even fair coins, one an image, agree too often for p below .05."""
    # tests * 2 / 2**images < .05
    return math.floor(1 + math.log2(tests / LEVEL)) + 1


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """A test of whether a class leans on a concept.

    Attributes:
        changes: S of each image.
        raised: fraction of the images with S >= 0.
        statistic: |raised - .5|.
        nulls: the statistics of null directions, as many as were tried.
        at_or_above: so many of them were at the statistic or above.
    """

    changes: tuple[float, ...]
    raised: float
    statistic: float
    nulls: tuple[float, ...]
    at_or_above: int

    @property
    def p(self) -> float:
        """(1 + nulls at or above the statistic) / (1 + nulls)."""
        return (1 + self.at_or_above) / (1 + len(self.nulls))


def measure(
    cut: Cut,
    images: Callable[[], Iterable[Below]],
    directions: Directions,
    number: int,
    *,
    step: float,
    tests: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Sensitivity:
    """The permutation test of one concept, layer and class.

    Args:
        cut: the network.
        images: gives those of the class, as `Cut.below` has them.
        directions: the concept's, and the nulls.
        number: of the class.
        step: s, the length of the step.
        tests: all that are made, which the early end counts with.
        batch_size: directions in one pass, at most.
        advance: is told how many directions were tried, as they are.

    Raises:
        ValueError: as `changes`.
    """

    def tried(first: int, last: int) -> tuple[Tensor, Tensor]:
        unit = step * torch.from_numpy(directions.unit(first, last))
        found = [changes(cut, below, unit.to(below.activation), number) for below in images()]
        advance(last - first)
        return torch.stack([change for change, _ in found]), torch.stack([up for _, up in found])

    change, raised = tried(0, 1)
    own = float(statistic(raised))
    count, most = len(directions) - 1, most_exceedances(len(directions) - 1, tests)
    nulls: list[float] = []
    above, size = 0, _FIRST
    while len(nulls) < count and above < most:
        _, up = tried(1 + len(nulls), 1 + min(count, len(nulls) + min(size, batch_size)))
        for value in statistic(up).tolist():
            nulls.append(value)
            above += value >= own
            if above == most:
                break
        size *= 2
    return Sensitivity(
        changes=tuple(change[:, 0].tolist()),
        raised=float(raised.double().mean()),
        statistic=own,
        nulls=tuple(nulls),
        at_or_above=above,
    )

"""One check of whether a robust accuracy can be believed."""

import math
from dataclasses import dataclass
from fractions import Fraction

SLACK = Fraction(1, 100)
"""Share of the images that may go either way between two attacks, or two runs of one."""


def slack(images: int) -> int:
    """So many images of a split; one of a few is no sign of anything."""
    return max(1, math.floor(SLACK * images))


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One check: what was measured, what was expected, and what a failure means."""

    name: str
    measured: str
    bound: str
    passed: bool
    failure_means: str


def share(count: float, images: int) -> str:
    """Such as 70.5%."""
    return f"{count / images:.1%}"

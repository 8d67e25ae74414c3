"""Roundings that make the epsilon ball hold exactly rather than to rounding error."""

import functools
import math

import torch
from torch import Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that arithmetic runs in: fp64 for fp64 storage, fp32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.lru_cache(maxsize=64)
def round_toward_zero(value: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype`'s working precision that is not above `value`, for `value` >= 0."""
    rounded = torch.tensor(value, dtype=working_dtype(dtype))
    if rounded.item() > value:
        rounded = torch.nextafter(rounded, torch.zeros_like(rounded))
    return rounded.item()


@functools.lru_cache(maxsize=64)
def l2_radius(epsilon: float, elements: int, dtype: torch.dtype) -> float:
    """Epsilon less what rounding a sum x + delta in [0, 1] can add to the norm of `elements` differences."""
    margin = torch.finfo(working_dtype(dtype)).eps / 2 * math.sqrt(elements)
    return max(epsilon - margin, 0.0)


def linf_bounds(x: Tensor, epsilon: float | Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """[x - epsilon, x + epsilon] with both ends rounded inward, intersected with [low, high].

    Knuth's TwoSum gives the rounding error of x + e exactly; where the rounded bound lies outside, the next number
    inside is taken.
    """

    def bound(offset: float | Tensor, outward: int) -> Tensor:
        total = x + offset
        back = total - x
        error = (x - (total - back)) + (offset - back)
        inward = torch.nextafter(total, torch.full_like(total, -outward * torch.inf))
        return torch.where(error * outward < 0, inward, total)

    lower, upper = bound(-epsilon, -1), bound(epsilon, 1)
    # comparisons instead of min and max: a NaN bound gives way to the clip range
    return torch.where(lower > low, lower, low), torch.where(upper < high, upper, high)


def within(value: Tensor, center: Tensor, bound: float) -> Tensor:
    """Clamp to `bound` * |center| around `center`, which holds exactly in the working precision; NaN stays NaN.

    Args:
        value: in the working precision.
        center: of the same shape and dtype.
        bound: >= 0, in the working precision: see `round_toward_zero`.
    """
    radius = center.abs() * bound
    # one number less, as the product may have been rounded up
    radius = torch.nextafter(radius, torch.zeros_like(radius))
    return clamp(value, *linf_bounds(center, radius, -torch.inf, torch.inf))


def clamp(value: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Clamp; NaN in `value` stays NaN."""
    value = torch.where(value < low, low, value)
    return torch.where(value > high, high, value)

"""The definition of the convolutions: torch's own."""

from torch import Tensor
from torch.nn import functional


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """3x3, stride 1, padding 1; the result has x's dtype."""
    return functional.conv2d(x, weight.to(x.dtype), padding=1)


def stem3x3(x: Tensor, weight: Tensor) -> Tensor:
    """3x3, stride 1, padding 1, in x's precision; the result has weight's dtype."""
    return functional.conv2d(x, weight.to(x.dtype), padding=1).to(weight.dtype)

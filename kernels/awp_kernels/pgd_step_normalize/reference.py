"""The definition of an attack's step that also makes the network's next input."""

import torch
from torch import Tensor

from awp_kernels.pgd_step.reference import pgd_step


def pgd_step_normalize(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    out: Tensor,
    mean: Tensor,
    std: Tensor,
    step_size: float,
    epsilon: float,
    norm: str,
    low: float,
    high: float,
) -> None:
    """The step along the gradient for the images, then `out` from the images."""
    channels = len(mean)
    center, scale = mean.view(-1, 1, 1), std.view(-1, 1, 1)
    ascent = grad[:, :channels].to(x_adv.dtype)
    # linf needs the sign alone, which a quotient could lose
    ascent = torch.where(scale < 0, -ascent, ascent) if norm == "linf" else ascent / scale
    pgd_step(x_adv, ascent, x, mask, step_size, epsilon, norm, low, high)
    out[:, :channels] = (x_adv - center) / scale
    out[:, channels:] = 0

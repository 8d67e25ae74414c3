"""The definition of one projected ascent step on the images.

Source: Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
"""

import torch
from torch import Tensor

from awp_kernels._ball import clamp, l2_radius, linf_bounds, round_toward_zero, working_dtype


def _per_sample_norm(values: Tensor) -> Tensor:
    """fp64 norms of shape [N, 1, ...]."""
    return torch.linalg.vector_norm(
        values.double().flatten(1) if values.ndim > 1 else values.double().unsqueeze(1), dim=1
    ).reshape(-1, *[1] * (values.ndim - 1))


def pgd_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    step_size: float,
    epsilon: float,
    norm: str,
    low: float,
    high: float,
) -> None:
    """Move `x_adv` uphill by `step_size`, back into the ball around `x`, and into [low, high]."""
    if not x.numel():
        return
    dtype = working_dtype(x_adv.dtype)
    current, clean, ascent = x_adv.to(dtype), x.to(dtype), grad.to(dtype)
    if mask is not None:
        ascent = torch.where(mask != 0, ascent, 0)
    if norm == "linf":
        lower, upper = linf_bounds(clean, round_toward_zero(epsilon, dtype), low, high)
        x_adv.copy_(clamp(current + step_size * ascent.sign(), lower, upper))
        return
    grad_norm = _per_sample_norm(ascent)
    usable = (grad_norm > 0) & grad_norm.isfinite()
    # the product in fp64: step_size / ||grad|| overflows fp32 for tiny gradients
    moved = current + torch.where(usable, step_size / grad_norm * ascent.double(), 0.0).to(dtype)
    delta = moved - clean
    distance = _per_sample_norm(delta)
    radius = l2_radius(epsilon, x[0].numel(), dtype)
    projected = torch.where(distance > radius, clean + delta * (radius / distance).to(dtype), moved)
    x_adv.copy_(clamp(projected, low, high))

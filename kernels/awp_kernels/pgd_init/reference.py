"""The definition of the attack's starting point: uniform in the epsilon ball, clipped to [0, 1]; or normal."""

import math

import torch
from torch import Tensor

from awp_kernels._ball import clamp, l2_radius, linf_bounds, round_toward_zero, working_dtype
from awp_kernels.philox import normals, uniform_integers


def pgd_init(x_adv: Tensor, x: Tensor, sample_ids: Tensor, epsilon: float, norm: str, seed: int) -> None:
    """Write x plus noise keyed by `seed` and `sample_ids` to `x_adv`; for norm "normal", epsilon is its deviation."""
    dtype = working_dtype(x.dtype)
    clean = x.to(dtype)
    elements = x[0].numel()
    if norm == "linf":
        bound = round_toward_zero(epsilon, dtype)
        integers = uniform_integers(sample_ids, elements, seed=seed).to(dtype).reshape(x.shape)
        lower, upper = linf_bounds(clean, bound, 0.0, 1.0)
        x_adv.copy_(clamp(clean + integers * (bound * 2.0**-24), lower, upper))
        return
    if norm == "normal":
        z = normals(sample_ids, elements, seed=seed).to(dtype).reshape(x.shape)
        x_adv.copy_(clean + z * torch.tensor(epsilon, dtype=dtype, device=x.device))
        return
    # the first d coordinates of a uniform point on the sphere in d + 2 dimensions are uniform in the ball
    z = normals(sample_ids, elements + 2, seed=seed)
    # integers add up to the same number in any order; math.sqrt rounds right, as torch's root does not
    totals = ((z * z) * 2.0**32).to(torch.int64).sum(dim=1).tolist()
    radius = l2_radius(epsilon, elements, dtype)
    factors = torch.tensor([radius / math.sqrt(total * 2.0**-32) for total in totals], dtype=torch.float64)
    factor = factors.to(device=x.device, dtype=dtype).unsqueeze(1)
    noise = (z[:, :elements].to(dtype) * factor).reshape(x.shape)
    x_adv.copy_(clamp(clean + noise, 0.0, 1.0))

"""One projected ascent step on the images in one Triton launch."""

# triton.jit is typed as the plain function: it knows neither constexpr arguments, nor launch options, nor tl types
# pyright: reportArgumentType=false, reportCallIssue=false, reportInvalidTypeForm=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from awp_kernels._ball import l2_radius, round_toward_zero
from awp_kernels._triton_common import BLOCK, WARPS, clamp, project_linf


@triton.jit
def _load_gradient(grad, mask, index, inside):
    ascent = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
    if mask is not None:
        # a choice, not a product: NaN outside the region counts as 0
        ascent = tl.where(tl.load(mask + index, mask=inside, other=0) != 0, ascent, 0.0)
    return ascent


@triton.jit
def step_linf_kernel(x_adv, grad, x, mask, count, step_size, epsilon, low, high, BLOCK: tl.constexpr):
    """One program for BLOCK elements of the batch."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    ascent = _load_gradient(grad, mask, index, inside)
    sign = (ascent > 0.0).to(tl.float32) - (ascent < 0.0).to(tl.float32)
    current = tl.load(x_adv + index, mask=inside).to(tl.float32)
    clean = tl.load(x + index, mask=inside).to(tl.float32)
    result = project_linf(current + step_size * sign, clean, epsilon, low, high)
    tl.store(x_adv + index, result.to(x_adv.dtype.element_ty), mask=inside)


@triton.jit
def _moved(x_adv, grad, mask, index, inside, rate):
    ascent = _load_gradient(grad, mask, index, inside)
    # the product in fp64: the rate overflows fp32 for tiny gradients; the choice keeps NaN * 0 out
    step = tl.where(rate != 0.0, rate * ascent.to(tl.float64), 0.0).to(tl.float32)
    return tl.load(x_adv + index, mask=inside, other=0.0).to(tl.float32) + step


@triton.jit
def step_l2_kernel(
    x_adv,
    grad,
    x,
    mask,
    elements,
    step_size: tl.float64,
    radius: tl.float64,
    low,
    high,
    BLOCK: tl.constexpr,
):
    """One program a sample: the gradient's norm, the distance after the step, then the projected step."""
    start = tl.program_id(0).to(tl.int64) * elements
    x_adv += start
    grad += start
    x += start
    if mask is not None:
        mask += start

    sums = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, elements, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        ascent = _load_gradient(grad, mask, index, index < elements).to(tl.float64)
        sums += ascent * ascent
    norm = tl.sqrt(tl.sum(sums))
    rate = tl.where((norm > 0.0) & (norm < float("inf")), step_size / norm, 0.0)

    sums = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, elements, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        inside = index < elements
        clean = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
        delta = (_moved(x_adv, grad, mask, index, inside, rate) - clean).to(tl.float64)
        sums += tl.where(inside, delta * delta, 0.0)
    distance = tl.sqrt(tl.sum(sums))
    factor = (radius / distance).to(tl.float32)

    for offset in range(0, elements, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        inside = index < elements
        clean = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
        moved = _moved(x_adv, grad, mask, index, inside, rate)
        result = clamp(tl.where(distance > radius, clean + (moved - clean) * factor, moved), low, high)
        tl.store(x_adv + index, result.to(x_adv.dtype.element_ty), mask=inside)


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
    count = x.numel()
    if not count:
        return
    # a fused multiply-add would skip a rounding
    options = {"BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": False}
    with torch.cuda.device_of(x):
        if norm == "linf":
            bound = round_toward_zero(epsilon, x.dtype)
            grid = (triton.cdiv(count, BLOCK),)
            step_linf_kernel[grid](x_adv, grad, x, mask, count, step_size, bound, low, high, **options)
        else:
            elements = count // len(x)
            radius = l2_radius(epsilon, elements, x.dtype)
            step_l2_kernel[(len(x),)](x_adv, grad, x, mask, elements, step_size, radius, low, high, **options)

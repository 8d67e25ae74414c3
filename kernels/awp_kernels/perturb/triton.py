"""The norm-scaled perturbations of a list of tensors in one or two Triton launches."""

# triton.jit is typed as the plain function: it knows neither constexpr arguments, nor launch options, nor tl types
# pyright: reportArgumentType=false, reportCallIssue=false, reportInvalidTypeForm=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from awp_kernels._ball import round_toward_zero
from awp_kernels._triton_common import (
    BLOCK,
    CHUNK,
    FIRST,
    FLAG,
    NUMEL,
    TYPES,
    WARPS,
    pointer,
    program_span,
    project_linf,
    table,
)
from awp_kernels.perturb.rule import Rule, filters

# squares of 32-bit numbers are exact in fp64, so fusing costs no rounding there and saves one in w + scale * g
_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
# filters are short: 64 to a few thousand elements
_FILTER_BLOCK = 1024
_FILTER_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

_SCALES = {"relative": 0, "absolute": 1, "elementwise": 2}
_RELATIVE = tl.constexpr(0)
_ABSOLUTE = 1
_ELEMENTWISE = tl.constexpr(2)


@triton.jit
def _factor(row, w, eta):
    """T of a tensor's elements."""
    return tl.where(tl.load(row + FLAG) != 0, tl.abs(w.to(tl.float32)) + eta, 1.0)


@triton.jit
def _square_sums(
    row,
    start,
    begin,
    end,
    eta,
    SCALE: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of w, where the scale needs it, and of g or T g."""
    weight = pointer(row, 0, start, WEIGHT, ALIGNED)
    grad = pointer(row, 1, start, GRAD, ALIGNED)
    weight_sum = tl.zeros([BLOCK], tl.float64)
    grad_sum = tl.zeros([BLOCK], tl.float64)
    for offset in range(begin, end, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        g = tl.load(grad + index, mask=index < end, other=0.0).to(tl.float64)
        if SCALE == _RELATIVE:
            w = tl.load(weight + index, mask=index < end, other=0.0).to(tl.float64)
            weight_sum += w * w
        elif SCALE == _ELEMENTWISE:
            w = tl.load(weight + index, mask=index < end, other=0.0)
            g = _factor(row, w, eta).to(tl.float64) * g
        grad_sum += g * g
    return tl.sum(weight_sum), tl.sum(grad_sum)


@triton.jit
def _move(
    row,
    start,
    begin,
    end,
    scale,
    eta,
    bound,
    SCALE: tl.constexpr,
    BOUNDED: tl.constexpr,
    OUT: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    SAVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    weight = pointer(row, 0, start, WEIGHT, ALIGNED)
    grad = pointer(row, 1, start, GRAD, ALIGNED)
    out = pointer(row, 2, start, OUT, ALIGNED)
    for offset in range(begin, end, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        w = tl.load(weight + index, mask=index < end)
        g = tl.load(grad + index, mask=index < end)
        if SAVE:
            saved = pointer(row, 3, start, WEIGHT, ALIGNED)
            tl.store(saved + index, w, mask=index < end)
        step = scale * g.to(tl.float32)
        if SCALE == _ELEMENTWISE:
            factor = _factor(row, w, eta)
            step = step * factor * factor
        moved = w.to(tl.float32) + step
        if BOUNDED:
            product = tl.abs(w.to(tl.float32)) * bound
            # one number less, as the product may have been rounded up
            below = (product.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
            radius = tl.where(product > 0.0, below, product)
            moved = project_linf(moved, w.to(tl.float32), radius, float("-inf"), float("inf"))
        # where nothing is followed, w to the bit: NaN * 0 is NaN, and -0.0 + 0.0 is 0.0
        tl.store(out + index, tl.where(tl.abs(scale) > 0.0, moved.to(OUT), w.to(OUT)), mask=index < end)


@triton.jit
def _squared_norms(norms, tensors, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, tensors, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        norm = tl.load(norms + index, mask=index < tensors, other=0.0)
        total += norm * norm
    return tl.sum(total)


@triton.jit
def _scale(weight_sum, grad_sum, gamma, eps, SCALE: tl.constexpr):
    """Of a direction; NaN where it is not to be followed: a norm is not finite, or the scale is not in fp32."""
    if SCALE == _RELATIVE:
        gamma = gamma * tl.sqrt(weight_sum)
    scale = (gamma / (tl.sqrt(grad_sum) + eps)).to(tl.float32)
    # an infinite sum of the weights makes the scale infinite, one of the gradients makes it 0
    return tl.where((grad_sum < float("inf")) & (tl.abs(scale) < float("inf")), scale, float("nan"))


@triton.jit
def partial_sums_kernel(
    rows,
    programs,
    partials,
    eta,
    SCALE: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of squares of each program's weights and gradients, fp64 [programs, 2]."""
    row, start, count, wide = program_span(rows, programs, tl.int32)
    weight_sum, grad_sum = _square_sums(row, start, 0, wide, eta, SCALE, WEIGHT, GRAD, True, BLOCK)
    weight_rest, grad_rest = _square_sums(row, start, wide, count, eta, SCALE, WEIGHT, GRAD, False, BLOCK)
    target = partials + tl.program_id(0).to(tl.int64) * 2
    tl.store(target, weight_sum + weight_rest)
    tl.store(target + 1, grad_sum + grad_rest)


@triton.jit
def apply_kernel(
    rows,
    programs,
    partials,
    scales,
    gamma: tl.float64,
    eps: tl.float64,
    eta,
    bound,
    SCALE: tl.constexpr,
    BOUNDED: tl.constexpr,
    OUT: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    SAVE: tl.constexpr,
    GLOBAL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    norms=None,
    tensors=0,
):
    """Add up the partial sums again, in the same order in every program, then write w + v."""
    row, start, count, wide = program_span(rows, programs, tl.int32)
    program = tl.program_id(0).to(tl.int64)
    if GLOBAL:
        first = program * 0
        parts = tl.num_programs(0)
    else:
        first = tl.load(row + FIRST)
        parts = tl.maximum(tl.cdiv(tl.load(row + NUMEL), CHUNK), 1).to(tl.int32)
    weight_sum = tl.zeros([BLOCK], tl.float64)
    grad_sum = tl.zeros([BLOCK], tl.float64)
    partials += first * 2
    for offset in range(0, parts, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        weight_sum += tl.load(partials + index * 2, mask=index < parts, other=0.0)
        grad_sum += tl.load(partials + index * 2 + 1, mask=index < parts, other=0.0)
    weight_total = tl.sum(weight_sum)
    if norms is not None:
        if GLOBAL:
            weight_total = _squared_norms(norms, tensors, BLOCK)
        else:
            norm = tl.load(norms + tl.load(programs + program))
            weight_total = norm * norm
    scale = _scale(weight_total, tl.sum(grad_sum), gamma, eps, SCALE)
    if program == first:
        tl.store(scales if GLOBAL else scales + tl.load(programs + program), scale)
    _move(row, start, 0, wide, scale, eta, bound, SCALE, BOUNDED, OUT, WEIGHT, GRAD, SAVE, True, BLOCK)
    _move(row, start, wide, count, scale, eta, bound, SCALE, BOUNDED, OUT, WEIGHT, GRAD, SAVE, False, BLOCK)


@triton.jit
def filter_kernel(
    rows,
    programs,
    scales,
    gamma: tl.float64,
    eps: tl.float64,
    eta,
    bound,
    SCALE: tl.constexpr,
    BOUNDED: tl.constexpr,
    OUT: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a filter: its norms, then w + v while the filter is still in the cache."""
    row, start, count, wide = program_span(rows, programs, tl.int64)
    weight_sum, grad_sum = _square_sums(row, start, 0, wide, eta, SCALE, WEIGHT, GRAD, True, BLOCK)
    weight_rest, grad_rest = _square_sums(row, start, wide, count, eta, SCALE, WEIGHT, GRAD, False, BLOCK)
    scale = _scale(weight_sum + weight_rest, grad_sum + grad_rest, gamma, eps, SCALE)
    tl.store(scales + tl.program_id(0), scale)
    _move(row, start, 0, wide, scale, eta, bound, SCALE, BOUNDED, OUT, WEIGHT, GRAD, SAVE, True, BLOCK)
    _move(row, start, wide, count, scale, eta, bound, SCALE, BOUNDED, OUT, WEIGHT, GRAD, SAVE, False, BLOCK)


def perturb(out: list[Tensor], weights: list[Tensor], grads: list[Tensor], saved: list[Tensor], rule: Rule) -> Tensor:
    """Write w + v to `out`, and w to `saved`; return the scales, NaN where a direction is not followed."""
    device = weights[0].device
    types = {"WEIGHT": TYPES[weights[0].dtype], "GRAD": TYPES[grads[0].dtype]}
    scale, bound = _SCALES[rule.scale], rule.bound
    numbers = rule.gamma, rule.eps, rule.eta, 0.0 if bound is None else round_toward_zero(bound, torch.float32)
    variant = {"SCALE": scale, "BOUNDED": bound is not None, "OUT": TYPES[out[0].dtype], **types, "SAVE": bool(saved)}
    # a fused multiply-add would skip a rounding of the projection
    fusion = {"enable_fp_fusion": bound is None}
    lists = [weights, grads, out, *([saved] if saved else [])]
    flags = tuple(rule.adaptive) if rule.adaptive else None
    with torch.cuda.device_of(weights[0]):
        if rule.scope == "filter":
            rows, programs, _ = table(lists, tuple(filters(weight) for weight in weights), flags)
            scales = torch.empty(len(programs), dtype=torch.float32, device=device)
            if len(programs):
                options = _FILTER_OPTIONS | fusion
                filter_kernel[(len(programs),)](
                    rows, programs, scales, *numbers, **variant, BLOCK=_FILTER_BLOCK, **options
                )
            return scales
        rows, programs, _ = table(lists, flags=flags)
        scales = torch.empty(1 if rule.scope == "global" else len(weights), dtype=torch.float32, device=device)
        partials = torch.empty(len(programs), 2, dtype=torch.float64, device=device)
        norms = rule.weight_norms
        # with the weights' norms at hand, the sums are those of the gradients alone, as SAM's
        summed = scale if norms is None else _ABSOLUTE
        partial_sums_kernel[(len(programs),)](
            rows, programs, partials, rule.eta, SCALE=summed, **types, BLOCK=BLOCK, **_OPTIONS
        )
        apply_kernel[(len(programs),)](
            rows,
            programs,
            partials,
            scales,
            *numbers,
            **variant,
            GLOBAL=rule.scope == "global",
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            norms=norms,
            tensors=0 if norms is None else len(weights),
            **(_OPTIONS | fusion),
        )
        return scales

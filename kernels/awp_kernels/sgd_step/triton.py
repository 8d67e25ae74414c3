"""The SGD step of a list of tensors in one Triton launch, and a small one that finishes the norms."""

# triton.jit is typed as the plain function: it knows neither constexpr arguments, nor launch options, nor tl types
# pyright: reportArgumentType=false, reportCallIssue=false, reportInvalidTypeForm=false

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from awp_kernels._triton_common import (
    BLOCK,
    CHUNK,
    FIRST,
    FLAG,
    NUMEL,
    ROW,
    TYPES,
    WARPS,
    add_up,
    pointer,
    program_span,
    table,
)
from awp_kernels.sgd_step.rule import Rule

_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
_FINISH_BLOCK = 256
_FINISH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _left_out(found_inf, grad_norm):
    """Whether the step is left out; an argument that is None is not read."""
    result = False
    if found_inf is not None:
        result = tl.load(found_inf).to(tl.float32) != 0.0
    if grad_norm is not None:
        norm = tl.load(grad_norm)
        # of infinity and NaN both, the difference to itself is NaN
        result = result | (norm - norm != 0.0)
    return result


@triton.jit
def _factor(grad_scale, grad_norm, max_norm: tl.float64, CLIP: tl.constexpr):
    """What gradients are multiplied by: unscaling and clipping in one, rounded once."""
    scale = tl.full([], 1.0, tl.float64)
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(tl.float64)
    clip = tl.full([], 1.0, tl.float64)
    if CLIP:
        clip = max_norm / (tl.load(grad_norm).to(tl.float64) / scale + 1e-6)
        clip = tl.where(clip > 1.0, 1.0, clip)
    if grad_scale is not None:
        clip = clip / scale
    return clip.to(tl.float32)


@triton.jit
def _update(
    total,
    row,
    start,
    begin,
    end,
    numbers,
    GRAD: tl.constexpr,
    OUT: tl.constexpr,
    NESTEROV: tl.constexpr,
    MOMENTUM: tl.constexpr,
    AVERAGE: tl.constexpr,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor, lr, decay, momentum, share = numbers
    weight = pointer(row, 0, start, tl.float32, ALIGNED)
    grad = pointer(row, 1, start, GRAD, ALIGNED)
    buffer = pointer(row, 2, start, tl.float32, ALIGNED)
    average = pointer(row, 3, start, tl.float32, ALIGNED)
    out = pointer(row, 4, start, OUT, ALIGNED)
    for offset in range(begin, end, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        mask = index < end
        w = tl.load(weight + index, mask=mask, other=0.0)
        d = tl.load(grad + index, mask=mask, other=0.0).to(tl.float32) * factor
        d = tl.where(decay != 0.0, d + decay * w, d)
        if MOMENTUM:
            b = momentum * tl.load(buffer + index, mask=mask, other=0.0) + d
            tl.store(buffer + index, b, mask=mask)
            d = d + momentum * b if NESTEROV else b
        w = w - lr * d
        tl.store(weight + index, w, mask=mask)
        if AVERAGE:
            a = tl.load(average + index, mask=mask, other=0.0)
            tl.store(average + index, a + share * (w - a), mask=mask)
        if COPY:
            tl.store(out + index, w.to(OUT), mask=mask)
        wide = tl.where(mask, w, 0.0).to(tl.float64)
        total += wide * wide
    return total


@triton.jit
def _keep(
    total, row, start, begin, end, OUT: tl.constexpr, COPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    weight = pointer(row, 0, start, tl.float32, ALIGNED)
    out = pointer(row, 4, start, OUT, ALIGNED)
    for offset in range(begin, end, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        w = tl.load(weight + index, mask=index < end, other=0.0)
        if COPY:
            tl.store(out + index, w.to(OUT), mask=index < end)
        total += w.to(tl.float64) * w.to(tl.float64)
    return total


@triton.jit
def sgd_kernel(
    rows,
    programs,
    partials,
    lr,
    lr_at,
    momentum,
    share,
    share_at,
    grad_scale,
    found_inf,
    grad_norm,
    max_norm: tl.float64,
    CLIP: tl.constexpr,
    GRAD: tl.constexpr,
    OUT: tl.constexpr,
    NESTEROV: tl.constexpr,
    MOMENTUM: tl.constexpr,
    AVERAGE: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step each program's elements; the sums of squares of what the weights then are, fp64 [programs]."""
    row, start, count, wide = program_span(rows, programs, tl.int32)
    # one sum at the end: a number held over the second run would be spilled
    total = tl.zeros([BLOCK], tl.float64)
    if _left_out(found_inf, grad_norm):
        total = _keep(total, row, start, 0, wide, OUT, COPY, True, BLOCK)
        total = _keep(total, row, start, wide, count, OUT, COPY, False, BLOCK)
    else:
        if lr_at is not None:
            lr = tl.load(lr_at).to(tl.float32)
        if share_at is not None:
            share = tl.load(share_at).to(tl.float32)
        factor = _factor(grad_scale, grad_norm, max_norm, CLIP)
        decay = tl.load(row + FLAG).to(tl.int32).to(tl.float32, bitcast=True)
        numbers = factor, lr, decay, momentum, share
        total = _update(total, row, start, 0, wide, numbers, GRAD, OUT, NESTEROV, MOMENTUM, AVERAGE, COPY, True, BLOCK)
        total = _update(
            total, row, start, wide, count, numbers, GRAD, OUT, NESTEROV, MOMENTUM, AVERAGE, COPY, False, BLOCK
        )
    tl.store(partials + tl.program_id(0), tl.sum(total))


@triton.jit
def sgd_norms_kernel(rows, partials, norms, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The norm of each program's tensor."""
    row = rows + tl.program_id(0).to(tl.int64) * ROW
    parts = tl.maximum(tl.cdiv(tl.load(row + NUMEL), CHUNK), 1).to(tl.int32)
    tl.store(norms + tl.program_id(0), tl.sqrt(add_up(partials, tl.load(row + FIRST), parts, BLOCK)))


def _fp32_bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def sgd_step(
    weights: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    averages: list[Tensor],
    out: list[Tensor],
    rule: Rule,
) -> Tensor:
    """Step the weights, their momentum and their averages; write them to `out`; return their norms."""
    device = weights[0].device
    with torch.cuda.device_of(weights[0]):
        decays = tuple(_fp32_bits(decay) for decay in rule.weight_decay)
        rows, programs, _ = table([weights, grads, momentum_buffers, averages, out], flags=decays)
        partials = torch.empty(len(programs), dtype=torch.float64, device=device)
        norms = torch.empty(len(weights), dtype=torch.float64, device=device)
        sgd_kernel[(len(programs),)](
            rows,
            programs,
            partials,
            rule.lr,
            rule.lr_tensor,
            rule.momentum,
            rule.average_weight,
            rule.average_weight_tensor,
            rule.grad_scale,
            rule.found_inf,
            rule.grad_norm,
            0.0 if rule.max_norm is None else rule.max_norm,
            CLIP=rule.max_norm is not None,
            GRAD=TYPES[grads[0].dtype],
            OUT=TYPES[out[0].dtype] if out else tl.float32,
            NESTEROV=rule.nesterov,
            MOMENTUM=bool(momentum_buffers),
            AVERAGE=bool(averages),
            COPY=bool(out),
            BLOCK=BLOCK,
            **_OPTIONS,
        )
        sgd_norms_kernel[(len(weights),)](rows, partials, norms, CHUNK, _FINISH_BLOCK, **_FINISH_OPTIONS)
    return norms

"""Residual sum, batch normalisation and activation in Triton: the launches of csrc/cuda/bn_act.cu."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportInvalidTypeForm=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# of rows, whose sums are added up afterwards
_SUM_BLOCKS = 512
_ELEMENTS = 2048
_FINISH = tl.constexpr(64)
_RELU, _SILU = 1, 2
# of products and sums, whose roundings are nobody's definition here
_FUSED = {"enable_fp_fusion": True}


class _Cut(NamedTuple):
    """How the matrix [rows, channels] is cut: programs by channels and by rows, what a program takes, and at a time."""

    grid: tuple[int, int]
    share: int
    block: dict[str, Any]


def _cut(x: Tensor, summed: bool) -> _Cut:
    channels = x.shape[1]
    rows = x.numel() // channels
    wide = min(triton.next_power_of_2(channels), 128)
    high = max(1, _ELEMENTS // wide)
    share = high * max(2, triton.cdiv(triton.cdiv(rows, _SUM_BLOCKS), high)) if summed else high
    return _Cut((triton.cdiv(channels, wide), triton.cdiv(rows, share)), share, {"HIGH": high, "WIDE": wide, **_FUSED})


@triton.jit
def _activated(u, floor, SILU: tl.constexpr):
    """ReLU and none: `floor` is 0 or minus infinity; NaN goes through."""
    return u * tl.sigmoid(u) if SILU else tl.where(u <= floor, floor, u)


@triton.jit
def _through_activation(u, floor, gradient, SILU: tl.constexpr):
    if SILU:
        s = tl.sigmoid(u)
        return gradient * (s + u * (s * (1.0 - s)))
    return tl.where(u <= floor, 0.0, gradient)


@triton.jit
def _affine(table, stride, channel, inside):
    """Mean, scale and bias of some channels; a table's rows are mean, 1 / std, scale, bias."""
    mean = tl.load(table + channel, mask=inside, other=0.0)
    scale = tl.load(table + 2 * stride + channel, mask=inside, other=0.0)
    return mean, scale, tl.load(table + 3 * stride + channel, mask=inside, other=0.0)


@triton.jit
def bn_statistics_kernel(
    x, residual, z, parts, rows, channels, share, ADD: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr
):
    """Pivot, mean less the pivot, and sum of squared deviations of a block of rows: parts[block][3][channels]."""
    channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    inside = channel < channels
    begin = tl.program_id(1).to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    pivot = tl.zeros([WIDE], tl.float32)
    for place in range(4):
        index = (begin + place * ((end - begin) // 4)) * channels + channel
        pivot += tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
        if ADD:
            pivot += tl.load(residual + index, mask=inside, other=0.0).to(tl.float32)
    pivot *= 0.25
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
    sums = tl.zeros([HIGH, WIDE], tl.float32)
    squares = tl.zeros([HIGH, WIDE], tl.float32)
    for offset in range(0, share, HIGH):
        row = begin + offset + tl.arange(0, HIGH)
        index = row[:, None] * channels + channel[None, :]
        valid = (row < end)[:, None] & inside[None, :]
        value = tl.load(x + index, mask=valid, other=0.0)
        if ADD:
            value = value.to(tl.float32) + tl.load(residual + index, mask=valid, other=0.0).to(tl.float32)
            value = value.to(z.dtype.element_ty)
            tl.store(z + index, value, mask=valid)
        deviation = tl.where(valid, value.to(tl.float32) - pivot[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    total = tl.sum(sums, 0)
    mean = total / (end - begin).to(tl.float32)
    to = parts + tl.program_id(1).to(tl.int64) * 3 * channels + channel
    tl.store(to, pivot, mask=inside)
    tl.store(to + channels, mean, mask=inside)
    tl.store(to + 2 * channels, tl.sum(squares, 0) - total * mean, mask=inside)


@triton.jit
def bn_finish_statistics_kernel(
    parts,
    weight,
    bias,
    running_mean,
    running_var,
    table,
    statistics,
    stride,
    rows,
    channels,
    share,
    blocks,
    momentum: tl.float64,
    eps: tl.float64,
):
    """One program a channel: adds up its parts; fills the table and moves the running statistics, or leaves both."""
    channel = tl.program_id(0)
    origin = tl.load(parts + channel).to(tl.float64)
    sums = tl.zeros([_FINISH], tl.float64)
    squares = tl.zeros([_FINISH], tl.float64)
    for offset in range(0, blocks, _FINISH):
        block = offset + tl.arange(0, _FINISH)
        valid = block < blocks
        part = parts + block.to(tl.int64) * 3 * channels + channel
        count = tl.where(valid, tl.minimum(rows - block.to(tl.int64) * share, share), 0).to(tl.float64)
        distance = tl.load(part, mask=valid, other=0.0).to(tl.float64) - origin
        distance = tl.where(valid, distance, 0.0) + tl.load(part + channels, mask=valid, other=0.0).to(tl.float64)
        sums += count * distance
        squares += tl.load(part + 2 * channels, mask=valid, other=0.0).to(tl.float64) + count * distance * distance
    total = tl.sum(sums)
    size = tl.cast(rows, tl.float64)  # one row is a constant
    distance = total / size
    mean = origin + distance
    spread = tl.sum(squares) - total * distance
    # rounding could make it negative; NaN stays
    spread = tl.where(spread < 0.0, 0.0, spread)
    if statistics is not None:
        tl.store(statistics + channel, mean)
        tl.store(statistics + channels + channel, spread)
    else:
        invstd = 1.0 / tl.sqrt(spread / size + eps)
        scale = invstd
        if weight is not None:
            scale *= tl.load(weight + channel)
        shift = 0.0
        if bias is not None:
            shift = tl.load(bias + channel)
        tl.store(table + channel, mean.to(tl.float32))
        tl.store(table + stride + channel, invstd.to(tl.float32))
        tl.store(table + 2 * stride + channel, scale.to(tl.float32))
        tl.store(table + 3 * stride + channel, shift)
        if running_mean is not None:
            moved = (1.0 - momentum) * tl.load(running_mean + channel) + momentum * mean
            tl.store(running_mean + channel, moved.to(tl.float32))
            moved = (1.0 - momentum) * tl.load(running_var + channel) + momentum * (spread / (size - 1.0))
            tl.store(running_var + channel, moved.to(tl.float32))


@triton.jit
def bn_normalize_kernel(
    x,
    residual,
    z,
    y,
    table,
    stride,
    rows,
    channels,
    floor,
    ADD: tl.constexpr,
    SILU: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """By the table, from x; with ADD from x and the residual, whose sum is written to z."""
    channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    inside = channel < channels
    mean, scale, bias = _affine(table, stride, channel, inside)
    row = tl.program_id(1).to(tl.int64) * HIGH + tl.arange(0, HIGH)
    index = row[:, None] * channels + channel[None, :]
    valid = (row < rows)[:, None] & inside[None, :]
    value = tl.load(x + index, mask=valid, other=0.0)
    if ADD:
        value = value.to(tl.float32) + tl.load(residual + index, mask=valid, other=0.0).to(tl.float32)
        value = value.to(z.dtype.element_ty)
        tl.store(z + index, value, mask=valid)
    u = (value.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]
    tl.store(y + index, _activated(u, floor, SILU).to(y.dtype.element_ty), mask=valid)


@triton.jit
def bn_gradient_sums_kernel(
    grad,
    z,
    table,
    stride,
    parts,
    rows,
    channels,
    share,
    floor,
    SILU: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Sums of g and of g (z - mean) over a block of rows: parts[block][2][channels]."""
    channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    inside = channel < channels
    mean, scale, bias = _affine(table, stride, channel, inside)
    begin = tl.program_id(1).to(tl.int64) * share
    sums = tl.zeros([HIGH, WIDE], tl.float32)
    products = tl.zeros([HIGH, WIDE], tl.float32)
    for offset in range(0, share, HIGH):
        row = begin + offset + tl.arange(0, HIGH)
        index = row[:, None] * channels + channel[None, :]
        valid = (row < tl.minimum(begin + share, rows))[:, None] & inside[None, :]
        distance = tl.load(z + index, mask=valid, other=0.0).to(tl.float32) - mean[None, :]
        given = tl.load(grad + index, mask=valid, other=0.0).to(tl.float32)
        g = _through_activation(distance * scale[None, :] + bias[None, :], floor, given, SILU)
        sums += tl.where(valid, g, 0.0)
        products += tl.where(valid, g * distance, 0.0)
    to = parts + tl.program_id(1).to(tl.int64) * 2 * channels + channel
    tl.store(to, tl.sum(sums, 0), mask=inside)
    tl.store(to + channels, tl.sum(products, 0), mask=inside)


@triton.jit
def bn_finish_sums_kernel(parts, table, stride, grad_weight, grad_bias, coefficients, rows, channels, blocks):
    """One program a channel: coefficients[2][stride] of the gradient for x, and those for weight and bias."""
    channel = tl.program_id(0)
    sums = tl.zeros([_FINISH], tl.float64)
    products = tl.zeros([_FINISH], tl.float64)
    for offset in range(0, blocks, _FINISH):
        block = offset + tl.arange(0, _FINISH)
        part = parts + block.to(tl.int64) * 2 * channels + channel
        sums += tl.load(part, mask=block < blocks, other=0.0).to(tl.float64)
        products += tl.load(part + channels, mask=block < blocks, other=0.0).to(tl.float64)
    total, product, size = tl.sum(sums), tl.sum(products), tl.cast(rows, tl.float64)
    invstd = tl.load(table + stride + channel).to(tl.float64)
    tl.store(coefficients + channel, (total / size).to(tl.float32))
    tl.store(coefficients + stride + channel, (product * invstd * invstd / size).to(tl.float32))
    if grad_weight is not None:
        tl.store(grad_weight + channel, (product * invstd).to(tl.float32))
    if grad_bias is not None:
        tl.store(grad_bias + channel, total.to(tl.float32))


@triton.jit
def bn_gradient_kernel(
    grad,
    grad_z,
    z,
    table,
    stride,
    coefficients,
    grad_x,
    rows,
    channels,
    floor,
    SILU: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient: scale (g - constant - (z - mean) slope) and z's own; without coefficients scale g."""
    channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    inside = channel < channels
    mean, scale, bias = _affine(table, stride, channel, inside)
    row = tl.program_id(1).to(tl.int64) * HIGH + tl.arange(0, HIGH)
    index = row[:, None] * channels + channel[None, :]
    valid = (row < rows)[:, None] & inside[None, :]
    distance = tl.load(z + index, mask=valid, other=0.0).to(tl.float32) - mean[None, :]
    given = tl.load(grad + index, mask=valid, other=0.0).to(tl.float32)
    g = _through_activation(distance * scale[None, :] + bias[None, :], floor, given, SILU)
    if coefficients is not None:
        constant = tl.load(coefficients + channel, mask=inside, other=0.0)
        slope = tl.load(coefficients + stride + channel, mask=inside, other=0.0)
        g -= constant[None, :] + distance * slope[None, :]
    g *= scale[None, :]
    if grad_z is not None:
        g += tl.load(grad_z + index, mask=valid, other=0.0).to(tl.float32)
    tl.store(grad_x + index, g.to(grad_x.dtype.element_ty), mask=valid)


def _floor(activation: int) -> float:
    return 0.0 if activation == _RELU else -torch.inf


def _normalize(x: Tensor, residual: Tensor | None, z: Tensor | None, y: Tensor, table: Tensor, activation: int) -> None:
    grid, _, block = _cut(x, summed=False)
    channels = x.shape[1]
    bn_normalize_kernel[grid](
        x,
        residual,
        z,
        y,
        table,
        table.shape[1],
        x.numel() // channels,
        channels,
        _floor(activation),
        ADD=residual is not None,
        SILU=activation == _SILU,
        **block,
    )


def bn_act_train(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    activation: int,
    z: Tensor | None,
    y: Tensor | None,
    table: Tensor,
    statistics: Tensor | None,
) -> None:
    """Fill the table by the batch and move the running statistics, or leave its own; normalise, where y is given."""
    (tiles, blocks), share, block = _cut(x, summed=True)
    channels = x.shape[1]
    rows = x.numel() // channels
    parts = torch.empty((blocks, 3, channels), dtype=torch.float32, device=x.device)
    vectors = weight, bias, running_mean, running_var
    add = residual is not None
    with torch.cuda.device_of(x):
        bn_statistics_kernel[tiles, blocks](x, residual, z, parts, rows, channels, share, ADD=add, **block)
        bn_finish_statistics_kernel[(channels,)](
            parts, *vectors, table, statistics, table.shape[1], rows, channels, share, blocks, momentum, eps, **_FUSED
        )
        if y is not None:
            _normalize(x if z is None else z, None, None, y, table, activation)


def bn_act_eval(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    activation: int,
    z: Tensor | None,
    y: Tensor,
    table: Tensor,
    mask: None,
) -> None:
    """Normalise by the running statistics."""
    channels = x.shape[1]
    invstd = (running_var + eps).rsqrt()
    table[:, :channels] = torch.stack(
        [
            running_mean,
            invstd,
            invstd if weight is None else weight * invstd,
            torch.zeros_like(invstd) if bias is None else bias,
        ]
    )
    with torch.cuda.device_of(x):
        _normalize(x, residual, z, y, table, activation)


def bn_act_backward(
    grad: Tensor,
    grad_z: Tensor | None,
    z: Tensor,
    table: Tensor,
    mask: None,
    activation: int,
    train: bool,
    coefficients: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """The gradients that are not None; `coefficients` stand in for those of the sums over these rows."""
    channels, stride = grad.shape[1], table.shape[1]
    rows, floor, silu = grad.numel() // channels, _floor(activation), activation == _SILU
    with torch.cuda.device_of(grad):
        if (train and coefficients is None) or grad_weight is not None or grad_bias is not None:
            (tiles, blocks), share, block = _cut(grad, summed=True)
            parts = torch.empty((blocks, 2, channels), dtype=torch.float32, device=grad.device)
            found = torch.empty((2, stride), dtype=torch.float32, device=grad.device)
            bn_gradient_sums_kernel[tiles, blocks](
                grad, z, table, stride, parts, rows, channels, share, floor, SILU=silu, **block
            )
            bn_finish_sums_kernel[(channels,)](
                parts, table, stride, grad_weight, grad_bias, found, rows, channels, blocks, **_FUSED
            )
            coefficients = found if train and coefficients is None else coefficients
        if grad_x is not None:
            grid, _, block = _cut(grad, summed=False)
            bn_gradient_kernel[grid](
                grad, grad_z, z, table, stride, coefficients, grad_x, rows, channels, floor, SILU=silu, **block
            )

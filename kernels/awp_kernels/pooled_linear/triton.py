"""Mean over the pixels and linear layer in Triton: one launch forward, one for the gradient of the images."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# of a tile of weights or of pixels
_ELEMENTS = 8192
_WIDEST = 256
_WARPS = 8


def _block(shape: torch.Size, classes: int) -> dict[str, Any]:
    """Pixels, channels and classes at a time."""
    rows = triton.next_power_of_2(classes)
    wide = min(triton.next_power_of_2(shape[1]), _WIDEST, _ELEMENTS // rows)
    high = min(triton.next_power_of_2(shape[2] * shape[3]), _ELEMENTS // wide)
    # of products and sums, whose roundings are nobody's definition here
    return {"HIGH": high, "WIDE": wide, "CLASSES": rows, "num_warps": _WARPS, "enable_fp_fusion": True}


@triton.jit
def _weights(weight, kind, classes, channel, channels):
    inside = (kind < classes)[:, None] & (channel < channels)[None, :]
    return tl.load(weight + kind[:, None] * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def pooled_linear_kernel(
    x,
    weight,
    bias,
    logits,
    pixels,
    channels,
    classes,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """One program a sample."""
    sample = tl.program_id(0).to(tl.int64)
    kind = tl.arange(0, CLASSES)
    total = tl.zeros([CLASSES], tl.float32)
    for first in range(0, channels, WIDE):
        channel = first + tl.arange(0, WIDE)
        sums = tl.zeros([HIGH, WIDE], tl.float32)
        for offset in range(0, pixels, HIGH):
            pixel = offset + tl.arange(0, HIGH)
            inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
            index = sample * pixels * channels + pixel[:, None] * channels + channel[None, :]
            sums += tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(sums, 0) / pixels
        total += tl.sum(_weights(weight, kind, classes, channel, channels) * mean[None, :], 1)
    total += tl.load(bias + kind, mask=kind < classes, other=0.0)
    tl.store(logits + sample * classes + kind, total, mask=kind < classes)


@triton.jit
def pooled_linear_gradient_kernel(
    grad,
    weight,
    grad_x,
    pixels,
    channels,
    classes,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """One program a sample and WIDE channels, all of whose pixels get the same."""
    sample = tl.program_id(0).to(tl.int64)
    kind = tl.arange(0, CLASSES)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    of_logits = tl.load(grad + sample * classes + kind, mask=kind < classes, other=0.0)
    product = tl.sum(_weights(weight, kind, classes, channel, channels) * of_logits[:, None], 0)
    value = (product / pixels).to(grad_x.dtype.element_ty)
    for offset in range(0, pixels, HIGH):
        pixel = offset + tl.arange(0, HIGH)
        inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
        index = sample * pixels * channels + pixel[:, None] * channels + channel[None, :]
        tl.store(grad_x + index, value[None, :], mask=inside)


def pooled_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The logits of channels_last images."""
    samples, channels, height, width = x.shape
    logits = torch.empty((samples, len(weight)), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        pooled_linear_kernel[(samples,)](
            x, weight, bias, logits, height * width, channels, len(weight), **_block(x.shape, len(weight))
        )
    return logits


def pooled_linear_gradient(grad: Tensor, weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient of images of that shape and dtype, channels_last."""
    samples, channels, height, width = shape
    grad_x = torch.empty(shape, dtype=dtype, device=grad.device, memory_format=torch.channels_last)
    block = _block(shape, len(weight))
    with torch.cuda.device_of(grad):
        pooled_linear_gradient_kernel[(samples, triton.cdiv(channels, block["WIDE"]))](
            grad, weight, grad_x, height * width, channels, len(weight), **block
        )
    return grad_x

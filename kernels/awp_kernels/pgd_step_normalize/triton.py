"""One projected ascent step on the images, and the network's next input, in one Triton launch."""

# triton.jit is typed as the plain function: it knows neither constexpr arguments, nor launch options, nor tl types
# pyright: reportArgumentType=false, reportCallIssue=false, reportInvalidTypeForm=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from awp_kernels._ball import l2_radius, round_toward_zero
from awp_kernels._triton_common import BLOCK, WARPS, clamp, project_linf

# A tile is [PIXELS, WIDE]: of every pixel a row of FILLED values, of which the images have the first CHANNELS.


@triton.jit
def _places(pixel, sizes, strides, CHANNELS: tl.constexpr, FILLED: tl.constexpr, WIDE: tl.constexpr):
    """Where a tile's values lie in a sample's images and rows, and which of both there are."""
    height, width = sizes
    channel_stride, line_stride, column_stride = strides
    channel, pixel = tl.arange(0, WIDE)[None, :], pixel[:, None]
    image = channel * channel_stride + pixel // width * line_stride + pixel % width * column_stride
    inside = (pixel < height * width) & (channel < FILLED)
    return image, pixel * FILLED + channel, inside & (channel < CHANNELS), inside


@triton.jit
def _vectors(mean, std, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    channel = tl.arange(0, WIDE)[None, :]
    center = tl.load(mean + channel, mask=channel < CHANNELS, other=0.0)
    return center, tl.load(std + channel, mask=channel < CHANNELS, other=1.0)


@triton.jit
def _load_gradient(grad, mask, scale, places, SIGN: tl.constexpr):
    """The gradient for the images; with SIGN numbers of its sign, where a quotient could be 0."""
    image, row, valid, inside = places
    # whole rows, whose last values are not looked at
    ascent = tl.load(grad + row, mask=inside, other=0.0).to(tl.float32)
    ascent = tl.where(scale < 0.0, -ascent, ascent) if SIGN else tl.div_rn(ascent, scale)
    if mask is not None:
        # a choice, not a product: NaN outside the region counts as 0
        ascent = tl.where(tl.load(mask + image, mask=valid, other=0) != 0, ascent, 0.0)
    return tl.where(valid, ascent, 0.0)


@triton.jit
def _write(x_adv, out, result, center, scale, places):
    image, row, valid, inside = places
    tl.store(x_adv + image, result, mask=valid)
    normalized = tl.where(valid, tl.div_rn(result - center, scale), 0.0)
    tl.store(out + row, normalized.to(out.dtype.element_ty), mask=inside)


@triton.jit
def normalized_linf_kernel(
    x_adv,
    grad,
    x,
    mask,
    out,
    mean,
    std,
    sizes,
    strides,
    step_size,
    epsilon,
    low,
    high,
    CHANNELS: tl.constexpr,
    FILLED: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program for PIXELS pixels of a sample."""
    height, width = sizes
    programs = tl.cdiv(height * width, PIXELS)
    first = (tl.program_id(0) // programs).to(tl.int64) * height * width
    x_adv += first * CHANNELS
    x += first * CHANNELS
    if mask is not None:
        mask += first * CHANNELS
    grad += first * FILLED
    out += first * FILLED
    pixel = tl.program_id(0) % programs * PIXELS + tl.arange(0, PIXELS)
    places = _places(pixel, sizes, strides, CHANNELS, FILLED, WIDE)
    image, _, valid, _ = places
    center, scale = _vectors(mean, std, CHANNELS, WIDE)
    ascent = _load_gradient(grad, mask, scale, places, True)
    sign = (ascent > 0.0).to(tl.float32) - (ascent < 0.0).to(tl.float32)
    current = tl.load(x_adv + image, mask=valid, other=0.0)
    clean = tl.load(x + image, mask=valid, other=0.0)
    result = project_linf(current + step_size * sign, clean, epsilon, low, high)
    _write(x_adv, out, result, center, scale, places)


@triton.jit
def _moved(x_adv, grad, mask, scale, rate, places):
    image, _, valid, _ = places
    ascent = _load_gradient(grad, mask, scale, places, False)
    # the product in fp64: the rate overflows fp32 for tiny gradients; the choice keeps NaN * 0 out
    step = tl.where(rate != 0.0, rate * ascent.to(tl.float64), 0.0).to(tl.float32)
    return tl.load(x_adv + image, mask=valid, other=0.0) + step


@triton.jit
def normalized_l2_kernel(
    x_adv,
    grad,
    x,
    mask,
    out,
    mean,
    std,
    sizes,
    strides,
    step_size: tl.float64,
    radius: tl.float64,
    low,
    high,
    CHANNELS: tl.constexpr,
    FILLED: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program a sample: the gradient's norm, the distance after the step, then the projected step."""
    height, width = sizes
    pixels = height * width
    first = tl.program_id(0).to(tl.int64) * pixels
    x_adv += first * CHANNELS
    x += first * CHANNELS
    if mask is not None:
        mask += first * CHANNELS
    grad += first * FILLED
    out += first * FILLED
    center, scale = _vectors(mean, std, CHANNELS, WIDE)

    sums = tl.zeros([PIXELS, WIDE], tl.float64)
    for offset in range(0, pixels, PIXELS):
        places = _places(offset + tl.arange(0, PIXELS), sizes, strides, CHANNELS, FILLED, WIDE)
        ascent = _load_gradient(grad, mask, scale, places, False).to(tl.float64)
        sums += ascent * ascent
    norm = tl.sqrt(tl.sum(sums))
    rate = tl.where((norm > 0.0) & (norm < float("inf")), step_size / norm, 0.0)

    sums = tl.zeros([PIXELS, WIDE], tl.float64)
    for offset in range(0, pixels, PIXELS):
        places = _places(offset + tl.arange(0, PIXELS), sizes, strides, CHANNELS, FILLED, WIDE)
        image, _, valid, _ = places
        clean = tl.load(x + image, mask=valid, other=0.0)
        delta = (_moved(x_adv, grad, mask, scale, rate, places) - clean).to(tl.float64)
        sums += tl.where(valid, delta * delta, 0.0)
    distance = tl.sqrt(tl.sum(sums))
    factor = (radius / distance).to(tl.float32)

    for offset in range(0, pixels, PIXELS):
        places = _places(offset + tl.arange(0, PIXELS), sizes, strides, CHANNELS, FILLED, WIDE)
        image, _, valid, _ = places
        clean = tl.load(x + image, mask=valid, other=0.0)
        moved = _moved(x_adv, grad, mask, scale, rate, places)
        result = clamp(tl.where(distance > radius, clean + (moved - clean) * factor, moved), low, high)
        _write(x_adv, out, result, center, scale, places)


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
    if not x.numel():
        return
    samples, channels, height, width = x.shape
    pixels, filled = height * width, out.shape[1]
    tensors = x_adv, grad, x, mask, out, mean, std, (height, width), x_adv.stride()[1:]
    wide = triton.next_power_of_2(filled)
    options = {"CHANNELS": channels, "FILLED": filled, "PIXELS": max(1, BLOCK // wide), "WIDE": wide}
    # a fused multiply-add would skip a rounding
    options |= {"num_warps": WARPS, "enable_fp_fusion": False}
    with torch.cuda.device_of(x):
        if norm == "linf":
            bound = round_toward_zero(epsilon, x.dtype)
            grid = (samples * triton.cdiv(pixels, options["PIXELS"]),)
            normalized_linf_kernel[grid](*tensors, step_size, bound, low, high, **options)
        else:
            radius = l2_radius(epsilon, channels * pixels, x.dtype)
            normalized_l2_kernel[(samples,)](*tensors, step_size, radius, low, high, **options)

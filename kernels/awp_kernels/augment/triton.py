"""Gather, crop, mirror, cut out and convert in one Triton launch."""

# triton.jit is typed as the plain function: it knows neither constexpr arguments, nor launch options, nor tl types
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from awp_kernels import _checks
from awp_kernels.augment.reference import Rule

_AUGMENT = tl.constexpr(2)
_CUTOUT = tl.constexpr(6)
_BLOCK = 1024
_WARPS = 4


@triton.jit
def _words(sample_id, seed, stream: tl.constexpr):
    """The first words of a sample's stream."""
    low = (sample_id & 0xFFFFFFFF).to(tl.uint32)
    high = ((sample_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed.to(tl.int64), zero, zero + stream, low, high)


@triton.jit
def _below(word, count):
    """floor(word * count / 2^32)."""
    return ((word.to(tl.int64) * count) >> 32).to(tl.int32)


@triton.jit(do_not_specialize=["seed", "image_stride", "pad", "cutout"])
def augment_kernel(
    out,
    images,
    rows,
    sample_ids,
    seed: tl.int64,
    image_stride: tl.int64,
    pad: tl.int32,
    cutout: tl.int32,
    fill,
    FLIP: tl.constexpr,
    CUTOUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PACKED: tl.constexpr,
    OUT_PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for BLOCK values of a sample, in the order of the result's memory."""
    ELEMENTS: tl.constexpr = CHANNELS * HEIGHT * WIDTH
    BLOCKS: tl.constexpr = (ELEMENTS + BLOCK - 1) // BLOCK
    sample = tl.program_id(0) // BLOCKS
    place = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    if OUT_PACKED:
        channel = place % CHANNELS
        column = place // CHANNELS % WIDTH
        row = place // (CHANNELS * WIDTH)
    else:
        column = place % WIDTH
        row = place // WIDTH % HEIGHT
        channel = place // (WIDTH * HEIGHT)

    sample_id = tl.load(sample_ids + sample)
    w0, w1, w2, _ = _words(sample_id, seed, _AUGMENT)
    from_row = row + (_below(w0, 2 * pad + 1) - pad)
    from_column = column
    if FLIP:
        from_column = tl.where((w2 & 1) != 0, WIDTH - 1 - column, column)
    from_column += _below(w1, 2 * pad + 1) - pad
    in_image = (from_row >= 0) & (from_row < HEIGHT) & (from_column >= 0) & (from_column < WIDTH)
    if PACKED:
        source = (from_row * WIDTH + from_column) * CHANNELS + channel
    else:
        source = (channel * HEIGHT + from_row) * WIDTH + from_column
    index = sample.to(tl.int64)
    if rows is not None:
        index = tl.load(rows + sample)
    # what lies outside of the image may be too far away for 32 bits
    inside = place < ELEMENTS
    value = tl.load(images + index * image_stride + source, mask=inside & in_image, other=0)
    result = tl.div_rn(value.to(tl.float32), 255.0)

    if CUTOUT:
        w0, w1, _, _ = _words(sample_id, seed, _CUTOUT)
        top = _below(w0, HEIGHT) - cutout // 2
        left = _below(w1, WIDTH) - cutout // 2
        square = (row >= top) & (row < top + cutout) & (column >= left) & (column < left + cutout)
        filled = result
        for k in tl.static_range(CHANNELS):
            filled = tl.where(channel == k, fill[k], filled)
        result = tl.where(square, filled, result)
    tl.store(out + sample.to(tl.int64) * ELEMENTS + place, result, mask=inside)


def augment(images: Tensor, rows: Tensor | None, sample_ids: Tensor, rule: Rule, out: Tensor) -> None:
    """Write the images at `rows`, cropped, mirrored, cut and over 255, to `out`."""
    _, channels, height, width = out.shape
    blocks = triton.cdiv(channels * height * width, _BLOCK)
    with torch.cuda.device_of(images):
        augment_kernel[(len(out) * blocks,)](
            out,
            images,
            rows,
            sample_ids,
            rule.seed,
            images.stride(0),
            rule.pad,
            rule.cutout,
            tuple(rule.fill),
            FLIP=rule.flip,
            CUTOUT=rule.cutout > 0,
            CHANNELS=channels,
            HEIGHT=height,
            WIDTH=width,
            PACKED=not _checks.planar(images),
            OUT_PACKED=not _checks.planar(out),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )

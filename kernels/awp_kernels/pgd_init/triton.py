"""The attack's starting point in one Triton launch, equal to `awp_kernels.philox` to the last bit."""

# triton.jit is typed as the plain function: it knows neither constexpr arguments, nor launch options, nor tl types
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from awp_kernels._ball import l2_radius, round_toward_zero
from awp_kernels._triton_common import clamp, logical_order, project_linf

_UNIFORM = tl.constexpr(0)
_NORMAL = tl.constexpr(1)
_BLOCK = 1024
_WARPS = 4


@triton.jit
def _words(element, stream: tl.constexpr, sample_id, seed):
    """The four words that `element` shares with its neighbours, and its place among them."""
    block = (element // 4).to(tl.uint32)
    zero = block * 0
    low = (sample_id & 0xFFFFFFFF).to(tl.uint32)
    high = ((sample_id >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed.to(tl.int64), block, zero + stream, zero + low, zero + high)
    return w0, w1, w2, w3, element % 4


@triton.jit
def _uniform_integers(element, sample_id, seed):
    w0, w1, w2, w3, lane = _words(element, _UNIFORM, sample_id, seed)
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return 2 * (word >> 8).to(tl.int32) + 1 - 16777216


@triton.jit
def _normals(element, sample_id, seed):
    """Box-Muller, the operations of `awp_kernels.philox.normals` in the same order."""
    w0, w1, w2, w3, lane = _words(element, _NORMAL, sample_id, seed)
    radius_word = tl.where(lane < 2, w0, w2)
    angle_word = tl.where(lane < 2, w1, w3)

    bits = ((radius_word >> 8) + 1).to(tl.float32).to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    upper = mantissa > 1.4142135623730951
    exponent = (bits >> 23) - 127 + upper.to(tl.int32)
    mantissa = tl.where(upper, mantissa * 0.5, mantissa)
    s = tl.div_rn(mantissa - 1.0, mantissa + 1.0)
    square = s * s
    series = square * (1.0 / 9.0) + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    series = series * square + 1.0
    logarithm = (exponent - 24).to(tl.float32) * 0.6931471805599453 + (s * 2.0) * series
    radius = tl.sqrt_rn(logarithm * -2.0)

    angle_bits = (angle_word >> 8).to(tl.int32)
    quadrant = angle_bits >> 22
    angle = ((angle_bits & 0x3FFFFF).to(tl.float32) * (1.0 / 4194304.0) - 0.5) * 1.5707963267948966
    square = angle * angle
    sine = square * (1.0 / 362880.0) + -1.0 / 5040.0
    sine = sine * square + 1.0 / 120.0
    sine = sine * square + -1.0 / 6.0
    sine = sine * square + 1.0
    sine = angle * sine
    cosine = square * (1.0 / 40320.0) + -1.0 / 720.0
    cosine = cosine * square + 1.0 / 24.0
    cosine = cosine * square + -0.5
    cosine = cosine * square + 1.0
    second = (lane & 1) == 1
    # the pair is (cosine, sine) turned by quadrant * 90 degrees
    swap = (quadrant & 1) == 1
    value = tl.where(swap != second, sine, cosine)
    negative = tl.where(second, quadrant >= 2, (quadrant == 1) | (quadrant == 2))
    return radius * tl.where(negative, -value, value)


@triton.jit
def _logical_index(place, ORDER: tl.constexpr):
    if len(ORDER) == 0:
        element = place
    else:
        element = place * 0
        for k in tl.static_range(len(ORDER)):
            element += place // ORDER[k][1] % ORDER[k][0] * ORDER[k][2]
    return element


@triton.jit
def _own_block(sample_ids, elements, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """This program's elements of a sample: where they lie, which exist, logical indices, and the sample's id."""
    blocks = tl.cdiv(elements, BLOCK)
    sample = tl.program_id(0) // blocks
    place = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = sample.to(tl.int64) * elements + place
    return index, place < elements, _logical_index(place, ORDER), tl.load(sample_ids + sample)


@triton.jit
def init_linf_kernel(
    x_adv,
    x,
    sample_ids,
    seed: tl.int64,
    elements,
    epsilon,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for BLOCK elements of a sample."""
    index, inside, element, sample_id = _own_block(sample_ids, elements, ORDER, BLOCK)
    integers = _uniform_integers(element, sample_id, seed)
    clean = tl.load(x + index, mask=inside).to(tl.float32)
    moved = clean + integers.to(tl.float32) * (epsilon * (1.0 / 16777216.0))
    result = project_linf(moved, clean, epsilon, 0.0, 1.0)
    tl.store(x_adv + index, result.to(x_adv.dtype.element_ty), mask=inside)


@triton.jit
def init_l2_kernel(
    x_adv,
    x,
    sample_ids,
    seed: tl.int64,
    elements,
    radius: tl.float64,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a sample: the norm of its elements + 2 normal numbers, then the same numbers again, scaled."""
    sample = tl.program_id(0).to(tl.int64)
    sample_id = tl.load(sample_ids + sample)
    sums = tl.zeros([BLOCK], tl.int64)
    for offset in range(0, elements + 2, BLOCK):
        element = offset + tl.arange(0, BLOCK).to(tl.int64)
        z = _normals(element, sample_id, seed)
        squares = ((z * z) * 4294967296.0).to(tl.int64)
        sums += tl.where(element < elements + 2, squares, 0)
    squared_norm = tl.sum(sums).to(tl.float64) * (1.0 / 4294967296.0)
    factor = (radius / tl.sqrt(squared_norm)).to(tl.float32)
    for offset in range(0, elements, BLOCK):
        place = offset + tl.arange(0, BLOCK).to(tl.int64)
        index = sample * elements + place
        clean = tl.load(x + index, mask=place < elements).to(tl.float32)
        noise = _normals(_logical_index(place, ORDER), sample_id, seed) * factor
        result = clamp(clean + noise, 0.0, 1.0)
        tl.store(x_adv + index, result.to(x_adv.dtype.element_ty), mask=place < elements)


@triton.jit
def init_normal_kernel(
    x_adv,
    x,
    sample_ids,
    seed: tl.int64,
    elements,
    std,
    ORDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for BLOCK elements of a sample."""
    index, inside, element, sample_id = _own_block(sample_ids, elements, ORDER, BLOCK)
    z = _normals(element, sample_id, seed)
    result = tl.load(x + index, mask=inside).to(tl.float32) + z * std
    tl.store(x_adv + index, result.to(x_adv.dtype.element_ty), mask=inside)


def pgd_init(x_adv: Tensor, x: Tensor, sample_ids: Tensor, epsilon: float, norm: str, seed: int) -> None:
    """Write x plus noise keyed by `seed` and `sample_ids` to `x_adv`; for norm "normal", epsilon is its deviation."""
    samples, elements = len(x), x.numel() // len(x)
    # a fused multiply-add would skip a rounding
    options = {"ORDER": logical_order(x), "BLOCK": _BLOCK, "num_warps": _WARPS, "enable_fp_fusion": False}
    with torch.cuda.device_of(x):
        grid = (samples * triton.cdiv(elements, _BLOCK),)
        if norm == "linf":
            bound = round_toward_zero(epsilon, x.dtype)
            init_linf_kernel[grid](x_adv, x, sample_ids, seed, elements, bound, **options)
        elif norm == "normal":
            init_normal_kernel[grid](x_adv, x, sample_ids, seed, elements, epsilon, **options)
        else:
            radius = l2_radius(epsilon, elements, x.dtype)
            init_l2_kernel[(samples,)](x_adv, x, sample_ids, seed, elements, radius, **options)

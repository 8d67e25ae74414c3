"""The norm over a list of tensors: one Triton launch a dtype for the sums, and one that adds them up."""

# triton.jit is typed as the plain function: it knows neither constexpr arguments, nor launch options, nor tl types
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from awp_kernels._triton_common import BLOCK, CHUNK, TYPES, WARPS, add_up, pointer, program_span, table

_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}


@triton.jit
def _add_squares(total, row, start, begin, end, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    data = pointer(row, 0, start, TYPE, ALIGNED)
    for offset in range(begin, end, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        value = tl.load(data + index, mask=index < end, other=0.0).to(tl.float64)
        total += value * value
    return total


@triton.jit
def norm_sums_kernel(rows, programs, partials, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of squares of each program's elements, fp64 [programs]."""
    row, start, count, wide = program_span(rows, programs, tl.int32)
    total = tl.zeros([BLOCK], tl.float64)
    total = _add_squares(total, row, start, 0, wide, TYPE, True, BLOCK)
    total = _add_squares(total, row, start, wide, count, TYPE, False, BLOCK)
    tl.store(partials + tl.program_id(0), tl.sum(total))


@triton.jit
def norm_kernel(partials, parts, norm, BLOCK: tl.constexpr):
    """The root of all partial sums."""
    tl.store(norm, tl.sqrt(add_up(partials, 0, parts, BLOCK)))


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The L2 norm over all elements, fp64."""
    device = tensors[0].device
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    counts = {dtype: sum(max(1, -(-t.numel() // CHUNK)) for t in group) for dtype, group in by_dtype.items()}
    with torch.cuda.device_of(tensors[0]):
        partials = torch.empty(sum(counts.values()), dtype=torch.float64, device=device)
        norm = torch.empty((), dtype=torch.float64, device=device)
        first = 0
        for dtype, group in by_dtype.items():
            rows, programs, _ = table([group])
            sums = partials[first : first + counts[dtype]]
            norm_sums_kernel[(len(programs),)](rows, programs, sums, TYPES[dtype], BLOCK, **_OPTIONS)
            first += counts[dtype]
        norm_kernel[(1,)](partials, len(partials), norm, BLOCK, **_OPTIONS)
    return norm

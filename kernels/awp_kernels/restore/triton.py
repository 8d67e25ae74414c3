"""A list of tensors copied bit for bit in one Triton launch."""

# triton.jit is typed as the plain function: it knows neither constexpr arguments, nor launch options, nor tl types
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from awp_kernels._triton_common import BLOCK, WARPS, pointer, program_span, table

# integers keep the payloads of NaN and numbers below the normal range
_WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _copy(row, start, begin, end, WORD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    target = pointer(row, 0, start, WORD, ALIGNED)
    source = pointer(row, 1, start, WORD, ALIGNED)
    for offset in range(begin, end, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        tl.store(target + index, tl.load(source + index, mask=index < end), mask=index < end)


@triton.jit
def restore_kernel(rows, programs, WORD: tl.constexpr, BLOCK: tl.constexpr):
    """Copy column 1 of the table into column 0."""
    row, start, count, wide = program_span(rows, programs, tl.int32)
    _copy(row, start, 0, wide, WORD, True, BLOCK)
    _copy(row, start, wide, count, WORD, False, BLOCK)


def restore(weights: list[Tensor], saved: list[Tensor]) -> None:
    """Copy `saved` into `weights`."""
    with torch.cuda.device_of(weights[0]):
        rows, programs, _ = table([weights, saved])
        word = _WORDS[weights[0].element_size()]
        restore_kernel[(len(programs),)](rows, programs, word, BLOCK, num_warps=WARPS, enable_fp_fusion=False)

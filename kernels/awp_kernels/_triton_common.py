"""What the Triton kernels share: tables that let one launch walk a list of tensors, and the exact arithmetic."""

# triton.jit is typed as the plain function: it knows neither constexpr arguments, nor launch options, nor tl types
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16384  # elements that one program walks; larger chunks leave fewer partial sums to read again
BLOCK = 2048  # elements at a time: 8 a thread, so that 16-bit types also move 16 bytes
WARPS = 8

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# columns of a row of the table, int64
ROW = tl.constexpr(10)
NUMEL = tl.constexpr(5)
FIRST = tl.constexpr(6)
RUN = tl.constexpr(7)
WIDE = tl.constexpr(8)
FLAG = tl.constexpr(9)
_POINTERS = 5


class Table(NamedTuple):
    """A list of tensors as a kernel sees it.

    Attributes:
        rows: int64 [tensors, 10] on the device: five addresses, number of elements, index of the tensor's first
            program, elements that a program takes, whether every program may use 16-byte accesses, and a flag or
            another number.
        programs: int64 on the device: the tensor that each program works on.
        host: the memory that both were uploaded from.
    """

    rows: Tensor
    programs: Tensor
    host: Tensor


class _Key(NamedTuple):
    device: torch.device
    stream: int
    addresses: tuple[tuple[int, ...], ...]
    item_sizes: tuple[int, ...]
    numels: tuple[int, ...]
    counts: tuple[int, ...] | None
    flags: tuple[int, ...] | None


def _build(key: _Key) -> Table:
    counts = key.counts or tuple(max(1, -(-numel // CHUNK)) for numel in key.numels)
    rows: list[int] = []
    first = 0
    for index, (numel, count) in enumerate(zip(key.numels, counts, strict=True)):
        addresses = [column[index] if column else 0 for column in key.addresses]
        run = numel // max(count, 1) if key.counts else CHUNK
        aligned = not any(address % 16 for address in addresses)
        wide = aligned and (count <= 1 or not any(run * size % 16 for size in key.item_sizes))
        rows += [*addresses, *[0] * (_POINTERS - len(addresses)), numel, first, run, int(wide)]
        rows.append(int(key.flags is None or key.flags[index]))
        first += count
    programs = torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    host = torch.cat([torch.tensor(rows, dtype=torch.int64), programs])
    if key.device.type == "cuda":
        host = host.pin_memory()
    uploaded = host.to(key.device, non_blocking=True)
    return Table(uploaded[: len(rows)], uploaded[len(rows) :], host)


_build_once = functools.lru_cache(maxsize=64)(_build)
_captured: list[Tensor] = []


def table(
    lists: list[list[Tensor]], counts: tuple[int, ...] | None = None, flags: tuple[int, ...] | None = None
) -> Table:
    """The table of up to five equally long lists of flat tensors, kept for the next call with the same memory.

    Args:
        lists: tensors with equal element counts at equal places; the first list must not be empty, any other may.
        counts: programs for each tensor, each taking an equal run of its elements; None: one a CHUNK.
        flags: a flag or another number for each tensor, for the kernel to read; None: 1 for all.
    """
    device = lists[0][0].device
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = _Key(
        device,
        # another stream would not wait for this one's upload
        torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
        tuple(tuple(tensor.data_ptr() for tensor in tensors) for tensors in lists),
        tuple(tensors[0].element_size() for tensors in lists if tensors),
        tuple(tensor.numel() for tensor in lists[0]),
        counts,
        flags,
    )
    if not capturing:
        return _build_once(key)
    # a captured graph uploads from this memory at every replay, so it has to stay
    built = _build(key)
    _captured.append(built.host)
    return built


@triton.jit
def add_up(partials, first, parts, BLOCK: tl.constexpr):
    """The sum of `parts` fp64 numbers from `first` on, in a fixed order."""
    total = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, parts, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        total += tl.load(partials + first + index, mask=index < parts, other=0.0)
    return tl.sum(total)


def logical_order(x: Tensor) -> tuple[tuple[int, int, int], ...]:
    """How to find the logical C, H, W index of a value from its place in a sample's memory.

    Returns:
        Size, memory stride and logical stride of each dimension: the index is the sum of place // stride % size *
        logical. Empty where the two orders agree.
    """
    merged: list[tuple[int, int, int]] = []
    logical = 1
    for size, stride in reversed(list(zip(x.shape[1:], x.stride()[1:], strict=True))):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            inner_size, inner_stride, inner_logical = merged.pop()
            merged.append((inner_size * size, inner_stride, inner_logical))
        else:
            merged.append((size, stride, logical))
        logical *= size
    return tuple(merged) if len(merged) > 1 else ()


@triton.jit
def pointer(row, COLUMN: tl.constexpr, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Element `start` of a tensor of the table."""
    address = tl.load(row + COLUMN) + start * (TYPE.primitive_bitwidth // 8)
    result = address.to(tl.pointer_type(TYPE))
    # the hint sticks to the cast, so the unaligned path needs a cast of its own
    if ALIGNED:
        result = tl.multiple_of(result, 16)
    return result


@triton.jit
def program_span(rows, programs, INDEX: tl.constexpr):
    """The row of this program's tensor, where its run starts, and how many elements it has: all, and by 16 bytes."""
    program = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(programs + program) * ROW
    run = tl.load(row + RUN)
    start = (program - tl.load(row + FIRST)) * run
    # an index no wider than needed saves registers
    count = tl.minimum(tl.load(row + NUMEL) - start, run).to(INDEX)
    # a multiple of 8 keeps the mask uniform over a 16-byte access
    wide = tl.where(tl.load(row + WIDE) != 0, count // 8, 0) * 8
    return row, start, count, wide


@triton.jit
def clamp(value, low, high):
    """Clamp; NaN in `value` stays NaN."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def project_linf(value, x, epsilon, low, high):
    """Clamp to [x - epsilon, x + epsilon], both ends rounded inward, and to [low, high]: see `_ball.linf_bounds`."""
    lower = x - epsilon
    back = lower - x
    error = (x - (lower - back)) + (-epsilon - back)
    bits = lower.to(tl.int32, bitcast=True)
    inward = tl.where(lower > 0.0, bits + 1, bits - 1).to(tl.float32, bitcast=True)
    lower = tl.where(error > 0.0, inward, lower)

    upper = x + epsilon
    back = upper - x
    error = (x - (upper - back)) + (epsilon - back)
    bits = upper.to(tl.int32, bitcast=True)
    inward = tl.where(upper > 0.0, bits - 1, bits + 1).to(tl.float32, bitcast=True)
    upper = tl.where(error < 0.0, inward, upper)

    return clamp(value, tl.where(lower > low, lower, low), tl.where(upper < high, upper, high))

"""Transformed weights, kept for as long as the weights stay as they are.

Kept are those of weights that ask for no gradient, as an attack's do, whose passes all need them. Training uses weights
once in each direction before it changes them: their transforms go to a buffer that all layers share.

Weights are known by the tensor object, and told to be unchanged by their layout and a hash of all their bits: writes
through `.data`, numpy or shared memory move no version counter.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Entry:
    """Of one tensor, for the forward pass and for the gradient with respect to the input: state and transform.

    Each pair is set at once, for threads that share the weights.
    """

    __slots__ = ("kept", "reference")

    def __init__(self, reference: "weakref.ref[Tensor]") -> None:
        self.reference = reference
        self.kept: list[tuple[tuple[Any, ...], Tensor] | None] = [None, None]


class _Arena:
    """Memory for transforms in blocks of 40 MB and more, which the C library gives back to the system when freed.

    Smaller ones would lie among activations and keep the memory around them from being used again.
    """

    _BLOCK = 10_000_000  # floats

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: Tensor | None = None
        self._used = 0

    def empty(self, size: int) -> Tensor:
        """`size` floats, aligned to 64 bytes."""
        padded = -(-size // 16) * 16
        with self._lock:
            if self._block is None or self._used + padded > self._block.numel():
                block = torch.empty(max(padded, self._BLOCK), dtype=torch.float32, device="cpu")
                self._block, self._used = block, 0
            self._used += padded
            return self._block[self._used - padded :][:size]

    def drop(self) -> None:
        """Begin a new block; the old one lives as long as what lies in it."""
        with self._lock:
            self._block = None


_arena = _Arena()
_entries: dict[int, _Entry] = {}
# a buffer a thread: backward passes run in threads of their own
_shared = threading.local()


def _entry_for(weight: Tensor) -> _Entry:
    key = id(weight)

    def forget(reference: "weakref.ref[Tensor]") -> None:
        # another tensor may have come to the same address
        if key in _entries and _entries[key].reference is reference:
            del _entries[key]

    entry = _entries[key] = _Entry(weakref.ref(weight, forget))
    return entry


def _size(operations: Any, weight: Tensor, transposed: bool, bf16: bool) -> int:
    outputs, inputs = weight.shape[:2]
    return operations.conv3x3_transformed_size.default(*((inputs, outputs) if transposed else (outputs, inputs)), bf16)


def _room(memory: Callable[[int], Tensor], size: int, bf16: bool) -> Tensor:
    """Room for a transform, of so many floats of `memory`."""
    return memory(-(-size // 2)).view(torch.bfloat16)[:size] if bf16 else memory(size)[:size]


def transform(operations: Any, weight: Tensor, transposed: bool, out: Tensor) -> Tensor:
    """The Winograd transform of [K, C, 3, 3] weights, in the compiled kernels' order and in out's dtype."""
    operations.conv3x3_transform.default(weight, transposed, out)
    return out


def multiplies_bf16(operations: Any) -> bool:
    """Whether the processor does."""
    return operations.conv3x3_transformed_size.default(1, 1, True) > 0


def transformed(
    operations: Any, weight: Tensor, transposed: bool, bf16: bool = False, state: tuple[Any, ...] | None = None
) -> tuple[Tensor, tuple[Any, ...] | None]:
    """The transform, from memory if the weights have not changed, and the state that it is of.

    Args:
        operations: the compiled ones.
        weight: [K, C, 3, 3].
        transposed: for the gradient with respect to x.
        bf16: rounded to bf16, for products in it.
        state: of the forward pass; a backward pass takes what is kept of that state without another look.
    """
    size = _size(operations, weight, transposed, bf16)
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    if weight.requires_grad or not dense:
        return transform(operations, weight, transposed, _room(_passing, size, bf16)), None
    entry = _entries.get(id(weight))
    if entry is None:
        entry = _entry_for(weight)
    kept = entry.kept[transposed]
    layout = weight.shape, weight.stride(), weight.dtype, bf16
    if state is None or kept is None or kept[0] != state:
        state = *layout, operations.conv3x3_fingerprint.default(weight)
    if kept is None or kept[0] != state:
        # memory of the right size is written again
        out = kept[1] if kept is not None and kept[0][:-1] == layout else None
        out = _room(_arena.empty, size, bf16) if out is None else out
        kept = entry.kept[transposed] = state, transform(operations, weight, transposed, out)
    return kept[1], state


def _passing(floats: int) -> Tensor:
    """The thread's shared buffer: good until the thread's next call."""
    buffer = getattr(_shared, "buffer", None)
    if buffer is None or buffer.numel() < floats:
        buffer = _shared.buffer = torch.empty(floats, dtype=torch.float32, device="cpu")
    return buffer


def held_bytes() -> int:
    """Memory that transformed weights take now."""
    return sum(kept[1].nbytes for entry in _entries.values() for kept in entry.kept if kept is not None)


def forget_all() -> None:
    """Give that memory back; what is needed again is computed again."""
    _entries.clear()
    _arena.drop()

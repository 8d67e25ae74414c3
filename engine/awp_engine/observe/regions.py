"""Names for the parts of a step: profilers show them, and whoever listens can time them."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch.autograd.profiler import record_function

# called with a part's name, and whether it begins or ends
Listener = Callable[[str, bool], None]

_listeners: list[Listener] = []


@contextlib.contextmanager
def region(name: str) -> Iterator[None]:
    """A part of a step: a range of torch.profiler and, on CUDA machines, of NVTX.

    Args:
        name: "attack", "ascent", "descent", "update" or "data".
    """
    for listener in _listeners:
        listener(name, True)
    nvtx = torch.cuda.is_available()
    if nvtx:
        torch.cuda.nvtx.range_push(name)
    try:
        with record_function(name):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()
        for listener in _listeners:
            listener(name, False)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """A block in which `listener` is called as every part begins and ends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)

"""The lists of weights that multi-tensor operations are timed on: those of models, and synthetic ones of any size."""

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awp_engine.models import build_model

# elements, from what a launch costs to what memory holds
SIZES = ("1e3", "1e4", "1e5", "1e6", "1e7", "1e8", "1e9")
_LARGEST = {"cpu": "1e7", "cuda": "1e9"}
_SIZE = re.compile(r"[1-9]e[0-9]")
# relative sizes of 32 tensors: a WideResNet's 3x3 convolutions, whose width doubles from stage to stage
_UNITS = (1,) * 11 + (4,) * 11 + (16,) * 10


class TooLargeError(Exception):
    """The tensors do not fit in memory; the message says how much they need and how much there is."""


class SyntheticModel(nn.Module):
    """32 weights in a WideResNet's proportions with `elements` elements in all."""

    def __init__(self, elements: int, device: str) -> None:
        super().__init__()
        generator = torch.Generator(device).manual_seed(0)
        counts = [elements * unit // sum(_UNITS) for unit in _UNITS]
        counts[-1] += elements - sum(counts)
        for index, count in enumerate(counts):
            # two dimensions, as all weights that AWP moves
            weight = torch.empty(1, count, device=device).normal_(0, 0.05, generator=generator)
            self.register_parameter(f"weight{index}", nn.Parameter(weight))


def sizes(option: str | None, device: str) -> list[str]:
    """The sizes that `--sizes` asks for, or all up to the device's own limit.

    Raises:
        ValueError: naming a size that is not of the form 1e6.
    """
    if option is None:
        return list(SIZES[: SIZES.index(_LARGEST[device]) + 1])
    names = [name.strip() for name in option.split(",") if name.strip()]
    wrong = next((name for name in names if not _SIZE.fullmatch(name)), None)
    if wrong is not None:
        raise ValueError(f"--sizes: expected sizes such as 1e5,3e7, got {wrong!r}")
    return names


def is_size(inputs: str) -> bool:
    """Whether `inputs` names a size and not a model."""
    return _SIZE.fullmatch(inputs) is not None


def weights_of(inputs: str, device: str) -> nn.Module:
    """The module called `inputs`: a size, or a name of `build_model`."""
    if is_size(inputs):
        return SyntheticModel(int(float(inputs)), device)
    torch.manual_seed(0)
    return build_model(inputs, 10, (0.5,) * 3, (0.25,) * 3).to(device)


def _free_bytes(device: str) -> int:
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 1 << 62)


def require_memory(inputs: str, device: str, bytes_an_element: int) -> None:
    """Make sure that a synthetic list fits, with all that its check and its alternatives need.

    Raises:
        TooLargeError: it does not.
    """
    if not is_size(inputs):
        return
    needed, free = int(float(inputs)) * bytes_an_element, _free_bytes(device)
    if needed > free:
        raise TooLargeError(f"{inputs} elements need about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")


class Latest:
    """Keeps what was built last, and lets it go before the next is built: there is no room for two."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._value: Any = None

    def get(self, build: Callable[..., Any], *arguments: Any) -> Any:
        """`build(*arguments)`, which runs again for other arguments only."""
        key = (build, *arguments)
        if key != self._key:
            self._key, self._value = (), None
            gc.collect()
            self._value = build(*arguments)
            self._key = key
        return self._value


TENSORS = Latest()

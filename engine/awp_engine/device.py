"""Where to compute, and in which memory format."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine.config import ConfigError

# of AVX-512, in fp32
_VECTOR = 16


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` asks for; auto takes a CUDA GPU if there is one, the one of the rank's number.

    Raises:
        ConfigError: the device that was asked for is not there, or has no fp64.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = "cpu" if found is None else found.type
    if name == "cpu" or (name == "auto" and kind != "cuda"):
        return torch.device("cpu")
    if name not in ("auto", kind):
        what = "a CUDA device" if name == "cuda" else f"a device of torch's kind {name}"
        other = "none" if found is None else kind
        raise ConfigError(f"--device: expected a machine with {what} for '{name}', found {other}; use --device cpu")
    device = torch.device(kind, local_rank)
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError) as error:
        if kind == "cuda":
            raise
        why = " ".join(str(error).split())
        raise ConfigError(f"--device: expected a device with fp64, for norms and rates, got {name} ({why})") from None
    return device


def device_name(device: torch.device) -> str:
    """What a report calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def fast_memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """channels_last, which convolutions run fastest in, where it is safe."""
    # torch 2.13's oneDNN writes past the end in weights' gradients of 1x1 convolutions with stride, channels_last, of
    # fewer channels than a vector has, where the threads do not divide the batch
    narrow = any(
        isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.in_channels < _VECTOR for m in model.modules()
    )
    takes = getattr(model, "takes_channels_last", True)
    return torch.contiguous_format if not takes or (device.type == "cpu" and narrow) else torch.channels_last


def full_precision() -> None:
    """Have GPUs compute in full fp32, as a measurement should: TF32 keeps 10 bits of the mantissa."""
    _set_precision("ieee", "ieee")


@contextlib.contextmanager
def in_full_precision() -> Iterator[None]:
    """A block with `full_precision`, after which it is as before."""
    # torch makes this attribute at run time
    conv = torch.backends.cudnn.conv.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    matmul: Any = torch.backends.cuda.matmul.fp32_precision
    full_precision()
    try:
        yield
    finally:
        _set_precision(conv, matmul)


def _set_precision(conv: str, matmul: str) -> None:
    # torch makes this attribute at run time
    torch.backends.cudnn.fp32_precision = "ieee" if conv == "ieee" else "none"  # pyright: ignore[reportAttributeAccessIssue]
    # the flag of old, which torch.export reads, has to agree with the new ones
    torch.backends.cudnn.allow_tf32 = conv == "tf32"
    torch.backends.cuda.matmul.fp32_precision = matmul


def choose_convolutions(device: torch.device, *, deterministic: bool = False) -> None:
    """On a GPU, have cuDNN time its algorithms for every convolution, all of them: torch would stop after ten."""
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    if torch.backends.cudnn.benchmark:
        torch.backends.cudnn.benchmark_limit = 0


class DelayedReadback:
    """Numbers of the device as of a step ago, which the host can read without waiting for the step that runs.

    On the CPU there is nothing to wait for, and they are those of the last step.

    Args:
        device: where the numbers are.
        count: how many.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._on_gpu = device.type == "cuda"
        self._last: tuple[Tensor, torch.cuda.Event | None] = torch.zeros(count, dtype=torch.float64), None
        self._before = self._last

    def push(self, numbers: Tensor) -> None:
        """Numbers of this step, fp64 [count]."""
        if not self._on_gpu:
            self._last = self._before = (numbers, None)
            return
        copied = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        copied.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._before, self._last = self._last, (copied, event)

    def latest(self) -> list[float]:
        """Those of the step before on a GPU, else the last ones."""
        numbers, event = self._before
        if event is not None:
            event.synchronize()
        return numbers.tolist()

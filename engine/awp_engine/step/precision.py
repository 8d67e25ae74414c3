"""Which precision serves which part of a step, and the models that compute in it.

Masters stay in full precision. A part in 16 bits runs on a working copy: a second module whose convolution and linear
weights are stored in 16 bits, its other parameters as they are; the running statistics are the model's own. Modules of
others know nothing of that: their copy keeps its weights, and `torch.autocast` has it compute in 16 bits.
"""

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine.distributed.sharding import gathered
from awp_engine.models import NormalizedClassifier, WrappedClassifier
from awp_engine.models.batch_norm import other_buffers, share_memory
from awp_engine.models.layers import Conv3x3

PARTS = ("attack", "ascent", "descent")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What the parts of a step compute in; None is the model's own precision."""

    attack: torch.dtype | None = None
    ascent: torch.dtype | None = None
    descent: torch.dtype | None = None


def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; without, it is slower than fp32."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def working_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A second module with parameters of its own, the weights of convolutions and linear layers in `dtype`.

    A `WrappedClassifier`'s are as they were, and it computes in `dtype`.

    Args:
        model: any module; its buffers, such as running statistics, serve both.
        dtype: 16-bit.
    """
    wrapped = isinstance(model, WrappedClassifier)
    layers = [m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) and not wrapped]
    lowered = {id(m.weight) for m in layers}
    # deepcopy takes what the memo holds in place of a copy
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for p in model.parameters():
        copied = p.detach().clone().to(dtype if id(p) in lowered else p.dtype)
        memo[id(p)] = nn.Parameter(copied, requires_grad=p.requires_grad)
    second = copy.deepcopy(model, memo)
    if isinstance(second, WrappedClassifier):
        second.autocast_dtype = dtype
    return second


def frozen_view(model: nn.Module) -> nn.Module:
    """A second module over the same memory, none of whose parameters asks for a gradient."""
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return copy.deepcopy(model, memo)


def _narrow_input(copied: nn.Module, dtype: torch.dtype) -> None:
    """Have a copy in fp16 on a GPU read its images in fp16: they keep as many bits as in TF32, which bf16 would not."""
    on_gpu = next(copied.parameters()).is_cuda
    if on_gpu and dtype == torch.float16 and isinstance(copied, NormalizedClassifier) and copied.stem is not None:
        copied.narrow_input_(dtype)


class WorkingModels:
    """The models that the parts of a step run on.

    Args:
        model: holds the masters.
        precision: of the parts.
        shared_ascent: the ascent's gradient is that of the attack's last pass, which therefore runs on `ascent`.
        sharded: the model's parameters are: it serves all parts itself, in the precision in which they are gathered.

    Attributes:
        attack: asks for no gradient of its parameters, but where `shared_ascent`.
        ascent, descent: the model itself, or a working copy.
        batch_statistics: running statistics of batch normalisation, see `share_memory`.
        other_buffers: whatever else passes of the descent may write.
        all: the working copies.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Precision | None = None,
        *,
        shared_ascent: bool = False,
        sharded: bool = False,
    ) -> None:
        precision = precision or Precision()
        self.model, self.precision, self.sharded = model, precision, sharded
        self.batch_statistics = share_memory(model)
        if sharded:
            self.all: list[nn.Module] = []
            self.attack = self.ascent = self.descent = model
            self._written = other_buffers(model)
            return
        by_dtype: dict[torch.dtype | None, nn.Module] = {None: model}
        for dtype in (precision.descent, precision.ascent, precision.attack):
            if dtype not in by_dtype and dtype is not None:
                by_dtype[dtype] = working_copy(model, dtype)
                _narrow_input(by_dtype[dtype], dtype)
        self.all = [copied for dtype, copied in by_dtype.items() if dtype is not None]
        self.ascent, self.descent = by_dtype[precision.ascent], by_dtype[precision.descent]
        # the copies' are the model's own
        self._written = other_buffers(self.descent)
        of_attack = by_dtype[precision.attack]
        self.attack = of_attack if shared_ascent else frozen_view(of_attack)
        if precision.attack == torch.bfloat16 and not shared_ascent:
            # no weight is trained by its gradients
            for layer in self.attack.modules():
                if isinstance(layer, Conv3x3):
                    layer.products = "bf16"

    @property
    def other_buffers(self) -> list[Tensor]:
        """See the class."""
        return [buffer for _, _, buffer in self._written]

    @property
    def statistics(self) -> list[Tensor]:
        """All that a step which is left out has to put back, beside weights."""
        return [*self.batch_statistics, *self.other_buffers]

    @torch.no_grad()
    def settle_(self) -> None:
        """Where a pass of the descent put another tensor in a buffer's place, write it into the one that all share."""
        for module, name, buffer in self._written:
            assigned = module._buffers[name]
            if assigned is not None and assigned is not buffer and assigned.shape == buffer.shape:
                buffer.copy_(assigned)
                module._buffers[name] = buffer

    def held(self) -> contextlib.AbstractContextManager[None]:
        """A block of several passes between which no parameter changes: shards stay gathered."""
        return gathered(self.model) if self.sharded else contextlib.nullcontext()

    @property
    def working(self) -> nn.Module | None:
        """The copy that takes the perturbed weights: the descent's; None where the descent runs on the masters."""
        return None if self.descent is self.model else self.descent

    @property
    def updated(self) -> nn.Module | None:
        """The copy that an update writes along with the masters: the descent's, else the ascent's or the attack's."""
        return self.all[0] if self.all else None

    @torch.no_grad()
    def refresh_(self, *, updated: bool = False) -> None:
        """Bring the working copies up to date with the masters: after an update those that it did not write."""
        masters: list[Tensor] = list(self.model.parameters())
        for copied in self.all[1:] if updated else self.all:
            targets: list[Tensor] = list(copied.parameters())
            torch._foreach_copy_(targets, masters)  # pyright: ignore[reportPrivateImportUsage]


class LossScale:
    """The factor that lifts 16-bit gradients out of underflow; grows and shrinks on the device, as torch.amp's does.

    Attributes:
        value: fp32 scalar.
        growth: int32 scalar, steps since it last changed.
    """

    def __init__(self, device: torch.device, initial: float = 2.0**15) -> None:
        self.value = torch.full((), initial, device=device)
        self.growth = torch.zeros((), dtype=torch.int32, device=device)

    @torch.no_grad()
    def update_(self, skipped: Tensor) -> None:
        """Halve after a step whose gradient was not finite, double after 2,000 steps without one."""
        update: Any = torch._amp_update_scale_  # pyright: ignore[reportPrivateImportUsage]
        update(self.value, self.growth, skipped.float(), 2.0, 0.5, 2000)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"value": self.value, "growth": self.growth}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """What `state` gave."""
        self.value.copy_(state["value"])
        self.growth.copy_(state["growth"])

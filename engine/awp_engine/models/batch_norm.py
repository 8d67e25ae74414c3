"""Batch normalisation's statistics: shared by all ranks, held still, put back, computed anew."""

import contextlib
import functools
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from awp_engine.models.layers import BatchNorm
from awp_kernels._block import Block

_BN_FLAGS = ("track_running_stats", "synchronized")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def layers(model: nn.Module) -> list[_BatchNorm]:
    """The model's batch-normalisation layers."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def set_momentum(model: nn.Module, momentum: float) -> None:
    """What part of a batch's statistics all batch normalisation of the model takes into its running ones.

    Raises:
        ValueError: there is none.
    """
    found = layers(model)
    if not found:
        raise ValueError("expected none for a model without batch normalisation")
    for layer in found:
        layer.momentum = momentum


@contextlib.contextmanager
def whole_statistics(model: nn.Module) -> Iterator[None]:
    """A block in which running statistics become those of the batch, whatever they were before."""
    before = [(layer, layer.momentum) for layer in layers(model)]
    try:
        for layer, _ in before:
            layer.momentum = 1.0
        yield
    finally:
        for layer, momentum in before:
            layer.momentum = momentum


def own_layers(model: nn.Module) -> list[BatchNorm]:
    """`layers`, as those of `awp_engine.models`: torch's BatchNorm2d, which a module of others has, becomes one.

    Raises:
        ValueError: one of another kind.
    """
    found: list[Any] = layers(model)
    for layer in found:
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = BatchNorm
            layer.synchronized = False  # as its constructor does  # pyright: ignore[reportArgumentType]
        elif not isinstance(layer, BatchNorm):
            raise ValueError(
                f"model: {type(layer).__name__} cannot be synchronised, or have a second set; expected BatchNorm2d or "
                "those of awp_engine.models"
            )
    return found


def synchronize(model: nn.Module) -> None:
    """Let the model's batch normalisation in train mode take the statistics of the batch over all ranks.

    Every rank then has to make the same forward and backward passes in train mode, but inside
    `batch_norm_mode(..., synchronized=False)`. Nothing changes where there is one rank, and in eval mode.

    Args:
        model: one of `awp_engine.models`; copies made of it afterwards are synchronised as well.

    Raises:
        ValueError: a batch-normalisation layer of another kind.
    """
    for layer in own_layers(model):
        layer.synchronized = True


def _held_still(module: nn.Module, name: str) -> bool:
    """Whether no forward pass writes this buffer while `track_running_stats` is off."""
    kind = type(module)
    if kind.__module__.startswith("awp_engine.models."):
        return True
    return kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward) and name in _STATISTICS


def other_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Buffers that a forward pass in train mode may write, but for batch normalisation's: (module, name, buffer)."""
    found, normalisations = [], set(map(id, layers(model)))
    for module in model.modules():
        if id(module) not in normalisations:
            own = ((name, buffer) for name, buffer in module._buffers.items() if buffer is not None)
            found += [(module, name, buffer) for name, buffer in own if not _held_still(module, name)]
    return found


def _kept(model: nn.Module) -> list[tuple[nn.Module, str, Tensor | None, Tensor | None]]:
    """Buffers that a forward pass may write, each with a copy: (module, name, buffer, values)."""
    # running statistics of other layers, hand-written ones, vectors of spectral normalisation, averages
    return [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if not _held_still(module, name) and (buffer is None or not is_lazy(buffer))
    ]


def _as_told(
    model: nn.Module, mode: str | None, bn_mode: str | None, update_statistics: bool, synchronized: bool
) -> Generator[None]:
    """`layer_modes`' block; an interrupt may come once, wherever it likes."""
    modules = list(model.modules())
    found: list[Any] = layers(model)
    flags = [(module, "training", module.training) for module in (found if mode is None else modules)]
    flags += [(layer, name, getattr(layer, name)) for layer in found for name in _BN_FLAGS if hasattr(layer, name)]
    buffers = [] if update_statistics else _kept(model)

    def put_back() -> None:
        for module, name, value in flags:
            setattr(module, name, value)
        for module, name, buffer, saved in buffers:
            module._buffers[name] = buffer  # where a pass assigned another tensor
            if buffer is not None and saved is not None:
                # .data: the value is that which graphs made before the block have kept
                buffer.data.copy_(saved)

    is_back = False
    try:
        if mode is not None:
            for module in modules:
                module.training = mode == "train"
        for layer in found:
            layer.training = layer.training if bn_mode is None else bn_mode == "train"
            # without tracking, train mode leaves the buffers alone, and eval mode still reads them
            layer.track_running_stats &= update_statistics
            if not synchronized and hasattr(layer, "synchronized"):
                layer.synchronized = False
        yield
    except GeneratorExit:
        put_back()
        is_back = True
    finally:
        if not is_back:
            put_back()


def layer_modes(
    model: nn.Module,
    mode: Literal["train", "eval"] | None = None,
    *,
    bn_mode: Literal["train", "eval"] | None = None,
    update_statistics: bool = False,
    synchronized: bool = True,
) -> Block:
    """A block in which the layers of a model behave as told; everything is put back after it, also after an exception
    or an interrupt.

    Put back are the mode of each layer and, without `update_statistics`, every buffer that a forward pass may have
    written, whatever the layer: running statistics of hand-written normalisation, the vectors of spectral
    normalisation, moving averages. What a layer keeps elsewhere than in registered buffers is its own business.

    Args:
        model: any module.
        mode: of all its layers, such as dropout; None leaves them as they are.
        bn_mode: of batch normalisation, whatever `mode` says: "train" normalises by the batch, "eval" by the running
            statistics; None: as `mode` has it.
        update_statistics: whether forward passes in train mode move running statistics, and buffers stay as they leave
            them.
        synchronized: False: no communication, whatever `synchronize` said; each rank normalises by its own batch.

    Raises:
        ValueError: an unknown mode.
    """
    for name, value in (("mode", mode), ("bn_mode", bn_mode)):
        if value not in ("train", "eval", None):
            raise ValueError(f"{name}: expected train or eval, got {value!r}")
    return Block(functools.partial(_as_told, model, mode, bn_mode, update_statistics, synchronized))


def batch_norm_mode(
    model: nn.Module,
    mode: Literal["train", "eval"] | None = None,
    *,
    update_statistics: bool,
    synchronized: bool = True,
) -> Block:
    """`layer_modes` for batch normalisation alone: `mode` is its `bn_mode`, and other layers stay in theirs.

    The other arguments, and what is raised, are as there.
    """
    return layer_modes(model, bn_mode=mode, update_statistics=update_statistics, synchronized=synchronized)


@torch.no_grad()
def share_memory(model: nn.Module) -> list[Tensor]:
    """Lay the running statistics of all layers side by side, so that one operation reaches all of them.

    Returns:
        A flat tensor for each dtype and device; the layers' buffers become views of them, with their values. Other
        modules that share the buffers have to be made afterwards.
    """
    groups: dict[tuple[torch.dtype, torch.device], list[tuple[nn.Module, str, Tensor]]] = {}
    for layer in layers(model):
        for name, buffer in layer.named_buffers(recurse=False):
            groups.setdefault((buffer.dtype, buffer.device), []).append((layer, name, buffer))
    flats = []
    for found in groups.values():
        flat = torch.cat([buffer.reshape(-1) for _, _, buffer in found])
        begin = 0
        for layer, name, buffer in found:
            # .data: autograd, which keeps them for the backward pass, would take a change of one for a change of all
            setattr(layer, name, flat[begin : begin + buffer.numel()].view(buffer.shape).data)
            begin += buffer.numel()
        flats.append(flat)
    return flats


class Statistics:
    """Copies of running statistics, to put them back.

    Args:
        live: what `share_memory` returned.
    """

    @torch.no_grad()
    def __init__(self, live: list[Tensor]) -> None:
        self._live, self._saved = live, [tensor.clone() for tensor in live]

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the copies back, as long as they are kept."""
        for live, saved in zip(self._live, self._saved, strict=True):
            live.copy_(saved)

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """Put the copies back if `condition`, a bool scalar, is true, decided on the device; keep them no longer."""
        for live, saved in zip(self._live, self._saved, strict=True):
            live.copy_(torch.where(condition, saved, live))
        self._live, self._saved = [], []


@torch.no_grad()
def recompute_statistics(model: nn.Module, forward_passes: Iterable[object]) -> None:
    """Replace the running statistics by the plain average over forward passes.

    Args:
        model: any module; the mode of each layer is put back afterwards, and after an exception the statistics too.
        forward_passes: iterated in train mode; each item is made by one or more forward passes of `model`.
    """
    found = layers(model)
    if not found:
        return
    before = [(layer, layer.momentum, [buffer.clone() for buffer in layer.buffers(recurse=False)]) for layer in found]
    try:
        for layer in found:
            layer.reset_running_stats()
            layer.momentum = None
        with layer_modes(model, "train", update_statistics=True):
            for _ in forward_passes:
                pass
    except BaseException:
        for layer, _, saved in before:
            for buffer, value in zip(layer.buffers(recurse=False), saved, strict=True):
                buffer.copy_(value)
        raise
    finally:
        for layer, momentum, _ in before:
            layer.momentum = momentum

"""Batch normalisation's statistics: shared by all ranks, held still, put back, computed anew."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def layers(model: nn.Module) -> list[_BatchNorm]:
    """The model's batch-normalisation layers."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def synchronize(model: nn.Module) -> None:
    """Let the model's batch normalisation in train mode take the statistics of the batch over all ranks.

    Every rank then has to make the same forward and backward passes in train mode, but inside
    `batch_norm_mode(..., synchronized=False)`. Nothing changes where there is one rank, and in eval mode.

    Args:
        model: one of `awp_engine.models`; copies made of it afterwards are synchronised as well.

    Raises:
        ValueError: a batch-normalisation layer of another kind.
    """
    found: list[Any] = layers(model)
    for layer in found:
        if not hasattr(layer, "synchronized"):
            raise ValueError(
                f"model: {type(layer).__name__} cannot be synchronised; expected the layers of awp_engine.models"
            )
    for layer in found:
        layer.synchronized = True


@contextlib.contextmanager
def batch_norm_mode(
    model: nn.Module,
    mode: Literal["train", "eval"] | None = None,
    *,
    update_statistics: bool,
    synchronized: bool = True,
) -> Iterator[None]:
    """Sets how the model's batch normalisation behaves inside the block, and puts everything back after it.

    Args:
        model: any module.
        mode: "train" normalises by the batch, "eval" by the running statistics; None leaves it as it is.
        update_statistics: whether forward passes in train mode move the running statistics.
        synchronized: False: no communication, whatever `synchronize` said; each rank normalises by its own batch.
    """
    found: list[Any] = layers(model)
    before = [(layer.training, layer.track_running_stats, getattr(layer, "synchronized", None)) for layer in found]
    try:
        for layer in found:
            layer.training = layer.training if mode is None else mode == "train"
            # without tracking, train mode leaves the buffers alone, and eval mode still reads them
            layer.track_running_stats &= update_statistics
            if not synchronized and hasattr(layer, "synchronized"):
                layer.synchronized = False
        yield
    finally:
        for layer, (training, tracking, shared) in zip(found, before, strict=True):
            layer.training, layer.track_running_stats = training, tracking
            if shared is not None:
                layer.synchronized = shared


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
        """Put the copies back."""
        for live, saved in zip(self._live, self._saved, strict=True):
            live.copy_(saved)

    @torch.no_grad()
    def restore_where(self, condition: Tensor) -> None:
        """Put the copies back if `condition`, a bool scalar, is true; decided on the device."""
        for live, saved in zip(self._live, self._saved, strict=True):
            live.copy_(torch.where(condition, saved, live))


@torch.no_grad()
def recompute_statistics(model: nn.Module, forward_passes: Iterable[object]) -> None:
    """Replace the running statistics by the plain average over forward passes.

    Args:
        model: any module; its mode is put back afterwards.
        forward_passes: iterated in train mode; each item is made by one or more forward passes of `model`.
    """
    found = layers(model)
    if not found:
        return
    momenta, training = [layer.momentum for layer in found], model.training
    try:
        for layer in found:
            layer.reset_running_stats()
            layer.momentum = None
        model.train()
        for _ in forward_passes:
            pass
    finally:
        for layer, momentum in zip(found, momenta, strict=True):
            layer.momentum = momentum
        model.train(training)

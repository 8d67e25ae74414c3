"""Batch normalisation by the statistics of the batch over all ranks, on any device and backend."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from awp_kernels import Ranks, add_bn_act, bn_act, bn_act_available
from awp_kernels.bn_act import reference

if TYPE_CHECKING:
    from awp_engine.models.layers import BatchNorm


def _gather(values: Tensor) -> Tensor:
    gathered = values.new_empty(distributed.get_world_size(), len(values))
    distributed.all_gather(list(gathered.unbind()), values)
    return gathered


def _add(values: Tensor) -> Tensor:
    distributed.all_reduce(values)
    return values


# an opaque call to torch.compile, which breaks its graph here
@torch.compiler.disable()
def synchronized_batch_norm(layer: "BatchNorm", x: Tensor, residual: Tensor | None = None) -> Any:
    """What `layer` in train mode gives for the batch of all ranks together, of which x is this rank's part.

    By `awp_kernels.bn_act` with ranks, which says what ranks have to do alike: one all-gather of 2 C + 1 numbers a rank
    forward; one all-reduce of 2 C numbers backward, unless x needs no gradient. Under torch.compile it is a graph
    break. Differentiable once.

    Args:
        layer: with `track_running_stats` its running statistics are moved, by the unbiased variance over all ranks.
        x: [N, C, H, W]; N may differ between ranks, or be 0.
        residual: to be added to x before, of its shape; None: nothing.

    Returns:
        [N, C, H, W], x's dtype, after the layer's activation; with a residual, the sum and that.

    Raises:
        RuntimeError: in the backward pass, with `create_graph`.
    """
    settings: dict[str, Any] = layer.settings() | {"ranks": Ranks(_gather, _add)}
    if settings["momentum"] is None:
        count = layer.num_batches_tracked
        settings["momentum"] = 0.0 if count is None else count.double().reciprocal()
    # a copy's order would reach the next convolution, whose oneDNN may not be safe in it: see `fast_memory_format`
    ordered = x.is_contiguous(memory_format=torch.channels_last)
    if not ordered or not bn_act_available(x, layer.weight, layer.bias):
        z, y = reference.bn_act(x, residual, **settings)
        return y if residual is None else (z, y)
    return bn_act(x, **settings) if residual is None else add_bn_act(x, residual, **settings)

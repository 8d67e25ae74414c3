"""Models cut into shards over ranks, by FSDP2 (`torch.distributed.fsdp.fully_shard`); on GPUs and CPUs.

Every rank keeps some rows of every parameter, of its gradient and of its momentum, as DTensors; a block's parameters
are gathered for its passes and freed after them. `awp_kernels.AdversarialWeightPerturbation` and `awp_kernels.SGD` move
a rank's own rows. Buffers, running statistics among them, are whole on every rank.

A training step, run by all ranks:

    with gathered(model):
        x_adv = pgd(model, x, y, ...)                   # nothing is communicated after the first pass's gathering
    (losses.sum() * ranks / global_batch_size).backward()   # gradients are averaged over ranks: a mean over samples
    with awp.perturbed():                               # one all-reduce of a vector; the next pass gathers w + v
        (losses.sum() * ranks / global_batch_size).backward()
    optimizer.step(grad_norm=total_norm(optimizer.gradients()))   # one all-reduce of a number

Several passes for one gradient: `model.set_requires_gradient_sync(False)` before all but the last, and True before it;
gradients stay whole on every rank until then.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh

from awp_engine.models import blocks as blocks_of
from awp_engine.models.batch_norm import layers
from awp_engine.models.layers import Classifier
from awp_kernels._sharded import is_sharded


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> None:
    """Cut a model's parameters into shards, block by block, in place.

    Optimizer and perturbation are made afterwards, as parameters are replaced. Parameters become contiguous.

    Args:
        model: one of `awp_engine.models`, with the same weights on all ranks, on the mesh's device.
        mesh: of one dimension; or of two with names, over the first of which shards are replicated.
        param_dtype: what convolutions are gathered and computed in; w + v is rounded in being gathered, the shards stay
            as they are. Batch normalisation, classifier and images keep their precision.
        reduce_dtype: what gradients of convolutions travel in; by default `param_dtype`. Shards of gradients have the
            parameters' own dtype.

    Raises:
        ValueError: a model without blocks of a known kind, or one that is sharded already; another mesh.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"model: {type(model).__name__} has no block to shard; expected one of awp_engine.models")
    if isinstance(model, FSDPModule):
        raise ValueError("model: is sharded already")
    # fully_shard takes no other order
    if mesh.ndim > 2 or (mesh.ndim == 2 and not mesh.mesh_dim_names):
        raise ValueError(
            f"mesh: expected one dimension, or two with mesh_dim_names=('replicate', 'shard'), got {mesh.ndim}"
        )
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    # images stay in full precision: 16-bit ones would lose attack steps
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    if param_dtype is not None:
        # one group for all of them
        whole: list[nn.Module] = [*layers(model), *(m for m in model.modules() if isinstance(m, Classifier))]
        fully_shard(whole, mesh=mesh, reshard_after_forward=True)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # True: by default what is outside of blocks stays gathered after a pass without backward, and misses later changes
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for part in _parts(model):
        # gloo has no average
        part.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")


@contextlib.contextmanager
def gathered(model: nn.Module, *, now: bool = False) -> Iterator[None]:
    """Inside the block the model's first pass gathers all parameters, and they stay: for the passes of an attack.

    Gradients are to be taken by `torch.autograd.grad` with respect to images alone: nothing is reduced, and parameters'
    gradients stay as they are. After the block they are freed, so that the next pass sees what became of the shards.
    Without the block an attack works as well, in less memory, but gathers every block's parameters twice a pass.

    Args:
        model: that was given to `shard`.
        now: gather on entry, on all ranks alike: where they may make different numbers of passes.
    """
    parts = _parts(model)
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(False, recurse=False)
            if now:
                part.unshard()
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.set_reshard_after_backward(True, recurse=False)
            part.reshard()


def gather(tensors: Mapping[str, Any], *, every_rank: bool = False) -> dict[str, Tensor]:
    """Whole copies of shards on the CPU, for a checkpoint; all ranks have to call it.

    Args:
        tensors: DTensors such as parameters or momentum buffers, and plain tensors such as buffers, by name, in the
            same order on all ranks.
        every_rank: whether all ranks get them, or rank 0 alone.

    Returns:
        Tensors by name; on other ranks than 0 nothing, unless `every_rank`. One at a time is whole on the device.
    """
    keeps = every_rank or distributed.get_rank() == 0
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.detach()
        if is_sharded(whole):
            whole = whole.full_tensor()
        if keeps:
            found[name] = whole.to("cpu", copy=True)
    return found


@torch.no_grad()
def scatter_(tensors: Mapping[str, Any], whole: Mapping[str, Tensor]) -> None:
    """Write every rank's rows of whole tensors, as `gather` gave them, into shards; nothing is communicated.

    Args:
        tensors: DTensors and plain tensors, by name; written in place.
        whole: the same on every rank, on any device.

    Raises:
        ValueError: a tensor is missing, or has another shape.
    """
    for name, tensor in tensors.items():
        if name not in whole or whole[name].shape != tensor.shape:
            found = tuple(whole[name].shape) if name in whole else "none"
            raise ValueError(f"{name}: expected a tensor of shape {tuple(tensor.shape)}, got {found}")
    for name, tensor in tensors.items():
        rows = whole[name]
        if is_sharded(tensor):
            for dimension, placement in enumerate(tensor.placements):
                if placement.is_shard():
                    mesh = tensor.device_mesh
                    # as fully_shard cuts: ceil(rows / ranks) each, the last ones fewer or none
                    length = -(-len(rows) // mesh.size(dimension))
                    rows = rows[mesh.get_local_rank(dimension) * length :][:length]
            tensor = tensor.to_local()
        tensor.copy_(rows)


def _parts(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]

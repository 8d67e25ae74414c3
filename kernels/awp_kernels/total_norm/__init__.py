"""`total_norm`: one norm over a list of tensors, left on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from awp_kernels import _backend, _checks
from awp_kernels._sharded import Shards, is_sharded, local


@torch.library.custom_op("awp::total_norm", mutates_args=())
def _total_norm(tensors: list[Tensor]) -> Tensor:
    tensors = _checks.flat("tensors", tensors)
    run = _backend.select("total_norm", tensors[0].device, {tensor.dtype for tensor in tensors})
    return run(tensors)


@_total_norm.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    _checks.flat("tensors", tensors)
    return tensors[0].new_empty((), dtype=torch.float64)


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all elements of all tensors, as `sgd_step_` takes it for `grad_norm`.

    Squares are added in fp64, in an order that depends on the sizes alone: the result has the same bits every time.
    Nothing waits for the device.

    Args:
        tensors: at least one tensor, of any shapes, of float64, float32, float16 or bfloat16 in any mixture, on one
            device. Of DTensors, all sharded alike along dimension 0, the norm is over all ranks, by one all-reduce.

    Returns:
        The norm, a float64 scalar on the tensors' device; not finite if any element is not.

    Raises:
        ValueError: an empty list, or a tensor of another kind or on another device.

    Example:
        >>> import torch
        >>> from awp_kernels import total_norm
        >>> total_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]], dtype=torch.float16)])
        tensor(5., dtype=torch.float64)
    """
    tensors = list(tensors)
    if not tensors or not is_sharded(tensors[0]):
        return _total_norm(tensors)
    shards = Shards("tensors", tensors)
    square = _total_norm(local(tensors)).square()
    shards.add_up_(square)
    return square.sqrt()

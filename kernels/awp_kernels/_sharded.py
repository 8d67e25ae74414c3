"""Parameters of which every rank holds some rows: torch's DTensors, as FSDP2 (`fully_shard`) makes them."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; torch.distributed is not imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensors: Iterable[Any]) -> list[Tensor]:
    """This rank's rows, in the same memory; plain tensors are taken for rows already."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


class Shards:
    """How DTensors are cut: all alike, along dimension 0, over the ranks of one dimension of a mesh.

    Rows are whole, their numbers may differ, and a rank may have none. Over the mesh's other dimensions tensors are
    replicated (HSDP).

    Args:
        name: what to call the tensors in errors.
        tensors: at least one, all DTensors.

    Raises:
        ValueError: tensors that are not cut so.
    """

    def __init__(self, name: str, tensors: Sequence[Any]) -> None:
        for tensor in tensors:
            if not is_sharded(tensor):
                raise ValueError(f"{name}: expected all sharded or none; shard the whole model (fully_shard)")
        self.mesh, self.placements = tensors[0].device_mesh, tuple(tensors[0].placements)
        for tensor in tensors:
            self.check(name, tensor)
        cut = [dimension for dimension, placement in enumerate(self.placements) if placement.is_shard()]
        whole = [placement.is_shard(0) or placement.is_replicate() for placement in self.placements]
        if len(cut) > 1 or not all(whole):
            raise ValueError(f"{name}: expected shards along dimension 0, as fully_shard makes, got {self.placements}")
        self._group = self.mesh.get_group(cut[0]) if cut else None

    def check(self, name: str, tensor: Any) -> None:
        """Raise ValueError unless a tensor is cut in this way."""
        if not is_sharded(tensor):
            raise ValueError(f"{name}: expected a DTensor like the parameters, got a plain tensor")
        if tensor.device_mesh != self.mesh or tuple(tensor.placements) != self.placements:
            raise ValueError(
                f"{name}: expected all on one mesh with placements {self.placements}, "
                f"got {tuple(tensor.placements)} on {tensor.device_mesh}"
            )

    def add_up_(self, numbers: Tensor) -> None:
        """Sums over the ranks, in place; one all-reduce, whose result has the same bits on all of them."""
        if self._group is not None:
            torch.distributed.all_reduce(numbers, group=self._group)

    def joined(self, rows: Tensor, like: Any) -> Tensor:
        """The DTensor of which this rank has `rows`."""
        return type(like).from_local(
            rows, self.mesh, self.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


def local_norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norms, fp64 [len(tensors)]; 0 for empty ones."""
    result = tensors[0].new_zeros(len(tensors), dtype=torch.float64)
    filled = [index for index, tensor in enumerate(tensors) if tensor.numel()]
    if filled:
        foreach_norm: Any = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
        found = torch.stack(foreach_norm([tensors[index] for index in filled], 2, dtype=torch.float64))
        if len(filled) == len(tensors):
            return found
        result[torch.tensor(filled, device=result.device)] = found
    return result

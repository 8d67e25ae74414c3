"""Ranks that hold the same model must hold the same bits."""

from collections.abc import Mapping

import torch
from torch import Tensor

from awp_engine.distributed.ranks import Ranks

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DivergenceError(RuntimeError):
    """Ranks whose weights differ; the message is one line that names the ranks and the first such tensor."""


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> Tensor:
    """A number for each tensor's bits, int64 [len(tensors)], on the device; one differing bit gives another number."""
    sums = []
    for tensor in tensors.values():
        bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()]).long()
        # odd factors: no multiple of one vanishes modulo 2^64 before its bits are used up
        sums.append((bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum())
    return torch.stack(sums)


def check_replicas(ranks: Ranks, tensors: Mapping[str, Tensor], when: str) -> None:
    """Compare every rank's tensors with the first rank's; all ranks have to call it.

    Args:
        ranks: of the run.
        tensors: by name, the same names on every rank.
        when: of the message, such as "step 300".

    Raises:
        DivergenceError: on every rank, if any differs.
    """
    if ranks.world == 1 or not tensors:
        return
    gathered = ranks.gather(checksums(tensors))  # [world, len(tensors)]
    differs = gathered != gathered[0]
    if not differs.any():
        return
    others = differs.any(1).nonzero().flatten().tolist()
    names = [name for name, wrong in zip(tensors, differs.any(0).tolist(), strict=True) if wrong]
    raise DivergenceError(
        f"{when}: the weights of rank {', '.join(map(str, others))} are not those of rank 0, first in {names[0]} "
        f"({len(names)} of {len(tensors)} tensors): a fault of memory or of the network, or ranks that run different "
        "versions; start again to go on from the last checkpoint, without the machine that fails"
    )

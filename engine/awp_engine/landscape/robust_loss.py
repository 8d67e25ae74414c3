"""The robust loss: cross-entropy on images that are attacked anew for the weights at hand."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.attack import Attack
from awp_engine.data import Batch, Split, eval_batches
from awp_engine.models.batch_norm import batch_norm_mode
from awp_kernels.philox import mix_seed

Report = Callable[[int], None]
"""Told how many gradients of how many images were computed: images times steps."""


def restart_seed(seed: int, restart: int) -> int:
    """Seed of a restart's starting points; that of restart 0 is the attack's own."""
    return seed if restart == 0 else mix_seed(seed, restart)


@torch.no_grad()
def cross_entropies(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every image, fp64 [N], BN in eval mode; in fp64 from the logits on, so that none vanishes."""
    with batch_norm_mode(model, "eval", update_statistics=False):
        return F.cross_entropy(model(x).double(), y, reduction="none")


def robust_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    attack: Attack,
    *,
    restarts: int = 1,
    sample_ids: Tensor | None = None,
    report: Report | None = None,
) -> Tensor:
    """Cross-entropy of every image under PGD against this very model, BN in eval mode.

    Args:
        model: maps images in [0, 1] to logits; left as it is.
        x: [N, C, H, W] in [0, 1].
        y: int64 [N], labels.
        attack: how the images are attacked.
        restarts: attacks from different starting points, of which every image's largest loss counts, >= 1.
        sample_ids: int64 [N], what an image's starting point is keyed by; its place in the batch if not given.
        report: called after every attack.

    Returns:
        fp64 [N], in nats.

    Raises:
        ValueError: restarts below 1, or arguments that `pgd` refuses.
    """
    if restarts < 1:
        raise ValueError(f"restarts: expected a whole number >= 1, got {restarts}")
    worst = None
    for restart in range(restarts):
        x_adv = attack(model, x, y, sample_ids=sample_ids, seed=restart_seed(attack.seed, restart))
        losses = cross_entropies(model, x_adv, y)
        worst = losses if worst is None else torch.maximum(worst, losses)
        if report is not None:
            report(len(x) * attack.steps)
    assert worst is not None
    return worst


def robust_losses(
    model: nn.Module,
    batches: Sequence[Batch],
    attack: Attack,
    *,
    restarts: int = 1,
    report: Report | None = None,
) -> Tensor:
    """`robust_loss` of all batches' images.

    Returns:
        fp64 [N] on the CPU, in the batches' order.
    """
    return torch.cat(
        [
            robust_loss(model, x, y, attack, restarts=restarts, sample_ids=ids, report=report).cpu()
            for x, y, ids, _ in batches
        ]
    )


def as_batches(split: Split, batch_size: int, memory_format: torch.memory_format) -> list[Batch]:
    """All of a split as fp32 batches, held in memory, since they are visited many times."""
    return [
        batch._replace(images=batch.images.contiguous(memory_format=memory_format))
        for batch in eval_batches(split, batch_size)
    ]

"""The robust loss: cross-entropy on images that are attacked anew for the weights at hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.attack import Attack
from awp_engine.data import Batch, Split, eval_batches
from awp_engine.models.batch_norm import batch_norm_mode
from awp_kernels.philox import mix_seed


def restart_seed(seed: int, restart: int) -> int:
    """Seed of a restart's starting points; that of restart 0 is the attack's own."""
    return seed if restart == 0 else mix_seed(seed, restart)


@torch.no_grad()
def cross_entropies(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every image, fp64 [N], BN in eval mode; in fp64 from the logits on, so that none vanishes."""
    with batch_norm_mode(model, "eval", update_statistics=False):
        return F.cross_entropy(model(x).double(), y, reduction="none")


@dataclass(frozen=True)
class RobustLoss:
    """Cross-entropy of every image under PGD against the very model that it is called with, BN in eval mode.

    Attributes:
        batches: the images; an image's starting point is keyed by its id.
        attack: how the images are attacked.
        restarts: attacks from different starting points, of which every image's largest loss counts, >= 1.
        report: told, after every attack, how many gradients of how many images were computed: images times steps.

    Raises:
        ValueError: restarts below 1.
    """

    batches: Sequence[Batch]
    attack: Attack
    restarts: int = 1
    report: Callable[[int], None] = lambda _: None

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise ValueError(f"restarts: expected a whole number >= 1, got {self.restarts}")

    def __call__(self, model: nn.Module) -> Tensor:
        """All batches' losses; the model maps images in [0, 1] to logits, and is left as it is.

        Returns:
            fp64 [N] on the CPU, in nats, in the batches' order.

        Raises:
            ValueError: arguments that `pgd` refuses.
        """
        return torch.cat([self._worst(model, batch).cpu() for batch in self.batches])

    def _worst(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y, ids, _ = batch
        losses = []
        for restart in range(self.restarts):
            x_adv = self.attack(model, x, y, sample_ids=ids, seed=restart_seed(self.attack.seed, restart))
            losses.append(cross_entropies(model, x_adv, y))
            self.report(len(x) * self.attack.steps)
        return torch.stack(losses).amax(0)


def as_batches(split: Split, batch_size: int, memory_format: torch.memory_format) -> list[Batch]:
    """All of a split as fp32 batches, held in memory, since they are visited many times."""
    return [
        batch._replace(images=batch.images.contiguous(memory_format=memory_format))
        for batch in eval_batches(split, batch_size)
    ]

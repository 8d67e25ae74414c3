"""How far a perturbation of the weights takes the loss, measured against the loss of guessing."""

import torch
from torch import Tensor, nn

from awp_engine.distributed.batch import Batch
from awp_engine.distributed.ranks import Ranks
from awp_engine.step.objectives.objective import Objective

# of gamma: where it begins, and the least, from which it can grow again
_FLOOR = 2.0**-10
# in one step
_SHRINK, _GROW = 0.5, 1.1


class Guess(nn.Module):
    """A classifier of images of so many channels that gives every class the same probability."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.classes, self.channels = classes, channels

    def forward(self, x: Tensor) -> Tensor:
        """Logits of zero, [N, classes], or [N, views * classes] of several views."""
        return x.new_zeros(len(x), x.shape[1] // self.channels * self.classes)


@torch.no_grad()
def guessing_loss(objective: Objective, batch: Batch, classes: int, ranks: Ranks) -> float:
    """The mean loss of a batch that is not attacked, for a model that gives every class the same probability.

    Called by all ranks alike, with the same batch.
    """
    guess, objective.ids = Guess(classes, batch.images.shape[1]), batch.ids
    x = batch.images.repeat(1, objective.views, 1, 1)
    objective.begin_batch(batch, 1 / ranks.world, ranks)
    targets = objective.targets(guess, x, batch.labels)
    return objective.ascent_losses(guess, x, x, targets)[0].mean().item()


class RiseLimit:
    """Makes gamma as large as a limit of the loss's rise allows.

    At w the loss is L(w), at the perturbed weights L(w + v); a model that guesses has the loss G. Where L(w + v)
    reaches G, the descent begins at a model that knows nothing, and learning stops. So gamma is held where

        L(w + v) - L(w) <= limit * (G - L(w)),

    of the batch's mean losses, all of which a step computes anyway. After each step gamma is multiplied by the square
    root of (allowed rise / measured rise), at least by 1/2 and at most by 1.1. It begins at gamma / 1024, and stays
    there while nothing is learnt (L(w) >= G).

    Args:
        limit: part of the way to the loss of guessing, more than 0, at most 1.
        device: of the model.

    Attributes:
        factor: fp64 scalar on the device, 1/1024 to 1, that gamma is multiplied by in the next step.
    """

    def __init__(self, limit: float, device: torch.device) -> None:
        self.limit = limit
        self.factor = torch.full((), _FLOOR, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update_(self, rise: Tensor, room: Tensor) -> None:
        """Take a perturbed step in.

        Args:
            rise: L(w + v) - L(w), a scalar; not finite where v broke the model.
            room: G - L(w); not finite where the model was broken before, which says nothing of gamma.
        """
        rise, room = rise.double(), room.double()
        allowed = self.limit * room.clamp_min(0)
        # a rise of nothing allows the most, one that is not finite the least
        ratio = torch.where(rise > 0, allowed / rise, torch.inf)
        ratio = torch.where(rise.isfinite() & (allowed > 0), ratio, 0.0)
        moved = (self.factor * ratio.sqrt().clamp(_SHRINK, _GROW)).clamp(_FLOOR, 1.0)
        self.factor.copy_(torch.where(room.isfinite(), moved, self.factor))

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; written back in place."""
        return {"awp_factor": self.factor}

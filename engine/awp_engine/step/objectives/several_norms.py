"""Adversarial training against several balls: E-AT draws one for every batch, MSD attacks in all at once."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from awp_engine.attack import Attack
from awp_engine.distributed.batch import Batch
from awp_engine.distributed.ranks import Ranks
from awp_engine.models.answers import predicted
from awp_engine.step.objectives.adversarial_training import AdversarialTraining
from awp_engine.step.objectives.objective import counted_part
from awp_kernels.philox import mix_seed

# what a seed is for
_DRAW, _L1_STEPS = 6, 7


class ExtremeNorm(AdversarialTraining):
    """E-AT: cross-entropy on images that are attacked in one ball a batch, drawn by how often the network failed in it.

    A ball's weight is the part of the images attacked in it so far, over the whole run and all ranks, that any iterate
    of the attack had classified wrong; all weigh the same until each was drawn. The draw reads these counts on the
    host, which waits for the step before, and depends on seed, epoch and step else.

    Args:
        label_smoothing: part of a label that is spread over all classes, in [0, 1).
        balls: how many there are.
        run_seed: of the draws.
        device: of the logits.

    Attributes:
        answers: fp64 [2, balls], wrong ones and all.
        drawn: the number of this step's ball, from 0.

    Source: Croce, Hein: Adversarial Robustness against Multiple and Single l_p-Threat Models via Quick Fine-Tuning of
    Robust Classifiers, ICML 2022, and its public code, fra31/robust-finetuning.
    """

    drawn = 0

    def __init__(
        self,
        label_smoothing: float = 0.0,
        balls: int = 1,
        run_seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(label_smoothing)
        self.answers = torch.zeros((2, balls), dtype=torch.float64, device=device)
        self._run_seed, self._part = run_seed, 1.0
        self._watched: list[_Watched] = []

    def errors(self) -> list[float]:
        """The weight of every ball. Waits for the device."""
        wrong, seen = self.answers.tolist()
        if not all(seen) or not any(wrong):
            return [1.0] * len(seen)
        return [part / count for part, count in zip(wrong, seen, strict=True)]

    def begin_step(self, done: float, epoch: int, step: int) -> None:
        """Draw the ball, the same on all ranks."""
        weights = self.errors()
        left = mix_seed(self._run_seed, epoch, step, _DRAW) / 2**63 * sum(weights)
        self.drawn = 0
        while self.drawn < len(weights) - 1 and left >= weights[self.drawn]:
            left -= weights[self.drawn]
            self.drawn += 1
        self.stage = self.drawn

    def choose(self, attack: Attack) -> Attack:
        """The attack in the ball that was drawn."""
        return attack.balls[self.drawn]

    def begin_batch(self, batch: Batch, share: float, ranks: Ranks) -> None:
        """No image is attacked yet; of a batch that every rank computes whole, each counts for a part of it."""
        self._watched.clear()
        self._part = counted_part(batch, share)

    def attack_model(self, model: nn.Module, y: Tensor) -> nn.Module:
        """The model, whose answers to all iterates are looked at."""
        self._watched.append(_Watched(model, y if y.ndim == 1 else y.argmax(1)))
        return self._watched[-1]

    def after_step(self, ranks: Ranks) -> None:
        """Count this step's images, of all ranks."""
        seen = torch.cat([watched.wrong for watched in self._watched])
        counts = torch.stack([seen.sum(), torch.ones_like(seen).sum()]).double() * self._part
        self._watched.clear()
        ranks.sum_([counts])
        self.answers[:, self.drawn] += counts

    def state(self) -> dict[str, Tensor]:
        """The counts."""
        return {"norm_answers": self.answers}


class _Watched(nn.Module):
    """A model that remembers which images it has classified wrong in any call: bool [N]."""

    def __init__(self, model: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.model, self._labels = model, labels
        self.wrong = torch.zeros_like(labels, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, classes]."""
        logits = self.model(x)
        self.wrong = self.wrong | (predicted(logits.detach()) != self._labels)
        return logits


class MultiSteepestDescent(AdversarialTraining):
    """MSD: cross-entropy on images that are attacked in the union of all balls at once, see `awp_engine.attack.msd`.

    Args:
        label_smoothing: part of a label that is spread over all classes, in [0, 1).
        run_seed: of how many values a step in L1 changes.

    Source: Maini, Wong, Kolter: Adversarial Robustness Against the Union of Multiple Perturbation Models, ICML 2020.
    """

    def __init__(self, label_smoothing: float = 0.0, run_seed: int = 0) -> None:
        super().__init__(label_smoothing)
        self._run_seed, self._seed = run_seed, 0

    def begin_step(self, done: float, epoch: int, step: int) -> None:
        """Another seed for every step, the same on all ranks."""
        self._seed = mix_seed(self._run_seed, epoch, step, _L1_STEPS)

    def choose(self, attack: Attack) -> Attack:
        """The attack with the step's seed."""
        return replace(attack, seed=self._seed)

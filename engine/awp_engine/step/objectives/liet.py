"""LIET: single-step training whose attack begins at what the network makes of an empty image.

Source: the public code of FastAT Benchmark, fzjcdt/FastAT_Benchmark at b99c0de.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.attack import Attack, pgd
from awp_engine.attack.common import HALF_SCALE
from awp_engine.attack.losses import log_probabilities
from awp_engine.config import ConfigError
from awp_engine.config.schema import show
from awp_engine.distributed.batch import Batch
from awp_engine.distributed.ranks import Ranks
from awp_engine.step.objectives.objective import Objective, at_least_fp32
from awp_kernels import pgd_init_
from awp_kernels.philox import mix_seed, uniform_integers

# what random numbers are for, beside the noise of the attack's start
_STEP, _REPLACED, _LABELS, _TABLE = 1, 2, 3, 4
# the part of pixels that noise replaces, drawn once a batch
_LEAST, _MOST = 0.1, 0.5
# classes of the table that are computed at once
_CLASSES = 128


def jensen_shannon(logits: Tensor, others: Tensor) -> Tensor:
    """JS(p, q) = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 of every sample, [N]; gradients through both.

    Args:
        logits: of p, [N, classes].
        others: of q, likewise.
    """
    p, q = log_probabilities(logits), log_probabilities(others)
    middle = torch.logaddexp(p, q) - math.log(2)
    return 0.5 * (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(1)


class Liet(Objective):
    """CE(f(x'), y) + beta * epoch / epochs * JS(p(x0), p(x')), where x0 is where the attack on x began.

    x0 = clip(x +- epsilon * table[y]), one sign for a batch; a part of its entries, of a size drawn once a batch from
    U(0.1, 0.5), are those of the attack's own random start instead. The table holds, for every class, the sign of the
    gradient of its cross-entropy at an image of 0.5, taken in eval mode in every `every`-th step of an epoch.

    Args:
        beta: weight of the divergence in the last epoch (lambda there).
        num_classes: of the images.
        image_shape: of an image, (C, H, W).
        epochs: of the run.
        device: of the images.
        label_smoothing: part of a label that is spread over the wrong classes, by random numbers for each image.
        every: steps between two tables.

    Attributes:
        table: fp32 [classes, C, H, W], signs; zeros before the first step.

    Raises:
        ConfigError: `every` is no whole number >= 1.
    """

    compares_with_start = True

    def __init__(
        self,
        beta: float,
        num_classes: int,
        image_shape: tuple[int, int, int],
        epochs: int,
        device: torch.device,
        label_smoothing: float = 0.0,
        every: int = 20,
    ) -> None:
        if type(every) is not int or every < 1:
            raise ConfigError(f"--method-args: every: expected a whole number >= 1, got {show(every)}")
        self.beta, self.epochs, self.label_smoothing, self.every = beta, epochs, label_smoothing, every
        self.table = torch.zeros((num_classes, *image_shape), device=device)
        self._step = 0
        # read by captured steps
        self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self._labels_seed = torch.zeros((), dtype=torch.int64, device=device)

    def begin_step(self, done: float, epoch: int, step: int) -> None:
        """Write the weight of the divergence."""
        self._step = step
        self._weight.fill_(self.beta * epoch / self.epochs)

    def start(self, model: nn.Module, batch: Batch, first: Tensor, attack: Attack, seed: int, ranks: Ranks) -> Tensor:
        """x0 of a batch; `first` is its noise."""
        self._labels_seed.fill_(mix_seed(seed, _LABELS))
        if self._step % self.every == 0:
            self._look(model, attack.epsilon, mix_seed(seed, self._step, _TABLE))
            # processors of two kinds may differ in the sign of what is next to nothing
            ranks.broadcast_([self.table])
        x, bits = batch.images, mix_seed(seed, self._step, _STEP)
        sign, replaced = 1 - 2 * (bits & 1), _LEAST + (_MOST - _LEAST) * (bits >> 1) / 2**62
        # U(0, 1)
        drawn = torch.empty_like(first)
        pgd_init_(
            drawn,
            torch.full_like(first, 0.5),
            epsilon=0.5,
            norm="linf",
            sample_ids=batch.ids,
            seed=mix_seed(seed, _REPLACED),
        )
        moved = (x + sign * attack.epsilon * self.table[batch.labels].to(x.dtype)).clamp_(0, 1)
        return first.copy_(torch.where(drawn < replaced, first, moved))

    def _look(self, model: nn.Module, epsilon: float, seed: int) -> None:
        """Take the table anew; a gradient that is not finite leaves 0."""
        classes = torch.arange(len(self.table), device=self.table.device)
        for some in classes.split(_CLASSES):
            grey = torch.full_like(self.table[some], 0.5)
            moved = pgd(
                model,
                grey,
                self._smoothed(some, some, seed, grey.dtype),
                epsilon=epsilon,
                step_size=epsilon,
                steps=1,
                start="none",
                mode="eval",
                loss_scale=HALF_SCALE,
                nonfinite="ignore",
            )
            self.table[some] = (moved - grey).sign()

    def _smoothed(self, y: Tensor, ids: Tensor, seed: int | Tensor, dtype: torch.dtype) -> Tensor:
        """Probabilities [N, classes] of labels [N]: what is not the label's is spread by random numbers."""
        # odd numbers from 1 to 2^25: no sum is 0
        weights = (uniform_integers(ids, len(self.table), seed=seed) + 2**24).to(dtype)
        right = y.unsqueeze(1)
        weights.scatter_(1, right, 0)
        spread = weights * (self.label_smoothing / weights.sum(1, keepdim=True))
        return spread.scatter_(1, right, 1 - self.label_smoothing)

    def targets(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Smoothed labels, [N, classes], for y int64 [N]; drawn once a step."""
        assert self.ids is not None
        return self._smoothed(y, self.ids, self._labels_seed, at_least_fp32(x).dtype)

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """As above; x is where the attack began."""
        begun, logits = model(x), model(x_adv)
        hard = F.cross_entropy(at_least_fp32(logits), y, reduction="none")
        return hard + self._weight.to(hard.dtype) * jensen_shannon(begun, logits), logits

    def state(self) -> dict[str, Tensor]:
        """The table."""
        return {"class_table": self.table}

    def moved(self) -> list[Tensor]:
        """Nothing: the table is taken before a step."""
        return []

"""Accuracy, clean and under attack."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from awp_engine.attack import Attack, Loss, Norm
from awp_engine.config import Config
from awp_engine.data import Split, StreamedSplit, eval_batches
from awp_engine.distributed.ranks import Ranks
from awp_engine.models.answers import predicted
from awp_engine.models.batch_norm import layer_modes
from awp_engine.observe.regions import region
from awp_kernels.philox import mix_seed

# separates the evaluation's noise from the training's, which is derived from the same seed
_EVALUATION_NOISE = 2


class NonfiniteGradients:
    """Which images of an attack had a gradient that is not finite in any step: a step there goes nowhere.

    Attributes:
        found: bool [N].
    """

    def __init__(self, x: Tensor) -> None:
        self.found = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def __call__(self, _: int, gradient: Tensor) -> None:
        """What `pgd` takes as `observe`."""
        self.found |= ~gradient.isfinite().flatten(1).all(1)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Fractions in [0, 1] of the same samples; an image counts as robust if it is right both clean and attacked.

    Attributes:
        robust: under every attack, where there are several: the worst case over the union of their balls.
        robust_by_class: how many images of every label are robust, up to the last label that there is.
        robust_by_attack: of each attack alone.
    """

    clean: float
    robust: float
    robust_by_class: tuple[int, ...] = ()
    robust_by_attack: tuple[float, ...] = ()


def evaluation_seed(run_seed: int) -> int:
    """The seed of the starting points that a run with `run_seed` is measured from."""
    return mix_seed(run_seed, _EVALUATION_NOISE)


def evaluation_attacks(config: Config) -> tuple[Attack, ...]:
    """The attacks that a run is measured by, one for each of its balls; see `evaluation_attack`."""
    balls: list[tuple[Norm, float, float]] = [
        (config.attack.norm, config.attack.epsilon_value, config.evaluation_step_size),
        *((ball.norm, float(ball.epsilon), float(ball.epsilon / 4)) for ball in config.attack.further),
    ]
    return tuple(
        Attack(
            kind="apgd" if norm == "l1" else "pgd",
            epsilon=epsilon,
            step_size=step_size,
            steps=config.evaluation.steps,
            norm=norm,
            seed=evaluation_seed(config.seed),
        )
        for norm, epsilon, step_size in balls
    )


def evaluation_attack(config: Config) -> Attack:
    """That of the first ball: cross-entropy PGD from a random start (L1: Auto-PGD from noise), BN in eval mode."""
    return evaluation_attacks(config)[0]


_AnySplit = TypeVar("_AnySplit", bound=Split | StreamedSplit)


def evenly(values: Tensor, count: int) -> Tensor:
    """So many of the values along the first axis, at even distances; all of them where there are fewer."""
    some = min(count, len(values))
    return values[torch.arange(some, device=values.device) * len(values) // max(some, 1)]


def spread(split: _AnySplit, limit: int | None) -> _AnySplit:
    """`limit` samples at even distances, all of them for None: files are often sorted by class."""
    if limit is None or limit >= len(split):
        return split
    return split.select(evenly(torch.arange(len(split)), limit))


def count_right(model: nn.Module, split: Split | StreamedSplit, device: torch.device, batch_size: int) -> int:
    """How many samples a model in eval mode classifies as they are labelled; logits that are not finite are wrong."""
    right = 0
    with torch.no_grad():
        for x, y, *_ in eval_batches(split, batch_size):
            right += int((predicted(model(x.to(device))) == y.to(device)).sum())
    return right


def evaluate(
    model: nn.Module,
    split: Split | StreamedSplit,
    attack: Attack | Sequence[Attack],
    *,
    batch_size: int,
    loss: Loss | None = None,
    class_weights: Sequence[float] | None = None,
    ranks: Ranks | None = None,
    between: Callable[[], None] | None = None,
    progress: Callable[[float], object] | None = None,
) -> Accuracy:
    """Classify a split, clean and attacked; the modes of the model and its modules are put back afterwards.

    Logits that are not finite are wrong, and an image does not count as robust if a gradient of its attack is not
    finite, since it was not attacked then.

    Args:
        model: maps images in [0, 1] to logits, on the split's device.
        split: the samples.
        attack: how they are attacked; of several by each in turn.
        batch_size: images a batch; does not change the result beyond rounding.
        loss: what PGD climbs; None: cross-entropy.
        class_weights: what an image of every class counts for; all count the same if not given.
        ranks: that share the images among them; every image counts once, and all ranks return the same.
        between: called before every batch, as often on every rank.
        progress: told at every step of an attack which part of this rank's work is done, 0 to 1.

    Raises:
        ValueError: the split is empty.
    """
    if not len(split):
        raise ValueError("split: expected at least one sample, got none")
    ranks = ranks or Ranks()
    device = split.device
    rows = torch.arange(len(split))[ranks.rank :: ranks.world]
    own = split if ranks.world == 1 else split.select(rows)
    attacks = [attack] if isinstance(attack, Attack) else attack
    whole, done = len(own) * sum(one.steps for one in attacks), 0

    def watch(step: int, gradient: Tensor) -> None:
        nonlocal done
        nonfinite(step, gradient)
        done += len(gradient)
        if progress is not None:
            progress(done / whole)

    with layer_modes(model, "eval", update_statistics=True):
        total = torch.bincount(split.labels.cpu())
        # whole numbers: any number of ranks gets the same bits
        counts = torch.zeros(2 + len(attacks), len(total), dtype=torch.int64, device=device)
        with contextlib.closing(eval_batches(own, batch_size)) as batches:
            # the first rank has the most images
            for _ in range(-(-len(split) // ranks.world // batch_size) or 1):
                if between is not None:
                    between()
                for x, y, ids, _ in itertools.islice(batches, 1):
                    with region("evaluation"):
                        with torch.no_grad():
                            right = predicted(model(x)) == y
                        held = []
                        for one in attacks:
                            nonfinite = NonfiniteGradients(x)
                            x_adv = one(model, x, y, sample_ids=ids, observe=watch, loss=loss)
                            with torch.no_grad():
                                held.append(right & ~nonfinite.found & (predicted(model(x_adv)) == y))
                        robust = torch.stack(held).all(0)
                        counts.index_add_(1, y, torch.stack([right, robust, *held]).long())
        ranks.sum_([counts])
        weights = torch.ones(len(total)) if class_weights is None else torch.tensor(class_weights)[: len(total)]
        clean, robust, *each = ((counts.cpu() * weights.double()).sum(1) / (total * weights.double()).sum()).tolist()
        by_class = tuple(counts[1].tolist())
        return Accuracy(clean=clean, robust=robust, robust_by_class=by_class, robust_by_attack=tuple(each))

"""The interface that all methods share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.attack import Attack, Loss, summed_cross_entropy
from awp_engine.attack.losses import log_probabilities
from awp_engine.config import ConfigError
from awp_engine.config.schema import show
from awp_engine.distributed.batch import Batch
from awp_engine.distributed.ranks import Ranks
from awp_engine.models.batch_norm import batch_norm_mode
from awp_engine.step.precision import WorkingModels


class Objective(ABC):
    """A method: what the attack climbs, and what weights are trained by.

    Whatever else than `losses` is left out makes a method that keeps nothing and does not change in time. In a step
    these are called, in this order: `begin_step`, `choose`, `start`, `begin_batch`, `targets`, `attack_loss`,
    `attack_model`, `ascent_losses`, `losses`, `after_step`.

    Attributes:
        uses_average: whether it needs `average`.
        average: the run's average of the weights, in eval mode and without gradients, as the step before left it.
        compares_with_start: whether `losses` gets, for x, where the attack began.
        ids: int64 [N], of the images that `targets` is called with: what random numbers of an image are keyed by.
        uses_teacher: whether it needs `teacher`.
        teacher: a frozen classifier, in eval mode and without gradients of its weights, for each part of a step in the
            precision of that part.
        partner_name: which network is trained beside the classifier, as `--model.name` has built-in ones; "auto": one
            that fits the images; None: none.
        partner: that network, in train mode and in full precision. It takes the optimizer's steps like the classifier;
            no weight perturbation moves it.
        descending: whether `losses` is called for the descent, and not for the ascent or to compute statistics anew.
        views: of each image in a batch, side by side as channels. The model that attack and losses get then answers to
            each: see `EachView`.
        joint_views: whether it answers to all of them in one pass, by one set of batch normalisation: see `JointViews`.
        attack_note: how images are attacked over the run, where the schedule does not say it; the user is told, and
            accuracies under the attacks of different epochs are not compared.
        fresh_optimizer: whether the optimizer forgets its momentum before this step. Set by `begin_step`.
        skipped: bool scalar on the device, whether the step is left out; set before `after_step`.
        stage: what decides which operations a step consists of, where that changes in time; a CUDA graph is captured
            for each. Set by `begin_step`.
    """

    uses_average: ClassVar[bool] = False
    compares_with_start: ClassVar[bool] = False
    average: nn.Module | None = None
    ids: Tensor | None = None
    uses_teacher: ClassVar[bool] = False
    teacher: WorkingModels | None = None
    partner_name: str | None = None
    partner: nn.Module | None = None
    descending: bool = False
    views: int = 1
    joint_views: ClassVar[bool] = False
    attack_note: str | None = None
    fresh_optimizer: bool = False
    skipped: Tensor | None = None
    stage: Hashable = None

    def follow(self, models: WorkingModels) -> None:  # noqa: B027
        """Take what it needs of the classifier in training; called once, before the first step.

        Args:
            models: of the parts of a step; their masters' tensors stay the same ones.
        """

    def begin_step(self, done: float, epoch: int, step: int) -> None:  # noqa: B027
        """What the host says of the step to come.

        A captured step reads tensors again and numbers never: what changes in time is written into tensors, in place.

        Args:
            done: part of the run's steps that come before it, in [0, 1].
            epoch: counted from 1.
            step: of the epoch, from 0.
        """

    def start(self, model: nn.Module, batch: Batch, first: Tensor, attack: Attack, seed: int, ranks: Ranks) -> Tensor:
        """Where the attack on a batch begins; here where the attack itself does.

        Called on the host before every step, outside of graphs. The attack projects it in its first step.

        Args:
            model: the classifier, in no mode that could be relied on.
            batch: this rank's part.
            first: [N, C, H, W], the attack's own first iterate, such as random noise; may be written to.
            attack: that begins there.
            seed: of random numbers, the same in all steps of an epoch; an image is keyed by its id.
            ranks: that train together; they call this alike.

        Returns:
            [N, C, H, W], of any values that `model` takes.
        """
        return first

    def choose(self, attack: Attack) -> Attack:
        """How the images of this step are attacked, where the schedule says `attack`; here just so.

        On the host. Between one `begin_step` and the next the same is chosen every time. Where it differs from step to
        step, `stage` has to differ with it.
        """
        return attack

    def begin_batch(self, batch: Batch, share: float, ranks: Ranks) -> None:  # noqa: B027
        """What a loss needs to know of the whole batch, once a step: micro-batches are parts of it.

        On the device; sums over the ranks by `ranks.sum_`, on all of them alike.

        Args:
            batch: this rank's part; of a batch with fewer images than there are ranks, all of it.
            share: the part of the batch's mean that it stands for.
            ranks: that train together.
        """

    def targets(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What attack and losses get as labels in this step; here the labels themselves.

        Called once a step for each image, without gradients and in the attack's mode of batch normalisation. Accuracy
        and class weights go by the labels still.

        Args:
            model: the classifier.
            x: [N, C, H, W], clean images.
            y: int64 [N], or fp32 [N, classes] of a mixture.

        Returns:
            int64 [N], or probabilities [N, classes], at least fp32.
        """
        return y

    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Loss:
        """The loss that the attack on a batch climbs; here cross-entropy.

        Called once a step, without gradients and in the attack's mode of batch normalisation, so that whatever needs
        clean logits computes them once and not once an iteration.

        Args:
            model: the classifier.
            x: [N, C, H, W], clean images.
            y: as `targets` gave them.
        """
        return summed_cross_entropy

    def attack_model(self, model: nn.Module, y: Tensor) -> nn.Module:
        """What the attack on images of labels y calls and differentiates, whose outputs its loss gets; here the model.

        Its modules are in the attack's mode of batch normalisation.
        """
        return model

    @abstractmethod
    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised, after averaging over the batch.

        Args:
            model: the classifier, in train mode.
            x_adv: [N, C, H, W], attacked images.
            x: [N, C, H, W], clean images.
            y: as `targets` gave them.

        Returns:
            Losses [N], at least fp32, and the logits of x_adv, [N, classes].
        """

    def ascent_losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the weight perturbation climbs; here `losses`, as in the AWP paper. Arguments and result are as there.

        A shared ascent (`--awp.ascent shared`) climbs `attack_loss` instead.
        """
        return self.losses(model, x_adv, x, y)

    def ask_partner(self, x: Tensor) -> Tensor:
        """What the partner says of images, logits [N, classes].

        In the descent alone that has gradients, and moves the partner's running statistics.
        """
        assert self.partner is not None
        if self.descending:
            return self.partner(x)
        with torch.no_grad(), batch_norm_mode(self.partner, update_statistics=False):
            return self.partner(x)

    def after_step(self, ranks: Ranks) -> None:  # noqa: B027
        """Take in what the step has gathered, summed over the ranks (`ranks.sum_`); on all of them alike."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that are kept between steps, by name; equal on all ranks between two steps.

        The same tensors every time: they are part of checkpoints, and written back in place.
        """
        return {}

    def moved(self) -> list[Tensor]:
        """Those of `state` that a step moves after `start`: they are put back where it is left out or fails."""
        return [*self.state().values()]


def counted_part(batch: Batch, share: float) -> float:
    """What each image counts for in sums over the ranks: less than 1 where every rank computes a batch whole."""
    return share * batch.whole_size / len(batch.images)


def by_view(logits: Tensor, views: int) -> Tensor:
    """[N, views * classes] -> [N * views, classes], those of an image one after the other."""
    return logits.reshape(len(logits) * views, -1)


def at_least_fp32(logits: Tensor) -> Tensor:
    """16-bit logits in fp32: divergences and logarithms need its digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def divergence(logits_adv: Tensor, logits_clean: Tensor) -> Tensor:
    """KL(p_clean || p_adv) of every sample, [N]."""
    adv, clean = log_probabilities(logits_adv), log_probabilities(logits_clean)
    return F.kl_div(adv, clean, reduction="none", log_target=True).sum(1)


def require_number(
    name: str, value: Any, *, least: float = 0.0, most: float = math.inf, positive: bool = False
) -> float:
    """An argument of `--method-args`, refused by a `ConfigError` that is no finite number in [least, most], or > 0."""
    if type(value) in (int, float) and least <= value <= most and math.isfinite(value) and (value > 0 or not positive):
        return value
    bounds = f"{'>' if positive else '>='} {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
    raise ConfigError(f"--method-args: {name}: expected a number {bounds}, got {show(value)}")

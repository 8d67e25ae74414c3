"""Gradients of a rank's part of a batch: in pieces, each part of a step in its precision, added up over the ranks."""

import contextlib
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from awp_engine.attack import Attack, Loss
from awp_engine.attack.common import HALF_SCALE
from awp_engine.distributed.batch import Batch
from awp_engine.distributed.ranks import Ranks
from awp_engine.distributed.share import rank_share
from awp_engine.models import WrappedClassifier
from awp_engine.models.answers import predicted
from awp_engine.models.batch_norm import Statistics, batch_norm_mode, whole_statistics
from awp_engine.models.views import EachView, JointViews
from awp_engine.step.noise import Noise, Smoothed
from awp_engine.step.objectives import Objective
from awp_engine.step.precision import LossScale, WorkingModels
from awp_engine.step.rise import Guess
from awp_engine.step.values import Phase
from awp_kernels import conv3x3_forget
from awp_kernels._block import Block
from awp_kernels.philox import mix_seed


class RankShare(NamedTuple):
    """What a rank computes of a batch.

    Attributes:
        share: the part of the batch's mean that it stands for.
        pieces: what is computed at once, each with its own such part.
        undivided: every rank computes the whole batch, which has fewer images than there are ranks.
    """

    share: float
    pieces: list[tuple[slice, float]]
    undivided: bool


class Mean(NamedTuple):
    """What a pass over this rank's images has found; scalars on the device.

    Attributes:
        loss: the mean.
        correct: the part of right answers.
        below: how many losses lie below c_min.
        guess: the mean loss of guessing, where that was asked for, else 0.
    """

    loss: Tensor
    correct: Tensor
    below: Tensor
    guess: Tensor


def gradient_marks(gradient: Tensor, images: Tensor) -> Tensor:
    """How many entries of a gradient are zero, and how many not finite, over the number of values in `images`: [2]."""
    return torch.stack([(gradient == 0).sum(), (~gradient.isfinite()).sum()]).to(images.dtype) / images.numel()


def _reducer(model: nn.Module) -> DistributedDataParallel:
    """Averages gradients over the ranks; the running statistics are the step's own business."""
    with warnings.catch_warnings():
        # torch 2.13 has another name for what 2.11 knows as broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            # a module of others may have some that it does not use
            find_unused_parameters=isinstance(model, WrappedClassifier),
        )


class Passes:
    """Forward and backward passes of one model in training.

    The arguments are those of `AwpStep`, and `reduced`: the models whose gradients are averaged over the ranks.

    Attributes:
        trained: the classifier's models, and behind them those of the objective's partner, where it has one.
        loss_scale: of ascent and descent where one of them is in fp16, else None.
        noise: of the step that runs, on the images that the weights are trained by; or None.
    """

    def __init__(
        self,
        models: WorkingModels,
        objective: Objective,
        *,
        ranks: Ranks,
        reduced: Sequence[nn.Module] = (),
        class_weights: Tensor | None = None,
        sync_batch_norm: bool = False,
        compile: bool = False,
        micro_batch_size: int | None = None,
        largest_batch: int | None = None,
    ) -> None:
        self.models, self.objective, self.ranks = models, objective, ranks
        partner = objective.partner
        # what a step trains, each with running statistics
        self.trained = [models] if partner is None else [models, WorkingModels(partner)]
        self._class_weights = class_weights
        self.sync_batch_norm, self._micro_batch_size = sync_batch_norm, micro_batch_size
        half = torch.float16 in (models.precision.ascent, models.precision.descent)
        self.loss_scale = LossScale(next(models.model.parameters()).device) if half else None
        self._compile, self._compiled_size, self.largest_batch = compile, 0, largest_batch
        if largest_batch is not None:
            rows, _ = ranks.share(largest_batch)
            piece, _ = self.share(rows.stop - rows.start, largest_batch).pieces[0]
            self._compiled_size = piece.stop - piece.start
        self._compiled: dict[int, nn.Module] = {}
        several = ranks.world > 1 and not models.sharded
        self._reducers = {id(module): _reducer(self._seen(module)) for module in reduced} if several else {}
        self._warm = not self._reducers
        self.noise: Noise | None = None
        self.whole_statistics = False

    def _seen(self, model: nn.Module) -> nn.Module:
        """A model as the objective calls it."""
        if self.objective.views == 1:
            return model
        return JointViews(model) if self.objective.joint_views else EachView(model)

    def begin(self, x: Tensor) -> None:
        """Begin a step on images like `x`: without gradients of the one before.

        The first one makes the pass after which torch orders DDP's buckets anew, and with them the order of sums. Were
        it a step's own, a run that goes on would sum its first step in another order than one that never stopped. What
        its dropout draws is no part of the step either.
        """
        if not self._warm:
            for reducer in self._reducers.values():
                quiet = torch.random.fork_rng([x.device] if x.is_cuda else [])
                with quiet, batch_norm_mode(reducer.module, "eval", update_statistics=False):
                    reducer(x[:1]).sum().backward()
            self._warm = True
        self.clear_gradients()

    def prepare(self, phase: Phase) -> None:
        """Take what the host says of a step; what layers draw from torch's generator depends on step and rank alone."""
        self.objective.begin_step(phase.done, phase.epoch, phase.step)
        self.noise, self.whole_statistics = phase.noise, phase.whole_statistics
        if phase.layer_seed is not None:
            torch.manual_seed(mix_seed(phase.layer_seed, self.ranks.rank))

    def first(self, attack: Attack, batch: Batch, seed: int) -> Tensor:
        """Where the attack on a batch begins, [N, C, H, W]; drawn on the host."""
        first = attack.first(batch.images, sample_ids=batch.ids, seed=seed)
        # shards are gathered for nothing
        if type(self.objective).start is Objective.start:
            return first
        with self.models.held():
            return self.objective.start(self.models.attack, batch, first, attack, seed, self.ranks)

    def compared(self, batch: Batch, start: Tensor) -> Batch:
        """A batch with the images that the losses compare attacked ones with."""
        return batch._replace(images=start) if self.objective.compares_with_start else batch

    @property
    def copies(self) -> int:
        """How often an image is trained on in a step."""
        return 1 if self.noise is None else self.noise.copies

    def noisy(self, x_adv: Tensor, ids: Tensor, number: int) -> Tensor:
        """What the weights are trained by: attacked images, or copy `number` of them under the step's noise."""
        return x_adv if self.noise is None else self.noise.added(x_adv, ids, number)

    def clear_gradients(self) -> None:
        """Drop the gradients of all models."""
        for models in self.trained:
            for module in (models.model, models.ascent, models.descent):
                module.zero_grad(set_to_none=True)

    def share(self, count: int, whole_size: int) -> RankShare:
        """This rank's `count` images of a batch of `whole_size`, in as many pieces on every rank."""
        world = self.ranks.world
        _, share = self.ranks.share(whole_size)
        undivided = whole_size < world
        largest, smallest = (count, count) if undivided else (-(-whole_size // world), whole_size // world)
        number = min(-(-largest // (self._micro_batch_size or largest)), smallest)
        pieces = [(rows, part * share) for rows, part in (rank_share(count, i, number) for i in range(number))]
        return RankShare(share, pieces, undivided)

    def rollback(self, statistics: Statistics, undo: Callable[[], object] | None = None) -> Block:
        """A block that leaves statistics, and what `undo` puts back, as they were if it fails or is interrupted."""

        def put_back() -> None:
            # neither does anything after a step that was made to its end
            try:
                if undo is not None:
                    undo()
            finally:
                statistics.restore_()

        def steps() -> Generator[None]:
            try:
                yield
            except GeneratorExit:
                put_back()
            finally:
                # again, as an interrupt may have come between the lines above
                put_back()

        return Block(steps)

    @torch.no_grad()
    def aimed(self, attack: Attack, batch: Batch) -> Batch:
        """A batch, or a piece of one, with the objective's targets for labels."""
        if type(self.objective).targets is Objective.targets:
            return batch
        model, self.objective.ids = self.models.attack, batch.ids
        with batch_norm_mode(model, attack.bn_mode, update_statistics=False, synchronized=False):
            return batch._replace(labels=self.objective.targets(model, batch.images, batch.labels))

    def attack_whole(
        self, attack: Attack, model: nn.Module, batch: Batch, start: Tensor | None = None, **given: Any
    ) -> Tensor:
        """The attacked images of a batch: climbs the objective's loss on `model`; `given` are arguments of `attack`."""
        model = self._seen(model)
        if self.noise is not None:
            model = Smoothed(model, self.noise, batch.ids)
        # the step ignores it
        scale = HALF_SCALE if self.models.precision.attack == torch.float16 else 1.0
        loss: Loss | None = None
        if attack.kind == "apgd" and type(self.objective).attack_loss is not Objective.attack_loss:
            name = type(self.objective).__name__
            raise ValueError(f"attack: apgd climbs cross-entropy, {name} another loss; expected kind pgd")
        if attack.kind == "pgd" and attack.epsilon > 0:
            modes = batch_norm_mode(model, attack.bn_mode, update_statistics=False, synchronized=False)
            with torch.no_grad(), modes:
                loss = self.objective.attack_loss(model, batch.images, batch.labels)
        climbed = self.objective.attack_model(model, batch.labels)
        return attack(
            climbed, batch.images, batch.labels, sample_ids=batch.ids, start=start, loss=loss, loss_scale=scale, **given
        )

    def attack(
        self, attack: Attack, batch: Batch, share: RankShare, start: Tensor, shared: Sequence[nn.Parameter] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The attacked images, the step's targets, and the parts of the last gradient that `gradient_marks` tells.

        Args:
            attack: how.
            batch: this rank's part.
            share: its pieces.
            start: where the attack begins.
            shared: parameters whose gradients in the last pass are added up in their `.grad`.
        """
        x = batch.images
        marks = x.new_zeros(2)

        def look(step: int, gradient: Tensor) -> None:
            nonlocal marks
            marks = marks + gradient_marks(gradient, x)

        attacked, targets = [], []
        with self.models.held():
            for rows, _ in share.pieces:
                before = [parameter.grad for parameter in shared]
                piece = self.aimed(attack, batch.part(rows))
                targets.append(piece.labels)
                model = self._runner(self.models.attack, piece.images)
                given = {"shared": shared, "observe": look, "observe_from": attack.steps - 1}
                attacked.append(self.attack_whole(attack, model, piece, start[rows], **given))
                for parameter, gradient in zip(shared, before, strict=True):
                    if gradient is not None and parameter.grad is not None:
                        parameter.grad += gradient
        # what was kept for the attack's passes is twice as large as all that the rest of the step adds
        conv3x3_forget()
        x_adv, y = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (attacked, targets))
        return x_adv, y, marks

    def _runner(self, model: nn.Module, x: Tensor) -> nn.Module:
        """`model` as it is called: compiled, for full batches."""
        # the first step may have another momentum, which would be compiled for
        if not self._compile or self.whole_statistics:
            return model
        self._compiled_size = self._compiled_size or len(x)
        if len(x) != self._compiled_size:
            return model
        if id(model) not in self._compiled:
            # sizes stay fixed: a general kernel is slower, and compiling once more takes minutes
            self._compiled[id(model)] = torch.compile(model, dynamic=False)  # pyright: ignore[reportArgumentType]
        return self._compiled[id(model)]

    def backward(
        self,
        model: nn.Module,
        x_adv: Tensor,
        batch: Batch,
        share: RankShare,
        *,
        averaged: bool,
        update_statistics: bool,
        c_min: float | None = None,
        followed: Tensor | None = None,
        targets: Tensor | None = None,
        guess: bool = False,
    ) -> Mean:
        """Gradients of the mean loss in the parameters of `model`, over all ranks if `averaged`, times `followed`.

        The loss compares with `targets`, by default the labels; with noise it is the mean over all noisy copies.
        `guess`: whether that of guessing is wanted, too.
        """
        x, y, objective = batch.images, batch.labels, self.objective
        targets = y if targets is None else targets
        # the descent alone moves them
        compute = objective.losses if update_statistics else objective.ascent_losses
        reducer = self._reducers.get(id(model)) if averaged else None
        loss, correct, below, guessed = (x.new_zeros(()) for _ in range(4))
        copies = range(self.copies)
        parts = [(rows, number, part / len(copies)) for rows, part in share.pieces for number in copies]
        for index, (rows, number, part) in enumerate(parts):
            called = self._runner(reducer or self._seen(model), x[rows])
            last = index == len(parts) - 1
            if self.models.sharded:
                model.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
            with (
                batch_norm_mode(model, update_statistics=update_statistics, synchronized=not share.undivided),
                self._partner_alone(share.undivided),
                contextlib.nullcontext() if last or reducer is None else reducer.no_sync(),
            ):
                noisy = self.noisy(x_adv[rows], batch.ids[rows], number)
                objective.descending = update_statistics
                losses, logits = compute(called, noisy, x[rows], targets[rows])
                objective.descending = False
                if c_min is not None:
                    counted = losses.detach() < c_min
                    below += counted.sum()
                    losses = losses * counted
                weights = None if self._class_weights is None else self._class_weights[y[rows]]
                mean = (losses if weights is None else losses * weights).mean()
                # the reducer takes the mean over the ranks of what is to be added up
                scale = part * self.ranks.world
                lifted = mean if scale == 1 else mean * scale
                lifted = lifted if followed is None else lifted * followed
                with self._statistics_held() if update_statistics else contextlib.nullcontext():
                    (lifted if self.loss_scale is None else lifted * self.loss_scale.value).backward()
            labels = y[rows] if y.ndim == 1 else y[rows].argmax(1)
            loss = loss + mean.detach() * part
            correct = correct + (predicted(logits.detach()) == labels).to(x.dtype).mean() * part
            if guess:
                with torch.no_grad():
                    guess_of = Guess(logits.shape[1], x.shape[1] // objective.views)
                    losses, _ = compute(guess_of, noisy, x[rows], targets[rows])
                guessed = guessed + (losses if weights is None else losses * weights).mean() * part
        return Mean(loss, correct, below, guessed)

    def _partner_alone(self, undivided: bool) -> contextlib.AbstractContextManager[object]:
        """A block in which the partner synchronises its batch normalisation as the model does."""
        partner = self.objective.partner
        if partner is None or not undivided:
            return contextlib.nullcontext()
        return batch_norm_mode(partner, update_statistics=True, synchronized=False)

    @contextlib.contextmanager
    def _statistics_held(self) -> Iterator[None]:
        """A block of a backward pass: what it computes anew of a checkpointed model moves no statistics again."""
        if not getattr(self.models.model, "checkpointed", False):
            yield
            return
        self.models.settle_()
        moved = Statistics(self.models.statistics)
        yield
        self.models.settle_()
        moved.restore_()

    def descend(
        self,
        x_adv: Tensor,
        batch: Batch,
        share: RankShare,
        followed: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the training loss; returns it and the part of right answers. Moves the BN statistics."""
        model = self.models.descent
        with whole_statistics(model) if self.whole_statistics else contextlib.nullcontext():
            done = self.backward(
                model,
                x_adv,
                batch,
                share,
                averaged=True,
                update_statistics=True,
                followed=followed,
                targets=targets,
            )
        self.models.settle_()
        if self.objective.partner is not None:
            # no reducer has seen them
            self.ranks.mean_([p.grad for p in self.objective.partner.parameters() if p.grad is not None])
        return done.loss, done.correct

    @torch.no_grad()
    def average_statistics(self, share: float) -> None:
        """Running statistics of all ranks' images; without it the ranks would come to differ.

        Other buffers become those of the first rank, as `DistributedDataParallel` has them.
        """
        if self.ranks.world == 1:
            return
        self.ranks.broadcast_(self.models.other_buffers)
        if self.sync_batch_norm:
            return
        flats = [flat for models in self.trained for flat in models.batch_statistics]
        statistics = [flat for flat in flats if flat.is_floating_point()]
        for flat in statistics:
            flat.mul_(share)
        self.ranks.sum_(statistics)

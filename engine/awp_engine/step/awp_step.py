"""One training step with the double perturbation: of the images, then of the weights.

Source: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from awp_engine.distributed.batch import Batch
from awp_engine.distributed.ranks import Ranks
from awp_engine.models.batch_norm import Statistics
from awp_engine.observe.regions import region
from awp_engine.optim.average import WeightAverage
from awp_engine.optim.optimizer import Optimizer
from awp_engine.step.objectives import Objective
from awp_engine.step.passes import Mean, Passes, RankShare
from awp_engine.step.precision import WorkingModels
from awp_engine.step.rise import RiseLimit
from awp_engine.step.update import Update
from awp_engine.step.values import Phase, StepResult
from awp_kernels import AdversarialWeightPerturbation


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """How the direction of the weight perturbation is found.

    Attributes:
        kind: "exact", the gradient of the training loss at the attacked images; "shared", that of the attack's last
            pass.
        steps: passes whose gradients are added up, each at the weights that the ones before it moved to.
        c_min: only samples whose loss is below it count, or None.
        sync: "global", by the gradient of the whole batch; "local", every rank by that of its share.
    """

    kind: Literal["exact", "shared"] = "exact"
    steps: int = 1
    c_min: float | None = None
    sync: Literal["global", "local"] = "global"


class Climb(NamedTuple):
    """What an ascent has found.

    Attributes:
        followed: 1, or NaN where a direction was not finite on this rank; on the device.
        at_w: of the first pass, where it is the whole training loss.
    """

    followed: Tensor
    at_w: Mean | None


def climbs_another_loss(objective: Objective) -> bool:
    """Whether the ascent's loss is not the one that is minimised."""
    return type(objective).ascent_losses is not Objective.ascent_losses


class AwpStep:
    """Attack, ascent, descent, update: Algorithm 1 of the paper.

    Args:
        models: what the parts run on; `WorkingModels(model)` runs all of them on `model`, which is in train mode.
        optimizer: over the parameters of the model and of the objective's partner, as `build_optimizer` makes it.
        objective: what is climbed and minimised.
        awp: the weight perturbation, or None; with `working=models.working`.
        ascent: how its direction is found.
        clip_norm: largest norm of the descent gradient, or None.
        average: of the weights, that every step is taken into; or None.
        class_weights: fp32 [classes] on the model's device, which every image's loss is multiplied by; or None. Labels
            are then int64 [N], not mixtures.
        ranks: that train together, on equal models; gradients are averaged over them, the attack is each one's own.
        sync_batch_norm: whether the model's batch normalisation is synchronised over the ranks.
        compile: by torch.compile; batches of another size run uncompiled.
        micro_batch_size: most images that are computed at once, or None.
        largest_batch: images of a full batch, over all ranks, which alone is compiled; None: that is the first.
        rise_limit: makes the gamma of `awp` smaller where it would take the loss too far; or None.

    Raises:
        ValueError: a limit where the loss at w is not known: see `measures_rise`.
    """

    def __init__(
        self,
        *,
        models: WorkingModels,
        optimizer: Optimizer,
        objective: Objective,
        awp: AdversarialWeightPerturbation | None = None,
        ascent: Ascent | None = None,
        clip_norm: float | None = None,
        average: WeightAverage | None = None,
        class_weights: Tensor | None = None,
        ranks: Ranks | None = None,
        sync_batch_norm: bool = False,
        compile: bool = False,
        micro_batch_size: int | None = None,
        largest_batch: int | None = None,
        rise_limit: RiseLimit | None = None,
    ) -> None:
        ranks = ranks or Ranks()
        objective.follow(models)
        self.models, self.awp, self.ascent = models, awp, ascent or Ascent()
        self._shared = awp is not None and self.ascent.kind == "shared"
        # whether the loss at w is that of the training loss on the whole batch
        known = self.ascent.kind == "exact" and self.ascent.c_min is None and not climbs_another_loss(objective)
        # losses of others may do more with a model than call it; another network would be called once more
        asks = objective.uses_average or objective.uses_teacher or objective.partner is not None
        plain = type(objective).__module__.startswith("awp_engine.") and not asks
        self.measures_rise = known and (plain or rise_limit is not None)
        self.rise_limit = rise_limit
        if rise_limit is not None:
            if awp is None or not known:
                raise ValueError(
                    "rise_limit: expected None without a perturbation, with ascent 'shared' or c_min, and with a "
                    "method whose ascent climbs another loss, where the loss at w is not known"
                )
            awp.factor = rise_limit.factor
        self._reduced_ascent = awp is not None and self.ascent.sync == "global" and ranks.world > 1
        reduced = [models.descent]
        if self._reduced_ascent and not self._shared and models.ascent is not models.descent:
            reduced.append(models.ascent)
        self.passes = Passes(
            models,
            objective,
            ranks=ranks,
            reduced=reduced,
            class_weights=class_weights,
            sync_batch_norm=sync_batch_norm,
            compile=compile,
            micro_batch_size=micro_batch_size,
            largest_batch=largest_batch,
        )
        self.update = Update(
            optimizer, models, awp=awp, loss_scale=self.passes.loss_scale, clip_norm=clip_norm, average=average
        )

    @property
    def capturable(self) -> bool:
        """Whether a step is the same sequence of launches every time, so that a CUDA graph can hold it."""
        # with c_min the number of samples below it decides how many passes are made
        return self.ascent.c_min is None

    def prepare(self, batch: Batch, phase: Phase) -> Tensor:
        """All of a step that the host decides; returns where the attack begins, [N, C, H, W]."""
        self.update.prepare(phase)
        self.passes.prepare(phase)
        if self.passes.objective.fresh_optimizer:
            self.update.forget_()
        return self.passes.first(self.passes.objective.choose(phase.attack), batch, phase.seed)

    def __call__(self, batch: Batch, phase: Phase, start: Tensor | None = None) -> StepResult:
        """Train on one batch, or on this rank's part of it; `start` is of `prepare`, where that was called before."""
        start = self.prepare(batch, phase) if start is None else start
        passes, awp = self.passes, self.awp if phase.perturb else None
        # the ascent's gradient may be that of the attack's last pass
        names = [] if awp is None or not self._shared else awp.parameters
        passes.begin(batch.images)
        share = passes.share(len(batch.images), batch.whole_size)
        statistics = self.kept()
        with passes.rollback(statistics, self.awp.restore_ if self.awp is not None else None):
            passes.objective.begin_batch(batch, share.share, passes.ranks)
            with region("attack"):
                shared = [self.models.attack.get_parameter(name) for name in names]
                attack = passes.objective.choose(phase.attack)
                x_adv, targets, marks = passes.attack(attack, batch, share, start, shared)
            batch = passes.compared(batch, start)
            climb = None
            if awp is not None:
                with region("ascent"):
                    climb = self._climb(awp, x_adv, batch, share, phase, targets)
            with region("descent"):
                followed = None if climb is None else climb.followed
                loss, correct = passes.descend(x_adv, batch, share, followed, targets)  # at w + v
            if awp is not None and awp.working is None:
                # a working copy is written anew by the update
                awp.restore_()
            with region("update"):
                skipped = self.update()  # at w
            self.finish(statistics, share, skipped)
            rise, room = self._rise(loss, climb)
        zeros, nonfinite = marks * share.share
        return StepResult(loss, correct, skipped, zeros, nonfinite, rise, room)

    def _rise(self, loss: Tensor, climb: Climb | None) -> Tensor:
        """How far the loss rose, and how far it could have before it was that of guessing; of this rank's images."""
        if climb is None or climb.at_w is None:
            return loss.new_zeros(2)
        at_w = climb.at_w
        # NaN where no direction was followed, which says nothing of gamma
        told = torch.stack([loss - at_w.loss, at_w.guess - at_w.loss]) * climb.followed
        if self.rise_limit is not None:
            whole = told.clone()
            self.passes.ranks.sum_([whole])
            self.rise_limit.update_(*whole)
        return told

    def limited(self) -> dict[str, float]:
        """What the limit has made of gamma, as a metric; nothing without one. Waits for the device."""
        limit, awp = self.rise_limit, self.awp
        return {} if limit is None or awp is None else {"awp_gamma": awp.gamma * limit.factor.item()}

    def kept(self) -> Statistics:
        """Copies of all that a step moves beside weights."""
        average = [] if self.update.average is None else self.update.average.statistics
        own = [tensor for models in self.passes.trained for tensor in models.statistics]
        return Statistics([*own, *self.passes.objective.moved(), *average])

    def finish(self, statistics: Statistics, share: RankShare, skipped: Tensor) -> None:
        """Take in what the passes of all ranks left beside weights; or put it back, where the step is left out."""
        self.passes.average_statistics(share.share)
        if self.update.average is not None:
            self.update.average.take_statistics_(self.models.statistics)
        self.passes.objective.skipped = skipped
        self.passes.objective.after_step(self.passes.ranks)
        first = [buffer.clone() for buffer in self.models.batch_statistics] if self.passes.whole_statistics else []
        statistics.restore_where(skipped)
        # a first step that is left out has seen its batch all the same, and no later one takes statistics whole
        for buffer, seen in zip(self.models.batch_statistics, first, strict=bool(first)):
            buffer.copy_(torch.where(seen.isfinite().all(), seen, buffer))

    def _climb(
        self,
        awp: AdversarialWeightPerturbation,
        x_adv: Tensor,
        batch: Batch,
        share: RankShare,
        phase: Phase,
        targets: Tensor,
    ) -> Climb:
        first: Mean | None = None
        sums: dict[str, Tensor] = {}
        ascent, model, ranks = self.ascent, self.models.ascent, self.passes.ranks
        several = ascent.steps > 1
        for step in range(ascent.steps):
            if not self._shared or phase.attack.epsilon == 0:
                averaged = self._reduced_ascent
                found = self.passes.backward(
                    model,
                    x_adv,
                    batch,
                    share,
                    averaged=averaged,
                    update_statistics=False,
                    c_min=ascent.c_min,
                    targets=targets,
                    guess=self.measures_rise and step == 0,
                )
                first = first or found
                if ascent.c_min is not None and step:
                    # synchronised statistics need as many passes on every rank
                    if averaged or self.passes.sync_batch_norm:
                        ranks.sum_([found.below])
                    if found.below == 0:
                        break
            for name in awp.parameters:
                gradient = model.get_parameter(name).grad
                if gradient is not None:
                    # a new tensor where more is to come: the next pass writes into the memory of this one's
                    sums[name] = sums[name] + gradient if name in sums else gradient.clone() if several else gradient
            if self._shared and self._reduced_ascent:
                ranks.sum_(sums.values())
            # every pass is taken where the ones before it moved to, and all are added up at w, as RWP does
            awp.restore_()
            awp.perturb_(gradients=sums)
            self.passes.clear_gradients()
        # of the last pass: what was not finite in one before it is in the sum still
        assert awp.found_inf is not None
        followed = torch.ones_like(awp.found_inf).masked_fill_(awp.found_inf > 0, torch.nan)
        return Climb(followed, first if self.measures_rise else None)

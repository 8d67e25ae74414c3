"""One training step with the double perturbation: of the images, then of the weights.

Source: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020.
"""

import contextlib
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from awp_engine.attack import apgd, fast_attack, pgd, starting_point
from awp_engine.config import AttackConfig, AwpConfig, DistributedConfig
from awp_engine.distributed.ranks import Ranks
from awp_engine.distributed.share import rank_share
from awp_engine.models.answers import predicted
from awp_engine.models.batch_norm import Statistics, batch_norm_mode
from awp_engine.observe.regions import region
from awp_engine.optim.optimizer import Optimizer
from awp_engine.step.objectives import Objective
from awp_engine.step.precision import Copies, LossScale
from awp_kernels import AdversarialWeightPerturbation, conv3x3_forget, total_norm
from awp_kernels._block import Block

# lifts the attack's 16-bit gradients out of underflow; the step ignores the scale
_ATTACK_LOSS_SCALE = 1024.0


class Work(NamedTuple):
    """What a rank computes of a batch.

    Attributes:
        share: the part of the batch's mean that it stands for.
        pieces: what is computed at once, each with its own such part.
        undivided: every rank computes the whole batch, which has fewer images than there are ranks.
    """

    share: float
    pieces: list[tuple[slice, float]]
    undivided: bool


@dataclass(frozen=True)
class StepResult:
    """What a step is logged by; all stay on the device.

    Of several ranks each has its part of all but `skipped`: their sums are those of the batch.

    Attributes:
        loss: scalar, averaged over the batch, at the perturbed weights where there are such; not finite at times where
            the step was skipped.
        correct: scalar, part of the attacked images that were classified right in the same forward pass.
        skipped: bool scalar, the same on all ranks: a gradient was not finite, and weights, momentum and statistics
            were left as they were.
        zero_gradients: scalar, the part of exactly zero entries in the attack's last gradient; a mask's mark.
        nonfinite_gradients: scalar, the part of entries there that are not finite; an overflow's mark.
    """

    loss: Tensor
    correct: Tensor
    skipped: Tensor
    zero_gradients: Tensor
    nonfinite_gradients: Tensor


def _marks(gradient: Tensor, images: Tensor) -> Tensor:
    """How many entries of a gradient are zero, and how many not finite, over the number of values in `images`: [2]."""
    return torch.stack([(gradient == 0).sum(), (~gradient.isfinite()).sum()]).to(images.dtype) / images.numel()


def _reducer(model: nn.Module) -> DistributedDataParallel:
    """Averages gradients over the ranks; the running statistics are the step's own business."""
    with warnings.catch_warnings():
        # torch 2.13 has another name for what 2.11 knows as broadcast_buffers
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


class TrainingStep:
    """Attack, ascent, descent, update.

    Args:
        model: in train mode; its parameters are the masters.
        optimizer: over the model's parameters, as `build_optimizer` makes it.
        objective: what is climbed and minimised.
        attack: how the images are attacked.
        awp: the weight perturbation, or None; with `working=copies.working`.
        options: how its ascent is done.
        clip_norm: largest norm of the descent gradient, or None.
        copies: the models that the parts run on; by default all on `model` itself.
        compile: by torch.compile; batches of another size than the first one's run uncompiled.
        ranks: that train together, on equal models; gradients are averaged over them, the attack is each one's own.
        distributed: how they do.
        micro_batch_size: most images that are computed at once, or None.

    Attributes:
        loss_scale: of ascent and descent where one of them is in fp16, else None.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        objective: Objective,
        attack: AttackConfig,
        awp: AdversarialWeightPerturbation | None,
        options: AwpConfig | None = None,
        clip_norm: float | None = None,
        copies: Copies | None = None,
        compile: bool = False,
        ranks: Ranks | None = None,
        distributed: DistributedConfig | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.attack, self.awp, self.options = attack, awp, options or AwpConfig()
        if attack.kind == "apgd" and type(objective).attack_loss is not Objective.attack_loss:
            raise ValueError(
                f"attack: apgd climbs cross-entropy, {type(objective).__name__} another loss; expected kind pgd"
            )
        self.clip_norm = clip_norm
        shared = awp is not None and self.options.ascent == "shared"
        self.copies = copies or Copies(model, shared_ascent=shared)
        device = next(model.parameters()).device
        precision = self.copies.precision
        half = torch.float16 in (precision.ascent, precision.descent)
        self.loss_scale = LossScale(device) if half else None
        self._statistics = self.copies.statistics
        self._compiled: dict[int, nn.Module] = {}
        self._compile, self._compiled_size = compile, 0
        self.ranks, self._distributed = ranks or Ranks(), distributed or DistributedConfig()
        self._micro_batch_size = micro_batch_size
        self._shared = shared
        self._reducers: dict[int, DistributedDataParallel] = {}
        if self.ranks.world > 1 and not self.copies.sharded:
            reduced = [self.copies.descent]
            if self._global_ascent and not shared and self.copies.ascent is not self.copies.descent:
                reduced.append(self.copies.ascent)
            self._reducers = {id(module): _reducer(module) for module in reduced}
        self._settled = not self._reducers

    @property
    def _global_ascent(self) -> bool:
        return self.awp is not None and self._distributed.ascent_sync == "global" and self.ranks.world > 1

    def _begin(self, x: Tensor) -> None:
        if not self._settled:
            self._settle(x)
        self.clear_gradients()

    def _settle(self, x: Tensor) -> None:
        """Make the pass after which torch orders its buckets anew, and with them the order of sums.

        Were it a step's own, a run that goes on would sum its first step in another order than one that never stopped.
        """
        for reducer in self._reducers.values():
            with batch_norm_mode(reducer.module, "eval", update_statistics=False):
                reducer(x[:1]).sum().backward()
        self._settled = True

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        sample_ids: Tensor,
        seed: int,
        perturb: bool = True,
        fast: bool = False,
        of: int | None = None,
    ) -> StepResult:
        """Train on one batch, or on this rank's part of it.

        Args:
            x: [N, C, H, W], in [0, 1].
            y: int64 [N], or fp32 [N, classes] of a mixture.
            sample_ids: int64 [N], what the attack's noise is keyed by.
            seed: of this step's noise.
            perturb: whether the weights are perturbed in this step.
            fast: attack by the cheap attack of the settings.
            of: images in the whole batch, of which these are `ranks.share(of)`; None: there is one rank.
        """
        start = self.start(x, sample_ids, seed, fast=fast)
        return self.from_start(x, y, start, perturb=perturb, fast=fast, of=of)

    def start(self, x: Tensor, sample_ids: Tensor, seed: int, *, fast: bool = False) -> Tensor:
        """Where the attack on a batch begins, [N, C, H, W]: all of a step that depends on the seed."""
        arguments = self._attack_arguments(fast=fast)
        return starting_point(
            x.detach(),
            arguments["start"],
            epsilon=arguments.get("start_epsilon", arguments["epsilon"]),
            norm=arguments["norm"],
            sample_ids=sample_ids,
            seed=seed,
        )

    def from_start(
        self, x: Tensor, y: Tensor, start: Tensor, *, perturb: bool = True, fast: bool = False, of: int | None = None
    ) -> StepResult:
        """Train on one batch, the attack beginning at `start`: see `__call__`."""
        self._begin(x)
        awp = self.awp if perturb else None
        work = self._work(len(x), of)
        statistics = Statistics(self._statistics)
        with self._or_put_back(awp, statistics):
            with region("attack"):
                self.copies.prepare_attack_()
                with self.copies.held():
                    x_adv, marks = self._attacked(x, y, start, work, fast, share_ascent=awp is not None)
            followed = None
            if awp is not None:
                with region("ascent"):
                    followed = self._ascend(awp, x_adv, x, y, work)
            with region("descent"):
                loss, correct = self._descend(x_adv, x, y, work, followed)  # at w + v
            with region("update"):
                skipped = self._update(awp)  # at w
            if self.options.public_code:
                self._forward_for_statistics(x)
            self._average_statistics(work.share)
            statistics.restore_where(skipped)
        return StepResult(loss, correct, skipped, *(marks * work.share))

    def free(self, x: Tensor, y: Tensor, delta: Tensor, *, of: int | None = None) -> StepResult:
        """Train on one batch by one pass that serves image and weights, and move `delta`, [N, C, H, W], in place.

        Source: Shafahi et al.: Adversarial Training for Free!, NeurIPS 2019.
        """
        self._begin(x)
        epsilon, work = self.attack.epsilon_value, self._work(len(x), of)
        statistics = Statistics(self._statistics)
        with self._or_put_back(None, statistics):
            x_adv = (x + delta).clamp_(0, 1).requires_grad_()
            loss, correct = self._descend(x_adv, x, y, work, None)
            assert x_adv.grad is not None
            delta.add_(x_adv.grad.sign(), alpha=epsilon).clamp_(-epsilon, epsilon)
            skipped = self._update(None)
            self._average_statistics(work.share)
            statistics.restore_where(skipped)
        return StepResult(loss, correct, skipped, *(_marks(x_adv.grad, x) * work.share))

    def _or_put_back(self, awp: AdversarialWeightPerturbation | None, statistics: Statistics) -> Block:
        """A block that leaves weights and statistics as they were if it fails or is interrupted."""

        def put_back() -> None:
            # neither does anything after a step that was made to its end
            try:
                if awp is not None:
                    awp.restore_()
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

    def _work(self, count: int, of: int | None) -> Work:
        """This rank's part of a batch of `of` images, in as many pieces on every rank."""
        world, of = self.ranks.world, count if of is None else of
        _, share = self.ranks.share(of)
        undivided = of < world
        largest, smallest = (count, count) if undivided else (-(-of // world), of // world)
        number = min(-(-largest // (self._micro_batch_size or largest)), smallest)
        pieces = [(rows, part * share) for rows, part in (rank_share(count, i, number) for i in range(number))]
        return Work(share, pieces, undivided)

    def attacked(self, model: nn.Module, x: Tensor, y: Tensor, sample_ids: Tensor, seed: int, **changes: Any) -> Tensor:
        """The images that training attacks `model` with; `changes` are arguments of `pgd`, or of `apgd`."""
        arguments = self._attack_arguments(fast=False) | {"sample_ids": sample_ids, "seed": seed} | changes
        return self._attack(model, x, y, arguments, fast=False)

    def refresh_(self) -> None:
        """Bring working copies up to date: to be called when the weights were changed by anything but a step."""
        self.copies.refresh_()

    @property
    def capturable(self) -> bool:
        """Whether a step is the same sequence of launches every time, so that a CUDA graph can hold it."""
        # with c_min the number of samples below it decides how many passes are made
        return self.options.c_min is None and not self.options.public_code

    def clear_gradients(self) -> None:
        """Drop the gradients of all models."""
        for module in (self.model, self.copies.ascent, self.copies.descent):
            module.zero_grad(set_to_none=True)

    def _attack_arguments(self, *, fast: bool) -> dict[str, Any]:
        """How training attacks, in the arguments of `pgd`, or of `apgd`."""
        attack = self.attack
        arguments: dict[str, Any] = {
            "epsilon": attack.epsilon_value,
            "step_size": attack.step_size_value,
            "steps": attack.steps,
            "norm": attack.norm,
            "start": attack.start,
            "bn_mode": attack.bn_mode,
            "nonfinite": "ignore",  # counted, see `_attacked`
        }
        if self._is_auto(fast):
            del arguments["step_size"]
        return arguments | (fast_attack(attack.fast, attack.epsilon_value) if fast else {})

    def _is_auto(self, fast: bool) -> bool:
        """Whether the attack is Auto-PGD."""
        return self.attack.kind == "apgd" and not fast

    def _attack(self, model: nn.Module, x: Tensor, y: Tensor, arguments: dict[str, Any], *, fast: bool) -> Tensor:
        if self.attack.epsilon_value == 0:
            return x
        half = self.copies.precision.attack == torch.float16
        if self._is_auto(fast):
            return apgd(model, x, y, loss_scale=_ATTACK_LOSS_SCALE if half else 1.0, **arguments)
        modes = batch_norm_mode(model, arguments["bn_mode"], update_statistics=False, synchronized=False)
        with torch.no_grad(), modes:
            loss = self.objective.attack_loss(model, x, y)
        if half:
            return pgd(model, x, y, loss=lambda logits, labels: _ATTACK_LOSS_SCALE * loss(logits, labels), **arguments)
        return pgd(model, x, y, loss=loss, **arguments)

    def _attacked(
        self,
        x: Tensor,
        y: Tensor,
        start: Tensor,
        work: Work,
        fast: bool,
        *,
        share_ascent: bool,
    ) -> tuple[Tensor, Tensor]:
        """The attacked images, and the parts of the last gradient that `_marks` tells."""
        arguments = self._attack_arguments(fast=fast)
        marks = x.new_zeros(2)

        def look(step: int, gradient: Tensor) -> None:
            nonlocal marks
            if step == arguments["steps"] - 1:
                marks = marks + _marks(gradient, x)

        arguments["observe"] = look
        if self.options.public_code:
            arguments["update_statistics"] = True
        shared: list[nn.Parameter] = []
        if share_ascent and self._shared and self.awp is not None:
            shared = [self.copies.attack.get_parameter(name) for name in self.awp.parameters]
        attacked = []
        for rows, _ in work.pieces:
            before = [parameter.grad for parameter in shared]
            model = self._runner(self.copies.attack, x[rows])
            changes: dict[str, Any] = {"start": start[rows]} | ({"shared": shared} if shared else {})
            attacked.append(self._attack(model, x[rows], y[rows], arguments | changes, fast=fast))
            for parameter, gradient in zip(shared, before, strict=True):
                if gradient is not None and parameter.grad is not None:
                    parameter.grad += gradient
        # what was kept for the attack's passes is twice as large as all that the rest of the step adds
        conv3x3_forget()
        x_adv = attacked[0] if len(attacked) == 1 else torch.cat(attacked)
        if self.options.public_code:
            with batch_norm_mode(self.model, self.attack.bn_mode, update_statistics=True):
                self._forward_for_statistics(x_adv)
        return x_adv, marks

    def _runner(self, model: nn.Module, x: Tensor) -> nn.Module:
        """`model` as it is called: compiled, for batches of the first one's size."""
        if not self._compile:
            return model
        self._compiled_size = self._compiled_size or len(x)
        if len(x) != self._compiled_size:
            return model
        if id(model) not in self._compiled:
            # sizes stay fixed: a general kernel is slower, and compiling once more takes minutes
            self._compiled[id(model)] = torch.compile(model, dynamic=False)  # pyright: ignore[reportArgumentType]
        return self._compiled[id(model)]

    def _backward(
        self,
        model: nn.Module,
        x_adv: Tensor,
        x: Tensor,
        y: Tensor,
        work: Work,
        *,
        averaged: bool,
        update_statistics: bool,
        c_min: float | None = None,
        followed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the mean loss in the parameters of `model`, over all ranks if `averaged`, times `followed`.

        Returns:
            The mean loss, the part of right answers, and how many losses lie below c_min; of this rank's images.
        """
        reducer = self._reducers.get(id(model)) if averaged else None
        loss, correct, below = (x.new_zeros(()) for _ in range(3))
        for index, (rows, share) in enumerate(work.pieces):
            called = self._runner(reducer or model, x[rows])
            last = index == len(work.pieces) - 1
            if self.copies.sharded:
                model.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
            with (
                batch_norm_mode(model, update_statistics=update_statistics, synchronized=not work.undivided),
                contextlib.nullcontext() if last or reducer is None else reducer.no_sync(),
            ):
                losses, logits = self.objective.losses(called, x_adv[rows], x[rows], y[rows])
                if c_min is not None:
                    counted = losses.detach() < c_min
                    below += counted.sum()
                    losses = losses * counted
                mean = losses.mean()
                # the reducer takes the mean over the ranks of what is to be added up
                scale = share * self.ranks.world
                lifted = mean if scale == 1 else mean * scale
                lifted = lifted if followed is None else lifted * followed
                (lifted if self.loss_scale is None else lifted * self.loss_scale.value).backward()
            labels = y[rows] if y.ndim == 1 else y[rows].argmax(1)
            loss = loss + mean.detach() * share
            correct = correct + (predicted(logits.detach()) == labels).to(x.dtype).mean() * share
        return loss, correct, below

    def _ascend(
        self,
        awp: AdversarialWeightPerturbation,
        x_adv: Tensor,
        x: Tensor,
        y: Tensor,
        work: Work,
    ) -> Tensor:
        """Perturb the weights; returns, on the device, 1, or NaN where a direction was not finite on this rank."""
        sums: dict[str, Tensor] = {}
        options, model = self.options, self.copies.ascent
        several = options.ascent_steps > 1
        for step in range(options.ascent_steps):
            if not self._shared or self.attack.epsilon_value == 0:
                averaged = self._global_ascent
                *_, below = self._backward(
                    model, x_adv, x, y, work, averaged=averaged, update_statistics=False, c_min=options.c_min
                )
                if options.c_min is not None and step:
                    if averaged:
                        self.ranks.sum_([below])
                    if below == 0:
                        break
            for name in awp.parameters:
                gradient = model.get_parameter(name).grad
                if gradient is not None:
                    # a new tensor where more is to come: the next pass writes into the memory of this one's
                    sums[name] = sums[name] + gradient if name in sums else gradient.clone() if several else gradient
            if self._shared and self._global_ascent:
                self.ranks.sum_(sums.values())
            # every pass is taken where the ones before it moved to, and all are added up at w, as RWP does
            awp.restore_()
            awp.perturb_(gradients=sums)
            self.clear_gradients()
        # of the last pass: what was not finite in one before it is in the sum still
        assert awp.found_inf is not None
        return torch.ones_like(awp.found_inf).masked_fill_(awp.found_inf > 0, torch.nan)

    def _descend(
        self, x_adv: Tensor, x: Tensor, y: Tensor, work: Work, followed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the training loss; returns it and the part of right answers. Moves the BN statistics."""
        model = self.copies.descent
        loss, correct, _ = self._backward(
            model, x_adv, x, y, work, averaged=True, update_statistics=True, followed=followed
        )
        return loss, correct

    @torch.no_grad()
    def _average_statistics(self, share: float) -> None:
        """Running statistics of all ranks' images; without it the ranks would come to differ."""
        if self.ranks.world == 1 or self._distributed.sync_batch_norm:
            return
        statistics = [flat for flat in self._statistics if flat.is_floating_point()]
        for flat in statistics:
            flat.mul_(share)
        self.ranks.sum_(statistics)

    @torch.no_grad()
    def _update(self, awp: AdversarialWeightPerturbation | None) -> Tensor:
        """The optimizer's step at w, left out if a gradient is not finite; returns, on the device, whether it was."""
        optimizer = self.optimizer
        # an ascent that was not followed on some rank shows here as well: its `followed` made all gradients NaN
        norm = total_norm(optimizer.gradients())
        skipped = ~torch.isfinite(norm)
        optimizer.found_inf, optimizer.grad_norm, optimizer.max_norm = skipped.float(), norm, self.clip_norm
        optimizer.grad_scale = None if self.loss_scale is None else self.loss_scale.value
        optimizer.decay_at_out = self.options.public_code and awp is not None and awp.working is not None
        if awp is not None and awp.working is None:
            if self.options.public_code:
                self._decay_perturbed(awp)
            awp.restore_()
        optimizer.step()
        self.copies.refresh_rest_()
        if awp is not None:
            awp.forget_()  # the update wrote the working copy anew
        if self.awp is not None:
            self.awp.take_weight_norms(optimizer.weight_norms)
        if self.loss_scale is not None:
            self.loss_scale.update_(skipped)
        return skipped

    @torch.no_grad()
    def _decay_perturbed(self, awp: AdversarialWeightPerturbation) -> None:
        """Add weight_decay * gamma v to the gradients: decay at w then amounts to decay at w + gamma v."""
        decay = {id(p): group["weight_decay"] for group in self.optimizer.param_groups for p in group["params"]}
        for name, displacement in awp.displacement().items():
            parameter = awp.parameters[name]
            if parameter.grad is not None and id(parameter) in decay:
                parameter.grad.add_(displacement, alpha=decay[id(parameter)])

    @torch.no_grad()
    def _forward_for_statistics(self, x: Tensor) -> None:
        self.model(x)

"""One training step with the double perturbation: of the images, then of the weights.

Source: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine.attack import batch_norm_mode, fast_attack, pgd, starting_point
from awp_engine.batch_norm import Statistics
from awp_engine.config import AttackConfig, AwpConfig
from awp_engine.objectives import Objective
from awp_engine.precision import Copies, LossScale
from awp_engine.regions import region
from awp_kernels import SGD, AdversarialWeightPerturbation, conv3x3_forget, total_norm

# lifts the attack's 16-bit gradients out of underflow; the step ignores the scale
_ATTACK_LOSS_SCALE = 1024.0


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step is logged by; all stay on the device.

    Attributes:
        loss: scalar, averaged over the batch, at the perturbed weights where there are such; not finite at times where
            the step was skipped.
        correct: scalar, number of attacked images classified right in the same forward pass.
        skipped: bool scalar: a gradient was not finite, and weights, momentum and statistics were left as they were.
        zero_gradients: scalar, the part of exactly zero entries in the attack's last gradient; a mask's mark.
    """

    loss: Tensor
    correct: Tensor
    skipped: Tensor
    zero_gradients: Tensor


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

    Attributes:
        loss_scale: of ascent and descent where one of them is in fp16, else None.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: SGD,
        objective: Objective,
        attack: AttackConfig,
        awp: AdversarialWeightPerturbation | None,
        options: AwpConfig | None = None,
        clip_norm: float | None = None,
        copies: Copies | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.attack, self.awp, self.options = attack, awp, options or AwpConfig()
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

    def __call__(
        self, x: Tensor, y: Tensor, *, sample_ids: Tensor, seed: int, perturb: bool = True, fast: bool = False
    ) -> StepResult:
        """Train on one batch.

        Args:
            x: [N, C, H, W], in [0, 1].
            y: int64 [N], or fp32 [N, classes] of a mixture.
            sample_ids: int64 [N], what the attack's noise is keyed by.
            seed: of this step's noise.
            perturb: whether the weights are perturbed in this step.
            fast: attack by the cheap attack of the settings.
        """
        return self.from_start(x, y, self.start(x, sample_ids, seed, fast=fast), perturb=perturb, fast=fast)

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
        self, x: Tensor, y: Tensor, start: Tensor, *, perturb: bool = True, fast: bool = False
    ) -> StepResult:
        """Train on one batch, the attack beginning at `start`: see `__call__`."""
        self.clear_gradients()
        awp = self.awp if perturb else None
        public_code = self.options.public_code
        statistics = Statistics(self._statistics)
        try:
            with region("attack"):
                self.copies.prepare_attack_()
                x_adv, zero_gradients = self._attacked(x, y, start, fast, share=awp is not None)
            if awp is not None:
                with region("ascent"):
                    self._ascend(awp, x_adv, x, y)
            with region("descent"):
                loss, correct = self._descend(x_adv, x, y)  # at w + v
            with region("update"):
                skipped = self._update(awp)  # at w
            if public_code:
                self._forward_for_statistics(x)
            statistics.restore_where(skipped)
        except BaseException:
            if awp is not None:
                awp.restore_()
            statistics.restore_()
            raise
        return StepResult(loss=loss, correct=correct, skipped=skipped, zero_gradients=zero_gradients)

    def free(self, x: Tensor, y: Tensor, delta: Tensor) -> StepResult:
        """Train on one batch by one pass that serves image and weights, and move `delta`, [N, C, H, W], in place.

        Source: Shafahi et al.: Adversarial Training for Free!, NeurIPS 2019.
        """
        self.clear_gradients()
        epsilon = self.attack.epsilon_value
        statistics = Statistics(self._statistics)
        try:
            x_adv = (x + delta).clamp_(0, 1).requires_grad_()
            loss, correct = self._descend(x_adv, x, y)
            assert x_adv.grad is not None
            delta.add_(x_adv.grad.sign(), alpha=epsilon).clamp_(-epsilon, epsilon)
            skipped = self._update(None)
            statistics.restore_where(skipped)
        except BaseException:
            statistics.restore_()
            raise
        zero_gradients = (x_adv.grad == 0).float().mean()
        return StepResult(loss=loss, correct=correct, skipped=skipped, zero_gradients=zero_gradients)

    def attacked(self, model: nn.Module, x: Tensor, y: Tensor, sample_ids: Tensor, seed: int, **changes: Any) -> Tensor:
        """The images that training attacks `model` with; `changes` are arguments of `pgd`."""
        arguments = self._attack_arguments(fast=False) | {"sample_ids": sample_ids, "seed": seed} | changes
        return self._attack(model, x, y, arguments)

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
        """How training attacks, in the arguments of `pgd`."""
        attack = self.attack
        arguments: dict[str, Any] = {
            "epsilon": attack.epsilon_value,
            "step_size": attack.step_size_value,
            "steps": attack.steps,
            "norm": attack.norm,
            "start": attack.start,
            "bn_mode": attack.bn_mode,
        }
        return arguments | (fast_attack(attack.fast, attack.epsilon_value) if fast else {})

    def _attack(self, model: nn.Module, x: Tensor, y: Tensor, arguments: dict[str, Any]) -> Tensor:
        if self.attack.epsilon_value == 0:
            return x
        with torch.no_grad(), batch_norm_mode(model, arguments["bn_mode"], update_statistics=False):
            loss = self.objective.attack_loss(model, x, y)
        scale = _ATTACK_LOSS_SCALE if self.copies.precision.attack == torch.float16 else 1.0
        return pgd(model, x, y, loss=lambda logits, labels: scale * loss(logits, labels), **arguments)

    def _attacked(self, x: Tensor, y: Tensor, start: Tensor, fast: bool, *, share: bool) -> tuple[Tensor, Tensor]:
        """The attacked images, and the part of zeros in the last gradient."""
        arguments = self._attack_arguments(fast=fast)
        zeros = x.new_zeros(())

        def count_zeros(step: int, gradient: Tensor) -> None:
            nonlocal zeros
            if step == arguments["steps"] - 1:
                zeros = (gradient == 0).float().mean()

        changes: dict[str, Any] = {
            "start": start,
            "observe": count_zeros,
            "update_statistics": self.options.public_code,
        }
        if share and self.options.ascent == "shared" and self.awp is not None:
            changes["shared"] = [self.copies.attack.get_parameter(name) for name in self.awp.parameters]
        x_adv = self._attack(self._runner(self.copies.attack, x), x, y, arguments | changes)
        # what was kept for the attack's passes is twice as large as all that the rest of the step adds
        conv3x3_forget()
        if self.options.public_code:
            with batch_norm_mode(self.model, self.attack.bn_mode, update_statistics=True):
                self._forward_for_statistics(x_adv)
        return x_adv, zeros

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

    def _ascend(self, awp: AdversarialWeightPerturbation, x_adv: Tensor, x: Tensor, y: Tensor) -> None:
        """Perturb the weights."""
        sums: dict[str, Tensor] = {}
        for step in range(self.options.ascent_steps):
            if self.options.ascent == "exact" or self.attack.epsilon_value == 0:
                below = self._ascent_backward(x_adv, x, y)
                if step and below == 0:
                    break
            for name in awp.parameters:
                gradient = self.copies.ascent.get_parameter(name).grad
                if gradient is not None:
                    sums[name] = sums[name] + gradient if name in sums else gradient
            # every pass is taken where the ones before it moved to, and all are added up at w, as RWP does
            awp.restore_()
            awp.perturb_(gradients=sums)
            self.clear_gradients()

    def _ascent_backward(self, x_adv: Tensor, x: Tensor, y: Tensor) -> int:
        """Gradients of the ascent's loss; returns how many samples are in it."""
        c_min, model = self.options.c_min, self._runner(self.copies.ascent, x)
        # the perturbation's direction does not depend on the scale
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        with batch_norm_mode(model, update_statistics=False):
            losses, _ = self.objective.losses(model, x_adv, x, y)
            if c_min is None:
                (losses.mean() * scale).backward()
                return len(losses)
            below = losses.detach() < c_min
            ((losses * below).mean() * scale).backward()
        return int(below.sum())

    def _descend(self, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the training loss; returns it and the number of right answers. Moves the BN statistics."""
        model = self._runner(self.copies.descent, x)
        with batch_norm_mode(model, update_statistics=True):
            losses, logits = self.objective.losses(model, x_adv, x, y)
            loss = losses.mean()
            (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()
        labels = y if y.ndim == 1 else y.argmax(1)
        return loss.detach(), (logits.argmax(1) == labels).sum()

    @torch.no_grad()
    def _update(self, awp: AdversarialWeightPerturbation | None) -> Tensor:
        """The optimizer's step at w, left out if a gradient is not finite; returns, on the device, whether it was."""
        optimizer = self.optimizer
        # an ascent gradient that is not finite shows here as well: some weight, and with it the loss, became NaN
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

"""One training step with the double perturbation: of the images, then of the weights.

Source: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from awp_engine.attack import Loss, batch_norm_mode, fast_attack, pgd
from awp_engine.batch_norm import saved_statistics
from awp_engine.config import AttackConfig, AwpConfig
from awp_engine.objectives import Objective
from awp_engine.regions import region
from awp_kernels import AdversarialWeightPerturbation


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


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Attack, ascent, descent, update.

    Attributes:
        model: in train mode.
        optimizer: over the model's parameters, fused, as `build_optimizer` makes it.
        objective: what is climbed and minimised.
        attack: how the images are attacked.
        awp: the weight perturbation, or None.
        options: how its ascent is done.
        clip_norm: largest norm of the descent gradient, or None.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    attack: AttackConfig
    awp: AdversarialWeightPerturbation | None
    options: AwpConfig = field(default_factory=AwpConfig)
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not self.optimizer.defaults.get("fused"):
            # the others ignore found_inf, and would take a step with NaN
            raise ValueError("optimizer: expected one made with fused=True, which can leave a step out")

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
        self.optimizer.zero_grad(set_to_none=True)
        awp = self.awp if perturb else None
        public_code = self.options.public_code
        with saved_statistics(self.model) as statistics:
            with region("attack"):
                x_adv, zero_gradients = self._attacked(x, y, sample_ids, seed, fast, share=awp is not None)
            if awp is None:
                with region("descent"):
                    loss, correct = self._backward(x_adv, x, y, update_statistics=True)
                ascent_norm = loss.new_zeros(())
            else:
                with region("ascent"):
                    ascent_norm = self._ascend(awp, x_adv, x, y)
                try:
                    with region("descent"):
                        loss, correct = self._backward(x_adv, x, y, update_statistics=True)  # at w + v
                    if public_code:
                        self._decay_perturbed(awp)
                finally:
                    awp.restore_()
            with region("update"):
                skipped = self._update(ascent_norm)  # at w
            if public_code:
                self._forward_for_statistics(x)
            statistics.restore_where(skipped)
        return StepResult(loss=loss, correct=correct, skipped=skipped, zero_gradients=zero_gradients)

    def free(self, x: Tensor, y: Tensor, delta: Tensor) -> StepResult:
        """Train on one batch by one pass that serves image and weights, and move `delta`, [N, C, H, W], in place.

        Source: Shafahi et al.: Adversarial Training for Free!, NeurIPS 2019.
        """
        self.optimizer.zero_grad(set_to_none=True)
        epsilon = self.attack.epsilon_value
        with saved_statistics(self.model) as statistics:
            x_adv = (x + delta).clamp_(0, 1).requires_grad_()
            loss, correct = self._backward(x_adv, x, y, update_statistics=True)
            assert x_adv.grad is not None
            delta.add_(x_adv.grad.sign(), alpha=epsilon).clamp_(-epsilon, epsilon)
            skipped = self._update(loss.new_zeros(()))
            statistics.restore_where(skipped)
        zero_gradients = (x_adv.grad == 0).float().mean()
        return StepResult(loss=loss, correct=correct, skipped=skipped, zero_gradients=zero_gradients)

    def attacked(self, model: nn.Module, x: Tensor, y: Tensor, sample_ids: Tensor, seed: int, **changes: Any) -> Tensor:
        """The images that training attacks `model` with; `changes` are arguments of `pgd`."""
        attack = self.attack
        if attack.epsilon_value == 0:
            return x
        loss = self._attack_loss(model, x, y, changes.get("bn_mode", attack.bn_mode))
        arguments: dict[str, Any] = {
            "epsilon": attack.epsilon_value,
            "step_size": attack.step_size_value,
            "steps": attack.steps,
            "norm": attack.norm,
            "start": attack.start,
            "sample_ids": sample_ids,
            "seed": seed,
            "bn_mode": attack.bn_mode,
            "loss": loss,
        }
        return pgd(model, x, y, **(arguments | changes))

    @torch.no_grad()
    def _attack_loss(self, model: nn.Module, x: Tensor, y: Tensor, bn_mode: Any) -> Loss:
        with batch_norm_mode(model, bn_mode, update_statistics=False):
            return self.objective.attack_loss(model, x, y)

    def _attacked(
        self, x: Tensor, y: Tensor, sample_ids: Tensor, seed: int, fast: bool, *, share: bool
    ) -> tuple[Tensor, Tensor]:
        """The attacked images, and the part of zeros in the last gradient."""
        zeros = x.new_zeros(())

        def count_zeros(_: int, gradient: Tensor) -> None:
            nonlocal zeros
            zeros = (gradient == 0).float().mean()

        changes: dict[str, Any] = {"observe": count_zeros, "update_statistics": self.options.public_code}
        if share and self.options.ascent == "shared" and self.awp is not None:
            changes["shared"] = list(self.awp.parameters.values())
        if fast:
            changes |= fast_attack(self.attack.fast, x, self.attack.epsilon_value, sample_ids=sample_ids, seed=seed)
        x_adv = self.attacked(self.model, x, y, sample_ids, seed, **changes)
        if self.options.public_code:
            with batch_norm_mode(self.model, self.attack.bn_mode, update_statistics=True):
                self._forward_for_statistics(x_adv)
        return x_adv, zeros

    def _ascend(self, awp: AdversarialWeightPerturbation, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Perturb the weights; returns the norm of the gradient that they followed."""
        norm = x.new_zeros(())
        sums: dict[str, Tensor] = {}
        try:
            for step in range(self.options.ascent_steps):
                if self.options.ascent == "exact" or self.attack.epsilon_value == 0:
                    below = self._ascent_backward(x_adv, x, y)
                    if step and below == 0:
                        break
                for name, parameter in awp.parameters.items():
                    if parameter.grad is not None:
                        sums[name] = sums[name] + parameter.grad if name in sums else parameter.grad
                # every pass is taken where the ones before it moved to, and all are added up at w, as RWP does
                awp.restore_()
                for name, total in sums.items():
                    awp.parameters[name].grad = total
                norm = get_total_norm(list(sums.values()))
                awp.perturb_()
        except BaseException:
            awp.restore_()
            raise
        return norm

    def _ascent_backward(self, x_adv: Tensor, x: Tensor, y: Tensor) -> int:
        """Gradients of the ascent's loss; returns how many samples are in it."""
        c_min = self.options.c_min
        with batch_norm_mode(self.model, update_statistics=False):
            losses, _ = self.objective.losses(self.model, x_adv, x, y)
            if c_min is None:
                losses.mean().backward()
                return len(losses)
            below = losses.detach() < c_min
            (losses * below).mean().backward()
        return int(below.sum())

    def _backward(self, x_adv: Tensor, x: Tensor, y: Tensor, *, update_statistics: bool) -> tuple[Tensor, Tensor]:
        """Gradients of the training loss; returns it and the number of right answers."""
        with batch_norm_mode(self.model, update_statistics=update_statistics):
            losses, logits = self.objective.losses(self.model, x_adv, x, y)
            loss = losses.mean()
            loss.backward()
        labels = y if y.ndim == 1 else y.argmax(1)
        return loss.detach(), (logits.argmax(1) == labels).sum()

    @torch.no_grad()
    def _update(self, ascent_norm: Tensor) -> Tensor:
        """The optimizer's step, unless a gradient is not finite; returns whether it was left out, on the device."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        skipped = ~(torch.isfinite(norm) & torch.isfinite(ascent_norm))
        if self.clip_norm is not None:
            clip_grads_with_norm_(parameters, self.clip_norm, norm)
        # the fused optimizers' own way to leave a step out, made for loss scaling
        self.optimizer.found_inf = skipped.float()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
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

"""One training step with the double perturbation: of the images, then of the weights.

Source: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from awp_engine.attack import batch_norm_mode, pgd
from awp_engine.config import AttackConfig
from awp_engine.objectives import Objective
from awp_kernels import AdversarialWeightPerturbation


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step is logged by; both stay on the device.

    Attributes:
        loss: scalar, averaged over the batch, at the perturbed weights where there are such.
        correct: scalar, number of attacked images classified right in the same forward pass.
    """

    loss: Tensor
    correct: Tensor


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """Attack, ascent, descent, update.

    Attributes:
        model: in train mode.
        optimizer: over the model's parameters.
        objective: what is minimised.
        attack: how the images are attacked.
        awp: the weight perturbation, or None.
        public_code: do as the 2020 public code does: running statistics move in the attack's forward passes, in one
            more on its result, in the descent's, and in one on the clean images; weight decay acts on w + gamma v.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    attack: AttackConfig
    awp: AdversarialWeightPerturbation | None
    public_code: bool = False

    def __call__(self, x: Tensor, y: Tensor, *, sample_ids: Tensor, seed: int, perturb: bool = True) -> StepResult:
        """Train on one batch.

        Args:
            x: [N, C, H, W], in [0, 1].
            y: int64 [N].
            sample_ids: int64 [N], what the attack's noise is keyed by.
            seed: of this step's noise.
            perturb: whether the weights are perturbed in this step.
        """
        self.optimizer.zero_grad(set_to_none=True)
        x_adv = self._attacked(x, y, sample_ids, seed)
        if self.awp is not None and perturb:
            self._backward(x_adv, x, y, update_statistics=False)  # ascent gradient, at w
            with self.awp.perturbed():
                result = self._backward(x_adv, x, y, update_statistics=True)  # descent gradient, at w + gamma v
                if self.public_code:
                    self._decay_perturbed(self.awp)
        else:
            result = self._backward(x_adv, x, y, update_statistics=True)
        self.optimizer.step()  # at w
        if self.public_code:
            self._forward_for_statistics(x)
        return result

    def _attacked(self, x: Tensor, y: Tensor, sample_ids: Tensor, seed: int) -> Tensor:
        x_adv = pgd(
            self.model,
            x,
            y,
            epsilon=self.attack.epsilon_value,
            step_size=self.attack.step_size_value,
            steps=self.attack.steps,
            norm=self.attack.norm,
            random_start=self.attack.random_start,
            sample_ids=sample_ids,
            seed=seed,
            bn_mode=self.attack.bn_mode,
            update_statistics=self.public_code,
        )
        if self.public_code:
            with batch_norm_mode(self.model, self.attack.bn_mode, update_statistics=True):
                self._forward_for_statistics(x_adv)
        return x_adv

    def _backward(self, x_adv: Tensor, x: Tensor, y: Tensor, *, update_statistics: bool) -> StepResult:
        with batch_norm_mode(self.model, update_statistics=update_statistics):
            loss, logits = self.objective(self.model, x_adv, x, y)
            loss.backward()
        return StepResult(loss=loss.detach(), correct=(logits.argmax(1) == y).sum())

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

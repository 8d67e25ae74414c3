"""What the public loops of 2020 compute, written from their description: fp32, NCHW, a proxy model.

At K = 10 a step of theirs costs these forward passes' worth of work, where `necessary_units` needs 23, 26 and 33:

    at           35: K (1 + 2) attack, whose backward pass goes on to the weights, 1 on its result, 3 descent, 1 clean
    at-awp       38: 3 more for the ascent
    trades-awp   48: K (1 + 1 + 1) attack with the clean logits computed anew in each iteration, 9 ascent, 9 descent:
                 both pass the clean images twice

Everything that torch chooses by default stays so: on GPUs TF32 in convolutions, SGD by multi-tensor operations.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.data import Batch
from awp_engine.observe.regions import region

from .common import Arm, PlainArm, Settings, is_moved


class ProxyPerturbation:
    """An SGD step of a second model gives the direction of the weight perturbation.

    Args:
        model: what is perturbed.
        proxy: a copy of it.
        lr: of the proxy's step; the direction does not depend on it.
    """

    def __init__(self, model: nn.Module, proxy: nn.Module, lr: float = 0.01) -> None:
        self.model, self.proxy = model, proxy
        self.optimizer = torch.optim.SGD(proxy.parameters(), lr=lr)
        self.differences: OrderedDict[str, Tensor] = OrderedDict()

    def perturb(self, gamma: float, eps: float, backward: Callable[[nn.Module], None] | None = None) -> None:
        """Copy the state, step the proxy, keep a dictionary of normalised differences, add it.

        Args:
            gamma: length relative to the weights.
            eps: added to the difference's norm.
            backward: gives the proxy its gradients, negated, as ascent needs them; None where they are there.
        """
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train()
        if backward is not None:
            backward(self.proxy)
        self.optimizer.step()
        self.differences = OrderedDict()
        moved = self.proxy.state_dict()
        for name, old in self.model.state_dict().items():
            if is_moved(name, old):
                step = moved[name] - old
                self.differences[name] = old.norm() / (step.norm() + eps) * step
        self.add(gamma)

    @torch.no_grad()
    def add(self, factor: float) -> None:
        """Add factor * difference; -gamma is the public code's restore."""
        for name, parameter in self.model.named_parameters():
            if name in self.differences:
                parameter.add_(factor * self.differences[name])


class _PublicArm(PlainArm):
    memory_format = torch.contiguous_format

    def __init__(self, settings: Settings, model: nn.Module) -> None:
        super().__init__(settings)
        self.model = model.to(settings.device)
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.awp = ProxyPerturbation(model, copy.deepcopy(model)) if settings.perturbs_weights else None

    def _step(self, batch: Batch) -> None:
        x, y = batch.images, batch.labels
        with region("attack"):
            x_adv = self._attack_trades(x) if self.settings.trades else self._attack(x, y)
        self.model.train()
        if self.awp is not None:
            with region("ascent"):
                self.awp.perturb(self.settings.gamma, 1e-20, lambda proxy: self._climb(proxy, x_adv, x, y))
        with region("descent"):
            self.optimizer.zero_grad()
            self._loss(self.model, x_adv, x, y).backward()
        with region("update"):
            self.optimizer.step()
            if self.awp is not None:
                self.awp.add(-self.settings.gamma)
        if not self.settings.trades:
            # a forward pass on clean images, for the log alone; its graph is built, and dropped
            with region("log"):
                F.cross_entropy(self.model(x), y)

    def _attack(self, x: Tensor, y: Tensor) -> Tensor:
        epsilon, step_size = self.settings.ball
        delta = (self.start(x) - x).requires_grad_()
        for _ in range(self.settings.steps):
            # gradients of the weights are computed and added up as well, until the descent clears them
            F.cross_entropy(self.model(x + delta), y).backward()
            assert delta.grad is not None
            moved = (delta.detach() + step_size * delta.grad.sign()).clamp(-epsilon, epsilon)
            delta.data = torch.max(torch.min(moved, 1 - x), 0 - x)
            delta.grad.zero_()
        F.cross_entropy(self.model(x + delta), y, reduction="none")
        return (x + delta).detach()

    def _attack_trades(self, x: Tensor) -> Tensor:
        epsilon, step_size = self.settings.ball
        self.model.eval()
        x_adv = self.start(x)
        for _ in range(self.settings.steps):
            x_adv.requires_grad_()
            clean = F.softmax(self.model(x), dim=1)
            loss = F.kl_div(F.log_softmax(self.model(x_adv), dim=1), clean, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, [x_adv])
            moved = x_adv.detach() + step_size * gradient.sign()
            x_adv = torch.min(torch.max(moved, x - epsilon), x + epsilon).clamp(0, 1)
        return x_adv

    def _loss(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if not self.settings.trades:
            return F.cross_entropy(model(x_adv), y)
        natural = F.cross_entropy(model(x), y)
        attacked = F.log_softmax(model(x_adv), dim=1)
        robust = F.kl_div(attacked, F.softmax(model(x), dim=1), reduction="batchmean")
        return natural + self.settings.beta * robust

    def _climb(self, proxy: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> None:
        loss = -self._loss(proxy, x_adv, x, y)
        assert self.awp is not None
        self.awp.optimizer.zero_grad()
        loss.backward()


def public_arm(settings: Settings, model: nn.Module) -> Arm:
    """The public loop of the method."""
    return _PublicArm(settings, model)

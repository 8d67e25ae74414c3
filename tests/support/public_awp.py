"""AT-AWP as the 2020 public code computes it, written for the tests from its description: proxy model and all."""

import copy
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PublicAwp:
    """Perturbs along the difference that one SGD step of a second model makes."""

    def __init__(self, model: nn.Module, gamma: float, proxy_lr: float = 0.01) -> None:
        self.model, self.gamma = model, gamma
        self.proxy = copy.deepcopy(model)
        self.proxy_optimizer = torch.optim.SGD(self.proxy.parameters(), lr=proxy_lr)

    def calculate(self, x_adv: Tensor, y: Tensor) -> "OrderedDict[str, Tensor]":
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train(self.model.training)
        loss = -F.cross_entropy(self.proxy(x_adv), y)
        self.proxy_optimizer.zero_grad()
        loss.backward()
        self.proxy_optimizer.step()
        moved, differences = self.proxy.state_dict(), OrderedDict()
        for name, old in self.model.state_dict().items():
            if old.dim() > 1 and "weight" in name:
                step = moved[name] - old
                differences[name] = old.norm() / (step.norm() + 1e-20) * step
        return differences

    @torch.no_grad()
    def add(self, differences: "OrderedDict[str, Tensor]", sign: int) -> None:
        for name, parameter in self.model.named_parameters():
            if name in differences:
                parameter.add_(sign * self.gamma * differences[name])


def public_attack(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, epsilon: float, step_size: float, steps: int
) -> Tensor:
    """The public attack from a given start; K + 1 forward passes in the model's own mode."""
    delta = (start - x).clone().requires_grad_()
    for _ in range(steps):
        loss = F.cross_entropy(model(x + delta), y)
        loss.backward()
        assert delta.grad is not None
        with torch.no_grad():
            delta.add_(step_size * delta.grad.sign()).clamp_(-epsilon, epsilon)
            delta.copy_(torch.max(torch.min(delta, 1 - x), 0 - x))
        delta.grad.zero_()
    F.cross_entropy(model(x + delta), y, reduction="none")
    return (x + delta).detach()


def public_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    awp: PublicAwp,
    x: Tensor,
    y: Tensor,
    start: Tensor,
    **attack: float,
) -> "OrderedDict[str, Tensor]":
    """One training step, in the model's own mode; returns the unit perturbation."""
    x_adv = public_attack(model, x, y, start, **attack)
    differences = awp.calculate(x_adv, y)
    awp.add(differences, +1)
    loss = F.cross_entropy(model(x_adv), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    awp.add(differences, -1)
    F.cross_entropy(model(x), y)
    return differences

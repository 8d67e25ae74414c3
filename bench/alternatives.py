"""What a user could call instead: the same mathematics without this package."""

from collections import OrderedDict
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Tensors = list[Tensor]

# torch's _foreach functions, which are not exported to type checkers
multi: Any = torch


def device_scales(weights: Tensors, grads: Tensors, gamma: float, eps: float) -> Tensor:
    """The scale gamma * ||w|| / (||g|| + eps) of every tensor, by torch._foreach_norm."""
    weight_norms, grad_norms = torch.stack(multi._foreach_norm(weights)), torch.stack(multi._foreach_norm(grads))
    return gamma * weight_norms / (grad_norms + eps)


def foreach(weights: Tensors, grads: Tensors, gamma: float, eps: float) -> None:
    """torch._foreach functions with the scales left on the device."""
    scales = device_scales(weights, grads, gamma, eps)
    multi._foreach_add_(weights, multi._foreach_mul(grads, list(scales.unbind())))


def foreach_sync(weights: Tensors, grads: Tensors, gamma: float, eps: float) -> None:
    """torch._foreach functions with the scales as Python numbers: a fast path on GPUs, after waiting for the device."""
    scales = device_scales(weights, grads, gamma, eps).tolist()
    multi._foreach_add_(weights, multi._foreach_mul(grads, scales))


def loop(weights: Tensors, grads: Tensors, gamma: float, eps: float) -> None:
    """The formula, tensor by tensor."""
    for weight, grad in zip(weights, grads, strict=True):
        weight.add_(gamma * weight.norm() / (grad.norm() + eps) * grad)


def loop_alpha(weights: Tensors, grads: Tensors, gamma: float, eps: float) -> None:
    """Tensor by tensor with as few passes as PyTorch allows, waiting for the device at each."""
    for weight, grad in zip(weights, grads, strict=True):
        weight.add_(grad, alpha=(gamma * weight.norm() / (grad.norm() + eps)).item())


class Apex:
    """NVIDIA apex's multi-tensor operations, from the module amp_C of NVIDIA's own apex (PyPI's is another project).

    It has no operation with a scale a tensor, so that torch._foreach_mul scales the gradients.
    """

    chunk = 65536

    def __init__(self, device: torch.device) -> None:
        self.operations: Any = import_module("amp_C")
        self.overflow = torch.zeros(1, dtype=torch.int32, device=device)

    def norms(self, tensors: Tensors) -> Tensor:
        """A norm a tensor, in one launch."""
        return self.operations.multi_tensor_l2norm(self.chunk, self.overflow, [tensors], True)[1]

    def perturb(self, weights: Tensors, grads: Tensors, gamma: float, eps: float) -> None:
        """The perturbation."""
        scales = gamma * self.norms(weights) / (self.norms(grads) + eps)
        moves = multi._foreach_mul(grads, list(scales.unbind()))
        # out = 1 * weight + 1 * move; -1: look for overflow in neither
        self.operations.multi_tensor_axpby(self.chunk, self.overflow, [weights, moves, weights], 1.0, 1.0, -1)

    def copy(self, destinations: Tensors, sources: Tensors) -> None:
        """Copy lists."""
        self.operations.multi_tensor_scale(self.chunk, self.overflow, [sources, destinations], 1.0)


class PublicWay:
    """The 2020 public code's way, written from its description: an SGD step of a second model gives the direction.

    Its forward and backward pass are left out: the proxy's gradients are given, negated, as ascent needs them.
    """

    def __init__(self, model: nn.Module, proxy: nn.Module, grads: dict[str, Tensor], lr: float = 0.01) -> None:
        self.model, self.proxy = model, proxy
        self.optimizer = torch.optim.SGD(proxy.parameters(), lr=lr)
        for name, parameter in proxy.named_parameters():
            parameter.grad = -grads[name]
        self.differences: OrderedDict[str, Tensor] = OrderedDict()

    def perturb(self, gamma: float, eps: float) -> None:
        """Copy the state, step the proxy, keep a dictionary of normalised differences, add it."""
        self.proxy.load_state_dict(self.model.state_dict())
        self.proxy.train()
        self.optimizer.step()
        self.differences = OrderedDict()
        moved = self.proxy.state_dict()
        for name, old in self.model.state_dict().items():
            if old.dim() > 1 and "weight" in name:
                step = moved[name] - old
                self.differences[name] = old.norm() / (step.norm() + eps) * step
        self.add(gamma)

    @torch.no_grad()
    def add(self, factor: float) -> None:
        """Add factor * difference; -gamma is the public code's restore."""
        for name, parameter in self.model.named_parameters():
            if name in self.differences:
                parameter.add_(factor * self.differences[name])


def step_linf(x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float, epsilon: float) -> None:
    """The attack's step as TRADES' public code writes it."""
    moved = x_adv + step_size * grad.sign()
    x_adv.copy_(torch.clamp(torch.min(torch.max(moved, x - epsilon), x + epsilon), 0.0, 1.0))


def step_linf_inplace(x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float, epsilon: float) -> None:
    """The same with as few temporaries as PyTorch allows."""
    x_adv.add_(grad.sign(), alpha=step_size).sub_(x).clamp_(-epsilon, epsilon).add_(x).clamp_(0.0, 1.0)


def _lengths(values: Tensor) -> Tensor:
    return values.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def step_l2(x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float, epsilon: float) -> None:
    """The L2 step as public code writes it."""
    delta = x_adv + step_size * grad / (_lengths(grad) + 1e-12) - x
    x_adv.copy_((x + delta * (epsilon / (_lengths(delta) + 1e-12)).clamp(max=1.0)).clamp(0.0, 1.0))


def step_l2_renorm(x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float, epsilon: float) -> None:
    """The L2 step with torch.renorm and in-place operations."""
    x_adv.add_(grad * (step_size / (_lengths(grad) + 1e-12))).sub_(x)
    x_adv.copy_(x_adv.renorm(2, 0, epsilon).add_(x).clamp_(0.0, 1.0))


def init_linf(x_adv: Tensor, x: Tensor, epsilon: float) -> None:
    """Uniform noise from torch's own generator: depends on the batch's order and on the device."""
    x_adv.uniform_(-epsilon, epsilon).add_(x).clamp_(0.0, 1.0)


def init_l2(x_adv: Tensor, x: Tensor, epsilon: float) -> None:
    """Uniform in the ball: a normalised normal vector times u^(1/d), from torch's own generator."""
    noise = torch.randn_like(x)
    radius = torch.rand(len(x), 1, 1, 1, device=x.device) ** (1 / x[0].numel())
    x_adv.copy_((x + noise * (radius * epsilon / _lengths(noise))).clamp(0.0, 1.0))

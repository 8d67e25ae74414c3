"""What a user could call instead: the same mathematics without this package."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

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

    def norm(self, tensors: Tensors) -> Tensor:
        """One norm over all."""
        return self.operations.multi_tensor_l2norm(self.chunk, self.overflow, [tensors], False)[0]

    def sgd(
        self, weights: Tensors, grads: Tensors, buffers: Tensors, lr: float, *, momentum: float, weight_decay: float
    ) -> None:
        """A step with momentum, without dampening."""
        lists = [grads, weights, buffers]
        # not nesterov, not the first step, decay before momentum, gradients times 1
        options = (weight_decay, momentum, 0.0, lr, False, False, False, 1.0)
        self.operations.multi_tensor_sgd(self.chunk, self.overflow, lists, *options)

    @staticmethod
    def optimizer(parameters: Sequence[Tensor], **options: float) -> torch.optim.Optimizer:
        """Apex's FusedSGD."""
        return import_module("apex.optimizers").FusedSGD(parameters, **options)

    def copy(self, destinations: Tensors, sources: Tensors) -> None:
        """Copy lists."""
        self.operations.multi_tensor_scale(self.chunk, self.overflow, [sources, destinations], 1.0)


def apex(device: str) -> tuple[Apex | None, dict[str, str]]:
    """NVIDIA's apex, or why it is left out."""
    if device != "cuda":
        return None, {"apex": "apex serves CUDA tensors"}
    if find_spec("amp_C") is None:
        return None, {"apex": "amp_C (NVIDIA apex) is not installed"}
    return Apex(torch.device(device)), {}


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

"""The definition of the SGD step, in plain PyTorch: torch.optim.SGD's order of operations, with what surrounds it."""

import torch
from torch import Tensor

from awp_kernels._ball import working_dtype
from awp_kernels.sgd_step.rule import Rule


def _left_out(rule: Rule, device: torch.device) -> Tensor:
    """Whether nothing may change, as a bool on the device."""
    result = torch.zeros((), dtype=torch.bool, device=device)
    if rule.found_inf is not None:
        result = result | (rule.found_inf.reshape(()) != 0)
    if rule.grad_norm is not None:
        result = result | ~rule.grad_norm.reshape(()).isfinite()
    return result


def _factor(rule: Rule, dtype: torch.dtype) -> Tensor | None:
    """What gradients are multiplied by, rounded once; None for 1."""
    scale: float | Tensor = 1.0 if rule.grad_scale is None else rule.grad_scale.double().reshape(())
    clip: float | Tensor = 1.0
    if rule.max_norm is not None and rule.grad_norm is not None:
        clip = (rule.max_norm / (rule.grad_norm.double().reshape(()) / scale + 1e-6)).clamp(max=1.0)
    factor = clip / scale
    return factor.to(dtype) if isinstance(factor, Tensor) else None


def sgd_step(
    weights: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    averages: list[Tensor],
    out: list[Tensor],
    rule: Rule,
) -> Tensor:
    """Step the weights, their momentum and their averages; write them to `out`; return their norms."""
    dtype = working_dtype(weights[0].dtype)
    left_out, factor = _left_out(rule, weights[0].device), _factor(rule, dtype)

    def number(value: float, tensor: Tensor | None) -> float | Tensor:
        """Of the working precision, so that it promotes nothing."""
        return value if tensor is None else tensor.reshape(()).to(dtype)

    rate, share = number(rule.lr, rule.lr_tensor), number(rule.average_weight, rule.average_weight_tensor)

    def update(tensor: Tensor, value: Tensor) -> None:
        tensor.copy_(torch.where(left_out, tensor, value.to(tensor.dtype)))

    for index, (weight, grad, decay) in enumerate(zip(weights, grads, rule.weight_decay, strict=True)):
        w, d = weight.to(dtype), grad.to(dtype)
        if factor is not None:
            d = factor * d
        if decay != 0:
            d = d + decay * w
        if momentum_buffers:
            buffer = rule.momentum * momentum_buffers[index].to(dtype) + d
            update(momentum_buffers[index], buffer)
            d = d + rule.momentum * buffer if rule.nesterov else buffer
        update(weight, w - rate * d)
        if averages:
            average = averages[index].to(dtype)
            update(averages[index], average + share * (weight.to(dtype) - average))
        if out:
            out[index].copy_(weight)
    return torch.stack([weight.double().norm() for weight in weights])

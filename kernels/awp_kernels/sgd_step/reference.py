"""The definition of the SGD step, in plain PyTorch: torch.optim.SGD's order of operations, with what surrounds it."""

import torch
from torch import Tensor

from awp_kernels._ball import working_dtype


def _left_out(found_inf: Tensor | None, grad_norm: Tensor | None, device: torch.device) -> Tensor:
    """Whether nothing may change, as a bool on the device."""
    result = torch.zeros((), dtype=torch.bool, device=device)
    if found_inf is not None:
        result = result | (found_inf.reshape(()) != 0)
    if grad_norm is not None:
        result = result | ~grad_norm.reshape(()).isfinite()
    return result


def _factor(
    grad_scale: Tensor | None, grad_norm: Tensor | None, max_norm: float | None, dtype: torch.dtype
) -> Tensor | None:
    """What gradients are multiplied by, rounded once; None for 1."""
    if grad_scale is None and max_norm is None:
        return None
    scale: float | Tensor = 1.0 if grad_scale is None else grad_scale.double().reshape(())
    clip: float | Tensor = 1.0
    if max_norm is not None and grad_norm is not None:
        clip = (max_norm / (grad_norm.double().reshape(()) / scale + 1e-6)).clamp(max=1.0)
    factor = clip / scale
    return factor.to(dtype) if isinstance(factor, Tensor) else None


def sgd_step(
    weights: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    averages: list[Tensor],
    out: list[Tensor],
    weight_decay: list[float],
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    nesterov: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    grad_norm: Tensor | None,
    max_norm: float | None,
    average_weight: float,
    average_weight_tensor: Tensor | None,
) -> Tensor:
    """Step the weights, their momentum and their averages; write them to `out`; return their norms."""
    dtype = working_dtype(weights[0].dtype)
    left_out = _left_out(found_inf, grad_norm, weights[0].device)
    factor = _factor(grad_scale, grad_norm, max_norm, dtype)
    # numbers of the working precision, so that they promote nothing
    rate = lr if lr_tensor is None else lr_tensor.reshape(()).to(dtype)
    share = average_weight if average_weight_tensor is None else average_weight_tensor.reshape(()).to(dtype)

    def update(tensor: Tensor, value: Tensor) -> None:
        tensor.copy_(torch.where(left_out, tensor, value.to(tensor.dtype)))

    for index, (weight, grad, decay) in enumerate(zip(weights, grads, weight_decay, strict=True)):
        w, d = weight.to(dtype), grad.to(dtype)
        if factor is not None:
            d = factor * d
        if decay != 0:
            d = d + decay * w
        if momentum_buffers:
            buffer = momentum * momentum_buffers[index].to(dtype) + d
            update(momentum_buffers[index], buffer)
            d = d + momentum * buffer if nesterov else buffer
        update(weight, w - rate * d)
        if averages:
            average = averages[index].to(dtype)
            update(averages[index], average + share * (weight.to(dtype) - average))
        if out:
            out[index].copy_(weight)
    return torch.stack([weight.double().norm() for weight in weights])

"""`sgd_step_`: a whole optimizer step over a list of tensors, and what belongs to it, in one pass through memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awp_kernels import _backend, _checks
from awp_kernels.sgd_step.rule import SCHEMA, Rule

_LISTS = "Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] averages, Tensor(d!)[] out"


def _lists(
    weights: list[Tensor], momentum_buffers: list[Tensor], averages: list[Tensor], out: list[Tensor]
) -> dict[str, list[Tensor]]:
    lists = {"weights": weights, "momentum_buffers": momentum_buffers, "averages": averages, "out": out}
    return {name: tensors for name, tensors in lists.items() if tensors or name == "weights"}


@torch.library.custom_op(
    "awp::sgd_step_",
    mutates_args=("weights", "momentum_buffers", "averages", "out"),
    schema=f"({_LISTS}, {SCHEMA}) -> Tensor",
)
def _sgd_step_(
    weights: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    averages: list[Tensor],
    out: list[Tensor],
    *arguments: Any,
) -> Tensor:
    rule = Rule(*arguments)
    rule.check(weights, momentum_buffers)
    written = _lists(weights, momentum_buffers, averages, out)
    _checks.tensor_lists(written, {"grads": grads}, numbers=rule.numbers(weights))
    _checks.same_dtype("momentum_buffers", momentum_buffers, "weights", weights)
    _checks.same_dtype("averages", averages, "weights", weights)
    dtype = weights[0].dtype
    unserved = f"{dtype} for weights" if dtype in (torch.float16, torch.bfloat16) else None
    dtypes = {dtype, grads[0].dtype, out[0].dtype if out else dtype}
    run = _backend.select("sgd_step", weights[0].device, dtypes, unserved=unserved)
    return run(weights, grads, momentum_buffers, averages, out, rule)


@_sgd_step_.register_fake
def _(
    weights: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    averages: list[Tensor],
    out: list[Tensor],
    *arguments: Any,
) -> Tensor:
    # where one tensor is "meta" or fake and another is not, nothing else looks at them
    Rule(*arguments).numbers(weights)
    _checks.alike("weights", weights, _lists(weights, momentum_buffers, averages, out) | {"grads": grads})
    return weights[0].new_empty(len(weights), dtype=torch.float64)


@torch.no_grad()
def sgd_step_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    weight_decay: float | Sequence[float] = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    grad_norm: Tensor | None = None,
    max_norm: float | None = None,
    averages: Sequence[Tensor] | None = None,
    average_weight: float | Tensor | None = None,
    out: Sequence[Tensor] | None = None,
) -> Tensor:
    """Take one step of SGD, in place, as torch.optim.SGD defines it, with all that surrounds it.

        g = grad / grad_scale * min(1, max_norm / (grad_norm / grad_scale + 1e-6))
        d = g + weight_decay * w
        buffer = momentum * buffer + d;  d = buffer   nesterov: d + momentum * buffer
        w = w - lr * d
        average = average + average_weight * (w - average);  out = w, rounded to nearest even

    The step is left out whole where `found_inf` is not zero or `grad_norm` is not finite: weights, buffers and averages
    keep their bits; `out` and the norms are those of the weights as they are. Everything is decided on the device:
    nothing waits for it, and a captured CUDA graph reads the scalars anew at every replay. Computed in fp32 (fp64 for
    fp64 weights), each line with one or two roundings.

    Args:
        weights: tensors of any shapes, one dtype (float32; float64, float16 and bfloat16 are served by the reference),
            one device.
        grads: as many tensors, of the same shapes, of any one floating dtype.
        momentum_buffers: tensors of the weights' shapes, strides and dtype, zeros before the first step; needed for
            momentum > 0, and for that alone.
        lr: learning rate >= 0, a number or a one-element tensor on the device (float32 or float64).
        weight_decay: >= 0, a number or one a tensor.
        momentum: >= 0.
        nesterov: Nesterov's momentum.
        grad_scale: what the gradients were multiplied by, a one-element float32 tensor on the device; by default 1.
        found_inf: whether to leave the step out, a one-element float32 or bool tensor on the device.
        grad_norm: the norm of all gradients as they are given (still scaled), a one-element tensor on the device
            (float32 or float64): see `total_norm`.
        max_norm: if given, gradients are shortened to this norm; needs `grad_norm`.
        averages: tensors of the weights' shapes, strides and dtype, that follow the weights; need `average_weight`.
        average_weight: what a new weight counts in its average, in [0, 1], a number or a one-element tensor on the
            device (float32 or float64).
        out: tensors of the weights' shapes and strides that take the new weights, of any one floating dtype.

    Returns:
        ||w|| of every stepped tensor, float64 [len(weights)], as `perturb_` takes it for `weight_norms`.

    Raises:
        ValueError: lengths, shapes, dtypes, devices, layouts or memory that do not fit, numbers out of range, and
            arguments that need others, named by argument.

    Sources: the update of torch.optim.SGD with dampening 0, and torch.nn.utils.clip_grad_norm_.

    Example:
        >>> import torch
        >>> from awp_kernels import sgd_step_
        >>> w, buffer = torch.tensor([3.0, 4.0]), torch.zeros(2)
        >>> sgd_step_([w], [torch.tensor([0.0, 8.0])], [buffer], lr=0.5, momentum=0.9)
        tensor([3.], dtype=torch.float64)
        >>> w
        tensor([3., 0.])
        >>> sgd_step_([w], [torch.ones(2)], [buffer], lr=0.5, momentum=0.9, found_inf=torch.tensor(True))
        tensor([3.], dtype=torch.float64)
        >>> w
        tensor([3., 0.])
    """
    weights = list(weights)
    if averages and average_weight is None:
        raise ValueError("averages: expected average_weight with them, what a new weight counts in its average")
    if average_weight is not None and not averages:
        raise ValueError(f"average_weight: expected averages with it, {len(weights)} tensors like weights")
    share = 0.0 if average_weight is None else average_weight
    return _sgd_step_(
        weights,
        list(grads),
        list(momentum_buffers or ()),
        list(averages or ()),
        list(out or ()),
        [float(decay) for decay in weight_decay]
        if isinstance(weight_decay, Sequence)
        else [float(weight_decay)] * len(weights),
        0.0 if isinstance(lr, Tensor) else float(lr),
        lr if isinstance(lr, Tensor) else None,
        float(momentum),
        nesterov,
        grad_scale,
        found_inf,
        grad_norm,
        None if max_norm is None else float(max_norm),
        0.0 if isinstance(share, Tensor) else float(share),
        share if isinstance(share, Tensor) else None,
    )

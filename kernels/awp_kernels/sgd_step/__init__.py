"""`sgd_step_`: a whole optimizer step over a list of tensors, and what belongs to it, in one pass through memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from awp_kernels import _backend, _checks

_FP32 = (torch.float32,)
_FP32_FP64 = (torch.float32, torch.float64)
_FLAG = (torch.float32, torch.bool)

_LISTS = "Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] averages, Tensor(d!)[] out"
_RULE = (
    "float[] weight_decay, float lr, Tensor? lr_tensor, float momentum, bool nesterov, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor? grad_norm, float? max_norm, float average_weight, Tensor? average_weight_tensor"
)


class _Rule(NamedTuple):
    """How weights are stepped: what follows the lists in the schema, and in every backend's signature."""

    weight_decay: Sequence[float]
    lr: float
    lr_tensor: Tensor | None
    momentum: float
    nesterov: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    grad_norm: Tensor | None
    max_norm: float | None
    average_weight: float
    average_weight_tensor: Tensor | None

    def check(self, weights: list[Tensor], momentum_buffers: list[Tensor]) -> None:
        if not weights:
            raise ValueError("weights: expected at least one tensor, got an empty list")
        _checks.finite("lr", self.lr, minimum=0)
        _checks.finite("momentum", self.momentum, minimum=0)
        if len(self.weight_decay) != len(weights):
            raise ValueError(
                f"weight_decay: expected a number, or {len(weights)} numbers like weights, got {len(self.weight_decay)}"
            )
        for index, decay in enumerate(self.weight_decay):
            _checks.finite(f"weight_decay[{index}]", decay, minimum=0)
        if self.momentum and not momentum_buffers:
            count, momentum = len(weights), f"{self.momentum:g}"
            raise ValueError(f"momentum_buffers: expected {count} tensors like weights for momentum {momentum}")
        if momentum_buffers and not self.momentum:
            raise ValueError(f"momentum: expected a number > 0 with momentum_buffers, got {self.momentum:g}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: expected momentum > 0, got momentum 0")
        if self.max_norm is not None:
            _checks.finite("max_norm", self.max_norm, minimum=0)
            if self.grad_norm is None:
                raise ValueError("max_norm: expected grad_norm with it, the norm of all gradients (see total_norm)")
        if not 0 <= self.average_weight <= 1:
            raise ValueError(f"average_weight: expected a number in [0, 1], got {self.average_weight}")

    def numbers(self, weights: list[Tensor]) -> dict[str, list[Tensor]]:
        """The numbers that lie on the device, checked."""
        scalars = {
            "lr": (self.lr_tensor, _FP32_FP64),
            "grad_scale": (self.grad_scale, _FP32),
            "found_inf": (self.found_inf, _FLAG),
            "grad_norm": (self.grad_norm, _FP32_FP64),
            "average_weight": (self.average_weight_tensor, _FP32_FP64),
        }
        result: dict[str, list[Tensor]] = {}
        for name, (tensor, dtypes) in scalars.items():
            if tensor is not None:
                _checks.scalar(name, tensor, dtypes, "weights[0]", weights[0])
                result[name] = [tensor]
        return result


def _lists(
    weights: list[Tensor], momentum_buffers: list[Tensor], averages: list[Tensor], out: list[Tensor]
) -> dict[str, list[Tensor]]:
    lists = {"weights": weights, "momentum_buffers": momentum_buffers, "averages": averages, "out": out}
    return {name: tensors for name, tensors in lists.items() if tensors or name == "weights"}


@torch.library.custom_op(
    "awp::sgd_step_",
    mutates_args=("weights", "momentum_buffers", "averages", "out"),
    schema=f"({_LISTS}, {_RULE}) -> Tensor",
)
def _sgd_step_(
    weights: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    averages: list[Tensor],
    out: list[Tensor],
    *arguments: Any,
) -> Tensor:
    rule = _Rule(*arguments)
    rule.check(weights, momentum_buffers)
    written = _lists(weights, momentum_buffers, averages, out)
    _checks.tensor_lists(written, {"grads": grads}, numbers=rule.numbers(weights))
    _checks.same_dtype("momentum_buffers", momentum_buffers, "weights", weights)
    _checks.same_dtype("averages", averages, "weights", weights)
    dtype = weights[0].dtype
    unserved = f"{dtype} for weights" if dtype in (torch.float16, torch.bfloat16) else None
    dtypes = {dtype, grads[0].dtype, *(tensor.dtype for tensor in out[:1])}
    run = _backend.select("sgd_step", weights[0].device, dtypes, unserved=unserved)
    return run(weights, grads, momentum_buffers, averages, out, *rule)


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
    _Rule(*arguments).numbers(weights)
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

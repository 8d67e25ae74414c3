"""AdamW as the step needs it: left out on the device, with masters, working copies and averages.

Source: Loshchilov, Hutter: Decoupled Weight Decay Regularization, ICLR 2019.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from awp_kernels._sharded import local
from awp_kernels._working import WorkingGradients

_EPS = 1e-8


class AdamW(WorkingGradients, Optimizer):
    """torch.optim.AdamW's step by its fused kernel, on CPUs and GPUs.

    Every parameter w with a gradient g, in its t-th step:

        m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
        w = w - lr * decay * w - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + 1e-8)

    A step whose gradients are not finite leaves weights, m, v, t and averages as they are, decided on the device.
    Gradients that are in the parameters' own precision and memory order may be overwritten. Parameters may be sharded
    by FSDP2's `fully_shard`; m and v are then sharded likewise.

    Args:
        params: parameters or groups of them, as torch.optim.Optimizer takes them.
        lr: learning rate, a number or a fp32 tensor of one element on the parameters' device, read there.
        beta1: decay of m, in [0, 1).
        beta2: decay of v, in [0, 1).
        weight_decay: >= 0.
        working: by parameter, its working copy, whose gradient is followed where it has one, and which gets the new
            weights, rounded.

    Attributes:
        averages: by parameter, a tensor that follows it.
        average_weight: what a step counts in the averages, in [0, 1], a number or a one-element tensor.
        weight_norms: empty; `awp_kernels.SGD` finds its weights' norms in passing, this step does not.

    Raises:
        ValueError: a number out of range.
    """

    average_weight: float | Tensor = 0.0

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 1e-2,
        working: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}: expected a number >= 0 and < 1, got {beta}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay: expected a number >= 0, got {weight_decay}")
        self.working: dict[Tensor, Tensor] = {} if working is None else {**working}
        self.averages: dict[Tensor, Tensor] = {}
        self.weight_norms: list[tuple[list[Tensor], Tensor]] = []
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay})

    def allocate(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, zeros where it has none yet: `exp_avg`, `exp_avg_sq` and `step`, a fp32 scalar."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        grad_norm: Tensor | None = None,
        max_norm: float | None = None,
    ) -> Any:
        """Step all parameters that have a gradient; arguments and result are those of `awp_kernels.SGD.step`.

        Raises:
            ValueError: max_norm without grad_norm.
        """
        if max_norm is not None and grad_norm is None:
            raise ValueError("max_norm: expected grad_norm with it, the norm of all gradients (see total_norm)")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = {p: gradient for p in group["params"] if (gradient := self.gradient(p)) is not None}
            by_device: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for parameter in moved:
                by_device.setdefault((parameter.device, parameter.dtype), []).append(parameter)
            for (device, _), parameters in by_device.items():
                kept, scale = kept_and_scale(device, grad_scale, found_inf, grad_norm, max_norm)
                self._step(group, parameters, [moved[p] for p in parameters], kept, scale)
        return loss

    def _step(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        kept: Tensor,
        scale: Tensor | None,
    ) -> None:
        """Of parameters on one device, in one precision."""
        states = [self.allocate(parameter) for parameter in parameters]
        torch._foreach_add_([state["step"] for state in states], [kept] * len(states))  # pyright: ignore
        rows = local(parameters)
        # shards may have no rows
        here = [index for index, row in enumerate(rows) if row.numel()]
        if here:
            given = local(gradients)
            m, v = (local([state[name] for state in states]) for name in ("exp_avg", "exp_avg_sq"))
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                [rows[i] for i in here],
                [laid_out_like(rows[i], given[i]) for i in here],
                [m[i] for i in here],
                [v[i] for i in here],
                [],
                [states[i]["step"] for i in here],
                lr=group["lr"],
                beta1=group["beta1"],
                beta2=group["beta2"],
                weight_decay=group["weight_decay"],
                eps=_EPS,
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
                found_inf=1 - kept,
            )
        share = torch.as_tensor(self.average_weight, device=kept.device) * kept
        write_along(parameters, self.working, self.averages, share)


def write_along(
    parameters: list[Tensor], working: Mapping[Tensor, Tensor], averages: Mapping[Tensor, Tensor], share: Tensor
) -> None:
    """Write parameters of one device and dtype into their working copies, rounded, and a share of them into averages.

    Args:
        parameters: as a step left them.
        working: by parameter, its working copy, where it has one.
        averages: by parameter, a tensor that follows it, likewise.
        share: of the new weights in the averages, a scalar on the device.
    """
    copied = [parameter for parameter in parameters if parameter in working]
    if copied:
        torch._foreach_copy_([working[p] for p in copied], copied)  # pyright: ignore[reportPrivateImportUsage]
    averaged = [parameter for parameter in parameters if parameter in averages]
    for average, row in zip(local([averages[p] for p in averaged]), local(averaged), strict=True):
        average.lerp_(row, share.to(row.dtype))


def kept_and_scale(
    device: torch.device,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    grad_norm: Tensor | None,
    max_norm: float | None,
) -> tuple[Tensor, Tensor | None]:
    """1, or 0 where the step is left out; and what gradients are divided by, None for 1; fp32 scalars."""
    kept, scale = torch.ones((), device=device), None
    if found_inf is not None:
        kept = kept * (found_inf.to(device).reshape(()) == 0)
    if grad_scale is not None:
        scale = grad_scale.to(device).double().reshape(())
    if grad_norm is not None:
        norm = grad_norm.to(device).double().reshape(())
        kept = kept * norm.isfinite()
        if max_norm is not None:
            length = norm if scale is None else norm / scale
            clip = (max_norm / (length + 1e-6)).clamp(max=1.0)
            scale = 1 / clip if scale is None else scale / clip
    return kept, None if scale is None else scale.float()


def laid_out_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the parameter's precision and memory order, which the fused kernel takes for granted."""
    if gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(gradient)

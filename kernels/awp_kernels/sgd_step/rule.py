"""What an SGD step is told beside its lists."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from awp_kernels import _checks

_FP32 = (torch.float32,)
_FP32_FP64 = (torch.float32, torch.float64)
_FLAG = (torch.float32, torch.bool)

SCHEMA = (
    "float[] weight_decay, float lr, Tensor? lr_tensor, float momentum, bool nesterov, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor? grad_norm, float? max_norm, float average_weight, Tensor? average_weight_tensor"
)


class Rule(NamedTuple):
    """How weights are stepped: what follows the lists in the schema, and what every backend takes."""

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
        """Refuse what does not fit."""
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

"""A model that is measured in 16 bits, as `timm` does with `--amp`: faster on a GPU, and another model."""

from typing import Literal

import torch
from torch import Tensor, nn

from awp_engine.evaluation.attacks.named import EvaluationError

PrecisionName = Literal["fp32", "bf16", "fp16"]
_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = 2.0**-6
"""Of the largest logit, what another order of summation may do to one: bf16 keeps 8 bits, and layers add up."""
# lifts the gradients of images out of fp16's underflow, and is a power of two, which rounds nothing
_SCALE = 2.0**10


class Lowered(nn.Module):
    """A model that computes in 16 bits under autocast, forward and backward; its logits are fp32.

    Args:
        model: maps images in [0, 1] to logits.
        dtype: bfloat16 or float16.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Logits, fp32 [N, L]."""
        follows = self.dtype == torch.float16 and x.requires_grad and torch.is_grad_enabled()
        if follows:
            x = x.view_as(x)
            x.register_hook(lambda gradient: gradient / _SCALE)
        with torch.autocast(x.device.type, self.dtype):
            logits = self.model(x)
        logits = logits.float()
        if follows and logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * _SCALE)
        return logits


def require_precision(precision: PrecisionName, device: torch.device) -> None:
    """Raises `EvaluationError` where a device does not compute in `precision`."""
    if precision == "fp16" and device.type == "cpu":
        raise EvaluationError("--precision: fp16 needs a GPU; on a CPU take bf16 or fp32")


def lowered(model: nn.Module, precision: PrecisionName) -> nn.Module:
    """The model, computing in `precision`."""
    return model if precision == "fp32" else Lowered(model, _DTYPES[precision])

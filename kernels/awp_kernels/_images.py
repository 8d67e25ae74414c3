"""What the operations on images share."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from awp_kernels import _backend

DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def operations() -> Any:
    """The compiled operations; None where they were not built, or where the processor is too old for them."""
    if _backend.problem("cpp", "cpu") is not None or not hasattr(torch.ops.awp_cpp, "bn_relu_available"):
        return None
    return torch.ops.awp_cpp if torch.ops.awp_cpp.bn_relu_available() else None


def usable() -> bool:
    """Whether the compiled operations are there, and no other backend was forced."""
    return _backend._forced in (None, "cpp") and operations() is not None


def plain(tensor: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
    """Whether the compiled operations can read it: no subclass, on the CPU."""
    return type(tensor) in (Tensor, Parameter) and tensor.dtype in dtypes and tensor.device.type == "cpu"


def needed(ctx: Any, index: int) -> bool:
    """Whether the running backward pass wants the gradient of input `index`.

    `ctx.needs_input_grad` is what the forward pass knew: with `torch.autograd.grad(loss, images)` the weights would get
    gradients that nobody asked for.
    """
    if not ctx.needs_input_grad[index]:
        return False
    node = ctx.next_functions[index][0]
    try:
        return torch._C._will_engine_execute_node(node)
    except (AttributeError, RuntimeError):  # RuntimeError: a leaf that torch.autograd.grad was asked for
        return True

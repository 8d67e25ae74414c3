"""What the operations on images share."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from awp_kernels import _backend

DTYPES = (torch.float32, torch.bfloat16)
_CPU = torch.device("cpu")


@functools.cache
def _ordinary(device: str) -> set[int]:
    """The dispatch keys of tensors there that are nothing else, made in inference mode or not."""
    found = {torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr()}
    with torch.inference_mode():
        return found | {torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr()}


@functools.cache
def operations() -> Any:
    """The compiled operations; None where they were not built, or where the processor is too old for them."""
    if _backend.problem("cpp", "cpu") is not None or not hasattr(torch.ops.awp_cpp, "bn_act_available"):
        return None
    return torch.ops.awp_cpp if torch.ops.awp_cpp.bn_act_available() else None


def torchs_own() -> bool:
    """Whether torch's own operations have to compute, because something follows them that cannot follow the compiled
    ones: an exporter or tracer, a transform of torch.func, forward-mode derivatives, a mode that sees every call.
    """
    # the flag behind `is_exporting()`, which torch 2.11's compiler takes for true
    exporting = torch.compiler._is_exporting_flag
    if exporting or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling():  # follows an operation of its own, and cannot look into what is asked below
        return False
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    return modes > 0 or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def usable() -> bool:
    """Whether the compiled operations are there, may serve, and no other backend was forced."""
    return _backend._forced in (None, "cpp") and operations() is not None and not torchs_own()


def plain(tensor: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES, device: torch.device = _CPU) -> bool:
    """Whether the compiled operations can read it: no subclass, strided, on the device."""
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.dtype in dtypes
        and tensor.device == device
        and tensor.layout is torch.strided
    )


def once(grad: Tensor, *saved: Tensor | None) -> bool:
    """Whether the compiled operations serve a backward pass over these: nobody will differentiate it again.

    Batches of gradients (`is_grads_batched`) and the like look like plain tensors and are told by their dispatch keys.
    """
    return (
        not torch.is_grad_enabled()
        and not torchs_own()
        and torch._C._dispatch_keys(grad).raw_repr() in _ordinary(grad.device.type)
        and all(tensor is None or plain(tensor, _backend.DTYPES, grad.device) for tensor in (grad, *saved))
    )


def edges(*inputs: Tensor | None) -> list[int]:
    """Where each input stands among those that are tensors, which is how `ctx.next_functions` counts."""
    return [sum(tensor is not None for tensor in inputs[:index]) for index in range(len(inputs))]


def needed(ctx: Any, index: int, edge: int | None = None) -> bool:
    """Whether the running backward pass wants the gradient of input `index`, at `edge` of the tensors among the inputs.

    `ctx.needs_input_grad` is what the forward pass knew: with `torch.autograd.grad(loss, images)` the weights would get
    gradients that nobody asked for.
    """
    if not ctx.needs_input_grad[index]:
        return False
    node = ctx.next_functions[index if edge is None else edge][0]
    try:
        return torch._C._will_engine_execute_node(node)
    except (AttributeError, RuntimeError):  # RuntimeError: a leaf that torch.autograd.grad was asked for
        return True

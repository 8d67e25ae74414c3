"""`pooled_linear`: the end of a convolutional network, mean over all pixels and linear layer, in one."""

from typing import Any

import torch
from torch import Tensor

from awp_kernels import _backend, _checks, _images
from awp_kernels._images import needed
from awp_kernels.pooled_linear import reference

__all__ = ["pooled_linear", "pooled_linear_available"]

# every program of a launch reads all weights: beyond, a matrix product is faster
_CLASSES, _WEIGHTS = 256, 2**16


def pooled_linear_available(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether `pooled_linear` of these tensors is computed by this package's kernel; if not, torch computes it.

    It is for CUDA tensors, where Triton is installed: images and weights in fp32 or 16 bits, up to 256 classes and
    65,536 weights, an fp32 bias. Not under autocast, while a model is compiled, exported or traced, nor under
    transforms of torch.func, forward-mode derivatives, or modes.

    Args:
        x: images.
        weight: of the linear layer.
        bias: of the linear layer.
    """
    if torch.compiler.is_compiling() or _images.torchs_own():
        return False
    device = x.device
    if _backend._forced not in (None, "triton") or (_backend._forced is None and device.type != "cuda"):
        return False
    if _backend.problem("triton", device.type) is not None or torch.is_autocast_enabled(device.type):
        return False
    fits = x.ndim == 4 and 0 < x.numel() < 2**31 * len(x) and weight.ndim == 2 and bias.ndim == 1
    return (
        fits
        and 0 < len(weight) <= _CLASSES
        and weight.numel() <= _WEIGHTS
        and all(_images.plain(tensor, _backend.DTYPES, device) for tensor in (x, weight))
        and _images.plain(bias, (torch.float32,), device)
    )


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: expected a batch [N, C, H, W], got shape {tuple(x.shape)}")
    if not x.shape[2] or not x.shape[3]:
        raise ValueError(f"x: expected a height and a width of at least 1, got shape {tuple(x.shape)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected shape [K, {x.shape[1]}] for the channels of x, got {tuple(weight.shape)}")
    if bias.ndim != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias: expected {weight.shape[0]} values, one a row of weight, got {tuple(bias.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        _checks.image_operand(name, tensor)
        _checks.same_device(name, tensor, "x", x)


def _kernels() -> Any:
    from awp_kernels.pooled_linear import triton

    return triton


def _forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return _kernels().pooled_linear(x, weight.contiguous(), bias.contiguous())


class _PooledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # without a gradient of the weights, no pixel is read again
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return _forward(x, weight, bias)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = (needed(ctx, index) for index in range(3))
        of_x = of_weight = None
        if wants_x and _images.once(grad, x, weight):
            of_x = _kernels().pooled_linear_gradient(grad.contiguous(), weight.contiguous(), ctx.shape, ctx.dtype)
        elif wants_x:  # what can be differentiated again
            of_x = reference.pooled_linear_gradient(grad, weight, ctx.shape, ctx.dtype)
        if wants_weight:
            of_weight = (grad.t() @ x.mean((2, 3), dtype=grad.dtype)).to(weight.dtype)
        return of_x, of_weight, grad.sum(0) if wants_bias else None


def pooled_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """linear(mean of x over its pixels), with sums and products in the bias's dtype, which is full where others are 16
    bits.

    On a GPU one launch forward, and one backward for the gradient of x; those of weight and bias are torch's. Where
    `pooled_linear_available` says no, torch computes all of it, by average pooling and linear layer. Differentiable any
    number of times: with `create_graph` the gradients are computed by torch's own operations. Kept for the backward
    pass: x, where the weight asks for a gradient.

    Args:
        x: [N, C, H, W]; on a GPU it is copied where it is not channels_last.
        weight: [K, C].
        bias: [K].

    Returns:
        Logits [N, K], in bias's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, named by argument; Triton was forced but does not serve
            them.
    """
    _check(x, weight, bias)
    if not pooled_linear_available(x, weight, bias):
        if _backend._forced == "triton" and x.numel() and not torch.compiler.is_compiling():
            raise ValueError(
                f"backend 'triton' was forced but does not pool {x.dtype} on {x.device.type} for {len(weight)} classes "
                "here"
            )
        return reference.pooled_linear(x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias)):
        return _PooledLinear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return _forward(x, weight, bias)

"""`bn_relu`: batch normalisation and ReLU in one, on the CPU."""

from typing import Any

import torch
from torch import Tensor

from awp_kernels import _backend, _checks, _images
from awp_kernels._images import needed, operations
from awp_kernels.bn_relu import reference

__all__ = ["bn_relu", "bn_relu_available"]


def _plain_vector(tensor: Tensor | None) -> bool:
    return tensor is None or (_images.plain(tensor, (torch.float32,)) and tensor.is_contiguous())


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def bn_relu_available(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether `bn_relu` with these tensors is computed by the compiled kernel; if not, torch computes it.

    It is for fp32 and bf16 images on the CPU with fp32 parameters and statistics, where the library was built and the
    processor has AVX2 with FMA or AVX-512; not while a model is exported or traced, nor under transforms of torch.func,
    forward-mode derivatives, or modes.

    Args:
        x: images.
        vectors: weight, bias, running_mean, running_var.
    """
    return _images.usable() and _images.plain(x) and all(map(_plain_vector, vectors)) and x.ndim == 4 and x.numel() > 0


def _check(x: Tensor, vectors: dict[str, Tensor | None], training: bool) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: expected a batch [N, C, H, W], got shape {tuple(x.shape)}")
    _checks.image_operand("x", x)
    channels = x.shape[1]
    for name, tensor in vectors.items():
        if tensor is not None:
            _checks.image_operand(name, tensor)
        if tensor is not None and (tensor.ndim != 1 or tensor.shape[0] != channels):
            raise ValueError(f"{name}: expected {channels} values, one a channel of x, got {tuple(tensor.shape)}")
        if tensor is not None:
            _checks.same_device(name, tensor, "x", x)
    for name in ("running_mean", "running_var"):
        if (tensor := vectors[name]) is not None and not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous values, got strides {tensor.stride()}")
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name}: expected statistics without a gradient, got requires_grad=True; detach them")
    if (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        raise ValueError("running_var: expected together with running_mean, or neither")
    if not training and vectors["running_mean"] is None:
        raise ValueError("running_mean: expected running statistics with training=False, got None")
    if training and x.numel() and x.numel() == channels:
        raise ValueError(f"x: expected more than one value a channel with training=True, got shape {tuple(x.shape)}")


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    want_mask: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output, and the table and the mask that the backward pass takes; x is channels_last."""
    samples, channels, height, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    stride = (channels + 15) // 16 * 16
    table = torch.empty((4, stride), dtype=torch.float32, device="cpu")
    mask = None
    if training:
        operations().bn_relu_train.default(x, weight, bias, running_mean, running_var, momentum, eps, out, table)
        if running_mean is not None and running_var is not None:
            torch.autograd.graph.increment_version((running_mean, running_var))
    else:
        if want_mask:
            mask = torch.empty((samples * height * width, stride // 8), dtype=torch.uint8, device="cpu")
        operations().bn_relu_eval.default(x, weight, bias, running_mean, running_var, eps, out, table, mask)
    return out, table, mask


def _differentiable(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    table: Tensor,
    mask: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The gradients for x, weight and bias by torch's own operations, which can be differentiated again."""
    samples, channels, height, width = grad.shape
    mean, invstd, scale, shift = (row[:channels].view(1, -1, 1, 1) for row in table)
    pixels = (0, 2, 3)
    if x is None:
        assert mask is not None
        bits = mask.unsqueeze(-1).bitwise_and(2 ** torch.arange(8, dtype=torch.uint8, device="cpu")).flatten(1)
        zero = bits[:, :channels].eq(0).view(samples, height, width, channels).permute(0, 3, 1, 2)
        grad_x = grad = grad.float().masked_fill(zero, 0)
        grad_weight = None
    else:
        wide = x.float()
        grad_x = grad = grad.float().masked_fill((wide.detach() - mean) * scale + shift <= 0, 0)  # NaN goes through
        if training:  # what the batch's statistics owe to x
            mean = wide.mean(pixels, keepdim=True)
            invstd = ((wide - mean).square().mean(pixels, keepdim=True) + eps).rsqrt()
        normalized = (wide - mean) * invstd
        product = grad * normalized
        if training:
            grad_x = grad - grad.mean(pixels, keepdim=True) - normalized * product.mean(pixels, keepdim=True)
        grad_weight = product.sum(pixels)
    grad_x = grad_x * (invstd if weight is None else invstd * weight.view(1, -1, 1, 1))
    return grad_x, grad_weight, grad.sum(pixels)


class _BnRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        # in eval mode the gradient for x alone needs one bit an element
        want_mask = not training and not ctx.needs_input_grad[1] and not ctx.needs_input_grad[2]
        out, table, mask = _forward(x, weight, bias, running_mean, running_var, training, momentum, eps, want_mask)
        ctx.save_for_backward(None if want_mask else x, table, mask, weight)
        ctx.training, ctx.eps = training, eps
        return out

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, table, mask, weight = ctx.saved_tensors
        wanted = tuple(needed(ctx, index) for index in range(3))
        if not _images.once(grad, x):
            grad_x, *others = _differentiable(grad, x, weight, table, mask, ctx.training, ctx.eps)
            found = zip((grad_x.to(grad.dtype), *others), wanted, strict=True)
            return *(gradient if want else None for gradient, want in found), None, None, None, None, None
        channels = grad.shape[1]
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = torch.empty_like(grad) if wanted[0] else None
        grad_weight = grad.new_empty(channels, dtype=torch.float32) if wanted[1] else None
        grad_bias = grad.new_empty(channels, dtype=torch.float32) if wanted[2] else None
        operations().bn_relu_backward.default(grad, x, table, mask, ctx.training, grad_x, grad_weight, grad_bias)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def bn_relu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """relu(batch_norm(x)), as `torch.nn.functional` has them.

    On the CPU in two passes over x, with sums in fp32 over at most 64 rows and in fp64 over
    these; elsewhere, under torch.compile, for other dtypes, and where `bn_relu_available` says no by torch.
    Differentiable any number of times with respect to x, weight and bias: with `create_graph` the gradients are
    computed by torch's own operations. Kept for the backward pass: x itself and four values a channel; in eval mode,
    where neither weight nor bias needs a gradient, one bit an element instead of x.

    Args:
        x: [N, C, H, W]; in another order than channels_last it is copied.
        weight: [C]; None: 1.
        bias: [C]; None: 0.
        running_mean: [C], contiguous; with `training` it is moved in place, or may be None.
        running_var: [C], likewise; it takes the unbiased variance.
        training: normalise by the batch, else by the running statistics.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.

    Returns:
        [N, C, H, W], x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, named by argument; one value a channel with `training`; a
            backend that was forced does not serve them.
    """
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check(x, vectors, training)
    # torch 2.13's backward pass reads strided parameters as if they were contiguous
    weight, bias = _contiguous(weight), _contiguous(bias)
    if torch.compiler.is_compiling():
        return reference.bn_relu(x, weight, bias, running_mean, running_var, training, momentum, eps)
    if not bn_relu_available(x, weight, bias, running_mean, running_var):
        if _backend._forced == "cpp":
            raise ValueError(f"backend 'cpp' was forced but does not normalise {x.dtype} on {x.device.type} here")
        return reference.bn_relu(x, weight, bias, running_mean, running_var, training, momentum, eps)
    x = x.contiguous(memory_format=torch.channels_last)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _BnRelu.apply(x, weight, bias, running_mean, running_var, training, momentum, eps)
    return _forward(x, weight, bias, running_mean, running_var, training, momentum, eps, False)[0]

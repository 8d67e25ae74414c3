"""`conv3x3`: 3x3 convolution on the CPU by Winograd's F(4x4, 3x3), in fp32 arithmetic; `stem3x3`: of few channels."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from awp_kernels import _backend, _checks, _images
from awp_kernels._images import needed
from awp_kernels.conv import _weights, reference
from awp_kernels.conv._weights import forget_all as conv3x3_forget
from awp_kernels.conv._weights import held_bytes as conv3x3_held_bytes

__all__ = [
    "conv3x3",
    "conv3x3_available",
    "conv3x3_forget",
    "conv3x3_held_bytes",
    "stem3x3",
    "stem3x3_available",
]

# that images may have for `stem3x3`, and that the outputs are a multiple of
_FEW_CHANNELS, _OUTPUTS = 4, 16

# torch.compile reads a constant, and would look into a function
_BUILT = _images.operations() is not None
_MULTIPLIES_BF16 = _BUILT and _weights.multiplies_bf16(_images.operations())


def conv3x3_available(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv3x3(x, weight)` is computed by the compiled kernel; if not, `conv2d` computes it.

    It is for fp32 and bf16 CPU tensors, where the library was built and the processor has AVX2 with FMA or AVX-512; not
    while a model is exported or traced, nor under transforms of torch.func, forward-mode derivatives, or modes.
    """
    if torch.compiler.is_compiling():
        usable = _BUILT and _backend._forced in (None, "cpp") and not _images.torchs_own()
        return usable and x.device.type == "cpu" and x.dtype in _images.DTYPES and weight.dtype in _images.DTYPES
    # shapes last: while tracing they are tensors
    if not (_images.usable() and _images.plain(x) and _images.plain(weight)):
        return False
    return x.ndim == 4 and weight.ndim == 4 and weight.shape[2:] == (3, 3) and x.numel() > 0 and weight.numel() > 0


def _check(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: expected a batch [N, C, H, W], got shape {tuple(x.shape)}")
    if weight.ndim != 4 or weight.shape[2] != 3 or weight.shape[3] != 3:
        raise ValueError(f"weight: expected shape [K, C, 3, 3], got {tuple(weight.shape)}")
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected {x.shape[1]} input channels like x, got shape {tuple(weight.shape)}")
    _checks.same_device("weight", weight, "x", x)
    if not x.shape[2] or not x.shape[3]:
        raise ValueError(f"x: expected a height and a width of at least 1, got shape {tuple(x.shape)}")
    for name, tensor in (("x", x), ("weight", weight)):
        _checks.image_operand(name, tensor)


def _channels_last(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)


def _forward(x: Tensor, weight: Tensor, bf16: bool) -> tuple[Tensor, tuple[Any, ...] | None]:
    """The output, and the state of the weights."""
    operations = _images.operations()
    samples, _, height, width = x.shape
    out = _channels_last((samples, weight.shape[0], height, width), x.dtype)
    u, state = _weights.transformed(operations, weight, False, bf16)
    operations.conv3x3.default(x.contiguous(memory_format=torch.channels_last), u, out)
    return out, state


def _grad_x(grad: Tensor, weight: Tensor, bf16: bool, state: tuple[Any, ...] | None = None) -> Tensor:
    operations = _images.operations()
    samples, _, height, width = grad.shape
    out = _channels_last((samples, weight.shape[1], height, width), grad.dtype)
    u, _ = _weights.transformed(operations, weight, True, bf16, state)
    operations.conv3x3.default(grad.contiguous(memory_format=torch.channels_last), u, out)
    return out


def _grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """[K, C, 3, 3] in fp32, channels_last in memory."""
    out = torch.empty((grad.shape[1], 3, 3, x.shape[1]), dtype=torch.float32, device="cpu")
    _images.operations().conv3x3_grad_weight.default(
        x.contiguous(memory_format=torch.channels_last), grad.contiguous(memory_format=torch.channels_last), out
    )
    return out.permute(0, 3, 1, 2)


def _differentiable(
    grad: Tensor, x: Tensor | None, weight: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Both gradients by torch's own operation, which can be differentiated again."""
    if x is None:  # not kept where the weight asks for no gradient: only its shape counts
        x = grad.new_empty(1).expand(grad.shape[0], weight.shape[1], *grad.shape[2:])
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad, x, weight.to(grad.dtype), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*wanted, False]
    )
    return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bf16: bool) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        out, ctx.state = _forward(x, weight, bf16)
        ctx.bf16 = bf16
        return out

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = needed(ctx, 0), needed(ctx, 1)
        if not _images.once(grad, x, weight):
            return *_differentiable(grad, x, weight, wanted), None
        grad_x = _grad_x(grad, weight, ctx.bf16, ctx.state) if wanted[0] else None
        return grad_x, _grad_weight(grad, x) if wanted[1] else None, None


# The same for torch.compile, which must not look inside: the memory of weights goes by object. Called one by one these
# cost 100 us more than the function above.


@torch.library.custom_op("awp::conv3x3", mutates_args=(), device_types="cpu")
def _traced(x: Tensor, weight: Tensor, bf16: bool) -> Tensor:
    if forward_ad._current_level >= 0:  # torch drops the tangents of its custom operations without a word
        raise RuntimeError("torch.ops.awp.conv3x3: no forward-mode derivatives; call awp_kernels.conv3x3")
    return _forward(x, weight, bf16)[0]


@torch.library.custom_op("awp::conv3x3_grad_x", mutates_args=(), device_types="cpu")
def _traced_grad_x(grad: Tensor, weight: Tensor, bf16: bool) -> Tensor:
    return _grad_x(grad, weight, bf16)


@torch.library.custom_op("awp::conv3x3_grad_weight", mutates_args=(), device_types="cpu")
def _traced_grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    return _grad_weight(grad, x)


@_traced.register_fake
def _(x: Tensor, weight: Tensor, bf16: bool) -> Tensor:
    shape = (x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@_traced_grad_x.register_fake
def _(grad: Tensor, weight: Tensor, bf16: bool) -> Tensor:
    shape = (grad.shape[0], weight.shape[1], grad.shape[2], grad.shape[3])
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)


@_traced_grad_weight.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((grad.shape[1], 3, 3, x.shape[1]), dtype=torch.float32).permute(0, 3, 1, 2)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    x, weight, ctx.bf16 = inputs
    ctx.save_for_backward(x, weight)


def _traced_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, _ = ctx.needs_input_grad
    if torch.is_grad_enabled():
        return *_differentiable(grad, x, weight, (need_x, need_weight)), None
    return (
        _traced_grad_x(grad, weight, ctx.bf16) if need_x else None,
        _traced_grad_weight(grad, x).to(weight.dtype) if need_weight else None,
        None,
    )


_traced.register_autograd(_traced_backward, setup_context=_setup_context)


def conv3x3(x: Tensor, weight: Tensor, *, products: Literal["fp32", "bf16"] = "fp32") -> Tensor:
    """Convolve with 3x3 weights, stride 1, padding 1, without bias.

    On the CPU by Winograd's F(4x4, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016) in
    fp32 arithmetic, whatever the storage; elsewhere, and for other dtypes, by `torch.nn.functional.conv2d`. Transformed
    weights are kept until the weights change: 4 bytes times 36 for every 9 weights (with bf16 products half of it), and
    as much again once a gradient with respect to x was taken.

    With bf16 products, transformed images and weights are rounded to bf16 before they are multiplied, where the
    processor has instructions for that; sums stay fp32. The result is off by 1% (root mean square), six times what
    storing it in bf16 costs: enough to climb a loss by, not to train weights with. The weight's gradient stays fp32.

    Differentiable any number of times: with `create_graph` the gradients are computed by torch's own operations, and so
    is the convolution where `conv3x3_available` says no. The result has x's dtype and is channels_last; x in another
    order is copied.

    Args:
        x: [N, C, H, W]. Under autocast to bf16 it is cast first, as for `conv2d`.
        weight: [K, C, 3, 3], of x's dtype or fp32. Its gradient is computed in fp32.
        products: "fp32" or "bf16"; what no compiled kernel serves ignores it, as does a processor without bf16.

    Returns:
        [N, K, H, W].

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, named by argument; a backend that was forced does not
            serve them.
    """
    _check(x, weight)
    _checks.one_of("products", products, ("fp32", "bf16"))
    bf16 = products == "bf16" and _MULTIPLIES_BF16
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    if not conv3x3_available(x, weight):
        if _backend._forced == "cpp":
            raise ValueError(
                f"backend 'cpp' was forced but does not convolve {x.dtype} by {weight.dtype} on {x.device.type} here"
            )
        return reference.conv3x3(x, weight)
    if torch.compiler.is_compiling():
        return _traced(x, weight, bf16)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Conv3x3.apply(x, weight, bf16)
    return _forward(x, weight, bf16)[0]


def stem3x3_available(x: Tensor, weight: Tensor) -> bool:
    """Whether `stem3x3(x, weight)` is computed by the compiled kernel; if not, `conv2d` computes it.

    It is for fp32 CPU images of up to 4 channels, and weights in fp32 or bf16 of outputs in sixteens; else as for
    `conv3x3_available`, and not under torch.compile.
    """
    if torch.compiler.is_compiling() or not (_images.usable() and _images.plain(x, (torch.float32,))):
        return False
    few = x.ndim == 4 and 0 < x.shape[1] <= _FEW_CHANNELS and x.numel() > 0
    return few and _images.plain(weight) and weight.ndim == 4 and weight.shape[0] % _OUTPUTS == 0 < weight.numel()


def _by_tap(weight: Tensor) -> Tensor:
    """[K, C, 3, 3] as fp32 [9, C, K]."""
    return weight.permute(2, 3, 1, 0).reshape(9, *weight.shape[1::-1]).float().contiguous()


class _Stem3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        out = _channels_last((len(x), len(weight), *x.shape[2:]), weight.dtype)
        _images.operations().stem3x3.default(x.contiguous(memory_format=torch.channels_last), _by_tap(weight), out)
        return out

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight = needed(ctx, 0), needed(ctx, 1)
        by_torch, grad_x, grad_weight = wants_x and not _images.once(grad, x, weight), None, None
        # an attack's pass gets by without a copy of the gradient in fp32
        if by_torch or wants_weight:
            grad_x, grad_weight = _differentiable(grad.float(), x, weight, (by_torch, wants_weight))
        if wants_x and not by_torch:
            grad_x = _channels_last((len(grad), weight.shape[1], *grad.shape[2:]), torch.float32)
            grad = grad.contiguous(memory_format=torch.channels_last)
            _images.operations().stem3x3_grad_x.default(grad, _by_tap(weight), grad_x)
        return grad_x, grad_weight


def stem3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve fp32 images with 3x3 weights, stride 1, padding 1, without bias, rounded to the weights' dtype.

    On the CPU, for images of up to 4 channels, directly, in fp32; the gradient with respect to x reads that of the
    output as it is stored. Elsewhere by `torch.nn.functional.conv2d` in fp32. Differentiable any number of times.

    Args:
        x: [N, C, H, W], fp32; in another order than channels_last it is copied.
        weight: [K, C, 3, 3]. Its gradient is computed in fp32.

    Returns:
        [N, K, H, W] in weight's dtype, channels_last on the CPU.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, named by argument.
    """
    _check(x, weight)
    if not stem3x3_available(x, weight):
        return reference.stem3x3(x, weight)
    return _Stem3x3.apply(x, weight)  # pyright: ignore[reportReturnType]

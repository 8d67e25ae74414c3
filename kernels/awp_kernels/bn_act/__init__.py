"""`bn_act`: batch normalisation and activation in one; `add_bn_act`: with the residual sum before them."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from awp_kernels import _backend, _checks, _images
from awp_kernels._images import needed
from awp_kernels.bn_act import reference
from awp_kernels.bn_act.reference import Ranks

__all__ = ["Ranks", "add_bn_act", "bn_act", "bn_act_available"]

Activation = Literal["none", "relu", "silu"]
_ACTIVATIONS = ("none", "relu", "silu")
# channels whose bits a kernel writes at a time, of those that write any
_BITS = {"cpp": 1, "cuda": 8}


class _Rule(NamedTuple):
    """What stays the same from call to call of a layer."""

    training: bool
    momentum: Any  # with ranks it may be a tensor
    eps: float
    activation: str
    ranks: Ranks | None


def serving(x: Tensor) -> str | None:
    """The backend whose kernels serve images like x here; None: torch does."""
    device, dtype = x.device.type, x.dtype
    backend = _backend._forced or {"cpu": "cpp", "cuda": "cuda"}.get(device, "reference")
    if backend == "cuda" and _backend._forced is None and _backend.problem(backend, device) is not None:
        backend = "triton"
    if backend == "cpp":
        served = device == "cpu" and dtype in _images.DTYPES and _images.operations() is not None
    else:
        served = backend != "reference" and dtype in _backend.DTYPES and _backend.problem(backend, device) is None
    return backend if served else None


def _plain_vector(tensor: Tensor | None, device: torch.device) -> bool:
    return tensor is None or (_images.plain(tensor, (torch.float32,), device) and tensor.is_contiguous())


def bn_act_available(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether `bn_act` with these tensors is computed by one of this package's kernels; if not, torch computes it.

    They are for fp32 and 16-bit images with fp32 parameters and statistics: on CUDA for images in channels_last order;
    on the CPU for fp32 and bf16, where the library was built and the processor has AVX2 with FMA or AVX-512. Not while
    a model is compiled, exported or traced, nor under transforms of torch.func, forward-mode derivatives, or modes.

    Args:
        x: images.
        vectors: weight, bias, running_mean, running_var.
    """
    if torch.compiler.is_compiling() or _images.torchs_own() or x.ndim != 4 or not x.numel():
        return False
    if not _images.plain(x, _backend.DTYPES, x.device) or serving(x) is None:
        return False
    # what was forced serves any order, by a copy
    copied = x.device.type == "cpu" or _backend._forced is not None
    ordered = copied or x.is_contiguous(memory_format=torch.channels_last)
    return ordered and all(_plain_vector(tensor, x.device) for tensor in vectors)


def _check(x: Tensor, residual: Tensor | None, vectors: dict[str, Tensor | None], rule: _Rule) -> None:
    if x.ndim != 4:
        raise ValueError(f"x: expected a batch [N, C, H, W], got shape {tuple(x.shape)}")
    _checks.one_of("activation", rule.activation, _ACTIVATIONS)
    _checks.image_operand("x", x)
    channels = x.shape[1]
    if residual is not None:
        _checks.image_operand("residual", residual)
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(
                f"residual: expected {x.dtype} of shape {tuple(x.shape)} like x, got {residual.dtype} of shape "
                f"{tuple(residual.shape)}"
            )
        _checks.same_device("residual", residual, "x", x)
    given = {name: tensor for name, tensor in vectors.items() if tensor is not None}
    for name, tensor in given.items():
        _checks.image_operand(name, tensor)
        if tensor.ndim != 1 or tensor.shape[0] != channels:
            raise ValueError(f"{name}: expected {channels} values, one a channel of x, got {tuple(tensor.shape)}")
        _checks.same_device(name, tensor, "x", x)
    for name in [name for name in ("running_mean", "running_var") if name in given]:
        if not (tensor := given[name]).is_contiguous():
            raise ValueError(f"{name}: expected contiguous values, got strides {tensor.stride()}")
        if tensor.requires_grad:
            raise ValueError(f"{name}: expected statistics without a gradient, got requires_grad=True; detach them")
    if (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        raise ValueError("running_var: expected together with running_mean, or neither")
    if not rule.training and vectors["running_mean"] is None:
        raise ValueError("running_mean: expected running statistics with training=False, got None")
    if rule.ranks is not None and not rule.training:
        raise ValueError("ranks: expected with training=True alone, as nothing else is shared")
    if rule.training and rule.ranks is None and x.numel() and x.numel() == channels:
        raise ValueError(f"x: expected more than one value a channel with training=True, got shape {tuple(x.shape)}")


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rule: _Rule,
    want_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """z, y, and the table, the mask and the number of values that the backward pass takes; images are channels_last."""
    samples, channels, height, width = x.shape
    backend = serving(x)
    run = _implementation(backend)
    y = torch.empty_like(x)
    z = None if residual is None else torch.empty_like(x)
    stride = (channels + 15) // 16 * 16
    table = torch.empty((4, stride), dtype=torch.float32, device=x.device)
    mask = count = None
    kind = _ACTIVATIONS.index(rule.activation)
    if rule.ranks is not None:
        own = torch.empty((2, channels), dtype=torch.float64, device=x.device)
        run.bn_act_train(x, residual, None, None, None, None, 0.0, rule.eps, kind, z, None, table, own)
        rows, running = x.numel() // channels, (running_mean, running_var)
        mean, variance, count = reference.over_ranks(rule.ranks, own, rows, *running, rule.momentum)
        z = x if z is None else z
        run.bn_act_eval(z, None, weight, bias, mean.float(), variance.float(), rule.eps, kind, None, y, table, None)
    elif rule.training:
        vectors = weight, bias, running_mean, running_var
        run.bn_act_train(x, residual, *vectors, rule.momentum, rule.eps, kind, z, y, table, None)
        if running_mean is not None and running_var is not None:
            torch.autograd.graph.increment_version((running_mean, running_var))
    else:
        if want_mask and backend in _BITS and channels % _BITS[backend] == 0:
            mask = torch.empty((samples * height * width, stride // 8), dtype=torch.uint8, device=x.device)
        run.bn_act_eval(x, residual, weight, bias, running_mean, running_var, rule.eps, kind, z, y, table, mask)
    return x if z is None else z, y, table, mask, count


def _differentiable(
    grad: Tensor,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    mask: Tensor | None,
    rule: _Rule,
) -> tuple[Tensor | None, ...]:
    """The gradients for z, weight and bias by torch's own operations, which can be differentiated again."""
    samples, channels, height, width = grad.shape
    mean, invstd, scale, shift = (row[:channels].view(1, -1, 1, 1) for row in table)
    if z is None:
        assert mask is not None
        bits = mask.unsqueeze(-1).bitwise_and(2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)).flatten(1)
        zero = bits[:, :channels].eq(0).view(samples, height, width, channels).permute(0, 3, 1, 2)
        # the weight itself, which may have come to ask for a gradient
        scale = scale if weight is None else invstd * weight.view(1, -1, 1, 1)
        return grad.float().masked_fill(zero, 0) * scale, None, None
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # tensors of this pass alone, as hooks of the inputs are not to be called here
        z = z.view_as(z)
        weight, bias = (None if t is None else t.view_as(t) for t in (weight, bias))
        wide = z.float()
        fixed = (wide.detach() - mean) * scale + shift
        if rule.training:  # what the batch's statistics owe to z
            mean = wide.mean((0, 2, 3), keepdim=True)
            invstd = ((wide - mean).square().mean((0, 2, 3), keepdim=True) + rule.eps).rsqrt()
        u = (wide - mean) * invstd
        u = u if weight is None else u * weight.view(1, -1, 1, 1)
        u = u if bias is None else u + bias.view(1, -1, 1, 1)
        # zeros are those of the kernel, and NaN goes through; silu's own gradient has no forward-mode derivative
        if rule.activation != "none":
            u = u * u.sigmoid() if rule.activation == "silu" else u.masked_fill(fixed <= 0, 0)
        given = [t for t in (z, weight, bias) if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(u, given, grad.float(), create_graph=again))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in (z, weight, bias))


class _BnAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        rule: _Rule,
    ) -> Any:
        # in eval mode the gradient for x alone needs one bit an element
        frozen = not ctx.needs_input_grad[2] and not ctx.needs_input_grad[3]
        want_mask = rule.activation == "relu" and not rule.training and frozen
        z, y, table, mask, count = _forward(x, residual, weight, bias, running_mean, running_var, rule, want_mask)
        ctx.save_for_backward(None if mask is not None else z, table, mask, weight, bias, count)
        # the backend that made the table and the mask, whatever is forced by then
        ctx.backend = serving(x)
        ctx.rule, ctx.has_residual = rule, residual is not None
        ctx.edges = _images.edges(x, residual, weight, bias)
        ctx.set_materialize_grads(False)
        return y if residual is None else (z, y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        z, table, mask, weight, bias, count = ctx.saved_tensors
        grad_z, grad = grads if ctx.has_residual else (None, *grads)
        wanted = [needed(ctx, index, edge) for index, edge in enumerate(ctx.edges)]
        images, rest = wanted[0] or wanted[1], (None, None, None)
        if grad is None:
            return *(grad_z if want else None for want in wanted[:2]), None, None, *rest
        # a gradient in another form than torch's own tensors is torch's to compute with
        if not _images.once(grad, z, grad_z):
            if ctx.rule.ranks is not None:
                reference.refuse_second_derivatives()
            of_z, of_weight, of_bias = _differentiable(grad, z, weight, bias, table, mask, ctx.rule)
            if of_z is not None and images:
                of_z = of_z.to(grad.dtype)
                of_z = of_z if grad_z is None else of_z + grad_z
            return *(of_z if want else None for want in wanted[:2]), of_weight, of_bias, *rest
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_z = None if grad_z is None else grad_z.contiguous(memory_format=torch.channels_last)
        of_x = torch.empty_like(grad) if images else None
        channels, ranks, run = grad.shape[1], ctx.rule.ranks, _implementation(ctx.backend)
        saved = z, table, mask, _ACTIVATIONS.index(ctx.rule.activation), ctx.rule.training
        # ranks share the sums that make both
        wants = [want or ranks is not None for want in wanted[2:]]
        vectors: list[Any] = [grad.new_empty(channels, dtype=torch.float32) if want else None for want in wants]
        if ranks is None:
            run.bn_act_backward(grad, grad_z, *saved, None, of_x, *vectors)
            return *(of_x if want else None for want in wanted[:2]), *vectors, *rest
        run.bn_act_backward(grad, None, *saved, None, None, *vectors)
        # by what the forward pass knew: other ranks, whose part may be empty, ask for the same
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            of_weight, of_bias = (ranks.add(torch.cat(vectors).double()) / count).chunk(2)
            coefficients = table.new_zeros((2, table.shape[1]))
            coefficients[:, :channels] = torch.stack([of_bias, of_weight * table[1, :channels]])
            run.bn_act_backward(grad, grad_z, *saved, coefficients, of_x, None, None)
        found = of_x, of_x, *vectors
        return *(gradient if want else None for gradient, want in zip(found, wanted, strict=True)), *rest


def _implementation(backend: str | None) -> Any:
    """What has bn_act_train, bn_act_eval and bn_act_backward."""
    if backend in ("cpp", "cuda"):
        return getattr(torch.ops, f"awp_{backend}")
    from awp_kernels.bn_act import triton

    return triton


def _compute(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rule: _Rule,
) -> tuple[Tensor, Tensor]:
    """The sum z, and y."""
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    _check(x, residual, vectors, rule)
    # torch 2.13's backward pass reads strided parameters as if they were contiguous
    weight, bias = (None if tensor is None else tensor.contiguous() for tensor in (weight, bias))
    arguments = x, residual, weight, bias, running_mean, running_var
    available = bn_act_available(x, weight, bias, running_mean, running_var)
    if not available or not (residual is None or _images.plain(residual, (x.dtype,), x.device)):
        if _backend._forced not in (None, "reference") and x.numel() and not torch.compiler.is_compiling():
            raise ValueError(
                f"backend '{_backend._forced}' was forced but does not normalise {x.dtype} on {x.device.type} here"
            )
        return reference.bn_act(*arguments, *rule)
    x = x.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    arguments = x, residual, weight, bias, running_mean, running_var
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments):
        found = _BnAct.apply(*arguments, rule)
        return (x, found) if residual is None else found
    return _forward(*arguments, rule, False)[:2]


def bn_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: Activation = "relu",
    ranks: Ranks | None = None,
) -> Tensor:
    """activation(batch_norm(x)), as `torch.nn.functional` has them.

    In two passes over x, with sums of deviations from a value close to the mean, in fp32 over few rows and in fp64 over
    these, so that a mean far from 0 costs no digits. Where `bn_act_available` says no, torch computes it.
    Differentiable any number of times with respect to x, weight and bias: with `create_graph` the gradients are
    computed by torch's own operations. Kept for the backward pass: x itself and four values a channel; in eval mode,
    for ReLU, where neither weight nor bias needs a gradient, one bit an element instead of x.

    With `ranks` the batch is that of all ranks, of which x is this rank's part. Every rank has to call it, and to go
    back through it, in the same order; parts may differ in size, and one may be empty. Ranks gather 2 C + 1 numbers
    forward and add up 2 C backward, unless x needs no gradient. The gradient for x is that of the sum of all ranks'
    losses; those for weight and bias are this rank's share of it. Differentiable once.

    Args:
        x: [N, C, H, W]; on the CPU it is copied where it is not channels_last.
        weight: [C]; None: 1.
        bias: [C]; None: 0.
        running_mean: [C], contiguous; with `training` it is moved in place, or may be None.
        running_var: [C], likewise; it takes the unbiased variance.
        training: normalise by the batch, else by the running statistics.
        momentum: weight of this batch in the running statistics; with `ranks` a number or a scalar tensor.
        eps: added to the variance.
        activation: "relu", "silu" or "none".
        ranks: with `training`, how to reach the ranks that share a batch; None: this one has all of it.

    Returns:
        [N, C, H, W], x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, named by argument; one value a channel with `training`; a
            backend that was forced does not serve them.
        RuntimeError: a backward pass with `ranks` and `create_graph`.
    """
    rule = _Rule(training, momentum, eps, activation, ranks)
    return _compute(x, None, weight, bias, running_mean, running_var, rule)[1]


def add_bn_act(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: Activation = "relu",
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum z = x + residual, and activation(batch_norm(z)): what a pre-activation network does between convolutions.

    The sum is taken while its statistics are, and its gradient is added where that of the normalisation is written.

    Args:
        x: [N, C, H, W].
        residual: like x.
        weight: see `bn_act`, as for all that follows.
        bias: [C].
        running_mean: [C].
        running_var: [C].
        training: normalise by the batch.
        momentum: of the running statistics.
        eps: added to the variance.
        activation: "relu", "silu" or "none".
        ranks: that share the batch.

    Returns:
        z, rounded to x's dtype before it is normalised, and the result, both [N, C, H, W] of x's dtype.

    Raises:
        ValueError, RuntimeError: see `bn_act`.
    """
    rule = _Rule(training, momentum, eps, activation, ranks)
    return _compute(x, residual, weight, bias, running_mean, running_var, rule)

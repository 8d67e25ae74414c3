"""Batch normalisation by the statistics of the batch over all ranks, on any device and backend."""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable


def spans_ranks() -> bool:
    """Whether there are other ranks to share statistics with."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _channelwise(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view(1, -1, *[1] * (like.ndim - 2))


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and sum of squared deviations [C] and count [1] over all ranks, fp64, with the same bits on each of them."""
    channels = x.shape[1]
    local = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    count = x.numel() // channels
    if count:
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        local[:channels], local[channels:-1], local[-1] = mean, variance.double() * count, count
    # gathered, not added up: the deviations between ranks need the mean first (Chan et al. 1979)
    gathered = local.new_empty(distributed.get_world_size(), len(local))
    distributed.all_gather(list(gathered.unbind()), local)
    means, squares, counts = gathered.split([channels, channels, 1], dim=1)
    total = counts.sum(0)
    mean = (means * counts).sum(0) / total
    return mean, (squares + counts * (means - mean).square()).sum(0), total


class _Normalize(torch.autograd.Function):
    """Also returns mean, sum of squared deviations and count."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, squares, count = _global_statistics(wide)
        inverse = (squares / count + eps).rsqrt()
        # by deviations, so that a mean far from 0 costs no digits
        out = (wide - _channelwise(mean, wide)).mul_(
            _channelwise(inverse if weight is None else inverse * weight, wide)
        )
        if bias is not None:
            out.add_(_channelwise(bias, wide))
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.mark_non_differentiable(mean, squares, count)
        return out.to(x.dtype), mean, squares, count

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, *_: Any
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, torch.float32)
        grad, deviations = grad.to(dtype), x.to(dtype) - _channelwise(mean, x.to(dtype))
        dims = [0, *range(2, x.ndim)]
        sums = torch.stack([(grad * deviations).sum(dims).double() * inverse, grad.sum(dims).double()])
        grad_weight, grad_bias = sums.to(dtype).unbind()
        grad_x = None
        if ctx.needs_input_grad[0]:
            # a copy: the gradients may be views
            total = sums.clone()
            distributed.all_reduce(total)
            of_deviation, of_mean = (total / count).unbind()
            grad_x = grad - _channelwise(of_mean, grad) - deviations.mul_(_channelwise(of_deviation * inverse, grad))
            grad_x.mul_(_channelwise(inverse if weight is None else inverse * weight, grad))
            grad_x = grad_x.to(x.dtype)
        return (
            grad_x,
            grad_weight.to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            None,
        )


# an opaque call to torch.compile, which breaks its graph here
@torch.compiler.disable()
def synchronized_batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """What `layer` in train mode gives for the batch of all ranks together, of which x is this rank's part.

    The ranks' parts may differ in size; one may be empty. Every rank has to call it, and to go back through it, in the
    same order. One all-gather of 2 C + 1 numbers a rank forward; one all-reduce of 2 C numbers backward, unless x needs
    no gradient. The gradient for x is that of the sum of all ranks' losses; those for weight and bias are this rank's
    share of it. Statistics are fp32 within a rank (fp64 for fp64 input) and fp64 over ranks; each rank has the same
    bits. Under torch.compile it is a graph break.

    Args:
        layer: with `track_running_stats` its running statistics are moved, by the unbiased variance over all ranks.
        x: [N, C, H, W].

    Returns:
        [N, C, H, W], x's dtype.
    """
    out, mean, squares, count = _Normalize.apply(x, layer.weight, layer.bias, layer.eps)  # type: ignore
    if layer.track_running_stats and layer.running_mean is not None and layer.running_var is not None:
        with torch.no_grad():
            share: float | Tensor | None = layer.momentum
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.add_(1)
                share = layer.num_batches_tracked.double().reciprocal() if share is None else share
            share = 0.0 if share is None else share
            layer.running_mean.copy_(layer.running_mean.double() * (1 - share) + mean * share)
            layer.running_var.copy_(
                layer.running_var.double() * (1 - share) + squares / (count - 1).clamp(min=1) * share
            )
    return out

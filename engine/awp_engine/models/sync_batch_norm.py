"""Batch normalisation by the statistics of the batch over all ranks, on any device and backend."""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional


def _channelwise(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view(1, -1, *[1] * (like.ndim - 2))


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and sum of squared deviations [C] and count [1] over all ranks, fp64, with the same bits on each of them."""
    channels = x.shape[1]
    local = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    count = x.numel() // channels
    if count:
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, squares, count = _global_statistics(wide)
        mean_and_variance = mean.to(wide.dtype), (squares / count).to(wide.dtype)
        out = functional.batch_norm(wide, *mean_and_variance, weight, bias, eps=eps)
        ctx.save_for_backward(x, weight, *mean_and_variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, squares, count)
        return out.to(x.dtype), mean, squares, count

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, *_: Any
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "batch normalisation over all ranks: expected a backward pass without create_graph=True, its gradients "
                "cannot be differentiated again; take eval mode, or batch_norm_mode(model, synchronized=False)"
            )
        x, weight, mean, variance, count = ctx.saved_tensors
        wide, wants_x = x.to(mean.dtype), ctx.needs_input_grad[0]
        if x.numel():
            # with the statistics held still; the sums are also what their own gradients take
            grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward.default(
                grad.to(mean.dtype), wide, weight, mean, variance, None, None, False, ctx.eps, [wants_x, True, True]
            )
        else:
            # in torch 2.13 the process dies of a division by 0 there
            grad_x, grad_weight, grad_bias = torch.zeros_like(wide), torch.zeros_like(mean), torch.zeros_like(mean)
        if wants_x:
            sums = torch.stack([grad_weight, grad_bias]).double()
            distributed.all_reduce(sums)
            of_weight, of_bias = sums / count
            inverse = (variance.double() + ctx.eps).rsqrt()
            through = (wide - _channelwise(mean, wide)).mul_(_channelwise(of_weight * inverse, wide))
            through.add_(_channelwise(of_bias, wide)).mul_(_channelwise(weight * inverse, wide))
            grad_x = grad_x.sub_(through).to(x.dtype)
        wanted = ctx.needs_input_grad
        return grad_x if wants_x else None, grad_weight if wanted[1] else None, grad_bias if wanted[2] else None, None


# an opaque call to torch.compile, which breaks its graph here
@torch.compiler.disable()
def synchronized_batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """What `layer` in train mode gives for the batch of all ranks together, of which x is this rank's part.

    The ranks' parts may differ in size; one may be empty. Every rank has to call it, and to go back through it, in the
    same order. One all-gather of 2 C + 1 numbers a rank forward; one all-reduce of 2 C numbers backward, unless x needs
    no gradient. The gradient for x is that of the sum of all ranks' losses; those for weight and bias are this rank's
    share of it. Statistics are fp32 within a rank (fp64 for fp64 input) and fp64 over ranks; each rank has the same
    bits. Under torch.compile it is a graph break. Differentiable once.

    Args:
        layer: with `track_running_stats` its running statistics are moved, by the unbiased variance over all ranks.
        x: [N, C, H, W].

    Returns:
        [N, C, H, W], x's dtype.

    Raises:
        RuntimeError: in the backward pass, with `create_graph`.
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

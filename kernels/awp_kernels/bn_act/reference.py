"""The definition of residual sum, batch normalisation and activation: torch's own."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda u: u,
    "relu": partial(functional.relu, inplace=True),
    "silu": functional.silu,
}


class Ranks(NamedTuple):
    """How ranks talk that normalise one batch together, of which each holds a part.

    Attributes:
        gather: fp64 [k] of this rank -> [ranks, k], the same on every rank.
        add: fp64 [k] of this rank -> the sum over the ranks, the same on every rank.
    """

    gather: Callable[[Tensor], Tensor]
    add: Callable[[Tensor], Tensor]


def refuse_second_derivatives() -> None:
    """Raise RuntimeError: it is asked for before ranks wait for each other."""
    raise RuntimeError(
        "batch normalisation over all ranks: expected a backward pass without create_graph=True, is_grads_batched or a "
        "mode around it, as its gradients cannot be differentiated again; take eval mode, or each rank's own "
        "statistics: ranks=None, synchronized=False"
    )


def over_ranks(
    ranks: Ranks,
    own: Tensor,
    count: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number [1] of all ranks' values, fp64; moves the running statistics.

    `own` is fp64 [2, C], mean and sum of squared deviations of this rank's `count` values a channel.
    """
    channels = own.shape[1]
    local = torch.cat([own.flatten(), own.new_full((1,), count)])
    means, squares, counts = ranks.gather(local).split([channels, channels, 1], dim=1)
    total = counts.sum(0)
    size = total.clamp(min=1)
    mean = (means * counts).sum(0) / size
    # deviations between ranks need the mean first (Chan et al. 1979)
    deviations = (squares + counts * (means - mean).square()).sum(0)
    if running_mean is not None and running_var is not None:
        # nothing of a batch that is empty on all ranks
        share = total.clamp(max=1) * momentum
        running_mean.copy_(running_mean.double() * (1 - share) + mean * share)
        unbiased = deviations / (total - 1).clamp(min=1)
        running_var.copy_(running_var.double() * (1 - share) + unbiased * share)
    return mean, deviations / size, size


def _channelwise(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view(1, -1, *[1] * (like.ndim - 2))


class _OverRanks(torch.autograd.Function):
    """Normalises by the statistics of all ranks' batches; ranks may hold parts of other sizes, or nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float | Tensor,
        eps: float,
        ranks: Ranks,
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        channels = x.shape[1]
        count = x.numel() // channels
        own = x.new_zeros((2, channels), dtype=torch.float64)
        if count:
            mean, variance = torch.batch_norm_update_stats(wide, None, None, 0.0)
            # ranks' means are weighed in fp64: what fp32 rounded off of one far from 0 would stay
            rest = (wide - _channelwise(mean, wide)).mean([0, *range(2, wide.ndim)])
            own[0], own[1] = mean.double() + rest, variance.double() * count
        mean, variance, total = over_ranks(ranks, own, count, running_mean, running_var, momentum)
        mean, variance = mean.to(wide.dtype), variance.to(wide.dtype)
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps, ctx.ranks = eps, ranks
        return functional.batch_norm(wide, mean, variance, weight, bias, eps=eps).to(x.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_second_derivatives()
        x, weight, mean, variance, total = ctx.saved_tensors
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
            of_weight, of_bias = (ctx.ranks.add(torch.cat([grad_weight, grad_bias]).double()) / total).chunk(2)
            inverse = (variance.double() + ctx.eps).rsqrt()
            through = (wide - _channelwise(mean, wide)).mul_(_channelwise(of_weight * inverse, wide))
            through.add_(_channelwise(of_bias, wide))
            through.mul_(_channelwise(inverse if weight is None else weight * inverse, wide))
            grad_x = grad_x.sub_(through).to(x.dtype)
        found = grad_x if wants_x else None, None, None, grad_weight, grad_bias
        return *(g if want else None for g, want in zip(found, ctx.needs_input_grad, strict=False)), None, None, None


def in_one_order(normalise: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """normalise(z), on CPUs of [N, C, H W] where torch 2.13 would take strides of size 1 for another order.

    Where N, H or W is 1, its backward pass reads channels_last gradients as if they were contiguous, or z.
    """
    if torch.jit.is_tracing():  # sizes are tensors then  # pyright: ignore[reportPrivateImportUsage]
        return normalise(z)
    samples, channels, height, width = z.shape
    channels_last = (height * width * channels, 1, width * channels, channels)
    if z.device.type != "cpu" or 1 not in (samples, height, width) or z.stride() == channels_last:
        return normalise(z)
    return normalise(z.flatten(2)).view_as(z)


def bn_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: Any,
    eps: float,
    activation: str,
    ranks: Ranks | None,
) -> tuple[Tensor, Tensor]:
    """The sum z = x + residual, and activation(batch_norm(z))."""
    z = x if residual is None else x + residual
    vectors = running_mean, running_var, weight, bias

    def normalise(images: Tensor) -> Tensor:
        if ranks is not None:
            return _OverRanks.apply(images, *vectors, momentum, eps, ranks)  # pyright: ignore[reportReturnType]
        return functional.batch_norm(images, *vectors, training, momentum, eps)

    # z itself where nothing was computed: what follows may write to it
    return z, ACTIVATIONS[activation](in_one_order(normalise, z))

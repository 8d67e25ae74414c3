"""The definition of residual sum, batch normalisation and activation: torch's own."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda u: u,
    "relu": partial(functional.relu, inplace=True),
    "silu": functional.silu,
}


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
    momentum: float,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The sum z = x + residual, and activation(batch_norm(z))."""
    z = x if residual is None else x + residual
    rest = running_mean, running_var, weight, bias, training, momentum, eps
    normalized = in_one_order(lambda images: functional.batch_norm(images, *rest), z)
    # z itself where nothing was computed: what follows may write to it
    return z, ACTIVATIONS[activation](normalized)

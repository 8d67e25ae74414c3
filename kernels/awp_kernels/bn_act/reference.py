"""The definition of residual sum, batch normalisation and activation: torch's own."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda u: u,
    "relu": partial(functional.relu, inplace=True),
    "silu": functional.silu,
}


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
    normalized = functional.batch_norm(z, running_mean, running_var, weight, bias, training, momentum, eps)
    # z itself where nothing was computed: what follows may write to it
    return z, ACTIVATIONS[activation](normalized)

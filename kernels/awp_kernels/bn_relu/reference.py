"""The definition of batch normalisation with ReLU: torch's own."""

from torch import Tensor
from torch.nn import functional


def bn_relu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """relu(batch_norm(x))."""
    normalized = functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return functional.relu(normalized, inplace=True)

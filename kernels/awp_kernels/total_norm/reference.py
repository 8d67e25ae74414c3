"""The definition of the norm over a list of tensors, in plain PyTorch."""

import torch
from torch import Tensor


def total_norm(tensors: list[Tensor]) -> Tensor:
    """The L2 norm over all elements, fp64."""
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm()

"""The definition of mean over the pixels and linear layer: torch's own."""

import torch
from torch import Tensor
from torch.nn import functional


def pooled_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The mean is taken by the public code's kernel and so equal to it on 32x32 images."""
    pooled = functional.avg_pool2d(x.to(bias.dtype), (x.shape[2], x.shape[3])).flatten(1)
    return functional.linear(pooled, weight.to(bias.dtype), bias)


def pooled_linear_gradient(grad: Tensor, weight: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient of images of that shape and dtype, the same for all pixels of a channel; can be differentiated."""
    of_mean = grad @ weight.to(grad.dtype) / (shape[2] * shape[3])
    return of_mean[:, :, None, None].expand(shape).to(dtype)

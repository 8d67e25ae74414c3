"""What both families of networks share."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

Activation = Literal["relu", "silu"]


def make_activation(name: str) -> nn.Module:
    """Returns the activation module called `name`; raises ValueError for another name."""
    if name == "relu":
        # Safe in place: it only ever follows batch normalisation, whose backward needs its input and not its output.
        return nn.ReLU(inplace=True)
    if name == "silu":
        return nn.SiLU()
    raise ValueError(f"activation: unknown name {name!r}; expected one of {', '.join(get_args(Activation))}")


class NormalizedClassifier(nn.Module):
    """Base of all models: checks and holds mean and standard deviation, and normalises images with them.

    Attributes:
        mean, std: fp32 [1, C, 1, 1], not part of the state dict, which so equals the public layout.
        num_classes: number of logits.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: {num_classes}; expected at least 2")
        if not mean or len(mean) != len(std):
            raise ValueError(f"mean and std: {len(mean)} and {len(std)} values; expected one of each for every channel")
        if not all(math.isfinite(value) for value in mean) or not all(
            math.isfinite(value) and value > 0 for value in std
        ):
            raise ValueError(
                f"mean and std: {tuple(mean)} and {tuple(std)}; expected finite means, positive finite deviations"
            )
        self.num_classes = num_classes
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    def normalize(self, images: Tensor) -> Tensor:
        """(images - mean) / std, for images [N, C, H, W] in [0, 1]."""
        return (images - self.mean) / self.std


def global_average_pool(features: Tensor) -> Tensor:
    """Mean over all pixels, [N, C, H, W] -> [N, C], by the public code's kernel and so equal to it on 32x32 images."""
    return functional.avg_pool2d(features, (features.shape[2], features.shape[3])).flatten(1)

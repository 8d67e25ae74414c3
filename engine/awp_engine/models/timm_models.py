"""Networks for larger images: ResNets and ConvNeXt-T as timm builds them, and ConvNeXt-T with a convolution stem.

Sources: He et al.: Deep Residual Learning for Image Recognition, CVPR 2016; Liu et al.: A ConvNet for the 2020s, CVPR
2022; Singh, Croce, Hein: Revisiting Adversarial Training for ImageNet, NeurIPS 2023 (the stem).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from awp_engine.config import ConfigError
from awp_engine.models.import_timm import import_timm
from awp_engine.models.layers import (
    ActivatedBatchNorm,
    Activation,
    BatchNorm,
    Classifier,
    Conv3x3,
    NormalizedClassifier,
    NormalizedImages,
    Stem,
)

_SMALLEST = 32


class Convolution(nn.Conv2d):
    """Computes in its weight's precision, whatever that of input and bias."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, ...], in the weight's dtype."""
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return self._conv_forward(input.to(self.weight.dtype), self.weight, bias)


class Dense(nn.Linear):
    """Computes in its weight's precision, whatever that of input and bias."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the weight's dtype."""
        dtype = self.weight.dtype
        return functional.linear(input.to(dtype), self.weight, self.bias.to(dtype))


class LastNorm(nn.LayerNorm):
    """Layer normalisation of the last dimension, in fp32 at the least."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., C] -> the same, in the input's dtype."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        out = functional.layer_norm(input.to(dtype), self.normalized_shape, weight, bias, self.eps)
        return out.to(input.dtype)


class ChannelNorm(LastNorm):
    """Layer normalisation of every pixel's channels."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> the same, in the input's dtype."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvStem(nn.Module):
    """Two convolutions of stride 2 in place of ConvNeXt's one of stride 4, each with layer norm and GELU.

    Names are those of the paper's public code: `stem.0` to `stem.5`.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            Stem(channels, width // 2, kernel_size=3, stride=2, padding=1),
            ChannelNorm(width // 2, eps=1e-6),
            nn.GELU(),
            Convolution(width // 2, width, kernel_size=3, stride=2, padding=1),
            ChannelNorm(width, eps=1e-6),
            nn.GELU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """[N, channels, H, W] -> [N, width, H / 4, W / 4], rounded up."""
        return self.stem(images)


class TimmClassifier(NormalizedClassifier):
    """Base of the models around a network of timm's; any input size of at least 32 pixels a side.

    State-dict names are timm's behind `network.`. Layers keep their weights and get forward passes of their own, which
    take working copies of 16-bit weights beside fp32 biases and norms.
    """

    network: Any

    def forward(self, images: Tensor | NormalizedImages) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W] in [0, 1].

        Raises:
            ConfigError: images of less than 32 pixels a side.
        """
        # a trace holds for other sizes too, and would warn of a branch
        tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        if not tracing and min(images.shape[2:]) < _SMALLEST:
            size = "x".join(map(str, images.shape[2:]))
            raise ConfigError(f"--model.name: expected one for images of {size} pixels; this one takes 32x32 and more")
        features = self.network.forward_features(self.normalize(images))
        # pooled in the classifier's precision
        return self.network.forward_head(features.to(self.network.get_classifier().bias.dtype))

    def blocks(self) -> list[nn.Module]:
        """What FSDP gathers at once."""
        raise NotImplementedError

    def _recast(self) -> None:
        """Let timm's modules, which keep their weights, compute by this package's forward passes."""
        for module in self.network.modules():
            if type(module) is nn.Conv2d:
                plain = module.groups == 1 and module.bias is None
                fused = plain and module.kernel_size == (3, 3) and module.stride == (1, 1)
                module.__class__ = Conv3x3 if fused else Convolution
            elif type(module) is nn.Linear:
                module.__class__ = Dense
            elif isinstance(module, nn.LayerNorm):
                module.__class__ = ChannelNorm if type(module).__name__ == "LayerNorm2d" else LastNorm
            elif type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNorm
                module.synchronized = False  # as its constructor does  # pyright: ignore[reportArgumentType]
        self.network.get_classifier().__class__ = Classifier


class TimmResNet(TimmClassifier):
    """ResNet-18 or ResNet-50, stride in the 3x3 convolutions; the last batch normalisation of a block starts at 0, as
    in timm.

    Args:
        num_classes: number of logits.
        mean, std: one value a channel; images in [0, 1] become (x - mean) / std.
        depths: blocks a stage.
        width: channels of the first stage's 3x3 convolutions; the stem has 64.
        activation: "relu" as published, or "silu".
        bottleneck: blocks of three convolutions, as ResNet-50 has them, or of two, as ResNet-18.

    Raises:
        ConfigError: timm is not installed.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        activation: Activation = "relu",
        bottleneck: bool = True,
    ) -> None:
        super().__init__(num_classes, mean, std)
        _require_width(width, 1)
        resnet = import_timm().models.resnet
        self.network = resnet.ResNet(
            resnet.Bottleneck if bottleneck else resnet.BasicBlock,
            tuple(depths),
            num_classes=num_classes,
            in_chans=len(mean),
            channels=tuple(width * 2**stage for stage in range(4)),
        )
        self._recast()
        self.network.conv1.__class__ = Stem
        # batch normalisation and the activation after it in one operation
        inner = (1, 2) if bottleneck else (1,)
        for block, number in [(self.network, 1), *((block, n) for block in self.blocks() for n in inner)]:
            old = block.get_submodule(f"bn{number}")
            fused = ActivatedBatchNorm(old.num_features, activation)
            setattr(block, f"bn{number}", fused)
            setattr(block, f"act{number}", nn.Identity())
        for block in self.blocks():
            setattr(block, f"act{len(inner) + 1}", nn.SiLU() if activation == "silu" else nn.ReLU(inplace=True))

    def blocks(self) -> list[nn.Module]:
        """All residual blocks."""
        return [block for stage in range(4) for block in self.network.get_submodule(f"layer{stage + 1}")]


class TimmConvNeXt(TimmClassifier):
    """ConvNeXt-T; its activation is GELU, its layer scale starts at 1e-6, and no block is dropped at random.

    Args:
        num_classes, mean, std, depths: as those of `TimmResNet`.
        width: channels of the first stage; every further one has twice as many.
        conv_stem: begin by a `ConvStem` instead of by patches of 4x4 pixels.

    Raises:
        ConfigError: timm is not installed.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        depths: Sequence[int] = (3, 3, 9, 3),
        width: int = 96,
        conv_stem: bool = False,
    ) -> None:
        super().__init__(num_classes, mean, std)
        _require_width(width, 2)
        self.network = import_timm().models.convnext.ConvNeXt(
            in_chans=len(mean),
            num_classes=num_classes,
            depths=tuple(depths),
            dims=tuple(width * 2**stage for stage in range(4)),
        )
        self._recast()
        if conv_stem:
            self.network.stem = ConvStem(len(mean), width)
        else:
            self.network.stem[0].__class__ = Stem

    def blocks(self) -> list[nn.Module]:
        """All residual blocks."""
        return [block for stage in self.network.stages for block in stage.blocks]


def _require_width(width: int, least: int) -> None:
    if width < least or width % least:
        raise ValueError(f"width: {width}; expected a multiple of {least}, at least {least}")

"""Pre-activation residual networks (He et al., "Identity Mappings in Deep Residual Networks", 2016)."""

import itertools
from collections.abc import Sequence

from torch import Tensor, nn

from awp_engine.models.layers import (
    ActivatedBatchNorm,
    Activation,
    Head,
    NormalizedClassifier,
    NormalizedImages,
    Stem,
    convolution,
    pre_activated,
)


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and activation.

    The shortcut is the block's input, or a 1x1 convolution of the activated input where the shape changes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.bn1 = ActivatedBatchNorm(in_channels, activation)
        self.conv1 = convolution(in_channels, out_channels, stride)
        self.bn2 = ActivatedBatchNorm(out_channels, activation)
        self.conv2 = convolution(out_channels, out_channels, 1)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            # A container of one, as in the public layout: shortcut.0.weight.
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
            )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One more block after a sum that is not taken yet, and whose normalisation takes it.

        Args:
            x: [N, in_channels, H, W].
            residual: to be added to x, of its shape; None: nothing.

        Returns:
            The shortcut and the residual, whose sum is the block's output, [N, out_channels, H / stride, W / stride],
            rounded up.
        """
        x, activated = pre_activated(self.bn1, x, residual)
        rest = self.conv2(self.bn2(self.conv1(activated)))
        return x if self.shortcut is None else self.shortcut(activated), rest


class PreActResNet(NormalizedClassifier):
    """PreActResNet with the state-dict names of the public AT-AWP code; any input size.

    Initialised as there: PyTorch's defaults for every layer, drawn from torch's global generator.

    Args:
        num_classes: number of logits.
        mean, std: one value a channel; images in [0, 1] become (x - mean) / std.
        num_blocks: blocks a stage; every stage but the first halves the resolution and doubles the width.
        width: channels of the first stage.
        activation: "relu" as published, or "silu".

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        num_blocks: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        activation: Activation = "relu",
    ) -> None:
        super().__init__(num_classes, mean, std)
        if width < 1:
            raise ValueError(f"width: {width}; expected at least 1")
        self.conv1 = Stem(len(mean), width, kernel_size=3, padding=1, bias=False)
        channels = width
        for stage, blocks in enumerate(num_blocks):
            out_channels = width * 2**stage
            layer = nn.Sequential()
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layer.append(PreActBlock(channels, out_channels, stride, activation))
                channels = out_channels
            self.add_module(f"layer{stage + 1}", layer)
        self.num_stages = len(num_blocks)
        self.bn = ActivatedBatchNorm(channels, activation)
        self.linear = Head(channels, num_classes)

    def stages(self) -> list[list[nn.Module]]:
        """Its blocks, stage by stage."""
        return [list(self.get_submodule(f"layer{stage + 1}").children()) for stage in range(self.num_stages)]

    def forward(self, images: Tensor | NormalizedImages) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W] in [0, 1]."""
        blocks = itertools.chain.from_iterable(self.stages())
        return self.linear(pre_activated(self.bn, *self.through(blocks, self.conv1(self.normalize(images))))[1])

"""Wide residual networks (Zagoruyko and Komodakis, "Wide Residual Networks", 2016)."""

import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

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


class SamePadded(nn.Conv2d):
    """A 3x3 convolution of stride 2 that pads as TensorFlow's SAME does: one row at the bottom, one column right."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=2, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H / 2, W / 2]."""
        return super().forward(functional.pad(input, (0, 1, 0, 1)))


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and activation.

    Where the number of channels changes the shortcut is a 1x1 convolution of the activated input, else it is the input
    itself.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, activation: Activation, *, same_padding: bool = False
    ) -> None:
        super().__init__()
        self.bn1 = ActivatedBatchNorm(in_channels, activation)
        same_padding = same_padding and stride == 2
        self.conv1 = (
            SamePadded(in_channels, out_channels) if same_padding else convolution(in_channels, out_channels, stride)
        )
        self.bn2 = ActivatedBatchNorm(out_channels, activation)
        self.conv2 = convolution(out_channels, out_channels, 1)
        # camelCase because the name is part of the public state dict.
        self.convShortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.convShortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `PreActBlock`'s."""
        x, activated = pre_activated(self.bn1, x, residual)
        rest = self.conv2(self.bn2(self.conv1(activated)))
        return x if self.convShortcut is None else self.convShortcut(activated), rest


def _stage(
    num_blocks: int, in_channels: int, out_channels: int, stride: int, activation: Activation, *, same_padding: bool
) -> nn.Sequential:
    """`num_blocks` blocks in a row, inside a container of one for the public name, block1.layer.0."""
    first = WideBlock(in_channels, out_channels, stride, activation, same_padding=same_padding)
    others = (WideBlock(out_channels, out_channels, 1, activation) for _ in range(num_blocks - 1))
    return nn.Sequential(OrderedDict(layer=nn.Sequential(first, *others)))


class WideResNet(NormalizedClassifier):
    """WideResNet-depth-widen_factor with the state-dict names of the public TRADES and AWP code; no dropout; any input
    size.

    Initialised as there, from torch's global generator: convolutions normal with variance 2 / (kernel area * output
    channels), batch normalisation 1 and 0, classifier bias 0, classifier weight PyTorch's default.

    Args:
        depth: 6 n + 4, with n blocks in each of three stages.
        widen_factor: the stages have 16, 32 and 64 times as many channels.
        num_classes: number of logits.
        mean, std: one value a channel; images in [0, 1] become (x - mean) / std.
        activation: "relu" as published, or "silu".
        same_padding: convolutions of stride 2 are `SamePadded`, as in DeepMind's network (Gowal et al.: Uncovering the
            Limits of Adversarial Training, 2020), whose published weights have silu.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        activation: Activation = "relu",
        same_padding: bool = False,
    ) -> None:
        super().__init__(num_classes, mean, std)
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(f"depth: {depth}; a WideResNet has depth 6 n + 4, for example 28, 34 or 70")
        if widen_factor < 1:
            raise ValueError(f"widen_factor: {widen_factor}; expected at least 1")
        self.same_padding = same_padding
        num_blocks = (depth - 4) // 6
        widths = [16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = Stem(len(mean), 16, kernel_size=3, padding=1, bias=False)
        self.block1 = _stage(num_blocks, 16, widths[0], 1, activation, same_padding=same_padding)
        self.block2 = _stage(num_blocks, widths[0], widths[1], 2, activation, same_padding=same_padding)
        self.block3 = _stage(num_blocks, widths[1], widths[2], 2, activation, same_padding=same_padding)
        self.bn1 = ActivatedBatchNorm(widths[2], activation)
        self.fc = Head(widths[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def stages(self) -> list[list[nn.Module]]:
        """Its blocks, stage by stage."""
        return [list(stage.get_submodule("layer").children()) for stage in (self.block1, self.block2, self.block3)]

    def forward(self, images: Tensor | NormalizedImages) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W] in [0, 1]."""
        blocks = itertools.chain.from_iterable(self.stages())
        return self.fc(pre_activated(self.bn1, *self.through(blocks, self.conv1(self.normalize(images))))[1])

"""What both families of networks share."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from awp_kernels import (
    add_bn_act,
    bn_act,
    bn_act_available,
    conv3x3,
    conv3x3_available,
    pooled_linear,
    pooled_linear_available,
    stem3x3,
    stem3x3_available,
)
from awp_kernels.bn_act.reference import in_one_order
from awp_kernels.pooled_linear import reference as pooled_linear_reference

Activation = Literal["relu", "silu"]
# what a layer's second set is called: see `awp_engine.models.views`
AUXILIARY = "auxiliary_batch_norm"


def make_activation(name: str) -> nn.Module:
    """Returns the activation module called `name`; raises ValueError for another name."""
    if name == "relu":
        # Safe in place: it only ever follows batch normalisation, whose backward needs its input and not its output.
        return nn.ReLU(inplace=True)
    if name == "silu":
        return nn.SiLU()
    raise ValueError(f"activation: unknown name {name!r}; expected one of {', '.join(get_args(Activation))}")


def spans_ranks() -> bool:
    """Whether there are other ranks to share statistics with."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that can be synchronised.

    Attributes:
        synchronized: in train mode by the statistics of all ranks: see `awp_engine.models.batch_norm.synchronize`.
        kind: the activation that is part of it.
        by_auxiliary: whether its second set takes its place.
    """

    kind: Literal["none", "relu", "silu"] = "none"
    by_auxiliary = False

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # the instance's from the start: Dynamo compiles anew where an attribute of the class becomes one of the object
        self.synchronized = False

    def forward(self, input: Tensor) -> Any:
        """[N, C, H, W] -> the same."""
        if self.by_auxiliary:
            return self.get_submodule(AUXILIARY)(input)
        super()._check_input_dim(input)
        if self._shares_statistics():
            return self._synchronized(input)
        return in_one_order(super().forward, input)

    def _check_input_dim(self, input: Tensor) -> None:
        """Nothing more to be checked."""

    def _shares_statistics(self) -> bool:
        return self.synchronized and self.training and spans_ranks()

    def _synchronized(self, *images: Any) -> Any:
        # it imports torch.compile, which takes a second
        from awp_engine.models.sync_batch_norm import synchronized_batch_norm

        return synchronized_batch_norm(self, *images)

    def settings(self) -> dict[str, Any]:
        """What the operation takes beside the images; counts the batch."""
        moves = self.training and self.track_running_stats
        if moves and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        keeps = moves or not self.training
        return {
            "weight": self.weight,
            "bias": self.bias,
            "running_mean": self.running_mean if keeps else None,
            "running_var": self.running_var if keeps else None,
            "training": self.training,
            "momentum": self.momentum,
            "eps": self.eps,
            "activation": self.kind,
        }


class ActivatedBatchNorm(BatchNorm):
    """Batch normalisation and the activation after it, and a sum before them, in one operation where there is one.

    Attributes:
        activation: what follows the normalisation.
    """

    def __init__(self, channels: int, activation: Activation) -> None:
        super().__init__(channels)
        self.kind = activation
        self.activation = make_activation(activation)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Any:
        """[N, C, H, W] -> the same; given a residual, also of that shape, (input + residual, what becomes of it)."""
        if self.by_auxiliary:
            return self.get_submodule(AUXILIARY)(input, residual)
        if self._shares_statistics():
            return self._synchronized(input, residual)
        if self._is_fused(input):
            settings = self.settings()
            return bn_act(input, **settings) if residual is None else add_bn_act(input, residual, **settings)
        z = input if residual is None else input + residual
        y = self.activation(super().forward(z))
        return y if residual is None else (z, y)

    def _is_fused(self, input: Tensor) -> bool:
        # fewer channels than a vector has lanes are slower
        wide = self.momentum is not None and self.num_features >= 16
        return wide and bn_act_available(input, self.weight, self.bias)


def pre_activated(norm: ActivatedBatchNorm, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sum of x and what still waits to be added, which the normalisation takes, and its activation."""
    if residual is not None and residual.dtype != x.dtype:
        # autocast rounds what convolutions give, and not what the stem gives
        x, residual = x + residual, None
    return (x, norm(x)) if residual is None else norm(x, residual)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1, on the CPU by the fused operation.

    Attributes:
        products: what that multiplies in, where the processor can: see `conv3x3`.
    """

    # of the class, as timm's layers become such without a call of __init__
    products: Literal["fp32", "bf16"] = "fp32"

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H, W]."""
        # measured: narrower layers and images smaller than a tile gain nothing, 16-bit ones in fp32 need twice that
        least = 64 if input.dtype != torch.float32 and self.products == "fp32" else 32
        wide = min(self.in_channels, self.out_channels) >= least and self.bias is None
        if wide and conv3x3_available(input, self.weight) and min(input.shape[2:]) >= 4:
            return conv3x3(input, self.weight, products=self.products)
        return super().forward(input)


def convolution(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the resolution, or divides it by `stride`."""
    if stride == 1:
        return Conv3x3(in_channels, out_channels)
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


class NormalizedImages(NamedTuple):
    """Images as `NormalizedClassifier.normalize` gives them, which that model takes in place of images.

    Attributes:
        values: [N, C, H, W]; of a model with a narrow input in its dtype, with further channels of zeros.
    """

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the values."""
        return self.values.shape


def filled_up(values: Tensor, channels: int) -> Tensor:
    """[N, C, H, W] with `channels` of zeros behind its own."""
    return functional.pad(values, (0, 0, 0, 0, 0, channels)) if channels else values


class NormalizedClassifier(nn.Module):
    """Base of all models: checks and holds mean and standard deviation, and normalises images with them.

    Attributes:
        mean, std: fp32 [1, C, 1, 1], not part of the state dict, which so equals the public layout.
        num_classes: number of logits.
        class_names: of the logits, in their order, where the weights that were loaded say so.
        input_dtype: what normalised images are rounded to, see `narrow_input_`; None: not at all.
        checkpointed: whether blocks compute their activations anew, see `checkpoint_activations_`.
    """

    mean: Tensor
    std: Tensor
    input_dtype: torch.dtype | None = None
    class_names: tuple[str, ...] | None = None
    checkpointed = False

    def __init__(self, num_classes: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: {num_classes}; expected at least 2")
        if not mean or len(mean) != len(std):
            raise ValueError(f"mean and std: {len(mean)} and {len(std)} values; expected one of each for every channel")
        if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise ValueError(
                f"mean and std: {tuple(mean)} and {tuple(std)}; expected finite means, positive finite deviations"
            )
        self.num_classes = num_classes
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1), persistent=False)

    @torch.no_grad()
    def normalize_by_(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise images by these from now on, one value a channel."""
        self.mean.copy_(torch.tensor(mean).view_as(self.mean))
        self.std.copy_(torch.tensor(std).view_as(self.std))

    @property
    def stem(self) -> "Stem | None":
        """The convolution that normalised images go into."""
        return next((module for module in self.modules() if isinstance(module, Stem)), None)

    def narrow_input_(self, dtype: torch.dtype) -> None:
        """Have normalised images rounded to `dtype`, and filled up with zeros to a multiple of 8 channels.

        The stem then computes in `dtype`, on rows of pixels that tensor cores take; logits change by rounding alone.

        Raises:
            ValueError: a model without a `Stem`.
        """
        stem = self.stem
        if stem is None:
            raise ValueError("model: expected one whose first convolution is a Stem, found none")
        self.input_dtype, stem.filler = dtype, -stem.in_channels % 8

    def normalize(self, images: Tensor | NormalizedImages) -> Tensor:
        """(images - mean) / std, for images [N, C, H, W] in [0, 1], as the stem takes it."""
        if isinstance(images, NormalizedImages):
            return images.values
        values = (images - self.mean) / self.std
        if self.input_dtype is None:
            return values
        filled = filled_up(values.to(self.input_dtype), -self.mean.shape[1] % 8)
        return filled.contiguous(memory_format=torch.channels_last)

    def through(self, blocks: Iterable[nn.Module], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Blocks of a residual network one after the other: what the last one gives, see `PreActBlock`."""
        residual = None
        for block in blocks:
            if self.checkpointed:
                # nothing in them is drawn at random
                x, residual = checkpoint(block, x, residual, use_reentrant=False, preserve_rng_state=False)
            else:
                x, residual = block(x, residual)
        return x, residual

    def stages(self) -> list[list[nn.Module]]:
        """The blocks of a residual network, stage by stage; of another model none."""
        return []

    def features(self, images: Tensor) -> list[Tensor]:
        """What each stage of a residual network gives, [N, channels, height, width], of images [N, C, H, W] in [0, 1].

        Raises:
            ValueError: a model without stages.
        """
        stem, stages, found, residual = self.stem, self.stages(), [], None
        if stem is None or not stages:
            raise ValueError(f"model: expected a residual network with stages, got {type(self).__name__}")
        x = stem(self.normalize(images))
        for blocks in stages:
            for block in blocks:
                x, residual = block(x, residual)
            found.append(x if residual is None else x + residual)
        return found

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Of the last layer's weight and bias in the state dict."""
        name = next(name for name, module in self.named_modules() if isinstance(module, Classifier))
        return f"{name}.weight", f"{name}.bias"


class Stem(nn.Conv2d):
    """A convolution in the images' precision; what follows goes on in the precision of its weight.

    16-bit images would lose attack steps: bfloat16 spaces the numbers below 1 by 1/256.

    Attributes:
        filler: channels of zeros behind the images' own, see `NormalizedClassifier.narrow_input_`.
    """

    filler = 0

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, out_channels, ...], in the weight's dtype."""
        shape = self.kernel_size, self.stride, self.padding, self.dilation
        plain = shape == ((3, 3), (1, 1), (1, 1), (1, 1)) and self.bias is None and not self.filler
        if plain and stem3x3_available(input, self.weight):
            return stem3x3(input, self.weight)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        weight = filled_up(self.weight, self.filler).to(input.dtype)
        return self._conv_forward(input, weight, bias).to(self.weight.dtype)


class Classifier(nn.Linear):
    """Logits, in the precision of its bias, which is full where weights are 16-bit copies."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_features] -> [N, classes]."""
        dtype = self.bias.dtype
        return functional.linear(input.to(dtype), self.weight.to(dtype), self.bias)


class Head(Classifier):
    """Mean over all pixels, then logits."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, classes]."""
        arguments = input, self.weight, self.bias
        # not by the operation's own choice, which refuses where a backend was forced
        run = pooled_linear if pooled_linear_available(*arguments) else pooled_linear_reference.pooled_linear
        return run(*arguments)

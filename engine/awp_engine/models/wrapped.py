"""Any classifier as one of this package's: with images normalised in front of it, and a last layer that fits."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awp_engine.config import ConfigError
from awp_engine.models.layers import NormalizedClassifier, NormalizedImages
from awp_engine.models.user_code import Code, told_in_one_line

# sides to try a module on that is given no size
SIDES = (32, 224, 28)


class Normaliser(NamedTuple):
    """The part of a network that normalises images.

    Attributes:
        where: its name.
        mean, std: what it holds them under.
    """

    where: str
    mean: str
    std: str

    @property
    def names(self) -> list[str]:
        """Of mean and deviation, from the network on."""
        return [f"{self.where}.{name}" if self.where else name for name in (self.mean, self.std)]


class WrappedClassifier(NormalizedClassifier):
    """A module of anybody's, as `network`; its state-dict names are behind `network.`.

    Args:
        network: maps images, normalised as given here, to logits [N, num_classes].
        num_classes: number of logits.
        mean, std: one value a channel; 0 and 1 where the network normalises by itself.
        name: of the model, for messages.
        image_size: (height, width), where the network was made for one.
        heads: names of the network's last layer, or layers, where they are known.
        notes: what a user should be told of how it was made.

    Attributes:
        code: of somebody's own model, what made it.
        autocast_dtype: what `torch.autocast` has the network compute in; None: as it is.
        takes_channels_last: whether it computes in that memory format; of code of one's own not known before it is
            tried.
        came_with: mean and deviation of the classifier of this class that a factory gave, whose network this one took
            over; None: it gave another module.
        normaliser: the part of the network that normalises images by itself.
    """

    came_with: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    normaliser: Normaliser | None = None
    autocast_dtype: torch.dtype | None = None
    code: Code | None = None

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        name: str,
        image_size: tuple[int, int] | None = None,
        heads: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__(num_classes, mean, std)
        self.network, self.name, self.image_size = network, name, image_size
        self.heads, self.notes = tuple(heads), tuple(notes)
        self.takes_channels_last = name.startswith(("timm:", "torchvision:"))

    def forward(self, images: Tensor | NormalizedImages) -> Tensor:
        """Logits [N, num_classes] of images [N, C, H, W] in [0, 1].

        Raises:
            ConfigError: images of another size than it was made for, or an output that is no tensor.
        """
        if self.image_size is not None and tuple(images.shape[2:]) != self.image_size:
            wanted, got = ("x".join(map(str, size)) for size in (self.image_size, images.shape[2:]))
            raise ConfigError(f"--model.name: {self.name} was made for images of {wanted} pixels, got {got}")
        x = self.normalize(images)
        if self.autocast_dtype is None:
            logits = self.network(x)
        else:
            with torch.autocast(x.device.type, self.autocast_dtype):
                logits = self.network(x)
            logits = logits.float() if isinstance(logits, Tensor) else logits
        if not isinstance(logits, Tensor):
            mode = "train" if self.training else "eval"
            raise ConfigError(
                f"--model.name: {self.name} returns {type(logits).__name__} in {mode} mode; expected logits [N, "
                f"{self.num_classes}]: wrap it so that forward returns them alone"
            )
        return logits

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Of the last layer's weight and bias in the state dict, as far as it is known and has them."""
        layers = {name: self.network.get_submodule(name) for name in self.heads}
        return tuple(
            f"network.{name}.{own}"
            for name, layer in layers.items()
            for own, _ in layer.named_parameters(recurse=False)
        )


def fitted(
    network: nn.Module,
    num_classes: int,
    channels: int,
    *,
    name: str,
    image_size: tuple[int, int] | None,
    asked: bool = False,
) -> tuple[list[str], list[str]]:
    """Give a module as many logits as there are classes, in place, by another last layer where it has others.

    Args:
        network: any classifier; it makes a forward pass on one image of zeros.
        num_classes: of the data.
        channels: of the images.
        name: of the model, for messages.
        image_size: (height, width); None tries a few.
        asked: whether it was made for so many classes; then one that takes images of none of those sizes is believed.

    Returns:
        The names of the last layers, and what to tell the user.

    Raises:
        ConfigError: it has another number of logits, and it is not clear which layer gives them.
    """
    try:
        found = _logits(network, channels, image_size, name)
    except ConfigError:
        if image_size is not None or not asked:
            raise
        found = num_classes
    if found == num_classes:
        return last_layers(network, num_classes), []
    if callable(reset := getattr(network, "reset_classifier", None)):
        with told_in_one_line(name, f"reset_classifier({num_classes})"):
            reset(num_classes)
        old = "classifier"
    else:
        old = _last_layer(network, found)
        layer: Any = None if old is None else network.get_submodule(old)
        if old is not None and type(layer) is nn.Linear:
            new = nn.Linear(layer.in_features, num_classes, layer.bias is not None)
            network.set_submodule(old, new.to(layer.weight))
        elif old is not None and type(layer) is nn.Conv2d:
            new = nn.Conv2d(layer.in_channels, num_classes, 1, bias=layer.bias is not None)
            network.set_submodule(old, new.to(layer.weight))
    if old is None or _logits(network, channels, image_size, name) != num_classes:
        raise ConfigError(
            f"--model.name: {name} gives {found} logits, the data have {num_classes} classes, and which layer to "
            "replace is not clear; let the factory take num_classes"
        )
    return last_layers(network, num_classes), [
        f"its layer {old}, of {found} classes, is replaced by a new one of {num_classes}"
    ]


def device_of(network: nn.Module) -> torch.device:
    """Where a module is, by its first tensor; the CPU for one without any."""
    held = next(itertools.chain(network.parameters(), network.buffers()), None)
    return torch.device("cpu") if held is None else held.device


def _logits(network: nn.Module, channels: int, image_size: tuple[int, int] | None, name: str) -> int:
    """How many a module gives."""
    sizes = [(side, side) for side in SIDES] if image_size is None else [image_size]
    modes = [(module, module.training) for module in network.modules()]
    try:
        network.eval()
        for size in sizes:
            with told_in_one_line(name, f"a forward pass on an image of {channels}x{size[0]}x{size[1]}"):
                try:
                    with torch.no_grad():
                        logits = network(torch.zeros(1, channels, *size, device=device_of(network)))
                except Exception:
                    if size == sizes[-1]:
                        raise
                    continue
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
                shape = f" of shape {list(logits.shape)}" if isinstance(logits, Tensor) else ""
                raise ConfigError(
                    f"--model.name: {name} returns {type(logits).__name__}{shape} for one image; expected logits "
                    "[1, classes]: wrap it so that forward returns them alone"
                )
            return logits.shape[1]
        raise AssertionError("no size")
    finally:
        for module, mode in modes:
            module.training = mode


def _last_layer(network: nn.Module, outputs: int) -> str | None:
    """The last linear layer, or 1x1 convolution, of so many outputs."""
    named = [
        name
        for name, module in network.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == outputs)
        or (isinstance(module, nn.Conv2d) and module.out_channels == outputs and module.kernel_size == (1, 1))
    ]
    return named[-1] if named and named[-1] else None


def last_layers(network: nn.Module, outputs: int) -> list[str]:
    """The names of what gives the logits: as timm says, or else the last layer of so many outputs."""
    if callable(told := getattr(network, "get_classifier", None)):
        found = told()
        own = list(found) if isinstance(found, (tuple, list, nn.ModuleList)) else [found]
        return [name for name, module in network.named_modules() if any(module is layer for layer in own)]
    last = _last_layer(network, outputs)
    return [] if last is None else [last]

"""By what images are normalised before a network: one choice, for training and for measuring."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from awp_engine.config import ConfigError
from awp_engine.models.batch_norm import layer_modes
from awp_engine.models.import_timm import import_torchvision
from awp_engine.models.layers import NormalizedClassifier
from awp_engine.models.layouts import PAIRS
from awp_engine.models.wrapped import SIDES, Normaliser, WrappedClassifier, device_of

Statistics = tuple[Sequence[float], Sequence[float]]
Whose = Literal[
    "as given", "none, as given", "the file's", "the published weights'", "the network's own", "the data set's"
]
# what a mean is moved by in the first channel and in the last, and pixels then have room for in [0, 1]
_MOVED = (0.1, 0.2)
# as a share of the change that moving the mean alone makes
_ROUNDING = 1e-3


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """What stands in front of a network.

    Attributes:
        mean, std: one value a channel, of images in [0, 1].
        whose: where they come from.
        words: what to tell the user.
        is_guess: whether neither the user nor the weights say so.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    whose: Whose
    words: str
    is_guess: bool = False


def choose_normalisation(
    model: NormalizedClassifier,
    name: str,
    data_name: str,
    *,
    normalize: Literal["auto", "data", "model", "none"] = "auto",
    given: Statistics | None = None,
    file: Statistics | None = None,
    source: object = None,
    data: Statistics | None,
) -> Normalisation:
    """Mean and deviation in front of a network: what the user says, else the weights' file, else the published weights,
    else the model's own, else the data's.

    Args:
        model: with its weights.
        name: of the model, for messages.
        data_name: of the data set, likewise.
        normalize: as `--model.normalize`.
        given: `--model.mean` and `--model.std`, one value a channel or one for all.
        file: what the weights' file says of images in front of the network.
        source: where the weights come from: a file, or "timm" or "torchvision"; None: nowhere.
        data: the data set's; None where only its test images would tell.

    Raises:
        ConfigError: numbers that do not fit, or nothing says how images are normalised.
    """
    channels = model.mean.numel()
    own = own_normalisation(model)
    came_with = model.came_with if isinstance(model, WrappedClassifier) else None
    published = published_normalisation(model) if source is not None or normalize == "model" else None
    if published is not None and len(published[0]) != channels:
        published = None
    nothing = (0.0,) * channels, (1.0,) * channels

    def chosen(statistics: Statistics, whose: Whose, said: str, *, is_guess: bool = False) -> Normalisation:
        mean, std = map(tuple, statistics)
        words = f"images are normalised by mean {shown(mean)}, deviation {shown(std)}: {said}"
        if own is not None and whose != "the network's own" and (mean, std) != nothing:
            words += f"; {name} normalises them once more, in {own[0]}"
        return Normalisation(mean=mean, std=std, whose=whose, words=words, is_guess=is_guess)

    if given is not None:
        return chosen(_for_channels(given, channels), "as given", "as given")
    if normalize == "none":
        return Normalisation(mean=nothing[0], std=nothing[1], whose="none, as given", words="images are not normalised")
    if normalize == "auto" and file is not None:
        return chosen(file, "the file's", f"those that {source} was trained with")
    if normalize != "data":
        if published is not None:
            guess = normalize == "auto" and source not in ("timm", "torchvision")
            return chosen(
                published, "the published weights'", f"those of the published weights of {name}", is_guess=guess
            )
        if came_with is not None:
            return chosen(came_with, "the network's own", "those of the model that was given")
        if own is not None:
            where, mean, std = own
            words = f"{name} normalises images by itself, in {where} (mean {shown(mean)}, deviation {shown(std)})"
            return Normalisation(mean=nothing[0], std=nothing[1], whose="the network's own", words=words)
        if normalize == "model":
            raise ConfigError(
                f"--model.normalize: {name} holds no mean and deviation of {channels} channels, under a usual name, "
                "that it normalises images by; give --model.mean and --model.std, or --model.normalize none"
            )
    if data is None:
        raise ConfigError(
            f"--model.mean: nothing says by what mean and deviation the weights of {name} expect images, and no "
            f"training images of {data_name} are read here, to compute them of; give --model.mean and --model.std, or "
            "--model.normalize none"
        )
    return chosen(data, "the data set's", f"those of {data_name}", is_guess=normalize == "auto" and source is not None)


def _for_channels(given: Statistics, channels: int) -> Statistics:
    for flag, values in zip(("mean", "std"), given, strict=True):
        if len(values) not in (1, channels):
            raise ConfigError(f"--model.{flag}: expected one number a channel, {channels}, got {len(values)}")
    mean, std = (tuple(values) * (channels // len(values)) for values in given)
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ConfigError(f"--model.std: expected finite means and deviations > 0, got {shown(mean)} and {shown(std)}")
    return mean, std


def shown(values: Sequence[float]) -> str:
    """Numbers as people write them: "0.4914, 0.4822, 0.4465"."""
    return ", ".join(f"{value:.4g}" for value in values)


def published_normalisation(model: NormalizedClassifier) -> Statistics | None:
    """Mean and deviation that the published weights of a timm or torchvision model expect; None of other models."""
    if not isinstance(model, WrappedClassifier):
        return None
    if model.name.startswith("timm:"):
        config = getattr(model.network, "pretrained_cfg", None) or {}
        return (config["mean"], config["std"]) if "mean" in config and "std" in config else None
    if model.name.startswith("torchvision:"):
        weights = import_torchvision().models.get_model_weights(model.name.removeprefix("torchvision:"))
        transforms: Any = weights["DEFAULT"].transforms()
        return transforms.mean, transforms.std
    return None


def own_normalisation(model: nn.Module) -> tuple[str, tuple[float, ...], tuple[float, ...]] | None:
    """The part of the network inside `model` that normalises images, and its mean and deviation; None without one."""
    if not isinstance(model, WrappedClassifier) or model.normaliser is None:
        return None
    where, *names = model.normaliser
    module, channels = model.network.get_submodule(where), model.mean.numel()
    mean, std = (_numbers(_holder(module, name)[name], channels) or () for name in names)
    return where or type(module).__name__, mean, std


def find_normaliser(network: nn.Module, channels: int, image_size: tuple[int, int] | None) -> Normaliser | None:
    """The part of a network that subtracts a mean from the images, found by trying.

    Names alone say little: layers hold means of much else. So the mean is moved, and images along with it. If that is
    the mean that images are normalised by, the first layer with weights is given what it was given before.

    Args:
        network: any module; it makes forward passes in eval mode, which change nothing.
        channels: of the images.
        image_size: (height, width); None tries a few.
    """
    for where, module in network.named_modules():
        for mean, std in PAIRS:
            held = [_holder(module, name).get(name) for name in (mean, std)]
            numbers = [_numbers(value, channels) for value in held]
            if numbers[0] is not None and numbers[1] is not None and min(numbers[1]) > 0:
                for size in [image_size] if image_size is not None else [(side, side) for side in SIDES]:
                    if _subtracts(network, module, mean, channels, size):
                        return Normaliser(where, mean, std)
    return None


def _subtracts(network: nn.Module, module: nn.Module, name: str, channels: int, size: tuple[int, int]) -> bool:
    device = device_of(network)
    by = torch.linspace(*_MOVED, channels).view(-1, 1, 1).to(device)
    if torch.as_tensor(_holder(module, name)[name]).numel() == 1:
        by = torch.full_like(by, _MOVED[0])
    images = torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0)).to(device) / 2 + 0.25
    try:
        before = _first_input(network, images, module)
        # of pixels from 0 to 1, or to 255
        for unit in (1, 255):
            with _moved(module, name, by * unit):
                still, along = (_first_input(network, given, module) for given in (images, images + by))
            change = (still - before).abs().max()
            if change > 0 and (along - before).abs().max() <= _ROUNDING * change:
                return True
    # images of a size that it does not take, or a value that is no number: what is tried next says more
    except Exception:
        return False
    return False


def _first_input(network: nn.Module, images: Tensor, normaliser: nn.Module) -> Tensor:
    """What the first layer with weights is given, or the logits where none is called."""
    seen: list[Tensor] = []
    layers = [
        module
        for module in network.modules()
        if module is not normaliser and not any(module.children()) and any(True for _ in module.parameters())
    ]
    hooks = [layer.register_forward_pre_hook(lambda _, given: seen.extend(given[:1])) for layer in layers]
    drawn = torch.random.fork_rng([images.device] if images.is_cuda else [])
    try:
        with torch.no_grad(), layer_modes(network, "eval"), drawn:
            torch.manual_seed(0)
            seen.append(network(images))
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0]


def _holder(module: nn.Module, name: str) -> dict[str, Any]:
    """Where a module has an attribute of that name."""
    parts: Sequence[dict[str, Any]] = (module._buffers, module._parameters, vars(module))
    return next((held for held in parts if name in held), {})


@contextlib.contextmanager
def _moved(module: nn.Module, name: str, by: Tensor) -> Iterator[None]:
    """A block in which what a module holds under a name, one value a channel or one for all, is larger."""
    held = _holder(module, name)
    before = held[name]
    values = torch.as_tensor(before).detach()
    after = values.to(by) + (by.reshape(values.shape) if values.numel() == by.numel() else by.flatten()[0])
    if isinstance(before, Tensor):
        held[name] = after.to(values)
    elif isinstance(before, np.ndarray):
        held[name] = after.numpy(force=True)
    else:
        held[name] = tuple(after.tolist()) if isinstance(before, tuple) else after.tolist()
    try:
        yield
    finally:
        held[name] = before


def _numbers(value: Any, channels: int) -> tuple[float, ...] | None:
    """One number a channel out of a tensor, an array, a list or a number."""
    try:
        flat = torch.as_tensor(value).detach().double().flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        return None
    return tuple(flat * channels if len(flat) == 1 else flat) if len(flat) in (1, channels) else None

"""Modules by name: timm's, torchvision's, and those that a function of one's own makes."""

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from awp_engine.config import ConfigError
from awp_engine.models.import_timm import import_timm, import_torchvision
from awp_engine.models.normalisation import find_normaliser
from awp_engine.models.user_code import Factory, told_in_one_line
from awp_engine.models.wrapped import WrappedClassifier, fitted, last_layers

Size = tuple[int, int]

_SIZES = ("img_size", "image_size")
_FETCH = "fetching the published weights (without a network give --model.pretrained FILE, or fill the cache before)"


def build_by_factory(
    factory: Factory,
    name: str,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: Size | None,
    *,
    refit: bool = True,
) -> WrappedClassifier:
    """The classifier that a function or class makes.

    It is called with those of num_classes, in_chans, in_channels, img_size and image_size that its signature names, and
    with num_classes where it takes any keyword.

    Raises:
        ConfigError: it raises an error, makes no module, or one whose logits do not fit and cannot be made to.
    """
    channels = len(mean)
    side = None if image_size is None else image_size[0] if image_size[0] == image_size[1] else image_size
    offered = {"num_classes": num_classes, "in_chans": channels, "in_channels": channels}
    if side is not None:
        offered |= dict.fromkeys(_SIZES, side)
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        parameters = {}
    given = {key: value for key, value in offered.items() if key in parameters}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        given["num_classes"] = num_classes
    taken = ", ".join(f"{key}={value}" for key, value in given.items())
    with told_in_one_line(name, f"the call with ({taken})"):
        network = factory(**given)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"--model.name: {name} returned {type(network).__name__}; expected a torch.nn.Module")
    came_with = None
    if isinstance(network, WrappedClassifier):
        # names of weights stay as they are
        came_with = tuple(network.mean.flatten().tolist()), tuple(network.std.flatten().tolist())
        network = network.network
    sized, asked = not given.keys().isdisjoint(_SIZES), "num_classes" in given
    wrapped = wrap(network, name, num_classes, mean, std, image_size, sized=sized, asked=asked, refit=refit)
    wrapped.came_with = came_with
    return wrapped


def wrap(
    network: nn.Module,
    name: str,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: Size | None,
    *,
    sized: bool = False,
    asked: bool = False,
    refit: bool = True,
) -> WrappedClassifier:
    """A module of one's own as a classifier of so many classes.

    `sized`: it was made for images of that size alone; `asked`: and for so many classes; `refit`: as `build_model`.
    """
    if refit:
        heads, notes = fitted(network, num_classes, len(mean), name=name, image_size=image_size, asked=asked)
    else:
        heads, notes = last_layers(network, num_classes), []
    size = image_size if sized else None
    wrapped = WrappedClassifier(network, num_classes, mean, std, name=name, image_size=size, heads=heads, notes=notes)
    wrapped.normaliser = find_normaliser(network, len(mean), image_size)
    return wrapped


def build_from_package(
    name: str,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: Size | None,
    *,
    published: bool = False,
) -> WrappedClassifier:
    """`timm:NAME` or `torchvision:NAME`, freshly initialised or with the published weights.

    A ViT and the like is made for images of that size.

    Raises:
        ConfigError: no such model, its package cannot be imported, the weights cannot be had, or the images do not fit.
    """
    package, _, inner = name.partition(":")
    make = _of_timm if package == "timm" else _of_torchvision
    network, made_for, notes = make(name, inner, num_classes, len(mean), image_size, published)
    if image_size is not None and made_for not in (None, image_size):
        notes = [f"made for images of {image_size[0]}x{image_size[1]} pixels", *notes]
    size, heads = None if made_for is None else image_size, last_layers(network, num_classes)
    return WrappedClassifier(network, num_classes, mean, std, name=name, image_size=size, heads=heads, notes=notes)


def _of_timm(
    name: str, inner: str, num_classes: int, channels: int, image_size: Size | None, published: bool
) -> tuple[nn.Module, Size | None, list[str]]:
    """The network, the size of images that it is usually for if it takes one alone, and what to tell the user."""
    timm = import_timm()
    _require_known(name, timm.list_models(), f"timm {timm.__version__} has no model", "timm.list_models()")
    # models without published weights have none
    config = timm.get_pretrained_cfg(inner)
    made_for = tuple(config.input_size[1:]) if config is not None and config.fixed_input_size else None
    sized = {} if image_size is None or made_for in (None, image_size) else {"img_size": image_size}
    with told_in_one_line(name, _FETCH if published else "timm"):
        network = timm.create_model(inner, pretrained=published, num_classes=num_classes, in_chans=channels, **sized)
    return network, made_for, []


def _of_torchvision(
    name: str, inner: str, num_classes: int, channels: int, image_size: Size | None, published: bool
) -> tuple[nn.Module, Size | None, list[str]]:
    """As `_of_timm`."""
    models = import_torchvision().models
    known = models.list_models(module=models)
    _require_known(name, known, "torchvision has no classifier", "torchvision.models.list_models()")
    if channels != 3:
        raise ConfigError(f"--model.name: {name} takes images of 3 channels, the data have {channels}; timm takes any")
    weights: Any = models.get_model_weights(inner)["DEFAULT"] if published else None
    settings: dict[str, Any] = {"num_classes": num_classes if weights is None else len(weights.meta["categories"])}
    if inner in ("googlenet", "inception_v3"):
        # without the further logits of train mode
        settings |= {"aux_logits": False, "init_weights": True}
    with told_in_one_line(name, "torchvision"):
        network = models.get_model(inner, weights=None, **settings)
        side = getattr(network, "image_size", None)
        if side is not None and image_size not in (None, (side, side)):
            if image_size[0] != image_size[1]:
                raise ConfigError(f"--model.name: {name} takes square images, the data have {image_size}")
            network = models.get_model(inner, weights=None, image_size=image_size[0], **settings)
    made_for, notes = None if side is None else (side, side), []
    if weights is not None:
        with told_in_one_line(name, _FETCH):
            network.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
        notes = fitted(network, num_classes, channels, name=name, image_size=image_size)[1]
    return network, made_for, notes


def _require_known(name: str, known: Sequence[str], lacks: str, otherwise: str) -> None:
    package, _, inner = name.partition(":")
    # what follows the dot names weights
    if inner.partition(".")[0] not in known:
        near = ", ".join(f"{package}:{other}" for other in difflib.get_close_matches(inner, known, n=3))
        hint = f"did you mean {near}?" if near else f"see {otherwise}"
        raise ConfigError(f"--model.name: {lacks} {inner!r}; {hint}")

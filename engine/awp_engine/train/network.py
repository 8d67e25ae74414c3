"""The model that a run trains: built as the settings say, tried on images of zeros, with the weights it starts from."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from awp_engine.attack import checks
from awp_engine.checkpoint import read_model
from awp_engine.config import Config, ConfigError, ModelConfig
from awp_engine.data import Dataset
from awp_engine.device import fast_memory_format
from awp_engine.files.user_key import KeyFileError
from awp_engine.models import NormalizedClassifier, WrappedClassifier, build_model, load_pretrained
from awp_engine.models.batch_norm import layer_modes
from awp_engine.models.factories import published_normalisation
from awp_engine.models.trained import ModelDescription, described
from awp_engine.models.user_code import told_in_one_line
from awp_engine.models.wrapped import own_normalisation
from awp_engine.step.precision import Precision, frozen_view


@dataclass(frozen=True, kw_only=True)
class Network:
    """What a run trains.

    Attributes:
        model: in train mode, on its device and in its memory format.
        description: how to build it again.
        memory_format: of its weights and of the images.
        messages: what the user is told.
    """

    model: NormalizedClassifier
    description: ModelDescription
    memory_format: torch.memory_format
    messages: list[str]


def build_network(config: Config, data: Dataset, device: torch.device, precision: Precision) -> Network:
    """Build and try the model; its weights are drawn from torch's global generator.

    Raises:
        ConfigError: a model that cannot be built, or does not fit the data or what training asks of it.
        CheckpointError: weights to start from that cannot be read, or do not fit.
    """
    settings, (channels, *size) = config.model, data.train.shape
    if settings.mean and len(settings.mean) != channels:
        raise ConfigError(f"--model.mean: expected one number a channel, {channels}, got {len(settings.mean)}")
    model = build_model(
        settings.name,
        len(data.class_names),
        data.mean,
        data.std,
        width=settings.width,
        activation=settings.activation,
        image_size=(size[0], size[1]),
        published=settings.published,
    )
    messages = [f"{settings.name}: {note}" for note in model.notes] if isinstance(model, WrappedClassifier) else []
    mean, std, words = _normalisation(config, model, data)
    model.normalize_by_(mean, std)
    class_names = data.class_names if data.named else None
    if settings.published:
        messages.append(f"weights of {settings.pretrained}, a new classifier where the classes are others")
    elif settings.pretrained is not None:
        loaded = load_pretrained(model, settings.pretrained, class_names)
        new = f"; new, for {len(data.class_names)} classes: {', '.join(loaded.kept)}" if loaded.kept else ""
        messages += [f"weights of {settings.pretrained}{new}", *loaded.notes]
        if loaded.mean is not None and settings.normalize == "auto" and not settings.mean:
            mean, std = (tuple(buffer.flatten().tolist()) for buffer in (model.mean, model.std))
            words = ""
        model.normalize_by_(mean, std)
    if words and (isinstance(model, WrappedClassifier) or settings.mean or settings.normalize != "auto"):
        messages.append(words)
    description = ModelDescription(
        name=settings.name,
        num_classes=len(data.class_names),
        mean=tuple(mean),
        std=tuple(std),
        width=settings.width,
        activation=settings.activation,
        class_names=class_names,
        image_size=(size[0], size[1]) if isinstance(model, WrappedClassifier) else None,
        code=model.code if isinstance(model, WrappedClassifier) else None,
    )
    if description.code is not None:
        try:
            description = description.sealed()
        except KeyFileError as error:
            messages.append(f"without a seal these weights load with --model.name or model= alone: {error}")
    if isinstance(model, WrappedClassifier):
        _try(model.to(device), data, precision, messages)
    memory_format = fast_memory_format(model, device)
    # torch's stub does not know the keyword
    model.to(device=device, memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    return Network(model=model.train(), description=description, memory_format=memory_format, messages=messages)


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _normalisation(
    config: Config, model: NormalizedClassifier, data: Dataset
) -> tuple[Sequence[float], Sequence[float], str]:
    """Mean and deviation that images are normalised by in front of the model, and what to say of them."""
    settings, channels = config.model, len(data.mean)
    none = [0.0] * channels, [1.0] * channels
    if settings.mean:
        mean, std, whose = settings.mean, settings.std, "as given"
    elif settings.normalize == "none":
        return *none, "images are not normalised"
    else:
        mean, std, whose = data.mean, data.std, f"those of {data.name}"
        of_weights, published, of_model = None, None, None
        if isinstance(model, WrappedClassifier) and settings.normalize != "data":
            of_model = own_normalisation(model.network, channels)
            of_weights = _of_weights(settings)
            if settings.pretrained is not None or settings.normalize == "model":
                published = published_normalisation(model)
        if of_weights is not None and len(of_weights[0]) == channels:
            mean, std, whose = *of_weights, f"those that {settings.pretrained} was trained with"
        elif published is not None and len(published[0]) == channels:
            mean, std, whose = *published, f"those of the published weights of {settings.name}"
        elif isinstance(model, WrappedClassifier) and model.came_with is not None and settings.normalize != "data":
            mean, std, whose = *model.came_with, "those of the model that was given"
        elif of_model is not None:
            within = f"mean {_shown(of_model.mean)}, deviation {_shown(of_model.std)}"
            return *none, f"{settings.name} normalises images by itself, in {of_model.where} ({within})"
        elif settings.normalize == "model":
            raise ConfigError(
                f"--model.normalize: {settings.name} holds no mean and deviation of {channels} channels under a usual "
                "name; give --model.mean and --model.std, or --model.normalize none"
            )
    return mean, std, f"images are normalised by mean {_shown(mean)}, deviation {_shown(std)}: {whose}"


def _of_weights(settings: ModelConfig) -> tuple[Sequence[float], Sequence[float]] | None:
    """What the weights to start from were trained with, where this program trained them."""
    path = settings.pretrained
    if path is None or settings.published or path.suffix != ".safetensors":
        return None
    metadata = read_model(path)[1]
    if "model" not in metadata:
        return None
    before = described(metadata, path)
    return before.mean, before.std


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """What an attack would refuse of the model is refused by its name."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"--model.name: {name}: {str(error).removeprefix('model: ')}") from None


def _try(model: WrappedClassifier, data: Dataset, precision: Precision, messages: list[str]) -> None:
    """Try what training will do, in each of its precisions, and whether the model takes channels_last.

    Raises:
        ConfigError: naming what does not work.
    """
    model.takes_channels_last = True
    try:
        _try_passes(model, data)
    except ConfigError:
        # a forward pass may ask for the order of a tensor's values, as view does
        model.takes_channels_last = False
        _try_passes(model, data)
        messages.append(f"{model.name}: computes in contiguous format, as it does not take channels_last")
    for part, dtype in vars(precision).items():
        if dtype is None:
            continue
        try:
            model.autocast_dtype = dtype
            _try_passes(model, data)
        except ConfigError as error:
            raise ConfigError(f"--precision.{part}: fp32 is needed, as in {dtype}: {error}") from None
        finally:
            model.autocast_dtype = None
    with told_in_one_line(model.name, "copying it (by copy.deepcopy, for the attack)"):
        frozen_view(model)


def _try_passes(model: WrappedClassifier, data: Dataset) -> None:
    """A forward and a backward pass, of one image in eval mode and of two in train mode, which change nothing."""
    parameter = next((p for p in model.parameters() if p.requires_grad), None)
    if parameter is None:
        raise ConfigError(f"--model.name: {model.name} has no parameter that asks for a gradient; nothing to train")
    memory_format = fast_memory_format(model, parameter.device)
    # torch's stub does not know the keyword
    model.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    tried: list[tuple[Literal["train", "eval"], int]] = [("eval", 1), ("train", 2)]
    for mode, count in tried:
        images = torch.zeros(count, *data.train.shape, device=parameter.device)
        images = images.to(memory_format=memory_format).requires_grad_()
        labels = torch.zeros(count, dtype=torch.int64, device=parameter.device)
        shape = "x".join(map(str, data.train.shape))
        with layer_modes(model, mode), _refusing(model.name):
            with told_in_one_line(
                model.name, f"a forward pass in {mode} mode on {count} x {shape}, the data's images,"
            ):
                logits = model(images)
            checks.outputs(logits, labels, count)
            if logits.shape[1] != model.num_classes:
                raise ConfigError(
                    f"--model.name: {model.name} gives {logits.shape[1]} logits, the data have {model.num_classes} "
                    "classes"
                )
            if not logits.isfinite().all():
                raise ConfigError(f"--model.name: {model.name} gives logits that are not finite for an image of zeros")
            # the whole graph, as a run's passes have it
            with told_in_one_line(model.name, "a backward pass"):
                (gradient,) = torch.autograd.grad(logits.sum(), [images], allow_unused=True)
            if gradient is None:
                raise ConfigError(
                    f"--model.name: the logits of {model.name} do not depend on the image by operations that have a "
                    "gradient, which an attack needs"
                )
    with layer_modes(model, "eval"), torch.no_grad():
        # weights that hooks compute, as torch.nn.utils.weight_norm's do, are then no part of a graph, and can be copied
        model(torch.zeros(1, *data.train.shape, device=parameter.device))

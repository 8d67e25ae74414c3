"""The model that a run trains: built as the settings say, tried on images of zeros, with the weights it starts from."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from awp_engine.attack import checks
from awp_engine.checkpoint import CheckpointError
from awp_engine.config import Config, ConfigError
from awp_engine.config.model_names import source_of
from awp_engine.config.schema import show
from awp_engine.data import Dataset
from awp_engine.device import fast_memory_format
from awp_engine.files.user_key import KeyFileError
from awp_engine.models import NormalizedClassifier, WrappedClassifier, build_model, load_pretrained
from awp_engine.models.batch_norm import layer_modes
from awp_engine.models.normalisation import Normalisation, choose_normalisation, shown
from awp_engine.models.trained import ModelDescription
from awp_engine.models.user_code import told_in_one_line
from awp_engine.models.wrapped import device_of
from awp_engine.step.precision import Precision, frozen_view

# pixels of a side below which a network for CIFAR, which divides it by 8, has none left to pool
_SMALL = 16


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


def build_network(
    config: Config, data: Dataset, device: torch.device, precision: Precision, before: ModelDescription | None = None
) -> Network:
    """Build and try the model; its weights are drawn from torch's global generator.

    Args:
        config: the run's.
        data: what it trains on.
        device: where to put the model.
        precision: what it is tried in.
        before: of the checkpoint that the run goes on from, whose weights will replace these; none are read then.

    Raises:
        ConfigError: a model that cannot be built, or does not fit the data or what training asks of it; weights to
            start from that cannot be read, or do not fit.
    """
    settings, (_, *size) = config.model, data.train.shape
    model = build_model(
        settings.name,
        len(data.class_names),
        data.mean,
        data.std,
        width=settings.width,
        activation=settings.activation,
        image_size=(size[0], size[1]),
        published=settings.published and before is None,
    )
    messages = [f"{settings.name}: {note}" for note in model.notes] if isinstance(model, WrappedClassifier) else []
    class_names = data.class_names if data.named else None
    if before is None:
        normalisation = _started(config, model, data, class_names, messages)
        mean, std = normalisation.mean, normalisation.std
    else:
        # whatever a file of weights to start from says by now
        mean, std = before.mean, before.std
        if isinstance(model, WrappedClassifier):
            messages.append(f"images are normalised as before, by mean {shown(mean)}, deviation {shown(std)}")
    model.normalize_by_(mean, std)
    description = ModelDescription(
        name=settings.name,
        num_classes=len(data.class_names),
        mean=mean,
        std=std,
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
        _require_saved_buffers(model, data)
    memory_format = fast_memory_format(model, device)
    # torch's stub does not know the keyword
    model.to(device=device, memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    return Network(model=model.train(), description=description, memory_format=memory_format, messages=messages)


def build_partner(name: str, network: Network, data: Dataset, device: torch.device) -> tuple[NormalizedClassifier, str]:
    """The network that a method trains beside the model, drawn from torch's global generator; and what to tell of it.

    Args:
        name: of a built-in model, or "auto": `preact-resnet-digits` for images of less than 16 pixels a side, else
            `preact-resnet-18`.
        network: beside which; images are normalised as it does.
        data: what both train on.
        device: where to put it.

    Returns:
        It, in train mode and in the memory format of `network`, and a line for the user.

    Raises:
        ConfigError: another name.
    """
    if name != "auto" and (not isinstance(name, str) or source_of(name) != "built-in"):
        raise ConfigError(f"--method-args: partner: expected auto or the name of a built-in model, got {show(name)}")
    chosen = name
    if name == "auto":
        chosen = "preact-resnet-digits" if min(data.train.shape[1:]) < _SMALL else "preact-resnet-18"
    described = network.description
    partner = build_model(chosen, described.num_classes, described.mean, described.std)
    # torch's stub does not know the keyword
    partner.to(device=device, memory_format=network.memory_format)  # pyright: ignore[reportCallIssue]
    count = sum(parameter.numel() for parameter in partner.parameters())
    told = f"trains {chosen}, {count:,} parameters, beside the model; checkpoints alone hold it"
    return partner.train(), told


def _started(
    config: Config,
    model: NormalizedClassifier,
    data: Dataset,
    class_names: tuple[str, ...] | None,
    messages: list[str],
) -> Normalisation:
    """What a run begins with: weights to start from, loaded, and by what images are normalised."""
    settings, file, source = config.model, None, None
    if settings.published:
        source = str(settings.pretrained)
        messages.append(f"weights of {source}, a new classifier where the classes are others")
    elif settings.pretrained is not None:
        source = settings.pretrained
        try:
            loaded = load_pretrained(model, source, class_names)
        except CheckpointError as error:
            raise ConfigError(f"--model.pretrained: {error}") from None
        new = f"; new, for {len(data.class_names)} classes: {', '.join(loaded.kept)}" if loaded.kept else ""
        messages += [f"weights of {source}{new}", *loaded.notes]
        file = loaded.front
    normalisation = choose_normalisation(
        model,
        settings.name,
        data.name,
        normalize=settings.normalize,
        given=(settings.mean, settings.std) if settings.mean else None,
        file=file,
        source=source,
        data=(data.mean, data.std),
    )
    if isinstance(model, WrappedClassifier) or normalisation.whose != "the data set's" or source is not None:
        messages.append(normalisation.words)
    return normalisation


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


def _require_saved_buffers(model: WrappedClassifier, data: Dataset) -> None:
    """Refuse a buffer that training goes on changing and that no checkpoint holds: a resumed run would differ."""
    if not any(module._non_persistent_buffers_set for module in model.network.modules()):
        return
    saved, values = model.state_dict().keys(), []
    generator, device = torch.Generator().manual_seed(0), device_of(model)
    with layer_modes(model, "train"), torch.no_grad():
        for _ in range(2):
            # tables that the first pass fills stay as they are in the second
            model(torch.rand(2, *data.train.shape, generator=generator).to(device))
            values.append({name: b.clone() for name, b in model.named_buffers() if name not in saved})
    before, after = values
    for name, value in after.items():
        if name not in before or not torch.equal(value, before[name]):
            raise ConfigError(
                f"--model.name: {model.name}: its buffer {name.removeprefix('network.')} changes in training, and is "
                "registered with persistent=False, so that no checkpoint holds it; register it without"
            )


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

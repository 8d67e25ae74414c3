"""The frozen network that a run learns from: loaded, and tried on the run's images."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from awp_engine.checkpoint import CheckpointError
from awp_engine.config import Config, ConfigError
from awp_engine.config.settings import TeacherConfig
from awp_engine.data import Dataset
from awp_engine.device import fast_memory_format
from awp_engine.evaluation import spread
from awp_engine.evaluation.accuracy import count_right
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.evaluation.model.external import ExternalModel, load_external
from awp_engine.evaluation.model.loaded_model import load_trained
from awp_engine.files.digest import sha256_of
from awp_engine.models import NormalizedClassifier
from awp_engine.models.hub import fetched, is_address
from awp_engine.models.trained import find_weights
from awp_engine.models.user_code import told_in_one_line

# images of a look at clean accuracy, and what it must be more than, as a share of what guessing gets right
_LOOK, _CHANCE = 500, 1.5


def teacher_sha256(settings: TeacherConfig) -> str:
    """Of the file that holds the teacher's weights.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    with _by_its_flags():
        weights = _weights(settings)
        try:
            return sha256_of(weights)
        except OSError as error:
            raise CheckpointError(f"{weights}: cannot be read: {error.strerror}") from None


def _weights(settings: TeacherConfig) -> Path:
    """The file that holds them."""
    assert settings.weights is not None
    place = fetched(settings.weights)
    _, weights = find_weights(place)
    if place not in (weights, weights.parent):
        # it would hold other weights after an epoch, and this run could not go on
        raise CheckpointError(f"{place}: expected a run that has ended, one of its checkpoints, or a file")
    return weights


def load_teacher(
    config: Config, data: Dataset, device: torch.device, say: Callable[[str], None]
) -> NormalizedClassifier | None:
    """The network that the settings name, in eval mode and without gradients of its weights; None where they name none.

    Args:
        config: the run's.
        data: what it trains on.
        device: where to put the network.
        say: is told what was taken, and how many of some training images it gets right.

    Raises:
        ConfigError: settings that do not fit, weights that cannot be read or are not of that network, or a network for
            other images or classes.
    """
    settings = config.teacher
    if settings.weights is None:
        return None
    where = settings.weights if is_address(settings.weights) else Path(settings.weights)
    with _by_its_flags():
        _weights(settings)
        if settings.name is None:
            model = load_trained(where, device=device).model
        else:
            model = _external(settings, where, data, device, say)
    channels, classes = data.train.shape[0], len(data.class_names)
    for what, found, wanted in (
        ("classes", model.num_classes, classes),
        ("channels of images", model.mean.numel(), channels),
    ):
        if found != wanted:
            raise ConfigError(f"--teacher.weights: {where} has {found} {what}; expected {wanted}, as {data.name} has")
    if model.class_names is not None and data.named and model.class_names != data.class_names:
        raise ConfigError(
            f"--teacher.weights: {where} has other classes, or in another order, than {data.name}: "
            f"{', '.join(model.class_names)[:80]}"
        )
    # torch's stub does not know the keyword
    model.to(memory_format=fast_memory_format(model, device))  # pyright: ignore[reportCallIssue]
    model.requires_grad_(False)
    images = torch.zeros(1, *data.train.shape, device=device)
    with torch.no_grad(), told_in_one_line(str(where), "a forward pass on the data's images", "--teacher.weights"):
        model(images)
    some = spread(data.train, _LOOK)
    right = count_right(model, some, device, config.evaluation.batch_size) / len(some)
    doubt = ", which is guessing: is it of other images, or normalised by others?" if right < _CHANCE / classes else ""
    say(f"teacher {where}: right on {right:.1%} of {len(some)} training images{doubt}")
    return model


def _external(
    settings: TeacherConfig, where: Path | str, data: Dataset, device: torch.device, say: Callable[[str], None]
) -> NormalizedClassifier:
    """One of a name, with anybody's weights."""
    assert settings.name is not None
    external = ExternalModel(
        name=settings.name,
        weights=where,
        key=settings.key,
        activation=settings.activation,
        mean=settings.mean or None,
        std=settings.std or None,
        normalize=settings.normalize,
    )
    loaded = load_external(external, data, device)
    origin = loaded.origin or {}
    if origin["normalisation_was_guessed"]:
        # the run would learn from wrong answers, and nothing would say so
        raise ConfigError(
            f"--teacher.normalize: nothing says by what mean and deviation {where} expects images; give data, model or "
            "none, or --teacher.mean and --teacher.std"
        )
    for note in origin["notes"]:
        say(f"teacher: {_flagged(note)}")
    return loaded.model


@contextlib.contextmanager
def _by_its_flags() -> Iterator[None]:
    """What loading refuses, it refuses by the flags of other commands; here it is settings that cannot be used."""
    try:
        yield
    except (CheckpointError, ConfigError, EvaluationError) as error:
        text = _flagged(str(error))
        raise ConfigError(text if text.startswith("--") else f"--teacher.weights: {text}") from None


def _flagged(text: str) -> str:
    changed = {
        "--weights-key": "--teacher.key",
        "--weights": "--teacher.weights",
        "--model.": "--teacher.",
        "; the file says": "; leave --teacher.name out: the file says",
    }
    for theirs, ours in changed.items():
        text = text.replace(theirs, ours)
    return text

"""Models that no run describes: made by name or by somebody's code, with anybody's weights."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from awp_engine.checkpoint import CheckpointError, content_hash
from awp_engine.checkpoint.model_file import packable
from awp_engine.config.model_names import is_code
from awp_engine.data import Dataset
from awp_engine.evaluation.accuracy import count_right, spread
from awp_engine.evaluation.attacks import EvaluationError
from awp_engine.evaluation.subject import Subject, code_of
from awp_engine.models import NormalizedClassifier, build_model, load_weights
from awp_engine.models.class_names import from_json
from awp_engine.models.factories import load_factory
from awp_engine.models.hub import fetched
from awp_engine.models.layers import Activation
from awp_engine.models.trained import find_weights
from awp_engine.models.weights import normalises_itself, rounded
from awp_engine.models.wrapped import WrappedClassifier

# images of a quick look at clean accuracy, and how many say something
_LOOK, _ENOUGH = 500, 100
# as a share of what guessing gets right
_CHANCE = 1.5
# points by which another normalisation must be better to be worth a word
_BETTER = 0.05


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """How to make a model that is not a run's.

    Attributes:
        name: as `build_model` takes it.
        weights: file of any layout that `load_weights` knows, or hf://OWNER/NAME; None where the code that is named
            gives a trained model.
        key: which weights of the file.
        width, activation: as `build_model` takes them.
        mean, std: of images in [0, 1], one value a channel, or one for all; None where `normalize` says it.
        normalize: "data": by the data set's statistics; "model" or "none": not in front of the network; "auto": by what
            the file holds, else as given, else not where the network does it itself, else by the data set's.
        is_object: whether the model was given as an object of Python, under that name for this call alone.
    """

    name: str
    weights: Path | str | None = None
    key: str | None = None
    width: int | None = None
    activation: Activation = "relu"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    normalize: Literal["auto", "data", "model", "none"] = "auto"
    is_object: bool = False


def load_foreign(
    foreign: Foreign, data: Dataset, device: torch.device, say: Callable[[str], None] = lambda _: None
) -> Subject:
    """Makes the model for a data set's classes and channels, and loads its weights.

    Args:
        foreign: how.
        data: what it will be measured on.
        device: where to put it.
        say: is told what was taken, one line at a time; the notes of the result are the same.

    Raises:
        EvaluationError: settings that do not fit.
        CheckpointError: weights that cannot be read, or are not of this model.
        ConfigError: the model cannot be made.
    """
    runs_code = is_code(foreign.name)
    if foreign.weights is None and not runs_code:
        raise EvaluationError(
            f"--weights: expected a file: {foreign.name} as it is made has random weights, got nothing"
        )
    model, by = _made(foreign, data)
    # such as a last layer that was replaced
    notes = [f"{foreign.name}: {note}" for note in getattr(model, "notes", ())]
    key, metadata = "", {}
    if foreign.weights is None:
        notes.append(f"weights: those that {foreign.name} makes, as no --weights were given")
        # what the code gives has no file
        sha256 = content_hash(packable(model.state_dict()), {})
        weights = Path(foreign.name.rpartition(":")[0])
    else:
        weights = fetched(foreign.weights)
        # of a run, those that it selected
        weights = find_weights(weights)[1] if weights.is_dir() else weights
        loaded = load_weights(model, weights, key=foreign.key)
        assert loaded.sha256 is not None
        sha256, key, metadata = loaded.sha256, loaded.key, loaded.metadata
        notes += loaded.notes
        by = "the file's" if loaded.mean is not None and not normalises_itself(model) else by
    model = model.to(device).eval()
    if "class_names" in metadata:
        model.class_names = _class_names(metadata["class_names"], model.num_classes, weights)
    notes += _said(foreign, model, data, by)
    for note in notes:
        say(note)
    origin: dict[str, Any] = {"model": foreign.name, "key": key, "normalisation_is": by, "notes": notes}
    if runs_code and not foreign.is_object:
        # made before, so it is there
        code = load_factory(foreign.name)[1]
        origin["code"] = {"file": Path(code.file).name, "sha256": code.sha256}
    return Subject(
        model=model,
        name=weights.stem,
        weights=weights,
        sha256=sha256,
        architecture=foreign.name + ("" if foreign.width is None else f" (width {foreign.width})"),
        run_dir=None,
        config=None,
        origin=origin,
        # no file holds an object's code, so nothing of an earlier call is believed
        made_by=secrets.token_hex(16) if foreign.is_object else code_of(model),
    )


def _made(foreign: Foreign, data: Dataset) -> tuple[NormalizedClassifier, str]:
    """The model, and whose its normalisation is."""
    channels = len(data.mean)
    by, mean, std = "the data set's", data.mean, data.std
    if foreign.mean is not None or foreign.std is not None:
        if foreign.mean is None or foreign.std is None:
            raise EvaluationError("--model.mean and --model.std: expected both or none")
        if foreign.normalize != "auto":
            raise EvaluationError("--model.normalize: expected nothing beside --model.mean")
        if {len(foreign.mean), len(foreign.std)} - {1, channels}:
            raise EvaluationError(f"--model.mean and --model.std: expected 1 or {channels} numbers each")
        by = "as given"
        mean, std = (tuple(given) * (channels // len(given)) for given in (foreign.mean, foreign.std))
    nothing = (0.0,) * channels, (1.0,) * channels
    if foreign.normalize in ("model", "none"):
        by = "none, as given" if foreign.normalize == "none" else "the network's own"
        mean, std = nothing
    try:
        model = build_model(
            foreign.name,
            len(data.class_names),
            mean,
            std,
            width=foreign.width,
            activation=foreign.activation,
            image_size=(data.test.shape[1], data.test.shape[2]),
            refit=foreign.weights is not None,
        )
    except ValueError as error:
        reason = str(error).removeprefix("model: ").removeprefix("--model.name: ")
        raise EvaluationError(f"--model.name: {reason}") from None
    if by == "the data set's" and foreign.normalize == "auto" and normalises_itself(model):
        by = "the network's own"
        model.normalize_by_(*nothing)
    came_with = model.came_with if isinstance(model, WrappedClassifier) else None
    if came_with is not None and by != "as given" and foreign.normalize != "data":
        by = "the network's own"
        model.normalize_by_(*came_with)
    return model, by


def _said(foreign: Foreign, model: NormalizedClassifier, data: Dataset, by: str) -> list[str]:
    """What the user is told of normalisation."""
    mean, std = (rounded(buffer.flatten().tolist()) for buffer in (model.mean, model.std))
    notes = []
    if by == "the data set's" and foreign.normalize == "auto":
        notes.append(
            f"NORMALISATION: nothing says which, so it is that of {data.name}, mean {mean}, std {std}; where the "
            "weights were trained with another, accuracies are wrong without an error: --model.mean and --model.std "
            "give it, --model.normalize none leaves it out"
        )
    elif by == "the network's own":
        notes.append("normalisation: the network's own; images go into it as they are, in [0, 1]")
    elif by != "the file's":
        notes.append(f"normalisation, {by}: mean {mean}, std {std}")
    return notes


def _class_names(text: str, num_classes: int, path: Path) -> tuple[str, ...]:
    try:
        return from_json(text, num_classes)
    except ValueError as error:
        raise CheckpointError(f"{path}: class names in its header: {error}") from None


def look_at_accuracy(subject: Subject, data: Dataset, device: torch.device, batch_size: int) -> list[str]:
    """Reasons to doubt what a foreign model gets right without an attack, before hours of attacks; on 500 images.

    Accuracy at chance has a cause that is no property of the model. And where the normalisation was a guess, none at
    all is tried too.
    """
    split = spread(data.test, _LOOK)
    if subject.origin is None or len(split) < _ENOUGH:
        return []
    model, found = subject.model, []
    unloaded = subject.weights.suffix == ".py"
    right = count_right(model, split, device, batch_size) / len(split)
    if right < _CHANCE / model.num_classes:
        found.append(
            f"clean accuracy {right:.1%} on {len(split)} images is that of guessing; likely causes: another "
            "normalisation (--model.mean, --model.std, --model.normalize), another variant of the architecture "
            "(--model.activation, a factory of your own), or classes in another order"
            + (", or weights that were never loaded (--weights)" if unloaded else "")
        )
    if subject.origin["normalisation_is"] == "the data set's":
        mean, std = model.mean.clone(), model.std.clone()
        try:
            model.mean.zero_()
            model.std.fill_(1)
            bare = count_right(model, split, device, batch_size) / len(split)
        finally:
            model.mean.copy_(mean)
            model.std.copy_(std)
        if bare > right + _BETTER:
            found.append(
                f"clean accuracy is {right:.1%} with the normalisation of {data.name}, a guess, and {bare:.1%} "
                "without any: if the weights were trained without, give --model.normalize none"
            )
    return found

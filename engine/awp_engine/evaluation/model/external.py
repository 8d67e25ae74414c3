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
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.evaluation.model.loaded_model import LoadedModel, code_of
from awp_engine.models import NormalizedClassifier, build_model, load_weights
from awp_engine.models.class_names import from_json
from awp_engine.models.hub import fetched
from awp_engine.models.layers import Activation
from awp_engine.models.normalisation import choose_normalisation
from awp_engine.models.trained import find_weights, tampering

# images of a quick look at clean accuracy, and how many say something
_LOOK, _ENOUGH = 500, 100
# as a share of what guessing gets right
_CHANCE = 1.5
# points by which another normalisation must be better to be worth a word
_BETTER = 0.05


@dataclass(frozen=True, kw_only=True)
class ExternalModel:
    """How to make a model that is not a run's.

    Attributes:
        name: as `build_model` takes it.
        weights: file of any layout that `load_weights` knows, or hf://OWNER/NAME; None where the code that is named
            gives a trained model.
        key: which weights of the file.
        width, activation: as `build_model` takes them.
        mean, std: of images in [0, 1], one value a channel, or one for all; None where `normalize` says it.
        normalize: see `choose_normalisation`; nothing but "auto" beside a mean.
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


def load_external(
    external: ExternalModel, data: Dataset, device: torch.device, say: Callable[[str], None] = lambda _: None
) -> LoadedModel:
    """Makes the model for a data set's classes and channels, and loads its weights.

    Args:
        external: how.
        data: what it will be measured on.
        device: where to put it.
        say: is told what was taken, one line at a time; the notes of the result are the same.

    Raises:
        EvaluationError: settings that do not fit.
        CheckpointError: weights that cannot be read, or are not of this model.
        ConfigError: the model cannot be made.
    """
    runs_code = external.is_object or is_code(external.name)
    if external.weights is None and not runs_code:
        raise EvaluationError(
            f"--weights: expected a file: {external.name} as it is made has random weights, got nothing"
        )
    model = _made(external, data)
    # such as a last layer that was replaced
    notes = [f"{external.name}: {note}" for note in getattr(model, "notes", ())]
    key, metadata, file, source, taken = "", {}, None, external.name, {}
    if external.weights is None:
        made = f"those that {external.name} makes, as no --weights were given"
        notes.append(f"weights: {'those of the module that was given' if external.is_object else made}")
        # what the code gives has no file
        sha256 = content_hash(packable(model.state_dict()), {})
        weights = Path(external.name if external.is_object else external.name.rpartition(":")[0])
    else:
        weights, source = fetched(external.weights), str(external.weights)
        # of a run, those that it selected
        weights = find_weights(weights)[1] if weights.is_dir() else weights
        loaded = load_weights(model, weights, key=external.key)
        assert loaded.sha256 is not None
        sha256, key, metadata = loaded.sha256, loaded.key, loaded.metadata
        notes += [*tampering(metadata), *loaded.notes]
        taken = {"taken": loaded.taken}
        file = loaded.front
    normalisation = choose_normalisation(
        model,
        external.name,
        data.name,
        normalize=external.normalize,
        given=_given(external),
        file=file,
        source=source,
        data=None if data.of_test else (data.mean, data.std),
    )
    model.normalize_by_(normalisation.mean, normalisation.std)
    model = model.to(device).eval()
    if "class_names" in metadata:
        model.class_names = _class_names(metadata["class_names"], model.num_classes, weights)
    notes.append(normalisation.words)
    if normalisation.is_guess:
        notes[-1] = (
            f"NORMALISATION: nothing says which, so {normalisation.words}; where the weights were trained with "
            "another, accuracies are wrong without an error: --model.mean and --model.std give it, --model.normalize "
            "none leaves it out"
        )
    for note in notes:
        say(note)
    origin: dict[str, Any] = {
        "model": external.name,
        "key": key,
        **taken,
        "normalisation": normalisation.words,
        "normalisation_is": normalisation.whose,
        "normalisation_was_guessed": normalisation.is_guess,
        "notes": notes,
    }
    return LoadedModel(
        model=model,
        name=external.name if external.is_object else weights.stem,
        weights=weights,
        sha256=sha256,
        architecture=external.name + ("" if external.width is None else f" (width {external.width})"),
        run_dir=None,
        config=None,
        origin=origin,
        # no file holds an object's code, so nothing of an earlier call is believed
        made_by=secrets.token_hex(16) if external.is_object else code_of(model),
    )


def _given(external: ExternalModel) -> tuple[Sequence[float], Sequence[float]] | None:
    if external.mean is None and external.std is None:
        return None
    if external.mean is None or external.std is None:
        raise EvaluationError("--model.mean and --model.std: expected both or none")
    if external.normalize != "auto":
        raise EvaluationError("--model.normalize: expected nothing beside --model.mean")
    return external.mean, external.std


def _made(external: ExternalModel, data: Dataset) -> NormalizedClassifier:
    channels = len(data.mean)
    # those of test images alone are nobody's
    mean, std = ((0.0,) * channels, (1.0,) * channels) if data.of_test else (data.mean, data.std)
    try:
        return build_model(
            external.name,
            len(data.class_names),
            mean,
            std,
            width=external.width,
            activation=external.activation,
            image_size=(data.test.shape[1], data.test.shape[2]),
            refit=external.weights is not None,
        )
    except ValueError as error:
        reason = str(error).removeprefix("model: ").removeprefix("--model.name: ")
        raise EvaluationError(f"--model.name: {reason}") from None


def _class_names(text: str, num_classes: int, path: Path) -> tuple[str, ...]:
    try:
        return from_json(text, num_classes)
    except ValueError as error:
        raise CheckpointError(f"{path}: class names in its header: {error}") from None


def guessed(loaded: LoadedModel) -> list[str]:
    """That the normalisation was a guess, as a reason to doubt all numbers; nothing where it was none."""
    if loaded.origin is None or not loaded.origin["normalisation_was_guessed"]:
        return []
    right = "data" if loaded.origin["normalisation_is"] == "the data set's" else "model"
    return [
        f"the normalisation was a guess: {loaded.origin['normalisation']}; where it is not that of the weights, "
        f"accuracies are wrong: give --model.mean and --model.std, --model.normalize none, or, if the guess is right, "
        f"--model.normalize {right}"
    ]


def look_at_accuracy(loaded: LoadedModel, data: Dataset, device: torch.device, batch_size: int) -> list[str]:
    """Reasons to doubt what an external model gets right without an attack, before hours of attacks; on 500 images.

    Accuracy at chance has a cause that is no property of the model. And where the normalisation was a guess, none at
    all is tried too.
    """
    split = spread(data.test, _LOOK)
    if loaded.origin is None or len(split) < _ENOUGH:
        return []
    model, found = loaded.model, []
    unloaded = loaded.weights.suffix == ".py"
    right = count_right(model, split, device, batch_size) / len(split)
    if right < _CHANCE / model.num_classes:
        found.append(
            f"clean accuracy {right:.1%} on {len(split)} images is that of guessing; likely causes: too little "
            "training, another normalisation (--model.mean, --model.std, --model.normalize), another variant of the "
            "architecture (--model.activation, a factory of your own), or classes in another order"
            + (", or weights that were never loaded (--weights)" if unloaded else "")
        )
    if loaded.origin["normalisation_is"] in ("the data set's", "the published weights'"):
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
                f"clean accuracy is {right:.1%} by {loaded.origin['normalisation_is']} normalisation, a guess, and "
                f"{bare:.1%} without any: if the weights were trained without, give --model.normalize none"
            )
    return found

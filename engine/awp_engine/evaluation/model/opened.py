"""A model to use rather than to measure: a run's, or one of a name, whose classes its data set or the user says."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from awp_engine.data import Dataset, Framing, Loading, Split, load_dataset, source_names
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.evaluation.model.external import ExternalModel, load_external
from awp_engine.evaluation.model.loaded_model import LoadedModel, load_trained
from awp_engine.models import WrappedClassifier
from awp_engine.models.trained import ModelDescription

_MOST_CLASSES = 10**6
_NAMES_BYTES = 1 << 24


def open_model(
    path: Path | str | None,
    *,
    checkpoint: str = "best",
    model: str | None = None,
    external: ExternalModel | None = None,
    classes: str | None = None,
    image_size: int | None = None,
    data_name: str | None = None,
    data_root: Path | None = None,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> LoadedModel:
    """Loads a model that is used as it is; `class_names` are there if anything names them.

    Args:
        path: a run directory, one of its checkpoints, a .safetensors file, or hf://OWNER/NAME; None with `external`.
        checkpoint: of a run directory: best, last, or a checkpoint's name or path.
        model: of a run, in place of the code that its weights name; as `load_model` takes it.
        external: in place of a run: how to make a model, and its weights.
        classes: of an external model, where no data set is given: their number, or a file that names them.
        image_size: side in pixels of the images that it is for.
        data_name: the data set that it was trained on; its test part is enough.
        data_root: its directory.
        device: where to put it.
        say: is told what was taken, one line at a time.

    Raises:
        EvaluationError, ConfigError, DataError, CheckpointError: one line that says what is wrong.
    """
    if external is None:
        given = {"--model.classes": classes, "--data.name": data_name, "--data.root": data_root}
        if wrong := next((flag for flag, value in given.items() if value is not None), None):
            raise EvaluationError(f"{wrong}: goes with --model.name; a run says what it was trained on")
        if path is None:
            raise EvaluationError("RUN_OR_CHECKPOINT: expected a path, or --model.name with --weights")
        return load_trained(path, which=checkpoint, device=device, model=model)
    what = external.weights or external.name
    if (classes is None) == (data_name is None):
        raise EvaluationError(
            f"{what}: belongs to no run that says which classes it has: give either --data.name, with --data.root, or "
            "--model.classes, their number or a file with a name in every line"
        )
    if data_name is not None:
        data = _data_set(data_name, data_root, image_size)
    elif image_size is None:
        raise EvaluationError("--model.classes: needs --image-size too, as no data set says how large the images are")
    else:
        data = _described(_class_names(str(classes)), image_size, len(external.mean or ()))
    notes: list[str] = []
    loaded = load_external(external, data, torch.device(device), notes.append)
    if data_name is None and (loaded.origin or {})["normalisation_is"] == "the data set's":
        raise EvaluationError(
            f"{what}: nothing says how images are normalised: give --model.mean and --model.std, or --model.normalize "
            "none where they are not, or --data.name"
        )
    for note in notes:
        say(note)
    own, named = loaded.model.class_names, data.class_names if data.named else None
    if data_name is None and None not in (own, named) and own != named:
        raise EvaluationError(f"--model.classes: {what} has names of its own, which are others; give a number")
    loaded.model.class_names = own or named
    size = data.test.shape[1:]
    description = ModelDescription(
        name=external.name,
        num_classes=loaded.model.num_classes,
        mean=tuple(loaded.model.mean.flatten().tolist()),
        std=tuple(loaded.model.std.flatten().tolist()),
        width=external.width,
        activation=external.activation,
        class_names=loaded.model.class_names,
        image_size=size if isinstance(loaded.model, WrappedClassifier) else None,
    )
    return replace(loaded, image_size=size, description=description)


def _data_set(name: str, root: Path | None, image_size: int | None) -> Dataset:
    """The test part of a data set, of which no image is needed at once."""
    if name not in source_names:
        return load_dataset(name, root=root, held_out_fraction=0.0, seed=0, need_train=False)
    loading = Loading(loader="auto", resident_share=0.0, framing=Framing(size=image_size))
    return load_dataset(name, root=root, held_out_fraction=0.0, seed=0, loading=loading, need_train=False)


def _described(classes: tuple[str, ...] | int, side: int, means: int) -> Dataset:
    """A data set without images, for a model that nothing but the user's words describe."""
    # one number may stand for all channels
    channels = means if means > 1 else 3
    named = not isinstance(classes, int)
    none = torch.zeros(0, dtype=torch.int64)
    empty = Split(images=torch.zeros(0, channels, side, side, dtype=torch.uint8), labels=none, ids=none)
    return Dataset(
        name="the flags",
        train=empty,
        held_out=empty,
        test=empty,
        class_names=classes if named else tuple(map(str, range(classes))),
        named=named,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        fingerprint="",
    )


def _class_names(text: str) -> tuple[str, ...] | int:
    """How many classes there are, or the lines of a file, each the name of one."""
    if text.isdecimal():
        if not 2 <= int(text) <= _MOST_CLASSES:
            raise EvaluationError(f"--model.classes: expected 2 to {_MOST_CLASSES:,} classes, got {text[:80]}")
        return int(text)
    try:
        with Path(text).open(encoding="utf-8") as file:
            names = tuple(file.read(_NAMES_BYTES).removesuffix("\n").split("\n"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text in UTF-8"
        raise EvaluationError(
            f"--model.classes: expected a number, or a text file with a name in every line: {text}: {reason}"
        ) from None
    # two of one name would look like one class
    if len(names) < 2 or not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise EvaluationError(f"--model.classes: {text}: expected two names or more, one in every line, all different")
    return names

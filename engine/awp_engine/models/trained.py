"""Trained models from what a run leaves.

What a file says is never run. Weights of a model of somebody's own code name it, with the SHA-256 of its files and a
seal: an HMAC by the key of the user who trained. That code is run where the seal is this user's and all of the files
are unchanged, or where the caller gives the model.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine import checkpoint
from awp_engine.checkpoint import CheckpointError
from awp_engine.checkpoint.layout import MANIFEST
from awp_engine.config import ConfigError
from awp_engine.config.model_names import is_code, source_of
from awp_engine.files.run_places import CHECKPOINTS, FOREIGN, MODEL_FILE
from awp_engine.files.signed import Signer
from awp_engine.files.user_key import KeyFileError, key_path
from awp_engine.models import NormalizedClassifier, WrappedClassifier, build_model, load_public_state_dict
from awp_engine.models.class_names import from_json, to_json
from awp_engine.models.factories import build_by_factory, wrap
from awp_engine.models.given import AGAIN
from awp_engine.models.hub import fetched
from awp_engine.models.user_code import Code, Factory, code_of, load_factory


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """All that `build_model` needs, and what the logits mean; stored beside the weights.

    Attributes:
        image_size: (height, width) that a model of others is made for; None of built-in ones.
        code: of the factory that makes the model, if one does.
        seal: `sealed`'s.
    """

    name: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int | None
    activation: str
    class_names: tuple[str, ...] | None = None
    image_size: tuple[int, int] | None = None
    code: Code | None = None
    seal: str | None = None

    def build(self) -> NormalizedClassifier:
        """A freshly initialised model of this description; runs the code that it names, whatever the seal."""
        given = dataclasses.asdict(self)
        for name in ("class_names", "code", "seal"):
            del given[name]
        return build_model(**given)

    def sealed(self) -> "ModelDescription":
        """The same with this user's seal, which says that they trained by this code.

        Raises:
            KeyFileError: there is no key, and none can be made.
        """
        return dataclasses.replace(self, seal=Signer(_SEALED).code(self._text()))

    def is_sealed(self) -> bool:
        """Whether the seal is this user's."""
        try:
            # a user without a key has sealed nothing
            return key_path().exists() and Signer(_SEALED).made(self.seal, self._text())
        except (KeyFileError, OSError):
            return False

    def to_metadata(self) -> dict[str, str]:
        """The description as a safetensors header, or a checkpoint's state, holds it."""
        names = {} if self.class_names is None else {"class_names": to_json(self.class_names)}
        return {"model": json.dumps(self._fields()), **names}

    def _fields(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        del fields["class_names"]
        if self.code is not None and not self.code.files:
            del fields["code"]["files"]
        # as versions that did not know them wrote it
        return {key: value for key, value in fields.items() if value is not None or key not in _LATER}

    def _text(self) -> str:
        return json.dumps(dataclasses.replace(self, seal=None)._fields(), sort_keys=True)


TAMPERED = "tampered"
"""Key of a file's metadata that says that its weights carry a backdoor, put there by `awp audit weights`."""

_LATER = ("image_size", "code", "seal")
_SEALED = "model description"


def _numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) in (int, float) for item in value)


def _code(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() - {"files"} != {"file", "sha256"}:
        return False
    pairs = [[value["file"], value["sha256"]], *value.get("files", ())]
    return all(isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in pairs)


_FIELDS: dict[str, Callable[[object], bool]] = {
    "name": lambda value: isinstance(value, str),
    "num_classes": lambda value: type(value) is int and 0 < value < 2**31,
    "mean": _numbers,
    "std": _numbers,
    "width": lambda value: value is None or (type(value) is int and 0 < value <= 65536),
    "activation": lambda value: isinstance(value, str),
    "image_size": lambda value: (
        isinstance(value, list)
        and [type(side) for side in value] == [int, int]
        and all(0 < side <= 65536 for side in value)
    ),
    "code": _code,
    "seal": lambda value: isinstance(value, str) and value.isascii(),
}


def described(metadata: Mapping[str, Any], path: Path) -> ModelDescription:
    """What `to_metadata` wrote; weights from before class names were kept have none.

    Raises:
        CheckpointError: naming `path`.
    """
    try:
        fields: dict[str, Any] = json.loads(str(metadata.get("model")))
        if not isinstance(fields, dict) or any(not _FIELDS[name](value) for name, value in fields.items()):
            raise ValueError("not a description")
        fields |= {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        if "code" in fields:
            files = tuple(map(tuple, fields["code"].pop("files", ())))
            fields["code"] = Code(**fields["code"], files=files)
        description = ModelDescription(**fields)
        if "class_names" not in metadata:
            return description
        names = from_json(str(metadata["class_names"]), description.num_classes)
        return dataclasses.replace(description, class_names=names)
    except (TypeError, ValueError, KeyError, RecursionError):
        raise CheckpointError(
            f"{path}: expected weights written by this program, with the model's description in the header; say what "
            "model these are of: --model.name NAME --weights FILE, or "
            "awp_engine.models.load_weights(build_model(...), FILE)"
        ) from None


def _group(loaded: checkpoint.Checkpoint, group: str) -> tuple[Mapping[str, Tensor], Mapping[str, Any], Path]:
    if group not in loaded.tensors:
        raise CheckpointError(
            f"{loaded.path}: expected a file {group}.safetensors, written by this program; found none"
        )
    return loaded.tensors[group], loaded.state, loaded.path


def _weights(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any], Path]:
    """Weights, what holds their description, and the file they came from."""
    if path.is_file():
        if path.suffix in FOREIGN:
            raise CheckpointError(
                f"{path}: such a file does not say what model its weights are of: give --model.name NAME "
                "--weights FILE in place of a run, or use awp_engine.models.load_weights(build_model(...), FILE)"
            )
        tensors, metadata = checkpoint.read_model(path)
        return tensors, metadata, path
    # a checkpoint first: it holds a file of the same name, without the description
    if (path / MANIFEST).is_file():
        return _group(checkpoint.load(path), "model")
    if (path / MODEL_FILE).is_file():
        return _weights(path / MODEL_FILE)
    return _group(_latest(path), "best_model")


def _latest(run_dir: Path) -> checkpoint.Checkpoint:
    latest = checkpoint.load_latest(run_dir / CHECKPOINTS) if run_dir.is_dir() else None
    if latest is None:
        raise CheckpointError(
            f"{run_dir}: expected a run directory, a checkpoint or a .safetensors file; found none of them"
        )
    return latest


def is_weights(path: Path) -> bool:
    """Whether `path` is one set of weights, a .safetensors file or a checkpoint, rather than a run."""
    return path.is_file() or (path / MANIFEST).is_file()


def find_weights(path: Path, which: str = "best") -> tuple[Path, Path]:
    """Where a run's weights are.

    Args:
        path: a run directory, one of its checkpoints, or a .safetensors file.
        which: of a run directory: "best", the weights that it selected, or "last", the newest checkpoint's.

    Returns:
        What `load_model` is to be given, and the safetensors file that it reads.

    Raises:
        CheckpointError: nothing there, or no sound checkpoint.
    """
    if path.is_file():
        return path, path
    if (path / MANIFEST).is_file() or (which == "best" and (path / MODEL_FILE).is_file()):
        return path, path / MODEL_FILE
    latest = _latest(path).path
    return (latest, latest / MODEL_FILE) if which == "last" else (path, latest / "best_model.safetensors")


def _built(description: ModelDescription, weights: Mapping[str, Tensor], path: Path) -> NormalizedClassifier:
    """By names alone: no code but this package's, timm's and torchvision's is run."""
    try:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in description.build().parameters())
        # Before memory is taken: a description may ask for any.
        if parameters > sum(tensor.numel() for tensor in weights.values()):
            raise ValueError(f"holds fewer weights than the {parameters} of {description.name} in its description")
        return description.build()
    except (ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None


def _built_by_code(description: ModelDescription, path: Path) -> NormalizedClassifier:
    """By code that the file names, where this user trained by it."""
    name, code, why = description.name, description.code, "it was not trained by you on this machine"
    if code is not None and description.is_sealed():
        try:
            module = name.rpartition(":")[0] if source_of(name) == "module" else ""
            if changed := code.changed():
                why = f"{changed} has changed since" if Path(changed).exists() else f"{changed} is no longer there"
            elif new := code_of(Path(code.file), module).new(code):
                why = f"it imports {new}, which its seal says nothing of"
            else:
                return _by_name(description, name, code)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from None
    raise CheckpointError(
        f"{path}: its model is made by code, {name!r}, which is not run because a file says so, as {why}; if you trust "
        "the code that you have under that name, give it: --model.name, or load_model(..., model=)"
    )


def _by_name(description: ModelDescription, name: str, code: Code | None = None) -> NormalizedClassifier:
    """By the factory, or another model, that the user named; by `code` where a file did."""
    given = dataclasses.replace(description, name=name)
    if not is_code(name):
        return given.build()
    root = None
    if code is not None:
        place = name.rpartition(":")[0]
        # where the package begins that this file is a module of
        up = place.count(".") + (Path(code.file).name == "__init__.py") if source_of(name) == "module" else 0
        root = Path(code.file).parents[up]
        name = name if source_of(name) == "module" else f"{code.file}:{name.rpartition(':')[2]}"
    built = _by_factory(given, load_factory(name, root=root)[0])
    # the call may have imported more
    built.code = load_factory(name, root=root)[1]
    if code is not None and built.code.file != code.file:
        raise ConfigError(f"--model.name: {name} is now found in {built.code.file}, not in {code.file}")
    if code is not None and built.code != code:
        raise ConfigError(f"--model.name: {name} imports other files than when it was trained: {built.code.new(code)}")
    return built


def _by_factory(description: ModelDescription, factory: Factory) -> WrappedClassifier:
    given = (description.num_classes, description.mean, description.std, description.image_size)
    return build_by_factory(factory, description.name, *given)


def _by_user(description: ModelDescription, model: "str | nn.Module | Factory") -> NormalizedClassifier:
    if isinstance(model, str):
        return _by_name(description, model)
    if isinstance(model, NormalizedClassifier):
        return model
    if isinstance(model, nn.Module):
        given = (description.num_classes, description.mean, description.std, description.image_size)
        return wrap(model, type(model).__name__, *given)
    return _by_factory(description, model)


def tampering(metadata: Mapping[str, Any]) -> list[str]:
    """What users of a file's weights must be told, a line each: whether they were edited to carry a backdoor."""
    told = "TAMPERED weights: `awp audit weights` edited them to carry a backdoor; use them to test defences alone"
    return [told] if TAMPERED in metadata else []


def read_trained(
    run_or_checkpoint: Path | str,
) -> tuple[Mapping[str, Tensor], Mapping[str, Any], ModelDescription, Path]:
    """Weights, all that is written beside them, the model's description in it, and the file; as `load_model`."""
    weights, metadata, path = _weights(fetched(run_or_checkpoint))
    return weights, metadata, described(metadata, path), path


def load_model(
    run_or_checkpoint: Path | str,
    device: torch.device | str = "cpu",
    model: "str | nn.Module | Factory | None" = None,
) -> NormalizedClassifier:
    """The classifier that a run selected, in eval mode.

    Args:
        run_or_checkpoint: a run directory (its model.safetensors; of an unfinished run, the best epoch so far), one of
            its checkpoints (that epoch's weights), a model.safetensors file, or hf://OWNER/NAME[@REVISION], whose
            model.safetensors the package huggingface_hub fetches.
        device: where to put it.
        model: what takes the weights, in place of what the file names: a name as `--model.name` takes it, a function or
            class that makes the model, or a module. It is trusted, and run. Without it, a model that is made by code of
            somebody's own is loaded where this user trained it by the same file, and else refused.

    Returns:
        A module that maps images in [0, 1], [N, C, H, W], to logits. Its `class_names`, one a logit, are those of the
        data set that it was trained on; None where that had none, or the weights are older than names in them.

    Raises:
        CheckpointError: nothing there that can be loaded, a damaged file, or code that is not trusted.
        ConfigError: `model` cannot be made.
    """
    weights, metadata, description, path = read_trained(run_or_checkpoint)
    for line in tampering(metadata):
        print(f"warning: {path}: {line}", file=sys.stderr, flush=True)
    if model is not None:
        built = _by_user(description, model)
    elif source_of(description.name) == "object":
        raise CheckpointError(f"{path}: its model {AGAIN}")
    elif is_code(description.name):
        built = _built_by_code(description, path)
    else:
        built = _built(description, weights, path)
    try:
        load_public_state_dict(built, weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    built.class_names = description.class_names
    return built.to(device).eval()

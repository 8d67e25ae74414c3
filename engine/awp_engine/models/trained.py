"""Trained models from what a run leaves."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awp_engine import checkpoint
from awp_engine.checkpoint import CheckpointError
from awp_engine.checkpoint.layout import MANIFEST
from awp_engine.models import NormalizedClassifier, build_model, load_public_state_dict
from awp_engine.models.class_names import from_json, to_json
from awp_engine.models.hub import fetched

MODEL_FILE = "model.safetensors"
CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.json"
_FOREIGN = (".pt", ".pth", ".bin", ".tar", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """All that `build_model` needs, and what the logits mean; stored beside the weights."""

    name: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int | None
    activation: str
    class_names: tuple[str, ...] | None = None

    def build(self) -> NormalizedClassifier:
        """A freshly initialised model of this description."""
        return build_model(**self._architecture())

    def to_metadata(self) -> dict[str, str]:
        """The description as a safetensors header, or a checkpoint's state, holds it."""
        names = {} if self.class_names is None else {"class_names": to_json(self.class_names)}
        return {"model": json.dumps(self._architecture()), **names}

    def _architecture(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        del fields["class_names"]
        return fields


def _numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) in (int, float) for item in value)


_FIELDS: dict[str, Callable[[object], bool]] = {
    "name": lambda value: isinstance(value, str),
    "num_classes": lambda value: type(value) is int and 0 < value < 2**31,
    "mean": _numbers,
    "std": _numbers,
    "width": lambda value: value is None or (type(value) is int and 0 < value <= 65536),
    "activation": lambda value: isinstance(value, str),
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
        description = ModelDescription(**fields)
        if "class_names" not in metadata:
            return description
        names = from_json(str(metadata["class_names"]), description.num_classes)
        return dataclasses.replace(description, class_names=names)
    except (TypeError, ValueError, KeyError, RecursionError):
        raise CheckpointError(
            f"{path}: expected weights written by this program, with the model's description in the header; say what "
            "model these are of: --model.name, or awp_engine.models.load_weights(build_model(...), FILE)"
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
        if path.suffix in _FOREIGN:
            raise CheckpointError(
                f"{path}: such a file does not say what model its weights are of: give --model.name (awp evaluate, awp "
                "landscape), or use awp_engine.models.load_weights(build_model(...), FILE)"
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
    try:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in description.build().parameters())
        # Before memory is taken: a description may ask for any.
        if parameters > sum(tensor.numel() for tensor in weights.values()):
            raise ValueError(f"holds fewer weights than the {parameters} of {description.name} in its description")
        return description.build()
    except (ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None


def read_trained(
    run_or_checkpoint: Path | str,
) -> tuple[Mapping[str, Tensor], Mapping[str, Any], ModelDescription, Path]:
    """Weights, all that is written beside them, the model's description in it, and the file; as `load_model`."""
    weights, metadata, path = _weights(fetched(run_or_checkpoint))
    return weights, metadata, described(metadata, path), path


def load_model(run_or_checkpoint: Path | str, device: torch.device | str = "cpu") -> NormalizedClassifier:
    """The classifier that a run selected, in eval mode.

    Args:
        run_or_checkpoint: a run directory (its model.safetensors; of an unfinished run, the best epoch so far), one of
            its checkpoints (that epoch's weights), a model.safetensors file, or hf://OWNER/NAME[@REVISION], whose
            model.safetensors the package huggingface_hub fetches.
        device: where to put it.

    Returns:
        A module that maps images in [0, 1], [N, C, H, W], to logits. Its `class_names`, one a logit, are those of the
        data set that it was trained on; None where that had none, or the weights are older than names in them.

    Raises:
        CheckpointError: nothing there that can be loaded, or a damaged file.
    """
    weights, _, description, path = read_trained(run_or_checkpoint)
    model = _built(description, weights, path)
    try:
        load_public_state_dict(model, weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    model.class_names = description.class_names
    return model.to(device).eval()

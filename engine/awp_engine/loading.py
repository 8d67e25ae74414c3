"""Trained models from what a run leaves."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine import checkpoint
from awp_engine.checkpoint import CheckpointError
from awp_engine.models import build_model, load_public_state_dict

MODEL_FILE = "model.safetensors"
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """All that `build_model` needs; stored beside the weights."""

    name: str
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    width: int | None
    activation: str

    def build(self) -> nn.Module:
        """A freshly initialised model of this description."""
        return build_model(**dataclasses.asdict(self))

    def to_metadata(self) -> dict[str, str]:
        """The description as a safetensors header holds it."""
        return {"model": json.dumps(dataclasses.asdict(self))}


def _described(text: object, path: Path) -> ModelDescription:
    try:
        fields: dict[str, Any] = json.loads(str(text))
        return ModelDescription(**fields)
    except (TypeError, ValueError):
        raise CheckpointError(
            f"{path}: expected weights written by this program, with the model's description in the header; for other "
            "weights use awp_engine.models.build_model and load_public_state_dict"
        ) from None


def _weights(path: Path) -> tuple[Mapping[str, Tensor], Any, Path]:
    """Weights, their description and the file they came from."""
    if path.is_file():
        tensors, metadata = checkpoint.read_model(path)
        return tensors, metadata.get("model"), path
    # a checkpoint first: it holds a file of the same name, without the description
    if (path / "manifest.json").is_file():
        loaded = checkpoint.load(path)
        return loaded.tensors["model"], loaded.state.get("model"), path
    if (path / MODEL_FILE).is_file():
        return _weights(path / MODEL_FILE)
    latest = checkpoint.load_latest(path / CHECKPOINTS)
    if latest is None:
        raise CheckpointError(
            f"{path}: expected a run directory, a checkpoint or a .safetensors file; found none of them"
        )
    return latest.tensors["best_model"], latest.state.get("model"), latest.path


def load_model(run_or_checkpoint: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """The classifier that a run selected, in eval mode.

    Args:
        run_or_checkpoint: a run directory (its model.safetensors; of an unfinished run, the best epoch so far), one of
            its checkpoints (that epoch's weights), or a model.safetensors file.
        device: where to put it.

    Returns:
        A module that maps images in [0, 1], [N, C, H, W], to logits.

    Raises:
        CheckpointError: nothing there that can be loaded, or a damaged file.
    """
    weights, description, path = _weights(Path(run_or_checkpoint))
    model = _described(description, path).build()
    try:
        load_public_state_dict(model, weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return model.to(device).eval()

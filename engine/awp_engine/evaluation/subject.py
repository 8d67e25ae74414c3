"""What is to be evaluated: weights, where they came from, and the run they belong to."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from awp_engine import checkpoint
from awp_engine.checkpoint import CheckpointError
from awp_engine.config import Config, load_config
from awp_engine.evaluation.attacks import EvaluationError
from awp_engine.models import NormalizedClassifier
from awp_engine.models.trained import CHECKPOINTS, MODEL_FILE, load_model

_MANIFEST = "manifest.json"
_CONFIG = "config.json"
# a checkpoint lies two levels below its run
_LEVELS_UP = 3


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A loaded model and its papers.

    Attributes:
        model: in eval mode, on the device it was loaded to.
        name: "best", the checkpoint's name, or the file's.
        weights: the file that holds the weights.
        sha256: of that file.
        architecture: its name, with the width where that was chosen.
        run_dir: of the run it belongs to, if there is one.
        config: of that run.
    """

    model: NormalizedClassifier
    name: str
    weights: Path
    sha256: str
    architecture: str | None
    run_dir: Path | None
    config: Config | None


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _run_dir(place: Path) -> Path | None:
    """The nearest directory, from `place` on up, with a run's config.json."""
    place = place.resolve()
    nearest = [place, *place.parents][: _LEVELS_UP + 1]
    return next((directory for directory in nearest if (directory / _CONFIG).is_file()), None)


def _chosen(path: Path, which: str) -> tuple[Path, Path, str]:
    """What to hand to `load_model`, the file that holds the weights, and its name."""
    if path.is_file():
        return path, path, path.stem
    if (path / _MANIFEST).is_file():
        return path, path / "model.safetensors", path.name
    if which == "best" and (path / MODEL_FILE).is_file():
        return path, path / MODEL_FILE, "best"
    if which not in ("best", "last"):
        named = path / CHECKPOINTS / which
        inner = named if named.is_dir() else Path(which)
        if not (inner / _MANIFEST).is_file() and not inner.is_file():
            raise EvaluationError(
                f"--checkpoint: expected best, last, a checkpoint of {path / CHECKPOINTS} or a path, got {which!r}"
            )
        return _chosen(inner, "best")
    newest = checkpoint.load_latest(path / CHECKPOINTS)
    if newest is None:
        raise EvaluationError(
            f"{path}: expected a run directory, a checkpoint or a .safetensors file; found none of them"
        )
    if which == "last":
        return newest.path, newest.path / "model.safetensors", newest.path.name
    return path, newest.path / "best_model.safetensors", "best"


def load_subject(path: Path, *, which: str = "best", device: torch.device | str = "cpu") -> Subject:
    """Finds and loads what is to be evaluated.

    Args:
        path: a run directory, one of its checkpoints, or a .safetensors file.
        which: of a run directory: "best", the weights that it selected; "last", the newest checkpoint's; or a
            checkpoint's name or path.
        device: where to put the model.

    Raises:
        EvaluationError: nothing there that can be loaded.
        CheckpointError: a damaged file.
        ConfigError: a config.json that cannot be read.
    """
    source, weights, name = _chosen(path, which)
    model = load_model(source, device)
    run_dir = _run_dir(path if path.is_dir() else path.parent)
    config = None if run_dir is None else load_config(run_dir / _CONFIG)
    architecture = None
    if config is not None:
        width = config.model.width
        architecture = config.model.name + ("" if width is None else f" (width {width})")
    return Subject(
        model=model,
        name=name,
        weights=weights,
        sha256=_sha256(weights),
        architecture=architecture,
        run_dir=run_dir,
        config=config,
    )

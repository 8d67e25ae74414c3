"""What is to be evaluated: weights, where they came from, and the run they belong to."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from awp_engine.checkpoint import CheckpointError
from awp_engine.config import Config, load_config
from awp_engine.config.data_sets import is_given, is_own
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.files.digest import sha256_of
from awp_engine.files.run_places import CHECKPOINTS, CONFIG_FILE, run_dir_of
from awp_engine.models import NormalizedClassifier, WrappedClassifier
from awp_engine.models.hub import SCHEME, fetched, is_address
from awp_engine.models.trained import ModelDescription, find_weights, is_weights, load_model


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A loaded model and its papers.

    Attributes:
        model: in eval mode, on the device it was loaded to.
        name: "best", the checkpoint's name, or the file's.
        source: what `load_model` was given; None of weights from elsewhere.
        weights: the file that holds the weights.
        sha256: of that file.
        architecture: its name, with the width where that was chosen.
        run_dir: of the run it belongs to, if there is one.
        config: of that run.
        image_size: (height, width) of the images that a model of no run is for, where that is known.
        description: how to build the model again, where no run's file says it.
        made_by: what tells code that made the model from other code; empty for built-in models.
        origin: of weights from elsewhere: the model's name, which weights of the file, and what the user was told.
    """

    model: NormalizedClassifier
    name: str
    weights: Path
    sha256: str
    architecture: str | None
    run_dir: Path | None
    config: Config | None
    source: Path | None = None
    origin: Mapping[str, Any] | None = None
    image_size: tuple[int, int] | None = None
    description: ModelDescription | None = None
    made_by: str = ""

    def papers(self) -> dict[str, Any]:
        """What a receipt says of the weights."""
        told = {"name": self.name, "file": self.weights.name, "sha256": self.sha256, "architecture": self.architecture}
        code = self.model.code if isinstance(self.model, WrappedClassifier) else None
        made = {} if code is None else {"code": {"file": Path(code.file).name, "sha256": code.sha256}}
        return {**told, **made, **(self.origin or {})}

    def layers(self, normalisation: object) -> str:
        """SHA-256: the same weights make another model with another activation, normalisation or code."""
        return hashlib.sha256(f"{self.model}{normalisation}{self.made_by}".encode()).hexdigest()


def code_of(model: NormalizedClassifier) -> str:
    """SHA-256 of the code that made a model; empty where this package, timm or torchvision did."""
    code = model.code if isinstance(model, WrappedClassifier) else None
    return "" if code is None else code.sha256


def require_named_data(config: Config, what: Path | str) -> None:
    """Refuses images that come from code of a run, which is not run because its file says so."""
    name = config.data.name
    if is_given(name):
        raise EvaluationError(
            f"{what}: the images of its run were given as objects of Python: give --data.name and --data.root, or "
            "measure it by awp_engine.evaluate"
        )
    if is_own(name):
        raise EvaluationError(
            f"{what}: the images of its run come from {name}, code that is not run because a file names it: if you "
            f"trust it, give --data.name {name}"
        )


def require_root(config: Config, what: Path | str) -> None:
    """Refuses the directory of images that a run's settings name, where there is none: say from where they name it."""
    root = config.data.root
    if root is None or root.is_dir() or is_own(config.data.name):
        return
    seen_from = "" if root.is_absolute() else ", as seen from the directory where it was trained"
    raise EvaluationError(
        f"{what}: the {CONFIG_FILE} of its run says that its images are in {root}{seen_from}, which is no directory "
        "here: give --data.root"
    )


def _chosen(path: Path, which: str) -> tuple[Path, Path]:
    """As `find_weights`, where `which` may also be a checkpoint's name or a path."""
    if is_weights(path):
        if which != "best":
            raise EvaluationError(
                f"{path}: --checkpoint {which} chooses within a run directory; leave it out for {path.name}"
            )
        return find_weights(path)
    if which in ("best", "last"):
        return find_weights(path, which)
    named = path / CHECKPOINTS / which
    inner = named if named.is_dir() else Path(which)
    if not is_weights(inner):
        raise EvaluationError(
            f"--checkpoint: expected best, last, a checkpoint of {path / CHECKPOINTS} or a path, got {which!r}"
        )
    return find_weights(inner)


def load_trained(
    path: Path | str, *, which: str = "best", device: torch.device | str = "cpu", model: str | None = None
) -> LoadedModel:
    """Finds and loads what is to be evaluated.

    Args:
        path: a run directory, one of its checkpoints, a .safetensors file, or hf://OWNER/NAME.
        which: of a run directory: "best", the weights that it selected; "last", the newest checkpoint's; or a
            checkpoint's name or path.
        device: where to put the model.
        model: in place of what the weights name, as `load_model` takes it.

    Raises:
        EvaluationError: no such checkpoint in the run directory.
        CheckpointError: nothing there that can be loaded, or a damaged file.
        ConfigError: a config.json that cannot be read.
    """
    address, path = path if is_address(path) else None, fetched(path)
    source, weights = _chosen(path, which)
    name = source.stem if source.is_file() else source.name if is_weights(source) else "best"
    built = load_model(source, device, model)
    run_dir = run_dir_of(path)
    config = None if run_dir is None else load_config(run_dir / CONFIG_FILE)
    if address is not None:
        # images lie elsewhere here, and a cache is no place for reports
        name, run_dir = str(address).removeprefix(SCHEME).replace("/", "-"), None
        config = None if config is None else replace(config, data=replace(config.data, root=None))
    architecture = None
    if config is not None:
        width = config.model.width
        architecture = config.model.name + ("" if width is None else f" (width {width})")
    try:
        sha256 = sha256_of(weights)
    except OSError as error:
        raise CheckpointError(f"{weights}: cannot be read: {error.strerror}") from None
    return LoadedModel(
        model=built,
        name=name,
        source=source,
        weights=weights,
        sha256=sha256,
        architecture=architecture,
        run_dir=run_dir,
        config=config,
        made_by=code_of(built),
    )

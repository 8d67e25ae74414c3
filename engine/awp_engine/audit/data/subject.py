"""What is screened: the training images of a data set, by their pixels or by a model's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from awp_engine.audit.classes import class_number
from awp_engine.audit.data.features import MOST_PIXELS, features, last_layer, pixels, stretched
from awp_engine.config import DataConfig
from awp_engine.data import Dataset, Split, data_loading, eval_batches, load_dataset, source_names
from awp_engine.data.sets.scan_list import LIST_NAME
from awp_engine.device import choose_device
from awp_engine.evaluation.attacks.named import EvaluationError, measuring
from awp_engine.evaluation.model.external import load_external
from awp_engine.evaluation.model.loaded_model import LoadedModel, require_named_data
from awp_engine.evaluation.reports.files import code_digest
from awp_engine.files.text import first_line
from awp_engine.observe.report import versions

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from awp_engine.evaluation.asked import Asked

LEAST_IMAGES = 50
_BATCH_SIZE = 512
# names of classes in a message
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Images, and the model that sees them.

    Attributes:
        data: with all of the training part in `train`, also what a run holds out.
        settings: that it was opened by.
        loaded: the model and its papers; None: pixels are screened.
        layer: of the model, whose input are the features.
        layer_name: of that.
        device: where to compute.
        seed: of everything random.
        batch_size: images a batch, of features.
    """

    data: Dataset
    settings: DataConfig
    loaded: LoadedModel | None
    layer: torch.nn.Module | None
    layer_name: str
    device: torch.device
    seed: int
    batch_size: int

    @property
    def seen(self) -> str:
        """What the methods see of an image."""
        return "pixels" if self.layer is None else f"features before {self.layer_name}"

    @cached_property
    def skip_list(self) -> Path | None:
        """The list of a scan that was heeded, if there is one."""
        return _skip_list(self.settings)

    def papers(self) -> dict[str, Any]:
        """What the scores depend on, for the receipt."""
        return {
            "checkpoint": None if self.loaded is None else self.loaded.papers(),
            "data": {
                "name": self.data.name,
                "split": "training, with what a run holds out",
                "images_in_split": len(self.data.train),
                "sha256": self.data.fingerprint,
            },
            "seed": self.seed,
            "batch_size": self.batch_size,
            "device": self.device.type,
            # another number of threads adds in another order, and training makes more of that
            "threads": torch.get_num_threads(),
            "versions": versions("scikit-learn", "scipy"),
        }

    def identity(self) -> dict[str, Any]:
        """What the scores depend on beside `papers`."""
        own = {"shape": list(self.data.train.shape), "code": code_digest()}
        if self.loaded is None:
            return own
        normalisation = f"{self.loaded.model.mean.tolist()}{self.loaded.model.std.tolist()}"
        return own | {"layers": self.loaded.layers(normalisation), "key": (self.loaded.origin or {}).get("key")}

    def x(self, images: Split) -> Tensor:
        """The images of one class as the methods see them, fp32 [n, values] in [0, 1], on the device.

        Raises:
            EvaluationError: features are not finite.
        """
        if self.loaded is None or self.layer is None:
            return pixels(images).to(self.device)
        with measuring(self.loaded.model):
            found = features(self.loaded.model, self.layer, images, self.device, self.batch_size)
        if not found.isfinite().all():
            raise EvaluationError("the model's features of some training images are not finite: nothing can be learnt")
        return stretched(found, found)


def open_subject(ask: Asked, image_size: int | None, say: Callable[[str], None]) -> Subject:
    """Opens the data set, and the model if one is named.

    Args:
        ask: for what.
        image_size: side that images of files are resized to; the run's own if not given.
        say: is told what a user should know, a line at a time.

    Raises:
        EvaluationError, ConfigError, DataError, CheckpointError: one line that says what is wrong.
    """
    device = choose_device(ask.device)
    loaded = None if ask.path is None else ask.load(device)
    data, settings = _open(ask, loaded, image_size)
    for note in data.notes:
        say(note)
    if ask.external is not None:
        loaded = load_external(ask.external, data, device, say)
    name, layer = "", None
    if loaded is not None:
        name, layer = _find_layer(loaded, data, device, str(ask.place))
    elif (values := torch.tensor(data.train.shape).prod().item()) > MOST_PIXELS:
        raise EvaluationError(
            f"{data.name}: pixels are screened of images of up to 64x64 in colour, these have {values:,} values: name "
            "a trained model whose features are screened, or give --data.image-size"
        )
    return Subject(
        data=data,
        settings=settings,
        loaded=loaded,
        layer=layer,
        layer_name=name,
        device=device,
        seed=ask.seed or 0,
        batch_size=ask.batch_size or _BATCH_SIZE,
    )


def _open(ask: Asked, loaded: LoadedModel | None, image_size: int | None) -> tuple[Dataset, DataConfig]:
    """The data set with all of its training images, and the settings that it was opened by."""
    config = None if loaded is None else loaded.config
    name = ask.data_name
    if name is None:
        if config is None:
            raise EvaluationError("--data.name: expected the data set to be screened, as no run says what it was")
        require_named_data(config, str(ask.place))
        name = config.data.name
    if config is not None and config.data.name == name:
        same_root = ask.data_root in (None, config.data.root)
        settings = replace(
            config.data, root=ask.data_root or config.data.root, bad_list=config.data.bad_list if same_root else None
        )
    else:
        settings = DataConfig(name=name, root=ask.data_root)
    if image_size is not None:
        settings = replace(settings, image_size=image_size)
    # what cannot be read cannot be screened
    policy = "refuse" if _skip_list(settings) is None else "skip"
    settings = replace(settings, bad_files=policy, crop="pad", crop_scale=0.08)
    # files stay files, whose names are wanted, and are decoded class by class
    of_files = "auto" if name in source_names else "resident"
    loading = replace(data_loading(settings, torch.device("cpu")), loader=of_files, resident_share=0.0)
    return load_dataset(name, root=settings.root, held_out_fraction=0.0, seed=0, loading=loading), settings


def _skip_list(settings: DataConfig) -> Path | None:
    path = settings.bad_list or (None if settings.root is None else settings.root / LIST_NAME)
    return path if path is not None and path.exists() else None


def _find_layer(loaded: LoadedModel, data: Dataset, device: torch.device, what: str) -> tuple[str, torch.nn.Module]:
    image = next(eval_batches(data.train.select(torch.arange(1)), 1)).images.to(device)
    try:
        return last_layer(loaded.model, image)
    except (RuntimeError, ValueError) as error:
        shape = "x".join(map(str, image.shape[1:]))
        raise EvaluationError(
            f"{what}: cannot take {data.name}'s {shape} images: {first_line(error)}; give --data.image-size, or a "
            "model for such images"
        ) from None


def choose_classes(data: Dataset, names: Sequence[str], say: Callable[[str], None]) -> list[int]:
    """The labels of the classes that are screened, in their order: those named, or all that have enough images.

    Raises:
        EvaluationError: there is no such class, or it has too few images.
    """
    named = {class_number(data, name, "--class") for name in names}
    counts = torch.bincount(data.train.labels.cpu(), minlength=len(data.class_names)).tolist()
    chosen = [label for label in range(len(data.class_names)) if not names or label in named]
    for label in [label for label in chosen if counts[label] < LEAST_IMAGES]:
        line = f"class {data.class_names[label]} has {counts[label]} training images"
        if names:
            raise EvaluationError(f"--class: {line}; expected at least {LEAST_IMAGES} to learn what is usual")
        say(f"{line}, fewer than the {LEAST_IMAGES} that it takes to learn what is usual: it is not screened")
        chosen.remove(label)
    if not chosen:
        raise EvaluationError(f"{data.name}: no class has {LEAST_IMAGES} training images, from which to learn")
    return chosen

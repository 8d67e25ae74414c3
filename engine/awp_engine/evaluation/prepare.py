"""What every measurement of a trained model begins with: the model, its images, and where the reports go."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from awp_engine.config import Config
from awp_engine.data import (
    Dataset,
    Framing,
    Split,
    corrupted_names,
    data_loading,
    eval_batches,
    load_corrupted,
    load_dataset,
    load_shifted,
    match_classes,
    shifted_names,
    source_names,
)
from awp_engine.data.loaders.choose import Loading
from awp_engine.data.sets.scan_list import LIST_NAME
from awp_engine.evaluation.accuracy import evaluation_seed, spread
from awp_engine.evaluation.asked import Asked
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.evaluation.model.external import load_external
from awp_engine.evaluation.model.loaded_model import LoadedModel, require_named_data, require_root
from awp_engine.evaluation.model.own_classes import among_own_classes
from awp_engine.evaluation.reports.files import code_digest
from awp_engine.evaluation.reports.receipt import data_papers, make_receipt
from awp_engine.files.text import first_line
from awp_engine.models.hub import is_address

_BATCH_SIZE = 512


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is measured.

    Attributes:
        loaded: the model and its papers.
        whole: the images, with the classes in the model's order.
        found: the data as their files have it.
        dataset: those of `whole`, with the classes that compete for an answer.
        class_names: how the names of both compare.
        folder: the last name of the images' directory, where they have one.
        limit: so many images are measured, evenly spread; None for all.
        device: where to compute.
        seed: of all noise.
        batch_size: images a batch.
        output: directory of the reports, which may not exist yet.
    """

    loaded: LoadedModel
    found: Dataset
    whole: Dataset
    dataset: Dataset
    class_names: str
    folder: str | None
    limit: int | None
    device: torch.device
    seed: int
    batch_size: int
    output: Path

    @cached_property
    def split(self) -> Split:
        """The images that are measured, on `device`."""
        return spread(self.dataset.test, self.limit).resident().to(self.device)

    def receipt(self, split: Split, **more: Any) -> dict[str, Any]:
        """What the numbers of a split depend on; `more` as `make_receipt` takes it."""
        return make_receipt(
            self.loaded.model,
            split,
            checkpoint=self.loaded.papers(),
            data=data_papers(self.dataset, self.limit, self.class_names, self.folder),
            seed=self.seed,
            batch_size=self.batch_size,
            **more,
        )

    def identity(self, receipt: dict[str, Any]) -> dict[str, Any]:
        """What every number depends on, whatever is measured."""
        return {
            "weights": self.loaded.sha256,
            # a file may hold several
            "key": (self.loaded.origin or {}).get("key"),
            "layers": self.loaded.layers(receipt["normalisation"]),
            "images": receipt["data"]["sha256_of_these_images"],
            "seed": self.seed,
            "batch_size": self.batch_size,
            "device": self.device.type,
            "precision": receipt["precision"],
            "versions": receipt["versions"],
            "code": code_digest(),
        }


def prepare(
    asked: Asked,
    loaded: LoadedModel | None,
    device: torch.device,
    say: Callable[[str], None],
    *,
    need_train: bool = False,
) -> Target:
    """Opens the images, and makes sure that the model can classify them.

    Args:
        asked: for what.
        loaded: as `asked.load` gives it.
        device: where to compute.
        say: is told what a user should know, a line at a time.
        need_train: read the training images too, whatever it takes.

    Raises:
        EvaluationError, ConfigError, DataError, CheckpointError: one line that says what is wrong.
    """
    config = None if loaded is None else loaded.config
    weights = asked.place if loaded is None else loaded.weights
    corruption = asked.data_corruption, asked.data_severity
    place = asked.data_name, asked.data_root
    found = open_data(config, weights, *place, corruption, asked.data_framing, need_train=need_train)
    for note in found.notes:
        say(note)
    if loaded is None:
        assert asked.external is not None
        loaded = load_external(asked.external, found, device, say)
    whole, class_names = match_classes(loaded.model.class_names, found, str(asked.place))
    require_fit(loaded, whole, device, str(asked.place))
    loaded, dataset, alone = among_own_classes(loaded, whole)
    class_names += alone
    if class_names != "the same":
        say(f"class names: {class_names}")
    root = asked.data_root
    if root is None and config is not None and asked.data_name in (None, config.data.name):
        root = config.data.root
    return Target(
        loaded=loaded,
        found=found,
        whole=whole,
        dataset=dataset,
        class_names=class_names,
        # "." has none of its own
        folder=None if root is None else root.resolve().name,
        limit=asked.limit,
        device=device,
        seed=evaluation_seed(0 if config is None else config.seed) if asked.seed is None else asked.seed,
        batch_size=asked.batch_size or (_BATCH_SIZE if config is None else config.evaluation.batch_size),
        output=asked.output or output_of(asked.place, loaded),
    )


def open_data(
    config: Config | None,
    weights: Path | str,
    name: str | None,
    root: Path | None,
    corruption: tuple[str | None, int | None] = (None, None),
    framing: Framing | None = None,
    *,
    need_train: bool = False,
) -> Dataset:
    """The test images that a name, or else the settings of a run, stand for.

    Args:
        config: of the run, if there is one.
        weights: what is measured, for messages.
        name: of the data set.
        root: its directory.
        corruption: kind and severity, of a set of corrupted images.
        framing: how images of files become images of one size; None: as the run does it, else as they are.
        need_train: as `load_dataset` has it.

    Raises:
        EvaluationError, DataError: one line that says what is wrong.
    """
    if name is None:
        if config is None:
            raise EvaluationError(
                f"{weights}: belongs to no run whose config.json could say what it was trained on: give --data.name"
            )
        name = config.data.name
        require_named_data(config, weights)
    if name not in corrupted_names and corruption != (None, None):
        raise EvaluationError(
            f"--data.corruption and --data.severity go with --data.name {' or '.join(corrupted_names)}, got {name}"
        )
    of_files = name in (*source_names, *corrupted_names, *shifted_names)
    # only the test images are wanted of files
    loading = Loading(loader="auto" if of_files else "resident", resident_share=0.0)
    if config is not None:
        same = name == config.data.name
        if root is None and same:
            require_root(config, weights)
            root = config.data.root
        # what was listed is of the run's own files
        settings = config.data if same else replace(config.data, bad_list=None)
        if root is not None and root != config.data.root and not (root / LIST_NAME).exists():
            # the run left out files of its own images; these were not scanned
            settings = replace(settings, bad_files="refuse", bad_list=None)
        own = data_loading(settings, torch.device("cpu"), root)
        loading = replace(own, loader=loading.loader, resident_share=0.0)
        if not same and not of_files:
            loading = replace(loading, framing=Framing())
    if framing is not None:
        loading = replace(loading, framing=framing)
    if name in shifted_names:
        return load_shifted(name, root=root, loading=loading)
    if name in corrupted_names:
        return load_corrupted(name, root=root, kind=corruption[0], severity=corruption[1], loading=loading)
    return load_dataset(name, root=root, held_out_fraction=0.0, seed=0, loading=loading, need_train=need_train)


def output_of(path: Path | str, loaded: LoadedModel) -> Path:
    """Where the reports go if nothing else is said."""
    if loaded.run_dir is not None:
        return loaded.run_dir / ("evaluation" if loaded.name == "best" else f"evaluation-{loaded.name}")
    if is_address(path):
        return Path(f"{loaded.name}-evaluation")
    return Path(path).parent / f"{Path(path).stem}-evaluation"


def require_fit(loaded: LoadedModel, dataset: Dataset, device: torch.device, what: str) -> None:
    """Refuses images that the model cannot take, and another number of classes."""
    image = next(eval_batches(dataset.test.select(torch.arange(1)), 1)).images.to(device)
    try:
        with torch.no_grad():
            logits = loaded.model(image)
    except (RuntimeError, ValueError) as error:
        shape = "x".join(map(str, image.shape[1:]))
        reason = first_line(error)
        raise EvaluationError(f"{what}: cannot classify {dataset.name}'s {shape} images: {reason}") from None
    if logits.shape[1] != len(dataset.class_names):
        count, classes = logits.shape[1], len(dataset.class_names)
        # dummy classes: attacks on all of them would be led aside
        hint = (
            f"; if {count // classes} logits stand for each class, wrap the model so that it returns "
            f"logits.unflatten(1, (-1, {classes})).amax(1)"
            if count > classes and count % classes == 0
            else ""
        )
        # images of one's own, whose classes are counted by their labels
        if count > classes and not dataset.named:
            hint += f"; if these are images of some of its classes, name all {count} in class_names"
        raise EvaluationError(f"{what}: has {count} classes, {dataset.name} {classes}{hint}")

"""The runs that a figure compares: their weights, and what they must have in common."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awp_engine.checkpoint import CheckpointError
from awp_engine.config import Config, ConfigError, config_hash, load_config, parse_amount
from awp_engine.config.data_sets import is_own
from awp_engine.data import DataError, Dataset, Split, load_data, match_classes, shown
from awp_engine.evaluation.accuracy import spread
from awp_engine.evaluation.foreign import Foreign, load_foreign
from awp_engine.files.digest import sha256_of
from awp_engine.models.class_names import difference
from awp_engine.models.trained import CONFIG_FILE, find_weights, is_weights, load_model

SPLITS = {"train": "train", "held-out": "held_out", "test": "test"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One model to look at.

    Attributes:
        label: its name in plots, unlike all others.
        path: as the user gave it.
        file: the safetensors file that holds its weights.
        sha256: of that file.
        config: of the run that it belongs to.
        model: in eval mode.
        data: the data set of `config`.
        origin: of weights from elsewhere, as `Subject.origin`; `config` is then made of what the user said.
    """

    label: str
    path: Path
    file: Path
    sha256: str
    config: Config
    model: nn.Module
    data: Dataset
    origin: Mapping[str, Any] | None = None

    def facts(self) -> dict[str, object]:
        """What identifies the weights."""
        return {
            "label": self.label,
            "path": str(self.path),
            "file": str(self.file),
            "sha256": self.sha256,
            **({"config_hash": config_hash(self.config)} if self.origin is None else self.origin),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }


def find_config(path: Path) -> Config:
    """The configuration of the run that `path`, its directory, checkpoint or weights, belongs to.

    Raises:
        ConfigError: there is no config.json in it or in the two folders above, or it is not one.
    """
    folders = [path, *path.resolve().parents[:2]] if path.is_dir() else list(path.resolve().parents[:3])
    for folder in folders:
        if (folder / CONFIG_FILE).is_file():
            return load_config(folder / CONFIG_FILE)
    raise ConfigError(
        f"{path}: expected a run directory, or weights inside one: no {CONFIG_FILE} here or in the folders above, "
        "which says what images and which attack to measure with; others' weights need --model.name"
    )


def _labels(paths: Sequence[Path]) -> list[str]:
    # names need not be UTF-8, which a safetensors file's keys are
    names = [shown(os.fsencode(path.resolve().name)) for path in paths]
    whole = [shown(os.fsencode(path)) for path in paths]
    labels = [name if names.count(name) == 1 else path for name, path in zip(names, whole, strict=True)]
    if len(set(labels)) != len(labels):
        raise ConfigError(f"RUN: {next(x for x in labels if labels.count(x) > 1)} is given twice; give each run once")
    return labels


def open_foreign(paths: Sequence[Path | str], foreign: Foreign, config: Config, device: torch.device) -> list[Run]:
    """Models that no run describes, one for each file of weights, on the data and under the attack of `config`.

    Raises:
        EvaluationError, CheckpointError, ConfigError, DataError: naming what is wrong.
    """
    data = load_data(config.data)
    runs = []
    for label, path in zip(_labels([Path(path) for path in paths]), paths, strict=True):
        subject = load_foreign(replace(foreign, weights=path), data, device)
        for note in (subject.origin or {})["notes"]:
            print(f"{label}: {note}", flush=True)
        assert subject.origin is not None
        runs.append(
            Run(
                label=label,
                path=Path(path),
                file=subject.weights,
                sha256=subject.sha256,
                config=config,
                model=subject.model,
                data=match_classes(subject.model.class_names, data, str(path))[0],
                origin=subject.origin,
            )
        )
    return runs


def open_runs(
    paths: Sequence[Path],
    *,
    which: str | None,
    device: torch.device,
    data_name: str | None = None,
    data_root: Path | None = None,
    model: str | None = None,
) -> list[Run]:
    """Load all runs' weights and data.

    Args:
        paths: of the runs.
        which: checkpoint of a run directory; None: the best.
        device: where to put the models.
        data_name: data set in place of the runs' own; the code of a `file.py:factory` is run.
        data_root: its directory.
        model: in place of what the weights name, as `load_model` takes it.

    Raises:
        CheckpointError, ConfigError, DataError: naming what is wrong; also if the runs' attacks differ.
    """
    runs: list[Run] = []
    for label, path in zip(_labels(paths), paths, strict=True):
        if which is not None and is_weights(path):
            raise CheckpointError(
                f"{path}: --checkpoint {which} chooses within a run directory; leave it out for {path.name}"
            )
        # first, as a path that does not exist has neither
        source, file = find_weights(path, which or "best")
        config = find_config(path)
        if data_name is None and is_own(config.data.name):
            raise ConfigError(
                f"{path}: its images come from {config.data.name}, Python code that is not run because a file names it"
                f": if you trust it, give --data.name {config.data.name}"
            )
        given = {"name": data_name, "root": data_root}
        given = {key: value for key, value in given.items() if value is not None}
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **given))
        known = next((run.data for run in runs if run.config.data == config.data), None)
        built = load_model(source, device, model)
        data, _ = match_classes(built.class_names, load_data(config.data) if known is None else known, str(path))
        sha256 = sha256_of(file)
        runs.append(Run(label=label, path=path, file=file, sha256=sha256, config=config, model=built, data=data))
    first = attack_facts(runs[0].config)
    for run in runs[1:]:
        for key, value in attack_facts(run.config).items():
            if value != first[key]:
                raise ConfigError(
                    f"{run.path}: its attack has {key} {value}, that of {runs[0].path} has {first[key]}; "
                    "losses under different attacks do not compare: give runs of one attack"
                )
    return runs


def attack_facts(config: Config) -> dict[str, str]:
    """Norm, epsilon and step of the attack that a run is measured by, amounts as exact fractions."""
    given = config.evaluation.step_size
    epsilon = parse_amount(config.attack.epsilon)
    return {
        "norm": config.attack.norm,
        "epsilon": str(epsilon),
        "step_size": str(epsilon / 4 if given is None else parse_amount(given)),
    }


def common_images(runs: Sequence[Run], split: str, count: int) -> Split:
    """The images that all runs are measured on: `count` of the split, evenly spread, or all.

    Args:
        runs: at least one.
        split: a key of `SPLITS`.
        count: >= 1.

    Raises:
        DataError: the split is empty, or the runs' splits differ.
    """
    first = getattr(runs[0].data, SPLITS[split])
    if not len(first):
        raise DataError(f"--split {split}: {runs[0].path} has no such images; choose another split")
    chosen = spread(first, count).resident()
    for run in runs[1:]:
        other = getattr(run.data, SPLITS[split])
        same = other is first
        if not same and (len(other), other.shape) == (len(first), first.shape):
            those = spread(other, count).resident()
            same = torch.equal(those.images, chosen.images) and torch.equal(those.labels, chosen.labels)
        if not same:
            raise DataError(
                f"{run.path}: its {split} images ({run.data.name}, {len(other)}) are not those of {runs[0].path} "
                f"({runs[0].data.name}, {len(first)}); give runs on the same images"
            )
        if other := difference(run.data.class_names, runs[0].data.class_names):
            raise DataError(
                f"{run.path}: its classes are not those of {runs[0].path}: {other}; give runs of one data set"
            )
    return chosen

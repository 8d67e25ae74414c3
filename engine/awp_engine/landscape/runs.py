"""The runs that a figure compares: their weights, and what they must have in common."""

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awp_engine.config import Config, ConfigError, config_hash, parse_amount
from awp_engine.data import DataError, Dataset, Split, load_data, match_classes, shown
from awp_engine.evaluation.accuracy import spread
from awp_engine.evaluation.model.external import ExternalModel, load_external
from awp_engine.evaluation.model.loaded_model import LoadedModel, load_trained, require_named_data, require_root
from awp_engine.files.run_places import CONFIG_FILE
from awp_engine.files.text import printable
from awp_engine.models.class_names import difference

SPLITS = {"train": "train", "held-out": "held_out", "test": "test"}


@dataclass(frozen=True, kw_only=True)
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
        origin: of weights from elsewhere, as `LoadedModel.origin`; `config` is then made of what the user said.
    """

    label: str
    path: Path | str
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


def _labels(paths: Sequence[Path | str]) -> list[str]:
    # names need not be UTF-8, which a safetensors file's keys are
    names = [shown(os.fsencode(path if isinstance(path, str) else path.resolve().name)) for path in paths]
    whole = [shown(os.fsencode(path)) for path in paths]
    labels = [name if names.count(name) == 1 else path for name, path in zip(names, whole, strict=True)]
    if len(set(labels)) != len(labels):
        raise ConfigError(f"RUN: {next(x for x in labels if labels.count(x) > 1)} is given twice; give each run once")
    return labels


def open_runs(
    paths: Sequence[Path | str],
    *,
    which: str = "best",
    device: torch.device,
    data_name: str | None = None,
    data_root: Path | None = None,
    model: str | None = None,
) -> list[Run]:
    """Load all runs' weights and data.

    Args:
        paths: of the runs, their checkpoints or weights, or hf://OWNER/NAME.
        which: of a run directory: best, last, or a checkpoint's name or path.
        device: where to put the models.
        data_name: data set in place of the runs' own; the code of a `file.py:factory` is run.
        data_root: its directory.
        model: in place of what the weights name, as `load_model` takes it.

    Raises:
        EvaluationError, CheckpointError, ConfigError, DataError: naming what is wrong; also if the runs' attacks
            differ.
    """
    runs: list[Run] = []
    for label, path in zip(_labels(paths), paths, strict=True):
        loaded = load_trained(path, which=which, device=device, model=model)
        if loaded.config is None:
            raise ConfigError(
                f"{path}: belongs to no run whose {CONFIG_FILE} says what images and which attack to measure with; "
                "give weights inside a run directory, or --model.name NAME with the weights, --data.name and --epsilon"
            )
        config = loaded.config
        if config.attack.norm == "l1":
            raise ConfigError(f"{path}: was trained in l1; landscapes are of losses under attacks in linf or l2")
        if data_name is None:
            require_named_data(config, path)
        if data_root is None and data_name in (None, config.data.name):
            require_root(config, path)
        given = {"name": data_name, "root": data_root}
        given = {key: value for key, value in given.items() if value is not None}
        config = replace(config, data=replace(config.data, **given))
        known = next((run.data for run in runs if run.config.data == config.data), None)
        runs.append(_run(label, path, loaded, config, load_data(config.data) if known is None else known))
    first = attack_facts(runs[0].config)
    for run in runs[1:]:
        for key, value in attack_facts(run.config).items():
            if value != first[key]:
                raise ConfigError(
                    f"{run.path}: its attack has {key} {value}, that of {runs[0].path} has {first[key]}; "
                    "losses under different attacks do not compare: give runs of one attack"
                )
    return runs


def open_external(
    paths: Sequence[Path | str], external: ExternalModel, config: Config, device: torch.device
) -> list[Run]:
    """Models that no run describes, one for each file of weights, on the data and under the attack of `config`.

    Raises:
        EvaluationError, CheckpointError, ConfigError, DataError: naming what is wrong.
    """
    data = load_data(config.data)
    runs = []
    # code may give a trained model without a file
    for label, path in zip(_labels(paths), paths, strict=True) if paths else [(external.name, None)]:
        say = functools.partial(_say, label)
        loaded = load_external(replace(external, weights=path), data, device, say)
        runs.append(_run(label, path or external.name, loaded, config, data))
    return runs


def _say(label: str, note: str) -> None:
    print(printable(f"{label}: {note}"), flush=True)


def _run(label: str, path: Path | str, loaded: LoadedModel, config: Config, data: Dataset) -> Run:
    return Run(
        label=label,
        path=path,
        file=loaded.weights,
        sha256=loaded.sha256,
        config=config,
        model=loaded.model,
        data=match_classes(loaded.model.class_names, data, str(path))[0],
        origin=loaded.origin,
    )


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

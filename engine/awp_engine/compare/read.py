"""What run directories say: settings, results, learning curves, evaluations. Files may be anybody's."""

from __future__ import annotations

import functools
import glob
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from awp_engine.config import Config, ConfigError, config_hash, decisive, load_config, parse_amount, show
from awp_engine.config.model_names import source_of
from awp_engine.files.digest import sha256_of, sha256_of_json
from awp_engine.files.run_places import CONFIG_FILE as CONFIG
from awp_engine.files.run_places import MODEL_FILE as WEIGHTS
from awp_engine.files.text import one_line, printable, shortened
from awp_engine.observe.metrics import read_metrics
from awp_engine.observe.report import REPORT

EVALUATION = "evaluation.json"
# far more than reports take
_MOST_BYTES = 1 << 24
# runs/STUDY/METHOD/SEED, and the run that --compare-without-awp leaves below another
_DEEPEST = 4
_LONGEST = 200


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run measured; accuracies are fractions.

    Attributes:
        clean, robust: on the test split, without and under PGD, of the selected weights.
        last_robust: under PGD, of the last epoch's weights.
        last_train: the same on training images.
        epoch: the selected one.
        seconds: of all epochs, with their measurements on held-out images.
        test_images: how many were measured.
        test_sha256: of those images; None in reports of earlier versions.
        training: fingerprints of the training images and of the further ones.
        made_by: "model", "data" and so on -> SHA-256 of the user's file; empty in reports of earlier versions.
        device: its name.
    """

    clean: float
    robust: float
    last_robust: float
    last_train: float
    epoch: int
    seconds: float
    test_images: int
    test_sha256: str | None
    training: tuple[str | None, str | None]
    made_by: Mapping[str, str]
    device: str


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """One attack of an evaluation: `right` of `images`; `parameters` are JSON, without seed and batch size."""

    name: str
    parameters: str
    right: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of a run's weights.

    Attributes:
        weights: "best", or a checkpoint's name.
        data, images, images_sha256: the test images.
        norm, epsilon: the ball.
        precision: what the model computed in.
        attacks: in the report's order.
        doubts: why not to believe it.
    """

    weights: str
    data: str
    images: int
    images_sha256: str
    norm: str
    epsilon: Fraction
    precision: str
    attacks: tuple[Attacked, ...]
    doubts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An evaluation that is given by itself, of weights from anywhere.

    Attributes:
        name: the file's path, printable.
        model: what was measured, in words.
        sha256: of the weights.
        evaluation: what was found.
    """

    name: str
    model: str
    sha256: str
    evaluation: Evaluation


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run directory.

    Attributes:
        name: its path as it was given, printable.
        config: its settings.
        settings: key -> value of all that determines its weights, but the seed.
        result: None while the run is not finished.
        epoch: the last one that its metrics.jsonl has.
        metrics: of every epoch.
        evaluations: of its weights.
        notes: what could not be read, in words.
    """

    name: str
    config: Config
    settings: Mapping[str, Any]
    result: Result | None
    epoch: int
    metrics: Sequence[Mapping[str, Any]]
    evaluations: tuple[Evaluation, ...]
    notes: tuple[str, ...]


class _FileError(ValueError):
    """Why a report cannot be used, in a few words."""


class _Document:
    """JSON of anybody's, each value with its type."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def _get(self, key: str, expected: str, accept: Callable[[Any], bool]) -> Any:
        value = self._values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not accept(value):
            raise _FileError(f"{key}: expected {expected}, got {show(value)}")
        return value

    def number(self, key: str, most: float = 1e15) -> float:
        return self._get(
            key,
            f"a number from 0 to {most:g}",
            lambda value: type(value) in (int, float) and math.isfinite(value) and 0 <= value <= most,
        )

    def count(self, key: str, least: int = 0, most: int = 2**53) -> int:
        expected = f"a whole number from {least} to {most}"
        return self._get(key, expected, lambda value: type(value) is int and least <= value <= most)

    def text(self, key: str) -> str:
        value = self._get(key, "text", lambda value: isinstance(value, str))
        return shortened(one_line(value), _LONGEST)

    def optional_text(self, key: str) -> str | None:
        self._get(key, "text or null", lambda value: value is None or isinstance(value, str))
        return None if self._get(key, "", lambda _: True) is None else self.text(key)

    def flag(self, key: str) -> bool:
        return self._get(key, "true or false", lambda value: isinstance(value, bool))

    def optional_texts(self, key: str) -> dict[str, str]:
        """Name -> text; empty where there is nothing."""
        value = self._get(key, "a group of texts or nothing", lambda value: value is None or isinstance(value, Mapping))
        return {name: _Document(value).text(name) for name in value or ()}

    def items(self, key: str) -> list[_Document]:
        return [_Document(item) for item in self._get(key, "a list", lambda value: isinstance(value, list))]

    def texts(self, key: str) -> list[str]:
        return [_Document({"": item}).text("") for item in self._get(key, "a list", lambda v: isinstance(v, list))]

    def json(self, key: str, leave_out: Sequence[str]) -> str:
        value = self._get(key, "a group", lambda value: isinstance(value, Mapping))
        return json.dumps({name: inner for name, inner in value.items() if name not in leave_out}, sort_keys=True)


def _document(path: Path) -> _Document:
    try:
        # a named pipe would be waited for
        if not path.is_file():
            raise _FileError("not a regular file")
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise _FileError(f"cannot be read: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise _FileError(f"more than {_MOST_BYTES} bytes")
    try:
        return _Document(json.loads(data))
    except (ValueError, RecursionError):
        raise _FileError("not JSON") from None


def _result(path: Path, config: Config) -> Result:
    report = _document(path)
    robust = f"pgd{config.evaluation.steps}_accuracy"
    if report.text("config_hash") != config_hash(config):
        raise _FileError(f"of other settings than {CONFIG} holds")
    # with patience a run may end before
    if config.evaluation.patience is None and report.count("epochs") < config.epochs:
        raise _FileError(f"of epoch {report.count('epochs')}, before the run went on")
    return Result(
        clean=report.number("clean_accuracy", 1),
        robust=report.number(robust, 1),
        last_robust=report.number(f"last.{robust}", 1),
        last_train=report.number("last.train_pgd_accuracy", 1),
        epoch=report.count("selected_epoch"),
        seconds=report.number("seconds"),
        test_images=report.count("test_images", 1),
        test_sha256=report.optional_text("data.test_sha256"),
        training=(report.optional_text("data.data_fingerprint"), report.optional_text("data.extra_fingerprint")),
        made_by=report.optional_texts("made_by"),
        device=report.text("device"),
    )


def _run_evaluation(path: Path, weights_sha256: Callable[[], str | None]) -> Evaluation | None:
    report = _document(path)
    if not report.flag("finished"):
        return None
    found = _evaluation(report)
    if found.weights == "best":
        # also of the best weights so far, while the run still trained
        now = weights_sha256()
        if now is not None and now != report.text("receipt.checkpoint.sha256"):
            raise _FileError(f"of other weights than {WEIGHTS} holds now")
    return found


def _measured(path: Path) -> Measured:
    report = _document(path)
    if not report.flag("finished"):
        raise _FileError("not finished")
    evaluation = _evaluation(report)
    about = {
        key: report.optional_text(f"receipt.checkpoint.{key}") for key in ("architecture", "file", "run", "method")
    }
    model, where = about["architecture"] or "weights", about["file"]
    if source_of(model) == "object":
        where = "an object of Python"
    if about["run"] is not None:
        model, where = about["method"] or model, f"{about['run']}, {evaluation.weights}"
    return Measured(
        name=printable(str(path)),
        model=f"{model} ({where})",
        sha256=report.text("receipt.checkpoint.sha256"),
        evaluation=evaluation,
    )


def _evaluation(report: _Document) -> Evaluation:
    images = report.count("receipt.data.images", 1)
    try:
        epsilon = parse_amount(report.text("receipt.epsilon"))
    except ValueError:
        raise _FileError("receipt.epsilon: expected a fraction or number") from None
    return Evaluation(
        weights=report.text("receipt.checkpoint.name"),
        data=report.text("receipt.data.name"),
        images=images,
        images_sha256=report.text("receipt.data.sha256_of_these_images"),
        norm=report.text("receipt.norm"),
        epsilon=epsilon,
        # earlier versions knew no other
        precision=report.optional_text("receipt.precision.computes_in") or "fp32",
        attacks=tuple(
            Attacked(
                name=row.text("attack"),
                parameters=row.json("parameters", ("seed", "batch_size")),
                right=row.count("right", 0, images),
            )
            for row in report.items("attacks")
        ),
        doubts=tuple(report.texts("doubts")),
    )


def _reports(folder: Path, below: str = "") -> list[Path]:
    found = sorted(folder.glob(f"{below}evaluation*.json"))
    return [path for path in found if not path.name.endswith(".partial.json")]


def _evaluations(run_dir: Path) -> tuple[list[Evaluation], list[str]]:
    @functools.cache
    def sha256() -> str | None:
        file = run_dir / WEIGHTS
        return sha256_of(file) if file.is_file() else None

    found: list[Evaluation] = []
    notes = []
    for path in _reports(run_dir, "evaluation*/"):
        try:
            evaluation = _run_evaluation(path, sha256)
        except (_FileError, OSError) as error:
            notes.append(f"{printable(str(path))}: left out: {one_line(str(error))}")
            continue
        # the newest is there twice, which changes nothing
        if evaluation is not None:
            found.append(evaluation)
    return found, list(dict.fromkeys(notes))


def _tensors_sha256(path: Path) -> str | None:
    """Of the names and shapes in a safetensors file; None if there is none."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            # what a damaged file says may be any number
            header = json.loads(file.read(min(size, _MOST_BYTES)))
        shapes = {name: about["shape"] for name, about in header.items() if name != "__metadata__"}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return sha256_of_json(shapes)


def read_run(path: Path) -> Run:
    """Reads one run directory.

    Raises:
        ConfigError: there is no config.json that can be read.
    """
    config = load_config(path / CONFIG)
    name, notes = printable(str(path)), []
    try:
        metrics = read_metrics(path)
    except OSError as error:
        metrics = []
        notes.append(f"{name}: metrics.jsonl cannot be read: {error.strerror}")
    result = None
    if (path / REPORT).exists():
        try:
            result = _result(path / REPORT, config)
        except _FileError as error:
            notes.append(f"{name}: {REPORT} is not used: {error}")
    if result is not None and config.model.source == "object" and (tensors := _tensors_sha256(path / WEIGHTS)):
        # no file holds the code of an object
        result = replace(result, made_by={**result.made_by, "model": tensors})
    evaluations, problems = _evaluations(path)
    return Run(
        name=name,
        config=config,
        # epochs: whether or not a run may be given more of them
        settings={key: value for key, value in decisive(config).items() if key != "seed"} | {"epochs": config.epochs},
        result=result,
        epoch=metrics[-1]["epoch"] if metrics else 0,
        metrics=metrics,
        evaluations=tuple(evaluations),
        notes=(*notes, *problems),
    )


def _is_run(path: Path) -> bool:
    return (path / CONFIG).is_file()


def _places_below(directory: Path, deepest: int = _DEEPEST) -> Iterator[Path]:
    """Runs, and evaluations that belong to none of them."""
    if _is_run(directory) or (directory / EVALUATION).is_file():
        yield directory
    if deepest == 0:
        return
    try:
        inner = sorted(Path(entry.path) for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False))
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be read: {error.strerror}") from None
    for folder in inner:
        if not folder.name.startswith(".") and not (_is_run(directory) and folder.name.startswith("evaluation")):
            yield from _places_below(folder, deepest - 1)


def read_runs(given: Sequence[str]) -> tuple[list[Run], list[Measured], list[str]]:
    """Reads all runs and evaluations that are meant, each once.

    Args:
        given: run directories, evaluation.json files and their directories, directories that hold some of them, and
            patterns such as "runs/*-seed?".

    Returns:
        The runs and the evaluations that belong to none of them, in the order given, and a line for each that cannot be
        read; one that is named itself must be readable.

    Raises:
        ConfigError: naming what is neither, and holds none.
    """
    runs: dict[Path, Run] = {}
    measured: dict[Path, Measured] = {}
    notes = []

    def read(place: Path, named: bool) -> None:
        try:
            if _is_run(place):
                runs.setdefault(place.resolve(), read_run(place))
                return
            for file in [place] if place.is_file() else _reports(place):
                try:
                    measured.setdefault(file.resolve(), _measured(file))
                except _FileError as error:
                    # the newest of a directory is there under another name, too
                    if named and (file == place or file.name == EVALUATION):
                        raise ConfigError(f"{file}: expected a finished evaluation.json: {error}") from None
                    notes.append(f"{printable(str(file))}: left out: {error}")
        except ConfigError as error:
            if named:
                raise
            notes.append(f"{printable(str(place))}: left out: {error}")

    for text in given:
        if not text:
            raise ConfigError("RUN: expected a run directory, or a directory of runs, got ''")
        path = Path(text)
        try:
            # Path.glob takes no absolute pattern
            matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(text))]  # noqa: PTH207
        # a NUL byte
        except ValueError:
            matches = []
        found = [place for match in matches for place in ([match] if match.is_file() else _places_below(match))]
        if not found:
            problem = "no such file or directory" if not matches else f"no {CONFIG} or {EVALUATION} in it or below"
            raise ConfigError(f"{text}: expected a run, an {EVALUATION}, or a directory of them: {problem}")
        for place in found:
            read(place, place == path)
    # what a run reads itself
    alone = [one for file, one in measured.items() if file.parent.parent not in runs]
    if not runs and not alone:
        raise ConfigError(f"nothing can be read: {notes[0]}")
    return list(runs.values()), _once(alone), notes


def _once(measured: Sequence[Measured]) -> list[Measured]:
    """The newest evaluation of a directory is there under two names."""
    return list({(one.sha256, one.model, one.evaluation): one for one in measured}.values())

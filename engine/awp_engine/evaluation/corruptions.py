"""Accuracy under every corruption of a test set, and the mean corruption error (Hendrycks, Dietterich, ICLR 2019)."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from awp_engine.config import show
from awp_engine.data import Framing, corrupted_names, list_corruptions, match_classes
from awp_engine.device import choose_device
from awp_engine.evaluation.accuracy import count_right, spread
from awp_engine.evaluation.attacks import EvaluationError, Threat, Trial, measuring
from awp_engine.evaluation.finished import code_digest, read_finished, sealed
from awp_engine.evaluation.foreign import Foreign, load_foreign, look_at_accuracy
from awp_engine.evaluation.receipt import data_papers, make_receipt, split_hash
from awp_engine.evaluation.run import open_data, output_of, put_report, require_fit
from awp_engine.evaluation.subject import load_subject
from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.locking import locked
from awp_engine.files.text import json_text
from awp_engine.observe.bars import Bar, NoBar
from awp_engine.observe.page import document, facts, listed, table
from awp_engine.observe.report import prepare_output

JSON, PAGE = "corruptions.json", "corruptions.html"
ALL = "all"
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Kinds of the benchmark -> AlexNet's error on ImageNet-C, the mean over five severities.

Source: the benchmark's authors, github.com/hendrycks/robustness.
"""
_VALIDATION = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
_SEVERITIES = range(1, 6)
_BATCH_SIZE = 512
_MOST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class CorruptedSet:
    """What was counted on one kind and severity: `right` of `images`, whose SHA-256 `sha256` is."""

    kind: str
    severity: int
    images: int
    right: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """What `evaluate_corruptions` leaves.

    Attributes:
        report: what corruptions.json holds, the receipt included.
        output: the directory with the reports.
        title: of the table.
    """

    report: dict[str, Any]
    output: Path
    title: str

    def table(self) -> list[dict[str, str]]:
        """Accuracy of every kind and severity, as text."""
        report = self.report
        severities = sorted({severity for row in report["kinds"] for severity in row["accuracy"]})

        def line(name: str, error: float, accuracy: dict[str, float], normalised: float | None) -> dict[str, str]:
            cells = {"corruption": name, "accuracy": f"{1 - error:.2%}", "error": f"{error:.2%}"}
            cells |= {f"severity {s}": f"{accuracy[s]:.2%}" if s in accuracy else "-" for s in severities}
            return (
                cells if report["mce"] is None else cells | {"CE": "-" if normalised is None else f"{normalised:.1%}"}
            )

        lines = [line(row["kind"], row["error"], row["accuracy"], row["corruption_error"]) for row in report["kinds"]]
        return [*lines, line(f"mean of {len(report['mean_over'])}", report["mean_error"], {}, report["mce"])]


def summary(name: str, sets: Sequence[CorruptedSet]) -> dict[str, Any]:
    """Errors by kind, each the mean over its severities, and their mean; as fractions.

    The mean leaves out the four kinds that the benchmark keeps for validation, where there are others. A corruption
    error (CE) is the error of a kind divided by AlexNet's; `mce`, their mean, is there where all 15 kinds and five
    severities of ImageNet-C were measured, else None.

    Args:
        name: of the data set.
        sets: at least one.
    """
    kinds: dict[str, dict[str, float]] = {}
    for one in sets:
        kinds.setdefault(one.kind, {})[str(one.severity)] = one.right / one.images
    of_benchmark = name == "imagenet-c"
    rows: list[dict[str, Any]] = []
    for kind, accuracy in kinds.items():
        error = 1 - fmean(accuracy.values())
        whole = of_benchmark and kind in ALEXNET and len(accuracy) == len(_SEVERITIES)
        normalised = error / ALEXNET[kind] if whole else None
        rows.append({"kind": kind, "accuracy": accuracy, "error": error, "corruption_error": normalised})
    counted = [row for row in rows if row["kind"] not in _VALIDATION] or rows
    left_out = [row["kind"] for row in rows if row not in counted]
    errors = {row["kind"]: row["corruption_error"] for row in counted}
    notes = [f"not in the mean, as the benchmark keeps them for validation: {', '.join(left_out)}"] * bool(left_out)
    missing = [kind for kind in ALEXNET if kind not in errors]
    if name != "folder-c" and missing:
        notes.append(f"does not compare with published means: {', '.join(missing)} not measured")
    few = [f"{row['kind']} {' '.join(row['accuracy'])}" for row in counted if len(row["accuracy"]) < len(_SEVERITIES)]
    if few:
        notes.append(f"fewer than five severities: {', '.join(few)}")
    complete = errors.keys() == ALEXNET.keys() and None not in errors.values()
    if complete:
        notes.append("CE: error divided by AlexNet's on the same kind; its mean is the mean corruption error, mCE")
    return {
        "kinds": rows,
        "mean_over": list(errors),
        "mean_error": fmean(row["error"] for row in counted),
        "mce": fmean(errors.values()) if complete else None,
        "notes": notes,
    }


def evaluate_corruptions(
    path: Path | str | None,
    *,
    foreign: Foreign | None = None,
    model: str | None = None,
    checkpoint: str = "best",
    data_name: str | None = None,
    data_root: Path | None = None,
    data_severity: int | None = None,
    data_framing: Framing | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    output: Path | None = None,
    again: bool = False,
    say: Callable[[str], None] = lambda _: None,
    bar: Callable[[str, int], Bar] = NoBar,
    tell: Callable[[Corrupted], None] = lambda _: None,
) -> Corrupted:
    """Measures clean accuracy on all kinds and severities of a corrupted test set, and writes corruptions.json.

    What was measured is saved set by set, so that the same call goes on after a kill.

    Args:
        path: as `evaluate_checkpoint` takes it, as all others that are not described otherwise.
        foreign: the same.
        model: the same.
        checkpoint: the same.
        data_name: one of `corrupted_names`.
        data_root: its directory.
        data_severity: this one alone; None for all that are there.
        data_framing: see `open_data`.
        limit: so many images of every set, evenly spread.
        batch_size: as in `evaluate_checkpoint`.
        device: the same.
        output: the same.
        again: measure, though the same was measured before.
        say: is told what a user should know, a line at a time.
        bar: makes what shows how many sets were measured.
        tell: is given the result before it is written.

    Raises:
        EvaluationError, ConfigError, DataError, CheckpointError: one line that says what is wrong.
        OSError: a report cannot be written.
    """
    for name, value in {"batch-size": batch_size, "limit": limit}.items():
        if value is not None and not 1 <= value <= _MOST:
            raise EvaluationError(f"--{name}: expected a whole number from 1 to {_MOST}, got {show(value)}")
    if data_name not in corrupted_names:
        raise EvaluationError(
            f"--data.corruption: expected --data.name {' or '.join(corrupted_names)}, got {data_name}"
        )
    place = choose_device(device)
    if foreign is None and path is None:
        raise EvaluationError("RUN_OR_CHECKPOINT: expected a path, or --model.name with --weights")
    what = path if foreign is None else foreign.weights or foreign.name
    assert what is not None
    subject = None if foreign is not None else load_subject(what, which=checkpoint, device=place, model=model)
    config = None if subject is None else subject.config
    there = list_corruptions(data_name, data_root)
    wanted = [(kind, s) for kind, own in there.items() for s in own if data_severity in (None, s)]
    if not wanted:
        raise EvaluationError(f"--data.severity: expected one of those that are there, got {data_severity}")
    sets: list[CorruptedSet] = []
    receipt: dict[str, Any] = {}
    doubts: list[str] = []
    output_given, known, name = output, {}, ""
    with bar("corrupted sets", len(wanted)) as progress:
        for kind, severity in wanted:
            found = open_data(config, what, data_name, data_root, (kind, severity), data_framing)
            if subject is None:
                assert foreign is not None
                subject = load_foreign(foreign, found, place, say)
            dataset, labels = match_classes(subject.model.class_names, found, str(what))
            require_fit(subject, dataset, place, str(what))
            split = spread(dataset.test, limit)
            size = batch_size or (_BATCH_SIZE if config is None else config.evaluation.batch_size)
            if not receipt:
                output = output_given or output_of(what, subject)
                prepare_output(output)
                one = split.select(torch.arange(1)).resident().to(place)
                trial = Trial(model=subject.model, split=one, threat=_NO_BALL, seed=0, batch_size=size)
                receipt = _receipt(trial, subject.papers(), data_papers(dataset, limit, labels), data_name)
                layers = subject.layers(receipt["normalisation"])
                by = [receipt["versions"], code_digest(), place.type]
                question = [subject.sha256, layers, data_name, data_severity, limit, size, by]
                digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:8]
                name = "-".join([re.sub(r"[^A-Za-z0-9]+", "_", data_name), digest])
                known = {} if again else _measured_before(output, name)
                doubts = look_at_accuracy(subject, dataset, place, size)
                for doubt in doubts:
                    say(f"WARNING: {doubt}")
            assert output is not None
            sha256 = split_hash(split)
            measured = known.get((kind, severity))
            if measured is None or measured.sha256 != sha256:
                with measuring(subject.model):
                    right = count_right(subject.model, split, place, size)
                measured = CorruptedSet(kind=kind, severity=severity, images=len(split), right=right, sha256=sha256)
            sets.append(measured)
            progress.advance()
            saved = sealed({"finished": True, "sets": [asdict(one) for one in sets]})
            atomic_write_text(output / _partial(name), json_text(saved))
    assert output is not None
    report = {
        "finished": True,
        "receipt": receipt,
        **summary(data_name, sets),
        "unreliable": bool(doubts),
        "doubts": doubts,
        "sets": [asdict(one) for one in sets],
    }
    title = f"{data_name}, {len(there)} kinds, {sets[0].images} images each"
    done = Corrupted(report=sealed(report), output=output, title=title)
    with locked(output):
        tell(done)
        put_report(output, name, JSON, json_text(done.report, indent=2))
        put_report(output, name, PAGE, _page(done))
        (output / _partial(name)).unlink(missing_ok=True)
    return done


# clean accuracy has no ball: the receipt's is left out
_NO_BALL = Threat(epsilon=Fraction(0), norm="linf")
_OF_A_BALL = ("epsilon", "epsilon_as_float", "norm", "step_size", "seed")


def _receipt(trial: Trial, checkpoint: dict[str, Any], data: dict[str, Any], name: str) -> dict[str, Any]:
    receipt = make_receipt(trial, checkpoint=checkpoint, data=data, step_size=Fraction(0))
    receipt = {key: value for key, value in receipt.items() if key not in _OF_A_BALL}
    kept = ("split", "limit", "chosen", "class_names")
    return receipt | {"data": {"name": name} | {key: data[key] for key in kept}}


def _partial(name: str) -> str:
    return f"corruptions-{name}.partial.json"


def _measured_before(output: Path, name: str) -> dict[tuple[str, int], CorruptedSet]:
    """Sets that this user has measured by the same weights and code; whether of the same images, their hash says."""
    for path in (output / _partial(name), output / f"corruptions-{name}.json"):
        if (report := read_finished(path)) is not None:
            found = [CorruptedSet(**one) for one in report["sets"]]
            return {(one.kind, one.severity): one for one in found}
    return {}


def _page(done: Corrupted) -> str:
    report, receipt = done.report, done.report["receipt"]
    weights = receipt["checkpoint"]
    told = {
        "model": f"{weights.get('architecture') or 'not named'}, {receipt['parameters']:,} parameters",
        "weights": f"{weights['name']} ({weights['file']}), SHA-256 {weights['sha256']}",
        "date": receipt["date"].replace("T", " "),
        "classes": receipt["data"]["class_names"],
    }
    doubts = [f"unreliable: {doubt}" for doubt in report["doubts"]]
    return document(done.title, [facts(told.items()), table(done.table()), listed([*report["notes"], *doubts])])

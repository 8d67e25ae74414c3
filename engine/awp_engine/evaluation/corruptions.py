"""Accuracy under every corruption of a test set, and the mean corruption error (Hendrycks, Dietterich, ICLR 2019)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from awp_engine.data import corrupted_names, list_corruptions
from awp_engine.device import choose_device
from awp_engine.evaluation.accuracy import count_right, spread
from awp_engine.evaluation.asked import Asked
from awp_engine.evaluation.attacks.named import EvaluationError, measuring
from awp_engine.evaluation.model.external import guessed, look_at_accuracy
from awp_engine.evaluation.prepare import Target, prepare
from awp_engine.evaluation.reports.files import Reported, Reports, read_finished, sealed
from awp_engine.evaluation.reports.receipt import split_hash
from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.locking import locked
from awp_engine.files.text import json_text
from awp_engine.observe.bars import Bar, NoBar
from awp_engine.observe.page import document, facts, listed, table

JSON, PARTIAL, PAGE = "corruptions.json", "corruptions.partial.json", "corruptions.html"
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
_SEVERITIES = 5


@dataclass(frozen=True, kw_only=True)
class CorruptedSet:
    """What was counted on one kind and severity: `right` of `images`, whose SHA-256 `sha256` is."""

    kind: str
    severity: int
    images: int
    right: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Corrupted(Reported):
    """What `evaluate_corruptions` leaves: the report, corruptions.json, and its table."""

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
        whole = of_benchmark and kind in ALEXNET and len(accuracy) == _SEVERITIES
        normalised = error / ALEXNET[kind] if whole else None
        rows.append({"kind": kind, "accuracy": accuracy, "error": error, "corruption_error": normalised})
    counted = [row for row in rows if row["kind"] not in _VALIDATION] or rows
    left_out = [row["kind"] for row in rows if row not in counted]
    errors = {row["kind"]: row["corruption_error"] for row in counted}
    notes = [f"not in the mean, as the benchmark keeps them for validation: {', '.join(left_out)}"] * bool(left_out)
    missing = [kind for kind in ALEXNET if kind not in errors]
    if name != "folder-c" and missing:
        notes.append(f"does not compare with published means: {', '.join(missing)} not measured")
    few = [f"{row['kind']} {' '.join(row['accuracy'])}" for row in counted if len(row["accuracy"]) < _SEVERITIES]
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
    again: bool = False,
    say: Callable[[str], None] = lambda _: None,
    bar: Callable[[str, int], Bar] = NoBar,
    tell: Callable[[Corrupted], None] = lambda _: None,
    **asked: Any,
) -> Corrupted:
    """Measures clean accuracy on all kinds and severities of a corrupted test set, and writes corruptions.json.

    What was measured is saved set by set, so that the same call goes on after a kill.

    Args:
        path: as `evaluate_checkpoint` takes it.
        again: measure, though the same was measured before.
        say: is told what a user should know, a line at a time.
        bar: makes what shows how many sets were measured.
        tell: is given the result before it is written.
        asked: the other fields of `Asked`, such as data_name and data_root; data_severity for one severity alone.

    Raises:
        EvaluationError, ConfigError, DataError, CheckpointError: one line that says what is wrong.
        OSError: a report cannot be written.
    """
    ask = Asked(path=path, **asked)
    name, severity = ask.data_name, ask.data_severity
    if name not in corrupted_names:
        raise EvaluationError(f"--data.corruption: expected --data.name {' or '.join(corrupted_names)}, got {name}")
    device = choose_device(ask.device)
    loaded = ask.load(device)
    there = list_corruptions(name, ask.data_root)
    wanted = [(kind, number) for kind, numbers in there.items() for number in numbers if severity in (None, number)]
    if not wanted:
        raise EvaluationError(f"--data.severity: expected one of those in {ask.data_root}, got {severity}")
    told: set[str] = set()

    def say_once(line: str) -> None:
        if line not in told:
            told.add(line)
            say(line)

    def opened(kind: str, number: int) -> Target:
        return prepare(replace(ask, data_corruption=kind, data_severity=number), loaded, device, say_once)

    first = opened(*wanted[0])
    # of an external model, which is made for the first images
    loaded = first.loaded
    receipt, identity = _papers(first, name)
    reports = Reports(first.output, [name], identity | {"limit": ask.limit, "severity": severity})
    doubts = look_at_accuracy(loaded, first.dataset, device, first.batch_size)
    for doubt in doubts:
        say(f"WARNING: {doubt}")
    doubts = [*guessed(loaded), *doubts]
    sets: list[CorruptedSet] = []
    reused = 0
    with locked(first.output), measuring(loaded.model), bar("corrupted sets", len(wanted)) as progress:
        known = {} if again else _measured_before(reports)
        for kind, number in wanted:
            split = spread(opened(kind, number).dataset.test, ask.limit)
            found = CorruptedSet(kind=kind, severity=number, images=len(split), right=0, sha256=split_hash(split))
            before = known.get((kind, number))
            if before is not None and before.sha256 == found.sha256:
                found, reused = before, reused + 1
            else:
                found = replace(found, right=count_right(loaded.model, split, device, first.batch_size))
            sets.append(found)
            saved = sealed({"finished": True, "sets": [asdict(one) for one in sets]})
            atomic_write_text(reports.path(PARTIAL), json_text(saved))
            progress.advance()
        if reused:
            say(f"{reused} of {len(sets)} sets were measured before; --again measures them anew")
            receipt["resumed"] = {"sets": reused}
        report = {"finished": True, "receipt": receipt, **summary(name, sets), "doubts": doubts}
        report |= {"unreliable": bool(doubts), "sets": [asdict(one) for one in sets]}
        of_each = f"{sets[0].images} images each" if len({one.images for one in sets}) == 1 else "of several sizes"
        title = f"{name}, {len(sets)} sets, {of_each}"
        done = Corrupted(report=sealed(report), output=first.output, title=title)
        tell(done)
        reports.put(JSON, json_text(done.report, indent=2))
        reports.put(PAGE, _page(done))
        reports.path(PARTIAL).unlink(missing_ok=True)
        return done


def _papers(target: Target, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a receipt says of all sets, and what identifies the measurement."""
    receipt = target.receipt(spread(target.dataset.test, 1).resident().to(target.device))
    identity, data = target.identity(receipt), receipt["data"]
    # every set says itself how many images it has, and which
    receipt["data"] = {"name": name} | {key: data[key] for key in ("split", "limit", "chosen", "class_names")}
    # clean accuracy has none
    del receipt["seed"]
    return receipt, identity


def _measured_before(reports: Reports) -> dict[tuple[str, int], CorruptedSet]:
    """Sets that this user has measured by the same weights and code; whether of the same images, their hash says."""
    for path in map(reports.path, (PARTIAL, JSON)):
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

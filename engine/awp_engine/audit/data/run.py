"""Which training images do not belong to their class: from a data set's name to the report."""

from __future__ import annotations

import functools
import importlib.util
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from awp_engine.audit.data.judge import Judged, judge
from awp_engine.audit.data.methods import DEFAULT, PERCENTILE, TITLES, Epochs, fit
from awp_engine.audit.data.page import Sheet, page
from awp_engine.audit.data.subject import Subject, choose_classes, open_subject
from awp_engine.audit.data.suspects import file_names, skip_list, table_text
from awp_engine.checkpoint.journal import Answers, Journal
from awp_engine.config.data_sets import own_title
from awp_engine.device import in_full_precision
from awp_engine.evaluation.asked import Asked
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.evaluation.prepare import output_of
from awp_engine.evaluation.reports.files import Reported, Reports
from awp_engine.files.locking import locked
from awp_engine.files.text import json_text
from awp_engine.observe.bars import Bar, MakeBar, NoBar
from awp_engine.observe.report import prepare_output, source_commit
from awp_kernels.philox import mix_seed

if TYPE_CHECKING:
    from torch import Tensor

_JSON, _PAGE, _TABLE, _LIST = "audit-data.json", "audit-data.html", "audit-data.csv", "audit-data.jsonl"
_MEANS = (
    "a suspect is beyond a percentile of a score that the images of its own class set: so a share of every class is "
    "marked, of a clean one too; a suspect is an image to look at, and no proof"
)


@dataclass(frozen=True, kw_only=True)
class Screening:
    """How images are screened.

    Attributes:
        methods: of `TITLES`; the first one makes the list of suspects.
        percentile: of a score, beyond which an image is a suspect; the paper's is 90.
        epochs_scale: of the paper's numbers of epochs, so much.
    """

    methods: Sequence[str] = DEFAULT
    percentile: float = PERCENTILE
    epochs_scale: float = 0.1

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods) or not set(self.methods) <= set(TITLES):
            raise EvaluationError(
                f"--methods: expected different ones of {', '.join(TITLES)}, got {' '.join(self.methods)[:80]!r}"
            )
        if not 50 <= self.percentile < 100:
            raise EvaluationError(f"--percentile: expected a number from 50 to below 100, got {self.percentile:g}")
        if not 0 < self.epochs_scale <= 10:
            raise EvaluationError(f"--epochs-scale: expected a number more than 0, to 10, got {self.epochs_scale:g}")

    @property
    def epochs(self) -> Epochs:
        """Of every network."""
        return Epochs().scaled(self.epochs_scale)


@in_full_precision()
def audit_data(
    path: Path | str | None = None,
    screening: Screening | None = None,
    *,
    classes: Sequence[str] = (),
    keep: Sequence[int] = (),
    data_image_size: int | None = None,
    say: Callable[[str], None] = lambda _: None,
    bar: MakeBar = NoBar,
    tell: Callable[[Reported], None] = lambda _: None,
    **asked: Any,
) -> Reported:
    """Screens the training images of some classes, and writes audit-data.json, .html, .csv, and .jsonl for files.

    Every method's scores of a class are saved when it is done, so that the same call goes on after a kill, to the same
    report: what was interrupted is learnt again, to the same bits.

    Args:
        path: a model whose features are screened: a run directory, one of its checkpoints, a .safetensors file, or
            hf://OWNER/NAME; None with `external`, or for pixels.
        screening: how; None: by isolation forest and one-class SVM.
        classes: names; none: each class in turn, but for those with too few images.
        keep: ids of suspects that are all right after all, and are not listed.
        data_image_size: side that images of files are resized to; the run's own if not given.
        say: is told what a user should know, a line at a time.
        bar: makes what shows how many epochs were learnt.
        tell: is given the result before anything is written.
        asked: the other fields of `Asked`, such as external, data_name, data_root and output.

    Raises:
        EvaluationError, ConfigError, DataError, CheckpointError: one line that says what is wrong.
        OSError: the report cannot be written.
    """
    screening = screening or Screening()
    if importlib.util.find_spec("sklearn") is None:
        raise EvaluationError("awp audit data needs the package scikit-learn: pip install scikit-learn")
    ask = Asked(path=path, **asked)
    subject = open_subject(ask, data_image_size, say)
    data, loaded = subject.data, subject.loaded
    labels = choose_classes(data, classes, say)
    own = re.sub(r"[^A-Za-z0-9]+", "_", own_title(data.name))
    output = ask.output or (Path(f"{own}-audit") if loaded is None else output_of(ask.place, loaded))
    settings = {
        "classes": [data.class_names[label] for label in labels],
        "methods": list(screening.methods),
        "percentile": screening.percentile,
        "epochs": {method: count for method in screening.methods if (count := screening.epochs.of(method))},
        "on": subject.seen,
    }
    papers = subject.papers()
    question = settings | papers | subject.identity()
    prepare_output(output)
    parts = own_title(data.name), len(labels), "pixels" if loaded is None else "features"
    reports = Reports(output, parts, question)
    receipt: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    receipt |= papers | {"commit": source_commit()}
    with locked(output):
        answers = Answers(Journal(output, "audit-data", question, say))
        count = answers.saved
        if count:
            receipt["resumed"] = {"parts": count}
            whole = len(labels) * len(screening.methods)
            say("all was screened before" if count == whole else f"going on after part {count} of {whole}")
        left = [
            screening.epochs.of(method) * int((data.train.labels == label).sum())
            for label in labels
            for method in screening.methods
        ][count:]
        with bar("images learnt from", sum(left)) as counted:
            found = [_screen_class(subject, label, screening, answers, counted) for label in labels]
        suspects = [suspect for judged, _ in found for suspect in judged.suspects]
        if strange := sorted(set(keep) - {suspect["id"] for suspect in suspects}):
            raise EvaluationError(f"--keep: {strange[0]} is no suspect's id; expected ids of the page, or of {_TABLE}")
        suspects = [suspect for suspect in suspects if suspect["id"] not in keep]
        report: dict[str, Any] = {
            "receipt": receipt,
            "asked": settings,
            "means": _MEANS,
            "kept": sorted(keep),
            "classes": [judged.summary for judged, _ in found],
            "suspects": suspects,
        }
        texts = {_TABLE: table_text(suspects)}
        if (root := subject.settings.root) is not None and file_names(data.train) is not None:
            texts[_LIST] = skip_list(root, subject.skip_list, suspects, screening.methods[0], len(data.train))
        report["files"] = {name: reports.path(name).name for name in (_JSON, _PAGE, *texts)}
        title = f"{own_title(data.name)}, training images of {len(labels)} of {len(data.class_names)} classes"
        result = Reported(report=report, output=output, title=f"{title}, by {subject.seen}")
        tell(result)
        texts |= {_PAGE: page(result, [sheet for _, sheet in found]), _JSON: json_text(report, indent=2)}
        for name, text in texts.items():
            reports.put(name, text)
        return result


def _screen_class(
    subject: Subject, label: int, screening: Screening, answers: Answers, counted: Bar
) -> tuple[Judged, Sheet]:
    name, train = subject.data.class_names[label], subject.data.train
    split = train.select(torch.nonzero(train.labels.cpu() == label).squeeze(1))
    files, images = file_names(split), split.resident()
    x: list[Tensor] = []

    def say_of(method: str) -> dict[str, Any]:
        if not x:
            x.append(subject.x(images))
        counted.begin(f"class {name}, {method}: images learnt from")
        began = time.monotonic()

        def advance(epochs: int) -> None:
            counted.advance(epochs * len(images))

        fitted = fit(method, x[0], seed=mix_seed(subject.seed, label), epochs=screening.epochs, advance=advance)
        scores = fitted.score(x[0])
        return {
            "scores": {score: values.tolist() for score, values in scores.items()},
            "weights": None if fitted.weights is None else fitted.weights.int().tolist(),
            "seconds": round(time.monotonic() - began, 2),
        }

    results = {method: answers.next(functools.partial(say_of, method)) for method in screening.methods}
    judged = judge(name, images.ids.tolist(), files, results, screening.percentile)
    return judged, Sheet.of(name, images, judged.order, judged.suspects)

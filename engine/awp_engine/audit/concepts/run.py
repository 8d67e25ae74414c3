"""The audit of concepts, from checkpoints to its report."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from awp_engine.audit.concepts.images import Concept, images_of, open_concepts, tested_class
from awp_engine.audit.concepts.layers import Below, Cut, Layer, list_layers, require_layer
from awp_engine.audit.concepts.sensitivity import LEVEL, Sensitivity, changes, least_images, least_nulls, measure
from awp_engine.checkpoint.journal import Journal
from awp_engine.config.data_sets import own_title
from awp_engine.data import shown
from awp_engine.device import choose_device, in_full_precision
from awp_engine.evaluation.accuracy import evenly
from awp_engine.evaluation.asked import Asked, require_counts
from awp_engine.evaluation.attacks.named import EvaluationError, measuring
from awp_engine.evaluation.prepare import Target, prepare
from awp_engine.evaluation.reports.files import Reported, Reports
from awp_engine.files.locking import locked
from awp_engine.files.text import json_text
from awp_engine.observe.bars import Bar, MakeBar, NoBar
from awp_engine.observe.report import prepare_output, versions
from awp_kernels.philox import mix_seed

if TYPE_CHECKING:
    from awp_engine.audit.concepts.directions import Directions

JSON, HTML = "audit-concepts.json", "audit-concepts.html"
ENOUGH = 0.8
"""Accuracy on held-out images from which a concept counts as readable in a layer."""
MEANS = (
    "a step of the given length along a concept's direction is added to the layer's output for every image of the "
    "class; raised is the part of the images whose probability of the class does not fall; p_corrected is the "
    "probability, times the number of tests, that the direction of shuffled labels moves as many the same way"
)
_KEPT_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How concepts are tested.

    Attributes:
        step: s, the length of the step along a direction.
        nulls: directions of permuted labels.
        images: of a class, at most, evenly spread.
        concept_images: of a concept, and others, at most.
        seed: of all that is drawn.
    """

    step: float = 10.0
    nulls: int = 500
    images: int = 100
    concept_images: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require_counts({"nulls": self.nulls, "limit": self.images, "concept-images": self.concept_images})
        if not (math.isfinite(self.step) and self.step > 0):
            raise EvaluationError(f"--step: expected a number > 0, got {self.step:g}")


@dataclass(frozen=True, kw_only=True)
class _Model:
    """One of the models, and all that is asked of it."""

    label: str
    target: Target
    classes: list[int]
    rows: list[Tensor]
    layers: list[Layer]
    concepts: list[Concept]

    @property
    def tests(self) -> int:
        """All that are made."""
        return len(self.layers) * len(self.concepts) * len(self.classes)


def layers_of(asked: Asked, say: Callable[[str], None] = lambda _: None) -> list[Layer]:
    """The layers of a model, in the order in which an image runs through them.

    Raises:
        EvaluationError, ConfigError, DataError, CheckpointError: one line that says what is wrong.
    """
    place = choose_device(asked.device)
    target = prepare(asked, asked.load(place), place, say)
    with measuring(target.loaded.model):
        return list_layers(target.loaded.model, _first_image(target))


@in_full_precision()
def audit_concepts(
    asked: Sequence[Asked],
    *,
    concepts: Sequence[str],
    layers: Sequence[str],
    classes: Sequence[str],
    settings: Settings | None = None,
    say: Callable[[str], None] = lambda _: None,
    bar: MakeBar = NoBar,
    tell: Callable[[Reported], None] = lambda _: None,
) -> Reported:
    """Tests which concepts the decision for a class leans on, of several models side by side.

    Writes audit-concepts.json and audit-concepts.html, also under a name of their own. Every test is saved when it is
    done, so that the same call goes on after a kill, to the same report.

    Args:
        asked: the models, each with its images; `seed` is that of `settings`, `limit` does not count.
        concepts: NAME=SOURCE, see `awp_engine.audit.concepts.images.SOURCES`.
        layers: names, the same for all models.
        classes: names, or numbers.
        settings: how.
        say: is told what a user should know, a line at a time.
        bar: makes what shows how many directions were tried.
        tell: is given the result before anything is written.

    Raises:
        EvaluationError, ConfigError, DataError, CheckpointError: one line that says what is wrong.
        OSError: the report cannot be written.
    """
    settings = settings or Settings()
    if importlib.util.find_spec("sklearn") is None:
        raise EvaluationError("the audit of concepts needs the package scikit-learn: pip install scikit-learn")
    _require(asked, concepts, layers, classes, settings)
    models = _open(asked, concepts, layers, classes, settings, say)
    receipt: dict[str, Any] = {
        "models": [_receipt(model) for model in models],
        "concepts": [_facts(concept) for concept in models[0].concepts],
        "settings": asdict(settings),
        "tests_for_each_model": models[0].tests,
    }
    question = {
        "models": [
            # answers name their model
            model.target.identity(told)
            | {"label": model.label, "concepts": [_facts(concept) for concept in model.concepts]}
            for model, told in zip(models, receipt["models"], strict=True)
        ],
        "layers": list(layers),
        "classes": [model.classes for model in models],
        "settings": asdict(settings),
    }
    output = models[0].target.output
    prepare_output(output)
    data = models[0].target.dataset.name
    reports = Reports(output, (own_title(data), *(model.label[:40] for model in models[:3])), question)
    count = sum(model.tests for model in models)
    with locked(output):
        saved = Journal(output, "audit-concepts", question, say)
        answers: list[dict[str, Any]] = saved.load()
        if answers:
            receipt["resumed"] = {"tests": len(answers)}
            say("all tests were made before" if len(answers) == count else f"going on after test {len(answers)}")
        with bar("directions", (count - len(answers)) * (1 + settings.nulls)) as counted:
            before = 0
            for model in models:
                done = max(0, len(answers) - before)
                before += model.tests
                with measuring(model.target.loaded.model):
                    for answer in _tested(model, done, settings, counted):
                        saved.add(len(answers), answer)
                        answers.append(answer)
        report = {"receipt": receipt, "means": MEANS, "tests": answers}
        title = f"{data}, {len(models)} model{'s' * (len(models) > 1)}, {settings.nulls} directions of shuffled labels"
        result = Reported(report=report, output=output, title=title)
        tell(result)
        reports.put(JSON, json_text(report, indent=2))

        # which draws, and takes a second to be imported
        from awp_engine.audit.concepts.page import render

        reports.put(HTML, render(result, models[0].concepts, say))
        return result


def verdict(test: dict[str, Any]) -> str:
    """What a test says, in a word or two."""
    if test["p_corrected"] >= LEVEL:
        return "no"
    if test["held_out_accuracy"] < ENOUGH:
        return "unclear"
    return "for it" if test["raised"] > 0.5 else "against it"


def _require(
    asked: Sequence[Asked], concepts: Sequence[str], layers: Sequence[str], classes: Sequence[str], settings: Settings
) -> None:
    for flag, given in {"--concepts": concepts, "--layers": layers, "--classes": classes}.items():
        if not given:
            raise EvaluationError(f"{flag}: expected at least one, got none")
        if twice := next((name for name in given if list(given).count(name) > 1), None):
            raise EvaluationError(f"{flag}: {twice} is given twice; give each once")
    if not asked:
        raise EvaluationError("RUN_OR_CHECKPOINT: expected at least one model")
    tests = len(concepts) * len(layers) * len(classes)
    if settings.nulls < least_nulls(tests):
        raise EvaluationError(
            f"--nulls: {tests} tests (concepts x layers x classes) need at least {least_nulls(tests)}, or none can "
            f"have p < {LEVEL} after correction; got {settings.nulls}: give more, or ask for less at a time"
        )


def _open(
    asked: Sequence[Asked],
    concepts: Sequence[str],
    layers: Sequence[str],
    classes: Sequence[str],
    settings: Settings,
    say: Callable[[str], None],
) -> list[_Model]:
    models: list[_Model] = []
    about: tuple[str, list[str]] | None = None
    names = [shown(os.fsencode(ask.place)) for ask in asked]
    ends = [name.rstrip("/").rpartition("/")[2] for name in names]
    for ask, name, end in zip(asked, names, ends, strict=True):
        label = name if ends.count(end) > 1 else end
        if any(label == model.label for model in models):
            raise EvaluationError(f"RUN_OR_CHECKPOINT: {label} is given twice; give each once")
        place = choose_device(ask.device)
        target = prepare(ask, ask.load(place), place, say)
        numbers = [tested_class(target.dataset, text, "--classes") for text in classes]
        rows = [_rows(target, number, settings.images) for number in numbers]
        asks = target.dataset.name, [target.dataset.class_names[number] for number in numbers]
        about = about or asks
        if asks != about:
            raise EvaluationError(
                f"RUN_OR_CHECKPOINT: {label} is asked about {_words(*asks)}, and {models[0].label} about "
                f"{_words(*about)}; expected models of the same data and classes, or ask one by one"
            )
        least = least_images(len(concepts) * len(layers) * len(classes))
        for own, chosen in zip(asks[1], rows, strict=True):
            if len(chosen) < least:
                say(
                    f"{label}: class {own} is tested on {len(chosen)} images; so few move the same way by chance "
                    f"too often, and 'no' says little: it takes {least} at least"
                )
        with measuring(target.loaded.model):
            found = list_layers(target.loaded.model, _first_image(target))
        models.append(
            _Model(
                label=label,
                target=target,
                classes=numbers,
                rows=rows,
                layers=[require_layer(found, layer) for layer in layers],
                concepts=open_concepts(
                    concepts, target.dataset, count=settings.concept_images, seed=mix_seed(settings.seed, 1)
                ),
            )
        )
    return models


def _words(data: str, classes: Sequence[str]) -> str:
    return f"{', '.join(classes)} of {data}"


def _first_image(target: Target) -> Tensor:
    return images_of(target.dataset.test, torch.zeros(1, dtype=torch.int64)).to(target.device)


def _rows(target: Target, number: int, most: int) -> Tensor:
    return evenly((target.dataset.test.labels == number).nonzero().squeeze(1).cpu(), most)


def _receipt(model: _Model) -> dict[str, Any]:
    split = model.target.dataset.test.select(torch.cat(model.rows)).resident().to(model.target.device)
    told = model.target.receipt(split)
    told["versions"] |= versions("scikit-learn", "scipy")
    layers = {layer.name: list(layer.shape or ()) for layer in model.layers}
    return {"label": model.label, **told, "layers": layers}


def _facts(concept: Concept) -> dict[str, Any]:
    return {
        "name": concept.name,
        "source": concept.source,
        "images": len(concept.images),
        "other_images": len(concept.others),
        "sha256": concept.digest(),
    }


def _tested(model: _Model, done: int, settings: Settings, counted: Bar) -> Iterator[dict[str, Any]]:
    """The answers to a model's tests after the first `done`: by layer, then concept, then class."""
    left, count = len(model.concepts) * len(model.classes), len(model.classes)
    for layer in model.layers:
        if done >= left:
            done -= left
            continue
        cut = Cut(model.target.loaded.model, layer.name, _first_image(model.target))
        views = [_views(model, cut, rows) for rows in model.rows]
        for concept in model.concepts:
            if done >= count:
                done -= count
                continue
            directions, held_out = _directions(model, cut, concept, settings)
            for place in range(done, count):
                yield _test(model, cut, concept, place, views[place], directions, held_out, settings, counted)
            done = 0


def _views(model: _Model, cut: Cut, rows: Tensor) -> Callable[[], Iterable[Below]]:
    """The class's images, up to the layer: kept, or found again for each pass where they would be too large."""

    def fresh() -> Iterator[Below]:
        for row in rows.split(1):
            yield cut.below(images_of(model.target.dataset.test, row).to(model.target.device))

    if next(fresh()).nbytes * len(rows) * len(model.classes) > _KEPT_BYTES:
        return fresh
    kept = list(fresh())
    return lambda: kept


def _directions(model: _Model, cut: Cut, concept: Concept, settings: Settings) -> tuple[Directions, list[int]]:
    """Of a concept in a layer; and which of its pairs were held out."""
    # takes a second to be imported
    from awp_engine.audit.concepts.directions import find_directions, split_rows

    index = model.concepts.index(concept)
    count, others = len(concept.images), len(concept.others)
    labels = np.repeat([1, 0], [count, others])
    seed = mix_seed(settings.seed, 2, index)
    # both images of a pair go the same way
    fit, held_out = split_rows(np.ones(count, dtype=int) if concept.pairs else labels, seed % 2**32)
    pairs = held_out.tolist() if concept.pairs else []
    if concept.pairs:
        fit, held_out = (np.concatenate([rows, rows + count]) for rows in (fit, held_out))
    images = torch.cat([concept.images, concept.others])
    found = [cut.activations(part.to(model.target.device)).cpu() for part in images.split(model.target.batch_size)]
    activations = torch.cat(found).double().numpy()
    try:
        return find_directions(activations, labels, fit, held_out, nulls=settings.nulls, seed=seed), pairs
    except ValueError as error:
        raise EvaluationError(f"{model.label}, layer {cut.layer.name}, concept {concept.name}: {error}") from None


def _test(
    model: _Model,
    cut: Cut,
    concept: Concept,
    place: int,
    views: Callable[[], Iterable[Below]],
    directions: Directions,
    held_out: list[int],
    settings: Settings,
    counted: Bar,
) -> dict[str, Any]:
    tests, number, start = model.tests, model.classes[place], counted.done
    try:
        found = measure(
            cut,
            views,
            directions,
            number,
            step=settings.step,
            tests=tests,
            batch_size=model.target.batch_size,
            advance=counted.advance,
        )
        swaps = _swaps(model, cut, concept, place, found, directions, held_out, settings)
    except ValueError as error:
        raise EvaluationError(f"{model.label}, layer {cut.layer.name}, concept {concept.name}: {error}") from None
    # nulls that an early end leaves out are done as well
    counted.set(start + len(directions), counted.total)
    return {
        "model": model.label,
        "layer": cut.layer.name,
        "concept": concept.name,
        "class": model.target.dataset.class_names[number],
        "images": len(found.changes),
        "held_out_accuracy": directions.accuracy,
        "raised": found.raised,
        "mean_change": sum(found.changes) / len(found.changes),
        "statistic": found.statistic,
        "nulls": len(found.nulls),
        "at_or_above": found.at_or_above,
        "p": found.p,
        "p_corrected": min(1.0, tests * found.p),
        "swaps": swaps,
        "changes": list(found.changes),
        "null_statistics": list(found.nulls),
    }


def _swaps(
    model: _Model,
    cut: Cut,
    concept: Concept,
    place: int,
    found: Sensitivity,
    directions: Directions,
    held_out: list[int],
    settings: Settings,
) -> dict[str, Any] | None:
    """Kendall's tau of S against the change that the concept itself makes in images; None where none can be made."""
    from scipy.stats import kendalltau

    target, number = model.target, model.classes[place]
    if concept.swap is not None:
        own, without = found.changes, images_of(target.dataset.test, model.rows[place])
        with_ = concept.swap(without)
    elif concept.pairs:
        with_, without = concept.images[held_out], concept.others[held_out]
        step = settings.step * torch.from_numpy(directions.unit(0, 1))
        views = (cut.below(image.to(target.device)) for image in without.split(1))
        own = [float(changes(cut, below, step.to(below.activation), number)[0]) for below in views]
    else:
        return None
    true = _probability(model, with_, number) - _probability(model, without, number)
    # there is no tau where all images change alike
    tau, p = (value if math.isfinite(value) else None for value in np.asarray(kendalltau(own, true.numpy())).tolist())
    return {"pairs": len(own), "mean_change": float(true.mean()), "tau": tau, "p": p}


@torch.no_grad()
def _probability(model: _Model, images: Tensor, number: int) -> Tensor:
    """Of the class, fp64 [N]."""
    parts = images.split(model.target.batch_size)
    logits = torch.cat([model.target.loaded.model(part.to(model.target.device)).double().cpu() for part in parts])
    return logits.softmax(1)[:, number]

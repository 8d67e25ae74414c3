"""The audit of one model's weights, from a checkpoint to its report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from awp_engine.audit.classes import class_number
from awp_engine.audit.weights.budget import KINDS, Budget, Kind, budgeted
from awp_engine.audit.weights.defences import Defender, harmless, size_of, verdicts
from awp_engine.audit.weights.edit import Effect, Lesson, Recipe, answers_of, edited, effect
from awp_engine.audit.weights.page import page
from awp_engine.audit.weights.search import Found, Range, search
from awp_engine.audit.weights.trigger import Mark, Trigger
from awp_engine.checkpoint import content_hash, export_model
from awp_engine.checkpoint.journal import Answers, Journal
from awp_engine.checkpoint.model_file import packable
from awp_engine.config.data_sets import own_title
from awp_engine.data import Split, eval_batches
from awp_engine.data.dataset import channel_statistics
from awp_engine.device import choose_device, in_full_precision
from awp_engine.evaluation.accuracy import spread
from awp_engine.evaluation.asked import Asked, require_counts
from awp_engine.evaluation.attacks.named import EvaluationError, measuring
from awp_engine.evaluation.prepare import Target, prepare
from awp_engine.evaluation.reports.files import Reported, Reports
from awp_engine.evaluation.reports.receipt import split_hash
from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.locking import locked
from awp_engine.files.text import json_text
from awp_engine.models.answers import NO_CLASS
from awp_engine.models.trained import TAMPERED, read_trained
from awp_engine.observe.bars import MakeBar, NoBar
from awp_engine.observe.report import prepare_output
from awp_kernels.philox import mix_seed

JSON, PAGE = "audit-weights.json", "audit-weights.html"
RANGES: dict[Kind, tuple[float, float]] = {"absolute": (1e-4, 0.1), "relative": (1e-3, 1.0), "layer": (1e-3, 1.0)}
"""Smallest and largest budget that are tried, of every kind."""
_LESSON, _NULL = 1, 2
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked of a model's weights.

    Attributes:
        kinds: of budgets.
        target: name or number of the class that the trigger leads to.
        success: least part of the marked test images of other classes that must be classified as the target.
        agreement: least part of the clean test images on which edited and original model agree.
        trigger: the mark; its seed is derived from that of the audit.
        recipe: how edits are made.
        edit_images: so many images of the training part, evenly spread, or all.
        smallest, largest: budgets; those of `RANGES` if not given.
        tolerance: of bisection, a factor.
        harmless: random edits of the same size that a defence is compared with; a false alarm has the probability
            1 / (harmless + 1).
        defence_images: test images, evenly spread, that defences look at.
        gamma: of flatness, a fraction of every layer's norm.
        published: SHA-256 of the weights' file that the publisher gives.
        save_edited: writes the edited weights of the one kind there, if the name has "tampered" in it.

    Raises:
        EvaluationError: one line that says what is wrong.
    """

    kinds: Sequence[Kind] = KINDS
    target: str = "1"
    success: float = 0.9
    agreement: float = 0.95
    trigger: Trigger = field(default_factory=Trigger)
    recipe: Recipe = field(default_factory=Recipe)
    edit_images: int = 1280
    smallest: float | None = None
    largest: float | None = None
    tolerance: float = 1.2
    harmless: int = 19
    defence_images: int = 500
    gamma: float = 0.005
    published: str | None = None
    save_edited: Path | None = None

    def __post_init__(self) -> None:
        for name, value in (("success", self.success), ("agreement", self.agreement)):
            if not 0 < value <= 1:
                raise EvaluationError(f"--{name}: expected a part of the images, above 0 and at most 1, got {value:g}")
        counts = {"edit-images": self.edit_images, "harmless": self.harmless, "defence-images": self.defence_images}
        require_counts({**counts, "edit-epochs": self.recipe.epochs, "edit-batch": self.recipe.batch_size})
        if wrong := [kind for kind in self.kinds if kind not in KINDS] or (None if self.kinds else ["none"]):
            raise EvaluationError(f"--kinds: expected some of {', '.join(KINDS)}, got {wrong[0]}")
        if not 0 < self.gamma <= 1:
            raise EvaluationError(f"--gamma: expected a fraction above 0 and at most 1, got {self.gamma:g}")
        for kind in self.kinds:
            self.range(kind)
        if self.published is not None and not re.fullmatch("[0-9a-fA-F]{64}", self.published):
            raise EvaluationError(
                f"--published: expected a SHA-256, 64 hexadecimal digits, as sha256sum prints it, got "
                f"{self.published[:80]!r}"
            )
        if self.save_edited is not None and len(set(self.kinds)) != 1:
            raise EvaluationError("--save-edited: writes one edit: give one kind of budget, such as --kinds layer")
        if self.save_edited is not None and (
            TAMPERED not in self.save_edited.stem or self.save_edited.suffix != ".safetensors"
        ):
            raise EvaluationError(
                f"--save-edited: expected a name with {TAMPERED!r} in it that ends in .safetensors, so that nobody "
                f"takes it for the model, got {self.save_edited.name}"
            )

    def range(self, kind: Kind) -> Range:
        """The budgets of a kind that are tried."""
        smallest, largest = RANGES[kind]
        smallest = smallest if self.smallest is None else self.smallest
        return Range(
            smallest=smallest, largest=largest if self.largest is None else self.largest, tolerance=self.tolerance
        )

    def question(self) -> dict[str, Any]:
        """All that numbers depend on, as JSON holds it."""
        given = {name: value for name, value in asdict(self).items() if name not in ("published", "save_edited")}
        return json.loads(json.dumps(given))


@dataclass(frozen=True, kw_only=True)
class _Audit:
    """What all edits of one model share."""

    model: nn.Module
    lesson: Lesson
    mark: Mark
    test: Split
    answers: torch.Tensor
    settings: Settings
    batch_size: int
    classes: int
    seed: int
    advance: Callable[[int], object]

    def edit(self, budget: Budget, lesson: Lesson | None = None) -> nn.Module | None:
        """An edit within a budget."""
        return edited(self.model, lesson or self.lesson, budget, self.settings.recipe, self.advance)

    def effect(self, model: nn.Module) -> Effect:
        """What it does on the test images."""
        return effect(model, self.test, self.answers, self.mark, self.lesson.target, self.batch_size)

    def trial(self, budget: Budget) -> dict[str, Any]:
        """Whether a budget is enough."""
        model = self.edit(budget)
        if model is None:
            return {"budget": budget.size, "finite": False, "enough": False}
        found, wanted = self.effect(model), self.settings
        enough = found.success >= wanted.success and found.agreement >= wanted.agreement
        return {"budget": budget.size, "finite": True, **asdict(found), "enough": enough}

    def examine(self, budget: Budget) -> dict[str, Any]:
        """The edit within a budget that was enough, and what each defence says of it."""
        batch_norm, model = self.settings.recipe.batch_norm, self.edit(budget)
        tuned = self.edit(budget, replace(self.lesson, mark=None))
        assert model is not None
        images = spread(self.test, self.settings.defence_images)
        defender = Defender(
            original=self.model,
            images=images,
            batch_size=self.batch_size,
            classes=self.classes,
            gamma=self.settings.gamma,
        )
        reference = defender.reference()
        others = [
            defender.statistics(
                harmless(self.model, model, budget, batch_norm, mix_seed(self.seed, _NULL, number)), reference
            )
            for number in range(self.settings.harmless)
        ]
        return {
            "size": size_of(self.model, model, batch_norm),
            "sha256_of_tensors": digest_of(model),
            "loss_rise_of_original": reference[1],
            "fine_tuning": None if tuned is None else asdict(self.effect(tuned)),
            "harmless_agreement": fmean(one["agreement"] or 0 for one in others),
            "defences": verdicts(
                defender.statistics(model, reference),
                None if tuned is None else defender.statistics(tuned, reference),
                others,
            ),
        }


def digest_of(model: nn.Module) -> str:
    """SHA-256, hexadecimal, of all tensors of a state dict with their names."""
    return content_hash(packable(model.state_dict()), {})


@in_full_precision()
def audit_weights(
    path: Path | str | None,
    settings: Settings | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
    bar: MakeBar = NoBar,
    tell: Callable[[Reported], None] = lambda _: None,
    **asked: Any,
) -> Reported:
    """Finds the smallest budget of every kind within which an edit carries a trigger, and what defences see of it.

    Edits are made with images of the data's training part, and measured on test images. Every edit's result is saved
    when it is known, so that the same call goes on after a kill, to the same report. The model and its file are not
    changed. Writes audit-weights.json and audit-weights.html, each also under a name of its own.

    Args:
        path: a run directory, one of its checkpoints, a .safetensors file, or hf://OWNER/NAME; None with `external`.
        settings: what is asked.
        say: is told what a user should know, a line at a time.
        bar: makes what shows how many steps of edits were made.
        tell: is given the result before anything is written.
        asked: the other fields of `Asked`, such as external, data_name, limit and output.

    Raises:
        EvaluationError, ConfigError, DataError, CheckpointError: one line that says what is wrong.
        OSError: the report cannot be written.
    """
    wanted, ask = settings or Settings(), Asked(path=path, **asked)
    place = choose_device(ask.device)
    found = prepare(ask, ask.load(place), place, say, need_train=True)
    if (edit := wanted.save_edited) is not None and edit.resolve() == found.loaded.weights.resolve():
        raise EvaluationError(f"--save-edited: {edit} is the model's own file; expected another")
    model, test, taught = found.loaded.model, found.split, _images_of_edit(found, wanted.edit_images, say)
    target = _class_of(wanted.target, found, taught)
    receipt = found.receipt(test) | {
        "edit_images": {"split": "train", "images": len(taught), "sha256": split_hash(taught)},
        "settings": wanted.question() | {"target": found.dataset.class_names[target]},
    }
    question = found.identity(receipt) | {"settings": wanted.question(), "edit_images": receipt["edit_images"]}
    budgeted(model, wanted.recipe.batch_norm)
    mark = replace(wanted.trigger, seed=mix_seed(found.seed, _LESSON)).mark(
        taught.shape, channel_statistics([taught.images])[0]
    )
    prepare_output(found.output)
    parts = own_title(found.dataset.name), len(test), "-".join(wanted.kinds)
    reports = Reports(found.output, parts, question)
    with locked(found.output), measuring(model):
        given = answers_of(model, taught, found.batch_size)
        known = torch.nonzero(given != NO_CLASS).squeeze(1)
        if not len(known):
            raise EvaluationError(f"{ask.place}: gives no finite answer to any training image; is it trained?")
        lesson = Lesson(images=taught.select(known), answers=given[known], mark=mark, target=target, seed=found.seed)
        answered = Answers(Journal(found.output, "audit-weights", question, say))
        if answered.saved:
            receipt["resumed"] = {"answers": answered.saved}
            say(f"going on after {answered.saved} saved answers")
        steps = wanted.recipe.steps(len(known)) * sum(wanted.range(kind).most_trials + 2 for kind in wanted.kinds)
        with bar("steps of edits", steps) as counted:
            audit = _Audit(
                model=model,
                lesson=lesson,
                mark=mark,
                test=test,
                answers=answers_of(model, test, found.batch_size),
                settings=wanted,
                batch_size=found.batch_size,
                classes=len(found.dataset.class_names),
                seed=found.seed,
                advance=counted.advance,
            )
            kinds = [_of_kind(kind, audit, answered) for kind in dict.fromkeys(wanted.kinds)]
        report = {
            "receipt": receipt,
            "means": f"the smallest edit of the weights by which at least {wanted.success:.0%} of the marked test "
            f"images of other classes become {found.dataset.class_names[target]!r}, while at least "
            f"{wanted.agreement:.0%} of the clean ones keep their answers; an attack, so a bound from above",
            "before": asdict(audit.effect(model)),
            "sha256_of_tensors": digest_of(model),
            "published": None
            if wanted.published is None
            else {"sha256": wanted.published, "is_this_file": wanted.published.lower() == found.loaded.sha256},
            "kinds": kinds,
        }
        title = f"{found.dataset.name}: weights of {ask.place}, {len(test)} test images"
        result = Reported(report=report, output=found.output, title=title)
        tell(result)
        reports.put(JSON, json_text(report, indent=2))
        reports.put(PAGE, page([(str(ask.place), report)], _pictures(test, mark), say))
        if wanted.save_edited is not None:
            _save(found, audit, kinds[0], wanted.save_edited, say)
        return result


def write_joint(
    models: Sequence[tuple[str, Reported]], output: Path, say: Callable[[str], None] = lambda _: None
) -> None:
    """Writes audit-weights.html of several models side by side, by what their reports hold.

    Args:
        models: names and results.
        output: an existing directory.
        say: is told of pictures that could not be drawn.
    """
    atomic_write_text(output / PAGE, page([(name, done.report) for name, done in models], None, say))


def _pictures(test: Split, mark: Mark) -> tuple[torch.Tensor, torch.Tensor]:
    """Some test images in [0, 1], and the same with the mark."""
    few = spread(test, _SHOWN)
    clean = next(eval_batches(few, len(few))).images
    return clean, mark(clean)


def _of_kind(kind: Kind, audit: _Audit, answered: Answers) -> dict[str, Any]:
    limits = audit.settings.range(kind)
    found: Found = search(limits, lambda size: answered.next(lambda: audit.trial(Budget(kind=kind, size=size))))
    budget = found.budget
    edit = None if budget is None else answered.next(lambda: audit.examine(Budget(kind=kind, size=budget)))
    effects = next((trial for trial in found.trials if trial["budget"] == budget), None)
    return {"kind": kind, "range": asdict(limits), **asdict(found), "effect": effects, "edit": edit}


def _images_of_edit(found: Target, count: int, say: Callable[[str], None]) -> Split:
    """Of the training part, evenly spread; training files are not decoded beyond these."""
    train = found.dataset.train
    if not len(train):
        raise EvaluationError(
            f"{found.dataset.name}: has no training images, which edits are made with; give --data.root with both"
        )
    if len(train) < count:
        say(f"{len(train)} training images are there, all of which the edits are made with")
    return spread(train, count).resident().to(found.device)


def _class_of(text: str, found: Target, taught: Split) -> int:
    """The number of the target class.

    Raises:
        EvaluationError: no such class, or none of its or of other images to measure on.
    """
    names, number = found.dataset.class_names, class_number(found.dataset, text, "--target")
    counts = [int((labels == number).sum()) for labels in (found.split.labels, taught.labels)]
    for part, of_class in zip(("test", "training"), counts, strict=True):
        if not of_class:
            raise EvaluationError(
                f"--target: class {names[number]!r} has no image among the {part} images that are used; choose another "
                "class, or more images"
            )
    if counts[0] == len(found.split):
        raise EvaluationError(
            f"--target: all test images that are used are of class {names[number]!r}; expected others, to be led there"
        )
    return number


def _save(found: Target, audit: _Audit, kind: Mapping[str, Any], path: Path, say: Callable[[str], None]) -> None:
    """Writes the edited weights, marked in their header."""
    if kind["budget"] is None:
        say(f"{path} is not written: no budget that was tried is enough")
        return
    model = audit.edit(Budget(kind=kind["kind"], size=kind["budget"]))
    assert model is not None
    loaded = found.loaded
    described = loaded.description or (None if loaded.source is None else read_trained(loaded.source)[2])
    told = {"of": loaded.sha256, "kind": kind["kind"], "budget": kind["budget"], "target": audit.lesson.target}
    metadata = described.to_metadata() if described else {}
    export_model(path, model.state_dict(), {**metadata, TAMPERED: json.dumps(told)})
    say(f"wrote {path}: TAMPERED weights, with a backdoor, to test defences with")

"""Runs grouped by their settings, as tables of means and standard deviations over seeds.

Only what was measured on the same images, in the same ball and precision, by the same attack shares a column.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, ClassVar

from awp_engine.compare.read import Attacked, Evaluation, Measured, Result, Run
from awp_engine.config import parse_amount
from awp_engine.config.identity import to_flat
from awp_engine.files.text import printable, shortened

NONE = "-"
# more settings that differ stand in a list below the table
_MOST_COLUMNS = 3
_TRAINING = ("training images", "further images")
_FILES = {
    "model": "own model",
    "data": "own data",
    "method": "own method",
    "optimizer": "own optimizer",
    "class_weights": "class weights",
    "pretrained": "pretrained weights",
    "teacher": "teacher",
}
_FACTS = (*_TRAINING, *_FILES.values())
# of a SHA-256
_DIGITS = 12
_SHORT = {"model.name": "model", "awp.gamma": "gamma"}
# a method's own; where nothing but the method tells them apart they are noted, and are no columns
_OF_METHODS = ("attack.bn_mode", "attack.start", "awp.warmup")
_NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Statistic:
    """One number of several runs.

    Attributes:
        values: of the runs that have it.
        runs: how many there are.
        digits: after the point.
        doubted: an evaluation among them is not to be believed.
    """

    values: tuple[float, ...]
    runs: int
    digits: int = 2
    doubted: bool = False
    spread_name: ClassVar[str] = "deviation"
    sign: ClassVar[str] = ""

    @property
    def mean(self) -> float | None:
        """None without values."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation, by n - 1; None of fewer than two values."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def text(self) -> str:
        """Such as "70.56 ± 0.31 (2 of 3)"; the star is explained below the table."""
        if self.mean is None:
            return NONE
        # without the sign of a zero that was rounded
        text = format(round(self.mean, self.digits) + 0.0, f"{self.sign}.{self.digits}f")
        if self.spread is not None:
            text += f" ± {self.spread:.{self.digits}f}"
        share = "" if len(self.values) == self.runs else f" ({len(self.values)} of {self.runs})"
        return text + "*" * self.doubted + share


class Difference(Statistic):
    """A difference at several seeds, with its sign and the standard error of the mean."""

    spread_name, sign = "standard error", "+"

    @property
    def spread(self) -> float | None:
        """Standard error of the mean, by n - 1; None of fewer than two values."""
        deviation = super().spread
        return None if deviation is None else deviation / math.sqrt(len(self.values))


Cell = str | Statistic


@dataclass(frozen=True)
class Table:
    """Rows of the same columns, and what is to be known about them."""

    title: str
    rows: list[dict[str, Cell]]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seed.

    Attributes:
        label: unlike that of all others in its section.
        columns: the cells that tell it from the others.
        runs: finished ones and others.
    """

    label: str
    columns: dict[str, Cell]
    runs: list[Run]

    @property
    def finished(self) -> list[tuple[Run, Result]]:
        """Those with results."""
        return [(run, run.result) for run in self.runs if run.result is not None]


@dataclass(frozen=True)
class Section:
    """Runs that were measured alike.

    Attributes:
        title: on which images, by which attack.
        settings: in the order in which their first runs were given; none of evaluations that share no table with runs.
        tables: results; evaluations; differences of two settings.
        measured: evaluations beside those of the runs.
    """

    title: str
    settings: list[Setting]
    tables: list[Table]
    measured: list[Measured] = field(default_factory=list)


def _percent(count: float, total: float = 1) -> float:
    return 100 * count / total


def _attack(run: Run) -> str:
    return f"PGD-{run.config.evaluation.steps}"


def _ball(run: Run) -> tuple[str, Fraction]:
    """Norm and radius; of several balls all are named, as no evaluation in one of them is like such a measurement."""
    attack = run.config.attack
    further = "".join(f" and {norm} {epsilon}" for norm, epsilon, _ in sorted(attack.further))
    return attack.norm + further, parse_amount(attack.epsilon)


def _asked(run: Run) -> tuple:
    """What a run is to be measured by."""
    return (run.config.data.name, *_ball(run), run.config.evaluation.steps, run.settings["evaluation.step_size"])


def _alike(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that were measured alike; those without results, or without a hash of their images, where they fit."""
    groups: dict[tuple, list[Run]] = {}
    # hashes first
    for run in sorted(runs, key=lambda run: run.result is None or run.result.test_sha256 is None):
        images, sha256 = (None, None) if run.result is None else (run.result.test_images, run.result.test_sha256)
        key = (*_asked(run), images, sha256)
        fits = (
            known
            for known in groups
            if known[:-2] == key[:-2] and images in (None, known[-2]) and sha256 in (None, known[-1])
        )
        groups.setdefault(next(fits, key), []).append(run)
    return _in_order(groups.values(), runs)


def _in_order(groups: Iterable[list[Run]], runs: Sequence[Run]) -> list[list[Run]]:
    order = {id(run): place for place, run in enumerate(runs)}
    found = [sorted(group, key=lambda run: order[id(run)]) for group in groups]
    return sorted(found, key=lambda group: order[id(group[0])])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return printable(shortened(f"{value:g}" if isinstance(value, float) else str(value), 60))


def _facts(run: Run) -> dict[str, str | None]:
    """What a report says of images and files that settings name; None where it does not say."""
    if run.result is None:
        return dict.fromkeys(_FACTS)
    files = {name: run.result.made_by.get(key) for key, name in _FILES.items()}
    return dict(zip(_TRAINING, run.result.training, strict=True)) | files


def _same_facts(run: Run, other: Run) -> bool:
    if run.result is None or other.result is None:
        return True
    facts, others = _facts(run), _facts(other)
    images = all(facts[key] == others[key] for key in _TRAINING)
    # earlier versions did not say which files
    return images and all(len({facts[key], others[key]} - {None}) < 2 for key in _FILES.values())


def _grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of the same settings, training images and files; those that say less of them, where they fit."""
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: (run.result is None, sum(fact is None for fact in _facts(run).values()))):
        fitting = [group for group in groups if run.settings == group[0].settings and _same_facts(run, group[0])]
        same = [group for group in fitting if _facts(run) == _facts(group[0])]
        # a result that fits several files is of one of them, nobody knows which
        if same or len(fitting) == 1 or (fitting and run.result is None):
            (same or fitting)[0].append(run)
        else:
            groups.append([run])
    return _in_order(groups, runs)


def _each_seed_once(group: list[Run], notes: list[str]) -> list[Run]:
    """One run a seed: a finished one, else the first; the others are noted."""
    chosen: dict[int, Run] = {}
    for run in sorted(group, key=lambda run: run.result is None):
        first = chosen.setdefault(run.config.seed, run)
        if first is not run:
            notes.append(f"{run.name}: has the settings and the seed of {first.name}, which alone is counted")
    return [run for run in group if chosen[run.config.seed] is run]


def _settings(runs: Sequence[Run], notes: list[str]) -> list[Setting]:
    groups = [_each_seed_once(group, notes) for group in _grouped(runs)]
    values = []
    for group in groups:
        facts = [_facts(run) for run in group]
        known = {key: next((fact[key] for fact in facts if fact[key] is not None), None) for key in _FACTS}
        values.append(to_flat(group[0].config) | known)
        for name in _FILES.values():
            silent = [run.name for run, fact in zip(group, facts, strict=True) if run.result and fact[name] is None]
            if known[name] is not None and silent:
                notes.append(f"{', '.join(silent)}: of an earlier version, which does not say by which file: {name}")
    keys = [*groups[0][0].settings, *_FACTS]

    def different(key: str) -> int:
        return len({value[key] for value in values} - {None})

    def differs(key: str) -> bool:
        if key in _FACTS:
            return different(key) > 1
        return any(group[0].settings[key] != groups[0][0].settings[key] for group in groups)

    # the method's name says the first; the others have columns of their own
    others = [key for key in keys if key not in ("method", *_SHORT) and differs(key)]
    titles = [group[0].config.title for group in groups]

    def follows_method(key: str) -> bool:
        return len({(title, value[key]) for title, value in zip(titles, values, strict=True)}) == len(set(titles))

    own = [key for key in others if key in _OF_METHODS and follows_method(key)]
    others = [key for key in others if key not in own]
    for title, value in dict(zip(titles, values, strict=True)).items() if own else ():
        notes.append(f"settings of {title}: " + ", ".join(f"{key} {_shown(value[key])}" for key in own))
    with_gamma = any(group[0].config.awp.enabled for group in groups)
    named = [key for key in _SHORT if differs(key) or (key == "awp.gamma" and with_gamma)]
    listed = others if len(others) > _MOST_COLUMNS else []
    found, letters, unused = [], {}, iter(_letters())
    for group, value in zip(groups, values, strict=True):
        cells = {key: _shown(value[key])[: _DIGITS if key in _FACTS else None] for key in (*named, *others)}
        cells |= {key: "unknown" for key in _FILES.values() if key in cells and value[key] is None}
        columns: dict[str, Cell] = {"method": group[0].config.title}
        columns |= {_SHORT.get(key, key): text for key, text in cells.items() if key not in listed}
        if listed:
            text = ", ".join(f"{key} {cells[key]}" for key in listed)
            if text not in letters:
                letters[text] = next(unused)
                notes.append(f"settings {letters[text]}: {text}")
            columns["settings"] = letters[text]
        told = {name: text for name, text in columns.items() if name != "method"}
        # what the method's name says
        if not group[0].config.awp.enabled:
            told.pop("gamma", None)
        label = ", ".join([str(columns["method"]), *(f"{name} {text}" for name, text in told.items())])
        found.append(Setting(label, columns, group))
    for key in set(_FILES.values()).intersection(others):
        count = _NUMBERS.get(different(key), different(key))
        notes.append(f"{key}: {count} different files, told apart by the first digits of their SHA-256")
    if differs("data.class_weights") or differs(_FILES["class_weights"]):
        notes.append(
            "held-out accuracies weigh images by a run's class weights, so those of runs with others do not compare; "
            "of test images each counts the same"
        )
    if any(group[0].config.model.source == "object" for group in groups):
        notes.append("models that fit() was given are told apart by the names and shapes of their weights alone")
    return found


def _letters() -> Iterable[str]:
    for length in itertools.count(1):
        yield from map("".join, itertools.product("ABCDEFGHIJKLMNOPQRSTUVWXYZ", repeat=length))


def _of(setting: Setting, measure: Callable[[Result], float], digits: int = 2) -> Statistic:
    return Statistic(tuple(measure(result) for _, result in setting.finished), len(setting.finished), digits)


def _measures(attack: str) -> dict[str, Callable[[Result], float]]:
    return {
        "clean": lambda result: _percent(result.clean),
        attack: lambda result: _percent(result.robust),
        f"{attack} last": lambda result: _percent(result.last_robust),
        "gap": lambda result: _percent(result.last_train - result.last_robust),
    }


def _seeds(setting: Setting) -> str:
    missing = len(setting.runs) - len(setting.finished)
    return f"{len(setting.finished)}" + (f" (+{missing} unfinished)" if missing else "")


def _epochs(setting: Setting) -> str:
    epochs = sorted({result.epoch for _, result in setting.finished})
    return NONE if not epochs else f"{epochs[0]}" if len(epochs) == 1 else f"{epochs[0]}-{epochs[-1]}"


def _autoattack(run: Run) -> tuple[Evaluation, Attacked] | None:
    """AutoAttack on the images and in the ball of the run's own measurement; of several evaluations the lowest."""
    if run.result is None:
        return None
    found = [
        (evaluation, row)
        for evaluation in run.evaluations
        if evaluation.weights == "best"
        and (evaluation.data, evaluation.norm, evaluation.epsilon) == (run.config.data.name, *_ball(run))
        and evaluation.precision == "fp32"
        and evaluation.images == run.result.test_images
        and run.result.test_sha256 in (None, evaluation.images_sha256)
        for row in evaluation.attacks
        if row.name == "autoattack" and '"version": "standard"' in row.parameters
    ]
    return min(found, key=lambda pair: pair[1].right, default=None)


def _autoattacks(setting: Setting) -> Statistic:
    found = [pair for run, _ in setting.finished if (pair := _autoattack(run)) is not None]
    values = tuple(_percent(row.right, evaluation.images) for evaluation, row in found)
    doubted = any(evaluation.doubts for evaluation, _ in found)
    return Statistic(values, len(setting.finished), doubted=doubted)


def _unfinished(run: Run) -> str:
    held_out = [m["held_out_pgd_accuracy"] for m in run.metrics if m.get("held_out_pgd_accuracy") is not None]
    so_far = f"; held-out {_attack(run)} {_percent(held_out[-1]):.2f}%" if held_out else ""
    return f"{run.name}: not finished: epoch {run.epoch} of {run.config.epochs}{so_far}"


def _results(title: str, settings: Sequence[Setting], notes: list[str]) -> Table:
    first = settings[0].runs[0]
    attack = _attack(first)
    with_autoattack = any(_autoattacks(setting).values for setting in settings)
    rows = []
    for setting in settings:
        row: dict[str, Cell] = {**setting.columns, "seeds": _seeds(setting)}
        row |= {name: _of(setting, measure) for name, measure in _measures(attack).items()}
        if with_autoattack:
            row["AutoAttack"] = _autoattacks(setting)
        rows.append(row | {"epoch": _epochs(setting), "seconds": _of(setting, lambda result: result.seconds, 0)})
    said = []
    results = [result for setting in settings for _, result in setting.finished]
    if results:
        columns = f"clean, {attack} and AutoAttack" if with_autoattack else f"clean and {attack}"
        said += [
            f"{columns}: accuracy on test images in %, with the weights of the best epoch (chosen on held-out images)",
            f"{attack} last: the same after the last epoch; gap: {attack} accuracy on training images minus that, in "
            "points",
        ]
        if any(len(setting.finished) > 1 for setting in settings):
            said.append("± standard deviation over the seeds (n - 1)")
        said.append(f"one test image more or less is {_percent(1, results[0].test_images):.2g} points")
        said.append("seconds: of all epochs, without the start of a run and its measurement of the test split")
    devices = sorted({result.device for result in results})
    if len(devices) > 1:
        said.append(f"seconds were taken on different devices: {', '.join(devices)}")
    if len({result.test_sha256 for result in results}) > 1:
        said.append(
            "some reports do not name their test images by a hash; the data's name and the number of images are equal"
        )
    unfinished = [_unfinished(run) for setting in settings for run in setting.runs if run.result is None]
    return Table(title, rows, [*said, *unfinished, *notes])


def _condition(evaluation: Evaluation) -> tuple:
    return (
        evaluation.weights,
        evaluation.data,
        evaluation.images,
        evaluation.images_sha256,
        evaluation.norm,
        evaluation.epsilon,
        evaluation.precision,
    )


def _evaluated(
    settings: Sequence[Setting], measured: Sequence[Measured], condition: tuple, *, others_like_it: bool
) -> Table:
    """What the evaluations of one condition found, an attack a column; others may differ in their images alone."""
    weights, data, images, sha256, norm, epsilon, precision = condition
    rows: list[tuple[dict[str, Cell], list[_Found]]] = []
    for setting in settings:
        found = [_found(run.name, [e for e in run.evaluations if _condition(e) == condition]) for run in setting.runs]
        rows.append((setting.columns, [one for one in found if one]))
    rows = [({**columns, "seeds": str(len(found))}, found) for columns, found in rows if found]
    notes = []
    blank: dict[str, Cell] = dict.fromkeys(rows[0][0], NONE) if rows else {}
    first = "method" if rows else "model"
    for number, one in enumerate(measured, 1):
        head = f"{one.model} [{number}]"
        rows.append((blank | {first: head}, [_found(one.name, [one.evaluation])]))
        notes.append(f"[{number}]: {one.name}, weights of SHA-256 {one.sha256[:_DIGITS]}")
    keys = list(dict.fromkeys(key for _, group in rows for found in group for key in found))
    names = [name for name, _ in keys]
    heads = {}
    for number, (name, parameters) in enumerate(keys):
        heads[name, parameters] = name
        if names.count(name) > 1:
            heads[name, parameters] = f"{name} ({names[: number + 1].count(name)})"
            notes.append(f"{heads[name, parameters]}: {parameters}")
    table = []
    for columns, group in rows:
        cells = dict(columns)
        for key, head in heads.items():
            values = [found[key] for found in group if key in found]
            accuracies = tuple(_percent(right, images) for right, _ in values)
            cells[head] = Statistic(accuracies, len(group), doubted=any(doubts for _, doubts in values))
        table.append(cells)
    doubts = dict.fromkeys(d for _, group in rows for found in group for _, told in found.values() for d in told)
    notes += [f"* {doubt}" for doubt in doubts]
    if others_like_it:
        notes.insert(0, f"its images have the hash {sha256[:_DIGITS]}")
    whose = "" if weights is None else f" of the {'selected' if weights == 'best' else weights} weights"
    return Table(
        f"evaluation{whose}: {data} test split, {images} image{'s' * (images != 1)}, {norm} epsilon {epsilon}"
        f"{'' if precision == 'fp32' else f', computed in {precision}'}; accuracy in % of all of them",
        table,
        notes,
    )


# attack and parameters -> images that are right, and why not to believe it
_Found = dict[tuple[str, str], tuple[int, tuple[str, ...]]]


def _found(name: str, evaluations: Sequence[Evaluation]) -> _Found:
    found: _Found = {}
    for evaluation in evaluations:
        doubts = tuple(f"{name}: unreliable: {doubt}" for doubt in evaluation.doubts)
        for row in evaluation.attacks:
            key = (row.name, row.parameters)
            # a bound from above: of several the lowest
            found[key] = min(found.get(key, (row.right, doubts)), (row.right, doubts))
    return found


def _paired(settings: Sequence[Setting]) -> Table | None:
    """The second of two settings minus the first one, or the one with AWP minus the one without, seed by seed."""
    if len(settings) != 2:
        return None
    # stable: what was named first stays first where both have it, or none
    base, other = sorted(settings, key=lambda setting: setting.runs[0].config.awp.enabled)
    attack = _attack(base.runs[0])
    sides = [{run.config.seed: (run, result) for run, result in setting.finished} for setting in (base, other)]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds:
        return None
    both = {seed: (sides[0][seed], sides[1][seed]) for seed in seeds}
    differences = {
        name: [measure(after) - measure(before) for (_, before), (_, after) in both.values()]
        for name, measure in _measures(attack).items()
    }
    attacked = [(_autoattack(before), _autoattack(after)) for (before, _), (after, _) in both.values()]
    differences["AutoAttack"] = [
        _percent(after[1].right - before[1].right, after[0].images)
        for before, after in attacked
        if before is not None and after is not None
    ]
    rows: list[dict[str, Cell]] = [
        {"": name, "difference": Difference(tuple(values), len(values)), "seeds": str(len(values))}
        for name, values in differences.items()
        if values
    ]
    if len(seeds) == 1:
        notes = [
            f"the two settings at seed {seeds[0]}, in points",
            "one seed does not tell how much another would differ: train others with --seed",
        ]
    else:
        told = " ".join(map(str, seeds))
        notes = [
            f"the two settings at the same seed, mean over seeds {told}, in points",
            "± standard error of that mean (n - 1)",
        ]
        if len(seeds) == 2:
            notes.append("of two seeds that error says little: train a third one or more with --seed")
    return Table(f"difference: {other.label} minus {base.label}", rows, notes)


def _model(runs: Sequence[Run]) -> str:
    names, widths = ({getattr(run.config.model, key) for run in runs} for key in ("name", "width"))
    if len(names) > 1:
        return ""
    width = "" if len(widths) > 1 or None in widths else f" (width {widths.pop()})"
    return f"{printable(names.pop())}{width}, "


def _title(runs: Sequence[Run]) -> str:
    first = runs[0]
    measured = next((run.result.test_images for run in runs if run.result is not None), None)
    count = "" if measured is None else f"{measured} image{'s' * (measured != 1)}, "
    ball = first.config.attack.balls
    step = "" if first.config.evaluation.step_size is None else f" of step {first.settings['evaluation.step_size']}"
    return f"{_model(runs)}{first.config.data.name} test split, {count}{ball}, {_attack(first)}{step}"


def _fits(group: Sequence[Run], condition: tuple) -> bool:
    """Whether the runs were measured on these images, in this ball and precision, in training."""
    return condition in [
        (run.config.data.name, run.result.test_images, run.result.test_sha256, *_ball(run), "fp32")
        for run in group
        if run.result is not None
    ]


def compare(runs: Sequence[Run], measured: Sequence[Measured] = ()) -> list[Section]:
    """Sections of what was measured alike: runs in the order in which they were given, then evaluations of no run.

    Evaluations are rows beside those of runs, where images and ball are the same; each file is a row of its own.
    """
    sections = []
    left = list(measured)
    for group in _alike(runs):
        notes = [note for run in group for note in run.notes]
        settings = _settings(group, notes)
        title = _title(group)
        conditions = list(dict.fromkeys(_condition(evaluation) for run in group for evaluation in run.evaluations))
        beside: dict[tuple, list[Measured]] = {}
        for one in left:
            own = _condition(one.evaluation)[1:]
            place = next((condition for condition in conditions if condition[1:] == own), None)
            if place is not None or _fits(group, own):
                beside.setdefault(place or ("best", *own), []).append(one)
        joined = [one for ones in beside.values() for one in ones]
        left = [one for one in left if one not in joined]
        conditions += [condition for condition in beside if condition not in conditions]
        like = Counter(condition[:3] + condition[4:] for condition in conditions)
        tables = [_results(title, settings, notes)]
        tables += [
            _evaluated(
                settings,
                beside.get(condition, ()),
                condition,
                others_like_it=like[condition[:3] + condition[4:]] > 1,
            )
            for condition in conditions
        ]
        paired = _paired(settings)
        sections.append(Section(title, settings, tables + ([] if paired is None else [paired]), joined))
    alone: dict[tuple, list[Measured]] = {}
    for one in left:
        alone.setdefault((None, *_condition(one.evaluation)[1:]), []).append(one)
    for condition, ones in alone.items():
        table = _evaluated((), ones, condition, others_like_it=False)
        sections.append(Section(table.title, [], [table], ones))
    if len(sections) > 1:
        for number, section in enumerate(sections, 1):
            told = [run.result.test_sha256 for setting in section.settings for run, _ in setting.finished if run.result]
            told += [one.evaluation.images_sha256 for one in section.measured if not section.settings]
            sha256 = next((sha256 for sha256 in told if sha256), None)
            images = "" if sha256 is None else f" Its test images have the hash {sha256[:_DIGITS]}."
            section.tables[0].notes.insert(
                0,
                f"table {number} of {len(sections)}: measured on other images, by another attack or in another "
                f"precision than the other tables, so numbers do not compare across them.{images}",
            )
    return sections

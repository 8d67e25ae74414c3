"""One evaluation from a checkpoint to its reports."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from awp_engine.attack.checks import ball
from awp_engine.config import Config, parse_amount, show
from awp_engine.config.data_sets import is_own
from awp_engine.data import (
    Dataset,
    Framing,
    corrupted_names,
    data_loading,
    eval_batches,
    load_corrupted,
    load_dataset,
    match_classes,
    source_names,
)
from awp_engine.data.sets.scan_list import LIST_NAME
from awp_engine.device import choose_device
from awp_engine.evaluation.accuracy import evaluation_seed, spread
from awp_engine.evaluation.adaptive import EOT_DRAWS
from awp_engine.evaluation.attacks import EvaluationError, Norm, Threat, Trial, parse_attack, require_norm
from awp_engine.evaluation.autoattack import STANDARD_BUDGET, Budget
from awp_engine.evaluation.finished import code_digest, read_finished, sealed
from awp_engine.evaluation.foreign import Foreign, load_foreign, look_at_accuracy
from awp_engine.evaluation.receipt import data_papers, make_receipt
from awp_engine.evaluation.results import RIGHT_MEANS, Measurement
from awp_engine.evaluation.robustbench import Publication, model_info
from awp_engine.evaluation.saved import Form, image_saver
from awp_engine.evaluation.saved import save_per_image as write_per_image
from awp_engine.evaluation.subject import Subject, load_subject
from awp_engine.evaluation.suite import measure, require_packages
from awp_engine.files.atomic import atomic_write_text, replace_file
from awp_engine.files.locking import locked
from awp_engine.files.text import first_line, json_text, printable
from awp_engine.models.class_names import difference
from awp_engine.models.hub import is_address
from awp_engine.observe.bars import Bar, NoBar
from awp_engine.observe.report import as_text, prepare_output

JSON, PAGE, LEADERBOARD = "evaluation.json", "evaluation.html", "robustbench.json"
DEFAULT_ATTACKS = ("clean", "fgsm", "pgd20", "cw")
_BATCH_SIZE = 512
# far beyond use, within what torch counts with
_MOST = 2**31 - 1
_LARGEST_L2 = 10**6
_MOST_DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What `evaluate_checkpoint` leaves.

    Attributes:
        measurement: the numbers.
        report: what evaluation.json holds, the receipt included.
        output: the directory with the reports.
        title: of the table.
    """

    measurement: Measurement
    report: dict[str, Any]
    output: Path
    title: str

    def __str__(self) -> str:
        """The table, and what speaks against the numbers, as `awp evaluate` prints them."""
        table = as_text(self.measurement.table(), title=self.title)
        doubts = [f"UNRELIABLE: {printable(doubt)}" for doubt in self.report["doubts"]]
        return "\n".join([table, f"right: {RIGHT_MEANS}", *doubts, f"reports in {printable(str(self.output))}"])


def _amount(name: str, text: str) -> Fraction:
    try:
        return parse_amount(text)
    except ValueError:
        raise EvaluationError(
            f"--{name}: expected a fraction or number >= 0 such as 8/255, got {text[:80]!r}"
        ) from None


def _threat(
    config: Config | None,
    weights: Path | str,
    epsilon: str | None,
    norm: Norm | None,
    step_size: str | None,
    data_name: str | None,
) -> tuple[Threat, Fraction]:
    """The ball that was asked for, or else the run's own; a step goes with its ball, else it is epsilon / 4."""
    if config is not None:
        if epsilon is None and norm not in (None, config.attack.norm):
            own = f"{config.attack.epsilon}, is of {config.attack.norm}"
            raise EvaluationError(f"--norm {norm}: give --epsilon too, as the run's own, {own}")
        if epsilon is None and step_size is None:
            step_size = config.evaluation.step_size
        epsilon = config.attack.epsilon if epsilon is None else epsilon
        norm = norm or config.attack.norm
    else:
        given = {"--data.name": data_name, "--norm": norm, "--epsilon": epsilon}
        missing = [flag for flag, value in given.items() if value is None]
        if missing or epsilon is None or norm is None:
            usual = "; usual are linf and 8/255 for CIFAR, linf and 4/255 for ImageNet"
            raise EvaluationError(
                f"{weights}: no run's config.json says how to measure it: give {', '.join(missing)}"
                + (usual if missing != ["--data.name"] else "")
            )
    radius = _amount("epsilon", epsilon)
    if norm == "linf" and radius > 1:
        hint = f" (did you mean {radius}/255?)" if radius <= 255 and radius.denominator == 1 else ""
        raise EvaluationError(f"--epsilon: expected at most 1 for linf, as pixels lie in [0, 1]{hint}, got {epsilon}")
    if radius > _LARGEST_L2:
        raise EvaluationError(f"--epsilon: expected at most {_LARGEST_L2}, got {epsilon[:80]}")
    step = radius / 4 if step_size is None else _amount("step-size", step_size)
    if step > 2 * radius:
        raise EvaluationError(
            f"--step-size: expected at most twice epsilon ({radius}), across the whole ball, got {str(step_size)[:80]}"
        )
    return Threat(epsilon=radius, norm=norm), step


def open_data(
    config: Config | None,
    weights: Path | str,
    name: str | None,
    root: Path | None,
    corruption: tuple[str | None, int | None] = (None, None),
) -> Dataset:
    """The test images that a name, or else the settings of a run, stand for.

    Args:
        config: of the run, if there is one.
        weights: what is measured, for messages.
        name: of the data set.
        root: its directory.
        corruption: kind and severity, of a set of corrupted images.

    Raises:
        EvaluationError, DataError: one line that says what is wrong.
    """
    if name is None:
        if config is None:
            raise EvaluationError(
                f"{weights}: belongs to no run whose config.json could say what it was trained on: give --data.name"
            )
        name = config.data.name
        if is_own(name):
            raise EvaluationError(
                f"{weights}: the images of its run come from {name}, code that is not run because a file names it: "
                f"if you trust it, give --data.name {name}"
            )
    if name not in corrupted_names and corruption != (None, None):
        raise EvaluationError(
            f"--data.corruption and --data.severity go with --data.name {' or '.join(corrupted_names)}, got {name}"
        )
    loading = None
    if config is not None:
        same = name == config.data.name
        root = config.data.root if root is None and same else root
        # what was listed is of the run's own files
        settings = config.data if same else replace(config.data, bad_list=None)
        if root is not None and root != config.data.root and not (root / LIST_NAME).exists():
            # the run left out files of its own images; these were not scanned
            settings = replace(settings, bad_files="refuse", bad_list=None)
        # of files only the test images are wanted
        loader = "auto" if name in (*source_names, *corrupted_names) else "resident"
        loading = replace(data_loading(settings, torch.device("cpu"), root), loader=loader, resident_share=0.0)
        if not same and name not in (*source_names, *corrupted_names):
            loading = replace(loading, framing=Framing())
    if name in corrupted_names:
        return load_corrupted(name, root=root, kind=corruption[0], severity=corruption[1], loading=loading)
    return load_dataset(name, root=root, held_out_fraction=0.0, seed=0, loading=loading, need_train=False)


def output_of(path: Path | str, subject: Subject) -> Path:
    """Where the reports go if nothing else is said."""
    if subject.run_dir is not None:
        return subject.run_dir / ("evaluation" if subject.name == "best" else f"evaluation-{subject.name}")
    if is_address(path):
        return Path(f"{subject.name}-evaluation")
    return Path(path).parent / f"{Path(path).stem}-evaluation"


def _training(subject: Subject) -> dict[str, Any]:
    """What the weights are a result of, as far as that is known."""
    if subject.config is None or subject.run_dir is None:
        return {}
    config = subject.config
    name = printable(subject.run_dir.resolve().name)
    return {"run": name, "method": config.title, "gamma": config.awp.gamma, "seed": config.seed}


def require_fit(subject: Subject, dataset: Dataset, device: torch.device, what: str) -> None:
    """Refuses images that the model cannot take, and another number of classes."""
    image = next(eval_batches(dataset.test.select(torch.arange(1)), 1)).images.to(device)
    try:
        with torch.no_grad():
            logits = subject.model(image)
    except RuntimeError as error:
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


def evaluate_checkpoint(
    path: Path | str | None,
    *,
    foreign: Foreign | None = None,
    model: str | None = None,
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    checkpoint: str = "best",
    epsilon: str | None = None,
    norm: Norm | None = None,
    step_size: str | None = None,
    restarts: int = 1,
    seed: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    gates_limit: int | None = 200,
    device: str = "auto",
    data_name: str | None = None,
    data_root: Path | None = None,
    data_corruption: str | None = None,
    data_severity: int | None = None,
    transfer_to: Path | None = None,
    output: Path | None = None,
    publication: Publication | None = None,
    budget: Budget = STANDARD_BUDGET,
    say: Callable[[str], None] = lambda _: None,
    eot_draws: Sequence[int] = EOT_DRAWS,
    save_images: int | None = None,
    save_per_image: Form | None = None,
    again: bool = False,
    bar: Callable[[str, int], Bar] = NoBar,
    tell: Callable[[Evaluated], None] = lambda _: None,
) -> Evaluated:
    """Measures a checkpoint on the test split, and writes evaluation.json, evaluation.html and what was asked for.

    These are the newest; each is kept under a name of its own as well, by data, images, ball and a hash of all that was
    asked for, so that nothing is overwritten. evaluation-NAME.partial.json is there while attacks run. What this user
    has measured already, by the same code, is read again.

    What is not given is the run's own, from the config.json beside or above the weights.

    Args:
        path: a run directory, one of its checkpoints, a .safetensors file, or hf://OWNER/NAME; None with `foreign`.
        model: of a run, in place of the code that its weights name, which is not run because they say so; as
            `load_model` takes it.
        foreign: in place of a run: how to make a model, and its weights.
        attacks: names, see `parse_attack`.
        checkpoint: of a run directory: best, last, or a checkpoint's name or path.
        epsilon: radius of the ball, exact: "8/255".
        norm: "linf", "l2" or "l1".
        step_size: of pgd and cw, exact; the run's own in its own ball, else epsilon / 4.
        restarts: of pgd and cw.
        seed: of all noise; if not given, the one that the run's own evaluation uses.
        batch_size: images a batch.
        limit: evaluate on so many images, evenly spread.
        gates_limit: images of the gates; None leaves them out.
        device: auto, cpu or cuda.
        data_name: the data set; the code of a `file.py:factory` is run.
        data_root: its directory; a test part alone is enough.
        data_corruption: of a corrupted test set: its kind.
        data_severity: 1 to 5.
        transfer_to: a second run, checkpoint or file, on which every attack's images are tried.
        output: directory of the reports; RUN_DIR/evaluation if not given.
        publication: write RobustBench's description, robustbench.json; needs autoattack.
        budget: of autoattack and square, for quick looks.
        eot_draws: over how many draws the gates average the gradient of a random model, one attack for each.
        save_images: write images-NAME-ATTACK.safetensors of every attack, with so many images, evenly spread, or all of
            them for 0.
        save_per_image: write per-image-NAME.npz or .parquet: every attack's prediction for every image.
        again: measure, though the same was measured before.
        bar: makes what shows how far an attack is, from a label and the units of work.
        say: is told what was found, one line at a time.
        tell: is given the result before anything is written.

    Raises:
        EvaluationError, ConfigError, DataError, CheckpointError: one line that says what is wrong.
        OSError: a report cannot be written.
    """
    wanted = [parse_attack(name) for name in dict.fromkeys(attacks)]
    names = [attack.name for attack in wanted]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise EvaluationError(f"--attacks: two are called {twice}, also in the reports; rename one of the files")
    counts = {"restarts": restarts, "batch-size": batch_size, "limit": limit, "gates-limit": gates_limit}
    for name, value in counts.items():
        if value is not None and not 1 <= value <= _MOST:
            raise EvaluationError(f"--{name}: expected a whole number from 1 to {_MOST}, got {show(value)}")
    if seed is not None and not 0 <= seed < 2**63:
        raise EvaluationError(f"--seed: expected a whole number in [0, 2^63), got {seed}")
    if publication is not None and "autoattack" not in attacks:
        raise EvaluationError("--robustbench: its description needs autoattack; add it to --attacks")
    if save_images is not None and not 0 <= save_images <= _MOST:
        raise EvaluationError(f"--save-images: expected a whole number or all, got {show(save_images)}")
    if not eot_draws or any(not 1 <= number <= _MOST_DRAWS for number in eot_draws):
        raise EvaluationError(f"--eot: expected whole numbers from 1 to {_MOST_DRAWS}, got {show(list(eot_draws))}")
    if save_per_image == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise EvaluationError("--save-per-image: parquet needs the package pyarrow: pip install pyarrow, or take npz")
    place = choose_device(device)
    subject = None
    if foreign is not None:
        path = foreign.weights or foreign.name
    elif path is None:
        raise EvaluationError("RUN_OR_CHECKPOINT: expected a path, or --model.name with --weights")
    else:
        subject = load_subject(path, which=checkpoint, device=place, model=model)
    # before anything is measured; a path that is not there is the plainer mistake
    require_packages(wanted, gates_limit)
    config = None if subject is None else subject.config
    weights = path if subject is None else subject.weights
    threat, step = _threat(config, weights, epsilon, norm, step_size, data_name)
    for attack in wanted:
        require_norm(attack, threat)
    found = open_data(config, weights, data_name, data_root, (data_corruption, data_severity))
    for note in found.notes:
        say(note)
    if foreign is not None:
        subject = load_foreign(foreign, found, place, say)
    assert subject is not None
    dataset, labels = match_classes(subject.model.class_names, found, str(path))
    require_fit(subject, dataset, place, str(path))
    try:
        # what every attack of the ball would refuse
        values = math.prod(dataset.test.shape)
        if threat.norm == "l1" and threat.epsilon > values:
            raise ValueError(f"epsilon: expected at most {values} for l1, the number of values, got {threat.epsilon}")
        if threat.norm != "l1":
            ball(values, epsilon=float(threat.epsilon), norm=threat.norm, clip=(0.0, 1.0))
    except ValueError as error:
        raise EvaluationError(f"--{error}") from None
    second = None if transfer_to is None else load_subject(transfer_to, device=place)
    if second is not None:
        what = f"--transfer-to {transfer_to}"
        others = match_classes(second.model.class_names, found, what)[0].class_names
        if others != dataset.class_names:
            raise EvaluationError(
                f"{what}: its classes are not those of {path}: {difference(others, dataset.class_names)}; give a model "
                "of the same classes in the same order"
            )
        require_fit(second, dataset, place, what)
    split = spread(dataset.test, limit).resident().to(place)
    if seed is None:
        seed = evaluation_seed(0 if config is None else config.seed)
    if batch_size is None:
        batch_size = _BATCH_SIZE if config is None else config.evaluation.batch_size
    output = output or output_of(path, subject)
    prepare_output(output)
    if labels != "the same":
        say(f"class names: {labels}")
    trial = Trial(
        model=subject.model,
        split=split,
        threat=threat,
        seed=seed,
        batch_size=batch_size,
        say=say,
        bar=bar,
        classes=len(dataset.class_names),
    )
    receipt = make_receipt(
        trial,
        checkpoint={**subject.papers(), **_training(subject)},
        data=data_papers(dataset, limit, labels),
        step_size=step,
    )
    if second is not None:
        receipt["transfer_to"] = {"name": second.name, "file": second.weights.name, "sha256": second.sha256}
    layers = subject.layers(receipt["normalisation"])
    question = {
        "weights": subject.sha256,
        "layers": layers,
        "images": receipt["data"]["sha256_of_these_images"],
        "ball": [str(threat.epsilon), threat.norm, str(step)],
        "attacks": [(attack.name, attack.package if attack.code is None else attack.code.sha256) for attack in wanted],
        "numbers": [seed, batch_size, restarts, gates_limit, asdict(budget)],
        "transfer_to": None if second is None else second.sha256,
        "saved": [save_images, save_per_image],
        "eot": list(eot_draws),
        "by": [receipt["versions"], code_digest(), place.type],
    }
    title = f"{dataset.name} test split, {threat.norm} epsilon {threat.epsilon}, {len(split)} images"
    name = _name(dataset.name, len(split), threat, question)
    *kept, unused = _names(output, name)
    for name in reversed([] if again else kept):
        if (earlier := read_finished(output / f"evaluation-{name}.json")) is None:
            continue
        done = Evaluated(measurement=Measurement.from_dict(earlier), report=earlier, output=output, title=title)
        say(f"measured before, and read again from evaluation-{name}.json; --again measures it anew")
        with locked(output):
            tell(done)
            atomic_write_text(output / JSON, json_text(earlier, indent=2))
            # one that could not be drawn then
            with contextlib.suppress(FileNotFoundError):
                replace_file(output / PAGE, (output / f"evaluation-{name}.html").read_bytes())
            if publication is not None:
                info = _leaderboard(publication, dataset.name, trial, done.measurement, limit)
                put_report(output, name, LEADERBOARD, json_text(info, indent=2))
        return done
    name = unused
    keep = None if save_images is None else image_saver(trial, output, name, save_images)
    partial = output / f"evaluation-{name}.partial.json"
    doubts = look_at_accuracy(subject, dataset, place, batch_size)
    for doubt in doubts:
        say(f"WARNING: {doubt}")

    def save(measured: Measurement) -> None:
        try:
            atomic_write_text(
                partial, json_text({"finished": False, "receipt": receipt, **measured.to_dict()}, indent=2)
            )
        except OSError as error:
            say(f"{error.filename}: cannot be written, measuring goes on: {error.strerror}")

    with locked(output):
        measurement = measure(
            trial,
            wanted,
            step_size=step,
            restarts=restarts,
            gates_limit=gates_limit,
            second=None if second is None else second.model,
            budget=budget,
            states=output,
            identity={
                "checkpoint": subject.sha256,
                "layers": layers,
                "images": receipt["data"]["sha256_of_these_images"],
                "device": place.type,
                "torch": receipt["versions"]["torch"],
                "pyautoattack": receipt["versions"]["pyautoattack"],
            },
            class_names=dataset.class_names,
            eot_draws=eot_draws,
            so_far=save,
            **({} if keep is None else {"attacked": keep}),
        )
        resumed = {row.attack: row.resumed for row in measurement.rows if row.resumed is not None}
        receipt |= {"resumed": resumed} if resumed else {}
        report = {"finished": True, "receipt": receipt, **measurement.to_dict()}
        report |= {"doubts": [*report["doubts"], *doubts], "unreliable": report["unreliable"] or bool(doubts)}
        report = sealed(report)
        done = Evaluated(measurement=measurement, report=report, output=output, title=title)
        tell(done)
        # numbers before pictures, which may fail
        put_report(output, name, JSON, json_text(report, indent=2))
        partial.unlink(missing_ok=True)
        if save_per_image is not None and measurement.per_image is not None:
            path = output / f"per-image-{name}.{save_per_image}"
            write_per_image(path, measurement.per_image, receipt)
        if publication is not None:
            info = _leaderboard(publication, dataset.name, trial, measurement, limit)
            put_report(output, name, LEADERBOARD, json_text(info, indent=2))
        put_report(output, name, PAGE, _page(subject, dataset, threat, done))
        return done


def _name(data: str, images: int, threat: Threat, question: Mapping[str, Any]) -> str:
    """For the reports of one evaluation: says what was measured, unlike that of any other question."""
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:8]
    parts = (data, images, threat.norm, threat.epsilon)
    return "-".join([re.sub(r"[^A-Za-z0-9]+", "_", str(part)) for part in parts] + [digest])


def _names(output: Path, name: str) -> Iterator[str]:
    """The names of all reports on a question, oldest first, and after them one that is free: nothing is overwritten."""
    for found in itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2))):
        yield found
        if not (output / f"evaluation-{found}.json").exists():
            return


def put_report(output: Path, name: str, kind: str, text: str) -> None:
    """Writes a report twice: under the evaluation's own name, and as the newest."""
    stem, _, suffix = kind.partition(".")
    for path in (output / f"{stem}-{name}.{suffix}", output / kind):
        atomic_write_text(path, text)


def _page(subject: Subject, dataset: Dataset, threat: Threat, done: Evaluated) -> str:
    # matplotlib is imported at the end: it takes a second
    from awp_engine.evaluation.figures import epsilon_curve, learning_curves, picture_cards, steps_curve
    from awp_engine.evaluation.page import render_page

    measurement = done.measurement
    figures: list[tuple[str, bytes]] = []
    if measurement.gates is not None:
        on = f"on {measurement.gates.images} images"
        figures.append((f"Accuracy under PGD-40 against epsilon, {on}", epsilon_curve(measurement.gates, threat.norm)))
        figures.append((f"Accuracy against the steps of PGD, {on}", steps_curve(measurement.gates)))
    if subject.run_dir is not None and (curves := learning_curves(subject.run_dir)) is not None:
        figures.append(("Learning curves, as the run's metrics.jsonl has them; not measured here", curves))
    pictures = {found.attack: picture_cards(found, dataset.class_names) for found in measurement.pictures}
    return render_page(done.report, [measurement.table(), measurement.regional_table()], figures, pictures)


def _leaderboard(
    publication: Publication, dataset: str, trial: Trial, measurement: Measurement, limit: int | None
) -> dict[str, Any]:
    autoattack = next(row for row in measurement.rows if row.attack == "autoattack")
    more = {
        "the gates were not run": measurement.gates is None,
        "it is not AutoAttack's standard version": autoattack.parameters["version"] != "standard",
        f"only {measurement.images} images were measured": limit is not None,
    }
    doubts = [*measurement.doubts(), *(reason for reason, holds in more.items() if holds)]
    if doubts:
        trial.say(f"{LEADERBOARD}: marked unreliable: {', '.join(doubts)}")
    return model_info(
        publication,
        dataset=dataset,
        epsilon=trial.threat.epsilon,
        clean=measurement.clean,
        autoattack=autoattack.right,
        images=measurement.images,
        unreliable=bool(doubts),
    )

"""One evaluation from a checkpoint to its reports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from awp_engine.config.data_sets import own_title
from awp_engine.data import Dataset, match_classes
from awp_engine.device import choose_device, in_full_precision
from awp_engine.distributed.ranks import Ranks
from awp_engine.evaluation.asked import AttacksAsked, require_ball
from awp_engine.evaluation.attacks.named import EvaluationError, Threat, Trial
from awp_engine.evaluation.model.external import guessed, look_at_accuracy
from awp_engine.evaluation.model.loaded_model import LoadedModel, load_trained
from awp_engine.evaluation.model.own_classes import among_own_classes
from awp_engine.evaluation.model.precision import ROUNDING, lowered, require_precision
from awp_engine.evaluation.prepare import Target, prepare, require_fit
from awp_engine.evaluation.reports.files import Reported, Reports, sealed
from awp_engine.evaluation.reports.results import RIGHT_MEANS, Measurement
from awp_engine.evaluation.reports.robustbench import Publication, model_info
from awp_engine.evaluation.reports.saved import Form, ImageSaver, save_per_image
from awp_engine.evaluation.shares import ONE_RANK, Shares
from awp_engine.evaluation.suite import measure, require_packages
from awp_engine.files.atomic import atomic_write_text, replace_file
from awp_engine.files.locking import locked
from awp_engine.files.run_places import FOREIGN
from awp_engine.files.text import json_text, printable
from awp_engine.models.class_names import difference
from awp_engine.observe.bars import MakeBar, NoBar
from awp_engine.observe.report import as_text, prepare_output

JSON, PARTIAL, PAGE, LEADERBOARD = "evaluation.json", "evaluation.partial.json", "evaluation.html", "robustbench.json"


@dataclass(frozen=True, kw_only=True)
class Evaluated(Reported):
    """What `evaluate_checkpoint` leaves: the report, evaluation.json, and its numbers as a `Measurement`."""

    measurement: Measurement

    def __str__(self) -> str:
        """The table, and what speaks against the numbers, as `awp evaluate` prints them."""
        table = as_text(self.measurement.table(), title=self.title)
        gates = self.measurement.gates
        checks = "" if gates is None else f"; {gates.words}"
        doubts = [f"UNRELIABLE: {printable(doubt)}" for doubt in self.report["doubts"]]
        found = [] if self.measurement.stronger is None else [f"robust accuracy: {self.measurement.stronger}"]
        told = [*doubts, *(f"note: {printable(note)}" for note in self.report["notes"])]
        place = f"reports in {printable(str(self.output))}"
        return "\n".join([*found, table, f"right: {RIGHT_MEANS}{checks}", *told, place])


@in_full_precision()
def evaluate_checkpoint(
    path: Path | str | None,
    *,
    say: Callable[[str], None] = lambda _: None,
    bar: MakeBar = NoBar,
    tell: Callable[[Evaluated], None] = lambda _: None,
    ranks: Ranks = ONE_RANK,
    **asked: Any,
) -> Evaluated:
    """Measures a checkpoint on the test split, and writes evaluation.json, evaluation.html and what was asked for.

    These are the newest; each is kept under a name of its own as well, by data, images, ball and a hash of all that was
    asked for, so that nothing is overwritten. evaluation-NAME.partial.json is there while attacks run. What this user
    has measured already, by the same code, is read again.

    Args:
        path: a run directory, one of its checkpoints, a .safetensors file, or hf://OWNER/NAME; None with `external`.
        say: is told what was found, one line at a time.
        bar: makes what shows how far an attack is, from a label and the units of work.
        tell: is given the result before anything is written.
        ranks: that share the images, see `sharing`; the first one says, tells and writes.
        asked: the other fields of `Asked` and `AttacksAsked`, such as limit, output, attacks and epsilon.

    Raises:
        EvaluationError, ConfigError, DataError, CheckpointError: one line that says what is wrong.
        OSError: a report cannot be written.
        KeyboardInterrupt: with a note of the file that has the finished attacks, if there are any.
    """
    ask = AttacksAsked(path=path, **asked)
    device = choose_device(ask.device, ranks.local_rank)
    require_precision(ask.precision, device)
    say_own = say
    if not ranks.is_first:
        say, tell, bar = lambda _: None, lambda _: None, NoBar
    loaded = ask.load(device)
    # before anything is measured; a path that is not there is the plainer mistake
    require_packages(ask.named, ask.gates_limit)
    threat, step_size = ask.ball(loaded)
    own = None if loaded is None or loaded.config is None else loaded.config.attack
    if own is not None and own.also and ask.epsilon is None:
        alone = f"{threat.norm} epsilon {threat.epsilon} alone"
        say(f"{ask.place} was trained against the {own.balls}: measured in {alone}; --norm takes another of them")
    target = prepare(ask, loaded, device, say)
    require_ball(threat, target.dataset)
    second = None if ask.transfer_to is None else _second(ask.transfer_to, target, str(ask.place))
    trial = Trial(
        model=target.loaded.model,
        split=target.split,
        threat=threat,
        seed=target.seed,
        batch_size=target.batch_size,
        say=say,
        bar=bar,
        classes=len(target.dataset.class_names),
    )
    shares = Shares(ranks, len(target.split), device, say_own)
    if ranks.is_first:
        prepare_output(target.output)
    evaluation = _Evaluation(ask, target, trial, step_size, second, shares, tell)
    if not ranks.is_first:
        return evaluation.shared()
    with locked(target.output), evaluation.kept_told():
        earlier = evaluation.reports.rename(JSON, again=ask.again)
        shares.gather(earlier)
        return evaluation.measured() if earlier is None else evaluation.read_again(earlier)


class _Evaluation:
    """What was asked, of what, and the files that the answer goes to."""

    def __init__(
        self,
        ask: AttacksAsked,
        target: Target,
        trial: Trial,
        step_size: Fraction,
        second: LoadedModel | None,
        shares: Shares,
        tell: Callable[[Evaluated], None],
    ) -> None:
        self.ask, self.target, self.step_size, self.second = ask, target, step_size, second
        self.shares, self.tell = shares, tell
        self.receipt = target.receipt(
            trial.split, threat=trial.threat, step_size=step_size, ranks=shares.ranks.world, precision=ask.precision
        )
        self.receipt["checkpoint"] |= _training(target.loaded)
        # the receipt is of the model's own weights
        model = lowered(trial.model, ask.precision)
        self.trial = replace(trial, model=model, rounding=0.0 if ask.precision == "fp32" else ROUNDING)
        if second is not None:
            self.receipt["transfer_to"] = {"name": second.name, "file": second.weights.name, "sha256": second.sha256}
        self.identity = target.identity(self.receipt)
        question = self.identity | {
            "ball": [str(trial.threat.epsilon), trial.threat.norm, str(step_size)],
            "attacks": [(one.name, one.package if one.code is None else one.code.sha256) for one in ask.named],
            "numbers": [ask.restarts, ask.gates_limit, asdict(ask.budget)],
            "transfer_to": None if second is None else second.sha256,
            "saved": [ask.save_images, ask.save_per_image],
            "eot": list(ask.eot_draws),
            "ranks": shares.ranks.world,
            # the same numbers, said to be right
            "guessed": guessed(target.loaded),
        }
        # an object of Python is told from those of other calls by a random number, which every rank draws itself
        apart = {"layers"} if ask.external is not None and ask.external.is_object else set()
        told = {key: value for key, value in question.items() if key not in apart}
        shares.require_equal(told, "the model, the images, the versions and what is asked")
        parts = own_title(target.dataset.name), len(target.split), trial.threat.norm, trial.threat.epsilon
        self.reports = Reports(target.output, parts, question)

    @contextlib.contextmanager
    def kept_told(self) -> Iterator[None]:
        """A block whose interrupt carries where the finished attacks are."""
        try:
            yield
        except KeyboardInterrupt as interrupt:
            if (partial := self.reports.path(PARTIAL)).exists():
                interrupt.add_note(f"finished attacks are in {printable(str(partial))}")
            raise

    def read_again(self, report: dict[str, Any]) -> Evaluated:
        """The answer of an earlier measurement, as the newest."""
        own = self.reports.path(JSON).name
        self.trial.say(f"measured before, and read again from {own}; --again measures it anew")
        done = self._told(Measurement.from_dict(report), report)
        for path in self._beside():
            if not path.exists():
                self.trial.say(f"{path.name}: was saved then, and is not there any more; --again writes it anew")
        atomic_write_text(done.output / JSON, json_text(report, indent=2))
        # one that could not be drawn then
        with contextlib.suppress(FileNotFoundError):
            replace_file(done.output / PAGE, self.reports.path(PAGE).read_bytes())
        self._put_leaderboard(done)
        return done

    def shared(self) -> Evaluated:
        """The first rank's answer, after this one's part of the attacks."""
        report = self.shares.gather(None)[0]
        if report is None:
            self._measure()
            report = self.shares.gather(None)[0]
        return self._told(Measurement.from_dict(report), report)

    def measured(self) -> Evaluated:
        """The answer by attacks."""
        ask, target = self.ask, self.target
        doubts = look_at_accuracy(target.loaded, target.dataset, target.device, target.batch_size)
        for doubt in doubts:
            self.trial.say(f"WARNING: {doubt}")
        # which was said when it was made
        doubts = [*guessed(target.loaded), *doubts]
        measurement = self._measure()
        resumed = {row.attack: row.resumed for row in measurement.rows if row.resumed is not None}
        receipt = {**self.receipt, **({"resumed": resumed} if resumed else {})}
        report = {"finished": True, "receipt": receipt, **measurement.to_dict()}
        report |= {"doubts": [*report["doubts"], *doubts], "unreliable": report["unreliable"] or bool(doubts)}
        done = self._told(measurement, sealed(report))
        # numbers before pictures, which may fail
        self.reports.put(JSON, json_text(done.report, indent=2))
        self.reports.path(PARTIAL).unlink(missing_ok=True)
        if ask.save_per_image is not None and measurement.per_image is not None:
            save_per_image(self._per_image(ask.save_per_image), measurement.per_image, receipt)
        self._put_leaderboard(done)
        self.reports.put(PAGE, _page(target.loaded, target.dataset, self.trial.threat, done))
        self.shares.gather(done.report)
        return done

    def _measure(self) -> Measurement:
        ask = self.ask
        return measure(
            self.trial,
            ask.named,
            step_size=self.step_size,
            restarts=ask.restarts,
            gates_limit=ask.gates_limit,
            second=None if self.second is None else lowered(self.second.model, ask.precision),
            budget=ask.budget,
            states=self.target.output,
            identity=self.identity,
            again=ask.again,
            class_names=self.target.dataset.class_names,
            eot_draws=ask.eot_draws,
            so_far=self._put_partial if self.shares.is_first else lambda _: None,
            saver=self._saver(),
            shares=self.shares,
        )

    def _saver(self) -> ImageSaver | None:
        count = self.ask.save_images
        return None if count is None else ImageSaver(self.trial, self.target.output, self.reports.name, count)

    def _per_image(self, form: Form) -> Path:
        return self.reports.path(f"per-image.{form}")

    def _beside(self) -> list[Path]:
        """The files of single images that were asked for."""
        form, saver = self.ask.save_per_image, self._saver()
        images = [] if saver is None else [saver.path(one.name) for one in self.ask.named if one.family != "clean"]
        return images if form is None else [*images, self._per_image(form)]

    def _told(self, measurement: Measurement, report: dict[str, Any]) -> Evaluated:
        threat, images = self.trial.threat, len(self.target.split)
        title = f"{self.target.dataset.name} test split, {threat.norm} epsilon {threat.epsilon}, {images} images"
        if self.ask.precision != "fp32":
            title += f", computed in {self.ask.precision}"
        done = Evaluated(measurement=measurement, report=report, output=self.target.output, title=title)
        self.tell(done)
        return done

    def _put_partial(self, measurement: Measurement) -> None:
        report = {"finished": False, "receipt": self.receipt, **measurement.to_dict()}
        try:
            atomic_write_text(self.reports.path(PARTIAL), json_text(report, indent=2))
        except OSError as error:
            self.trial.say(f"{error.filename}: cannot be written, measuring goes on: {error.strerror}")

    def _put_leaderboard(self, done: Evaluated) -> None:
        if self.ask.publication is not None:
            data = self.target.dataset.name
            info = _leaderboard(self.ask, self.ask.publication, data, self.trial, done)
            self.reports.put(LEADERBOARD, json_text(info, indent=2))


def _second(path: Path | str, target: Target, first: str) -> LoadedModel:
    """The model of `--transfer-to`, of the same classes in the same order."""
    what = f"--transfer-to {path}"
    if Path(path).suffix in FOREIGN:
        raise EvaluationError(
            f"{what}: such a file does not say what model its weights are of; make a folder that does, and give that: "
            f"awp export --model.name NAME --weights {path} --hub FOLDER"
        )
    second = load_trained(path, device=target.device)
    classes = match_classes(second.model.class_names, target.found, what)[0].class_names
    if classes != target.whole.class_names:
        raise EvaluationError(
            f"{what}: its classes are not those of {first}: {difference(classes, target.whole.class_names)}; give a "
            "model of the same classes in the same order"
        )
    require_fit(second, target.whole, target.device, what)
    return among_own_classes(second, target.whole)[0]


def _training(loaded: LoadedModel) -> dict[str, Any]:
    """What the weights are a result of, as far as that is known."""
    if loaded.config is None or loaded.run_dir is None:
        return {}
    config = loaded.config
    name = printable(loaded.run_dir.resolve().name)
    return {"run": name, "method": config.title, "gamma": config.awp.gamma, "seed": config.seed}


def _page(loaded: LoadedModel, dataset: Dataset, threat: Threat, done: Evaluated) -> str:
    # matplotlib is imported at the end: it takes a second
    from awp_engine.evaluation.reports.figures import epsilon_curve, learning_curves, picture_cards, steps_curve
    from awp_engine.evaluation.reports.page import render_page

    measurement = done.measurement
    figures: list[tuple[str, bytes]] = []
    if measurement.gates is not None:
        on = f"on {measurement.gates.images} images"
        figures.append((f"Accuracy under PGD-40 against epsilon, {on}", epsilon_curve(measurement.gates, threat.norm)))
        figures.append((f"Accuracy against the steps of PGD, {on}", steps_curve(measurement.gates)))
    if loaded.run_dir is not None and (curves := learning_curves(loaded.run_dir)) is not None:
        figures.append(("Learning curves, as the run's metrics.jsonl has them; not measured here", curves))
    pictures = {found.attack: picture_cards(found, dataset.class_names) for found in measurement.pictures}
    return render_page(done.report, [measurement.table(), measurement.regional_table()], figures, pictures)


def _leaderboard(
    ask: AttacksAsked, publication: Publication, dataset: str, trial: Trial, done: Evaluated
) -> dict[str, Any]:
    measurement = done.measurement
    autoattack = next(row for row in measurement.rows if row.attack == "autoattack")
    more = {
        "the gates were not run": measurement.gates is None,
        "it is not AutoAttack's standard version": autoattack.parameters["version"] != "standard",
        f"only {measurement.images} images were measured": ask.limit is not None,
        f"the model computed in {ask.precision}": ask.precision != "fp32",
    }
    doubts = [*done.report["doubts"], *(reason for reason, holds in more.items() if holds)]
    if doubts:
        trial.say(f"{LEADERBOARD}: marked unreliable: {', '.join(doubts)}")
    return model_info(
        publication,
        dataset=dataset,
        epsilon=trial.threat.epsilon,
        clean=measurement.clean,
        autoattack=autoattack.right,
        images=measurement.images,
        doubts=doubts,
    )

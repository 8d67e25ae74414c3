"""All attacks on one model, and the gates."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine.attack import checks
from awp_engine.data import eval_batches
from awp_engine.evaluation.accuracy import spread
from awp_engine.evaluation.attacks.autoattack import (
    STANDARD,
    STANDARD_BUDGET,
    Budget,
    autoattack,
    require_package,
    require_suitable,
)
from awp_engine.evaluation.attacks.named import (
    NORMS,
    EvaluationError,
    NamedAttack,
    Outcome,
    Threat,
    Trial,
    connected,
    gradient_attack,
    in_ball,
    in_top5,
    measuring,
    own_attack,
    perturbation_norms,
    predict,
    require_norm,
)
from awp_engine.evaluation.attacks.regional import regional_attack
from awp_engine.evaluation.attacks.state import StateFile
from awp_engine.evaluation.gates.adaptive import EOT_DRAWS, varying
from awp_engine.evaluation.gates.gate import Gate
from awp_engine.evaluation.gates.run import GateReport, run_gates
from awp_engine.evaluation.reports.receipt import percent
from awp_engine.evaluation.reports.results import Answers, BlackBox, Measurement, PerImage, Pictures, Row
from awp_engine.evaluation.reports.saved import ImageSaver
from awp_engine.evaluation.shares import ONE_RANK, Shares, added
from awp_engine.files.user_key import KeyFileError
from awp_engine.models.answers import NO_CLASS

_PICTURES = 10
# from which on a place among the first five says something
_MANY_CLASSES = 10
# from which on an attack by gradients should find what Square finds
_MANY_STEPS = 20
# of the first look, before any attack
_LOOKED_AT = 50


def _package_attacks(attack: NamedAttack) -> tuple[str, ...]:
    """What of pyautoattack an attack runs."""
    return {"autoattack": STANDARD, "square": ("square",)}.get(attack.family, ())


def _black_box(attacks: Mapping[str, NamedAttack], answers: Mapping[str, Answers]) -> BlackBox | None:
    """Square beside PGD and CW of many steps; those towards one class alone are weaker than both by nature."""
    square = [name for name, attack in attacks.items() if attack.family == "square"]
    gradients = [
        name for name, attack in attacks.items() if attack.steps >= _MANY_STEPS and attack.target in (None, "targeted")
    ]
    if not square or not gradients:
        return None
    held = answers[square[0]].robust
    withstood = torch.stack([answers[name].robust for name in gradients]).all(0)
    return BlackBox(
        gradients=tuple(gradients),
        square_alone=int((withstood & ~held).sum()),
        gradients_alone=int((held & ~withstood).sum()),
    )


def _ball_gate(rows: Sequence[Row], threat: Threat) -> Gate:
    bounded = [row for row in rows if row.in_ball is not None]
    largest = max((row.largest for row in bounded), default=0.0)
    return Gate(
        name="attacked images lie in the ball",
        measured=f"largest {threat.norm} perturbation {largest:.7g}"
        + "".join(f", {row.attack} outside" for row in bounded if not row.in_ball),
        bound=f"epsilon {threat.epsilon} ({float(threat.epsilon):.7g}), to fp32 rounding, and pixels in [0, 1]",
        passed=all(row.in_ball for row in bounded),
        failure_means="an attack did more than it may: its accuracy says too little",
    )


def _shown(y: Tensor, clean: Tensor, after: Tensor) -> Tensor:
    """The places of images worth a picture."""
    # one of every class before the second of any; those that were right before and are not any more come first
    same = ((clean != y) | (after == y)).long()
    order = torch.argsort(same, stable=True)
    labels = y[order]
    by_class, counts = torch.argsort(labels, stable=True), torch.bincount(labels)
    first = (counts.cumsum(0) - counts)[labels[by_class]]
    # how many of its class come before it
    earlier = torch.empty_like(labels).scatter(0, by_class, torch.arange(len(y), device=y.device) - first)
    return order[torch.argsort(2 * earlier + same[order], stable=True)][:_PICTURES]


def _resumed(ranks: Sequence[Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    """From where which rank went on."""
    if len(ranks) == 1:
        return ranks[0]
    return {f"rank {rank}": state for rank, state in enumerate(ranks) if state is not None} or None


def _require_logits(trial: Trial, images: Tensor, labels: Tensor) -> None:
    with torch.no_grad():
        logits = trial.model(images)
    try:
        # on the host, where a refusal can be caught
        checks.outputs(logits.cpu(), labels.cpu(), len(images))
    except ValueError as error:
        raise EvaluationError(str(error)) from None


def require_packages(attacks: Sequence[NamedAttack], gates_limit: int | None) -> None:
    """Raises `EvaluationError` where a package is missing that the attacks or the gates need."""
    if gates_limit is not None or any(map(_package_attacks, attacks)):
        require_package()


def _count_random(trial: Trial, *, attacked: bool) -> int:
    """Images of a first look that get other answers from call to call, which is told.

    Raises:
        EvaluationError: the model that is to be attacked gives no logits.
    """
    few = spread(trial.split, _LOOKED_AT)
    x, y, *_ = next(eval_batches(few, len(few)))
    if attacked:
        _require_logits(trial, x, y)
    random = int(varying(trial, x, y).sum())
    if random:
        trial.say(
            f"the model is random: {random} of {len(few)} images get other answers from call to call. Attacks that do "
            "not average over them say too much; the gates measure one that does"
        )
    return random


class _Found:
    """What was found of all images so far, attack by attack; the same on every rank.

    Args:
        trial: of all images.
        own: of this rank's.
        shares: make the one of the other.
        second, class_names: see `measure`.
    """

    def __init__(
        self, trial: Trial, own: Trial, shares: Shares, second: nn.Module | None, class_names: Sequence[str]
    ) -> None:
        self._trial, self._own, self._shares, self._second, self._class_names = trial, own, shares, second, class_names
        self._x, self._y = own.whole.images, trial.split.labels
        self._right_on_second = (
            None if second is None else predict(second, self._x, trial.batch_size) == own.whole.labels
        )
        self._clean = shares.whole(own.predict(self._x))
        self._worst = self._clean == self._y
        self._worst_over: list[str] = []
        self._pictures: list[Pictures] = []
        self._answers: dict[str, Answers] = {}
        self._attacks: dict[str, NamedAttack] = {}
        self.rows: list[Row] = []
        self.random, self.top5 = 0, None

    def look_at_top5(self) -> None:
        """Counts the labels among the five largest logits."""
        self.top5 = self._shares.whole(in_top5(self._own, self._x, self._own.whole.labels)).cpu()

    def add(self, attack: NamedAttack, outcome: Outcome, seconds: float, saver: ImageSaver | None) -> None:
        """Takes in what an attack did to this rank's images, and to those of the others."""
        shares, say = self._shares, self._trial.say
        x_adv, after = outcome.x_adv, self._own.predict(outcome.x_adv)
        told = shares.gather(
            {
                "seconds": seconds,
                "fits": bool(in_ball(x_adv, self._x, self._trial.threat).all()),
                "details": outcome.details,
                "resumed": outcome.resumed,
            }
        )
        robust, nonfinite, after = shares.whole(outcome.robust), shares.whole(outcome.nonfinite), shares.whole(after)
        distance = shares.whole(perturbation_norms(x_adv, self._x)[NORMS[self._trial.threat.norm]])
        if attack.bounded:
            self._worst &= robust
            self._worst_over.append(attack.name)
        transferred, transferable = self._transferred(x_adv, ~robust & ~nonfinite)
        self._attacks[attack.name] = attack
        self._answers[attack.name] = Answers(
            predictions=after.cpu(), robust=robust.cpu(), largest=distance.cpu(), bounded=attack.bounded
        )
        row = Row(
            attack=attack.name,
            right=int(robust.sum()),
            right_attacked=int((after == self._y).sum()),
            not_finite=int(((self._clean == NO_CLASS) | (after == NO_CLASS)).sum()),
            blind=int(nonfinite.sum()),
            images=len(self._y),
            seconds=max(each["seconds"] for each in told),
            largest=distance.max().item(),
            in_ball=all(each["fits"] for each in told) if attack.bounded else None,
            transferred=transferred,
            transferable=transferable,
            parameters=outcome.parameters,
            details=outcome.concluded(added([each["details"] for each in told])),
            resumed=_resumed([each["resumed"] for each in told]),
        )
        self.rows.append(row)
        say(f"{attack.name}: {percent(row.right, row.images)}% of {row.images} right, {row.seconds:.1f} s")
        if outside := row.details.get("outside"):
            say(f"{attack.name}: found outside the ball, where nothing counts: {outside} images")
        if attack.family != "clean":
            self._keep_images(attack, x_adv, after, saver)

    def _transferred(self, x_adv: Tensor, fooled: Tensor) -> tuple[int | None, int | None]:
        """How many of the images that fooled the model fooled the second one too, and how many could."""
        if self._second is None or self._right_on_second is None:
            return None, None
        candidates = (self._clean == self._y) & fooled & self._shares.whole(self._right_on_second)
        fooled_second = predict(self._second, x_adv, self._trial.batch_size) != self._own.whole.labels
        return int((candidates & self._shares.whole(fooled_second)).sum()), int(candidates.sum())

    def _keep_images(self, attack: NamedAttack, x_adv: Tensor, after: Tensor, saver: ImageSaver | None) -> None:
        shares, shown = self._shares, _shown(self._y, self._clean, after)
        self._pictures.append(
            Pictures(
                attack=attack.name,
                clean=shares.whole(self._x, shown).cpu(),
                attacked=shares.whole(x_adv, shown).float().cpu(),
                labels=tuple(self._y[shown].tolist()),
                clean_predictions=tuple(self._clean[shown].tolist()),
                predictions=tuple(after[shown].tolist()),
            )
        )
        if saver is not None:
            rows = saver.rows(self._clean == self._y)
            kept = shares.whole(x_adv, rows)
            if shares.is_first:
                saver.save(attack.name, rows, kept, after[rows])

    def measurement(self, gates: GateReport | None) -> Measurement:
        """All of it, as a report has it."""
        ids, labels, clean = (values.cpu() for values in (self._trial.split.ids, self._y, self._clean))
        per_image = PerImage(ids=ids, labels=labels, clean=clean, attacks=dict(self._answers), top5=self.top5)
        return Measurement(
            rows=tuple(self.rows),
            clean=int((clean == labels).sum()),
            not_finite=int((clean == NO_CLASS).sum()),
            worst=int(self._worst.sum()),
            worst_over=tuple(self._worst_over),
            images=len(labels),
            gates=gates,
            pictures=tuple(self._pictures),
            per_class=per_image.by_class(self._class_names),
            per_image=per_image,
            random=self.random,
            top5=None if self.top5 is None else int(self.top5.sum()),
            black_box=_black_box(self._attacks, self._answers),
        )


def measure(
    trial: Trial,
    attacks: Sequence[NamedAttack],
    *,
    step_size: Fraction,
    restarts: int = 1,
    gates_limit: int | None = 200,
    second: nn.Module | None = None,
    budget: Budget = STANDARD_BUDGET,
    states: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    again: bool = False,
    class_names: Sequence[str] = (),
    eot_draws: Sequence[int] = EOT_DRAWS,
    so_far: Callable[[Measurement], None] = lambda _: None,
    saver: ImageSaver | None = None,
    shares: Shares | None = None,
) -> Measurement:
    """Runs the attacks one after the other, and the gates; the model is left as it was.

    Args:
        trial: what is measured; its model may be in any mode.
        attacks: as `parse_attack` gives them.
        step_size: length of a step of pgd and cw, in epsilon's units.
        restarts: of pgd and cw.
        gates_limit: images of the gates, evenly spread; None leaves the gates out.
        second: another classifier of the same images; every attack's images are tried on it.
        budget: of autoattack and square.
        states: directory where autoattack and square save their progress, to go on from.
        identity: what identifies weights, samples and code there; needed with `states`.
        again: go on from no state that is finished.
        class_names: of the labels, for the report.
        eot_draws: see `run_gates`.
        so_far: is given what was measured after every attack.
        saver: writes every attack's images.
        shares: of the ranks that attack together, each its own images; the first one's result is the whole one.

    Raises:
        EvaluationError: no attacks, no images, probabilities for logits, or something that an attack cannot do.
    """
    model, images = trial.model, len(trial.split)
    shares = shares or Shares(ONE_RANK, images, trial.split.device, trial.say)
    if not images:
        raise EvaluationError("split: expected at least one image, got none")
    if not attacks:
        raise EvaluationError("--attacks: expected at least one name, got none")
    if states is not None and not identity:
        raise ValueError("identity: needed with states, to tell one evaluation's progress from another's")
    require_packages(attacks, gates_limit)

    def state_file(own: Trial, attack: NamedAttack) -> StateFile | None:
        if states is None:
            return None
        depends = {
            **(identity or {}),
            "epsilon": str(trial.threat.epsilon),
            "norm": trial.threat.norm,
            "seed": trial.seed,
            "batch_size": trial.batch_size,
            "ranks": shares.ranks.world,
            "rank": shares.ranks.rank,
            "attacks": list(_package_attacks(attack)),
            "budget": asdict(budget),
        }
        try:
            return StateFile(states, depends)
        except KeyFileError as error:
            own.say(f"{attack.name}: goes on without saving its progress: {error}")
            return None

    def run(own: Trial, attack: NamedAttack) -> Outcome:
        if not len(own.split):
            nothing = own.whole.labels.bool()
            return Outcome(x_adv=own.whole.images, robust=nothing, nonfinite=nothing, parameters={})
        if attack.family == "regional":
            return regional_attack(own, attack)
        if attack.family == "own":
            return own_attack(own, attack)
        if names := _package_attacks(attack):
            state = state_file(own, attack)
            return autoattack(own, attacks=names, budget=budget, state_file=state, again=again)
        return gradient_attack(own, attack, step_size=step_size, restarts=restarts)

    with measuring(model), measuring(second if second is not None else nn.Identity()):
        own = trial = connected(trial)
        if shares.ranks.world > 1:
            own = replace(trial, split=trial.split.select(shares.rows), say=shares.say)
        found = _Found(trial, own, shares, second, class_names)
        with torch.no_grad():
            classes = int(model(next(eval_batches(trial.split, 1)).images).shape[1])
        if (trial.classes or classes) >= _MANY_CLASSES:
            found.look_at_top5()
        # before hours of other attacks
        for attack in attacks:
            require_norm(attack, trial.threat)
            require_suitable(trial, classes, _package_attacks(attack))
        if gates_limit is not None:
            require_suitable(trial, classes, ("square",))
        attacked = gates_limit is not None or any(attack.family != "clean" for attack in attacks)
        found.random = _count_random(trial, attacked=attacked)
        for attack in attacks:
            began = time.monotonic()
            outcome = run(own, attack)
            found.add(attack, outcome, time.monotonic() - began, saver)
            so_far(found.measurement(None))
        gates = None
        # they are few images, and what the others wait for
        if gates_limit is not None and shares.is_first:
            gates = run_gates(replace(trial, split=spread(trial.split, gates_limit)), eot_draws=eot_draws)
            gates = replace(gates, gates=(*gates.gates, _ball_gate(found.rows, trial.threat)))
        return found.measurement(gates)

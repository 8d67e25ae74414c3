"""AutoAttack by the package `pyautoattack`, attack by attack, so that a killed evaluation goes on where it was.

Source: Croce, Hein: Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks,
ICML 2020.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine.checkpoint import CheckpointError
from awp_engine.evaluation.attacks.named import NORMS, EvaluationError, Outcome, Trial
from awp_engine.evaluation.attacks.state import AttackState, StateFile
from awp_engine.files.digest import sha256_of
from awp_engine.models.answers import NO_CLASS, predicted

# of the standard version, and what of the package runs each
_PERTURBERS = {"apgd-ce": "apgd", "apgd-t": "apgd_targeted", "fab-t": "fab", "square": "square"}
STANDARD = tuple(_PERTURBERS)
_SAVE_SECONDS = 60.0
_LOGGER = "auto-attack"


class _Flags(logging.Handler):
    """Keeps what the package warns of: randomised or dynamic models, zero gradients, probabilities for logits."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().partition(" See flags_doc.md")[0]
        if message not in self.messages:
            self.messages.append(message)


@contextlib.contextmanager
def _quiet_package(device: torch.device) -> Iterator[_Flags]:
    """Collects the package's warnings, and puts back what it sets for the whole process: random state and tracer."""
    flags, logger, tracer = _Flags(), logging.getLogger(_LOGGER), sys.gettrace()
    propagate = logger.propagate
    logger.addHandler(flags)
    logger.propagate = False
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield flags
    finally:
        logger.removeHandler(flags)
        logger.propagate = propagate
        sys.settrace(tracer)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long the attacks go on; other numbers than the standard version's are for a quick look.

    Attributes:
        iterations: of APGD and FAB.
        queries: of Square; the schedule of its squares is stretched to another number.
    """

    iterations: int = 100
    queries: int = 5000


STANDARD_BUDGET = Budget()


class _Guarded(nn.Module):
    """The model as the package is to see it: without a number that is not finite.

    The package takes argmax of whatever it is given. Where logits are not finite it is shown ones that are wrong for
    the label, so that it keeps such an image as a success; where gradients are not, zeros. Every other bit is the
    model's.

    Attributes:
        x, y: the images [N, C, H, W] that are attacked, and their labels.
        not_finite: gradients of images seen so far that are not finite though the logits are.
        passed: called at every pass forward.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.model, self.x, self.y = model, x, y
        self.not_finite = 0
        self.passed: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        self.passed()
        if not x.requires_grad:
            return self._answers(self.model(x), x)
        # a new tensor, so that the hook is of this pass alone
        seen = x.view_as(x)
        logits = self.model(seen)
        answered = predicted(logits) != NO_CLASS

        def finite(gradient: Tensor) -> Tensor:
            bad = ~gradient.isfinite()
            self.not_finite += int((bad.flatten(1).any(1) & answered).sum())
            return gradient.masked_fill(bad, 0)

        seen.register_hook(finite)
        return self._answers(logits, x)

    def _answers(self, logits: Tensor, x: Tensor) -> Tensor:
        bad = predicted(logits) == NO_CLASS
        if not bool(bad.any()):
            return logits
        # whose image it is: the package hands over any of the batch, moved within the ball
        nearest = torch.cdist(x.detach()[bad].flatten(1), self.x.flatten(1)).argmin(1)
        wrong = torch.zeros_like(logits)
        wrong[bad] = wrong[bad].scatter(1, self.y[nearest].unsqueeze(1), -1)
        return torch.where(bad.unsqueeze(1), wrong, logits)


def require_package() -> None:
    """Raises `EvaluationError` where pyautoattack is missing: hours before it is wanted."""
    if importlib.util.find_spec("pyautoattack") is None:
        raise EvaluationError(
            "the package pyautoattack is missing, by which autoattack, square and the gates' black-box attack run; "
            "install it with: pip install pyautoattack, or leave them out (--no-gates; in Python gates_limit=None)"
        )


def _package(trial: Trial, guarded: _Guarded, classes: int, budget: Budget) -> Any:
    """The package's object for the standard version, with no more targets than there are wrong classes."""
    require_package()
    from pyautoattack import AutoAttack

    norm, device = NORMS[trial.threat.norm], guarded.x.device
    eps, seed = float(trial.threat.epsilon), trial.seed
    package = AutoAttack(guarded, norm=norm, eps=eps, version="standard", seed=seed, device=device)
    for targeted in (package.apgd_targeted, package.fab):
        targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
    if budget.queries != package.square.n_queries:
        # the schedule of square sizes is written for the full number
        package.square.n_queries, package.square.rescale_schedule = budget.queries, True
    if budget.iterations != package.apgd.n_iter:
        package.fab.n_iter = budget.iterations
        for apgd in (package.apgd, package.apgd_targeted):
            # its constructor derives when it may halve the step from the number of iterations
            targets = package.apgd_targeted.n_target_classes
            apgd.__init__(
                apgd.model,
                n_iter=budget.iterations,
                norm=apgd.norm,
                n_restarts=apgd.n_restarts,
                eps=apgd.eps,
                seed=seed,
                device=apgd.device,
                logger=apgd.logger,
                use_largereps=apgd.use_largereps,
            )
            package.apgd_targeted.n_target_classes = targets
    # as its own loop sets them up
    package.apgd.loss, package.fab.targeted, package.fab.n_restarts = "ce", True, 1
    return package


def require_suitable(trial: Trial, classes: int, attacks: Sequence[str]) -> None:
    """Raises `EvaluationError` for images and classes that the package cannot attack."""
    height = trial.split.images.shape[2]
    if classes < 4 and "apgd-t" in attacks:
        raise EvaluationError(
            f"autoattack: expected at least 4 classes, which its targeted DLR loss compares, got {classes}; "
            "use pgdN, cwN and square"
        )
    if trial.threat.norm != "linf" and height < 5 and "square" in attacks:
        raise EvaluationError(
            f"autoattack: its Square attack in {trial.threat.norm} needs images of at least 5 rows, got {height}"
        )


def _passes(name: str, package: Any, budget: Budget) -> int:
    """How many passes forward an attack makes on a batch, about."""
    apgd, targets = package.apgd.n_restarts * (budget.iterations + 2), package.apgd_targeted.n_target_classes
    return {
        "apgd-ce": apgd,
        "apgd-t": targets * (budget.iterations + 2),
        "fab-t": package.fab.n_target_classes * 2 * budget.iterations,
        "square": budget.queries,
    }[name]


def _check_model(guarded: _Guarded, attacks: Sequence[str], package: Any) -> None:
    """The package's own checks of the model, on the first batch; what they find goes to the log."""
    from pyautoattack import checks

    logger, x = logging.getLogger(_LOGGER), guarded.x
    checks.check_randomized(guarded, x, guarded.y, bs=len(x), logger=logger)
    classes = checks.check_range_output(guarded, x, logger=logger)
    checks.check_dynamic(guarded, x, False, logger=logger)
    targets = package.apgd_targeted.n_target_classes
    checks.check_n_classes(classes, attacks, targets, package.fab.n_target_classes, logger=logger)


def autoattack(
    trial: Trial,
    *,
    attacks: Sequence[str] = STANDARD,
    budget: Budget = STANDARD_BUDGET,
    state_file: StateFile | None = None,
    again: bool = False,
) -> Outcome:
    """Runs AutoAttack's standard version; equal to the last sample to `AutoAttack.run_standard_evaluation`.

    Every attack is run on the images that withstood those before. With `state_file` the attacked images are saved after
    every attack, and within one after a batch if a minute has passed; started again, it goes on from there to the same
    result, as every batch is seeded by itself. A state that cannot be written is said, and the attacks go on.

    Args:
        trial: what is attacked, logits of at least 4 classes; every attack on every batch begins with its seed, as the
            package does it. The running upper bound of the accuracy is said after every attack.
        attacks: in this order, out of the standard ones.
        budget: how long they go on.
        state_file: where to save, and to go on from.
        again: go on from no state that is finished.

    Raises:
        EvaluationError: the package is missing, or cannot attack such images or so few classes.
    """
    x, y, *_ = trial.whole
    with _quiet_package(x.device) as flags:
        classes = int(trial.model(x[:1]).shape[1])
        require_suitable(trial, classes, attacks)
        guarded = _Guarded(trial.model, x[: trial.batch_size], y[: trial.batch_size])
        package = _package(trial, guarded, classes, budget)

        def check(saved: AttackState) -> None:
            saved.to(x.device).require_sound(trial, attacks)

        state, resumed = None if state_file is None else state_file.load(trial.say, check), None
        if state_file is None or state is None or (again and state.attack == len(attacks)):
            _check_model(guarded, attacks, package)
            right = trial.predict(x) == y
            state = AttackState(x_adv=x.clone(), robust=right, begun=right.clone(), counts={"clean": int(right.sum())})
        else:
            state = state.to(x.device)
            following = attacks[state.attack] if state.attack < len(attacks) else "the result"
            resumed = {
                "file": state_file.path.name,
                "sha256": sha256_of(state_file.path),
                "started": state.started,
                "from": following,
                "batch": state.batch,
            }
            where = f"{following}, of a state begun at {state.started}: {state_file.path.name}"
            trial.say(f"{_called(attacks)}: going on with {where}")
        passes = [_passes(name, package, budget) for name in attacks]
        _run(trial, guarded, package, dict(zip(attacks, passes, strict=True)), state, state_file, flags)
    parameters = {
        "package": f"pyautoattack {importlib.metadata.version('pyautoattack')}",
        "version": "standard" if tuple(attacks) == STANDARD and budget == STANDARD_BUDGET else "custom",
        "attacks": list(attacks),
        "target_classes": package.apgd_targeted.n_target_classes,
        **asdict(budget),
        "seed": trial.seed,
        "batch_size": trial.batch_size,
    }
    return Outcome(
        x_adv=state.x_adv,
        robust=state.robust,
        nonfinite=torch.zeros_like(state.robust),
        parameters=parameters,
        details={"images": len(x), "right_after": state.counts, "warnings": state.warnings},
        concluded=_concluded,
        resumed=resumed,
    )


def _called(attacks: Sequence[str]) -> str:
    """What the user asked for."""
    return attacks[0] if len(attacks) == 1 else "autoattack"


def _concluded(details: dict[str, Any]) -> dict[str, Any]:
    """With a warning where the attack without gradients found much."""
    images, right, warnings = details["images"], details["right_after"], details["warnings"]
    gain = right.get("fab-t", 0) - right["square"] if "square" in right else 0
    if "fab-t" in right and gain > 0.002 * images:
        told = f"the black-box Square attack broke {gain} images that the gradient attacks did not"
        warnings = [*warnings, told]
    return {"right_after": right, "warnings": warnings}


def _run(
    trial: Trial,
    guarded: _Guarded,
    package: Any,
    passes: Mapping[str, int],
    state: AttackState,
    state_file: StateFile | None,
    flags: _Flags,
) -> None:
    """Moves `state` from where it stands to the end; `passes` are those of each attack on a batch, about."""
    x, y, *_ = trial.whole
    attacks = list(passes)
    alone = len(attacks) == 1
    flags.messages += [message for message in state.warnings if message not in flags.messages]

    def save(next_attack: int, next_batch: int) -> None:
        # counted since the last time
        if guarded.not_finite:
            flags.messages.append(f"{name}: {guarded.not_finite} gradients of images were not finite")
        guarded.not_finite = 0
        state.warnings, state.attack, state.batch = list(flags.messages), next_attack, next_batch
        if state_file is not None:
            try:
                state_file.save(state)
            except CheckpointError as error:
                trial.say(f"{_called(attacks)}: goes on, but its progress could not be saved: {error}")

    saved = began = time.monotonic()
    for attack, name in enumerate(attacks[state.attack :], state.attack):
        batches = torch.nonzero(state.begun).squeeze(1).split(trial.batch_size) if bool(state.begun.any()) else ()
        work = len(batches) * passes[name]
        with trial.bar(name if alone else f"autoattack: {name}", work) as bar:
            guarded.passed = bar.advance
            for batch, chosen in enumerate(batches[state.batch :], state.batch):
                bar.set(batch * passes[name], work)
                guarded.x, guarded.y = x[chosen], y[chosen]
                # it seeds itself for every batch
                attacked = getattr(package, _PERTURBERS[name]).perturb(guarded.x, guarded.y)
                fooled = trial.decided(guarded.model(attacked)) != guarded.y
                state.robust[chosen[fooled]] = False
                state.x_adv[chosen[fooled]] = attacked[fooled]
                if state_file is not None and batch + 1 < len(batches) and time.monotonic() - saved > _SAVE_SECONDS:
                    save(attack, batch + 1)
                    saved = time.monotonic()
        state.begun = state.robust.clone()
        count, images = int(state.robust.sum()), len(x)
        state.counts[name] = count
        save(attack + 1, 0)
        saved = time.monotonic()
        seconds = time.monotonic() - began
        # of an attack alone the caller says it
        if not alone:
            right = f"{count / images:.2%} right ({count} of {images})"
            trial.say(f"autoattack: after {name} at most {right}, {seconds:.0f} s")

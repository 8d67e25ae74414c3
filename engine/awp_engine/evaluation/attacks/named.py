"""Attacks by name, and those among them that follow the gradient inside the epsilon ball."""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from awp_engine.attack import (
    Loss,
    Start,
    apgd_l1,
    cross_entropy_losses,
    margin_losses,
    pgd,
    summed_cross_entropy,
    summed_margin,
)
from awp_engine.config.errors import UserError
from awp_engine.config.model_names import in_file, is_code
from awp_engine.config.schema import did_you_mean
from awp_engine.data import Batch, Split, eval_batches
from awp_engine.evaluation.accuracy import NonfiniteGradients
from awp_engine.evaluation.attacks.libraries import find_attack
from awp_engine.files.text import first_line
from awp_engine.models.answers import NO_CLASS, predicted
from awp_engine.models.batch_norm import layer_modes
from awp_engine.models.user_code import Code, load_factory, told_in_one_line
from awp_engine.observe.bars import MakeBar, NoBar
from awp_kernels.philox import STREAM_UNIFORM, mix_seed, sample_words

Family = Literal["clean", "fgsm", "pgd", "cw", "square", "autoattack", "regional", "own"]
Shape = Literal["square", "frame", "boxes", "pixels"]
Target = Literal["targeted", "random-target", "least-likely"]
Norm = Literal["linf", "l2", "l1"]
NORMS: dict[Norm, Literal["Linf", "L2", "L1"]] = {"linf": "Linf", "l2": "L2", "l1": "L1"}
"""Norms of a ball, and what they are called in tables and by pyautoattack."""
NAMES = (
    "clean, fgsm, pgdN, cwN (cw is cw100), pgdN and cwN with -targeted, -random-target or -least-likely, square, "
    "autoattack, regional-SHAPE-PERCENT (square, frame, boxes, pixels), foolbox:NAME, torchattacks:NAME, art:NAME, "
    "or a function of your own, file.py:attack"
)
_EXAMPLES = ("clean", "fgsm", "pgd20", "cw100", "square", "autoattack", "regional-frame-28")
_CW_STEPS = 100
_RESTART = 7
_TARGET = 8
_OWN = 9
# as many as AutoAttack's targeted attacks try
_TARGETS = 9
_MANY_STEPS = 10
# fp32 rounds x + delta; nothing that is more than rounding passes
_BALL_SLACK = 1e-5
_STEPPED = re.compile(rf"(pgd|cw)([1-9][0-9]{{0,4}})(?:-({'|'.join(get_args(Target))}))?")
_REGIONAL = re.compile(rf"regional-({'|'.join(get_args(Shape))})-([1-9][0-9]?)")


_TARGET_MEANS: dict[Target, str] = {
    "targeted": f"each of the {_TARGETS} wrong classes with the largest clean logits, until one succeeds",
    "random-target": "a random wrong class, keyed by seed and image",
    "least-likely": "the wrong class with the least clean logit",
}


class EvaluationError(UserError, ValueError):
    """An evaluation that cannot be made as asked; the message is one line that says what to do."""


@dataclass(frozen=True, kw_only=True)
class NamedAttack:
    """What a name stands for.

    Attributes:
        name: as given, cw spelled out as cw100.
        family: which code runs it.
        steps: of pgd and cw.
        target: which wrong class pgd and cw climb towards; None: away from the label.
        shape, percent: the region of a regional attack, and its share of the area.
        function, code: of somebody's own attack: what it calls, and what tells it from others.
        package: of a library's attack, with its version.
    """

    name: str
    family: Family
    steps: int = 0
    target: Target | None = None
    shape: Shape | None = None
    percent: int = 0
    function: Callable[..., Any] | None = None
    code: Code | None = None
    package: str = ""

    @property
    def bounded(self) -> bool:
        """Whether it stays inside the epsilon ball; the regional attacks are bounded by their region alone."""
        return self.family != "regional"


@dataclass(frozen=True, kw_only=True)
class Threat:
    """What an attacker may do: a ball around the image, within [0, 1].

    Attributes:
        epsilon: radius, on pixels in [0, 1].
        norm: "linf", "l2" or "l1".
    """

    epsilon: Fraction
    norm: Norm


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What all attacks of an evaluation share.

    Attributes:
        model: maps images in [0, 1] to logits, on the split's device; attacks want it in eval mode, see `measuring`.
        split: the samples.
        threat: the ball.
        seed: of all noise.
        batch_size: images a batch; changes no result beyond rounding, but those of pyautoattack and of attacks of
            one's own, which draw random numbers for a batch.
        say: is told what was found, one line at a time.
        bar: makes what shows how far an attack is, from a label and the units of work.
        classes: of the data, where the model may have more logits: those of c, c + classes, ... stand for class c.
        rounding: of the largest logit: how far another order of summation may move a logit in 16 bits; 0 for fp32.
    """

    model: nn.Module
    split: Split
    threat: Threat
    seed: int
    batch_size: int
    say: Callable[[str], None] = lambda _: None
    bar: MakeBar = NoBar
    classes: int | None = None
    rounding: float = 0.0

    @functools.cached_property
    def whole(self) -> Batch:
        """All samples as one batch, of none where there are none."""
        split = self.split
        nothing = Batch(torch.empty(0, *split.shape, device=split.device), split.labels, split.ids, 0)
        return next(eval_batches(split, max(len(split), 1)), nothing)

    def within(self, epsilon: Fraction) -> Self:
        """The same in another ball."""
        return replace(self, threat=replace(self.threat, epsilon=epsilon))

    def predict(self, images: Tensor) -> Tensor:
        """Predicted classes, as `predict` gives them."""
        return predict(self.model, images, self.batch_size, self.classes)

    def decided(self, logits: Tensor) -> Tensor:
        """The predicted class of logits [N, L], int64 [N]; -1 where they are not finite."""
        return predicted(folded(logits, self.classes))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an attack did to N samples.

    Attributes:
        x_adv: fp32 [N, C, H, W], the attacked images.
        robust: bool [N], right both clean and attacked.
        nonfinite: bool [N], would be right too, but a gradient of the attack was not finite: not counted as right.
        resumed: where a saved state was gone on from; None where there was none.
        parameters: the attack's, for the receipt.
        details: what else it measured, of these images; those of parts of a split are `added`.
        concluded: of added details, what the report says.
    """

    x_adv: Tensor
    robust: Tensor
    nonfinite: Tensor
    parameters: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    concluded: Callable[[dict[str, Any]], dict[str, Any]] = lambda details: details
    resumed: dict[str, Any] | None = None

    @classmethod
    def of_batches(cls, batches: Iterable[tuple[Tensor, Tensor, Tensor]], **facts: Any) -> Self:
        """Of attacked images, which hold, and for which a gradient was not finite, batch by batch."""
        x_adv, holds, unseen = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return cls(x_adv=x_adv, robust=holds & ~unseen, nonfinite=holds & unseen, **facts)


def parse_attack(name: str) -> NamedAttack:
    """The attack that `name` stands for, such as pgd20, cw, regional-frame-28, or file.py:attack, whose code is run.

    Raises:
        EvaluationError: for any other name.
        ConfigError: code that cannot be run, or has no such function.
    """
    given = name
    if name == "cw" or name.startswith("cw-"):
        name = f"cw{_CW_STEPS}{name[2:]}"
    if name in ("clean", "fgsm", "square", "autoattack"):
        return NamedAttack(name=name, family=name)
    if match := _STEPPED.fullmatch(name):
        family: Any = match[1]
        target: Any = match[3]
        return NamedAttack(name=name, family=family, steps=int(match[2]), target=target)
    if match := _REGIONAL.fullmatch(name):
        shape: Any = match[1]
        return NamedAttack(name=name, family="regional", shape=shape, percent=int(match[2]))
    try:
        found = find_attack(name)
    except ValueError as error:
        raise EvaluationError(f"--attacks: {error}") from None
    if found is not None:
        return NamedAttack(name=name, family="own", function=found[0], package=found[1])
    if is_code(name):
        function, code = load_factory(name, "--attacks")
        return NamedAttack(name=name.rpartition("/")[2], family="own", function=function, code=code)
    # PGD-20 and pgd_20 are pgd20
    joined = re.sub(r"(pgd|cw)[^0-9a-z]", r"\1", given[:80].lower())
    joined = "autoattack" if joined == "aa" else joined
    meant = joined == "autoattack" or _STEPPED.fullmatch(joined)
    near = f"did you mean {joined}?" if meant else in_file(given) or did_you_mean(joined, _EXAMPLES, "")
    raise EvaluationError(f"--attacks: {near and near + ' '}expected {NAMES}; got {given[:80]!r}")


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients for parameters (FAB would leave some behind); both are put back afterwards."""
    required = [parameter.requires_grad for parameter in model.parameters()]
    try:
        with layer_modes(model, "eval", update_statistics=True):
            model.requires_grad_(False)
            yield
    finally:
        for parameter, needed in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(needed)


class _Connected(nn.Module):
    """A model whose gradient is 0 where it cuts the graph, so that attacks run, and go nowhere."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        if x.requires_grad and not logits.requires_grad:
            logits = logits + 0 * x.flatten(1).sum(1, keepdim=True)
        return logits


def connected(trial: Trial) -> Trial:
    """The trial; of a model that cuts the graph, its gradient as 0.

    Raises:
        EvaluationError: a part of the model has no derivative in PyTorch at all.
    """
    x = next(eval_batches(trial.split, 1)).images.requires_grad_()
    with torch.enable_grad():
        logits = trial.model(x)
        if not logits.requires_grad:
            return replace(trial, model=_Connected(trial.model))
        try:
            torch.autograd.grad(logits.sum(), x, allow_unused=True)
        except RuntimeError as error:
            reason = first_line(error)
            raise EvaluationError(
                f"the model has no gradient that an attack could follow: {reason}; detach() that part, so that the "
                "gates can look through it"
            ) from None
    return trial


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int, classes: int | None = None) -> Tensor:
    """Predicted classes, int64 [N], of fp32 images [N, C, H, W] in [0, 1]; -1 where logits are not finite."""
    # layers may not take a batch of none
    parts = images.split(batch_size) if len(images) else ()
    none = torch.empty(0, dtype=torch.int64, device=images.device)
    return torch.cat([none, *(predicted(folded(model(part), classes)) for part in parts)])


@torch.no_grad()
def in_top5(trial: Trial, images: Tensor, labels: Tensor) -> Tensor:
    """Whether a label [N] is among the five largest logits, bool [N]; not where logits are not finite."""
    found = [torch.zeros(0, dtype=torch.bool, device=images.device)]
    for part, own in zip(images.split(trial.batch_size), labels.split(trial.batch_size), strict=True):
        if len(part):
            logits = folded(trial.model(part), trial.classes)
            among = (logits.topk(5, 1).indices == own.unsqueeze(1)).any(1)
            found.append(among & (predicted(logits) != NO_CLASS))
    return torch.cat(found)


def folded(logits: Tensor, classes: int | None) -> Tensor:
    """Logits [N, k * classes] as [N, classes]: the largest of those that stand for a class; others as they are."""
    if classes is None or logits.shape[1] <= classes or logits.shape[1] % classes:
        return logits
    return logits.unflatten(1, (-1, classes)).amax(1)


def perturbation_norms(x_adv: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Norms of x_adv - x, a sample each, fp64 [N].

    L0 counts the pixels of which any channel changed, L1 sums all changes, L2 is the Euclidean norm over all values,
    Linf the largest change.
    """
    delta = (x_adv.double() - x.double()).flatten(2)  # [N, C, H * W]
    return {
        "L0": (delta != 0).any(1).sum(1).double(),
        "L1": delta.abs().sum((1, 2)),
        "L2": torch.linalg.vector_norm(delta.flatten(1), dim=1),
        "Linf": delta.abs().amax((1, 2)),
    }


def in_ball(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """Which images lie in the ball around x, to fp32 rounding, and in [0, 1]: bool [N]; NaN lies nowhere."""
    distance = perturbation_norms(x_adv, x)[NORMS[threat.norm]]
    near = distance <= float(threat.epsilon) * (1 + _BALL_SLACK) + _BALL_SLACK / 100
    return near & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)


def _targets(trial: Trial, attack: NamedAttack, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    """Wrong classes to climb towards, one after the other: int64 [T, N]."""
    with torch.no_grad():
        logits = folded(trial.model(x), trial.classes)
    wrong = logits.scatter(1, y.unsqueeze(1), -torch.inf)
    if attack.target == "least-likely":
        return logits.scatter(1, y.unsqueeze(1), torch.inf).argmin(1).unsqueeze(0)
    if attack.target == "random-target":
        others = logits.shape[1] - 1
        words = sample_words(ids, 1, seed=mix_seed(trial.seed, _TARGET), stream=STREAM_UNIFORM).squeeze(1)
        chosen = words.long() * others >> 32
        # the label itself is left out
        return (chosen + (chosen >= y)).unsqueeze(0)
    return wrong.topk(min(_TARGETS, logits.shape[1] - 1), 1).indices.T


def _margin_towards(target: Tensor) -> Loss:
    """What climbs to a class [N]: its logit less the label's, [N]."""

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        reached, right = logits.gather(1, torch.stack([target, labels], 1)).unbind(1)
        return reached - right

    return losses


def _summed(losses: Loss) -> Loss:
    return lambda logits, labels: losses(logits, labels).sum()


def ascend(trial: Trial, *, steps: int, losses: Loss) -> Tensor:
    """Images [N, C, H, W] that climb `losses` [N], by PGD in the trial's ball (L1: Auto-PGD), from a random start.

    Four times the steps that it takes to cross the ball. A gradient that is not finite moves nothing.
    """
    epsilon = float(trial.threat.epsilon)
    done = []
    with trial.bar("adapted attack", len(trial.split) * steps) as bar:
        for x, y, ids, _ in eval_batches(trial.split, trial.batch_size):
            noise: dict[str, Any] = {"sample_ids": ids, "seed": trial.seed}
            noise["observe"] = lambda step, gradient: bar.advance(len(gradient))
            if trial.threat.norm == "l1":
                done.append(apgd_l1(trial.model, x, y, epsilon=epsilon, steps=steps, losses=losses, **noise))
                continue
            length, norm = 4 * epsilon / steps, trial.threat.norm

            more: dict[str, Any] = {"steps": steps, "norm": norm, "loss": _summed(losses), "nonfinite": "ignore"}
            done.append(pgd(trial.model, x, y, epsilon=epsilon, step_size=length, **more, **noise))
    return torch.cat(done)


def gradient_attack(trial: Trial, attack: NamedAttack, *, step_size: Fraction, restarts: int) -> Outcome:
    """Runs clean, fgsm, pgd or cw on a split; a sample's noise depends on the seed and its id alone.

    Restart 0 starts where the training's own evaluation does; the others are spent on images that still hold, and so
    are the targets of a targeted attack but for the first. An image holds if its last iterate is classified right in
    every restart and for every target, by gradients that are finite: where they are not, the steps go nowhere.

    In the L1 ball pgd and cw are Auto-PGD for L1, which chooses its own steps.

    Args:
        trial: what is attacked.
        attack: of one of these four families.
        step_size: length of a step of pgd and cw, in epsilon's units; fgsm takes one of epsilon from the image itself.
        restarts: of pgd and cw, at least 1.

    Raises:
        EvaluationError: fgsm in the L1 ball.
    """
    epsilon, steps = trial.threat.epsilon, attack.steps
    start: Start = "uniform"
    if attack.family == "fgsm":
        require_norm(attack, trial.threat)
        steps, step_size, start, restarts = 1, epsilon, "none", 1
    elif attack.family == "clean":
        epsilon, step_size, start, restarts = Fraction(0), Fraction(0), "none", 1
    done, reached = [], 0
    work = len(trial.split) * steps * restarts * (_TARGETS if attack.target == "targeted" else 1)
    with trial.bar(attack.name, work) as bar:
        for x, y, ids, _ in eval_batches(trial.split, trial.batch_size):
            x_adv = x.clone()
            holds, nonfinite = trial.predict(x) == y, torch.zeros_like(y, dtype=torch.bool)
            right = holds.clone()
            targets = [None] if attack.target is None else list(_targets(trial, attack, x, y, ids))
            tries = [(restart, target) for restart in range(restarts if steps else 0) for target in targets]
            for number, (restart, target) in enumerate(tries):
                left = torch.arange(len(x), device=x.device) if number == 0 else torch.nonzero(holds).squeeze(1)
                if not len(left):
                    break
                gradients = NonfiniteGradients(left)

                def observe(step: int, gradient: Tensor, gradients: NonfiniteGradients = gradients) -> None:
                    gradients(step, gradient)
                    bar.advance(len(gradient))

                seed = trial.seed if restart == 0 else mix_seed(trial.seed, _RESTART, restart)
                goal = None if target is None else target[left]
                noise = {"sample_ids": ids[left], "seed": seed, "observe": observe}
                if trial.threat.norm == "l1" and epsilon:
                    moved = _in_l1(trial, attack, x[left], y[left], goal, **noise)
                else:
                    labels, length, loss = y[left], float(step_size), summed_cross_entropy
                    if attack.family == "cw":
                        loss = summed_margin if goal is None else _summed(_margin_towards(goal))
                    elif goal is not None:
                        # downhill on the target's cross-entropy
                        labels, length = goal, -length
                    moved = pgd(
                        trial.model,
                        x[left],
                        labels,
                        nonfinite="ignore",
                        epsilon=float(epsilon),
                        step_size=length,
                        steps=steps,
                        norm="linf" if trial.threat.norm == "linf" else "l2",
                        start=start,
                        loss=loss,
                        **noise,
                    )
                x_adv[left] = moved
                nonfinite[left] |= gradients.found
                after = trial.predict(moved)
                holds[left] &= after == y[left]
                if goal is not None:
                    reached += int(((after == goal) & right[left]).sum())
            done.append((x_adv, holds, nonfinite))
            # those that fell were not tried again
            bar.set(work * sum(len(part) for part, *_ in done) // len(trial.split), work)
    details: dict[str, Any] = {}
    if attack.target not in (None, "targeted"):
        details["target_reached"] = reached
    # a run's own config.json may say any step, and it comes with the run; a few steps are weak by name
    if trial.threat.norm != "l1" and steps >= _MANY_STEPS and steps * step_size < epsilon:
        details["warnings"] = [
            f"{steps} steps of {step_size} cannot cross a ball of radius {epsilon}: give --step-size"
        ]
    parameters = {
        "loss": "margin of logits (CW)" if attack.family == "cw" else "cross-entropy",
        "steps": steps,
        "step_size": "chosen by Auto-PGD for L1" if trial.threat.norm == "l1" else str(step_size),
        "start": "normal, projected" if trial.threat.norm == "l1" else start,
        "restarts": restarts,
        **({} if attack.target is None else {"target": _TARGET_MEANS[attack.target]}),
    }
    return Outcome.of_batches(done, parameters={} if attack.family == "clean" else parameters, details=details)


def _in_l1(trial: Trial, attack: NamedAttack, x: Tensor, y: Tensor, goal: Tensor | None, **noise: Any) -> Tensor:
    """The same in the L1 ball, by Auto-PGD."""

    def towards(logits: Tensor, labels: Tensor) -> Tensor:
        return -cross_entropy_losses(logits, labels if goal is None else goal)

    if attack.family == "cw":
        losses = margin_losses if goal is None else _margin_towards(goal)
    else:
        losses = cross_entropy_losses if goal is None else towards
    return apgd_l1(trial.model, x, y, epsilon=float(trial.threat.epsilon), steps=attack.steps, losses=losses, **noise)


def require_norm(attack: NamedAttack, threat: Threat) -> None:
    """Raises `EvaluationError` for an attack that there is not in this norm."""
    if threat.norm == "l1" and attack.family == "fgsm":
        raise EvaluationError("--attacks: fgsm has no L1 version here; use pgdN, cwN, square or autoattack")


def _by_library(trial: Trial, attack: NamedAttack, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """What a library's attack finds in the ball for the images that are right without it, and how much lies outside.

    Some attacks look for the nearest image of another class, however far that is.
    """
    assert attack.function is not None
    right = trial.predict(x) == y
    if not right.any():
        return x, 0
    tried = x[right]
    threat = trial.threat
    found = attack.function(trial.model, tried.clone(), y[right], epsilon=float(threat.epsilon), norm=threat.norm)
    if not isinstance(found, Tensor) or found.shape != tried.shape:
        return found, 0
    found = found.detach().to(tried)
    near = in_ball(found, tried, threat)
    x_adv = x.clone()
    x_adv[right] = torch.where(near.view(-1, 1, 1, 1), found, tried)
    return x_adv, int((~near).sum())


def own_attack(trial: Trial, attack: NamedAttack) -> Outcome:
    """Runs somebody's own attack, `function(model, images, labels)`, batch by batch.

    It is given those of epsilon, norm and seed that its signature names, and torch's global generator is seeded anew
    for every batch. What it returns is judged as that of all attacks: the ball is checked by others.

    Raises:
        ConfigError: it raises an error.
        EvaluationError: it returns no images of the same shape.
    """
    assert attack.function is not None
    known = {"epsilon": float(trial.threat.epsilon), "norm": trial.threat.norm, "seed": trial.seed}
    given = {name: known[name] for name in known.keys() & inspect.signature(attack.function).parameters.keys()}
    done, outside = [], 0
    with trial.bar(attack.name, len(trial.split)) as bar, torch.random.fork_rng(), torch.enable_grad():
        for number, (x, y, *_) in enumerate(eval_batches(trial.split, trial.batch_size)):
            torch.manual_seed(mix_seed(trial.seed, _OWN, number))
            # one that ends by model.train() would spoil all that comes after it
            with layer_modes(trial.model, "eval"), told_in_one_line(attack.name, "the attack", "--attacks"):
                if attack.package:
                    x_adv, far = _by_library(trial, attack, x, y)
                    outside += far
                else:
                    x_adv = attack.function(trial.model, x.clone(), y.clone(), **given)
            if not isinstance(x_adv, Tensor) or x_adv.shape != x.shape:
                got = list(x_adv.shape) if isinstance(x_adv, Tensor) else type(x_adv).__name__
                raise EvaluationError(
                    f"--attacks: {attack.name} returned {got}; expected attacked images {list(x.shape)}"
                )
            x_adv = x_adv.detach().to(x)
            holds = (trial.predict(x) == y) & (trial.predict(x_adv) == y)
            done.append((x_adv, holds, torch.zeros_like(holds)))
            bar.advance(len(x))
    if attack.code is None:
        parameters = {"package": attack.package, **given}
        return Outcome.of_batches(done, parameters=parameters, details={"outside": outside})
    parameters = {"code": {"file": Path(attack.code.file).name, "sha256": attack.code.sha256}, **given}
    return Outcome.of_batches(done, parameters=parameters)

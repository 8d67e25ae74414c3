"""Attacks by name, and those among them that follow the gradient inside the epsilon ball."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from awp_engine.attack import Start, pgd, summed_cross_entropy, summed_margin
from awp_engine.data import Batch, Split, eval_batches
from awp_engine.evaluation.accuracy import BlindImages
from awp_engine.models.answers import predicted
from awp_engine.models.batch_norm import layer_modes
from awp_kernels.philox import mix_seed

Family = Literal["clean", "fgsm", "pgd", "cw", "square", "autoattack", "regional"]
Shape = Literal["square", "frame", "boxes", "pixels"]
NAMES = (
    "clean, fgsm, pgdN, cwN (cw is cw100), square, autoattack, regional-SHAPE-PERCENT (square, frame, boxes, pixels)"
)
_CW_STEPS = 100
_RESTART = 7
_MANY_STEPS = 10
# fp32 rounds x + delta; nothing that is more than rounding passes
_BALL_SLACK = 1e-5
_STEPPED = re.compile(r"(pgd|cw)([1-9][0-9]{0,4})")
_REGIONAL = re.compile(rf"regional-({'|'.join(get_args(Shape))})-([1-9][0-9]?)")


class EvaluationError(ValueError):
    """An evaluation that cannot be made as asked; the message is one line that says what to do."""


@dataclass(frozen=True, kw_only=True)
class NamedAttack:
    """What a name stands for.

    Attributes:
        name: as given, cw spelled out as cw100.
        family: which code runs it.
        steps: of pgd and cw.
        shape, percent: the region of a regional attack, and its share of the area.
    """

    name: str
    family: Family
    steps: int = 0
    shape: Shape | None = None
    percent: int = 0

    @property
    def bounded(self) -> bool:
        """Whether it stays inside the epsilon ball; the regional attacks are bounded by their region alone."""
        return self.family != "regional"


@dataclass(frozen=True, kw_only=True)
class Threat:
    """What an attacker may do: a ball around the image, within [0, 1].

    Attributes:
        epsilon: radius, on pixels in [0, 1].
        norm: "linf" or "l2".
    """

    epsilon: Fraction
    norm: Literal["linf", "l2"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What all attacks of an evaluation share.

    Attributes:
        model: maps images in [0, 1] to logits, on the split's device; attacks want it in eval mode, see `measuring`.
        split: the samples.
        threat: the ball.
        seed: of all noise.
        batch_size: images a batch; changes no result beyond rounding, but those of pyautoattack, which draws random
            numbers for a batch.
        say: is told how far it is, one line at a time.
    """

    model: nn.Module
    split: Split
    threat: Threat
    seed: int
    batch_size: int
    say: Callable[[str], None] = lambda _: None

    @functools.cached_property
    def whole(self) -> Batch:
        """All samples as one batch."""
        return next(eval_batches(self.split, len(self.split)))

    def within(self, epsilon: Fraction) -> Self:
        """The same in another ball."""
        return replace(self, threat=replace(self.threat, epsilon=epsilon))

    def predict(self, images: Tensor) -> Tensor:
        """Predicted classes, as `predict` gives them."""
        return predict(self.model, images, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an attack did to N samples.

    Attributes:
        x_adv: fp32 [N, C, H, W], the attacked images.
        held: bool [N], right both clean and attacked.
        blind: bool [N], would be right too, but a gradient of the attack was not finite: not counted as right.
        resumed: where a saved state was gone on from; None where there was none.
        parameters: the attack's, for the receipt.
        details: what else it measured.
    """

    x_adv: Tensor
    held: Tensor
    blind: Tensor
    parameters: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    resumed: dict[str, Any] | None = None

    @classmethod
    def of_batches(cls, batches: Iterable[tuple[Tensor, Tensor, Tensor]], **facts: dict[str, Any]) -> Self:
        """Of attacked images, which hold, and for which a gradient was not finite, batch by batch."""
        x_adv, holds, unseen = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return cls(x_adv=x_adv, held=holds & ~unseen, blind=holds & unseen, **facts)


def parse_attack(name: str) -> NamedAttack:
    """The attack that `name` stands for, such as pgd20, cw, or regional-frame-28.

    Raises:
        EvaluationError: for any other name.
    """
    if name == "cw":
        name = f"cw{_CW_STEPS}"
    if name in ("clean", "fgsm", "square", "autoattack"):
        return NamedAttack(name=name, family=name)
    if match := _STEPPED.fullmatch(name):
        return NamedAttack(name=name, family="pgd" if match[1] == "pgd" else "cw", steps=int(match[2]))
    if match := _REGIONAL.fullmatch(name):
        shape: Any = match[1]
        return NamedAttack(name=name, family="regional", shape=shape, percent=int(match[2]))
    raise EvaluationError(f"--attacks: expected {NAMES}; got {name[:80]!r}")


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


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Predicted classes, int64 [N], of fp32 images [N, C, H, W] in [0, 1]; -1 where logits are not finite."""
    return torch.cat([predicted(model(part)) for part in images.split(batch_size)])


def perturbation_norms(x_adv: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Norms of x_adv - x, a sample each, fp64 [N].

    L0 counts the pixels of which any channel changed, L2 is the Euclidean norm over all values, Linf the largest
    change.
    """
    delta = (x_adv.double() - x.double()).flatten(2)  # [N, C, H * W]
    return {
        "L0": (delta != 0).any(1).sum(1).double(),
        "L2": torch.linalg.vector_norm(delta.flatten(1), dim=1),
        "Linf": delta.abs().amax((1, 2)),
    }


def in_ball(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """Which images lie in the ball around x, to fp32 rounding, and in [0, 1]: bool [N]; NaN lies nowhere."""
    distance = perturbation_norms(x_adv, x)["Linf" if threat.norm == "linf" else "L2"]
    near = distance <= float(threat.epsilon) * (1 + _BALL_SLACK) + _BALL_SLACK / 100
    return near & ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(1)


def gradient_attack(trial: Trial, attack: NamedAttack, *, step_size: Fraction, restarts: int) -> Outcome:
    """Runs clean, fgsm, pgd or cw on a split; a sample's noise depends on the seed and its id alone.

    Restart 0 starts where the training's own evaluation does; the others are spent on images that still hold. An image
    holds if its last iterate is classified right in every restart, by gradients that are finite: where they are not,
    the steps go nowhere.

    Args:
        trial: what is attacked.
        attack: of one of these four families.
        step_size: length of a step of pgd and cw, in epsilon's units; fgsm takes one of epsilon from the image itself.
        restarts: of pgd and cw, at least 1.
    """
    epsilon, steps = trial.threat.epsilon, attack.steps
    start: Start = "uniform"
    if attack.family == "fgsm":
        steps, step_size, start, restarts = 1, epsilon, "none", 1
    elif attack.family == "clean":
        epsilon, step_size, start, restarts = Fraction(0), Fraction(0), "none", 1
    loss = summed_margin if attack.family == "cw" else summed_cross_entropy
    done = []
    for x, y, ids, _ in eval_batches(trial.split, trial.batch_size):
        x_adv = x.clone()
        holds, blind = trial.predict(x) == y, torch.zeros_like(y, dtype=torch.bool)
        for restart in range(restarts if steps else 0):
            left = torch.arange(len(x), device=x.device) if restart == 0 else torch.nonzero(holds).squeeze(1)
            if not len(left):
                break
            gradients = BlindImages(left)
            moved = pgd(
                trial.model,
                x[left],
                y[left],
                nonfinite="ignore",
                epsilon=float(epsilon),
                step_size=float(step_size),
                steps=steps,
                norm=trial.threat.norm,
                start=start,
                sample_ids=ids[left],
                seed=trial.seed if restart == 0 else mix_seed(trial.seed, _RESTART, restart),
                loss=loss,
                observe=gradients,
            )
            x_adv[left] = moved
            blind[left] |= gradients.found
            holds[left] &= trial.predict(moved) == y[left]
        done.append((x_adv, holds, blind))
    details: dict[str, Any] = {}
    # a run's own config.json may say any step, and it comes with the run; a few steps are weak by name
    if steps >= _MANY_STEPS and steps * step_size < epsilon:
        details["warnings"] = [
            f"{steps} steps of {step_size} cannot cross a ball of radius {epsilon}: give --step-size"
        ]
    parameters = {
        "loss": "margin of logits (CW)" if attack.family == "cw" else "cross-entropy",
        "steps": steps,
        "step_size": str(step_size),
        "start": start,
        "restarts": restarts,
    }
    return Outcome.of_batches(done, parameters={} if attack.family == "clean" else parameters, details=details)

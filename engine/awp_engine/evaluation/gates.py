"""Checks that a robust accuracy can be believed.

Source: Carlini et al.: On Evaluating Adversarial Robustness, 2019; Athalye, Carlini, Wagner: Obfuscated Gradients
Give a False Sense of Security, ICML 2018.
"""

import itertools
import math
from dataclasses import dataclass, replace
from fractions import Fraction

import torch

from awp_engine.attack import summed_cross_entropy
from awp_engine.data import eval_batches
from awp_engine.evaluation.attacks import Trial, gradient_attack, parse_attack
from awp_engine.evaluation.autoattack import Budget, autoattack
from awp_engine.models.answers import NO_CLASS, predicted

QUERIES = 500
STEPS = (1, 5, 20, 100)
_WHITE_BOX = 100
_RESTARTS = 5
_EPSILON_STEPS = "pgd40"
# a few images of a subset may go either way
_NEARLY_NONE = Fraction(2, 100)
_SLACK = Fraction(1, 100)
# of the largest logit, as in AutoAttack's own check for randomised models
_REPEATED = 1e-4
_WITHOUT_EPSILON = {"linf": Fraction(8, 255), "l2": Fraction(1, 2)}


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One check: what was measured, what was expected, and what a failure means."""

    name: str
    measured: str
    bound: str
    passed: bool
    failure_means: str


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """All checks, and the curves that they were read from.

    Attributes:
        gates: in order.
        images: how many they ran on.
        epsilon_curve: (epsilon, images right), from 0 to a ball that holds every image.
        steps_curve: (steps of PGD, images right) at the evaluation's epsilon.
        epsilon: that epsilon; a stand-in where the evaluation has 0.
    """

    gates: tuple[Gate, ...]
    images: int
    epsilon_curve: tuple[tuple[Fraction, int], ...]
    steps_curve: tuple[tuple[int, int], ...]
    epsilon: Fraction


def _radii(epsilon: Fraction, norm: str, values: int) -> list[Fraction]:
    # beyond this radius every image of [0, 1] can be made into every other
    everything = Fraction(1) if norm == "linf" else Fraction(math.isqrt(values - 1) + 1)
    inner = [epsilon * factor for factor in (Fraction(0), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4))]
    return [*(radius for radius in inner if radius < everything), everything]


def _percent(count: int, images: int) -> str:
    return f"{count / images:.1%}"


def _gradients(trial: Trial) -> tuple[int, int, float]:
    """Images without any gradient, images with one that is not finite, and the share of zeros among all values."""
    missing, not_finite, zeros = 0, 0, 0
    for x, y, *_ in eval_batches(trial.split, trial.batch_size):
        x.requires_grad_()
        with torch.enable_grad():
            logits = trial.model(x)
            output = summed_cross_entropy(logits, y)
            # a model that cuts the graph has no gradient at all
            gradient = torch.autograd.grad(output, x)[0] if output.requires_grad else torch.zeros_like(x)
        zero, finite = (gradient == 0).flatten(1), gradient.isfinite().flatten(1).all(1)
        missing += int(zero.all(1).sum())
        # logits that are not finite are wrong already
        not_finite += int((~finite & (predicted(logits) != NO_CLASS)).sum())
        zeros += int(zero.sum())
    return missing, not_finite, zeros / trial.split.images.numel()


@torch.no_grad()
def _differing_answers(trial: Trial) -> int:
    """Images whose logits are not the same twice, but for what a GPU's order of summation may do."""
    differing = 0
    for x, *_ in eval_batches(trial.split, trial.batch_size):
        once, again = trial.model(x), trial.model(x)
        same = (once == again) | (once.isnan() & again.isnan())
        allowed = (once - again).abs() <= _REPEATED * once.abs().amax(1, keepdim=True)
        differing += int((~(same | allowed)).any(1).sum())
    return differing


def run_gates(trial: Trial, *, queries: int = QUERIES) -> GateReport:
    """Runs the six checks on a small split. Each fails, rather than passes, on what is not a number.

    Args:
        trial: a few hundred samples, and the evaluation's ball; where epsilon is 0, 8/255 (l2: 1/2) stands in for it.
        queries: of the black-box attack.

    Raises:
        EvaluationError: pyautoattack, which the black-box attack is from, is missing.
    """
    images = len(trial.split)
    epsilon = trial.threat.epsilon or _WITHOUT_EPSILON[trial.threat.norm]
    slack = math.floor(_SLACK * images)

    def right(attack: str, radius: Fraction, step_size: Fraction, restarts: int = 1) -> torch.Tensor:
        ball = trial.within(radius)
        return gradient_attack(ball, parse_attack(attack), step_size=step_size, restarts=restarts).held

    trial.say(f"gates: accuracy against epsilon, on {images} images")
    radii = _radii(epsilon, trial.threat.norm, trial.split.images[0].numel())
    held_at = {radius: right(_EPSILON_STEPS, radius, radius / 10) for radius in radii}
    epsilon_curve = tuple((radius, int(held.sum())) for radius, held in held_at.items())
    trial.say("gates: accuracy against steps")
    held_after = {steps: right(f"pgd{steps}", epsilon, epsilon / 4) for steps in STEPS}
    steps_curve = tuple((steps, int(held.sum())) for steps, held in held_after.items())
    # with restarts, as Square tries many starts as well; they run on what still holds
    held_white = held_after[_WHITE_BOX]
    for name in (f"pgd{_WHITE_BOX}", f"cw{_WHITE_BOX}"):
        held_white = held_white & right(name, epsilon, epsilon / 10, restarts=_RESTARTS)
    white = int(held_white.sum())
    trial.say(f"gates: Square with {queries} queries")
    quiet = replace(trial.within(epsilon), say=lambda _: None)
    black = int(autoattack(quiet, attacks=("square",), budget=Budget(queries=queries)).held.sum())
    clean = trial.predict(trial.whole.images) == trial.whole.labels
    differing = int((clean != held_at[Fraction(0)]).sum())
    rises = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(steps_curve)]
    missing, not_finite, zeros = _gradients(trial)
    varying = _differing_answers(trial)
    gates = (
        Gate(
            name="accuracy falls as epsilon grows",
            measured=f"{_percent(epsilon_curve[-1][1], images)} right at epsilon {radii[-1]}",
            bound=f"at most {float(_NEARLY_NONE):.0%}",
            passed=epsilon_curve[-1][1] <= _NEARLY_NONE * images,
            failure_means="the attack cannot find what must be there: gradients are masked, or the attack is broken",
        ),
        Gate(
            name="more steps do not help the defender",
            measured=", ".join(f"{steps}: {_percent(count, images)}" for steps, count in steps_curve),
            bound=f"no rise of more than {slack} of {images} images from one to the next",
            passed=max(rises) <= slack,
            failure_means="the loss surface misleads the attack; a stronger or adaptive one would find more",
        ),
        Gate(
            name="black-box does not beat white-box",
            measured=f"Square {_percent(black, images)} right, "
            f"PGD-{_WHITE_BOX} and CW-{_WHITE_BOX} {_percent(white, images)}",
            bound=f"Square not below them by more than {slack} of {images} images",
            passed=black >= white - slack,
            failure_means="gradients point nowhere useful: accuracy under gradient attacks says too much",
        ),
        Gate(
            name="epsilon 0 is clean accuracy",
            measured=f"{differing} of {images} images differ",
            bound="none",
            passed=differing == 0,
            failure_means="attack and clean evaluation do not see the same model or images",
        ),
        Gate(
            name="gradients are not masked",
            measured=f"{_percent(missing, images)} of images without gradient, "
            f"{zeros:.1%} of values zero, {not_finite} images with values that are not finite",
            bound=f"at most {float(_SLACK):.0%} of images, half of the values; all values finite",
            passed=missing <= slack and zeros <= 0.5 and not_finite == 0,
            failure_means="a step of the model has no gradient, or one that is not finite, or its logits saturate the "
            "loss",
        ),
        Gate(
            name="the model answers alike twice",
            measured=f"{varying} of {images} images with other logits",
            bound=f"none, to {_REPEATED:g} of the largest logit",
            passed=varying == 0,
            failure_means="the model is random, dropout that is left on for one: attacks must average over its answers",
        ),
    )
    return GateReport(gates=gates, images=images, epsilon_curve=epsilon_curve, steps_curve=steps_curve, epsilon=epsilon)

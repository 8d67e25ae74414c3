"""Checks that a robust accuracy can be believed.

Source: Carlini et al.: On Evaluating Adversarial Robustness, 2019; Athalye, Carlini, Wagner: Obfuscated Gradients
Give a False Sense of Security, ICML 2018.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch

from awp_engine.attack import summed_cross_entropy
from awp_engine.data import eval_batches
from awp_engine.evaluation.attacks.autoattack import Budget, autoattack
from awp_engine.evaluation.attacks.named import Outcome, Trial, connected, gradient_attack, parse_attack
from awp_engine.evaluation.gates.adaptive import EOT_DRAWS, adaptive_gates
from awp_engine.evaluation.gates.gate import SLACK, Gate, share, slack
from awp_engine.models.answers import NO_CLASS, predicted
from awp_engine.observe.bars import Part

QUERIES = 500
STEPS = (1, 5, 20, 100)
_WHITE_BOX = 100
_RESTARTS = 5
_EPSILON_STEPS = "pgd40"
# a few images of a subset may go either way
_NEARLY_NONE = Fraction(2, 100)
_WITHOUT_EPSILON = {"linf": Fraction(8, 255), "l2": Fraction(1, 2), "l1": Fraction(12)}


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """All checks, and the curves that they were read from.

    Attributes:
        gates: in order.
        images: how many they ran on.
        epsilon_curve: (epsilon, images right), from 0 to a ball that holds every image.
        steps_curve: (steps of PGD, images right) at the evaluation's epsilon.
        epsilon: that epsilon; a stand-in where the evaluation has 0.
        adaptive: what the gates for random, hidden and dummy parts measured, as JSON holds it.
    """

    gates: tuple[Gate, ...]
    images: int
    epsilon_curve: tuple[tuple[Fraction, int], ...]
    steps_curve: tuple[tuple[int, int], ...]
    epsilon: Fraction
    adaptive: Mapping[str, Any]

    @property
    def words(self) -> str:
        """How many passed."""
        passed = sum(gate.passed for gate in self.gates)
        return f"checks of the evaluation: {passed} of {len(self.gates)} passed, on {self.images} images"


def _radii(epsilon: Fraction, norm: str, values: int) -> list[Fraction]:
    # beyond this radius every image of [0, 1] can be made into every other
    everything = Fraction({"linf": 1, "l2": math.isqrt(values - 1) + 1, "l1": values}[norm])
    inner = [epsilon * factor for factor in (Fraction(0), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4))]
    return [*(radius for radius in inner if radius < everything), everything]


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


def run_gates(trial: Trial, *, queries: int = QUERIES, eot_draws: Sequence[int] = EOT_DRAWS) -> GateReport:
    """Runs the eight checks on a small split. Each fails, rather than passes, on what is not a number.

    Args:
        trial: a few hundred samples, and the evaluation's ball; where epsilon is 0, 8/255 (l2: 1/2, l1: 12) stands in
            for it.
        queries: of the black-box attack.
        eot_draws: over how many draws the gradient of a random model is averaged, one attack for each.

    Raises:
        EvaluationError: pyautoattack, which the black-box attack is from, is missing.
    """
    trial, images = connected(trial), len(trial.split)
    epsilon = trial.threat.epsilon or _WITHOUT_EPSILON[trial.threat.norm]
    radii = _radii(epsilon, trial.threat.norm, trial.split.images[0].numel())
    curves = len(radii) * parse_attack(_EPSILON_STEPS).steps + sum(STEPS)
    work = images * (curves + 2 * _RESTARTS * _WHITE_BOX) + math.ceil(images / trial.batch_size) * queries
    with trial.bar("gates", work) as bar:
        quiet = replace(trial, say=lambda _: None, bar=lambda label, total: Part(bar, f"gates: {label}", total))
        return _run_gates(quiet, epsilon, radii, queries, eot_draws)


def _run_gates(
    trial: Trial, epsilon: Fraction, radii: Sequence[Fraction], queries: int, eot_draws: Sequence[int]
) -> GateReport:
    images = len(trial.split)
    allowed = slack(images)
    here = trial.within(epsilon)

    def attacked(attack: str, radius: Fraction, step_size: Fraction, restarts: int = 1) -> Outcome:
        ball = trial.within(radius)
        return gradient_attack(ball, parse_attack(attack), step_size=step_size, restarts=restarts)

    outcomes = {radius: attacked(_EPSILON_STEPS, radius, radius / 10) for radius in radii}
    robust_at = {radius: outcome.robust for radius, outcome in outcomes.items()}
    epsilon_curve = tuple((radius, int(robust.sum())) for radius, robust in robust_at.items())
    robust_after = {steps: attacked(f"pgd{steps}", epsilon, epsilon / 4).robust for steps in STEPS}
    steps_curve = tuple((steps, int(robust.sum())) for steps, robust in robust_after.items())
    # with restarts, as Square tries many starts as well; they run on what still holds
    robust_white = robust_after[_WHITE_BOX]
    for name in (f"pgd{_WHITE_BOX}", f"cw{_WHITE_BOX}"):
        robust_white = robust_white & attacked(name, epsilon, epsilon / 10, restarts=_RESTARTS).robust
    white = int(robust_white.sum())
    black = int(autoattack(here, attacks=("square",), budget=Budget(queries=queries)).robust.sum())
    clean = trial.predict(trial.whole.images) == trial.whole.labels
    differing = int((clean != robust_at[Fraction(0)]).sum())
    rises = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(steps_curve)]
    missing, not_finite, zeros = _gradients(trial)
    adapted = adaptive_gates(here, x_adv=outcomes[epsilon].x_adv, robust=robust_white, black=black, eot_draws=eot_draws)
    gates = (
        Gate(
            name="accuracy falls as epsilon grows",
            measured=f"{share(epsilon_curve[-1][1], images)} right at epsilon {radii[-1]}",
            bound=f"at most {float(_NEARLY_NONE):.0%}",
            passed=epsilon_curve[-1][1] <= _NEARLY_NONE * images,
            failure_means="the attack cannot find what must be there: gradients are masked, or the attack is broken",
        ),
        Gate(
            name="more steps do not help the defender",
            measured=", ".join(f"{steps}: {share(count, images)}" for steps, count in steps_curve),
            bound=f"no rise of more than {allowed} of {images} images from one to the next",
            passed=max(rises) <= allowed,
            failure_means="the loss surface misleads the attack; a stronger or adaptive one would find more",
        ),
        Gate(
            name="black-box does not beat white-box",
            measured=f"Square {share(black, images)} right, "
            f"PGD-{_WHITE_BOX} and CW-{_WHITE_BOX} {share(white, images)}",
            bound=f"Square not below them by more than {allowed} of {images} images",
            passed=black >= white - allowed,
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
            measured=f"{share(missing, images)} of images without gradient, "
            f"{zeros:.1%} of values zero, {not_finite} images with values that are not finite",
            bound=f"at most {float(SLACK):.0%} of images, half of the values; all values finite",
            passed=missing <= SLACK * images and zeros <= 0.5 and not_finite == 0,
            failure_means="a step of the model has no gradient, or one that is not finite, or its logits saturate the "
            "loss",
        ),
        *adapted.gates,
    )
    return GateReport(
        gates=gates,
        images=images,
        epsilon_curve=epsilon_curve,
        steps_curve=steps_curve,
        epsilon=epsilon,
        adaptive=adapted.details,
    )

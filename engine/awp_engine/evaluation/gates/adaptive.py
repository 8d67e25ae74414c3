"""Gates for what plain gradient attacks miss: random answers, hidden gradients, logits that do not decide.

Source: Athalye, Carlini, Wagner: Obfuscated Gradients Give a False Sense of Security, ICML 2018; Tramer, Carlini,
Brendel, Madry: On Adaptive Attacks to Adversarial Example Defenses, NeurIPS 2020.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.attack import Loss, cross_entropy_losses, margin_losses, starting_point, summed_margin
from awp_engine.data import eval_batches
from awp_engine.evaluation.accuracy import spread
from awp_engine.evaluation.attacks.named import Trial, ascend, folded
from awp_engine.evaluation.gates.gate import SLACK, Gate, share
from awp_engine.evaluation.gates.surrogate import surrogate
from awp_engine.files.text import first_line
from awp_kernels.philox import STREAM_UNIFORM, mix_seed, sample_words

DRAWS = 5
EOT_DRAWS = (1, 5, 20)
"""Numbers of draws that the gradient of a random model is averaged over."""
_SCORED_DRAWS = 10
_EOT_STEPS, _EOT_IMAGES = 20, 50
# between averages over the most draws: below, the gradient is still more noise than signal
_AGREEMENT = 0.5
_ADAPTED_STEPS = 40
# of the largest logit, as in AutoAttack's own check for randomised models; of a gradient, as sums on a GPU differ more
_REPEATED, _REPEATED_GRADIENT = 1e-4, 1e-2
_PROBED_IMAGES, _PROBED_VALUES, _PROBED_POINTS = 16, 16, 3
_PROBE = 21
# of the images, how many an adapted attack may break that plain ones did not
_MORE = Fraction(5, 100)
# of the values that were probed, how many may have an effect that the gradient denies
_HIDDEN = Fraction(5, 100)
# logits a class, of what is looked for inside a model
_MOST_LOGITS = 4


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """The three gates, and what they measured, as JSON holds it."""

    gates: tuple[Gate, ...]
    details: dict[str, Any]


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the margin; zeros where the model cuts the graph."""
    with torch.enable_grad():
        inputs = x.clone().requires_grad_()
        logits = model(inputs)
        if not logits.requires_grad:
            return logits, torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(summed_margin(logits, y), inputs, allow_unused=True)
    return logits.detach(), torch.zeros_like(x) if gradient is None else gradient


@torch.no_grad()
def varying(trial: Trial, x: Tensor, y: Tensor, draws: int = DRAWS) -> Tensor:
    """Which images get other logits, or another gradient, from one call to the next: bool [N].

    What a GPU's order of summation may do is allowed for. Half of the calls record a gradient, as a model may be random
    in those alone.

    Args:
        trial: the model, and its batch size.
        x: fp32 [N, C, H, W], clean or attacked.
        y: int64 [N].
        draws: calls, at least 2.
    """
    found = []
    for part, own in zip(x.split(trial.batch_size), y.split(trial.batch_size), strict=True):
        differs = torch.zeros_like(own, dtype=torch.bool)
        first, first_gradient = _gradient(trial.model, part, own)
        for draw in range(1, draws):
            logits = trial.model(part)
            if draw % 2:
                logits, gradient = _gradient(trial.model, part, own)
                # a gradient that is not finite has a gate of its own
                moved = (gradient - first_gradient).flatten(1).norm(dim=1)
                same_to = max(_REPEATED_GRADIENT, 4 * trial.rounding)
                differs |= moved > same_to * first_gradient.flatten(1).norm(dim=1)
            same = (first == logits) | (first.isnan() & logits.isnan())
            allowed = (first - logits).abs() <= max(_REPEATED, trial.rounding) * first.abs().amax(1, keepdim=True)
            differs |= ~(same | allowed).all(1)
        found.append(differs)
    return torch.cat(found)


class _Draws(nn.Module):
    """Logits of several calls, [N, draws * L]."""

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model, self.draws = model, draws

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.model(x) for _ in range(self.draws)], 1)


def eot_curve(trial: Trial, draws: Sequence[int] = EOT_DRAWS) -> list[dict[str, Any]]:
    """PGD on a random model, with gradients averaged over ever more draws (expectation over transformation).

    Every attacked image is scored over fresh draws.

    Args:
        trial: the images and the ball.
        draws: over how many the gradient is averaged, one attack each.

    Returns:
        For each of `draws`: `mean`, the images right in a draw on average, and `worst`, those right in all of them.
    """
    curve = []
    x, y, *_ = trial.whole
    clean = _scores(trial, x, y)
    for number in draws:

        def losses(logits: Tensor, labels: Tensor, number: int = number) -> Tensor:
            each = logits.unflatten(1, (number, -1)).flatten(0, 1)
            drawn = F.cross_entropy(each.float(), labels.repeat_interleave(number), reduction="none")
            return drawn.unflatten(0, (-1, number)).mean(1)

        # as much at once as one draw of a batch
        smaller = replace(
            trial, model=_Draws(trial.model, number), batch_size=max(1, trial.batch_size // number), classes=None
        )
        scores = _scores(trial, ascend(smaller, steps=_EOT_STEPS, losses=losses), y) & clean
        curve.append({"draws": number, "mean": float(scores.double().sum(1).mean()), "worst": int(scores.all(0).sum())})
    return curve


def _agreement(trial: Trial, draws: int) -> float:
    """Mean cosine, over the images, between two averages of the margin's gradient over so many draws each."""
    cosines = []
    for x, y, *_ in eval_batches(trial.split, trial.batch_size):
        first, second = (sum(_gradient(trial.model, x, y)[1] for _ in range(draws)) for _ in range(2))
        cosines.append(F.cosine_similarity(torch.as_tensor(first).flatten(1), torch.as_tensor(second).flatten(1)))
    return float(torch.cat(cosines).double().mean())


def _scores(trial: Trial, images: Tensor, y: Tensor) -> Tensor:
    """Whether each image is right, draw by draw: bool [draws, N]."""
    return torch.stack([trial.predict(images) == y for _ in range(_SCORED_DRAWS)])


def _random_gate(trial: Trial, x_adv: Tensor, white: int, eot_draws: Sequence[int]) -> tuple[Gate, dict[str, Any]]:
    x, y, *_ = trial.whole
    images = len(y)
    count = int((varying(trial, x, y) | varying(trial, x_adv, y)).sum())
    details: dict[str, Any] = {"varying": count, "images": images, "draws": DRAWS, "eot": None}
    measured = f"{count} of {images} images with other logits or gradients in {DRAWS} calls"
    if count:
        part = replace(trial, split=spread(trial.split, _EOT_IMAGES))
        number = len(part.split)
        curve = eot_curve(part, eot_draws)
        last = curve[-1]
        flat = len(curve) > 1 and abs(curve[-2]["mean"] - last["mean"]) <= math.ceil(2 * SLACK * number)
        agreement = _agreement(part, last["draws"])
        enough = flat and agreement >= _AGREEMENT
        details["eot"] = {"images": number, "scored_draws": _SCORED_DRAWS, "curve": curve, "flat": flat}
        details["eot"] |= {"agreement": agreement, "enough": enough}
        told = ", ".join(f"{point['draws']}: {share(point['mean'], number)}" for point in curve)
        measured += (
            f"; PGD-{_EOT_STEPS} on gradients averaged over draws, on {number} images, right on average: {told}; "
            f"in each of {_SCORED_DRAWS} draws {share(last['worst'], number)}; attacks without averaging "
            f"{share(white, images)}; "
        )
        if enough:
            measured += "more draws would change little"
        else:
            measured += (
                f"more draws may break more, so average over more (--eot): the curve is {'' if flat else 'not '}"
                f"flat, and the cosine between two averages is {agreement:.2f}"
            )
    gate = Gate(
        name="the model answers alike every time",
        measured=measured,
        bound=f"none, to {max(_REPEATED, trial.rounding):g} of the largest logit",
        passed=count == 0,
        failure_means="the model is random: attacks must average over its answers (EOT), and AutoAttack's standard "
        "version does not",
    )
    return gate, details


@torch.no_grad()
def hidden_share(trial: Trial) -> tuple[int, int]:
    """Values of images whose gradient is exactly 0 though a change within the ball has an effect; and all probed.

    Probed are random values of a few images, each changed by itself, as far as Linf epsilon allows, or 8 grey levels in
    another norm. The gradient has to be 0 at the image and at random points as near: that of a ReLU or a maximum that
    is off at the image is not.
    """
    part = replace(trial, split=spread(trial.split, min(_PROBED_IMAGES, trial.batch_size)))
    x, y, ids, _ = part.whole
    length = float(trial.threat.epsilon) if trial.threat.norm == "linf" else 8 / 255
    logits, gradient = _gradient(trial.model, x, y)
    denied = gradient.flatten(1) == 0
    for number in range(_PROBED_POINTS):
        seed = mix_seed(trial.seed, _PROBE, number)
        near = starting_point(x, "uniform", epsilon=length, norm="linf", sample_ids=ids, seed=seed)
        denied &= _gradient(trial.model, near, y)[1].flatten(1) == 0
    # relative to what the answers are made of
    scale = logits.abs().amax(1).clamp_min(torch.finfo(logits.dtype).tiny)
    values = x[0].numel()
    words = sample_words(ids, _PROBED_VALUES, seed=mix_seed(trial.seed, _PROBE), stream=STREAM_UNIFORM)
    places = words.long() * values >> 32  # [N, probes]
    hidden = 0
    for place in places.T:
        moved = x.clone().flatten(1)
        old = moved.gather(1, place.unsqueeze(1))
        moved.scatter_(1, place.unsqueeze(1), torch.where(old > 0.5, old - length, old + length).clamp(0, 1))
        effect = (trial.model(moved.view_as(x)) - logits).abs().amax(1) > max(_REPEATED, trial.rounding) * scale
        hidden += int((effect & denied.gather(1, place.unsqueeze(1)).squeeze(1)).sum())
    return hidden, places.numel()


def _hidden_gate(trial: Trial, robust: Tensor, black: int) -> tuple[Gate, dict[str, Any]]:
    x, y, *_ = trial.whole
    images, white, slack = len(y), int(robust.sum()), math.ceil(_MORE * len(y))
    hidden, probed = hidden_share(trial)
    probe = slice(0, min(_PROBED_IMAGES, trial.batch_size))
    reason, bpda = None, None
    try:
        through, found = surrogate(trial.model, x[probe], y[probe])
        applies = bool(found.used or found.modules)
    except RuntimeError as error:
        # the identity does not fit what it stands for
        through, found, applies, reason = None, None, False, first_line(error)
    if through is not None and applies:
        adapted = replace(trial, model=through)
        bpda_robust = robust.clone()
        for losses in (cross_entropy_losses, margin_losses):
            bpda_robust &= trial.predict(ascend(adapted, steps=_ADAPTED_STEPS, losses=_of_classes(losses, trial))) == y
        bpda = int(bpda_robust.sum())
    names = [] if found is None else [*found.operations, *(f"no gradient through {name}" for name in found.modules)]
    if found is not None and not found.operations:
        names += [name for name in found.used if name not in ("round", "sign")]
    details = {
        "hidden": hidden,
        "probed": probed,
        "operations": [] if found is None else list(found.operations),
        "looked_through": [] if found is None else [*found.used, *found.modules],
        "bpda": bpda,
        "not_applicable": reason,
        "white_box": white,
        "square": black,
    }
    measured = f"{hidden} of {probed} probed values have an effect but no gradient"
    if names:
        measured += f"; {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    if bpda is not None:
        measured += f"; BPDA {share(bpda, images)} right, PGD and CW {share(white, images)}"
    elif hidden > _HIDDEN * probed:
        measured += f"; no part that the identity could stand for; Square {share(black, images)} right"
    gate = Gate(
        name="no part hides its gradient",
        measured=measured,
        bound=f"at most {float(_HIDDEN):.0%} of the values; BPDA breaks at most {slack} of {images} images more",
        passed=hidden <= _HIDDEN * probed and (bpda is None or bpda >= white - slack),
        failure_means="a step of the model has no derivative, or a wrong one; the lowest of these numbers is the one "
        "that counts",
    )
    return gate, details


def _of_classes(losses: Loss, trial: Trial) -> Loss:
    """Losses of the logits that decide."""
    return lambda logits, labels: losses(folded(logits, trial.classes), labels)


class _Deciding(nn.Module):
    """The logits of classes, from several for each: their largest, or their log-sum-exp.

    Args:
        model: gives logits [N, L].
        classes: how many there are.
        inner: name of a module that gives [N, k * classes]; "" for the model itself.
        how: of a class's logits to one.
    """

    def __init__(self, model: nn.Module, classes: int, inner: str, how: Literal["max", "logsumexp"]) -> None:
        super().__init__()
        self.model, self.classes, self.inner, self.how = model, classes, inner, how

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            kept.append(output)

        handle = self.model.get_submodule(self.inner).register_forward_hook(keep)
        try:
            self.model(x)
        finally:
            handle.remove()
        each = kept[-1].unflatten(1, (-1, self.classes))
        return each.amax(1) if self.how == "max" else each.logsumexp(1)


@torch.no_grad()
def _wider_inside(model: nn.Module, x: Tensor, classes: int) -> str | None:
    """The last module that gives several logits a class, where the model gives one; None if there is none."""
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if not name or isinstance(module, torch.jit.ScriptModule):
            continue

        def look(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor) and output.ndim == 2 and output.is_floating_point():
                several, rest = divmod(output.shape[1], classes)
                if rest == 0 and 2 <= several <= _MOST_LOGITS:
                    found.append(name)

        handles.append(module.register_forward_hook(look))
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found[-1] if found else None


def _dummy_gate(trial: Trial, robust: Tensor) -> tuple[Gate, dict[str, Any]]:
    x, y, *_ = trial.whole
    images, white, slack = len(y), int(robust.sum()), math.ceil(_MORE * len(y))
    with torch.no_grad():
        logits = int(trial.model(x[:1]).shape[1])
    classes = trial.classes or logits
    several = logits > classes and logits % classes == 0
    inner = "" if several else _wider_inside(trial.model, x[:1], classes) if logits == classes else None
    adapted = None
    if inner is not None:
        withstood = robust.clone()
        for how in ("max", "logsumexp"):
            deciding = replace(trial, model=_Deciding(trial.model, classes, inner, how), classes=None)
            for losses in (cross_entropy_losses, margin_losses):
                withstood &= trial.predict(ascend(deciding, steps=_ADAPTED_STEPS, losses=losses)) == y
        adapted = int(withstood.sum())
    measured = f"{logits} logits for {classes} classes"
    if inner:
        measured += f", made from {inner}, which gives several for each"
    if adapted is not None:
        measured += f"; attacks on the logits that decide {share(adapted, images)} right, PGD and CW "
        measured += share(white, images)
    gate = Gate(
        name="attacks see the logits that decide",
        measured=measured,
        bound=f"one logit a class; attacks on what decides break at most {slack} of {images} images more",
        passed=logits == classes and (adapted is None or adapted >= white - slack),
        failure_means="the class is read from other numbers than the attacks climb: dummy classes draw them aside",
    )
    details = {"logits": logits, "classes": classes, "inner": inner, "adapted": adapted, "white_box": white}
    return gate, details


def adaptive_gates(
    trial: Trial, *, x_adv: Tensor, robust: Tensor, black: int, eot_draws: Sequence[int] = EOT_DRAWS
) -> Adapted:
    """Runs the three gates; seconds where nothing is found, as they attack only what looks wrong.

    Args:
        trial: a few hundred samples, and the evaluation's ball.
        x_adv: the images as a plain attack left them, [N, C, H, W].
        robust: which withstood the plain white-box attacks, bool [N].
        black: how many withstood a black-box attack.
        eot_draws: see `eot_curve`.
    """
    device = trial.split.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # what a random model draws from, as a rule
        torch.manual_seed(trial.seed)
        randomness, random_details = _random_gate(trial, x_adv, int(robust.sum()), eot_draws)
        hidden, hidden_details = _hidden_gate(trial, robust, black)
        dummies, dummy_details = _dummy_gate(trial, robust)
    details = {"randomness": random_details, "hidden_gradients": hidden_details, "decision": dummy_details}
    return Adapted(gates=(randomness, hidden, dummies), details=details)

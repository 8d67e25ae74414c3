"""Warns of the ways in which adversarial training is known to go wrong."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

# a trained network's input gradient has next to no exact zeros; a quantised or saturated one consists of them
_ZERO_GRADIENTS = 0.25
# fewer are nothing to be told of
_SOME_ZEROS = 0.05
# after the collapse held-out accuracy is near nothing; robust overfitting, however bad, left more than a third
_COLLAPSE = 1 / 3
_JUMP = 0.05
# of accuracy by guessing, and at most so much more: one answer for every image is right on the share of that class
_GUESSING, _POINTS = 1.5, 0.05
# of accuracy by guessing, what shows that a network knew more
_KNEW = 1.5
# epochs at chance: after a fall, and where there was none, since hard tasks begin slowly
_FALLEN, _NEVER_ROSE = 2, 5
# of the loss of equal logits; saturated ones, which hide a gradient, cost far more
_EQUAL_LOGITS = 1.1
# of the same: less shows that something is learnt
_NOTHING = 0.98
# of the way from the loss at w to that of guessing
_RISE = 0.75
# of input gradients that are zero: answers are the same for every image
_CONSTANT = 0.99


def collapse(epochs: Sequence[Mapping[str, Any]], classes: int, guessing_loss: float | None = None) -> str | None:
    """A warning if the network answers alike for every image: it guesses, clean and attacked, at the loss of guessing.

    At once where the attack finds no gradient either. Else after two such epochs if the network knew more before. If it
    never did, it has not collapsed, as hard tasks begin slowly: after five, that it has learnt nothing yet.

    Args:
        epochs: a run's metrics so far, with their loss; held_out_clean_accuracy as it was last measured counts.
        classes: of the data set.
        guessing_loss: what training's loss is for equal logits; by default cross-entropy's.
    """
    guessing = min(_GUESSING / classes, 1 / classes + _POINTS)
    uniform = math.log(classes) if guessing_loss is None else guessing_loss
    # as it was known after each epoch
    measured = (epoch.get("held_out_clean_accuracy") for epoch in epochs)
    clean = list(itertools.accumulate(measured, lambda before, now: before if now is None else now))

    def stuck(epoch: Mapping[str, Any], accuracy: float | None) -> bool:
        loss, attacked = epoch.get("loss"), epoch.get("train_pgd_accuracy") or 0.0
        # NaN is no such loss either
        if accuracy is None or loss is None or not loss <= _EQUAL_LOGITS * uniform:
            return False
        # answers that hang on no pixel are right on their class's share, which may be large
        constant = (epoch.get("zero_gradients") or 0.0) >= _CONSTANT and loss >= _NOTHING * uniform
        return constant or max(attacked, accuracy) <= guessing

    def learns(epoch: Mapping[str, Any]) -> bool:
        return epoch.get("loss") is not None and epoch["loss"] < _NOTHING * uniform

    last = list(itertools.takewhile(lambda pair: stuck(*pair), zip(reversed(epochs), reversed(clean), strict=True)))
    # accuracy alone may be high by luck while nothing is learnt yet
    learnt = [accuracy for epoch, accuracy in zip(epochs, clean, strict=True) if learns(epoch)]
    knew = any(accuracy is not None and accuracy > _KNEW * guessing for accuracy in learnt)
    nothing = itertools.takewhile(lambda pair: not learns(pair[0]), last)
    for_long = len(list(nothing)) >= (_FALLEN if knew else _NEVER_ROSE)
    dead = (epochs[-1].get("zero_gradients") or 0.0) >= (_SOME_ZEROS if knew else _ZERO_GRADIENTS)
    if not last or not (for_long or dead):
        return None
    found = (
        f"without an attack {clean[-1]:.0%} of held-out images are right, no better than guessing, and the loss of "
        f"{epochs[-1]['loss']:.2f} is that of guessing, too"
    )
    if not (knew or dead):
        return (
            f"nothing is learnt yet after {epochs[-1]['epoch']} epochs: {found}; give it more --epochs, or try "
            "another --optimizer.lr, --optimizer.kind adamw or a longer --optimizer.warmup in a new --run-dir"
        )
    return (
        f"training has collapsed: {found}; start again in a new --run-dir with a smaller --optimizer.lr, --awp.gamma "
        "or --attack.epsilon, or a longer --optimizer.warmup or --awp.warmup"
    )


def gradient_masking(epoch: Mapping[str, Any]) -> str | None:
    """A warning if part of the attack's gradient is exactly zero: if it is much, the attack sees nothing to climb."""
    zeros = epoch.get("zero_gradients")
    if zeros is None or zeros < _SOME_ZEROS:
        return None
    if zeros <= _ZERO_GRADIENTS:
        return f"{zeros:.0%} of the attack's input gradients are exactly zero in epoch {epoch['epoch']}"
    return (
        f"gradient masking: {zeros:.0%} of the attack's input gradients are exactly zero, so it cannot find what is "
        "there; look for saturated losses, quantised inputs or dead units, and do not trust the robust accuracy"
    )


def nonfinite_gradients(epoch: Mapping[str, Any]) -> str | None:
    """A warning if entries of the attack's gradient were not finite: the attack leaves those pixels where they are."""
    part = epoch.get("nonfinite_gradients")
    if not part:
        return None
    return (
        f"overflow in the attack: {part:.2g} of its input gradients were not finite in epoch {epoch['epoch']}, which "
        "leaves pixels as they are; use --precision.attack bf16 or fp32, and do not trust train_pgd_accuracy"
    )


def catastrophic_overfitting(
    epochs: Sequence[Mapping[str, Any]], *, weighted: bool = False, fgsm_rs: bool = False
) -> str | None:
    """A warning if training accuracy under attack jumped while held-out PGD accuracy collapsed.

    Compares the last epoch with the best one before: held-out PGD accuracy below a third, and training accuracy under
    attack higher by 5 points. Where held-out clean accuracy fell below a third as well, the network got worse at all
    images, not at attacked ones alone, and the warning says that instead.

    Args:
        epochs: a run's metrics so far, with train_pgd_accuracy, held_out_pgd_accuracy and held_out_clean_accuracy
            where they were measured.
        weighted: whether classes have weights in the loss.
        fgsm_rs: whether the cheap attack is FGSM-RS, which N-FGSM can replace.

    Source: Wong, Rice, Kolter: Fast is better than free: Revisiting adversarial training, ICLR 2020.
    """
    names = ("train_pgd_accuracy", "held_out_pgd_accuracy")
    measured = [epoch for epoch in epochs if all(epoch.get(name) is not None for name in names)]
    if len(measured) < 2 or measured[-1] is not epochs[-1]:
        return None
    now, best = measured[-1], max(measured[:-1], key=lambda epoch: epoch["held_out_pgd_accuracy"])
    held_out, before = now["held_out_pgd_accuracy"], best["held_out_pgd_accuracy"]
    trained, trained_before = now["train_pgd_accuracy"], best["train_pgd_accuracy"]
    if held_out >= _COLLAPSE * before or trained < trained_before + _JUMP:
        return None
    clean, clean_before = now.get("held_out_clean_accuracy"), best.get("held_out_clean_accuracy")
    if clean is not None and clean_before is not None and clean < _COLLAPSE * clean_before:
        milder = ", or milder --data.class-weights" if weighted else ""
        return (
            f"training is unsteady: since epoch {best['epoch']} held-out accuracy fell from {clean_before:.0%} to "
            f"{clean:.0%} without an attack and from {before:.0%} to {held_out:.0%} under PGD; if it stays so, start "
            f"again in a new --run-dir with a smaller --optimizer.lr{milder}"
        )
    other = ", --attack.fast n-fgsm," if fgsm_rs else ""
    return (
        f"catastrophic overfitting: since epoch {best['epoch']} training accuracy under attack rose from "
        f"{trained_before:.0%} to {trained:.0%} while held-out PGD accuracy fell from {before:.0%} to {held_out:.0%}; "
        f"go back to that epoch with more attack steps{other} or a smaller epsilon"
    )


def rise(epoch: Mapping[str, Any]) -> str | None:
    """A warning if the perturbed weights know next to nothing: the descent from there teaches little."""
    part = epoch.get("awp_rise")
    if part is None or part < _RISE:
        return None
    return (
        f"the weight perturbation takes the loss {part:.0%} of the way to that of guessing in epoch {epoch['epoch']}, "
        "which leaves little to learn from; start again in a new --run-dir with a smaller --awp.gamma, or with "
        "--awp.max-rise 0.1, which makes gamma smaller by itself"
    )


def skipped_steps(epoch: Mapping[str, Any]) -> str | None:
    """A word on steps that were left out."""
    skipped = epoch.get("skipped_steps")
    if not skipped:
        return None
    return (
        f"{skipped:.0f} steps skipped in epoch {epoch['epoch']}: a gradient was not finite; weights stayed as they were"
    )


def warnings(
    epochs: Sequence[Mapping[str, Any]],
    classes: int,
    *,
    attacked: bool = True,
    weighted: bool = False,
    fgsm_rs: bool = False,
    guessing: float | None = None,
) -> list[str]:
    """All that is to be said after the last of `epochs`.

    Args:
        epochs: a run's metrics so far.
        classes: of the data set.
        attacked: whether images are attacked in training.
        weighted: whether classes have weights in the loss.
        fgsm_rs: whether the cheap attack is FGSM-RS.
        guessing: the loss of guessing, as `collapse` takes it.
    """
    last, collapsed = epochs[-1], collapse(epochs, classes, guessing)
    # without a gradient because it has learnt nothing: no masking. Said once, not after every epoch.
    repeated = collapsed is not None and len(epochs) > 1 and collapse(epochs[:-1], classes, guessing) is not None
    first = gradient_masking(last) if collapsed is None else None if repeated else collapsed
    overfitting = catastrophic_overfitting(epochs, weighted=weighted, fgsm_rs=fgsm_rs) if attacked else None
    said = [first, nonfinite_gradients(last), overfitting, rise(last), skipped_steps(last)]
    return [text for text in said if text]

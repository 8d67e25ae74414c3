"""What a step costs, for the log and for the benchmarks."""

from typing import NamedTuple

from awp_engine.config import Config
from awp_engine.config.schema import parse_arguments
from awp_engine.step.objectives.dajat import VIEWS


class _Units(NamedTuple):
    """What a method passes, in forward passes of an image.

    Attributes:
        loss: for the loss and its gradient, once in the descent and once in an exact ascent: 3 for every kind of
            images.
        told: answers of another network in the same places, without gradients of its weights.
        clean_first: whether clean images are passed once before the attack.
        asked: answers of another network once a step, for attack and loss.
        asked_each: those in each step of the attack, with their gradients.
        trained: gradients of another network, in the descent.
    """

    loss: float = 6.0
    told: float = 0.0
    clean_first: bool = False
    asked: float = 0.0
    asked_each: float = 0.0
    trained: float = 0.0


_TRADES = _Units(clean_first=True)
# of others, also of one's own, attacked and clean images once
_UNITS = {
    **dict.fromkeys(("at", "score", "e-at", "msd"), _Units(3.0)),
    **dict.fromkeys(("trades", "rst", "ikl", "gkl", "dajat", "score-trades"), _TRADES),
    "adr": _Units(3.0, asked=1.0),
    "adr-trades": _TRADES._replace(asked=1.0),
    "rebat": _Units(3.0, told=1.0),
    "ard": _Units(told=1.0),
    "rslad": _Units(asked=1.0),
    "adaad": _Units(told=1.0, asked=1.0, asked_each=2.0),
    "hat": _Units(9.0, told=1.0, clean_first=True),
    "lbgat": _Units(told=1.0, clean_first=True, trained=2.0),
}


def _of_oaat(config: Config, epoch: int) -> float:
    """What OA-AT passes in an epoch beside attacks of all steps and two kinds of images in loss and ascent."""
    steps, kl = config.attack.steps, (parse_arguments(config.method_args) or {}).get("climbs") == "kl"
    if epoch <= config.epochs // 4:
        return kl - 2.0 * (steps // 2)
    # every second batch has a third kind of images, the others features of the guide
    return kl + (0.5 * (3 + 2 * steps + 1) if 4 * epoch > 3 * config.epochs else 0.0)


def forward_units(config: Config, *, cheap: bool = False, epoch: int | None = None, other: float = 1.0) -> float:
    """What one update of a method must compute for an image, in forward passes.

    A backward pass costs one unit for the gradient of activations, and one for that of weights.

    Args:
        config: the run's.
        cheap: with the cheap attack of the first epochs: one step, or none of its own in free training.
        epoch: from 1; None: the mean over the run, where epochs differ.
        other: a forward pass of the network that the method asks or trains along, in those of the classifier.
    """
    if epoch is None:
        epochs = range(1, config.epochs + 1)
        each = [forward_units(config, cheap=cheap, epoch=number, other=other) for number in epochs]
        return sum(each) / len(each)
    stronger, steps = config.attack.stronger, config.attack.steps if config.attack.training_epsilon > 0 else 0
    if stronger is not None and epoch > stronger.after:
        steps = stronger.steps
    if cheap:
        steps = min(steps, 0 if config.attack.fast == "free" else 1)
    units = _UNITS.get(config.method, _Units())
    # Auto-PGD passes attacked images after its last step
    once_more = units.clean_first or (config.attack.kind == "apgd" and not cheap)
    arguments = parse_arguments(config.method_args) or {}
    second = config.method in ("ikl", "gkl") and arguments.get("aug_weight") is not None
    views = arguments.get("views", VIEWS) if config.method == "dajat" else 1 + second
    attack = 2.0 * steps + (1.0 if once_more and steps else 0.0)
    if config.method == "msd":
        # every step tries a point in each ball
        attack += steps * (1 + len(config.attack.also))
    if config.method == "oaat":
        attack += _of_oaat(config, epoch)
    # the average that ReBAT asks has not begun
    alone = config.method == "rebat" and epoch <= config.average.warmup
    copies, ascent, passes = config.attack.noise_samples, 0.0, 0.0
    if config.awp.enabled and config.awp.ascent == "shared":
        ascent = 1.0 / config.awp.every
    elif config.awp.enabled:
        passes = config.awp.ascent_steps / config.awp.every
        # DAJAT's climbs at the first view alone
        ascent = (1 if config.method == "dajat" else views) * units.loss * passes
    told = 0.0 if alone else units.told * (1 + passes) * copies
    others = told + units.asked + units.asked_each * steps + units.trained
    return (views * (attack + units.loss) + ascent) * copies + others * other

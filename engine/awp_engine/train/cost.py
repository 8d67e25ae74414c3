"""What a step costs, for the log and for the benchmarks."""

from typing import NamedTuple

from awp_engine.config import Config
from awp_engine.config.schema import parse_arguments


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


def forward_units(config: Config, *, cheap: bool = False, other: float = 1.0) -> float:
    """What one update of a method must compute for an image, in forward passes.

    A backward pass costs one unit for the gradient of activations, and one for that of weights.

    Args:
        config: the run's.
        cheap: with the cheap attack of the first epochs: one step, or none of its own in free training.
        other: a forward pass of the network that the method asks or trains along, in those of the classifier.
    """
    steps = config.attack.steps if config.attack.training_epsilon > 0 else 0
    if cheap:
        steps = min(steps, 0 if config.attack.fast == "free" else 1)
    units = _UNITS.get(config.method, _Units())
    # Auto-PGD passes attacked images after its last step
    once_more = units.clean_first or (config.attack.kind == "apgd" and not cheap)
    # the ascent has the first one alone
    views = (parse_arguments(config.method_args) or {}).get("views", 3) if config.method == "dajat" else 1
    attack = 2.0 * steps + (1.0 if once_more and steps else 0.0)
    if config.method == "msd":
        # every step tries a point in each ball
        attack += steps * (1 + len(config.attack.also))
    copies, ascent, passes = config.attack.noise_samples, 0.0, 0.0
    if config.awp.enabled and config.awp.ascent == "shared":
        ascent = 1.0 / config.awp.every
    elif config.awp.enabled:
        passes = config.awp.ascent_steps / config.awp.every
        ascent = units.loss * passes
    others = units.told * (1 + passes) * copies + units.asked + units.asked_each * steps + units.trained
    return (views * (attack + units.loss) + ascent) * copies + others * other

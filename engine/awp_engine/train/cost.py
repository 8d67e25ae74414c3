"""What a step costs, for the log and for the benchmarks."""

from awp_engine.config import Config
from awp_engine.config.schema import parse_arguments


def forward_units(config: Config, *, cheap: bool = False) -> float:
    """What one update of a method must compute for an image, in forward passes.

    A backward pass costs one unit for the gradient of activations, and one for that of weights.

    Args:
        config: the run's.
        cheap: with the cheap attack of the first epochs: one step, or none of its own in free training.
    """
    steps = config.attack.steps if config.attack.training_epsilon > 0 else 0
    if cheap:
        steps = min(steps, 0 if config.attack.fast == "free" else 1)
    # AT passes attacked images alone, the others clean ones as well; the average has no backward pass
    training = {"at": 3.0, "adr": 3.0, "score": 3.0, "e-at": 3.0, "msd": 3.0, "rebat": 4.0, "hat": 9.0}.get(
        config.method, 6.0
    )
    # a teacher counts as a network of the same size, and has no backward pass of its weights
    training += 1.0 if config.method in ("ard", "adaad", "hat") else 0.0
    # these pass clean images once before the attack, and Auto-PGD attacked ones after its last step
    once_more = config.method in ("trades", "rst", "ikl", "gkl", "adr-trades", "dajat", "score-trades", "hat") or (
        config.attack.kind == "apgd" and not cheap
    )
    # the ascent has the first one alone
    views = (parse_arguments(config.method_args) or {}).get("views", 3) if config.method == "dajat" else 1
    attack = 2.0 * steps + (1.0 if once_more and steps else 0.0)
    if config.method == "msd":
        # every step tries a point in each ball
        attack += steps * (1 + len(config.attack.also))
    if not config.awp.enabled:
        ascent = 0.0
    elif config.awp.ascent == "shared":
        ascent = 1.0 / config.awp.every
    else:
        ascent = training * config.awp.ascent_steps / config.awp.every
    teacher = 1.0 if config.method in ("adr", "adr-trades", "rslad", "adaad") else 0.0
    if config.method == "adaad":
        teacher += 2.0 * steps
    return (views * (attack + training) + ascent) * config.attack.noise_samples + teacher

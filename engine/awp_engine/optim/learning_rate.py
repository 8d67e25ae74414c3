"""The learning rate over a run."""

import math

from awp_engine.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, epochs: int, progress_in_epochs: float) -> float:
    """The learning rate `progress_in_epochs` (99.5: halfway through the 100th) into a run of `epochs`.

    The piecewise schedule changes at the start of an epoch only, as the paper's does (x0.1 at 100 and 150 of 200);
    one-cycle rises from 0 to lr in the first 40% and falls to 0 in the rest (Wong, Rice, Kolter, ICLR 2020). During
    warm-up the rate rises from 0 along a line; cosine and linear fall to 0 over the epochs after it.
    """
    done = min(progress_in_epochs / epochs, 1.0)
    fallen = max(progress_in_epochs - config.warmup, 0.0) / max(epochs - config.warmup, 1e-9)
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * min(fallen, 1.0)))
    elif config.schedule == "linear":
        factor = 1 - min(fallen, 1.0)
    elif config.schedule == "one-cycle":
        factor = done / 0.4 if done < 0.4 else (1 - done) / 0.6
    else:
        passed = sum(progress_in_epochs >= milestone for milestone in config.milestone_epochs(epochs))
        factor = config.drop**passed
    if progress_in_epochs < config.warmup:
        factor *= progress_in_epochs / config.warmup
    return config.lr * factor

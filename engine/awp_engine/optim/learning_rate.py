"""The learning rate over a run, and the momentum where it changes, too."""

import math

from awp_engine.config import OptimizerConfig

# of OneCycleLR: where the rate starts and ends, as parts of its top, and the momentum's ends
_FIRST, _LAST = 1 / 25, 1 / 25 / 1e4
_HIGH, _LOW = 0.95, 0.85


def learning_rate(config: OptimizerConfig, epochs: int, progress_in_epochs: float, *, steps: int = 1) -> float:
    """The learning rate `progress_in_epochs` (99.5: halfway through the 100th) into a run of `epochs` of `steps` each.

    The piecewise schedule changes at the start of an epoch only, as the paper's does (x0.1 at 100 and 150 of 200);
    one-cycle rises from 0 to lr in the first 40% and falls to 0 in the rest (Wong, Rice, Kolter, ICLR 2020). During
    warm-up the rate rises from warmup_lr along a line; cosine and linear fall to min_lr over the epochs after it.
    one-cycle-cosine is torch.optim.lr_scheduler.OneCycleLR with pct_start = warmup / epochs, stepped once a step, or
    once an epoch.
    """
    progress = _begun(config, progress_in_epochs)
    if config.schedule == "one-cycle-cosine":
        rising, part = _cycle(config, epochs, progress, steps)
        return config.lr * (_between(_FIRST, 1.0, part) if rising else _between(1.0, _LAST, part))
    done = min(progress / epochs, 1.0)
    fallen = max(progress - config.warmup, 0.0) / max(epochs - config.warmup, 1e-9)
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * min(fallen, 1.0)))
    elif config.schedule == "linear":
        factor = 1 - min(fallen, 1.0)
    elif config.schedule == "one-cycle":
        factor = done / 0.4 if done < 0.4 else (1 - done) / 0.6
    else:
        passed = sum(progress >= milestone for milestone in config.milestone_epochs(epochs))
        factor = config.drop**passed
    # of schedules that end at such a rate
    rest = config.min_lr * (1 - factor)
    if progress < config.warmup:
        factor *= progress / config.warmup
        rest = config.warmup_lr * (1 - progress / config.warmup)
    return config.lr * factor + rest


def cycled_momentum(config: OptimizerConfig, epochs: int, progress_in_epochs: float, *, steps: int) -> float | None:
    """The momentum at the same place, as OneCycleLR has it: 0.95, 0.85 at the rate's top, 0.95; None: it stays."""
    if not config.cycle_momentum:
        return None
    rising, part = _cycle(config, epochs, _begun(config, progress_in_epochs), steps)
    return _between(_HIGH, _LOW, part) if rising else _between(_LOW, _HIGH, part)


def _begun(config: OptimizerConfig, progress_in_epochs: float) -> float:
    """The place that rates are those of."""
    return math.floor(progress_in_epochs) if config.per_epoch else progress_in_epochs


def _cycle(config: OptimizerConfig, epochs: int, progress: float, steps: int) -> tuple[bool, float]:
    """Whether the rate of one-cycle-cosine still rises, and which part of that way, or of the way down, is done."""
    # its last rate is that of the last step, not of the end, and the top that of the last step of the rise
    step = 1.0 if config.per_epoch else 1.0 / steps
    top = config.warmup - step
    if progress < top:
        return True, progress / top
    return False, min((progress - top) / max(epochs - config.warmup, 1e-9), 1.0)


def _between(first: float, last: float, part: float) -> float:
    """Half a cosine from one number to another."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * part))

"""What a method climbs when it attacks the images, and what it minimises over the weights; one file a family."""

import inspect

from awp_engine.config import ConfigError
from awp_engine.config.model_names import is_code
from awp_engine.models.user_code import load_factory, told_in_one_line
from awp_engine.step.objectives.adversarial_training import AdversarialTraining
from awp_engine.step.objectives.mart import Mart
from awp_engine.step.objectives.objective import Objective
from awp_engine.step.objectives.trades import Trades

__all__ = ["AdversarialTraining", "Mart", "Objective", "Trades", "build_objective"]


def build_objective(method: str, *, beta: float = 6.0, label_smoothing: float = 0.0) -> Objective:
    """The objective of a method.

    Args:
        method: "at", "trades", "mart" or "rst" (TRADES; robust self-training differs in the images, not in the loss);
            or file.py:Class, package.module:Class: what makes an `Objective`, whose code is run. It is called with
            those of beta and label_smoothing that its signature names.
        beta: weight of the divergence in TRADES, RST and MART (whose paper calls it lambda).
        label_smoothing: part of a label spread over all classes, in [0, 1); not for MART.

    Raises:
        ValueError: unknown method, or label smoothing with MART.
        ConfigError: code that cannot be run, or makes no objective.
    """
    if is_code(method):
        return _own(method, {"beta": beta, "label_smoothing": label_smoothing})
    if method == "at":
        return AdversarialTraining(label_smoothing)
    if method in ("trades", "rst"):
        return Trades(beta, label_smoothing)
    if method == "mart":
        if label_smoothing:
            raise ValueError(
                f"label_smoothing: expected 0 for mart, whose loss needs one right class; got {label_smoothing}"
            )
        return Mart(beta)
    raise ValueError(f"method: expected at, trades, mart or rst, got {method!r}")


def _own(method: str, settings: dict[str, float]) -> Objective:
    factory, _ = load_factory(method, "--method")
    with told_in_one_line(method, "its call", "--method"):
        taken = inspect.signature(factory).parameters.keys() & settings.keys()
        made = factory(**{name: settings[name] for name in taken})
    if not isinstance(made, Objective):
        raise ConfigError(
            f"--method: {method} gives {type(made).__name__}; expected an awp_engine.step.objectives.Objective"
        )
    if settings["label_smoothing"] and "label_smoothing" not in taken:
        raise ConfigError(f"--label-smoothing: expected 0 with {method}, which takes no label_smoothing")
    return made

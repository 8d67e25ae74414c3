"""What a method climbs when it attacks the images, and what it minimises over the weights; one file a family."""

from awp_engine.step.objectives.adversarial_training import AdversarialTraining
from awp_engine.step.objectives.mart import Mart
from awp_engine.step.objectives.objective import Objective
from awp_engine.step.objectives.trades import Trades

__all__ = ["AdversarialTraining", "Mart", "Objective", "Trades", "build_objective"]


def build_objective(method: str, *, beta: float = 6.0, label_smoothing: float = 0.0) -> Objective:
    """The objective of a method.

    Args:
        method: "at", "trades", "mart" or "rst" (TRADES; robust self-training differs in the images, not in the loss).
        beta: weight of the divergence in TRADES, RST and MART (whose paper calls it lambda).
        label_smoothing: part of a label spread over all classes, in [0, 1); not for MART.

    Raises:
        ValueError: unknown method, or label smoothing with MART.
    """
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

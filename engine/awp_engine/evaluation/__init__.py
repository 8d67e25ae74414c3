"""Accuracy, clean and under attack, with the checks and receipts that make it believable."""

from awp_engine.evaluation.accuracy import (
    Accuracy,
    evaluate,
    evaluation_attack,
    evaluation_attacks,
    evaluation_seed,
    spread,
)

__all__ = ["Accuracy", "evaluate", "evaluation_attack", "evaluation_attacks", "evaluation_seed", "spread"]

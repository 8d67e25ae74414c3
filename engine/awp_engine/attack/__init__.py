"""Attacks on images: projected gradient descent, Auto-PGD, and one-step attacks."""

from awp_engine.attack.pgd import (
    Loss,
    Start,
    apgd,
    batch_norm_mode,
    cross_entropy_losses,
    fast_attack,
    halving_points,
    layer_modes,
    pgd,
    starting_point,
    summed_cross_entropy,
    summed_margin,
)

__all__ = [
    "Loss",
    "Start",
    "apgd",
    "batch_norm_mode",
    "cross_entropy_losses",
    "fast_attack",
    "halving_points",
    "layer_modes",
    "pgd",
    "starting_point",
    "summed_cross_entropy",
    "summed_margin",
]

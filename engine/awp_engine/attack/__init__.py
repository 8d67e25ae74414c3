"""Attacks on images: projected gradient descent, Auto-PGD, one-step attacks, and an attack as one value."""

from awp_engine.attack.apgd import apgd, halving_points
from awp_engine.attack.attack import Attack, fast_attack
from awp_engine.attack.common import NORMAL_START, Start, starting_point
from awp_engine.attack.losses import DivergenceFrom, Loss, cross_entropy_losses, summed_cross_entropy, summed_margin
from awp_engine.attack.pgd import pgd

__all__ = [
    "NORMAL_START",
    "Attack",
    "DivergenceFrom",
    "Loss",
    "Start",
    "apgd",
    "cross_entropy_losses",
    "fast_attack",
    "halving_points",
    "pgd",
    "starting_point",
    "summed_cross_entropy",
    "summed_margin",
]

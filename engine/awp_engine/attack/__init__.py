"""Attacks on images: projected gradient descent, Auto-PGD, one-step attacks, several balls; an attack as one value."""

from awp_engine.attack.apgd import apgd, halving_points
from awp_engine.attack.attack import Attack, fast_attack
from awp_engine.attack.common import NORMAL_START, Norm, Start, starting_point
from awp_engine.attack.l1 import apgd_l1, project_l1
from awp_engine.attack.losses import (
    DivergenceFrom,
    Loss,
    cross_entropy_losses,
    margin_losses,
    summed_cross_entropy,
    summed_margin,
)
from awp_engine.attack.msd import msd
from awp_engine.attack.pgd import pgd

__all__ = [
    "NORMAL_START",
    "Attack",
    "DivergenceFrom",
    "Loss",
    "Norm",
    "Start",
    "apgd",
    "apgd_l1",
    "cross_entropy_losses",
    "fast_attack",
    "halving_points",
    "margin_losses",
    "msd",
    "pgd",
    "project_l1",
    "starting_point",
    "summed_cross_entropy",
    "summed_margin",
]

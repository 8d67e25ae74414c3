"""The robust loss around a trained model's weights: curves, surfaces and flatness.

Nothing here writes to a model that it is given: `WorkingCopy` moves a copy beside it.
"""

from awp_engine.landscape.bootstrap import Interval, mean_interval
from awp_engine.landscape.curves import curve_1d, grid, surface_2d
from awp_engine.landscape.directions import Direction, adversarial_direction, random_direction
from awp_engine.landscape.flatness import AverageFlatness, WorstFlatness, average_flatness, worst_flatness
from awp_engine.landscape.moving import WorkingCopy
from awp_engine.landscape.robust_loss import RobustLoss

__all__ = [
    "AverageFlatness",
    "Direction",
    "Interval",
    "RobustLoss",
    "WorkingCopy",
    "WorstFlatness",
    "adversarial_direction",
    "average_flatness",
    "curve_1d",
    "grid",
    "mean_interval",
    "random_direction",
    "surface_2d",
    "worst_flatness",
]

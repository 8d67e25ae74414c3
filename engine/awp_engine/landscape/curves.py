"""The robust loss along one weight direction, and over the plane of two."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from awp_engine.landscape.directions import Direction
from awp_engine.landscape.moving import WorkingCopy
from awp_engine.landscape.robust_loss import RobustLoss


def grid(radius: float, points: int) -> list[float]:
    """`points` amounts at even distances from -radius to radius; the middle one is exactly 0.

    Raises:
        ValueError: points is even or below 3, or radius is not positive.
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points: expected an odd number >= 3, so that the middle is 0; got {points}")
    if not 0 < radius < float("inf"):
        raise ValueError(f"radius: expected a finite number > 0, got {radius}")
    return [radius * (2 * i - (points - 1)) / (points - 1) for i in range(points)]


def curve_1d(model: nn.Module, direction: Direction, amounts: Sequence[float], loss: RobustLoss) -> Tensor:
    """The robust loss at w + amount ||w|| d / ||d||, every image attacked anew at every point.

    All points share the attack's starting points, so that the curve shows the weights' influence alone.

    Args:
        model: left as it is, bit for bit.
        direction: d.
        amounts: fractions of the norm, such as -1 to 1.
        loss: the images, and how they are attacked.

    Returns:
        fp64 [points, N] on the CPU, in nats.

    Source: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020, section 3, and
    Li et al.: Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018.
    """
    copy = WorkingCopy(model)
    losses = []
    for amount in amounts:
        copy.move_(direction, amount)
        losses.append(loss(copy.model))
    return torch.stack(losses)


def surface_2d(
    model: nn.Module,
    first: Direction,
    second: Direction,
    first_amounts: Sequence[float],
    second_amounts: Sequence[float],
    loss: RobustLoss,
) -> Tensor:
    """The robust loss at w + a ||w|| d1 / ||d1|| + b ||w|| d2 / ||d2||, every image attacked anew at every point.

    Args:
        model: left as it is, bit for bit.
        first: d1; its norms are taken over its own scope.
        second: d2, likewise, of the same parameters.
        first_amounts: values of a.
        second_amounts: values of b.
        loss: as in `curve_1d`.

    Returns:
        fp64 [len(first_amounts), len(second_amounts), N] on the CPU, in nats.
    """
    copy = WorkingCopy(model)
    losses = []
    for a, b in itertools.product(first_amounts, second_amounts):
        copy.move_in_plane_(first, a, second, b)
        losses.append(loss(copy.model))
    return torch.stack(losses).unflatten(0, (len(first_amounts), len(second_amounts)))

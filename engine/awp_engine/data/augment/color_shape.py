"""ColorShape: one operation an image, of colour or of shape.

Source: Li, Spratling: Data Augmentation Alone Can Improve Adversarial Training, ICLR 2023, and the tables of its public
code, whose pixels are Pillow's (by torchvision).
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from awp_engine.data.augment import image_operations as pillow
from awp_kernels.philox import mix_seed, sample_words

_STREAM = 15


class Space(NamedTuple):
    """How often each operation of `OPERATIONS` is done, and the ranges of those that have one.

    Attributes:
        odds: of each operation, in hundredths of a percent; 10,000 together.
        shear: radians, to either side.
        degrees: whole ones, to either side.
    """

    odds: tuple[int, ...]
    shear: tuple[float, float]
    degrees: tuple[int, int]


def _shear_x(levels: Tensor, tangent: Tensor) -> Tensor:
    height = levels.shape[2]
    return pillow.affine(levels, (1, tangent, -tangent * (height / 2), 0, 1, 0), fill=0, resample="nearest")


def _shear_y(levels: Tensor, tangent: Tensor) -> Tensor:
    width = levels.shape[3]
    return pillow.affine(levels, (1, 0, 0, tangent, 1, -tangent * (width / 2)), fill=0, resample="nearest")


OPERATIONS = (
    pillow.color,
    pillow.brightness,
    pillow.contrast,
    pillow.sharpness,
    pillow.autocontrast,
    pillow.equalize,
    _shear_x,
    _shear_y,
    functools.partial(pillow.rotate, fill=0),
)
COLOR = Space((1250, 1250, 1250, 1250, 1250, 1250, 625, 625, 1250), (0.05, 0.15), (1, 10))
"""For CIFAR-10, CIFAR-100 and Tiny-ImageNet."""
SHAPE = Space((800, 800, 400, 800, 400, 800, 1500, 1500, 3000), (0.05, 0.35), (1, 30))
"""For SVHN."""
_FACTORS = ((0.1, 1.9), (0.5, 1.9), (0.5, 1.9), (0.1, 1.9))


def draw_color_shape(ids: Tensor, space: Space, *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Which operation, and how strong.

    With words of stream 15, the operation is the first whose odds and those before it are above w0 * 10,000 // 2^32.
    Factors and angles are uniform by w1, and angles are negative where w2 is odd.

    Args:
        ids: int64 [B].
        space: what there is to choose from.
        seed: the run's seed.
        epoch: with seed and id, all that is drawn depends on.

    Returns:
        int64 [B, 1], a place in `OPERATIONS`; and fp64 [B, 1], a factor, the tangent of a shear or degrees.
    """
    words = sample_words(ids, 3, seed=mix_seed(seed, epoch), stream=_STREAM)
    limits = torch.tensor(space.odds, device=ids.device).cumsum(0)
    choice = torch.searchsorted(limits, (words[:, :1] * 10_000) >> 32, right=True)
    share, sign = words[:, 1] * 2.0**-32, 1 - 2 * (words[:, 2] & 1)
    amounts = [low + (high - low) * share for low, high in _FACTORS]
    amounts += 2 * [torch.zeros_like(share)]
    low, high = space.shear
    # torch's tangents differ in the last bit from device to device
    tangents = [math.tan(angle) for angle in (low + (high - low) * share).tolist()]
    amounts += 2 * [sign * torch.tensor(tangents, dtype=torch.float64, device=ids.device)]
    low, high = space.degrees
    amounts.append((sign * (low + ((words[:, 1] * (high - low + 1)) >> 32))).double())
    return choice, torch.stack(amounts, 1).gather(1, choice)


def color_shape(levels: Tensor, choice: Tensor, amount: Tensor) -> None:
    """Do what `draw_color_shape` gave to levels, int32 [B, C, H, W], in place."""
    pillow.apply_in_turn(levels, choice, OPERATIONS, amount)

"""CropShift: a random part of an image, at a random place of a black one of the same size.

Source: Li, Spratling: Data Augmentation Alone Can Improve Adversarial Training, ICLR 2023, and its public code.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from awp_engine.data.augment.image_operations import gather_pixels
from awp_kernels.philox import mix_seed, sample_words

_STREAM = 14


class Shifts(NamedTuple):
    """What is left of each image, and where it comes to; int64 [B] each.

    Attributes:
        rows, columns: of the image that are lost.
        top, left: the first row and column that are kept.
        down, right: those that they come to.
    """

    rows: Tensor
    columns: Tensor
    top: Tensor
    left: Tensor
    down: Tensor
    right: Tensor


def draw_crop_shift(ids: Tensor, *, seed: int, epoch: int, most: int) -> Shifts:
    """Parts and places; the same bits on every device.

    With words of stream 14, s = w0 * (most + 1) // 2^32 rows and columns are lost together, w1 * (s + 1) // 2^32 of
    them columns. The first column and row that are kept, and those that they come to, are uniform by w2 to w5.

    Args:
        ids: int64 [B].
        seed: the run's seed.
        epoch: with seed and id, all that is drawn depends on.
        most: rows and columns that may be lost, less than the image has of either.
    """
    words = sample_words(ids, 6, seed=mix_seed(seed, epoch), stream=_STREAM)
    strength = (words[:, 0] * (most + 1)) >> 32
    columns = (words[:, 1] * (strength + 1)) >> 32
    rows = strength - columns
    left, top, right, down = (
        (words[:, 2 + i] * (lost + 1)) >> 32 for i, lost in enumerate((columns, rows, columns, rows))
    )
    return Shifts(rows, columns, top, left, down, right)


def crop_shift(levels: Tensor, shifts: Shifts) -> Tensor:
    """Levels, int32 [B, C, H, W], of which a part is kept and moved, with 0 around it; shifts on the same device."""
    height, width = levels.shape[2:]
    rows, columns, top, left, down, right = (field.view(-1, 1, 1) for field in shifts)
    row = torch.arange(height, device=levels.device).view(1, -1, 1) - down
    column = torch.arange(width, device=levels.device) - right
    # rows and columns that are lost are in the image all the same
    row = torch.where((row >= 0) & (row < height - rows), row + top, -1)
    column = torch.where((column >= 0) & (column < width - columns), column + left, -1)
    return gather_pixels(levels, row, column, fill=0)

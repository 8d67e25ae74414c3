"""Augmentations that are named as a whole: IDBH in three strengths, AutoAugment for two data sets."""

from typing import NamedTuple

from torch import Tensor

from awp_engine.data.augment.auto_augment import CIFAR10, SVHN, auto_augment, draw_auto_augment
from awp_engine.data.augment.color_shape import COLOR, SHAPE, Space, color_shape, draw_color_shape
from awp_engine.data.augment.crop_shift import Shifts, crop_shift, draw_crop_shift
from awp_engine.data.augment.erase import draw_erase
from awp_engine.data.augment.mixing import Boxes, replace_boxes


class _Idbh(NamedTuple):
    """Of how many rows and columns CropShift takes, among what ColorShape chooses, and how often and much is erased."""

    most: int
    space: Space
    erased: float
    area: float


_IDBH = {
    "idbh-weak": _Idbh(10, COLOR, 0.5, 0.33),
    "idbh-strong": _Idbh(10, COLOR, 1.0, 0.33),
    "idbh-svhn": _Idbh(8, SHAPE, 1.0, 0.5),
}
_AUTO_AUGMENT = {"autoaugment-cifar10": CIFAR10, "autoaugment-svhn": SVHN}
POLICIES = (*_IDBH, *_AUTO_AUGMENT)


def least_side(policy: str) -> int:
    """Pixels that images need in height and in width."""
    return _IDBH[policy].most + 1 if policy in _IDBH else 1


def apply_policy(policy: str, levels: Tensor, ids: Tensor, *, seed: int, epoch: int, part: float = 1.0) -> Tensor:
    """Do to each image what one of `POLICIES` says.

    IDBH (Li, Spratling, ICLR 2023) is CropShift, then one operation of ColorShape, then a rectangle of black; mirroring
    comes before it. AutoAugment is a pair of operations.

    Args:
        policy: its name.
        levels: int32 [B, C, H, W] in [0, 255], of 1 or 3 channels and at least `least_side` pixels a side; changed.
        ids: int64 [B] on the CPU, so that nothing waits for the device.
        seed: the run's seed.
        epoch: with seed and id, all that is drawn depends on.
        part: of the images that AutoAugment changes.

    Returns:
        int32 [B, C, H, W].
    """
    if policy in _AUTO_AUGMENT:
        auto_augment(levels, *draw_auto_augment(ids, _AUTO_AUGMENT[policy], seed=seed, epoch=epoch, part=part))
        return levels
    idbh, (height, width) = _IDBH[policy], levels.shape[2:]
    shifts = draw_crop_shift(ids, seed=seed, epoch=epoch, most=idbh.most)
    levels = crop_shift(levels, Shifts(*(field.to(levels.device, non_blocking=True) for field in shifts)))
    color_shape(levels, *draw_color_shape(ids, idbh.space, seed=seed, epoch=epoch))
    erased = draw_erase(
        ids,
        seed=seed,
        epoch=epoch,
        probability=idbh.erased,
        height=height,
        width=width,
        area=(0.02, idbh.area),
        ratio=(0.3, 3.3),
    )
    boxes = Boxes(*(field.to(levels.device, non_blocking=True) for field in erased))
    return replace_boxes(levels, boxes, levels.new_zeros(()))

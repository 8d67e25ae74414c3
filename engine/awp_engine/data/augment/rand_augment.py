"""RandAugment: a few operations an image, drawn from fifteen, as timm's "rand-m9-mstd0.5-inc1" has them.

Sources: Cubuk et al.: RandAugment: Practical Automated Data Augmentation with a Reduced Search Space, NeurIPS 2020; the
operations are Pillow's on 8-bit images, and the ranges of their magnitudes timm's.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from awp_engine.data.augment import image_operations as pillow
from awp_kernels.philox import mix_seed, normals, sample_words

_STREAM = 10

OPERATIONS = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize-add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
)
_GEOMETRIC = frozenset({"rotate", "shear-x", "shear-y", "translate-x", "translate-y"})
_ENHANCERS = {
    "color": pillow.color,
    "contrast": pillow.contrast,
    "brightness": pillow.brightness,
    "sharpness": pillow.sharpness,
}


class Operations(NamedTuple):
    """What is done to each image, in order.

    Attributes:
        choice: int64 [B, operations], a place in `OPERATIONS`, or -1 for nothing.
        level: fp64 [B, operations], in [0, 10].
        sign: fp64 [B, operations], 1 or -1: to which side.
    """

    choice: Tensor
    level: Tensor
    sign: Tensor

    def part(self, piece: slice) -> Self:
        """Those of some of the images."""
        return type(self)(*(field[piece] for field in self))


def draw_rand_augment(
    ids: Tensor, *, seed: int, epoch: int, operations: int = 2, magnitude: float = 9, std: float = 0.5
) -> Operations:
    """Which operations, how strong, and to which side.

    With words of stream 10, three an operation, it is number w0 * 15 // 2^32, is done where w1 < 2^31, and to the
    negative side where w2 is odd. Its level is magnitude + std * N(0, 1), clipped to [0, 10]. All of it has the same
    bits on every device.

    Args:
        ids: int64 [B].
        seed: the run's seed.
        epoch: with seed and id, all that is drawn depends on.
        operations: an image.
        magnitude: in [0, 10].
        std: of the magnitude.
    """
    words = sample_words(ids, 3 * operations, seed=mix_seed(seed, epoch), stream=_STREAM)
    words = words.view(len(ids), operations, 3)
    choice = torch.where(words[..., 1] < 2**31, (words[..., 0] * len(OPERATIONS)) >> 32, -1)
    noise = normals(ids, operations, seed=mix_seed(seed, epoch, _STREAM)).double()
    return Operations(choice, (magnitude + std * noise).clamp(0, 10), 1 - 2 * (words[..., 2] & 1).double())


def rand_augment(
    images: Tensor,
    ids: Tensor,
    *,
    seed: int,
    epoch: int,
    operations: int = 2,
    magnitude: float = 9,
    std: float = 0.5,
    increasing: bool = True,
    fill: Sequence[float] | None = None,
) -> Tensor:
    """Draw operations for a batch and apply them: see `draw_rand_augment` and `apply_rand_augment`."""
    drawn = draw_rand_augment(ids, seed=seed, epoch=epoch, operations=operations, magnitude=magnitude, std=std)
    return apply_rand_augment(images, drawn, increasing=increasing, fill=fill)


def apply_rand_augment(
    images: Tensor, drawn: Operations, *, increasing: bool = True, fill: Sequence[float] | None = None
) -> Tensor:
    """Do to each image what was drawn for it.

    Every operation takes and gives 8-bit levels, to the last level what Pillow gives on the CPU. Geometry interpolates
    bilinearly (timm takes the interpolation of the crop).

    Args:
        images: fp32 [B, C, H, W], multiples of 1/255 in [0, 1]; 1 or 3 channels.
        drawn: as `draw_rand_augment` gives it. On the CPU nothing waits for another device, where the images may be.
        increasing: whether a higher level means more of every operation; else posterize and solarize do less, and
            colour, contrast, brightness and sharpness go from little to much.
        fill: what comes in from outside, in [0, 1], one value a channel; by default 128/255.

    Returns:
        fp32 [B, C, H, W], multiples of 1/255 in [0, 1], contiguous.

    Raises:
        ValueError: another number of channels.
    """
    channels = images.shape[1]
    levels = pillow.to_levels(images, "RandAugment")
    if fill is not None and len(fill) != channels:
        raise ValueError(f"fill: expected {channels} values, one a channel, got {len(fill)}")
    outside = [128] * channels if fill is None else [min(max(round(255 * value), 0), 255) for value in fill]
    operations = [functools.partial(operate, name, increasing=increasing, fill=outside) for name in OPERATIONS]
    pillow.apply_in_turn(levels, drawn.choice, operations, drawn.level, drawn.sign)
    return pillow.to_images(levels)


def operate(name: str, levels: Tensor, level: Tensor, sign: Tensor, *, increasing: bool, fill: Sequence[int]) -> Tensor:
    """One operation on several images.

    Args:
        name: one of `OPERATIONS`.
        levels: int32 [n, C, H, W], in [0, 255].
        level: fp64 [n], in [0, 10].
        sign: fp64 [n], 1 or -1.
        increasing: see `apply_rand_augment`.
        fill: level of what comes in from outside, one a channel.

    Returns:
        int32 [n, C, H, W].
    """
    if name in _GEOMETRIC:
        matrix = _matrix(name, level * sign, *levels.shape[2:])
        return pillow.affine(levels, matrix, fill=fill, resample="bilinear")
    if name in _ENHANCERS:
        factor = (1 + sign * (level / 10 * 0.9)).clamp(min=0.1) if increasing else level / 10 * 1.8 + 0.1
        return _ENHANCERS[name](levels, factor)
    if name == "solarize":
        threshold = (level / 10 * 256).long().clamp(max=256)
        return pillow.solarize(levels, 256 - threshold if increasing else threshold)
    if name == "solarize-add":
        return pillow.solarize_add(levels, (level / 10 * 110).long().clamp(max=128))
    if name == "posterize":
        bits = (level / 10 * 4).long()
        return pillow.posterize(levels, 4 - bits if increasing else bits)
    return {"autocontrast": pillow.autocontrast, "equalize": pillow.equalize, "invert": pillow.invert}[name](levels)


def _matrix(name: str, amount: Tensor, height: int, width: int) -> pillow.Matrix:
    if name == "shear-x":
        return 1, amount / 10 * 0.3, 0, 0, 1, 0
    if name == "shear-y":
        return 1, 0, 0, amount / 10 * 0.3, 1, 0
    if name == "translate-x":
        return 1, 0, amount / 10 * 0.45 * width, 0, 1, 0
    if name == "translate-y":
        return 1, 0, 0, 0, 1, amount / 10 * 0.45 * height
    return pillow.rotation(amount / 10 * 30, height, width)

"""Random erasing: a rectangle of an image is filled with noise, or with the mean.

Source: Zhong, Zheng, Kang, Li, Yang: Random Erasing Data Augmentation, AAAI 2020, with the ranges of timm's recipes.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from awp_engine.data.augment.mixing import Boxes, replace_boxes
from awp_kernels.philox import mix_seed, normals, sample_words

_STREAM = 11
_ATTEMPTS = 10
_SHAPES = 4096


@functools.cache
def _shapes(ratio: tuple[float, float]) -> Tensor:
    """Roots of ratios height / width in a range, at even steps of their logarithm."""
    low, high = map(math.log, ratio)
    middle, half = (low + high) / 4, (high - low) / 4
    return torch.tensor(
        [math.exp(middle + half * ((2 * i + 1) / _SHAPES - 1)) for i in range(_SHAPES)], dtype=torch.float64
    )


def draw_erase(
    ids: Tensor,
    *,
    seed: int,
    epoch: int,
    probability: float,
    height: int,
    width: int,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> Boxes:
    """Rectangles to be erased, the same on every device; empty ones where nothing is.

    With words of stream 11, an image is erased where w0 < probability * 2^32. Of ten attempts, four words each, the
    first counts whose box is less than the image in height and in width: its area is uniform in `area`, its ratio of
    height to width uniform in the logarithm, at 4096 steps, and its place uniform.

    Args:
        ids: int64 [B].
        seed: the run's seed.
        epoch: with seed and id, all that is drawn depends on.
        probability: of an image to be erased in part.
        height: of the images.
        width: of the images.
        area: least and largest part of the image's pixels.
        ratio: least and largest of height to width.
    """
    words = sample_words(ids, 1 + 4 * _ATTEMPTS, seed=mix_seed(seed, epoch), stream=_STREAM)
    sizes, shapes, rows, columns = words[:, 1:].view(-1, _ATTEMPTS, 4).unbind(2)
    low, high = area
    root = ((low + (high - low) * (sizes.double() * 2.0**-32)) * (height * width)).sqrt()
    shape = _shapes(ratio).to(ids.device)[(shapes * _SHAPES) >> 32]
    tall, wide = (root * shape).round().long(), (root / shape).round().long()
    fits = (tall < height) & (wide < width)
    first = fits.long().argmax(1, keepdim=True)
    erased = (words[:, :1] < round(probability * 2**32)) & fits.any(1, keepdim=True)
    tall, wide = (size.gather(1, first) * erased for size in (tall, wide))
    top = (rows.gather(1, first) * (height - tall + 1)) >> 32
    left = (columns.gather(1, first) * (width - wide + 1)) >> 32
    return Boxes(*(value.squeeze(1) for value in (top, top + tall, left, left + wide)))


def erase(
    images: Tensor,
    boxes: Boxes,
    ids: Tensor,
    *,
    seed: int,
    epoch: int,
    mean: Sequence[float],
    std: Sequence[float] | None,
) -> Tensor:
    """Fill every image's box with mean + std * N(0, 1), a pixel and channel at a time, clipped to [0, 1].

    Args:
        images: fp32 [B, C, H, W], in [0, 1].
        boxes: as `draw_erase` gives them.
        ids: int64 [B], which the noise is keyed by, with seed and epoch.
        seed: the run's seed.
        epoch: counted from 1.
        mean: one value a channel.
        std: likewise; None fills with the mean itself.

    Returns:
        fp32 [B, C, H, W]; the noise has the same bits on every device.

    Raises:
        ValueError: not one value a channel.
    """
    channels = images.shape[1]
    if len(mean) != channels or (std is not None and len(std) != channels):
        raise ValueError(f"mean and std: expected {channels} values each, one a channel")
    middle = images.new_tensor(mean).view(-1, 1, 1)
    if std is None:
        return replace_boxes(images, boxes, middle)
    # noise for all pixels of an image is drawn only where some are erased
    index = (boxes.bottom > boxes.top).nonzero().squeeze(1)
    if not len(index):
        return images
    noise = normals(ids[index], images[0].numel(), seed=mix_seed(seed, epoch, _STREAM)).view(-1, *images.shape[1:])
    content = (middle + noise * images.new_tensor(std).view(-1, 1, 1)).clamp_(0, 1)
    found = Boxes(*(field[index] for field in boxes))
    return images.index_copy(0, index, replace_boxes(images[index], found, content))

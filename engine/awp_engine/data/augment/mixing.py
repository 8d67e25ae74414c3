"""CutMix: rectangles of an image that are taken from another one. Cutout is a part of `awp_kernels.augment`.

All that is random is drawn from Philox words w of (seed, epoch, sample id), each method with its own stream.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from awp_kernels.philox import mix_seed, sample_words

_STREAM_CUTMIX = 7


class Boxes(NamedTuple):
    """Rows top to bottom - 1 and columns left to right - 1, inside the image; int64 [B] each."""

    top: Tensor
    bottom: Tensor
    left: Tensor
    right: Tensor

    def part(self, places: Tensor) -> Self:
        """The boxes of the images at `places`, int64 [n]."""
        return type(self)(*(field[places] for field in self))

    @property
    def nonempty(self) -> Tensor:
        """Which boxes have a pixel, bool [B]."""
        return (self.bottom > self.top) & (self.right > self.left)

    def share_outside(self, height: int, width: int) -> Tensor:
        """The part of an image's pixels that its box leaves, fp32 [B]."""
        area = self.top.new_full((), height * width)
        left = area - (self.bottom - self.top) * (self.right - self.left)
        return (left.double() / area.double()).float()


def draw_cutmix(
    ids: Tensor, *, seed: int, epoch: int, probability: float, count: int, height: int, width: int
) -> tuple[Tensor, Boxes]:
    """Which image each one is mixed with, and the part that is taken from it.

    With words of stream 7, an image is mixed where w0 < probability * 2^32. The partner is number w1 * (count - 1) //
    2^32 of the others in the order of their ids. With 1 - lambda = w2 * 2^-32, so lambda uniform as alpha = 1 makes it,
    the box has int(height * sqrt(1 - lambda)) rows and as many parts of the columns, and its centre is drawn as
    Cutout's, from w3 and w4. Empty boxes are images that are not mixed.

    Args:
        ids: int64 [B].
        seed: the run's seed.
        epoch: with seed and id, all that is drawn depends on.
        probability: of an image to be mixed.
        count: images to choose partners from, at least 2.
        height: of the images.
        width: of the images.

    Returns:
        int64 [B] in [0, count - 1), the partner's number among the others; and the boxes.

    Source: Yun et al.: CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features, ICCV
        2019.
    """
    words = sample_words(ids, 5, seed=mix_seed(seed, epoch), stream=_STREAM_CUTMIX)
    # fp64 takes 32 bits without rounding and its root rounds right, so the boxes are the same on every device.
    ratio = (words[:, 2].double() * 2.0**-32).sqrt()
    mixed = words[:, 0] < round(probability * 2**32)
    rows, columns = ((ratio * length).to(torch.int64) * mixed for length in (height, width))
    top = ((words[:, 3] * height) >> 32) - (rows >> 1)
    left = ((words[:, 4] * width) >> 32) - (columns >> 1)
    top, bottom = top.clamp(min=0), (top + rows).clamp(max=height)
    left, right = left.clamp(min=0), (left + columns).clamp(max=width)
    return (words[:, 1] * (count - 1)) >> 32, Boxes(top, bottom, left, right)


def replace_boxes(images: Tensor, boxes: Boxes, content: Tensor) -> Tensor:
    """Images [B, C, H, W] with the boxes' pixels taken from `content`, which has that shape or is broadcast to it."""
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    in_rows = (rows >= boxes.top.unsqueeze(1)) & (rows < boxes.bottom.unsqueeze(1))  # [B, H]
    in_columns = (columns >= boxes.left.unsqueeze(1)) & (columns < boxes.right.unsqueeze(1))  # [B, W]
    inside = in_rows.unsqueeze(2) & in_columns.unsqueeze(1)  # [B, H, W]
    return torch.where(inside.unsqueeze(1), content, images)


def mixed_labels(labels: Tensor, partner_labels: Tensor, own_share: Tensor, *, num_classes: int) -> Tensor:
    """The share that each class has in an image; the partner's is 1 - own_share, so that a row's sum is exactly 1.

    Args:
        labels: int64 [B].
        partner_labels: int64 [B].
        own_share: fp32 [B] in [0, 1], of the pixels that are the image's own.
        num_classes: above all labels.

    Returns:
        fp32 [B, num_classes].
    """
    classes = torch.arange(num_classes, device=labels.device)
    own, partner = (given.unsqueeze(1) == classes for given in (labels, partner_labels))
    share = own_share.unsqueeze(1)
    return own * share + partner * (1 - share)

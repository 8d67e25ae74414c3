"""MixUp, and the choice between it and CutMix, each image by itself.

Source: Zhang, Cisse, Dauphin, Lopez-Paz: mixup: Beyond Empirical Risk Minimization, ICLR 2018.
"""

import functools
from typing import NamedTuple, Self

import torch
from torch import Tensor

from awp_engine.data.augment.mixing import Boxes, draw_cutmix
from awp_kernels.philox import mix_seed, sample_words

_STREAM_MIXUP = 12
_STREAM_SWITCH = 13
_QUANTILES = 1 << 16


@functools.cache
def beta_quantiles(alpha: float) -> Tensor:
    """Beta(alpha, alpha) in 65,536 equally likely values: its quantiles at (i + 1/2) / 65536; fp32, on the CPU."""
    places = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    # a quarter of a second of every start
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, places.numpy())).float()


class Mixture(NamedTuple):
    """How images are mixed with their partners.

    Attributes:
        partners: int64 [B], the partner's number among the others of the set, in the order of their ids.
        boxes: what is taken from it, as CutMix does; empty where nothing is.
        blend: fp32 [B], the image's own share of every pixel, as MixUp does; 1 where it is not blended.
    """

    partners: Tensor
    boxes: Boxes
    blend: Tensor

    def part(self, places: Tensor) -> Self:
        """Those of the images at `places`, int64 [n]."""
        return type(self)(self.partners[places], self.boxes.part(places), self.blend[places])

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        boxes = Boxes(*(field.to(device, non_blocking=True) for field in self.boxes))
        return type(self)(self.partners, boxes, self.blend.to(device, non_blocking=True))

    @property
    def mixes(self) -> Tensor:
        """Which images are mixed, bool [B]."""
        return self.boxes.nonempty | (self.blend < 1)

    def own_share(self, height: int, width: int) -> Tensor:
        """The image's own share of its label, fp32 [B]."""
        return self.blend * self.boxes.share_outside(height, width)


def draw_mixup(
    ids: Tensor, *, seed: int, epoch: int, probability: float, alpha: float, count: int
) -> tuple[Tensor, Tensor]:
    """Which image each one is mixed with, and its own share; the same bits on every device.

    With words of stream 12, an image is mixed where w0 < probability * 2^32. The partner is number w1 * (count - 1) //
    2^32 of the others in the order of their ids, as `draw_cutmix` has it. The share is number w2 // 2^16 of
    `beta_quantiles`, of which `alpha`, more than 0, is both parameters. The other arguments are those of `draw_cutmix`.

    Returns:
        int64 [B] in [0, count - 1), the partner's number among the others; and fp32 [B], 1 where it is not mixed.

    Raises:
        ValueError: alpha is not more than 0.
    """
    if not alpha > 0:
        raise ValueError(f"alpha: expected a number > 0, got {alpha}")
    words = sample_words(ids, 3, seed=mix_seed(seed, epoch), stream=_STREAM_MIXUP)
    share = beta_quantiles(alpha).to(ids.device)[words[:, 2] >> 16]
    mixed = words[:, 0] < round(probability * 2**32)
    return (words[:, 1] * (count - 1)) >> 32, torch.where(mixed, share, 1.0)


def draw_mixture(
    ids: Tensor,
    *,
    seed: int,
    epoch: int,
    probability: float,
    switch: float,
    alpha: float,
    count: int,
    height: int,
    width: int,
) -> Mixture:
    """CutMix or MixUp for each image: CutMix where a word of stream 13 is < switch * 2^32.

    timm's Mixup chooses for a batch as a whole by default; here every image is drawn by itself, as in its mode "elem".

    `probability` is that of an image to be mixed either way, and `switch` that of CutMix where it is mixed, whose
    shares are uniform, as an alpha of 1 makes them. The other arguments are those of `draw_cutmix` and `draw_mixup`.
    """
    by_box, boxes = draw_cutmix(
        ids, seed=seed, epoch=epoch, probability=probability, count=count, height=height, width=width
    )
    by_blend, blend = draw_mixup(ids, seed=seed, epoch=epoch, probability=probability, alpha=alpha, count=count)
    word = sample_words(ids, 1, seed=mix_seed(seed, epoch), stream=_STREAM_SWITCH).squeeze(1)
    cut = word < round(switch * 2**32)
    # an empty box
    boxes = Boxes(boxes.top, torch.where(cut, boxes.bottom, boxes.top), boxes.left, boxes.right)
    return Mixture(torch.where(cut, by_box, by_blend), boxes, torch.where(cut, 1.0, blend))


def blend_images(images: Tensor, partners: Tensor, own_share: Tensor) -> Tensor:
    """own_share * images + (1 - own_share) * partners, [B, C, H, W]; images themselves where the share is 1."""
    share = own_share.view(-1, 1, 1, 1)
    return images * share + partners * (1 - share)

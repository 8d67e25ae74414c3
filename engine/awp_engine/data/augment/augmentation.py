"""What is done to the images of an epoch, drawn by (seed, epoch, sample id)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from awp_engine.data.augment.erase import draw_erase, erase
from awp_engine.data.augment.image_operations import to_levels
from awp_engine.data.augment.mixing import mixed_labels, replace_boxes
from awp_engine.data.augment.mixup import Mixture, blend_images, draw_mixture
from awp_engine.data.augment.policy import POLICIES, apply_policy, least_side
from awp_engine.data.augment.rand_augment import rand_augment
from awp_engine.data.augment.rotation import random_rotation
from awp_engine.data.loaders.framing import Request
from awp_engine.data.split import AugmentArgs, Samples
from awp_engine.distributed.batch import Batch
from awp_kernels import augment
from awp_kernels.philox import mix_seed


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images and their labels are made; by default nothing is done to them.

    First comes the crop, then mirroring, rotation or a policy, Cutout, RandAugment, random erasing, and last CutMix or
    MixUp, whose partner is treated as in its own place.

    Args:
        pad: zero padding of the random crop, in pixels; 0 for no crop.
        flip: mirror half of the images.
        cutout: side in pixels of the square that is filled in every image; 0 for none.
        fill: what Cutout fills with, and the mean of the noise that erasing fills with, one value in [0, 1] a channel:
            the data set's mean does what is done to normalised images by zeros. Needed with cutout and erase.
        cutmix: probability that an image has a box replaced by that of another; 0 for never. With cutmix or mixup all
            labels are shares, fp32 [B, num_classes].
        mixup: probability that an image is blended with another; one that is boxed is not blended too, so both
            probabilities are 1 together at most.
        mixup_alpha: both parameters of the Beta distribution of the blended shares.
        rotate: degrees; images are turned by up to as many to either side, 0 for not.
        policy: one of `POLICIES`, or "none". An IDBH policy has crops, shifts and erasing of its own.
        policy_part: part of the images that AutoAugment changes, each drawn by itself.
        policy_first: AutoAugment comes before crop and mirroring.
        rand_augment: magnitude of RandAugment's two operations, 0 to 10; None for none.
        erase: probability that a rectangle of an image is filled with noise; 0 for never.
        erase_std: deviation of that noise, one value a channel; None fills with `fill` itself.
        num_classes: needed with cutmix and mixup.

    Raises:
        ValueError: an argument is out of range.
    """

    pad: int = 0
    flip: bool = False
    cutout: int = 0
    fill: tuple[float, ...] | None = None
    cutmix: float = 0.0
    mixup: float = 0.0
    mixup_alpha: float = 0.8
    rotate: float = 0.0
    policy: str = "none"
    policy_first: bool = False
    policy_part: float = 1.0
    rand_augment: float | None = None
    erase: float = 0.0
    erase_std: tuple[float, ...] | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        for key in ("pad", "cutout"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: {getattr(self, key)}; expected at least 0 pixels")
        if self.policy not in ("none", *POLICIES):
            raise ValueError(f"policy: {self.policy!r}; expected none, {', '.join(POLICIES)}")
        if not 0 <= self.rotate <= 180:
            raise ValueError(f"rotate: {self.rotate}; expected 0 to 180 degrees")
        if self.rotate and self.policy != "none":
            raise ValueError(f"rotate: {self.rotate}; expected 0 with a policy, which rotates by itself")
        for key in ("cutmix", "mixup", "erase"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: {getattr(self, key)}; expected a probability, 0 to 1")
        if self.rand_augment is not None and not 0 <= self.rand_augment <= 10:
            raise ValueError(f"rand_augment: {self.rand_augment}; expected a magnitude, 0 to 10")
        if self.cutmix + self.mixup > 1:
            raise ValueError(f"cutmix + mixup: {self.cutmix + self.mixup}; expected at most 1 together")

    def require_fit(self, split: Samples, name: str) -> None:
        """Whether the images of a split can be made so; `name` is the split's in messages.

        Raises:
            ValueError: an argument is missing, or does not fit the split.
        """
        channels = split.shape[0]
        filled = " and ".join(what for what, used in (("cutout", self.cutout), ("erase", self.erase)) if used)
        if filled and not (
            self.fill is not None and len(self.fill) == channels and all(0 <= value <= 1 for value in self.fill)
        ):
            raise ValueError(f"fill: {self.fill}; expected {channels} values in [0, 1], one a channel, for {filled}")
        if self.rotate or self.policy != "none":
            what, least = ("rotate", 1) if self.rotate else (f"policy {self.policy}", least_side(self.policy))
            if channels not in (1, 3) or min(split.shape[1:]) < least:
                size = f"images of at least {least}x{least} pixels, gray or RGB"
                raise ValueError(f"{what}: expected {size}, got [C, H, W] {list(split.shape)}")
        if self.mixes:
            if len(split) < 2:
                raise ValueError(f"{name}: {len(split)} images; expected at least 2 for cutmix or mixup")
            needed = split.largest_label + 1
            if self.num_classes is None or self.num_classes < needed:
                raise ValueError(
                    f"num_classes: {self.num_classes}; expected at least {needed} for mixed labels, those of {name}"
                )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that labels are shares."""
        return self.cutmix + self.mixup > 0

    @property
    def args(self) -> AugmentArgs:
        """What is done first to each image by itself, in one pass."""
        return self._passes[0]

    @property
    def _passes(self) -> tuple[AugmentArgs, AugmentArgs]:
        """What is done in one pass to each image before a rotation or a policy, and after it."""
        fill = self.fill if self.cutout else None
        whole = AugmentArgs(self.pad, self.flip, self.cutout, fill)
        if not self.rotate and self.policy == "none":
            return whole, AugmentArgs()
        if self.policy_first:
            return AugmentArgs(), whole
        return AugmentArgs(self.pad, self.flip), AugmentArgs(cutout=self.cutout, fill=fill)

    def change(self, images: Tensor, ids: Tensor, *, seed: int, epoch: int) -> Tensor:
        """What is done to images after `args`, by themselves.

        Args:
            images: fp32 [n, C, H, W], multiples of 1/255 in [0, 1].
            ids: int64 [n] on the CPU.
            seed: the run's seed.
            epoch: with seed and id, all that is drawn depends on.

        Returns:
            fp32 [n, C, H, W], in [0, 1].
        """
        on_device = ids.to(images.device, non_blocking=True)
        if self.rotate or self.policy != "none":
            levels = to_levels(images, "a rotation or a policy")
            if self.rotate:
                levels = random_rotation(levels, ids, seed=seed, epoch=epoch, degrees=self.rotate)
            else:
                levels = apply_policy(self.policy, levels, ids, seed=seed, epoch=epoch, part=self.policy_part)
            last = self._passes[1]._asdict()
            images = augment(levels.to(torch.uint8), sample_ids=on_device, seed=mix_seed(seed, epoch), **last)
        if self.rand_augment is not None:
            images = rand_augment(images, ids, seed=seed, epoch=epoch, magnitude=self.rand_augment, fill=self.fill)
        if self.erase and self.fill is not None:
            _, _, height, width = images.shape
            boxes = draw_erase(on_device, seed=seed, epoch=epoch, probability=self.erase, height=height, width=width)
            images = erase(images, boxes, on_device, seed=seed, epoch=epoch, mean=self.fill, std=self.erase_std)
        return images

    def draw(self, split: Samples, rows: Tensor, *, seed: int, epoch: int) -> "DrawnSamples":
        """Draws what mixes the samples at `rows`, int64 [K] on the CPU, with others."""
        ids, mixture = split.ids_of(rows), None
        if self.mixes:
            _, height, width = split.shape
            mixture = draw_mixture(
                ids,
                seed=seed,
                epoch=epoch,
                probability=self.cutmix + self.mixup,
                switch=self.cutmix / (self.cutmix + self.mixup),
                alpha=self.mixup_alpha,
                count=len(split),
                height=height,
                width=width,
            )
            mixture = mixture._replace(partners=split.others(rows, mixture.partners))
        return DrawnSamples(split, rows, ids, self, seed, epoch, mixture)


class DrawnSamples(NamedTuple):
    """Samples of a split, in the order in which they come, and what was drawn for them; on the CPU.

    The partners of `mixture` are rows.
    """

    split: Samples
    rows: Tensor
    ids: Tensor
    augmentation: Augmentation
    seed: int
    epoch: int
    mixture: Mixture | None

    def request(self, places: Tensor) -> Request:
        """The images that the samples at `places`, int64 [n], are made of: their own, then those mixed into them."""
        rows, ids = self.rows[places], self.ids[places]
        if self.mixture is not None:
            mixture = self.mixture.part(places)
            partners = mixture.partners[mixture.mixes]
            rows, ids = torch.cat([rows, partners]), torch.cat([ids, self.split.ids_of(partners)])
        return Request(rows, ids, mix_seed(self.seed, self.epoch))

    def batch(self, places: Tensor, augmented: Tensor, whole_size: int) -> Batch:
        """The samples at `places`, made of the images of `request`, as a share of a batch of `whole_size`."""
        request, device, count = self.request(places), augmented.device, len(places)
        augmented = self.augmentation.change(augmented, request.ids, seed=self.seed, epoch=self.epoch)
        labels = self.split.labels_of(request.rows[:count])
        ids = request.ids[:count].to(device, non_blocking=True)
        if self.mixture is None:
            return Batch(augmented, labels, ids, whole_size)
        mixture = self.mixture.part(places)
        # who is not mixed is his own partner
        partner = torch.where(mixture.mixes, count - 1 + mixture.mixes.cumsum(0), torch.arange(count))
        partner_labels = self.split.labels_of(mixture.partners)
        mixture = mixture.to(device)
        images, content = augmented[:count], augmented[partner.to(device, non_blocking=True)]
        if self.augmentation.mixup:
            images = blend_images(images, content, mixture.blend)
        share = mixture.own_share(*augmented.shape[2:])
        mixed = mixed_labels(labels, partner_labels, share, num_classes=self.augmentation.num_classes or 0)
        return Batch(replace_boxes(images, mixture.boxes, content), mixed, ids, whole_size)

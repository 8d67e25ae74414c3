"""What is done to the images of an epoch, drawn by (seed, epoch, sample id)."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from awp_engine.data.augment.erase import draw_erase, erase
from awp_engine.data.augment.mixing import mixed_labels, replace_boxes
from awp_engine.data.augment.mixup import Mixture, blend_images, draw_mixture
from awp_engine.data.augment.rand_augment import rand_augment
from awp_engine.data.batch import Batch
from awp_engine.data.framing import Images, Request, Requests
from awp_engine.data.split import AugmentArgs
from awp_kernels.philox import mix_seed


class Samples(Protocol):
    """What batches are made of: a `Split`, a `StreamedSplit` or `ExtraImages`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of every image, [C, H, W]."""
        ...

    @property
    def device(self) -> torch.device:
        """Where images come to."""
        ...

    @property
    def largest_label(self) -> int:
        """Of all samples."""
        ...

    def __len__(self) -> int: ...

    def ids_of(self, rows: Tensor) -> Tensor:
        """The samples' ids, int64 [n], on the CPU."""
        ...

    def labels_of(self, rows: Tensor) -> Tensor:
        """The samples' labels, int64 [n]."""
        ...

    def others(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """The rows of the images that are number `numbers`, in [0, len - 1), among all but `rows`, by their ids."""
        ...

    def augmented(self, requests: Requests, args: AugmentArgs, memory_format: torch.memory_format) -> Images:
        """The images of every request, fp32 [n, C, H, W] in [0, 1]."""
        ...


class Recipe(NamedTuple):
    """The arguments of `train_batches` that images and labels depend on."""

    seed: int
    epoch: int
    pad: int
    flip: bool
    cutout: int = 0
    fill: tuple[float, ...] | None = None
    cutmix: float = 0.0
    mixup: float = 0.0
    mixup_alpha: float = 0.8
    rand_augment: float | None = None
    erase: float = 0.0
    erase_std: tuple[float, ...] | None = None
    num_classes: int | None = None

    def check(self, split: Samples, name: str) -> None:
        """Whether the images of a split can be made so; `name` is the split's in messages.

        Raises:
            ValueError: an argument is out of range or missing, or does not fit the split.
        """
        channels = split.shape[0]
        if self.pad < 0:
            raise ValueError(f"pad: {self.pad}; expected at least 0 pixels")
        if self.cutout < 0:
            raise ValueError(f"cutout: {self.cutout}; expected at least 0 pixels")
        filled = " and ".join(what for what, used in (("cutout", self.cutout), ("erase", self.erase)) if used)
        if filled and not (
            self.fill is not None and len(self.fill) == channels and all(0 <= value <= 1 for value in self.fill)
        ):
            raise ValueError(f"fill: {self.fill}; expected {channels} values in [0, 1], one a channel, for {filled}")
        for key in ("cutmix", "mixup", "erase"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}: {getattr(self, key)}; expected a probability, 0 to 1")
        if self.rand_augment is not None and not 0 <= self.rand_augment <= 10:
            raise ValueError(f"rand_augment: {self.rand_augment}; expected a magnitude, 0 to 10")
        if self.cutmix + self.mixup > 1:
            raise ValueError(f"cutmix + mixup: {self.cutmix + self.mixup}; expected at most 1 together")
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
        """What is done to each image by itself, in one pass."""
        return AugmentArgs(self.pad, self.flip, self.cutout, self.fill if self.cutout else None)

    def draw(self, split: Samples, rows: Tensor) -> "DrawnSamples":
        """Draws what mixes the samples at `rows`, int64 [K] on the CPU, with others."""
        ids = split.ids_of(rows)
        if not self.mixes:
            return DrawnSamples(split, rows, ids, self, None)
        _, height, width = split.shape
        mixture = draw_mixture(
            ids,
            seed=self.seed,
            epoch=self.epoch,
            probability=self.cutmix + self.mixup,
            switch=self.cutmix / (self.cutmix + self.mixup),
            alpha=self.mixup_alpha,
            count=len(split),
            height=height,
            width=width,
        )
        return DrawnSamples(split, rows, ids, self, mixture._replace(partners=split.others(rows, mixture.partners)))

    def change(self, images: Tensor, ids: Tensor) -> Tensor:
        """What is done to each image after `args`: fp32 [n, C, H, W] of samples int64 [n] on the same device."""
        if self.rand_augment is not None:
            images = rand_augment(
                images, ids, seed=self.seed, epoch=self.epoch, magnitude=self.rand_augment, fill=self.fill
            )
        if self.erase and self.fill is not None:
            _, _, height, width = images.shape
            seed, epoch = self.seed, self.epoch
            boxes = draw_erase(ids, seed=seed, epoch=epoch, probability=self.erase, height=height, width=width)
            images = erase(images, boxes, ids, seed=seed, epoch=epoch, mean=self.fill, std=self.erase_std)
        return images


class DrawnSamples(NamedTuple):
    """Samples of a split, in the order in which they come, and what was drawn for them; on the CPU.

    The partners of `mixture` are rows.
    """

    split: Samples
    rows: Tensor
    ids: Tensor
    recipe: Recipe
    mixture: Mixture | None

    def request(self, places: Tensor) -> Request:
        """The images that the samples at `places`, int64 [n], are made of: their own, then those mixed into them."""
        rows, ids = self.rows[places], self.ids[places]
        if self.mixture is not None:
            mixture = self.mixture.part(places)
            partners = mixture.partners[mixture.mixes]
            rows, ids = torch.cat([rows, partners]), torch.cat([ids, self.split.ids_of(partners)])
        return Request(rows, ids, mix_seed(self.recipe.seed, self.recipe.epoch))

    def batch(self, places: Tensor, augmented: Tensor, whole_size: int) -> Batch:
        """The samples at `places`, made of the images of `request`, as a share of a batch of `whole_size`."""
        request, device, count = self.request(places), augmented.device, len(places)
        augmented = self.recipe.change(augmented, request.ids.to(device, non_blocking=True))
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
        if self.recipe.mixup:
            images = blend_images(images, content, mixture.blend)
        share = mixture.own_share(*augmented.shape[2:])
        mixed = mixed_labels(labels, partner_labels, share, num_classes=self.recipe.num_classes or 0)
        return Batch(replace_boxes(images, mixture.boxes, content), mixed, ids, whole_size)

"""What is done to the images of an epoch: drawn for the whole epoch, applied batch by batch."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from awp_engine.data._augment import Windows, apply_windows, draw_windows
from awp_engine.data._dataset import Split
from awp_engine.data._mixing import Boxes, draw_cutmix, draw_cutout, mixed_labels, replace_boxes


class Batch(NamedTuple):
    """images: fp32 [B, C, H, W] in [0, 1]; labels: int64 [B], or fp32 [B, classes] under CutMix; ids: int64 [B].

    Extra images are those with an id of at least the data set's `first_extra_id`.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


class Recipe(NamedTuple):
    """The arguments of `train_batches` that images and labels depend on."""

    seed: int
    epoch: int
    pad: int
    flip: bool
    cutout: int
    fill: tuple[float, ...] | None
    cutmix: float
    num_classes: int | None

    def check(self, split: Split, name: str) -> None:
        """Whether the images of a split can be made so; `name` is the split's in messages.

        Raises:
            ValueError: an argument is out of range or missing, or does not fit the split.
        """
        channels = split.images.shape[1]
        if self.pad < 0:
            raise ValueError(f"pad: {self.pad}; expected at least 0 pixels")
        if self.cutout < 0:
            raise ValueError(f"cutout: {self.cutout}; expected at least 0 pixels")
        if self.cutout > 0 and not (
            self.fill is not None and len(self.fill) == channels and all(0 <= value <= 1 for value in self.fill)
        ):
            raise ValueError(f"fill: {self.fill}; expected {channels} values in [0, 1], one a channel, for cutout")
        if not 0 <= self.cutmix <= 1:
            raise ValueError(f"cutmix: {self.cutmix}; expected a probability, 0 to 1")
        if self.cutmix > 0:
            if len(split) < 2:
                raise ValueError(f"{name}: {len(split)} images; expected at least 2 for cutmix")
            needed = int(split.labels.max()) + 1
            if self.num_classes is None or self.num_classes < needed:
                raise ValueError(
                    f"num_classes: {self.num_classes}; expected at least {needed} for cutmix, by the labels of {name}"
                )

    def draw(self, split: Split, rows: Tensor) -> "Drawn":
        """Draws all that is random about the samples at `rows`, int64 [K].

        At once: a few large operations instead of a few hundred small ones a batch.
        """
        fill = torch.tensor(self.fill or 0.0, dtype=torch.float32, device=split.images.device).view(-1, 1, 1)
        own = self._look(split, rows)
        if self.cutmix == 0 or self.num_classes is None:
            return Drawn(split, own, None, fill)
        height, width = split.images.shape[2:]
        numbers, boxes = draw_cutmix(
            split.ids[rows],
            seed=self.seed,
            epoch=self.epoch,
            probability=self.cutmix,
            count=len(split),
            height=height,
            width=width,
        )
        # Numbered by id, so that the order of the split does not matter.
        by_id = torch.argsort(split.ids, stable=True)
        number_of_row = torch.argsort(by_id, stable=True)
        partners = by_id[numbers + (numbers >= number_of_row[rows])]
        return Drawn(split, own, _Mix(self._look(split, partners), boxes, self.num_classes), fill)

    def _look(self, split: Split, rows: Tensor) -> "_Look":
        ids = split.ids[rows]
        windows = draw_windows(ids, seed=self.seed, epoch=self.epoch, pad=self.pad, flip=self.flip)
        if self.cutout == 0:
            return _Look(rows, windows, None)
        height, width = split.images.shape[2:]
        squares = draw_cutout(ids, seed=self.seed, epoch=self.epoch, size=self.cutout, height=height, width=width)
        return _Look(rows, windows, squares)


class _Look(NamedTuple):
    """Which images, int64 [K], and what their own augmentation does to them."""

    rows: Tensor
    windows: Windows | None
    squares: Boxes | None

    def part(self, piece: slice) -> Self:
        windows = None if self.windows is None else self.windows.part(piece)
        squares = None if self.squares is None else self.squares.part(piece)
        return type(self)(self.rows[piece], windows, squares)


class _Mix(NamedTuple):
    """What CutMix puts into each of the images."""

    partners: _Look
    boxes: Boxes
    num_classes: int


class Drawn(NamedTuple):
    """Samples of a split, in the order in which they come, and all that was drawn for them."""

    split: Split
    own: _Look
    mix: _Mix | None
    fill: Tensor  # [C, 1, 1]

    @property
    def ids(self) -> Tensor:
        """int64 [K]."""
        return self.split.ids[self.own.rows]

    def samples(self, piece: slice) -> Batch:
        """Makes the images and labels of some of them."""
        own = self.own.part(piece)
        images, labels, ids = self._images(own), self.split.labels[own.rows], self.split.ids[own.rows]
        if self.mix is None:
            return Batch(images, labels, ids)
        partners, boxes = self.mix.partners.part(piece), self.mix.boxes.part(piece)
        return Batch(
            replace_boxes(images, boxes, self._images(partners)),
            mixed_labels(
                labels,
                self.split.labels[partners.rows],
                boxes.share_outside(*images.shape[2:]),
                num_classes=self.mix.num_classes,
            ),
            ids,
        )

    def _images(self, look: _Look) -> Tensor:
        images = apply_windows(self.split.images[look.rows], look.windows)
        return images if look.squares is None else replace_boxes(images, look.squares, self.fill)

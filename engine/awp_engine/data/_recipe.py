"""What is done to the images of an epoch, drawn by (seed, epoch, sample id)."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from awp_engine.data._framing import Images, Request, Requests
from awp_engine.data._mixing import Boxes, draw_cutmix, mixed_labels, replace_boxes
from awp_engine.data._split import Look
from awp_kernels.philox import mix_seed


class Batch(NamedTuple):
    """images: fp32 [B, C, H, W] in [0, 1]; labels: int64 [B], or fp32 [B, classes] under CutMix; ids: int64 [B].

    Extra images are those with an id of at least the data set's `first_extra_id`.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


class Samples(Protocol):
    """What batches are made of: a `Split`, a `StreamedSplit` or `ExtraImages`."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def largest_label(self) -> int: ...

    def __len__(self) -> int: ...

    def ids_of(self, rows: Tensor) -> Tensor: ...

    def labels_of(self, rows: Tensor) -> Tensor: ...

    def others(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """The rows of the images that are number `numbers`, in [0, len - 1), among all but `rows`, by their ids."""
        ...

    def looks(self, requests: Requests, look: Look, memory_format: torch.memory_format) -> Images: ...


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
        if self.cutout > 0 and not (
            self.fill is not None and len(self.fill) == channels and all(0 <= value <= 1 for value in self.fill)
        ):
            raise ValueError(f"fill: {self.fill}; expected {channels} values in [0, 1], one a channel, for cutout")
        if not 0 <= self.cutmix <= 1:
            raise ValueError(f"cutmix: {self.cutmix}; expected a probability, 0 to 1")
        if self.cutmix > 0:
            if len(split) < 2:
                raise ValueError(f"{name}: {len(split)} images; expected at least 2 for cutmix")
            needed = split.largest_label + 1
            if self.num_classes is None or self.num_classes < needed:
                raise ValueError(
                    f"num_classes: {self.num_classes}; expected at least {needed} for cutmix, by the labels of {name}"
                )

    @property
    def look(self) -> Look:
        """What is done to each image by itself."""
        return Look(self.pad, self.flip, self.cutout, self.fill if self.cutout else None)

    def draw(self, split: Samples, rows: Tensor) -> "Drawn":
        """Draws what mixes the samples at `rows`, int64 [K] on the CPU, with others."""
        ids, seed = split.ids_of(rows), mix_seed(self.seed, self.epoch)
        if self.cutmix == 0 or self.num_classes is None:
            return Drawn(split, rows, ids, seed, None)
        _, height, width = split.shape
        numbers, boxes = draw_cutmix(
            ids,
            seed=self.seed,
            epoch=self.epoch,
            probability=self.cutmix,
            count=len(split),
            height=height,
            width=width,
        )
        return Drawn(split, rows, ids, seed, _Mix(split.others(rows, numbers), boxes, self.num_classes))


class _Mix(NamedTuple):
    """What CutMix puts into each of the images: int64 [K] rows of others, and where."""

    others: Tensor
    boxes: Boxes
    num_classes: int


class Drawn(NamedTuple):
    """Samples of a split, in the order in which they come, and what was drawn for them; on the CPU."""

    split: Samples
    rows: Tensor
    ids: Tensor
    seed: int
    mix: _Mix | None

    def request(self, places: Tensor) -> Request:
        """The images that the samples at `places`, int64 [n], are made of: their own, then those mixed into them."""
        rows, ids = self.rows[places], self.ids[places]
        if self.mix is not None:
            others = self.mix.others[places][self.mix.boxes.part(places).nonempty]
            rows, ids = torch.cat([rows, others]), torch.cat([ids, self.split.ids_of(others)])
        return Request(rows, ids, self.seed)

    def batch(self, places: Tensor, looks: Tensor) -> Batch:
        """The samples at `places`, made of the images of `request`."""
        device, rows = looks.device, self.rows[places]
        labels, ids = self.split.labels_of(rows), self.ids[places].to(device, non_blocking=True)
        if self.mix is None:
            return Batch(looks, labels, ids)
        boxes, count = self.mix.boxes.part(places), len(places)
        mixed = boxes.nonempty
        # who is not mixed has an empty box of itself
        content = torch.where(mixed, count - 1 + mixed.cumsum(0), torch.arange(count)).to(device, non_blocking=True)
        boxes = Boxes(*(field.to(device, non_blocking=True) for field in boxes))
        return Batch(
            replace_boxes(looks[:count], boxes, looks[content]),
            mixed_labels(
                labels,
                self.split.labels_of(self.mix.others[places]),
                boxes.share_outside(*looks.shape[2:]),
                num_classes=self.mix.num_classes,
            ),
            ids,
        )

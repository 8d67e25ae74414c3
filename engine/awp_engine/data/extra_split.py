"""Extra training images as batches take them: in the device's memory, or gathered from files batch by batch."""

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from awp_engine.data.extra import ExtraImages
from awp_engine.data.framing import Framing, Images, Requests
from awp_engine.data.loaders.choose import Loading
from awp_engine.data.split import AugmentArgs, Loader, Split, augment_streamed


@dataclass(frozen=True, kw_only=True)
class ExtraSplit:
    """Extra images of any number: nothing is kept of each of them, labels and ids are found when they are wanted.

    Attributes:
        images: where they lie.
        loader: what makes them.
    """

    images: ExtraImages
    loader: Loader

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.images.store.shape

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.loader.device

    @property
    def largest_label(self) -> int:
        """The largest that there may be."""
        return self.images.classes - 1

    def others(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """As `Split.others`; ids rise with the rows."""
        return numbers + (numbers >= rows)

    def ids_of(self, rows: Tensor) -> Tensor:
        """As `Split.ids_of`."""
        return self.images.ids(rows)

    def labels_of(self, rows: Tensor) -> Tensor:
        """As `Split.labels_of`."""
        return self.images.labels(rows).to(self.device, non_blocking=True)

    def augmented(self, requests: Requests, args: AugmentArgs, memory_format: torch.memory_format) -> Images:
        """As `Split.augmented`."""
        streamed = self.loader.stream(self.images.store, requests.nonempty())
        with contextlib.closing(streamed):
            yield from augment_streamed(streamed, requests, args, memory_format, shape=self.shape, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Extra images, what makes their batches ("resident", "dali" or "torch"), and their fingerprint."""

    split: Split | ExtraSplit
    loader: str
    fingerprint: str


def place_extra(images: ExtraImages, loading: Loading) -> Extra:
    """Extra images where `loading` wants them, as they are; auto weighs them by themselves, after the data set."""
    loading = replace(loading, framing=Framing())
    loader = loading.choose(images.store, len(images), images.store.shape)
    split: Split | ExtraSplit
    if loader == "resident":
        split = images.resident().to(loading.device)
    else:
        split = ExtraSplit(images=images, loader=loading.open(loader, images.store, images.store.shape))
    return Extra(split=split, loader=loader, fingerprint=images.store.digest())

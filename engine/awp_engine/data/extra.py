"""Extra training images, such as generated or pseudo-labelled ones, from .npz or .npy files of any size.

They lie in the device's memory, or are gathered from files batch by batch.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from awp_engine.data.dataset import DataError, Dataset
from awp_engine.data.loaders.choose import Loading
from awp_engine.data.loaders.framing import Framing, Images, Requests
from awp_engine.data.sets.shards import ArrayShards
from awp_engine.data.sets.sources import CLASSES, read_classes
from awp_engine.data.split import AugmentArgs, Loader, Split, augment_streamed
from awp_engine.models.class_names import difference


@dataclass(frozen=True, kw_only=True)
class ExtraImages:
    """Images beside a data set's own, where they lie.

    Attributes:
        store: the images and labels.
        first_id: the first one's; those of the others follow.
        classes: labels are 0 to classes - 1.
    """

    store: ArrayShards
    first_id: int
    classes: int

    def __len__(self) -> int:
        return len(self.store)

    def ids_of(self, rows: Tensor) -> Tensor:
        """int64 [n], of rows int64 [n]."""
        return rows + self.first_id

    def labels_of(self, rows: Tensor) -> Tensor:
        """int64 [n], of rows int64 [n]."""
        return self.store.labels(rows)

    def resident(self) -> Split:
        """All of them in memory, on the CPU."""
        rows = torch.arange(len(self))
        return Split(images=self.store.gather(rows).contiguous(), labels=self.labels_of(rows), ids=self.ids_of(rows))


def load_extra(path: Path, *, like: Dataset) -> ExtraImages:
    """Opens extra training images for a data set, and reads all of their labels once.

    The files are as `ArrayShards` describes them: an .npz file as `numpy.savez` writes it with `image`, uint8
    [N, H, W, C] or [N, C, H, W], and `label`, whole numbers [N]; or a directory of many, or of .npy files. Where both
    orders fit, the first is meant. Nothing is unpickled.

    Args:
        path: a file or a directory.
        like: the data set to be extended, which decides the images' shape and the classes.

    Returns:
        The images in the files' order. Their ids go on from `like.first_extra_id`, so that no id is given twice.

    Raises:
        DataError: a file is missing or damaged, or an array is missing, or has another shape or type, or holds labels
            out of range.
    """
    for known in (path / CLASSES, path.parent / CLASSES):
        # as they are packed: images-*.npy in a directory, its list beside it
        if path.is_dir() and known.is_file() and like.named and (names := read_classes(known)) != like.class_names:
            raise DataError(
                f"--data.extra {path}: the classes of {known} are not those of {like.name}: "
                f"{difference(names, like.class_names)}; give extra images of the same classes in the same order"
            )
    store = ArrayShards(path, shape=like.train.shape, like=like.name)
    store.require_labels(len(like.class_names), like.name)
    return ExtraImages(store=store, first_id=like.first_extra_id, classes=len(like.class_names))


@dataclass(frozen=True, kw_only=True)
class ExtraSplit(ExtraImages):
    """Extra images of any number: nothing is kept of each of them, labels and ids are found when they are wanted.

    Attributes:
        loader: what makes them.
    """

    loader: Loader

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.store.shape

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.loader.device

    @property
    def largest_label(self) -> int:
        """The largest that there may be."""
        return self.classes - 1

    def others(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """As `Split.others`; ids rise with the rows."""
        return numbers + (numbers >= rows)

    def labels_of(self, rows: Tensor) -> Tensor:
        """As `Split.labels_of`."""
        return super().labels_of(rows).to(self.device, non_blocking=True)

    def augmented(self, requests: Requests, args: AugmentArgs, memory_format: torch.memory_format) -> Images:
        """As `Split.augmented`."""
        streamed = self.loader.stream(self.store, requests.nonempty())
        return augment_streamed(self, streamed, requests, args, memory_format)


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
        split = ExtraSplit(**vars(images), loader=loading.open(loader, images.store, images.store.shape))
    return Extra(split=split, loader=loader, fingerprint=images.store.digest())

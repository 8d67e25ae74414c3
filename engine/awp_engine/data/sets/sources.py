"""Data sets that are read from their files while they are used, by name."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from awp_engine.data.dataset import DataError, Statistics
from awp_engine.data.sets.files import FileImages, Listing, list_classes, shown
from awp_engine.data.sets.huggingface import HuggingFaceImages
from awp_engine.data.sets.imagenet import IMAGENET_STATISTICS, list_imagenet, list_tiny_imagenet
from awp_engine.data.sets.shards import ArrayShards
from awp_engine.data.sets.store import EncodedImages, ImageArrays
from awp_engine.data.sets.tar import TarImages


@dataclass(frozen=True)
class Source:
    """A data set where it lies.

    Attributes:
        train, test: the images of both parts.
        train_labels, test_labels: int64 [N], of every row.
        class_names: one a label.
        named: as that of `Dataset`.
        statistics: mean and standard deviation, one value a channel of images in [0, 1], where the data set has
            customary ones.
    """

    train: EncodedImages | ImageArrays
    train_labels: Tensor
    test: EncodedImages | ImageArrays
    test_labels: Tensor
    class_names: tuple[str, ...]
    named: bool = True
    statistics: Statistics | None = None


def open_source(name: str, root: Path, *, skip: frozenset[str] = frozenset()) -> Source:
    """Lists a data set's images without reading them.

    Args:
        name: one of `source_names`.
        root: the directory that holds its files: train and test (or val) for `folder`; train and val for `imagenet` and
            `tiny-imagenet`, as unpacked; train/*.tar and test/*.tar for `webdataset`; train and test with *.npz or
            images-*.npy and labels-*.npy for `shards`; what `save_to_disk` wrote for `huggingface`. The classes' names
            are the folders', the column's, or in classes.json, a list.
        skip: files to leave out, relative to `root`, in the form of `listed_name`.

    Raises:
        DataError: the data set is unknown, or its files are missing or not as they should be.
    """
    if name not in _OPEN:
        raise DataError(f"data set: unknown name {name!r}; expected one of {', '.join(_OPEN)}")
    if not root.is_dir():
        raise DataError(f"--data.root {root} is not a directory; expected the one that holds the files of {name}")
    try:
        return _OPEN[name](root, skip)
    except OSError as error:
        where = shown(error.filename or root)
        raise DataError(f"{where} cannot be read: {error.strerror}; expected a file or directory of {name}") from error


def _open_folder(root: Path, skip: frozenset[str]) -> Source:
    return _of_files(*(list_classes(part, skip=skip) for part in (root / "train", _first_of(root, "test", "val"))))


def _open_imagenet(root: Path, skip: frozenset[str]) -> Source:
    return _of_files(*list_imagenet(root, skip), statistics=IMAGENET_STATISTICS)


def _open_tiny_imagenet(root: Path, skip: frozenset[str]) -> Source:
    return _of_files(*list_tiny_imagenet(root, skip))


def _open_webdataset(root: Path, skip: frozenset[str]) -> Source:
    test_part = _first_of(root, "test", "val")
    train, test = TarImages(root / "train", skip=skip), TarImages(test_part, skip=skip)
    names = _class_names(root, int(train.labels.max()))
    for part, images in ((root / "train", train), (test_part, test)):
        wrong = torch.nonzero(images.labels >= len(names))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{images.name(row)} has label {int(images.labels[row])}; expected 0 to {len(names) - 1} in {part}, by "
                f"{'the labels of train' if not (root / CLASSES).is_file() else root / CLASSES}"
            )
    return Source(train, train.labels, test, test.labels, names, named=(root / CLASSES).exists())


def _open_shards(root: Path, skip: frozenset[str]) -> Source:
    if skip:
        raise DataError(
            f"{root}: images in shards cannot be skipped one by one, as {min(skip)!r} was to be; expected no list, or "
            "shards packed anew without it"
        )
    train = ArrayShards(root / "train")
    test = ArrayShards(_first_of(root, "test", "val"), shape=train.shape, like=str(root / "train"))
    labels = train.all_labels()
    names = _class_names(root, int(labels.max()))
    for shards in (train, test):
        shards.require_labels(len(names), str(root / "train"))
    return Source(train, labels, test, test.all_labels(), names, named=(root / CLASSES).exists())


def _open_huggingface(root: Path, skip: frozenset[str]) -> Source:
    test_part = _first_of(root, "test", "validation")
    train, test = HuggingFaceImages(root / "train", skip=skip), HuggingFaceImages(test_part, skip=skip)
    if train.class_names != test.class_names:
        given, expected = (", ".join(names.class_names[:5]) for names in (test, train))
        raise DataError(
            f"{test_part} has the classes {given}, ... and train {expected}, ...; both need the same ones in one order"
        )
    # numbers are what datasets makes up where only how many there are was given
    named = train.class_names != tuple(map(str, range(len(train.class_names))))
    return Source(train, train.labels, test, test.labels, train.class_names, named)


def _first_of(root: Path, *names: str) -> Path:
    """The first part that is there; the first one by name, for messages, if none is."""
    return next((root / name for name in names if (root / name).is_dir()), root / names[0])


def _class_names(root: Path, highest: int) -> tuple[str, ...]:
    """Those of ROOT/classes.json, or numbers."""
    path = root / CLASSES
    if not path.exists():
        if highest >= _MOST_CLASSES:
            raise DataError(
                f"{root / 'train'} has the label {highest}; expected fewer than {_MOST_CLASSES:,} classes, counted "
                "from 0: correct the labels"
            )
        return tuple(map(str, range(max(highest + 1, 2))))
    return read_classes(path)


def read_classes(path: Path) -> tuple[str, ...]:
    """The names in a list of classes, classes.json, in the labels' order.

    Raises:
        DataError: it is no list of different names.
    """
    try:
        # a pipe would be waited for
        if not path.is_file():
            raise ValueError("not a file")
        names = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}; expected a list of names, one a class") from error
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not is_list or len(names) < 2 or len(set(names)) != len(names):
        raise DataError(f"{path} is no list of at least 2 different names; expected one a class, in the labels' order")
    return tuple(names)


def _of_files(train: Listing, test: Listing, *, statistics: Statistics | None = None) -> Source:
    # labels mean the same in both parts only then
    for name in test.class_names:
        if name not in train.class_names:
            where = shown(test.part / name)
            raise DataError(f"{where}: class {name!r} is not in {train.part}; both need the same classes")
    for name in train.class_names:
        if name not in test.class_names:
            raise DataError(f"{test.part} lacks class {name!r} of {train.part}; both need the same classes")
    images, test_images = (FileImages(listing.part, listing.names) for listing in (train, test))
    return Source(images, train.labels, test_images, test.labels, train.class_names, statistics=statistics)


CLASSES = "classes.json"
# more than any data set has, and few enough that one damaged label does not fill the memory with names
_MOST_CLASSES = 10**6
_OPEN: dict[str, Callable[[Path, frozenset[str]], Source]] = {
    "folder": _open_folder,
    "tiny-imagenet": _open_tiny_imagenet,
    "imagenet": _open_imagenet,
    "webdataset": _open_webdataset,
    "shards": _open_shards,
    "huggingface": _open_huggingface,
}
source_names = tuple(_OPEN)

"""Data sets that are read from their files while they are used, by name."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from awp_engine.config.data_sets import where_to_get
from awp_engine.data.dataset import DataError, Statistics
from awp_engine.data.sets.cifar import cifar_in
from awp_engine.data.sets.files import (
    IMAGE_NAMES,
    TEST_PARTS,
    FileImages,
    Listing,
    has_class_folders,
    list_classes,
    shown,
)
from awp_engine.data.sets.huggingface import HuggingFaceImages
from awp_engine.data.sets.imagenet import (
    IMAGENET_STATISTICS,
    is_tiny_imagenet,
    list_imagenet,
    list_tiny_imagenet,
    list_tiny_val,
)
from awp_engine.data.sets.shards import ArrayShards
from awp_engine.data.sets.store import EncodedImages, ImageArrays
from awp_engine.data.sets.tar import TarImages


@dataclass(frozen=True)
class Source:
    """A data set where it lies.

    Attributes:
        train, test: the images of both parts; train is None where only a test part lies there, and may.
        train_labels, test_labels: int64 [N], of every row.
        class_names: one a label.
        named: as that of `Dataset`.
        statistics: mean and standard deviation, one value a channel of images in [0, 1], where the data set has
            customary ones.
        notes: what a user should know of how the files were taken, a line each.
    """

    train: EncodedImages | ImageArrays | None
    train_labels: Tensor
    test: EncodedImages | ImageArrays
    test_labels: Tensor
    class_names: tuple[str, ...]
    named: bool = True
    statistics: Statistics | None = None
    notes: tuple[str, ...] = ()


def open_source(name: str, root: Path, *, skip: frozenset[str] = frozenset(), need_train: bool = True) -> Source:
    """Lists a data set's images without reading them.

    Args:
        name: one of `source_names`.
        root: the directory that holds its files: train and one of `TEST_PARTS` for `folder`; train and val for
            `imagenet` and `tiny-imagenet`, as unpacked; train/*.tar and test/*.tar for `webdataset`; train and test
            with *.npz or images-*.npy and labels-*.npy for `shards`; what `save_to_disk` wrote for `huggingface`. The
            classes' names are the folders', the column's, or in classes.json, a list.
        skip: files to leave out, relative to `root`, in the form of `listed_name`.
        need_train: else the training part may be missing; test images may then lie in `root` itself.

    Raises:
        DataError: the data set is unknown, or its files are missing or not as they should be.
    """
    if name not in _OPEN:
        raise DataError(f"data set: unknown name {name!r}; expected one of {', '.join(_OPEN)}")
    if not root.is_dir():
        raise DataError(f"--data.root {root} is not a directory; expected the one that holds the files of {name}")
    try:
        if not need_train and not (root / "train").exists():
            return _TEST_ONLY[name](root, skip)
        return _OPEN[name](root, skip)
    except DataError as error:
        if (root / "train").is_dir():
            raise
        raise DataError(f"{error}{where_to_get(name)}") from error
    except OSError as error:
        where = shown(error.filename or root)
        raise DataError(f"{where} cannot be read: {error.strerror}; expected a file or directory of {name}") from error


def _open_folder(root: Path, skip: frozenset[str]) -> Source:
    if not (root / "train").is_dir() and (cifar := cifar_in(root)) is not None:
        raise DataError(f"{root} holds the files of {cifar}, not class folders: give --data.name {cifar}")
    test = _first_of(root, *TEST_PARTS)
    source = _of_files(list_classes(root / "train", skip=skip), list_classes(test, skip=skip))
    taken = () if test.name == "test" else (f"{test} is taken as the test split, as there is no test folder",)
    return dataclasses.replace(source, notes=taken)


def _open_imagenet(root: Path, skip: frozenset[str]) -> Source:
    return _of_files(*list_imagenet(root, skip), statistics=IMAGENET_STATISTICS)


def _open_tiny_imagenet(root: Path, skip: frozenset[str]) -> Source:
    return _of_files(*list_tiny_imagenet(root, skip))


def _open_webdataset(root: Path, skip: frozenset[str]) -> Source:
    test_part = _first_of(root, "test", "val")
    train, test = TarImages(root / "train", skip=skip), TarImages(test_part, skip=skip)
    names = _class_names(root, int(train.labels.max()))
    for part, images in ((root / "train", train), (test_part, test)):
        _require_labels(images, part, names, f"the labels of {root / 'train'}")
    return Source(train, train.labels, test, test.labels, names, named=(root / CLASSES).exists())


def _require_labels(images: TarImages, part: Path, names: tuple[str, ...], by: str) -> None:
    wrong = torch.nonzero(images.labels >= len(names))
    if len(wrong):
        row, given = int(wrong[0]), part.parent / CLASSES
        raise DataError(
            f"{images.name(row)} has label {int(images.labels[row])}; expected 0 to {len(names) - 1} in {part}, by "
            f"{given if given.is_file() else by}"
        )


def _open_shards(root: Path, skip: frozenset[str]) -> Source:
    _require_no_skip(root, skip)
    train = ArrayShards(root / "train")
    test = ArrayShards(_first_of(root, "test", "val"), shape=train.shape, like=str(root / "train"))
    labels = train.all_labels()
    names = _class_names(root, int(labels.max()))
    for shards in (train, test):
        shards.require_labels(len(names), str(root / "train"))
    return Source(train, labels, test, test.all_labels(), names, named=(root / CLASSES).exists())


def _require_no_skip(root: Path, skip: frozenset[str]) -> None:
    if skip:
        raise DataError(
            f"{root}: images in shards cannot be skipped one by one, as {min(skip)!r} was to be; expected no list, or "
            "shards packed anew without it"
        )


def _open_huggingface(root: Path, skip: frozenset[str]) -> Source:
    test_part = _first_of(root, "test", "validation")
    train, test = HuggingFaceImages(root / "train", skip=skip), HuggingFaceImages(test_part, skip=skip)
    if train.class_names != test.class_names:
        given, expected = (", ".join(names.class_names[:5]) for names in (test, train))
        raise DataError(
            f"{test_part} has the classes {given}, ... and train {expected}, ...; both need the same ones in one order"
        )
    return Source(train, train.labels, test, test.labels, train.class_names, _are_names(train.class_names))


def _are_names(names: tuple[str, ...]) -> bool:
    # numbers are what datasets makes up where only how many there are was given
    return names != tuple(map(str, range(len(names))))


def _test_of(images: EncodedImages | ImageArrays, labels: Tensor, names: tuple[str, ...], named: bool = True) -> Source:
    """Of a test part alone."""
    return Source(None, labels[:0], images, labels, names, named)


def _test_folder(root: Path, skip: frozenset[str]) -> Source:
    if (cifar := cifar_in(root)) is not None:
        raise DataError(f"{root} holds the files of {cifar}, not class folders: give --data.name {cifar}")
    part = _test_part(root, *TEST_PARTS)
    if part == root and not has_class_folders(root):
        raise DataError(f"{root} has no images to test on; expected test/<class>/{IMAGE_NAMES}, or <class>/* in it")
    return files_of_test(part, skip)


def _test_imagenet(root: Path, skip: frozenset[str]) -> Source:
    return dataclasses.replace(_test_folder(root, skip), statistics=IMAGENET_STATISTICS)


def _test_tiny_imagenet(root: Path, skip: frozenset[str]) -> Source:
    if not is_tiny_imagenet(root):
        return _test_folder(root, skip)
    listing = list_tiny_val(root, skip)
    return _test_of(FileImages(listing.part, listing.names), listing.labels, listing.class_names)


def files_of_test(part: Path, skip: frozenset[str] = frozenset()) -> Source:
    """The images of a folder of class folders, as a test-only data set."""
    listing = list_classes(part, skip=skip)
    return _test_of(FileImages(listing.part, listing.names), listing.labels, listing.class_names)


def _test_webdataset(root: Path, skip: frozenset[str]) -> Source:
    part = _test_part(root, "test", "val")
    test = TarImages(part, skip=skip)
    names = _class_names(root, int(test.labels.max()))
    _require_labels(test, part, names, "its own labels")
    return _test_of(test, test.labels, names, (root / CLASSES).exists())


def _test_shards(root: Path, skip: frozenset[str]) -> Source:
    _require_no_skip(root, skip)
    test = ArrayShards(_test_part(root, "test", "val"))
    labels = test.all_labels()
    names = _class_names(root, int(labels.max()))
    test.require_labels(len(names), str(root))
    return _test_of(test, labels, names, (root / CLASSES).exists())


def _test_huggingface(root: Path, skip: frozenset[str]) -> Source:
    test = HuggingFaceImages(_test_part(root, "test", "validation"), skip=skip)
    return _test_of(test, test.labels, test.class_names, _are_names(test.class_names))


def _test_part(root: Path, *names: str) -> Path:
    """The first part that is there, or `root` itself."""
    return next((root / name for name in names if (root / name).is_dir()), root)


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
_TEST_ONLY: dict[str, Callable[[Path, frozenset[str]], Source]] = {
    "folder": _test_folder,
    "tiny-imagenet": _test_tiny_imagenet,
    "imagenet": _test_imagenet,
    "webdataset": _test_webdataset,
    "shards": _test_shards,
    "huggingface": _test_huggingface,
}

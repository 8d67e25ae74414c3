"""Data sets that are read from their files while they are used, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from awp_engine.data._dataset import DataError
from awp_engine.data._files import FileImages, Listing, list_classes
from awp_engine.data._store import EncodedImages, ImageArrays


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set where it lies.

    Attributes:
        name: as given to `open_source`.
        train, test: the images of both parts.
        train_labels, test_labels: int64 [N], of every row.
        class_names: one a label.
        statistics: mean and standard deviation, one value a channel of images in [0, 1], where the data set has
            customary ones.
    """

    name: str
    train: EncodedImages | ImageArrays
    train_labels: Tensor
    test: EncodedImages | ImageArrays
    test_labels: Tensor
    class_names: tuple[str, ...]
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def open_source(name: str, root: Path, *, skip: frozenset[str] = frozenset()) -> Source:
    """Lists a data set's images without reading them.

    Args:
        name: one of `source_names`.
        root: the directory that holds its files.
        skip: files to leave out, relative to `root`, in the form of `listed_name`.

    Raises:
        DataError: the data set is unknown, or its files are missing or not as they should be.
    """
    if name not in _OPEN:
        raise DataError(f"data set: unknown name {name!r}; expected one of {', '.join(_OPEN)}")
    if not root.is_dir():
        raise DataError(f"--data.root {root} is not a directory; expected the one that holds the files of {name}")
    return _OPEN[name](root, skip)


def _open_folder(root: Path, skip: frozenset[str]) -> Source:
    test = root / "test"
    if not test.exists() and (root / "val").is_dir():
        test = root / "val"
    return _of_files("folder", root / "train", list_classes(root / "train", skip=skip), test, skip=skip)


def _of_files(
    name: str,
    train_part: Path,
    train: Listing,
    test_part: Path,
    *,
    skip: frozenset[str],
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Source:
    test = list_classes(test_part, skip=skip)
    require_same_classes(train_part, train.class_names, test_part, test.class_names)
    return Source(
        name=name,
        train=FileImages(train_part, train.names),
        train_labels=train.labels,
        test=FileImages(test_part, test.names),
        test_labels=test.labels,
        class_names=train.class_names,
        statistics=statistics,
    )


def require_same_classes(train: Path, train_names: tuple[str, ...], test: Path, test_names: tuple[str, ...]) -> None:
    """Labels mean the same in both parts only if these have the same classes.

    Raises:
        DataError: one part has a class that the other lacks.
    """
    for name in test_names:
        if name not in train_names:
            raise DataError(f"{test / name}: class {name!r} is not in {train}; both need the same classes")
    for name in train_names:
        if name not in test_names:
            raise DataError(f"{test} lacks class {name!r} of {train}; both need the same classes")


_OPEN: dict[str, Callable[[Path, frozenset[str]], Source]] = {"folder": _open_folder}
source_names = tuple(_OPEN)

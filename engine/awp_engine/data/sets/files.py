"""Images as files of a directory, train/<class>/*.jpg and the like, read when they are wanted."""

import contextlib
import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from awp_engine.data.dataset import DataError
from awp_engine.data.sets.inspect import MAX_BYTES, BadImageError
from awp_engine.files.text import printable

SUFFIXES = (b".jpg", b".jpeg", b".png", b".bmp", b".webp", b".tif", b".tiff", b".ppm", b".pgm", b".gif")
"""Of files that are taken for images; what they are is decided by their bytes, and GIF is refused by name."""
IMAGE_NAMES = "*.jpg, *.jpeg, *.png, *.bmp, *.webp, *.tif or *.ppm"
TEST_PARTS = ("test", "val", "valid", "validation")
"""Folders of test images; the first one that is there is taken."""
_SAMPLED = 1000
# what a digest reads at most of a set that is small enough to be read whole
_SMALL = 2**28
_CHUNK = 4096
_DOT = ord(".")


class PackedNames:
    """Names as bytes, joined: a list of a million paths would take 100 MB, in every process that loads images."""

    def __init__(self, joined: bytes, ends: NDArray[np.int64]) -> None:
        self.joined, self.ends = joined, ends

    @classmethod
    def pack(cls, groups: Iterable[list[bytes]]) -> "PackedNames":
        """The names of all groups, one group after the other."""
        joined, lengths = bytearray(), [np.empty(0, np.int64)]
        for names in groups:
            joined += b"".join(names)
            lengths.append(np.fromiter(map(len, names), np.int64, len(names)))
        return cls(bytes(joined), np.cumsum(np.concatenate(lengths)))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> bytes:
        if not 0 <= row < len(self.ends):
            raise IndexError(f"row {row} of {len(self.ends)}")
        return self.joined[self.ends[row - 1] if row else 0 : self.ends[row]]

    def __iter__(self) -> Iterator[bytes]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True)
class Listing:
    """What the class folders of one part of a data set hold; names are relative to the part, labels int64 [N].

    `class_names` are the folders' own: bytes that are not UTF-8 become lone surrogates, as in Python's file names.
    """

    part: Path
    names: PackedNames
    labels: Tensor
    class_names: tuple[str, ...]


class FileImages:
    """Files below a directory, by row: an `EncodedImages`.

    Args:
        root: what the names are relative to.
        names: in the order of the rows; need not be UTF-8.
    """

    def __init__(self, root: Path, names: PackedNames) -> None:
        self._root, self._names = os.fsencode(root), names

    def __len__(self) -> int:
        return len(self._names)

    def read(self, row: int) -> bytes:
        """The file's bytes.

        Raises:
            DataError: as `read_regular`.
        """
        return read_regular(self._path(row))[0]

    def name(self, row: int) -> str:
        """The file's path, with what is not printable escaped."""
        return shown(self._path(row))

    def listed(self, row: int) -> str:
        """The file as the list of a scan names it: the directory's own name and the path below it."""
        return listed_name(os.path.basename(self._root) + b"/" + self._names[row])  # noqa: PTH119

    def digest(self) -> str:
        """See `EncodedImages`; names count from the root, so that a moved directory keeps its digest."""
        with ThreadPoolExecutor(8) as pool:  # a network file system answers several at once
            chunks = pool.map(self._sizes, range(0, len(self), _CHUNK))
            return digest_files(self._names, np.concatenate([np.empty(0, np.int64), *chunks]), self.read)

    def _path(self, row: int) -> bytes:
        return self._root + b"/" + self._names[row]

    def _sizes(self, first: int) -> NDArray[np.int64]:
        rows = range(first, min(first + _CHUNK, len(self)))
        try:
            return np.array([os.stat(self._path(row)).st_size for row in rows], np.int64)  # noqa: PTH116
        except OSError as error:
            raise DataError(
                f"{shown(error.filename)} cannot be read: {error.strerror}; replace or remove it"
            ) from error


def list_classes(part: Path, *, skip: frozenset[str] = frozenset(), inside: str = "") -> Listing:
    """Lists `part`/<class>/* of `SUFFIXES`, in any case; classes and files in the order of their names.

    Other files, and names that begin with a dot, are left alone. Files are not looked at, only listed.

    Args:
        part: such as ROOT/train.
        skip: files to leave out, as `listed_name` gives them, relative to ROOT.
        inside: a folder in every class's folder that holds its images.

    Raises:
        DataError: fewer than two classes, or one without images.
    """
    try:
        return _list_classes(part, skip, inside)
    except OSError as error:
        path = shown(error.filename or part)
        raise DataError(f"{path} cannot be listed: {error.strerror}; expected class folders of images") from error


def listed_name(path: bytes | str | Path) -> str:
    """A path in lists: UTF-8 where it is, other bytes as backslash, x and two digits, backslashes doubled."""
    return os.fsencode(path).replace(b"\\", b"\\\\").decode("utf-8", errors="backslashreplace")


def shown(path: bytes | str | Path) -> str:
    """A file's name for messages."""
    return printable(listed_name(path))


def read_regular(path: bytes) -> tuple[bytes, os.stat_result]:
    """The bytes of a file, or of what a link leads to, and its status; never waits for a pipe or a device.

    Raises:
        DataError: a `BadImageError` that begins with the path as `shown` gives it: what is there is no regular file, is
            too large to be an image, cannot be read, or changes meanwhile.
    """
    name = shown(path)
    try:
        # a pipe without a writer would block the opening
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe"}
                what = kinds.get(stat.S_IFMT(status.st_mode), "a device")
                raise BadImageError(f"{name} is {what}, not a file; remove it", "unreadable")
            if status.st_size > MAX_BYTES:
                raise BadImageError(
                    f"{name} has {status.st_size:,} bytes; expected at most {MAX_BYTES:,}: remove it", "too-large"
                )
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(status.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        if os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114
            reason = "is a link to nothing"
        elif error.errno == errno.ENXIO:
            reason = "is a socket, not a file"
        raise BadImageError(f"{name} {reason}; repair or remove it", "unreadable") from error
    if len(content) != status.st_size:
        raise BadImageError(
            f"{name} ended {status.st_size - len(content)} bytes before its {status.st_size}; expected a file that "
            "stays as it is while it is read",
            "unreadable",
        )
    return content, status


def evenly(count: int, most: int = _SAMPLED) -> list[int]:
    """At most `most` of `count` rows, at even distances.

    >>> evenly(10, 4), evenly(3)
    ([0, 2, 5, 7], [0, 1, 2])
    """
    chosen = min(count, most)
    return [number * count // chosen for number in range(chosen)]


def sampled_rows(count: int, size: int) -> int:
    """How many of `count` images of `size` bytes together a digest reads: all of 256 MB, else 1,000."""
    return count if size <= _SMALL else _SAMPLED


def digest_files(names: PackedNames, sizes: NDArray[np.int64], read: Callable[[int], bytes]) -> str:
    """What `EncodedImages.digest` promises; `sizes` are the files', int64 [N]."""
    digest = hashlib.sha256(names.joined)
    digest.update(names.ends.astype("<i8").data)
    digest.update(sizes.astype("<i8").data)
    for row in evenly(len(names), sampled_rows(len(names), int(sizes.sum()))):
        digest.update(hashlib.sha256(read(row)).digest())
    return digest.hexdigest()


def hint(part: Path) -> str:
    """What may have been meant where `part` of an image folder is not as it should be; nothing if that is not clear."""
    root, meant = part.parent, ""
    if (root / "dataset_dict.json").is_file():
        meant = "--data.name huggingface"
    elif (root / "manifest.json").is_file():
        meant = "--data.name webdataset or shards, as it was packed"
    elif any(part.glob("*.np[yz]")):
        meant = "--data.name shards"
    elif root.name in ("train", *TEST_PARTS) and (root.parent / part.name).is_dir():
        meant = shown(root.parent)
    elif not part.is_dir():
        with contextlib.suppress(OSError):
            inside = [entry for entry in root.iterdir() if (entry / part.name).is_dir()]
            meant = shown(inside[0]) if len(inside) == 1 else ""
        if not meant and part.name in TEST_PARTS and has_class_folders(root / "train"):
            return f"; awp data split {shown(root / 'train')} OUT divides the images into training and test ones"
        if not meant and has_class_folders(root):
            return (
                f"; the class folders lie in {shown(root)} itself: awp data split {shown(root)} OUT divides the images "
                "into training and test ones"
            )
    return f"; did you mean {meant}?" if meant else ""


def require_classes(part: Path, found: Collection[str | bytes]) -> None:
    """Refuse a part of an image folder with fewer than two class folders.

    Raises:
        DataError: naming the only one.
    """
    if len(found) < 2:
        has = f"1 class folder, {shown(next(iter(found)))}" if found else "no class folders"
        same = " and the same as in train" if part.name in TEST_PARTS else ""
        raise DataError(f"{shown(part)} has {has}; expected at least 2{same}, each with its images{hint(part)}")


def has_class_folders(folder: Path) -> bool:
    """Whether at least two folders in `folder` hold images."""
    with contextlib.suppress(OSError):
        inside = (entry for entry in sorted(folder.iterdir()) if entry.name[0] != "." and entry.is_dir())
        return len(list(itertools.islice((entry for entry in inside if list_images(os.fsencode(entry))), 2))) == 2
    return False


def class_folders_in(root: Path) -> str | None:
    """Where in `root` class folders of images lie: "train", a test part, "." for itself; None: nowhere."""
    places = {part: root / part for part in ("train", *TEST_PARTS)} | {".": root}
    return next((name for name, place in places.items() if has_class_folders(place)), None)


def _list_classes(part: Path, skip: frozenset[str], inside: str) -> Listing:
    wanted = f"{part.name}/<class>/{inside + '/' if inside else ''}{IMAGE_NAMES}"
    if not part.is_dir():
        raise DataError(f"{shown(part)} is not a directory; expected {wanted} there{hint(part)}")
    root = os.fsencode(part)
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if entry.name[0] != _DOT and entry.is_dir())
    require_classes(part, classes)
    skipped = {name for name in skip if name.startswith(listed_name(part.name) + "/")}
    counts: list[int] = []

    def groups() -> Iterator[list[bytes]]:
        for name in classes:
            folder = name + b"/" + os.fsencode(inside) + b"/" if inside else name + b"/"
            files = list_images(root + b"/" + folder)
            found = len(files)
            if skipped:
                before = os.fsencode(part.name) + b"/" + folder
                files = [file for file in files if listed_name(before + file) not in skipped]
            if not files:
                where = shown(root + b"/" + folder.rstrip(b"/"))
                if found:
                    raise DataError(
                        f"{where} has no image left: all {found} are skipped; add some or remove the folder"
                    )
                raise DataError(f"{where} has no image; expected {IMAGE_NAMES}: add some or remove the folder")
            counts.append(len(files))
            yield [folder + file for file in files]

    names = PackedNames.pack(groups())
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(counts))
    return Listing(part, names, labels, tuple(name.decode(errors="surrogateescape") for name in classes))


def list_images(folder: bytes) -> list[bytes]:
    """The images' names in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.name[0] != _DOT)

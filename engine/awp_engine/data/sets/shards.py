"""Decoded images in .npy and .npz files of any size, memory-mapped and read by row."""

import hashlib
import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from awp_engine.data.dataset import DataError
from awp_engine.data.sets.files import evenly, sampled_rows
from awp_engine.data.sets.npy import Expect, StoredArray, alone, blocks_read, in_archive, reading

IN_MEMORY = 2**30
"""Bytes of all arrays of a set that cannot be mapped, being compressed or in Fortran's order."""
CHECKED = 4 * 2**30
"""Bytes of all .npz files of a set up to which the images' checksums are compared at opening."""

_CHUNK = 2**22
_LARGE = 2**14
# images read at once for a digest
_DIGESTED = 256


class ArrayShards:
    """Images and labels in one or many files, as one `ImageArrays`.

    A directory holds pairs `images-*.npy` and `labels-*.npy`, or `*.npz` files, or both; they count in the order of
    their names. Images are uint8 [N, H, W, C] or [N, C, H, W], labels whole numbers [N]; in an .npz file they are
    called image or images, and label or labels, and other members are left alone. What `numpy.savez` wrote is mapped
    where it lies in the file; compressed arrays are read into memory, as long as all of them take 1 GiB at most.

    Memory is a few hundred bytes a file. Mapped pages belong to the files and are given back when memory is wanted
    elsewhere. A file must not be shortened while it is mapped: the system ends a process that reads beyond its end. So
    its length is looked at before each reading; what happens in the microseconds after that look remains.

    Args:
        path: a directory, an .npz file, or the images-*.npy of a pair.
        shape: channels, height and width, where they are known. Where both orders fit, channels are last. Otherwise
            the order follows from 1 or 3 channels.
        like: in messages, what has this shape.

    Raises:
        DataError: a file is missing, damaged, truncated or pickled, or an array has another shape or type than the
            others; or checksums differ: those of labels always, those of images where all files have 4 GiB at most.
    """

    def __init__(self, path: Path, *, shape: tuple[int, int, int] | None = None, like: str = "") -> None:
        wanted = _Wanted(shape, like)
        pairs = [_open_pair(images, labels, wanted) for images, labels in _list_shards(path)]
        self._images, self._labels = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
        _require_small(self._images + self._labels)
        self._ends = np.cumsum([array.shape[0] for array in self._images], dtype=np.int64)
        self.shape = wanted.shape
        """Channels, height, width."""
        self._channels_last = wanted.channels_last
        self._mapped: dict[StoredArray, NDArray[Any]] = {}
        self._is_cold = False
        images = sum(array.size for array in self._images)
        for array in (*self._labels, *(self._images if images <= CHECKED else ())):
            array.check()
        for array in (*self._images, *self._labels):
            if not array.is_mapped:
                self._map(array)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def gather(self, rows: Tensor) -> Tensor:
        """The images of rows int64 [n], in that order: uint8 [n, C, H, W], in the files' strides.

        Raises:
            DataError: a file is no longer what it was when it was opened.
        """
        before = blocks_read()
        images = self._gather(self._images, rows, np.dtype(np.uint8), ask=self._is_cold)
        self._is_cold = blocks_read() > before
        return images.permute(0, 3, 1, 2) if self._channels_last else images

    def labels(self, rows: Tensor) -> Tensor:
        """int64 [n] of the same rows.

        Raises:
            DataError: as in `gather`.
        """
        return self._gather(self._labels, rows, np.dtype(np.int64))

    def all_labels(self) -> Tensor:
        """int64 [N], in memory."""
        out = torch.empty(len(self), dtype=torch.int64)
        for first, labels, _ in self._label_chunks():
            out[first : first + len(labels)] = torch.from_numpy(labels.astype(np.int64))
        return out

    def require_labels(self, classes: int, of: str) -> None:
        """Looks at all labels, some millions at a time.

        Raises:
            DataError: one is not in 0 to classes - 1; `of` says whose classes these are.
        """
        for _, labels, where in self._label_chunks():
            wrong = np.flatnonzero((labels < 0) | (labels >= classes))
            if len(wrong):
                array, first = where
                raise DataError(
                    f"{array.path}: image {first + wrong[0]} has label {labels[wrong[0]]}; expected 0 to "
                    f"{classes - 1}, the classes of {of}"
                )

    def digest(self) -> str:
        """See `ImageArrays`; how the images are spread over files, and in which order of axes, does not matter."""
        digest = hashlib.sha256(repr((len(self), self.shape)).encode())
        for _, labels, _ in self._label_chunks():
            digest.update(labels.astype("<i8").data)
        rows = torch.tensor(evenly(len(self), sampled_rows(len(self), len(self) * math.prod(self.shape))))
        for chunk in rows.split(_DIGESTED):
            digest.update(self.gather(chunk).contiguous().numpy().data)
        return digest.hexdigest()

    def _gather(
        self, arrays: tuple[StoredArray, ...], rows: Tensor, dtype: np.dtype[Any], *, ask: bool = False
    ) -> Tensor:
        places = rows.numpy()
        if len(places) and (places.min() < 0 or places.max() >= len(self)):
            raise IndexError(f"rows {places.min()} to {places.max()} of {len(self)}")
        # Ascending, so that every file is read once and from its beginning to its end.
        order = np.argsort(places, kind="stable")
        ascending = places[order]
        stops = np.searchsorted(ascending, self._ends)
        pieces, start = [], 0
        for shard in np.flatnonzero(np.diff(stops, prepend=0)):
            array, stop = arrays[shard], stops[shard]
            own_rows = ascending[start:stop] - (self._ends[shard] - array.shape[0])
            pieces.append((array, self._map(array), own_rows, slice(start, stop)))
            start = stop
        if ask:
            for array, source, own_rows, _ in pieces:
                array.ask_for(source, own_rows)
        out = np.empty((len(places), *arrays[0].shape[1:]), dtype)
        if out[:1].nbytes >= _LARGE:
            for _, source, own_rows, piece in pieces:
                for place, row in zip(order[piece].tolist(), own_rows.tolist(), strict=True):
                    out[place] = source[row]
        else:
            for array, source, own_rows, piece in pieces:
                out[piece] = array.take(source, own_rows)
            out[order] = out.copy()
        return torch.from_numpy(out)

    def _map(self, array: StoredArray) -> NDArray[Any]:
        mapped = self._mapped.get(array)
        if mapped is None:
            mapped = self._mapped[array] = array.open()
        elif array.is_mapped:
            array.require_length()
        return mapped

    def _label_chunks(self) -> Iterator[tuple[int, NDArray[Any], tuple[StoredArray, int]]]:
        """Labels in the order of the rows, with the first one's row, its file and its place there."""
        for end, array in zip(self._ends.tolist(), self._labels, strict=True):
            begin, labels = end - array.shape[0], self._map(array)
            for first in range(0, array.shape[0], _CHUNK):
                yield begin + first, labels[first : first + _CHUNK], (array, first)


class _Wanted:
    """What images have to be like; the first file decides what was left open."""

    def __init__(self, shape: tuple[int, int, int] | None, like: str) -> None:
        self._orders: dict[tuple[int, ...], bool] = {}
        self._words = "[N, H, W, C] or [N, C, H, W] with 1 or 3 channels"
        if shape is not None:
            channels, height, width = shape
            self._orders = {shape: False, (height, width, channels): True}  # the second, where both are equal
            self._words = f"[N, {height}, {width}, {channels}] or [N, {channels}, {height}, {width}]"
            self._words += f" as the images of {like}"

    def images(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str | None:
        """What was expected instead, if this is not right."""
        if not self._orders and len(shape) == 4 and (shape[3] in (1, 3) or shape[1] in (1, 3)):
            self._orders = {shape[1:]: shape[3] in (1, 3)}
        if dtype != np.uint8 or len(shape) != 4 or min(shape) < 1 or shape[1:] not in self._orders:
            # the usual form of grey images
            hint = " (of [N, H, W] make it by images[..., None])" if len(shape) == 3 else ""
            return f"uint8 {self._words}{hint}"
        self._orders = {shape[1:]: self._orders[shape[1:]]}
        if not self._words.endswith("before it"):
            self._words = f"[N, {', '.join(map(str, shape[1:]))}] as in the files before it"
        return None

    @property
    def channels_last(self) -> bool:
        return next(iter(self._orders.values()))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        a, b, c = next(iter(self._orders))
        return (c, a, b) if self.channels_last else (a, b, c)


def _list_shards(path: Path) -> list[tuple[Path, Path]]:
    """The files of images and of labels, which are the same one for .npz."""
    if path.is_file():
        if path.suffix.lower() != ".npy":
            return [(path, path)]
        if not path.name.startswith("images-"):
            raise DataError(f"{path} is no shard by its name; expected images-*.npy, with labels-*.npy beside it")
        return [(path, _labels_of(path))]
    if not path.is_dir():
        raise DataError(
            f"{path} is not a file or directory; expected an .npz file with the arrays image and label, or a directory "
            "of such files or of images-*.npy and labels-*.npy"
        )
    try:
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in (".npy", ".npz") and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path} cannot be listed: {error.strerror}; expected a directory of shards") from error
    pairs = []
    for one in found:
        if not one.is_file():
            raise DataError(f"{one} is not a file; expected a shard: remove it")
        if one.suffix.lower() == ".npz":
            pairs.append((one, one))
        elif one.name.startswith("images-"):
            pairs.append((one, _labels_of(one)))
        elif not (one.name.startswith("labels-") and (path / f"images-{one.name[7:]}").is_file()):
            raise DataError(
                f"{one} has no partner; expected pairs images-*.npy and labels-*.npy: remove or complete it"
            )
    if not pairs:
        meant = f"; did you mean {path / 'train'}?" if (path / "train").is_dir() else ""
        raise DataError(f"{path} holds no shards; expected *.npz, or images-*.npy with labels-*.npy{meant}")
    return pairs


def _labels_of(images: Path) -> Path:
    labels = images.with_name(f"labels-{images.name[7:]}")
    if not labels.is_file():
        raise DataError(f"{labels} is missing; expected the labels of {images.name}, whole numbers [N]")
    return labels


def _open_pair(images: Path, labels: Path, wanted: _Wanted) -> tuple[StoredArray, StoredArray]:
    if images == labels:
        with reading(images, "an .npz file of plain arrays") as file, zipfile.ZipFile(file) as archive:
            found = in_archive(images, file, archive, "image", wanted.images)
            return found, in_archive(images, file, archive, "label", _labels_for(found))
    with reading(images, "an .npy file of a plain array") as file:
        found = alone(images, file, wanted.images)
    with reading(labels, "an .npy file of a plain array") as file:
        return found, alone(labels, file, _labels_for(found))


def _labels_for(images: StoredArray) -> Expect:
    count = images.shape[0]

    def expect(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str | None:
        return None if dtype.kind in "iu" and shape == (count,) else f"whole numbers [{count}], one for every image"

    return expect


def _require_small(arrays: Iterable[StoredArray]) -> None:
    total = 0
    for array in arrays:
        if array.is_mapped:
            continue
        total += array.size
        if total > IN_MEMORY:
            how = "compressed" if array.compressed else "in Fortran's order"
            raise DataError(
                f"{array.path}: {array.what} is {how} and has {array.size} bytes; expected at most {IN_MEMORY} in all "
                "of such arrays, which are read into memory: write it with numpy.savez or "
                "`awp data pack`, and it is read from where it lies"
            )

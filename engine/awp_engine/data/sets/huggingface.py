"""Data sets that Hugging Face's `datasets` saved to disk (save_to_disk), read without decoding."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from awp_engine.data.dataset import DataError
from awp_engine.data.sets.files import PackedNames, digest_files, shown
from awp_engine.files.text import reason


class HuggingFaceImages:
    """The encoded images of one saved split, by row: an `EncodedImages`.

    Its image column is the one of type Image, or that called image of several; the labels are the column of type
    ClassLabel, or that called label of several.

    Args:
        part: the split's directory, such as ROOT/train, with state.json and *.arrow.
        skip: rows to leave out, as PART/ROW, PART being the directory's name.

    Raises:
        DataError: the package is missing, the files are damaged or something else, or labels are missing.
    """

    def __init__(self, part: Path, *, skip: frozenset[str] = frozenset()) -> None:
        self._part = part
        data = _load(part)
        self._column = _column(part, data, "image", "Image")
        label = _column(part, data, "label", "ClassLabel")
        self.class_names: tuple[str, ...] = tuple(data.features[label].names or ())
        """Of the column of labels."""
        self._images = _validated(part, data, self._column)
        labels = _labels(part, data, label, len(self.class_names))
        kept = None
        if skip:
            kept = np.array([row for row in range(len(labels)) if f"{part.name}/{row}" not in skip], np.int64)
            if not len(kept):
                raise DataError(f"{part} has no image left: all {len(labels)} are skipped; expected some")
        self._rows = kept
        self.labels: Tensor = labels if kept is None else labels[torch.from_numpy(kept)]
        """int64 [N]."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, row: int) -> bytes:
        """The image's bytes.

        Raises:
            DataError: the row has none, or the files are no longer there.
        """
        content = self._value(row, "bytes")
        if content is None:
            path = self._value(row, "path")
            what = "no bytes" if path is None else f"no bytes, only the path {shown(path.encode())!r}"
            raise DataError(
                f"{self.name(row)} has {what} as {self._column}; expected images inside the data set: save_to_disk "
                "takes them in where it finds the files"
            )
        return content

    def name(self, row: int) -> str:
        """The split's directory and the row in it."""
        return f"{self._part}: row {self._row(row)}"

    def digest(self) -> str:
        """See `EncodedImages`; rows have no names."""
        sizes = np.concatenate([np.empty(0, np.int64), *(_sizes(chunk) for chunk in self._opened().chunks)])
        sizes = sizes if self._rows is None else sizes[self._rows]
        return digest_files(PackedNames(b"", np.zeros(len(self), np.int64)), sizes, self.read)

    def _row(self, row: int) -> int:
        return row if self._rows is None else int(self._rows[row])

    def _value(self, row: int, field: str) -> Any:
        value = self._opened()[self._row(row)]
        return value[field].as_py() if value.is_valid else None

    def _opened(self) -> Any:
        """The column of images, mapped."""
        if self._images is None:
            self._images = _validated(self._part, _load(self._part), self._column)
        return self._images


def _load(part: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{part} needs the package datasets, which is not here ({error}); pip install datasets"
        ) from error
    if not (part / "state.json").is_file():
        raise DataError(f"{part / 'state.json'} is missing; expected a split that datasets.save_to_disk has written")
    for file in part.glob("*.arrow"):
        # a pipe would be waited for
        if not file.is_file():
            raise DataError(f"{file} is not a file; expected what datasets.save_to_disk has written: save it again")
    try:
        data = datasets.load_from_disk(str(part), keep_in_memory=False)
        if not isinstance(data, datasets.Dataset):
            raise DataError(f"{part} is a {type(data).__name__}; expected one split: give the directory above it")
        return data.flatten_indices() if data._indices is not None else data
    except DataError:
        raise
    except Exception as error:  # Damaged files raise nearly anything.
        raise _not_read(part, error) from error


def _validated(part: Path, data: Any, name: str) -> Any:
    """A column whose lengths and offsets fit its buffers; a damaged file would have the process read anywhere."""
    column = data.data.column(name)
    try:
        column.validate(full=True)
    except Exception as error:  # Arrow raises several kinds.
        raise _not_read(part, error) from error
    return column


def _not_read(part: Path, error: object) -> DataError:
    advice = "expected what datasets.save_to_disk has written: save it again"
    return DataError(f"{part}: not read, {reason(error)}; {advice}")


def _column(part: Path, data: Any, name: str, kind: str) -> str:
    found = [key for key, feature in data.features.items() if type(feature).__name__ == kind]
    if name in found:
        return name
    if len(found) != 1:
        has = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in data.features.items())
        raise DataError(f"{part} has the columns {has}; expected one {kind}, or one of several called {name}")
    return found[0]


def _labels(part: Path, data: Any, name: str, classes: int) -> Tensor:
    column = _validated(part, data, name)
    if column.null_count:
        raise DataError(f"{part}: {column.null_count} rows have no {name}; expected a class for every image")
    labels = np.asarray(column.to_numpy(), np.int64)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(
            f"{part}: row {wrong[0]} has {name} {labels[wrong[0]]}; expected 0 to {classes - 1}: a test split without "
            "labels has -1; remove it, and validation is taken"
        )
    return torch.tensor(labels)


def _sizes(chunk: Any) -> Any:
    from pyarrow.compute import call_function

    lengths = call_function("binary_length", [chunk.field("bytes")])
    return lengths.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)

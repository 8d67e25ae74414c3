"""A data set of the user's own: a Python factory that the command line names."""

import inspect
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from awp_engine.config import ConfigError
from awp_engine.config.data_sets import is_given
from awp_engine.data.dataset import DataError, RawDataset
from awp_engine.data.sets.files import evenly
from awp_engine.models.given import given_data
from awp_engine.models.user_code import load_code, told_in_one_line

Fit = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""Makes an image, uint8 [H, W, C], one of the wanted size."""

_HINT = "expected a function FACTORY(split) or FACTORY(root, split), split being 'train' or 'test'"
_ORDER = "expected pairs (image, label)"
# read twice: of random augmentation in one image of ten, 64 miss one time in a thousand
_READ_AGAIN = 64
# images that are collected between looks at the memory, where nobody says how many there are
_CHUNK = 1024
_MOST_CLASSES = 10**6
_TOLD_EVERY_S = 10.0


@dataclass(frozen=True)
class _Part:
    """Images uint8 [N, C, H, W], labels int64 [N], and the classes' names where the data say them."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] | None


class OwnData:
    """What a factory makes, read into memory as uint8.

    A factory is called as `factory(split)`, `factory(root, split)`, by the names of its parameters: `root`, and `split`
    ("train" or "test") or `train` (true or false, as torchvision's classes take it); or without any, if it gives a
    mapping with "train" and "test". Each part is a data set with a length and items by number, a sequence, an iterable,
    or a pair of arrays: images and labels. An item is (image, label), or a mapping with "image" and "label".

    Images are PIL images, or arrays or tensors [H, W], [H, W, C] or [C, H, W] with 1 or 3 channels, uint8 or floating
    point in [0, 1], which is rounded to 256 levels. Labels are whole numbers from 0 on. The classes' names are the
    attribute or key `classes` or `class_names`, or that of the data set that a part of is taken.

    Args:
        name: `package.module:factory` or `file.py:factory`. Its code is run.
        root: what is given to a factory that asks for it.
        fit: what an image goes through.
        available: bytes of memory that may be filled.
        say: is told what is read.

    Raises:
        DataError: there is no such factory.
    """

    def __init__(
        self,
        name: str,
        root: Path | None,
        *,
        fit: Fit = lambda image: image,
        available: int = sys.maxsize,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._name, self._root, self._fit, self._available, self._say = name, root, fit, available, say
        try:
            self._factory = given_data() if is_given(name) else load_code(name, "--data.name")[0]
        except ConfigError as error:
            raise DataError(str(error)) from error

    def read(self, *, need_train: bool = True) -> RawDataset:
        """Reads both parts, a sample of each twice.

        Args:
            need_train: else the training part is asked how many images it has, if it is there, and is not read.

        Raises:
            DataError: one line that names the part and the item that cannot be used; the parts differ in shape or
                classes; they do not fit into memory; or an image is another one on a second reading.
        """
        train = self._part("train") if need_train else None
        test = self._part("test")
        first = train or test
        if test.images.shape[1:] != first.images.shape[1:]:
            raise self._error(
                f"test images are {_size(test.images)}, train images {_size(first.images)}; make them one"
            )
        if None not in (first.class_names, test.class_names) and first.class_names != test.class_names:
            raise self._error("train and test have different class names; give the same ones in one order")
        count = max(int(part.labels.max()) + 1 for part in (first, test))
        names = first.class_names or test.class_names
        if names is not None and len(names) < count:
            raise self._error(
                f"a label is {count - 1}, and there are {len(names)} class names; give one for every label"
            )
        return RawDataset.of(
            None if train is None else (train.images, train.labels),
            (test.images, test.labels),
            names or tuple(map(str, range(max(count, 2)))),
            named=names is not None,
        )

    def train_length(self) -> int:
        """How many training images there are, as far as the data say it without being read; else 0."""
        try:
            return _length(self._open("train")[0]) or 0
        except DataError:
            return 0

    def _error(self, text: str) -> DataError:
        return DataError(f"--data.name: {self._name}: {text}")

    def _told(self, doing: str) -> AbstractContextManager[None]:
        return told_in_one_line(self._name, doing, "--data.name", DataError)

    def _open(self, split: str) -> tuple[Any, Any]:
        """What the factory gives for a part, and what may know the classes' names."""
        with self._told(f"its call for {split} images"):
            made = self._factory if isinstance(self._factory, Mapping) else self._call(split)
            source = naming = made
            if isinstance(made, Mapping):
                if split not in made:
                    raise self._error(f"gives a mapping of {', '.join(map(repr, made))}; expected 'train' and 'test'")
                source, naming = made[split], made if _names_in(made) is not None else made[split]
            return _Arrays(*source) if _are_arrays(source) else source, naming

    def _call(self, split: str) -> Any:
        factory = self._factory
        if not callable(factory):
            raise self._error(f"is of type {type(factory).__name__}; {_HINT}")
        try:
            parameters = inspect.signature(factory).parameters.values()
        except (TypeError, ValueError):
            raise self._error(f"has no signature that Python knows; {_HINT}") from None
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        names, required = {p.name for p in named}, [p.name for p in named if p.default is p.empty]
        # what each parameter is given
        meaning = {key: key for key in ("root", "split" if "split" in names else "train") if key in names}
        if not meaning and len(required) in (1, 2):
            meaning = dict(zip(required, ("root", "split")[-len(required) :], strict=True))
        lacking = [key for key in required if key not in meaning]
        if meaning and "root" not in meaning and len(lacking) == 1:
            # a root by another name
            meaning[lacking.pop()] = "root"
        if lacking:
            raise self._error(f"asks for {', '.join(lacking)}; {_HINT}")
        if self._root is None and any(meaning[key] == "root" for key in required):
            raise self._error("its factory asks for a root: give --data.root DIR")
        if self._root is not None and "root" not in meaning.values():
            raise self._error(f"its factory takes no root: leave out --data.root {self._root}")
        values = {"root": self._root, "split": split, "train": split == "train"}
        made = factory(**{key: values[what] for key, what in meaning.items() if values[what] is not None})
        if set(meaning.values()) <= {"root"} and not isinstance(made, Mapping):
            raise self._error(f"takes no split and gives a {type(made).__name__}; {_HINT}, or a dict of both parts")
        return made

    def _part(self, split: str) -> _Part:
        source, naming = self._open(split)
        pixels = _Memory(self._name, split, _length(source), self._available, self._say)
        numbers: list[int] = []
        for number, (image, label) in enumerate(self._pairs(source, split)):
            pixels.add(self._image(image, f"{split} image {number}"))
            numbers.append(self._label(label, f"{split} image {number}"))
        images, labels = pixels.whole(), torch.tensor(numbers, dtype=torch.int64)
        if not len(images):
            raise self._error(f"{split} has no images; expected at least one")
        if int(images.max()) <= 1:
            raise self._error(
                f"no value of the {split} images is above {int(images.max())} of 255: were they divided by 255 twice, "
                "or are they 0 and 1 as bytes? Give bytes from 0 to 255, or floating point from 0 to 1"
            )
        self._require_repeatable(split, images, labels)
        with self._told(f"asked for class names, {split}"):
            names = _names_in(naming)
        if names is not None and len(set(names)) != len(names):
            raise self._error(f"{split} has a class name twice: {', '.join(names[:6])}; give different ones")
        return _Part(images, labels, names)

    def _pairs(self, source: Any, split: str, numbers: Sequence[int] | None = None) -> Iterator[tuple[Any, Any]]:
        """The items; those with these numbers where they can be had by number, else as many from the first on."""
        count = _length(source)
        if count is None and not hasattr(source, "__iter__"):
            raise self._error(f"{split} is of type {type(source).__name__}; {_ORDER}, by number or one after the other")
        if count is not None:
            for number in range(count) if numbers is None else numbers:
                where = f"{split} item {number}"
                with self._told(where):
                    item = source[number]
                yield self._pair(item, where)
            return
        with self._told(f"iteration over {split} images"):
            items = enumerate(itertools.islice(source, None if numbers is None else len(numbers)))
            for number, item in items:
                yield self._pair(item, f"{split} item {number}")

    def _pair(self, item: Any, where: str) -> tuple[Any, Any]:
        if isinstance(item, Mapping) and {"image", "label"} <= item.keys():
            return item["image"], item["label"]
        if isinstance(item, Mapping):
            raise self._error(f"{where} has {', '.join(map(repr, item))}; expected 'image' and 'label'")
        if not isinstance(item, tuple | list) or len(item) != 2:
            what = f"{len(item)} values" if isinstance(item, tuple | list) else f"a {type(item).__name__}"
            raise self._error(f"{where} is {what}; {_ORDER}")
        return item[0], item[1]

    def _image(self, given: Any, where: str) -> NDArray[np.uint8]:
        """uint8 [H, W, C], of the wanted size."""
        if isinstance(given, Image.Image):
            if given.mode not in ("L", "RGB", "1"):
                raise self._error(f"{where} has mode {given.mode}; expected L or RGB: image.convert('RGB')")
            given, first = np.asarray(given.convert("L") if given.mode == "1" else given), False
        else:
            # where both orders fit
            first = isinstance(given, Tensor)
            with self._told(where):
                given = _array(given)
        if given.ndim == 4:
            raise self._error(f"{where} is a batch {list(given.shape)}; give the data set itself, not a DataLoader")
        if given.ndim == 2:
            given = given[:, :, None]
        first = given.ndim == 3 and given.shape[0] in (1, 3) and (first or given.shape[2] not in (1, 3))
        if given.ndim != 3 or given.shape[0 if first else 2] not in (1, 3) or 0 in given.shape:
            raise self._error(f"{where} is {list(given.shape)}; expected [H, W], [H, W, C] or [C, H, W], C = 1 or 3")
        return self._fit(self._levels(given.transpose(1, 2, 0) if first else given, where))

    def _levels(self, values: NDArray[Any], where: str) -> NDArray[np.uint8]:
        if values.dtype == np.uint8:
            return values
        low, high = values.min(), values.max()
        if values.dtype.kind != "f":
            raise self._error(
                f"{where} is {values.dtype}, {low} to {high}; expected uint8, or floating point in [0, 1]"
            )
        if not (low >= 0 and high <= 1):
            scaled = low >= 0 and 1 < high <= 255
            advice = (
                "divide by the largest value that a pixel can have, or give bytes"
                if scaled
                else ("leave out Normalize: the trained model normalises by itself")
            )
            raise self._error(f"{where} has values from {low:.4g} to {high:.4g}; expected 0 to 1: {advice}")
        return np.rint(values.astype(np.float64) * 255).astype(np.uint8)

    def _label(self, given: Any, where: str) -> int:
        with self._told(where):
            value = np.asarray(given.detach().cpu()) if isinstance(given, Tensor) else np.asarray(given)
        if value.dtype.kind not in "iu" or value.size != 1:
            what = repr(given) if value.size == 1 else f"{value.dtype} {list(value.shape)}"
            raise self._error(
                f"{where} has the label {what[:60]}; expected a whole number from 0 on: names go into an attribute "
                "`classes`, in the order of the labels"
            )
        number = int(value.reshape(()))
        if not 0 <= number < _MOST_CLASSES:
            raise self._error(f"{where} has the label {number}; expected 0 to {_MOST_CLASSES - 1:,}")
        return number

    def _require_repeatable(self, split: str, images: Tensor, labels: Tensor) -> None:
        """Compares some items with what another call of the factory gives."""
        source, _ = self._open(split)
        count, numbers = _length(source), evenly(len(images), _READ_AGAIN)
        if count is None:
            # those that can be had without reading all of them again
            numbers = list(range(min(len(images), _READ_AGAIN)))
        seen = 0
        for number, (image, label) in zip(numbers, self._pairs(source, split, numbers), strict=False):
            where = f"{split} image {number}"
            pixels = torch.from_numpy(np.array(self._image(image, where).transpose(2, 0, 1), order="C"))
            if not torch.equal(pixels, images[number]) or self._label(label, where) != int(labels[number]):
                raise self._error(
                    f"{where} is another one on a second reading: is it augmented or chosen at random, or are images "
                    "shuffled? Give plain images in a fixed order; --data.pad, --data.flip and others augment them"
                )
            seen += 1
        if seen < len(numbers) or count not in (None, len(images)):
            again = seen if count is None else count
            raise self._error(f"{split} has {len(images)} images, and {again} on a second reading; give a fixed set")


class _Arrays:
    """A pair of arrays, images and labels, by number."""

    def __init__(self, images: Any, labels: Any) -> None:
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels, expected as many of each")
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        return self._images[number], self._labels[number]


class _Memory:
    """Images as they come, in one piece of memory where their number is known."""

    def __init__(self, name: str, split: str, count: int | None, available: int, say: Callable[[str], None]) -> None:
        self._name, self._split, self._count, self._available, self._say = name, split, count, available, say
        self._pieces: list[Tensor] = []
        self._taken, self._due = 0, time.monotonic() + _TOLD_EVERY_S

    def add(self, image: NDArray[np.uint8]) -> None:
        """Takes an image uint8 [H, W, C].

        Raises:
            DataError: it has another shape than the first one, or there is no room.
        """
        height, width, channels = image.shape
        if not self._pieces:
            self._shape, known = (channels, height, width), self._count
            count = _CHUNK if known is None else known
            self._make_room(count)
            size = f"{count * image.size / 1e6:,.1f} MB" if known is not None else "as many as there are"
            number = f"{known:,} " if known is not None else ""
            self._say(f"{self._name}: reading {number}{self._split} images of {_words(self._shape)}, {size}")
        if self._shape != (channels, height, width):
            raise DataError(
                f"--data.name: {self._name}: {self._split} image {self._taken} is {_words((channels, height, width))}, "
                f"the ones before it {_words(self._shape)}; make them one, or give --data.image-size for another size"
            )
        place = self._taken - sum(map(len, self._pieces[:-1]))
        if place == len(self._pieces[-1]):
            self._make_room(_CHUNK)
            place = 0
        if time.monotonic() >= self._due:
            self._due += _TOLD_EVERY_S
            of = "" if self._count is None else f" of {self._count:,}"
            self._say(f"{self._name}: {self._taken:,}{of} {self._split} images")
        self._pieces[-1][place] = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
        self._taken += 1

    def _make_room(self, images: int) -> None:
        channels, height, width = self._shape
        size = images * channels * height * width
        # once more where pieces are put together in the end
        wanted = (1 if self._count is not None else 2) * (size + sum(piece.numel() for piece in self._pieces))
        if wanted > self._available:
            raise DataError(
                f"--data.name: {self._name}: {self._split} takes {wanted / 1e9:,.1f} GB of memory, and "
                f"{self._available / 1e9:,.1f} GB are free; write it as images-*.npy and labels-*.npy and give "
                "--data.name shards, or as files in class folders, which `awp data pack` makes shards of"
            )
        self._pieces.append(torch.empty(images, channels, height, width, dtype=torch.uint8))

    def whole(self) -> Tensor:
        """uint8 [N, C, H, W]."""
        if not self._pieces:
            return torch.empty(0, 1, 1, 1, dtype=torch.uint8)
        if len(self._pieces) == 1:
            return self._pieces[0][: self._taken]
        return torch.cat(self._pieces)[: self._taken]


def _are_arrays(source: Any) -> bool:
    """Whether it is a pair of arrays, images and labels."""
    return (
        isinstance(source, tuple | list)
        and len(source) == 2
        and all(hasattr(part, "shape") for part in source)
        and len(source[0].shape) in (3, 4)
        and len(source[1].shape) == 1
    )


def _array(given: Any) -> NDArray[Any]:
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        return (given.float() if given.dtype in (torch.bfloat16, torch.float16) else given).numpy()
    return np.asarray(given)


def _length(source: Any) -> int | None:
    """How many items there are by number; None where they come one after the other."""
    by_number = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    return len(source) if by_number and not isinstance(source, IterableDataset) else None


def _names_in(source: Any) -> tuple[str, ...] | None:
    """The classes' names: an attribute or key, also of the data set that a `Subset` is taken of."""
    while source is not None:
        for key in ("classes", "class_names"):
            found = source.get(key) if isinstance(source, Mapping) else getattr(source, key, None)
            if isinstance(found, list | tuple) and len(found) >= 2:
                return tuple(map(str, found))
        source = getattr(source, "dataset", None)
    return None


def _words(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _size(images: Tensor) -> str:
    return _words(tuple(images.shape[1:]))

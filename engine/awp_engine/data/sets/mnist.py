"""MNIST (LeCun et al., 1998) and Fashion-MNIST (Xiao et al., 2017): IDX files, plain or compressed by gzip."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from awp_engine.config.data_sets import where_to_get
from awp_engine.data.dataset import DataError, RawDataset
from awp_engine.files.text import reason

CLASS_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}
_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")}
_FILES["test"] = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
# as torchvision lays them
_FOLDERS = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
# the magic number: unsigned bytes, and how many dimensions
_UNSIGNED = 0x0800
# a header that promises more than this is damaged
_MOST_BYTES = 2**31


def read_mnist(root: Path, name: str, *, need_train: bool = True) -> RawDataset:
    """Reads the four files from `root`, or from where torchvision puts them below it.

    Args:
        root: the directory.
        name: "mnist" or "fashion-mnist".
        need_train: else the training files may be missing.

    Raises:
        DataError: a file is missing, damaged, truncated or another one.
    """
    places = (root, root / _FOLDERS[name])
    folder = next((place for place in places if _find(place, "train") or _find(place, "test")), root)
    train = _read_part(folder, "train", name) if need_train or _find(folder, "train") is not None else None
    return RawDataset.of(train, _read_part(folder, "test", name), CLASS_NAMES[name])


def _find(folder: Path, part: str) -> tuple[Path, Path] | None:
    """The files of images and of labels, None unless both are there."""
    found = []
    for name in _FILES[part]:
        # some archives write a dot before idx
        names = [stem + end for stem in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
        found += [folder / one for one in names if (folder / one).is_file()][:1]
    return (found[0], found[1]) if len(found) == 2 else None


def _read_part(folder: Path, part: str, name: str) -> tuple[Tensor, Tensor]:
    paths = _find(folder, part)
    if paths is None:
        raise DataError(
            f"{folder} holds no {part} images of {name}; expected {' and '.join(_FILES[part])}, also with .gz, there "
            f"or in {_FOLDERS[name]}{where_to_get(name)}"
        )
    images, labels = _read(paths[0], 3), _read(paths[1], 1)
    if images.shape[1:] != (28, 28):
        raise DataError(f"{paths[0]} has images of {images.shape[2]}x{images.shape[1]}; expected 28x28 as in {name}")
    if len(images) != len(labels) or not len(images):
        raise DataError(
            f"{paths[0]} has {len(images)} images and {paths[1]} {len(labels)} labels; expected as many of each, and "
            "some: download them again"
        )
    if labels.max() > 9:
        row = int(labels.argmax())
        raise DataError(f"{paths[1]}: label {labels[row]} of image {row}; expected 0 to 9: is it {name}?")
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def _read(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An array of unsigned bytes: a magic number and the lengths, big-endian 32-bit words, and the values."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = np.frombuffer(file.read(4 * (dimensions + 1)), ">u4")
            if len(header) < dimensions + 1 or header[0] != _UNSIGNED + dimensions:
                begin = header[:1].tobytes().hex(" ") or "nothing"
                expected = f"{_UNSIGNED + dimensions:08x}"
                raise DataError(
                    f"{path} begins with {begin}; expected the IDX header of {dimensions}-dimensional bytes, {expected}"
                    ": download it again"
                )
            shape = tuple(map(int, header[1:]))
            size = int(np.prod(shape, dtype=object))
            content = file.read(min(size, _MOST_BYTES) + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read: {reason(error)}; download it again") from error
    if len(content) != size:
        more = "more" if len(content) > size else f"{len(content)} bytes"
        raise DataError(
            f"{path} holds {more} after a header that promises {size} ({'x'.join(map(str, shape))}); it is truncated "
            "or damaged: download it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape).copy()

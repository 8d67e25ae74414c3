"""A folder of images, train/<class>/*.jpg and test/<class>/*.jpg (or .jpeg, .png)."""

import io
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from awp_engine.data._dataset import DataError, RawDataset

_SUFFIXES = (".jpg", ".jpeg", ".png")
# Enough images a task that handing tasks out costs nothing, few enough that all threads finish together.
_CHUNK = 64
# of the images that cannot be used, in a message
_SHOWN = 20
_THREADED_AREA = 128 * 128


def read_folder(root: Path) -> RawDataset:
    """Decodes all images; classes are the sorted names of train's folders, and files count in the order of class and
    name.

    Other files, and names that begin with a dot, are left alone.

    Raises:
        DataError: a folder is missing or empty, train and test have different classes, or images cannot be decoded or
            differ from the first one in size or in being colour (RGB) or grey (L); all such images are found.
    """
    train, class_names = _list_images(root / "train")
    test, test_class_names = _list_images(root / "test")
    for name in test_class_names:
        if name not in class_names:
            raise DataError(
                f"{root / 'test' / name}: class {name!r} is not in {root / 'train'}; both need the same classes"
            )
    for name in class_names:
        if name not in test_class_names:
            raise DataError(f"{root / 'test'} lacks class {name!r} of {root / 'train'}; both need the same classes")
    first = _first_image([path for path, _ in train])
    (train_images, unusable), (test_images, unusable_test) = (
        _decode([path for path, _ in images], first.mode, first.size) for images in (train, test)
    )
    unusable += unusable_test
    if unusable:
        others = [str(path) for path, _ in unusable[1:]]
        shown = ", ".join(others[:_SHOWN]) + (", ..." if len(others) > _SHOWN else "")
        raise DataError(unusable[0][1] + (f"; {len(others)} more cannot be used: {shown}" if others else ""))
    return RawDataset(
        train_images=train_images,
        train_labels=torch.tensor([label for _, label in train]),
        test_images=test_images,
        test_labels=torch.tensor([label for _, label in test]),
        class_names=class_names,
    )


def _first_image(paths: list[Path]) -> Image.Image:
    """The first one that can be read, in a mode that can be used: all others have to be like it."""
    refused = None
    for path in paths:
        try:
            image = _read_image(path)
            if image.mode in ("RGB", "L"):
                return image
            raise DataError(f"{path} has colour mode {image.mode}; expected RGB or L (8-bit grey): convert the images")
        except DataError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _list_images(part: Path) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    if not part.is_dir():
        raise DataError(f"{part} is not a directory; expected {part.name}/<class>/*.jpg, *.jpeg or *.png there")
    class_names = tuple(
        sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and not entry.name.startswith("."))
    )
    if len(class_names) < 2:
        raise DataError(f"{part} has {len(class_names)} class folders; expected at least 2, each with its images")
    images = []
    for label, name in enumerate(class_names):
        folder = part / name
        files = sorted(f.name for f in os.scandir(folder) if f.name.lower().endswith(_SUFFIXES) and f.name[0] != ".")
        if not files:
            raise DataError(f"{folder} has no image; expected *.jpg, *.jpeg or *.png: add some or remove the folder")
        images.extend((folder / file, label) for file in files)
    return images, class_names


def _read_image(path: Path) -> Image.Image:
    try:
        content = path.read_bytes()
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
        image.load()
    except UnidentifiedImageError as error:
        raise DataError(f"{path} cannot be decoded: it is neither JPEG nor PNG; replace or remove it") from error
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded: {error}; replace or remove it") from error
    return image


def _decode(paths: list[Path], mode: str, size: tuple[int, int]) -> tuple[Tensor, list[tuple[Path, str]]]:
    """All pixels, and the files that have none of this mode and size, with the reason."""
    channels = 3 if mode == "RGB" else 1
    pixels = np.empty((len(paths), size[1], size[0], channels), dtype=np.uint8)
    # Small images spend their time in Python, where threads only wait for each other.
    threads = min(8, os.cpu_count() or 1) if size[0] * size[1] >= _THREADED_AREA else 1
    with ThreadPoolExecutor(threads) as pool:
        tasks = [
            pool.submit(_decode_chunk, pixels[start : start + _CHUNK], paths[start : start + _CHUNK], mode, size)
            for start in range(0, len(paths), _CHUNK)
        ]
        try:
            unusable = [found for task in tasks for found in task.result()]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), unusable


def _decode_chunk(
    out: NDArray[np.uint8], paths: list[Path], mode: str, size: tuple[int, int]
) -> list[tuple[Path, str]]:
    unusable = []
    for row, path in zip(out, paths, strict=True):
        try:
            image = _read_image(path)
        except DataError as error:
            unusable.append((path, str(error)))
            continue
        if image.mode != mode or image.size != size:
            found = f"{image.mode} {image.size[0]}x{image.size[1]}"
            expected = f"{mode} {size[0]}x{size[1]} as the first image: convert all images to one size and mode"
            unusable.append((path, f"{path} is {found}; expected {expected}"))
            continue
        row[...] = np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(row.shape)
    return unusable

"""Extra training images, such as generated or pseudo-labelled ones, from an .npz file."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from awp_engine.data._dataset import DataError, Dataset, fingerprint
from awp_engine.data._split import Split


def load_extra(path: Path, *, like: Dataset) -> Split:
    """Reads extra training images for a data set into memory, on the CPU.

    The file is as `numpy.savez` or `numpy.savez_compressed` writes it, with `image`, uint8 [N, H, W, C] or
    [N, C, H, W], and `label`, whole numbers [N]; other members are left alone. Where both orders fit, the first is
    meant. Nothing is unpickled, and an array is read only after its header has been found right.

    Args:
        path: the .npz file.
        like: the data set to be extended, which decides the images' shape and the classes.

    Returns:
        The file's images, in its order. Their ids go on from `like.first_extra_id`, so that no id is given twice.

    Raises:
        DataError: the file is missing or damaged, or an array is missing, or has another shape or type, or holds labels
            out of range.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; expected an .npz file with the arrays image and label")
    try:
        with zipfile.ZipFile(path) as archive:
            images = _read_array(archive, "image", lambda shape, dtype: _expect_images(shape, dtype, like))
            labels = _read_array(archive, "label", lambda shape, dtype: _expect_labels(shape, dtype, len(images)))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # Damaged archives raise nearly anything.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path} ({path.stat().st_size} bytes): not read, {reason}; "
            "expected an .npz file of plain arrays: write or download it again"
        ) from error
    classes = len(like.class_names)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise DataError(
            f"{path}: image {wrong[0]} has label {labels[wrong[0]]}; expected 0 to {classes - 1}, "
            f"the classes of {like.name}"
        )
    _, last, _ = _orders(like)
    tensor = torch.from_numpy(images)
    if images.shape[1:] == last:
        tensor = tensor.permute(0, 3, 1, 2)
    first = like.first_extra_id
    return Split(
        images=tensor.contiguous(),
        labels=torch.from_numpy(labels.astype(np.int64)),
        ids=torch.arange(first, first + len(labels)),
    )


def extra_fingerprint(extra: Split) -> str:
    """SHA-256, hexadecimal, of the images as [N, C, H, W] and of the labels, however the file kept them."""
    return fingerprint(extra.to("cpu"), ())


def _read_array(
    archive: zipfile.ZipFile, name: str, expect: Callable[[tuple[int, ...], np.dtype[Any]], str | None]
) -> NDArray[Any]:
    """Reads one array; `expect` says what was expected of a shape and type that are not right."""
    if f"{name}.npy" not in archive.namelist():
        found = ", ".join(archive.namelist()[:6]) or "nothing"
        raise DataError(f"holds {found}; expected the arrays image and label")
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as member:
        version = npy_format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise DataError(f"{name} is in version {version[0]}.{version[1]} of the npy format; expected 1.0 or 2.0")
        read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, _, dtype = read_header(member)
        if dtype.hasobject:
            raise DataError(f"{name} holds Python objects, which are refused; expected a plain array")
        expected = expect(shape, dtype)
        if expected is not None:
            raise DataError(f"{name} is {dtype} {list(shape)}; expected {expected}")
        size = member.tell() + dtype.itemsize * int(np.prod(shape, dtype=object))
        if size != info.file_size:
            raise DataError(f"{name} has {info.file_size} bytes; expected {size} by its header: write the file again")
    with archive.open(info) as member:
        # Reads to the end, where zipfile compares the checksum.
        return npy_format.read_array(member, allow_pickle=False)


def _orders(like: Dataset) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """The shape of one image, channels first and last, and both in words."""
    channels, height, width = like.train.images.shape[1:]
    words = f"[N, {height}, {width}, {channels}] or [N, {channels}, {height}, {width}]"
    return (channels, height, width), (height, width, channels), words


def _expect_images(shape: tuple[int, ...], dtype: np.dtype[Any], like: Dataset) -> str | None:
    first, last, words = _orders(like)
    right = dtype == np.uint8 and shape[1:] in (first, last) and shape[0] > 0
    return None if right else f"uint8 {words} as the images of {like.name}"


def _expect_labels(shape: tuple[int, ...], dtype: np.dtype[Any], count: int) -> str | None:
    return None if dtype.kind in "iu" and shape == (count,) else f"whole numbers [{count}], one for every image"

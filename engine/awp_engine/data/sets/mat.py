"""Reads arrays of whole numbers from MATLAB 5 files.

By hand, as scipy's reader ends the whole process on some damaged files.
Source: MathWorks: MAT-File Format, level 5.
"""

import math
import struct
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from awp_engine.data.dataset import DataError

_HEADER_BYTES = 128
_MATRIX, _COMPRESSED = 14, 15
# an element's head and what 32 bits can announce
_LARGEST = 8 + 2**32
_STORED = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 12: "<i8", 13: "<u8"}
_CLASSES = (
    *("nothing", "cell", "struct", "object", "char", "sparse", "double", "single"),
    *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
)
_COMPLEX = 0x800


class MatArray(NamedTuple):
    """A variable of a file.

    Attributes:
        kind: MATLAB's name of its class, such as uint8 or double.
        shape: its dimensions, at least 2.
        values: of dtype `kind` and that shape; None for classes other than real whole numbers.
    """

    kind: str
    shape: tuple[int, ...]
    values: NDArray[Any] | None

    def __str__(self) -> str:
        return f"{self.kind} {list(self.shape)}"


def read_mat(path: Path, names: Collection[str]) -> dict[str, MatArray]:
    """Reads the variables called `names`, those of them that are there; others are left alone.

    Raises:
        DataError: the file is of another format or damaged.
    """
    content = path.read_bytes()
    try:
        if len(content) < _HEADER_BYTES or content[124:128] != b"\x00\x01IM":
            raise ValueError("no MATLAB 5 header of little-endian order")
        found: dict[str, MatArray] = {}
        for kind, body in _elements(memoryview(content)[_HEADER_BYTES:], padded=False):
            if kind == _COMPRESSED:
                kind, body = next(_elements(_inflated(body), padded=False), (0, body[:0]))
            if kind != _MATRIX:
                raise ValueError(f"an element of type {kind} where a variable was expected")
            name, array = _variable(body, names)
            if array is not None:
                found[name] = array
    except (ValueError, struct.error, zlib.error, MemoryError) as error:
        raise DataError(
            f"{path} ({len(content)} bytes): not read, {error}; expected a MATLAB 5 file: download it again"
        ) from error
    return found


def _elements(data: memoryview, *, padded: bool) -> Iterator[tuple[int, memoryview]]:
    """The type and the content of every element; inside a variable they are padded to 8 bytes."""
    start = 0
    while start < len(data):
        (word,) = struct.unpack_from("<I", data, start)
        if word >> 16:
            kind, size, begin = word & 0xFFFF, word >> 16, start + 4
            if size > 4:
                raise ValueError(f"a short element of {size} bytes; they have 4 at most")
            start += 8
        else:
            kind, size = struct.unpack_from("<II", data, start)
            begin = start + 8
            start = begin + (-(-size // 8) * 8 if padded else size)
        if begin + size > len(data):
            raise ValueError(f"{size} bytes were announced and {len(data) - begin} are there")
        yield kind, data[begin : begin + size]


def _inflated(body: memoryview) -> memoryview:
    inflate = zlib.decompressobj()
    data = inflate.decompress(body, _LARGEST)
    if not inflate.eof:
        raise ValueError(f"a compressed variable that is cut off, or of more than {_LARGEST} bytes")
    return memoryview(data)


def _variable(body: memoryview, names: Collection[str]) -> tuple[str, MatArray | None]:
    """The name of a variable, and its array where it is one of `names`."""
    # Lazily, as what follows the name is laid out by class.
    elements = _elements(body, padded=True)
    flags, dimensions, label = (next(elements, (0, body[:0])) for _ in range(3))
    name = bytes(label[1]).decode("latin-1")
    if label[0] != 1 or name not in names:
        return name, None
    if flags[0] != 6 or len(flags[1]) != 8 or dimensions[0] != 5:
        raise ValueError(f"variable {name} has no dimensions")
    (word,) = struct.unpack_from("<I", flags[1])
    shape = tuple(int(length) for length in np.frombuffer(dimensions[1], "<i4"))
    kind = _CLASSES[word & 0xFF] if word & 0xFF < len(_CLASSES) else "unknown"
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"variable {name} has the dimensions {list(shape)}")
    if not kind.startswith(("int", "uint")) or word & _COMPLEX:
        return name, MatArray(f"complex {kind}" if word & _COMPLEX else kind, shape, None)
    stored, data = next(elements, (0, body[:0]))
    # Numbers may be stored in a smaller type than their class.
    if stored not in _STORED or not np.can_cast(_STORED[stored], kind):
        raise ValueError(f"variable {name} has values of type {stored}")
    values = np.frombuffer(data, _STORED[stored])
    if len(values) != math.prod(shape):
        raise ValueError(f"variable {name} has {len(values)} values and the dimensions {list(shape)}")
    return name, MatArray(kind, shape, values.astype(kind, copy=False).reshape(shape, order="F"))

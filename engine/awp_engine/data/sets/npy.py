"""Arrays in .npy files and in .npz archives: found right, then mapped where they lie."""

import ctypes
import io
import math
import mmap
import os
import resource
import struct
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from awp_engine.data.dataset import DataError
from awp_engine.files.text import printable, reason

Expect = Callable[[tuple[int, ...], np.dtype[Any]], str | None]
"""Says what was expected of a shape and type that are not right."""

_CHUNK = 2**22
# numpy reads a header of any size into memory, and then refuses those of more than 10,000 bytes
_HEADER_BYTES = 12 + 10_000
_PAGE = mmap.PAGESIZE
_THREAD = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredArray:
    """Where an array lies.

    `start` and `length` are of what a checksum covers, the array's header included; `offset` is the array's own.
    """

    path: str
    what: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int
    length: int
    offset: int
    fortran: bool
    file_size: int
    modified: int
    member: str | None = None
    checksum: int | None = None
    compressed: bool = False

    @property
    def size(self) -> int:
        """In bytes, in memory."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def is_mapped(self) -> bool:
        """Whether it can be used from where it lies."""
        return not self.compressed and not self.fortran

    def open(self) -> NDArray[Any]:
        """Maps the array, or reads it where that cannot be done."""
        try:
            with Path(self.path).open("rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != (self.file_size, self.modified):
                    raise self._changed(status.st_size)
                return np.asarray(_Mapping(file.fileno(), self)) if self.is_mapped else self._read(file)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def require_length(self) -> None:
        """Looks whether the file is as long as it was: who reads a mapping beyond its file's end is killed.

        Raises:
            DataError: it is not, or is gone. If it is cut after this look and before the reading, microseconds later,
                the process still dies.
        """
        try:
            size = os.stat(self.path).st_size  # noqa: PTH116
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if size != self.file_size:
            raise self._changed(size)

    def _changed(self, size: int) -> DataError:
        return DataError(
            f"{self.path} has changed since it was opened ({size} bytes, before {self.file_size}); expected files that "
            "stay as they are: start again"
        )

    def check(self) -> None:
        """Compares the checksum, where the file has one."""
        if self.checksum is None or self.compressed:  # zipfile compares those as it reads them
            return
        found = 0
        try:
            with Path(self.path).open("rb") as file:
                file.seek(self.start)
                for first in range(0, self.length, _CHUNK):
                    found = zlib.crc32(file.read(min(_CHUNK, self.length - first)), found)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if found != self.checksum:
            raise _not_read(self.path, f"Bad CRC-32 for file {self.member!r}")

    def ask_for(self, source: NDArray[Any], rows: NDArray[np.int64]) -> None:
        """Has ascending rows read from the disk all at once: a mapped file is otherwise read page by page."""
        if not self.is_mapped:
            return
        size = source.nbytes // len(source)
        ends = np.append(np.flatnonzero(np.diff(rows) > 1), len(rows) - 1)
        first = source.ctypes.data + rows[np.append(0, ends[:-1] + 1)] * size
        begin = first // _PAGE * _PAGE
        length = source.ctypes.data + (rows[ends] + 1) * size - begin
        for address, count in zip(begin.tolist(), length.tolist(), strict=True):
            _libc.madvise(address, count, mmap.MADV_WILLNEED)

    def take(self, source: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[Any]:
        """Copies rows, which have to be in range; without Python's lock, and without a copy of the source."""
        if source.dtype.itemsize == 1:
            return np.take(source, rows, axis=0, mode="clip")
        # As bytes, since numpy would first copy all of an array that does not begin at a multiple of its item's size.
        items = source.view(np.uint8).reshape(len(source), self.dtype.itemsize)
        return np.take(items, rows, axis=0, mode="clip").view(self.dtype)[:, 0]

    def _read(self, file: IO[bytes]) -> NDArray[Any]:
        if self.member is None:
            return np.ascontiguousarray(npy_format.read_array(file, allow_pickle=False))
        try:
            with zipfile.ZipFile(file) as archive, archive.open(self.member) as member:
                return np.ascontiguousarray(npy_format.read_array(member, allow_pickle=False))
        except Exception as error:  # Damaged archives raise nearly anything.
            raise _not_read(self.path, error) from error


class _Mapping:
    """An array in a file, for numpy.asarray; keeps no descriptor, of which a process may have 1,024 at times."""

    def __init__(self, descriptor: int, array: StoredArray) -> None:
        before = array.offset % _PAGE
        length = before + array.size
        address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, array.offset - before)
        if address == ctypes.c_void_p(-1).value:
            code = ctypes.get_errno()
            raise OSError(code, f"{os.strerror(code)} (mapping {length} bytes)")
        # Not at exit, when other threads may still read.
        weakref.finalize(self, _libc.munmap, address, length).atexit = False
        if len(array.shape) > 1:
            _libc.madvise(address, length, mmap.MADV_RANDOM)
        self.__array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (address + before, True),
        }


@contextmanager
def reading(path: Path, kind: str) -> Iterator[IO[bytes]]:
    """A file, whose errors become a `DataError` that names it."""
    try:
        with path.open("rb") as file:
            yield file
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # Damaged archives and headers raise nearly anything.
        raise _not_read(str(path), error, kind) from error


def blocks_read() -> int:
    """A count that grows where this thread waits for a disk."""
    usage = resource.getrusage(_THREAD)
    return usage.ru_inblock + usage.ru_majflt


def _not_read(path: str, error: object, kind: str = "an .npz file of plain arrays") -> DataError:
    size = f" ({os.stat(path).st_size} bytes)" if os.path.exists(path) else ""  # noqa: PTH110, PTH116
    return DataError(f"{path}{size}: not read, {reason(error)}; expected {kind}: write or download it again")


def alone(path: Path, file: IO[bytes], expect: Expect) -> StoredArray:
    """The array of an .npy file."""
    header = _read_header(file, "the array", expect)
    size = os.fstat(file.fileno()).st_size
    _require_length("the file", size, header)
    return _array(path, file, header, what="the array", offset=header.size, start=0, length=size)


def in_archive(path: Path, file: IO[bytes], archive: zipfile.ZipFile, what: str, expect: Expect) -> StoredArray:
    """An array of an .npz file."""
    names = [name for name in (f"{what}.npy", f"{what}s.npy") if name in archive.namelist()]
    if len(names) != 1:
        found = ", ".join(map(printable, archive.namelist()[:6])) or "nothing"
        raise DataError(f"holds {found}; expected the arrays image and label")
    info = archive.getinfo(names[0])
    with archive.open(info) as member:
        header = _read_header(member, what, expect)
    _require_length(what, info.file_size, header)
    compressed = info.compress_type != zipfile.ZIP_STORED
    start = _start(file, info)
    if not compressed and info.compress_size != info.file_size:
        raise zipfile.BadZipFile(f"{names[0]} is stored in {info.compress_size} bytes but has {info.file_size}")
    if start + info.compress_size > os.fstat(file.fileno()).st_size:
        raise zipfile.BadZipFile(f"{names[0]} goes on after the end of the file")
    return _array(
        path,
        file,
        header,
        what=what,
        member=names[0],
        start=start,
        length=info.file_size,
        offset=start + header.size,
        checksum=info.CRC,
        compressed=compressed,
    )


def _start(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a member's content begins: after its own header, whose extra field is not the directory's."""
    here = file.tell()
    file.seek(info.header_offset)
    header = file.read(30)
    file.seek(here)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no header of {info.filename} at byte {info.header_offset}")
    return info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))


class _ArrayHeader(NamedTuple):
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]
    size: int


def _read_header(file: IO[bytes], what: str, expect: Expect) -> _ArrayHeader:
    """Reads an array's header; `expect` says what was expected of a shape and type that are not right."""
    begin = io.BytesIO(file.read(_HEADER_BYTES))
    version = npy_format.read_magic(begin)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{what} is in version {version[0]}.{version[1]} of the npy format; expected 1.0 or 2.0")
    read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, fortran, dtype = read_header(begin)
    if dtype.hasobject:
        raise DataError(f"{what} holds Python objects, which are refused; expected a plain array")
    expected = expect(shape, dtype)
    if expected is not None:
        raise DataError(f"{what} is {dtype} {list(shape)}; expected {expected}")
    return _ArrayHeader(shape, fortran and len(shape) > 1, dtype, begin.tell())


def _require_length(what: str, length: int, header: _ArrayHeader) -> None:
    expected = header.size + header.dtype.itemsize * math.prod(header.shape)
    if length != expected:
        raise DataError(f"{what} has {length} bytes; expected {expected} by its header: write the file again")


def _array(path: Path, file: IO[bytes], header: _ArrayHeader, **fields: Any) -> StoredArray:
    status = os.fstat(file.fileno())
    return StoredArray(
        path=str(path),
        shape=header.shape,
        dtype=header.dtype,
        fortran=header.fortran,
        file_size=status.st_size,
        modified=status.st_mtime_ns,
        **fields,
    )

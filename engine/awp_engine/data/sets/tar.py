"""WebDataset: images and labels as members of tars, read where they lie.

Format: https://github.com/webdataset/webdataset; the index is that of NVIDIA DALI's wds2idx, version 1.2.
"""

import functools
import json
import os
import re
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from awp_engine.data.dataset import DataError
from awp_engine.data.sets.files import SUFFIXES, PackedNames, digest_files, listed_name, shown
from awp_engine.data.sets.inspect import MAX_BYTES

_BLOCK = 512
_WINDOW = 4096
_LARGEST_EXTENSION = 2**20
_OPEN = 128
_IMAGES = tuple(suffix[1:] for suffix in SUFFIXES)
_ADVICE = "truncated or damaged: write or download it again"


class Member(NamedTuple):
    """A regular file in a tar: its name as it stands there, and where its content lies."""

    name: bytes
    offset: int
    size: int


class TarImages:
    """The images of WebDataset samples in all *.tar of a directory, in the order of names: an `EncodedImages`.

    A sample is what follows each other with the same name up to the first dot: one .jpg, .png or other of `SUFFIXES`,
    and a .cls (a number as text) or a .json with the number as "label". What else a sample holds, hidden files and
    directories are left alone. Members are found by the .idx file beside a tar, if it reaches from the tar's beginning
    to its end, else by the tar's own headers; reading compares the header before the content again.

    Args:
        part: the directory.
        skip: members to leave out: PART/TAR/MEMBER, PART being the directory's name, in the form of `listed_name`.

    Raises:
        DataError: a tar or a sample is not as it should be, or there is none.
    """

    def __init__(self, part: Path, *, skip: frozenset[str] = frozenset()) -> None:
        try:
            self._tars = sorted(p for p in part.iterdir() if p.suffix.lower() == ".tar" and not p.name.startswith("."))
        except OSError as error:
            raise DataError(f"{part} cannot be listed: {error.strerror}; expected a directory of *.tar") from error
        if not self._tars:
            raise DataError(f"{part} has no tar; expected WebDataset's {part.name}/*.tar there")
        with ThreadPoolExecutor(8) as pool:  # a network file system answers several at once
            found = list(pool.map(lambda tar: _list_samples(tar, f"{part.name}/{tar.name}/", skip), self._tars))
        if not any(one.sizes for one in found):
            raise DataError(f"{part} has no samples; expected images and labels in its {len(self._tars)} tars")
        self._file_sizes = [one.file_size for one in found]
        self._tar = np.repeat(np.arange(len(found), dtype=np.int32), [len(one.sizes) for one in found])
        self._offsets = np.concatenate([np.array(one.offsets, np.int64) for one in found])
        self._sizes = np.concatenate([np.array(one.sizes, np.int64) for one in found])
        self._names = PackedNames.pack(one.names for one in found)
        self.labels: Tensor = torch.tensor([label for one in found for label in one.labels])
        """int64 [N]."""
        self._open = _opener()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_open": _opener()}

    def __len__(self) -> int:
        return len(self._sizes)

    def read(self, row: int) -> bytes:
        """The image's bytes.

        Raises:
            DataError: the tar cannot be read, or no longer holds the image where it was found.
        """
        path, size = self._tars[self._tar[row]], self._file_sizes[self._tar[row]]
        tar = self._open(path)
        if tar.size != size:
            raise DataError(
                f"{path} has changed since it was listed ({tar.size} bytes, before {size}); expected tars that stay as "
                "they are: start again"
            )
        return tar.content(Member(self._names[row], int(self._offsets[row]), int(self._sizes[row])))

    def name(self, row: int) -> str:
        """The tar and the member."""
        return f"{shown(self._tars[self._tar[row]])}: {shown(self._names[row])}"

    def digest(self) -> str:
        """See `EncodedImages`; how the samples are spread over tars does not matter."""
        return digest_files(self._names, self._sizes, self.read)


class _Tar:
    """An open tar; closed when nobody uses it any more, so that a thread may still read what another has given up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            status = os.fstat(self._descriptor)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; expected a tar") from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is not a regular file; expected a tar: remove it")
        self.size = status.st_size
        self._window, self._window_start = b"", 0

    def bytes_at(self, offset: int, count: int) -> bytes:
        """Fewer at the end of the file."""
        pieces = []
        while count > 0:
            try:
                piece = os.pread(self._descriptor, count, offset)
            except OSError as error:
                raise DataError(f"{self.path} cannot be read at byte {offset}: {error.strerror}") from error
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def block_at(self, offset: int) -> bytes:
        """512 bytes; read with their neighbours, for one thread that goes through the headers."""
        start = offset - self._window_start
        if not 0 <= start <= len(self._window) - _BLOCK:
            self._window, self._window_start, start = self.bytes_at(offset, _WINDOW), offset, 0
        return self._window[start : start + _BLOCK]

    def require_inside(self, member: Member) -> None:
        if member.offset + member.size > self.size:
            end = member.offset + member.size
            raise DataError(f"{self.path}: {shown(member.name)} goes on to byte {end} of {self.size}; {_ADVICE}")

    def content(self, member: Member) -> bytes:
        """Reads a member, after its header has been found to be that member's."""
        if member.size > MAX_BYTES:
            raise DataError(
                f"{self.path}: {shown(member.name)} has {member.size:,} bytes; expected at most {MAX_BYTES:,}: "
                "remove it"
            )
        found = self.bytes_at(member.offset - _BLOCK, _BLOCK + member.size)
        if len(found) != _BLOCK + member.size:
            raise DataError(f"{self.path}: {shown(member.name)} ended after {len(found)} bytes; {_ADVICE}")
        if not _is_header_of(member, found[:_BLOCK]):
            raise DataError(
                f"{self.path}: {shown(member.name)} is not at byte {member.offset - _BLOCK}, where it was listed; the "
                "tar or its .idx file is damaged or belongs to another: write them again"
            )
        return found[_BLOCK:]


def _opener() -> Callable[[Path], _Tar]:
    """Opens tars, and keeps those that were read last open."""
    return functools.lru_cache(_OPEN)(_Tar)


class _TarHeader(NamedTuple):
    name: bytes
    kind: bytes
    size: int


_REGULAR = (b"0", b"\0", b"7")
_LINKS = (b"1", b"2")
_NO_CONTENT = (*_LINKS, b"3", b"4", b"5", b"6")


def _header(block: bytes) -> _TarHeader | None:
    """None where it is damaged."""
    try:
        checksum, size = _number(block[148:156]), _number(block[124:136])
    except ValueError:
        return None
    # The field itself counts as spaces; some old programs take bytes as signed.
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if checksum != total and checksum != total - 256 * sum(byte >> 7 for byte in block[:148] + block[156:]):
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return _TarHeader(name, block[156:157], size)


def _is_header_of(member: Member, block: bytes) -> bool:
    header = _header(block)
    if header is None or header.kind not in _REGULAR or header.size != member.size:
        return False
    # Longer names, and those in other alphabets, stand before the header, which then has some other one.
    return header.name == member.name or len(member.name) > 99 or not member.name.isascii()


def _number(field: bytes) -> int:
    text = field.strip(b" \0")
    if text.isdigit():
        return int(text, 8)
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if text:
        raise ValueError(text)
    return 0


def walk(tar: _Tar) -> Iterator[Member]:
    """All regular files of a tar, by its headers: ustar, GNU's and pax.

    Raises:
        DataError: it is damaged or truncated, or an image or label is a link, sparse, or of contradictory sizes.
    """
    position, name, size = 0, b"", None
    while True:
        block = tar.block_at(position)
        if len(block) == _BLOCK and not block.strip(b"\0"):
            if not _is_end(tar, position):
                raise DataError(
                    f"{tar.path}: something follows the archive's end at byte {position}; expected one archive, not "
                    "several joined ones: write it again"
                )
            return
        header = _header(block) if len(block) == _BLOCK else None
        if header is None:
            raise DataError(f"{tar.path}: no header of a member at byte {position} of {tar.size}; {_ADVICE}")
        start = position + _BLOCK
        if header.kind in (b"x", b"g", b"L", b"K"):
            extension = Member(header.name, start, header.size)
            tar.require_inside(extension)
            if header.size > _LARGEST_EXTENSION:
                raise DataError(f"{tar.path}: a header of {header.size} bytes at byte {position}; {_ADVICE}")
            content = tar.bytes_at(start, header.size)
            if header.kind == b"L":
                name = content.rstrip(b"\0")
            elif header.kind in (b"x", b"g"):
                records = _pax_records(tar, position, content)
                if header.kind == b"g" and records.keys() & {b"path", b"size"}:
                    raise DataError(
                        f"{tar.path}: one name or size for all members; expected a tar as WebDataset writes it"
                    )
                name, size = records.get(b"path", name), _pax_size(tar, records, size)
            position = start + _padded(header.size)
            continue
        member = Member(name or header.name, start, header.size if size is None else size)
        is_empty = header.kind in _NO_CONTENT
        if not is_empty:
            tar.require_inside(member)
        position = start + (0 if is_empty else _padded(member.size))
        _, suffix = _split(member.name)
        if header.kind in _REGULAR and not member.name.endswith(b"/"):
            if size is not None and size != header.size and suffix:
                raise DataError(f"{tar.path}: {shown(member.name)} has two sizes, {size} and {header.size}; {_ADVICE}")
            yield member
        elif header.kind != b"5" and suffix in (*_IMAGES, b"cls", b"json"):
            what = "a link" if header.kind in _LINKS else f"of type {shown(header.kind)!r}"
            raise DataError(f"{tar.path}: {shown(member.name)} is {what}; expected a regular file: write the tar again")
        name, size = b"", None


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _pax_records(tar: _Tar, position: int, content: bytes) -> dict[bytes, bytes]:
    """The "<length> <key>=<value>" lines of an extended header."""
    records, place = {}, 0
    while place < len(content):
        found = re.compile(rb"(\d{1,7}) ([^=]+)=").match(content, place)
        end = place + int(found[1]) if found else 0
        if not found or not found.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise DataError(f"{tar.path}: the extended header at byte {position} cannot be read; {_ADVICE}")
        if found[2].startswith(b"GNU.sparse"):
            raise DataError(f"{tar.path}: a sparse member at byte {position}; expected plain ones: write the tar again")
        records[found[2]] = content[found.end() : end - 1]
        place = end
    return records


def _pax_size(tar: _Tar, records: dict[bytes, bytes], before: int | None) -> int | None:
    text = records.get(b"size")
    if text is None:
        return before
    if not re.fullmatch(rb"\d{1,18}", text):
        raise DataError(f"{tar.path}: a member's size is {shown(text)!r}; {_ADVICE}")
    return int(text)


def _is_end(tar: _Tar, position: int) -> bool:
    """Whether zeros, and only zeros, follow."""
    if position >= tar.size:
        return False
    return all(
        not tar.bytes_at(start, min(2**20, tar.size - start)).strip(b"\0") for start in range(position, tar.size, 2**20)
    )


class _Samples(NamedTuple):
    file_size: int
    names: list[bytes]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]


def _list_samples(path: Path, before: str, skip: frozenset[str]) -> _Samples:
    tar = _Tar(path)
    samples = _Samples(tar.size, [], [], [], [])
    for image, label in _grouped(tar, _indexed(tar) or walk(tar)):
        if skip and before + listed_name(image.name) in skip:
            continue
        samples.names.append(image.name)
        samples.offsets.append(image.offset)
        samples.sizes.append(image.size)
        samples.labels.append(_label(tar, label))
    return samples


def _split(name: bytes) -> tuple[bytes, bytes]:
    """The sample's key and the member's suffix in lower case, both empty for what belongs to none."""
    base = name[name.rfind(b"/") + 1 :]
    if base.startswith(b"__") or base.find(b".") < 1:
        return b"", b""
    dot = len(name) - len(base) + base.index(b".")
    return name[:dot], name[dot + 1 :].lower()


def _grouped(tar: _Tar, members: Iterable[Member]) -> Iterator[tuple[Member, Member]]:
    """Image and label of every sample."""
    key, parts = b"", dict[bytes, Member]()
    for member in members:
        own_key, suffix = _split(member.name)
        if not own_key:
            continue
        if own_key != key and parts:
            yield _image_and_label(tar, key, parts)
            parts = {}
        if suffix in parts:
            raise DataError(f"{tar.path}: sample {shown(own_key)} has two .{shown(suffix)}; expected one of each kind")
        key, parts[suffix] = own_key, member
    if parts:
        yield _image_and_label(tar, key, parts)


def _image_and_label(tar: _Tar, key: bytes, parts: dict[bytes, Member]) -> tuple[Member, Member]:
    images = [parts[suffix] for suffix in _IMAGES if suffix in parts]
    label = parts.get(b"cls") or parts.get(b"json")
    if len(images) != 1 or label is None:
        has = ", ".join(f".{shown(suffix)}" for suffix in parts)
        raise DataError(
            f"{tar.path}: sample {shown(key)} has {has}; expected one image, such as .jpg or .png, and one of .cls and "
            ".json, one after the other: tar --sort=name writes them so"
        )
    return images[0], label


def _label(tar: _Tar, member: Member) -> int:
    content = tar.content(member)
    text = content.strip()
    if not member.name.lower().endswith(b".cls"):
        try:
            given = json.loads(content)
        except (ValueError, RecursionError):
            given = None
        number = given.get("label") if isinstance(given, dict) else None
        text = str(number).encode() if type(number) is int else b"?"
    if not re.fullmatch(rb"\d{1,9}", text):
        kind = 'a class\'s number, as {"label": 7}' if text == b"?" else "a class's number, 0 or more"
        raise DataError(f"{tar.path}: {shown(member.name)} holds {shown(content[:40])!r}; expected {kind}")
    return int(text)


def _indexed(tar: _Tar) -> list[Member] | None:
    """What the index beside a tar lists, unless that was made for another one.

    Its first line is "v1.2" and the number of samples; then comes a line a sample, suffix, offset, size and name of
    each member.
    """
    path = tar.path.with_suffix(".idx")
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; remove it") from error
    # Older ones lack names, and GNU tar writes those in other alphabets with backslashes.
    if not content.startswith(b"v1.2 ") or b"\\" in content:
        return None
    first, *lines = content.splitlines()
    if first != b"v1.2 %d" % len(lines):
        raise _bad_index(path, 1, first)
    members, place = [], 0
    for number, line in enumerate(lines, 2):
        words = line.split(b" ")
        if len(words) % 4:
            raise _bad_index(path, number, line)
        for suffix, offset, size, name in zip(*(words[i::4] for i in range(4)), strict=True):
            if not (re.fullmatch(rb"\d{1,18}", offset) and re.fullmatch(rb"\d{1,18}", size)):
                raise _bad_index(path, number, line)
            member = Member(name, int(offset), int(size))
            if member.offset % _BLOCK or member.offset < place + _BLOCK or _split(name)[1] != suffix.lower():
                raise _bad_index(path, number, line)
            place = member.offset + _padded(member.size)
            if place > tar.size:
                return None
            members.append(member)
    fits = members and _is_header_of(members[-1], tar.block_at(members[-1].offset - _BLOCK)) and _is_end(tar, place)
    return members if fits else None


def _bad_index(path: Path, number: int, line: bytes) -> DataError:
    return DataError(
        f"{path}: line {number} is {shown(line[:60])!r}; expected 'v1.2 N', then N lines of suffix, offset, size and "
        "name, without spaces in names: remove it, or write it with DALI's wds2idx"
    )

"""Image folders as shards: tar files with an index, or arrays, under a manifest of sizes and SHA-256."""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.lib import format as npy_format

from awp_engine.data.dataset import DataError
from awp_engine.data.loaders.workers import Died, process_all
from awp_engine.data.sets.files import TEST_PARTS, listed_name, read_regular, shown
from awp_engine.data.sets.imagenet import is_tiny_imagenet
from awp_engine.data.sets.inspect import FORMAT_SUFFIXES, BadImageError, Header, check, decode
from awp_engine.data.sets.scan_list import LIST_NAME, bad_files, file_state, read_scan, typed
from awp_engine.data.sets.sources import CLASSES
from awp_engine.data.tools.scan import list_files, names_digest
from awp_engine.files.atomic import atomic_write_text, sync_directory
from awp_engine.files.digest import sha256_of_json
from awp_engine.files.locking import LOCK, locked
from awp_engine.observe.bars import MakeBar, NoBar

MANIFEST = "manifest.json"
_FORMAT = 1
# what NVIDIA DALI's wds2idx writes
_INDEX_VERSION = "v1.2"
_BLOCK = 512
_TEMPORARY = ".tmp-"
_FILE_NAME = re.compile(r"classes\.json|(?:train|test|val)/(?:[0-9]{5,}\.(?:tar|idx)|(?:images|labels)-[0-9]{5,}\.npy)")

Form = Literal["tar", "npy"]


class PackedFile(NamedTuple):
    """A file of a pack.

    Attributes:
        file: its path in the pack.
        bytes: its size.
        sha256: hexadecimal.
        images: that it holds; None for an index, labels and class names.
    """

    file: str
    bytes: int
    sha256: str
    images: int | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a pack holds.

    Attributes:
        form: of the shards.
        classes: how many.
        images: by part.
        files: all but the manifest.
    """

    form: Form
    classes: int
    images: dict[str, int]
    files: tuple[PackedFile, ...]


class _Image(NamedTuple):
    """A file below the root, its class, its place in its part in the order of class and name, and its bytes."""

    file: str
    label: int
    place: int
    size: int


class _Shard(NamedTuple):
    part: str
    number: int
    images: list[_Image]


class _NewFile:
    """A file that takes its name when it is whole and on disk, and its SHA-256 on the way."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(_TEMPORARY + path.name)
        self._digest = hashlib.sha256()
        self.size = 0

    def __enter__(self) -> Self:
        self._file = self._temporary.open("xb")
        return self

    def write(self, data: bytes) -> None:
        """Appends."""
        self._digest.update(data)
        self._file.write(data)
        self.size += len(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None:
            self._temporary.rename(self._path)
        else:
            self._temporary.unlink()

    def entry(self, images: int | None = None) -> PackedFile:
        """What the manifest says of it."""
        return PackedFile("/".join(self._path.parts[-2:]), self.size, self._digest.hexdigest(), images)


def pack_folder(
    root: Path,
    out: Path,
    *,
    form: Form = "tar",
    shard_bytes: int = 256 * 2**20,
    workers: int = 1,
    policy: Literal["refuse", "skip"] = "refuse",
    bar: MakeBar = NoBar,
) -> Manifest:
    """Writes an image folder as shards, in parallel processes.

    "tar": WebDataset files out/<part>/00000.tar, each with an index 00000.idx for DALI's `fn.readers.webdataset`. An
    image, as its file has it, is KEY.jpg, KEY.png or the like, and KEY.cls is its class number as text; KEY is its
    place in its part in the order of class and name. Training images lie in a fixed random order, since streaming
    readers shuffle what is close together only.

    "npy": out/<part>/images-00000.npy, uint8 [n, H, W, C], and labels-00000.npy, int64 [n], in the order of class and
    name.

    Class names are in out/classes.json. Images are decoded first, unless the list of a scan says that they are good.

    Args:
        root: a directory with train/<class>/ and a test part, such as test/<class>/ or val/<class>/; where there is no
            test, val, valid or validation is packed as test.
        out: a new or empty directory.
        form: "tar" or "npy".
        shard_bytes: of a shard at most, but for a single image that is larger.
        workers: processes.
        policy: what to do about bad files that a scan listed.
        bar: makes what shows how many images were packed.

    Raises:
        DataError: bad files are there, or images differ in size or mode where they may not, or `out` is not empty.
        LockedError: another process packs into `out`.
        OSError: a file cannot be written. Whatever is raised, nothing is left in `out`.
    """
    images, classes, decoded = _plan(root, policy)
    total = sum(map(len, images.values()))
    like = None
    if form == "npy":
        content, name = _content(root, images["train"][0])
        like = check(content, name)
        space = total * _row_bytes(like)
    else:
        space = sum(_member_bytes(image) for part in images.values() for image in part)
    _require_place(root, out)
    # which makes the directory, and removes it again where nothing was written
    with locked(out):
        _require_empty(out)
        try:
            free = shutil.disk_usage(out).free
            if space > free:
                raise DataError(f"{out}: the shards take {space:,} bytes and {free:,} are free; make room there")
            shards = [shard for part, found in images.items() for shard in _cut(part, found, like, shard_bytes)]
            for part in images:
                (out / part).mkdir()
            work = functools.partial(_write_shard, root, out, like, not decoded)
            files: dict[int, list[PackedFile]] = {}
            results = process_all(shards, work, workers=max(1, min(workers, len(shards))), chunk=1, limit=None)
            with contextlib.closing(results), bar("images", total) as counted:
                for index, result in results:
                    if isinstance(result, Died):
                        raise DataError(
                            f"{shards[index].part}: the process that packed it {result.why}; {_scan_hint(root)}"
                        )
                    files[index] = result
                    counted.advance(len(shards[index].images))
            with _NewFile(out / CLASSES) as file:
                file.write(json.dumps(classes, indent=1).encode() + b"\n")
            manifest = Manifest(
                form=form,
                classes=len(classes),
                images={part: len(found) for part, found in images.items()},
                files=(
                    *(entry for index in range(len(shards)) for entry in files[index]),
                    file.entry()._replace(file=CLASSES),
                ),
            )
            for part in images:
                sync_directory(out / part)
            sync_directory(out)
            atomic_write_text(out / MANIFEST, _manifest_text(manifest))
        except BaseException:
            for part in images:
                shutil.rmtree(out / part, ignore_errors=True)
            for name in (MANIFEST, CLASSES, _TEMPORARY + CLASSES):
                (out / name).unlink(missing_ok=True)
            raise
    return manifest


def _scan_hint(root: Path) -> str:
    return f"scan first: awp data scan {root}"


def _plan(root: Path, policy: Literal["refuse", "skip"]) -> tuple[dict[str, list[_Image]], list[str], bool]:
    """The images of each part, the class names, and whether a scan has decoded all of them."""
    if is_tiny_imagenet(root):
        raise DataError(
            f"{root} is Tiny-ImageNet as unpacked, which is small enough to train from as it is; expected "
            "<part>/<class>/*: sort val into class folders to pack it"
        )
    files, _ = list_files(root)
    skipped = bad_files(root, policy, remedy="pack with --bad-files skip")
    names = {file: listed_name(file) for file in files}
    for file, bad in files.items():
        if bad and names[file] not in skipped:
            raise DataError(f"{root / names[file]} {bad.why}; {_scan_hint(root)}")
    sizes = {file: (file_state(root / file) or (0, 0))[0] for file in files}
    decoded = False
    if (root / LIST_NAME).exists():
        scan = read_scan(root / LIST_NAME)
        digest = names_digest((name, sizes[file]) for name, file in sorted((names[file], file) for file in files))
        decoded = scan.pixels and scan.digest == digest
    good = [file for file in files if names[file] not in skipped]
    parts = list(dict.fromkeys(file.split("/")[0] for file in files))
    found = {part: sorted({file.split("/")[1] for file in good if file.startswith(part + "/")}) for part in parts}
    classes = found["train"]
    for part in parts:
        if found[part] != classes:
            lacking = sorted(set(found[part]) ^ set(classes))[0]
            raise DataError(
                f"{root}: class {lacking!r} has good images in one of train and {part} alone; "
                "both need the same classes: remove it or add images"
            )
    if len(classes) < 2:
        raise DataError(f"{root} has good images of {len(classes)} classes; expected at least 2: repair or add some")
    label = {name: number for number, name in enumerate(classes)}
    images: dict[str, list[_Image]] = {}
    for part in parts:
        members = sorted(file.split("/", 2) for file in good if file.startswith(part + "/"))
        target = part if part in ("train", "test") or "test" in parts else "test"
        images[target] = [
            _Image("/".join(names), label[names[1]], place, sizes["/".join(names)])
            for place, names in enumerate(members)
        ]
    return images, classes, decoded


def _require_place(root: Path, out: Path) -> None:
    if any(out.resolve().is_relative_to(root.resolve() / part) for part in ("train", *TEST_PARTS)):
        raise DataError(f"{out} lies among the images of {root}; choose another place for the shards")
    if not out.parent.is_dir():
        raise DataError(f"{out.parent} is not a directory; expected the one to put {out.name} into")
    if os.path.lexists(out) and (not out.is_dir() or out.is_symlink()):
        raise DataError(f"{out} is not a directory; expected a new or empty one")


def _require_empty(out: Path) -> None:
    entries = {entry.name for entry in os.scandir(out)} - {LOCK}
    if entries and MANIFEST not in entries:
        raise DataError(
            f"{out} is not empty; expected a new or empty directory (a pack that was killed can be removed)"
        )
    if entries:
        raise DataError(f"{out} holds a pack already; expected a new or empty directory")


def _row_bytes(header: Header) -> int:
    return header.height * header.width * (3 if header.mode == "RGB" else 1)


def _member_bytes(image: _Image) -> int:
    """In a tar file: two headers, the image in whole blocks, and its class."""
    return 3 * _BLOCK - (-image.size // _BLOCK) * _BLOCK


def _padded(size: int) -> int:
    """A tar file's bytes: its members, two empty blocks, and what fills the last record."""
    return -(-(size + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _cut(part: str, images: list[_Image], like: Header | None, shard_bytes: int) -> Iterator[_Shard]:
    if like is not None:
        rows = max(1, shard_bytes // _row_bytes(like))
        for number, start in enumerate(range(0, len(images), rows)):
            yield _Shard(part, number, images[start : start + rows])
        return
    if part == "train":
        images = sorted(images, key=lambda image: hashlib.sha256(os.fsencode(image.file)).digest())
    number, taken, size = 0, [], 0
    for image in images:
        if taken and _padded(size + _member_bytes(image)) > shard_bytes:
            yield _Shard(part, number, taken)
            number, taken, size = number + 1, [], 0
        taken.append(image)
        size += _member_bytes(image)
    yield _Shard(part, number, taken)


def _write_shard(root: Path, out: Path, like: Header | None, decoding: bool, shard: _Shard) -> list[PackedFile]:
    try:
        if like is None:
            return _write_tar(root, out, decoding, shard)
        return _write_arrays(root, out, like, shard)
    except BadImageError as error:
        raise DataError(f"{error}; {_scan_hint(root)}") from error


def _content(root: Path, image: _Image) -> tuple[bytes, str]:
    path = os.fsencode(root / image.file)
    return read_regular(path)[0], shown(path)


def _write_tar(root: Path, out: Path, decoding: bool, shard: _Shard) -> list[PackedFile]:
    index = []
    stem = out / shard.part / f"{shard.number:05d}"
    with _NewFile(stem.with_suffix(".tar")) as file:
        for image in shard.images:
            content, name = _content(root, image)
            header = check(content, name, suffix=Path(image.file).suffix)
            if decoding:
                decode(content, name)
            line, own_suffix = [], FORMAT_SUFFIXES[header.format][0][1:]
            for suffix, data in ((own_suffix, content), ("cls", b"%d" % image.label)):
                member = tarfile.TarInfo(f"{image.place:09d}.{suffix}")
                member.size = len(data)
                file.write(member.tobuf(tarfile.USTAR_FORMAT))
                line += [suffix, str(file.size), str(len(data)), member.name]
                file.write(data + bytes(-len(data) % _BLOCK))
            index.append(" ".join(line) + "\n")
        file.write(bytes(_padded(file.size) - file.size))
    with _NewFile(stem.with_suffix(".idx")) as index_file:
        index_file.write(f"{_INDEX_VERSION} {len(index)}\n".encode())
        index_file.write("".join(index).encode())
    return [file.entry(len(index)), index_file.entry()]


def _array_header(shape: tuple[int, ...], dtype: str) -> bytes:
    file = io.BytesIO()
    npy_format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


def _write_arrays(root: Path, out: Path, like: Header, shard: _Shard) -> list[PackedFile]:
    shape = (len(shard.images), like.height, like.width, 3 if like.mode == "RGB" else 1)
    with _NewFile(out / shard.part / f"images-{shard.number:05d}.npy") as file:
        file.write(_array_header(shape, "|u1"))
        for image in shard.images:
            content, name = _content(root, image)
            header = check(content, name, suffix=Path(image.file).suffix)
            if header[1:4] != like[1:4]:
                raise DataError(
                    f"{name} is {header.mode} {header.width}x{header.height}; expected {like.mode} "
                    f"{like.width}x{like.height} as the first image: resize it, or pack as tar"
                )
            file.write(decode(content, name).tobytes())
    with _NewFile(out / shard.part / f"labels-{shard.number:05d}.npy") as labels:
        labels.write(_array_header(shape[:1], "<i8"))
        labels.write(np.array([image.label for image in shard.images], dtype="<i8").tobytes())
    return [file.entry(shape[0]), labels.entry()]


def _manifest_text(manifest: Manifest) -> str:
    fields: dict[str, Any] = {
        "format": _FORMAT,
        "form": manifest.form,
        "classes": manifest.classes,
        "images": manifest.images,
        "files": [entry._asdict() for entry in manifest.files],
    }
    return json.dumps({**fields, "digest": sha256_of_json(fields)}, indent=1) + "\n"


def read_manifest(out: Path) -> Manifest:
    """Reads a pack's manifest, which itself says if it was changed.

    Raises:
        DataError: it is missing, so that the pack is not whole, or is not what `pack_folder` wrote.
    """
    path = out / MANIFEST
    try:
        # a pipe would be waited for
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        fields = json.loads(path.read_bytes())
        digest = fields.pop("digest")
        if digest != sha256_of_json(fields):
            raise ValueError("SHA-256 differs")
        if fields["format"] != _FORMAT:
            raise ValueError(f"format {fields['format']}, expected {_FORMAT}")
        typed(fields, {"format": int, "form": str, "classes": int, "images": dict, "files": list})
        typed(fields["images"], dict.fromkeys(fields["images"], int))
        for entry in fields["files"]:
            images = type(None) if entry["images"] is None else int
            typed(entry, {"file": str, "bytes": int, "sha256": str, "images": images})
        files = tuple(PackedFile(**entry) for entry in fields["files"])
        for entry in files:
            if not _FILE_NAME.fullmatch(entry.file):
                raise ValueError(f"file name {entry.file!r}")
        if fields["form"] not in ("tar", "npy"):
            raise ValueError(f"form {fields['form']!r}")
        return Manifest(form=fields["form"], classes=fields["classes"], images=fields["images"], files=files)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {out} is not a pack, or not whole; pack again") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; repair it or pack again") from error
    # JSON's and Unicode's errors are ValueErrors.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({' '.join(str(error).split())}); pack again") from error


def _problems(path: Path, entry: PackedFile) -> list[str]:
    """What is wrong with a file; nothing where it is as the manifest has it."""
    try:
        if path.is_symlink() or not path.is_file():
            return [f"{path}: {'is not a file' if os.path.lexists(path) else 'is missing'}"]
        size = path.stat().st_size
        if size != entry.bytes:
            return [f"{path}: has {size:,} bytes, expected {entry.bytes:,}"]
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
        return [] if same else [f"{path}: SHA-256 differs"]
    except OSError as error:
        return [f"{path}: cannot be read: {error.strerror}"]


def verify_pack(out: Path, bar: MakeBar = NoBar) -> list[str]:
    """Compares a pack's files with its manifest.

    Args:
        out: the pack.
        bar: makes what shows how many bytes were read.

    Returns:
        What is wrong, one line each, with the file.

    Raises:
        DataError: the manifest cannot be read.
    """
    manifest = read_manifest(out)
    problems = []
    with bar("bytes", sum(entry.bytes for entry in manifest.files)) as counted:
        for entry in manifest.files:
            problems += _problems(out / entry.file, entry)
            counted.advance(entry.bytes)
    counts: Counter[str] = Counter()
    for entry in manifest.files:
        counts[entry.file.split("/")[0]] += entry.images or 0
    for part, images in manifest.images.items():
        if counts[part] != images:
            problems.append(f"{out / part}: shards of {counts[part]:,} images, expected {images:,}")
    expected = {MANIFEST, *(entry.file for entry in manifest.files)}
    for folder, _, names in os.walk(out):
        for name in sorted(names):
            relative = (Path(folder) / name).relative_to(out).as_posix()
            if relative not in expected:
                problems.append(f"{out / relative}: is not in the manifest")
    return problems

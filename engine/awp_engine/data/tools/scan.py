"""Finds every file of an image folder that cannot be trained on."""

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from awp_engine.data.dataset import DataError
from awp_engine.data.loaders.workers import Died, process_all
from awp_engine.data.sets.files import (
    IMAGE_NAMES,
    SUFFIXES,
    TEST_PARTS,
    hint,
    listed_name,
    read_regular,
    require_classes,
    shown,
)
from awp_engine.data.sets.imagenet import is_tiny_imagenet, list_tiny_imagenet
from awp_engine.data.sets.inspect import BadImageError, Header, check, decode
from awp_engine.data.sets.scan_list import Bad, Scan, file_state
from awp_engine.observe.bars import MakeBar, NoBar

_SUFFIXES = tuple(map(os.fsdecode, SUFFIXES))
# Enough images a task that handing tasks out costs nothing, few enough that all processes finish together.
_CHUNK = 16


class Inspected(NamedTuple):
    """What a look at a file found; no header for a bad one.

    Attributes:
        state: size and time of modification, which tell whether it was changed since; None for no file.
        key: of its bytes, to find the same ones elsewhere.
    """

    bad: Bad | None
    state: tuple[int, int] | None
    header: Header | None = None
    key: bytes = b""


def find_parts(root: Path) -> tuple[str, ...]:
    """The folder's parts: "train", and those of `TEST_PARTS` that are there and have class folders, if any has.

    ImageNet's test, for one, is a heap of images without labels, and so is Tiny-ImageNet's. Of the others than "test"
    and "val" one is a part only where neither is there.

    Raises:
        DataError: a part is missing.
    """
    if not (root / "train").is_dir():
        raise DataError(
            f"{root / 'train'} is not a directory; expected train/<class>/{IMAGE_NAMES} there{hint(root / 'train')}"
        )
    if is_tiny_imagenet(root):
        return "train", "val"
    there = tuple(part for part in TEST_PARTS if (root / part).is_dir())
    others = tuple(part for part in there if part in ("test", "val")) or there[:1]
    if not others:
        raise DataError(
            f"{root} has neither test nor val (nor valid or validation); expected test/<class>/{IMAGE_NAMES} there"
            f"{hint(root / 'test')}"
        )
    sorted_ones = tuple(part for part in others if _has_folders(root / part))
    return ("train", *(sorted_ones or others))


def _has_folders(part: Path) -> bool:
    # what cannot be listed is named later
    with contextlib.suppress(OSError), os.scandir(part) as entries:
        return any(not entry.name.startswith(".") and _is_folder(entry) for entry in entries)
    return True


def list_files(root: Path) -> tuple[dict[str, Bad | None], list[str]]:
    """All images of the folder's parts, as paths below it in a fixed order, and what is wrong with some at first sight.

    Also the files in class folders whose names are not those of images, which training passes over. Names that begin
    with a dot are left out.

    Raises:
        DataError: a part is missing or has fewer than 2 classes, or Tiny-ImageNet's annotations do not fit.
    """
    parts = find_parts(root)
    if is_tiny_imagenet(root):
        # where each image has its class by name
        listings = zip(parts, list_tiny_imagenet(root, frozenset()), strict=True)
        return {f"{part}/{os.fsdecode(name)}": None for part, listing in listings for name in listing.names}, []
    files: dict[str, Bad | None] = {}
    others: list[str] = []
    classes = {part: _list_part(root, part, files, others) for part in parts}
    for part, names in classes.items():
        require_classes(root / part, names)
    lacking: dict[str, Bad] = {}
    for part in parts[1:]:
        for name in classes[part] - classes["train"]:
            lacking[f"{part}/{name}"] = Bad("no-such-class", "is of a class that train lacks; move or remove it")
        for name in classes["train"] - classes[part]:
            lacking[f"train/{name}"] = Bad("no-such-class", f"is of a class that {part} lacks; move or remove it")
    for file in files:
        folder = "/".join(file.split("/", 2)[:2])
        files[file] = lacking.get(folder, files[file])
        try:
            os.fsencode(file).decode()
        except UnicodeDecodeError:
            files[file] = Bad("bad-name", "has a name that is not UTF-8; rename it")
    return files, others


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # A link in a loop raises.
    with contextlib.suppress(OSError):
        return entry.is_dir()
    return False


def _entries(root: Path, folder: str, files: dict[str, Bad | None]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root / folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        files[folder] = Bad("unreadable", f"cannot be listed: {error.strerror}; repair or remove it")
        return []


def _list_part(root: Path, part: str, files: dict[str, Bad | None], others: list[str]) -> set[str]:
    """Adds the files of a part, of which `others` are no images; its classes."""
    classes = set()
    for entry in _entries(root, part, files):
        name = f"{part}/{entry.name}"
        if _is_folder(entry):
            classes.add(entry.name)
            _list_class(root, name, files, others)
        elif entry.name.lower().endswith(_SUFFIXES):
            files[name] = Bad("no-such-class", "lies in no class folder; move or remove it")
        elif entry.is_symlink() and not Path(entry.path).exists():
            files[name] = Bad("unreadable", "is a link to nothing; repair or remove it")
    return classes


def _list_class(root: Path, folder: str, files: dict[str, Bad | None], others: list[str]) -> None:
    before, images = len(files), 0
    for entry in _entries(root, folder, files):
        name = f"{folder}/{entry.name}"
        if entry.name.lower().endswith(_SUFFIXES):
            files[name] = None
            images += 1
        elif not _is_folder(entry):
            others.append(name)
        elif not entry.is_symlink():
            for place, folders, names in os.walk(root / name):
                folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
                shown_names = sorted(file for file in names if not file.startswith("."))
                below = str(Path(place).relative_to(root))
                deeper = [f"{below}/{file}" for file in shown_names if file.lower().endswith(_SUFFIXES)]
                why = Bad("no-such-class", "lies below its class folder, where it is never read; move or remove it")
                files |= dict.fromkeys(deeper, why)
    if not images and len(files) == before:
        files[folder] = Bad("empty", "is a class folder without images; add some or remove it")


def inspect_file(root: Path, pixels: bool, decoder: Callable[[bytes, str], object], file: str) -> Inspected:
    """Looks at one file below `root`: at its pixels too, unless the header is enough to refuse it."""
    path = root / file
    place = os.fsencode(path)
    name = shown(place)
    try:
        content, found = read_regular(place)
        header = check(content, name, suffix=path.suffix)
        if pixels:
            decoder(content, name)
    except BadImageError as error:
        return Inspected(Bad(error.kind, str(error).removeprefix(name).lstrip(": ")), file_state(path))
    except MemoryError:
        return Inspected(Bad("crashes-decoder", "needs more memory than there is; remove it"), file_state(path))
    return Inspected(None, (found.st_size, found.st_mtime_ns), header, hashlib.blake2b(content, digest_size=8).digest())


def scan_folder(
    root: Path,
    *,
    workers: int,
    pixels: bool = True,
    same_size: bool = False,
    decoder: Callable[[bytes, str], object] = decode,
    bar: MakeBar = NoBar,
) -> Scan:
    """Looks at every file of an image folder, in parallel processes.

    Args:
        root: a directory with train/<class>/ and a test part.
        workers: processes.
        pixels: decode every image; otherwise headers alone are read.
        same_size: refuse images of another size than most have.
        decoder: what decodes an image, or raises `BadImageError`; to be imported by its name in other processes.
        bar: makes what shows how many files were looked at.

    Raises:
        DataError: a part is missing or has fewer than 2 classes.
    """
    files, others = list_files(root)
    inspected = {file: Inspected(bad, file_state(root / file) if bad else None) for file, bad in files.items()}
    todo = [file for file, found in inspected.items() if not found.bad]
    done = len(inspected) - len(todo)
    work = functools.partial(inspect_file, root, pixels, decoder)
    headers: dict[Header, Header] = {}
    results = process_all(todo, work, workers=max(1, min(workers, len(todo))), chunk=_CHUNK)
    with contextlib.closing(results), bar("files", len(inspected)) as counted:
        for index, result in results:
            if isinstance(result, Died):
                why = Bad("crashes-decoder", f"cannot be decoded: the process {result.why}; remove it")
                result = Inspected(why, file_state(root / todo[index]))
            # A million headers take no room where they are one.
            if result.header is not None:
                result = result._replace(header=headers.setdefault(result.header, result.header))
            inspected[todo[index]] = result
            done += 1
            counted.set(done, len(inspected))
    scan = _judge(inspected, pixels=pixels, same_size=same_size)
    left_out = {part for part in ("test", "val") if (root / part).is_dir()}.difference(find_parts(root))
    notes = [f"{part} has no labels and was left out" for part in sorted(left_out)]
    if others:
        such = f"{listed_name(others[0])}: convert them if they are photographs"
        notes.append(
            f"files in class folders whose names do not end as those of images are passed over: {len(others):,}, such "
            f"as {such}"
        )
    return dataclasses.replace(scan, notes=(*scan.notes, *notes))


def _judge(inspected: dict[str, Inspected], *, pixels: bool, same_size: bool) -> Scan:
    """What only the files together tell: odd modes and sizes, and the same bytes twice."""
    notes = []
    modes = Counter(found.header.mode for found in inspected.values() if found.header)
    sizes = Counter(found.header[1:3] for found in inspected.values() if found.header)
    (usual, most), (_, fewer) = [*modes.most_common(2), ("RGB", 0), ("L", 0)][:2]
    usual = usual if most > fewer else "RGB"
    # what is resized may be grey among colour, as some of ImageNet's photographs are
    if len(modes) > 1 and usual == "RGB" and len(sizes) > 1 and not same_size:
        notes.append(f"{fewer:,} images are grey, and become colour in training")
    elif len(modes) > 1:
        for file, found in inspected.items():
            if found.header and found.header.mode != usual:
                why = f"has mode {found.header.mode}; expected {usual} as most images have: convert or remove it"
                inspected[file] = found._replace(bad=Bad("odd-mode", why), header=None)
    sizes = Counter(found.header[1:3] for found in inspected.values() if found.header)
    if len(sizes) > 1:
        width, height = max(sizes, key=lambda size: (sizes[size], size))
        if same_size:
            for file, found in inspected.items():
                if found.header and found.header[1:3] != (width, height):
                    why = f"has {found.header.width}x{found.header.height} pixels; expected {width}x{height}: "
                    inspected[file] = found._replace(bad=Bad("odd-size", why + "resize or remove it"), header=None)
        else:
            notes.append(
                f"images have {len(sizes):,} sizes, most often {width}x{height} ({sizes[width, height]:,} of "
                f"{sizes.total():,}); --data.image-size makes them one, and --same-size lists those that differ"
            )
    notes.extend(_same_bytes(inspected))
    listed = sorted((listed_name(file), found) for file, found in inspected.items())
    return Scan(
        files=len(inspected),
        total_bytes=sum(found.state[0] for found in inspected.values() if found.state),
        digest=names_digest((name, found.state[0] if found.state else 0) for name, found in listed),
        pixels=pixels,
        notes=tuple(notes),
        bad={name: found.bad for name, found in listed if found.bad},
        states={name: found.state for name, found in listed if found.bad},
    )


def names_digest(files: Iterator[tuple[str, int]]) -> str:
    """SHA-256, hexadecimal, of `listed_name`s and sizes, in the names' order."""
    digest = hashlib.sha256()
    for name, size in files:
        digest.update(f"{name}\0{size}\n".encode())
    return digest.hexdigest()


def _same_bytes(inspected: dict[str, Inspected]) -> Iterator[str]:
    first: dict[bytes, str] = {}
    pairs: dict[str, list[tuple[str, str]]] = {"in two classes": [], "in training and evaluation": []}
    for file, found in inspected.items():
        if found.header is None:
            continue
        other = first.setdefault(found.key, file)
        part, name = file.split("/")[:2]
        other_part, other_name = other.split("/")[:2]
        if name != other_name:
            pairs["in two classes"].append((other, file))
        elif part != other_part:
            pairs["in training and evaluation"].append((other, file))
    for where, found in pairs.items():
        if found:
            one, two = map(listed_name, found[0])
            yield f"{len(found):,} images are there twice, {where}, byte for byte, such as {one} and {two}"

"""Divides one folder of class folders into training and test images."""

import hashlib
import os
import shutil
from pathlib import Path

from awp_engine.data.dataset import DataError
from awp_engine.data.sets.files import TEST_PARTS, has_class_folders, list_classes, listed_name, shown
from awp_engine.files.atomic import remove_leftovers, temporary_beside


def divide_folder(root: Path, out: Path, *, test: float = 0.2, seed: int = 0) -> dict[str, dict[str, int]]:
    """Writes out/train/<class>/ and out/test/<class>/ with the images of root/<class>/, and leaves those as they are.

    Which images are for testing depends on the seed and on their names alone. Files are hard links where the file
    system has them, so that they take no room, else copies. `out` is there as a whole or not at all.

    Args:
        root: holds two class folders or more.
        out: a new or empty directory, outside of `root`.
        test: part of the images of every class.
        seed: another one chooses other images.

    Returns:
        The number of images, by part and class.

    Raises:
        DataError: no such folder, a class with too few images, or a place that cannot be taken.
        OSError: a file cannot be written.
    """
    if out.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{out} lies in {root}; expected a new directory elsewhere")
    if os.path.lexists(out) and (not out.is_dir() or out.is_symlink() or any(out.iterdir())):
        raise DataError(f"{out} is there already; expected a new or empty directory")
    # a class may be called train, too
    if there := [part for part in ("train", *TEST_PARTS) if has_class_folders(root / part)]:
        raise DataError(
            f"{shown(root)} has class folders in {' and '.join(there)} already; to divide {there[0]}, give "
            f"{shown(root / there[0])}"
        )
    listing = list_classes(root)
    chosen: dict[str, list[bytes]] = {"train": [], "test": []}
    counts: dict[str, dict[str, int]] = {"train": {}, "test": {}}
    for label, name in enumerate(listing.class_names):
        rows = (listing.labels == label).nonzero().flatten().tolist()
        # by their digests: images that come later change the place of none
        files = sorted((listing.names[row] for row in rows), key=lambda file: _place(file, seed))
        number = round(len(files) * test)
        if not 0 < number < len(files):
            raise DataError(
                f"class {shown(name)} has {len(files)} images, of which {test:g} would be {number} for testing; "
                "expected at least one for training and one for testing: add images, give another --test, or leave the "
                "class out"
            )
        for part, some in (("test", files[:number]), ("train", files[number:])):
            chosen[part] += some
            counts[part][listed_name(name)] = len(some)
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out.parent, out.name)
    temporary = temporary_beside(out)
    try:
        for part, files in chosen.items():
            for file in files:
                _place_file(os.fsencode(root) + b"/" + file, os.fsencode(temporary / part) + b"/" + file)
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _place(file: bytes, seed: int) -> bytes:
    return hashlib.sha256(b"%d/" % seed + file).digest()


def _place_file(source: bytes, target: bytes) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120
    # what a link leads to, which may be named from where it lies
    source = os.path.realpath(source)
    try:
        os.link(source, target)
    # another file system, or one without hard links
    except OSError:
        shutil.copyfile(source, target)

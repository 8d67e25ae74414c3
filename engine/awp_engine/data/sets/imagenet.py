"""ImageNet (Russakovsky et al., IJCV 2015) and Tiny-ImageNet (Stanford CS231n), as their archives unpack.

Classes are WordNet ids, in sorted order.
"""

import os
from pathlib import Path

import torch

from awp_engine.data.dataset import DataError
from awp_engine.data.sets.files import Listing, PackedNames, list_classes, list_images, listed_name, shown

IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation with which public ImageNet models are trained."""
_ANNOTATIONS = "val_annotations.txt"


def list_imagenet(root: Path, skip: frozenset[str]) -> tuple[Listing, Listing]:
    """Lists ROOT/train/<wnid>/*.JPEG and ROOT/val/<wnid>/*.JPEG.

    Raises:
        DataError: a part is missing, or val's images are not in class folders.
    """
    val = root / "val"
    train = list_classes(root / "train", skip=skip)
    if val.is_dir():
        names = [entry.name for entry in os.scandir(val)]
        flat = [name for name in names if name.lower().endswith((".jpeg", ".jpg"))]
        if flat and not any((val / name).is_dir() for name in names):
            raise DataError(
                f"{val} has {len(flat)} images in no class folders; expected val/<wnid>/*.JPEG as in train: move every "
                "image into its class's folder, which ILSVRC2012_validation_ground_truth.txt of the development kit "
                "gives, line by line in the order of the images' names"
            )
    return train, list_classes(val, skip=skip)


def is_tiny_imagenet(root: Path) -> bool:
    """Whether ROOT holds Tiny-ImageNet as its archive unpacks."""
    return (root / "val" / _ANNOTATIONS).is_file()


def list_tiny_imagenet(root: Path, skip: frozenset[str]) -> tuple[Listing, Listing]:
    """Lists ROOT/train/<wnid>/images/*.JPEG and ROOT/val/images/*.JPEG, whose classes val/val_annotations.txt gives.

    A val that has been sorted into class folders is taken as well, where there are no annotations.

    Raises:
        DataError: a part is missing, wnids.txt has other classes than train, or an image of val has no class.
    """
    train = list_classes(root / "train", skip=skip, inside="images")
    given = root / "wnids.txt"
    if given.is_file():
        odd = set(given.read_text(errors="surrogateescape").split()) ^ set(train.class_names)
        if odd:
            one = shown(min(odd))
            raise DataError(
                f"{given} and {root / 'train'} differ in {len(odd)} classes, such as {one}; expected the same ones: "
                "unpack the archive again"
            )
    val = root / "val"
    if is_tiny_imagenet(root):
        return train, _annotated(val, train.class_names, skip)
    if (val / "images").is_dir():
        raise DataError(
            f"{val / _ANNOTATIONS} is missing; expected the classes of val/images: unpack the archive again"
        )
    return train, list_classes(val, skip=skip)


def list_tiny_val(root: Path, skip: frozenset[str]) -> Listing:
    """Lists ROOT/val/images/*.JPEG where there is no train; the classes are those that val_annotations.txt names.

    Raises:
        DataError: as `list_tiny_imagenet`.
    """
    val = root / "val"
    lines = (val / _ANNOTATIONS).read_text(errors="surrogateescape").splitlines()
    return _annotated(val, tuple(sorted({line.split("\t")[1] for line in lines if "\t" in line})), skip)


def _annotated(val: Path, class_names: tuple[str, ...], skip: frozenset[str]) -> Listing:
    """Rows in the order of the names; lines are name, class and a box, between tabs."""
    path, folder = val / _ANNOTATIONS, os.fsencode(val / "images")
    numbers = {os.fsencode(name): label for label, name in enumerate(class_names)}
    labels: dict[bytes, int] = {}
    lines, images = path.read_bytes().splitlines(), list_images(folder)
    for number, line in enumerate(lines, 1):
        name, *rest = line.split(b"\t")
        if not rest or rest[0] not in numbers or name in labels:
            why = "names an image for the second time" if name in labels else "names no class of train"
            raise DataError(f"{path}: line {number} {why}: {shown(line[:80])!r}; unpack the archive again")
        labels[name] = numbers[rest[0]]
    odd = labels.keys() ^ set(images)
    if odd:
        name = min(odd)
        where, other = (path, folder) if name in labels else (folder, path)
        raise DataError(
            f"{shown(name)} is in {shown(where)} but not in {shown(other)}; expected every "
            "image in both: unpack the archive again"
        )
    kept = [name for name in images if f"{val.name}/images/{listed_name(name)}" not in skip]
    if not kept:
        raise DataError(f"{shown(folder)} has no image left: all {len(images)} are skipped; expected some")
    return Listing(
        val,
        PackedNames.pack([[b"images/" + name for name in kept]]),
        torch.tensor([labels[name] for name in kept]),
        class_names,
    )

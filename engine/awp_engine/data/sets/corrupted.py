"""Corrupted test sets by kind and severity (Hendrycks, Dietterich, ICLR 2019).

CIFAR-10-C and CIFAR-100-C are arrays, KIND.npy, of which labels.npy holds the labels; ImageNet-C is folders,
KIND/SEVERITY/CLASS/*.JPEG, and so may be any other.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from awp_engine.config.data_sets import where_to_get
from awp_engine.data.dataset import DataError, RawDataset
from awp_engine.data.sets.cifar import CIFAR10, CIFAR100
from awp_engine.data.sets.files import shown
from awp_engine.data.sets.imagenet import IMAGENET_STATISTICS
from awp_engine.data.sets.npy import Expect, alone, reading
from awp_engine.data.sets.sources import Source, files_of_test

SEVERITIES = range(1, 6)
_IMAGES = 10_000
_LABELS = "labels.npy"


def corruptions(root: Path, name: str) -> dict[str, tuple[int, ...]]:
    """The kinds that lie in ROOT, in the order of their names, with their severities.

    Raises:
        DataError: there is none.
    """
    if name in ("cifar10-c", "cifar100-c"):
        return dict.fromkeys(_arrays(root, name), tuple(SEVERITIES))
    kinds = {
        kind: {str(number) for number in SEVERITIES}.intersection(_folders(root / kind)) for kind in _folders(root)
    }
    found = {kind: tuple(sorted(map(int, numbers))) for kind, numbers in kinds.items() if numbers}
    if not found:
        raise _no_corruptions(root, name)
    return found


def _arrays(root: Path, name: str) -> dict[str, Path]:
    kinds = {path.stem: path for path in sorted(root.glob("*.npy")) if path.name != _LABELS}
    if not kinds or not (root / _LABELS).is_file():
        raise DataError(
            f"{root} holds no {name}; expected files such as gaussian_noise.npy, and {_LABELS}{where_to_get(name)}"
        )
    return kinds


def _no_corruptions(root: Path, name: str) -> DataError:
    return DataError(f"{root} has no corruptions; expected KIND/SEVERITY/CLASS/* there{where_to_get(name)}")


def read_cifar_c(root: Path, name: str, kind: str | None, severity: int | None) -> RawDataset:
    """The test images of `cifar10-c` or `cifar100-c` under one corruption.

    KIND.npy is uint8 [50000, 32, 32, 3], 10,000 images a severity from 1 to 5, in the order of labels.npy.

    Raises:
        DataError: kind or severity is none of those that are there, which are named, or a file is damaged.
    """
    kinds = _arrays(root, name)
    path = kinds[_chosen("corruption", kind, kinds, root)]
    number = int(_chosen("severity", severity, map(str, SEVERITIES), path))
    layout = CIFAR10 if name == "cifar10-c" else CIFAR100
    classes = layout.class_names
    count = len(SEVERITIES) * _IMAGES
    rows = slice((number - 1) * _IMAGES, number * _IMAGES)
    with reading(path, "an .npy file of a plain array") as file:
        images = alone(path, file, _exactly((count, 32, 32, 3), "uint8")).open()[rows]
    with reading(root / _LABELS, "an .npy file of a plain array") as file:
        labels = alone(root / _LABELS, file, _exactly((count,), "whole numbers")).open()[rows].astype(np.int64)
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(f"{root / _LABELS} has label {labels.max()}; expected 0 to {len(classes) - 1}: is it {name}?")
    test = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)
    # the statistics of clean images, for models that are normalised by the data set's
    return RawDataset.of(None, test, classes, statistics=(layout.mean, layout.std))


def open_folders_c(root: Path, name: str, kind: str | None, severity: int | None) -> Source:
    """The images of ROOT/KIND/SEVERITY/CLASS, as a test-only data set.

    Raises:
        DataError: kind or severity is none of those that are there, which are named, or there are no class folders.
    """
    kinds = _folders(root)
    if not any(_folders(root / one) for one in kinds):
        raise _no_corruptions(root, name)
    folder = root / _chosen("corruption", kind, kinds, root)
    source = files_of_test(folder / _chosen("severity", severity, _folders(folder), folder))
    return replace(source, statistics=IMAGENET_STATISTICS) if name == "imagenet-c" else source


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _chosen(what: str, given: str | int | None, known: Iterable[str], where: Path) -> str:
    names = list(known)
    if str(given) not in names:
        got = "nothing" if given is None else repr(given)
        listed = ", ".join(shown(name) for name in names)
        raise DataError(f"--data.{what}: expected one of those in {shown(where)}: {listed}; got {got}")
    return str(given)


def _exactly(shape: tuple[int, ...], kind: str) -> Expect:
    def expect(found: tuple[int, ...], dtype: np.dtype[Any]) -> str | None:
        fits = dtype == np.uint8 if kind == "uint8" else dtype.kind in "iu"
        return None if fits and found == shape else f"{kind} {list(shape)}"

    return expect

"""Data sets by name."""

from pathlib import Path

from awp_engine.data._cifar import CIFAR10, CIFAR100, read_cifar
from awp_engine.data._dataset import DataError, Dataset, prepare
from awp_engine.data._digits import read_digits
from awp_engine.data._svhn import read_svhn

dataset_names = ("digits", "cifar10", "cifar100", "svhn", "folder")


def load_dataset(
    name: str, *, root: Path | None, held_out_fraction: float, seed: int, train_limit: int | None = None
) -> Dataset:
    """Loads a data set into memory, on the CPU, and holds out a part of its training set for model selection.

    Args:
        name: one of `dataset_names`.
        root: directory of the files; None for `digits`, which ship inside scikit-learn.
        held_out_fraction: part of every class that is held out, in [0, 1).
        seed: of the hold-out alone. Runs with different seeds should share it, so that their held-out figures compare.
        train_limit: train on so many images alone, as many of every class; None for all that are not held out. Neither
            the held-out images nor those of a smaller limit depend on it.

    Raises:
        DataError: the data set is unknown, or its files are missing or not as they should be, or it has fewer training
            images than train_limit, or more classes.
        ValueError: held_out_fraction out of range.
    """
    if name not in dataset_names:
        raise DataError(f"data set: unknown name {name!r}; expected one of {', '.join(dataset_names)}")
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction: {held_out_fraction}; expected a number in [0, 1)")
    if name == "digits":
        if root is not None:
            raise DataError(
                f"--data.root {root} was given, but digits ship inside scikit-learn; drop it or choose another preset"
            )
        raw = read_digits()
    else:
        root = _existing(name, root)
        if name == "folder":
            # Pillow is imported for those who need it only.
            from awp_engine.data._folder import read_folder

            raw = read_folder(root)
        elif name == "svhn":
            raw = read_svhn(root)
        else:
            raw = read_cifar(root, CIFAR10 if name == "cifar10" else CIFAR100)
    return prepare(name, raw, held_out_fraction=held_out_fraction, seed=seed, train_limit=train_limit)


def _existing(name: str, root: Path | None) -> Path:
    if root is None:
        raise DataError(f"--data.root is required for {name}: give the directory that holds its files")
    if not root.is_dir():
        raise DataError(f"--data.root {root} is not a directory; expected the one that holds the files of {name}")
    return root

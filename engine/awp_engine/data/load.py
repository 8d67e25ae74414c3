"""Data sets by name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from awp_engine.config import DataConfig
from awp_engine.config.data_sets import CORRUPTED, DATA_SETS, OWN, SHIFTED, is_own, where_to_get
from awp_engine.data.dataset import (
    DataError,
    Dataset,
    Statistics,
    channel_statistics,
    divide,
    prepare,
    sampled,
    streamed_fingerprint,
)
from awp_engine.data.loaders.choose import InMemory, LoaderName, Loading, free_memory, shape_of
from awp_engine.data.loaders.files_loader import Reader
from awp_engine.data.loaders.framing import Framing
from awp_engine.data.loaders.torch_loader import framed
from awp_engine.data.sets.cifar import CIFAR10, CIFAR100, read_cifar
from awp_engine.data.sets.corrupted import corruptions, open_folders_c, read_cifar_c
from awp_engine.data.sets.digits import read_digits
from awp_engine.data.sets.inspect import decode
from awp_engine.data.sets.mnist import read_mnist
from awp_engine.data.sets.own import OwnData
from awp_engine.data.sets.scan_list import bad_files
from awp_engine.data.sets.shifted import open_shifted
from awp_engine.data.sets.sources import Source, open_source, source_names
from awp_engine.data.sets.store import EncodedImages, ImageArrays
from awp_engine.data.sets.svhn import read_svhn
from awp_engine.data.split import Split, StreamedSplit

dataset_names, corrupted_names, shifted_names = tuple(DATA_SETS), tuple(CORRUPTED), tuple(SHIFTED)
# the hold-out is the same for every run, so that runs of different seeds can be compared
_HOLD_OUT_SEED = 0
_Part = Split | StreamedSplit
# of the images that cannot be used, in a message
_SHOWN = 6
# of the free memory, what a user's own data may fill
_OWN_SHARE = 0.8


def _silent(_: str) -> None:
    return


def load_data(data: DataConfig, loading: Loading | None = None, say: Callable[[str], None] = _silent) -> Dataset:
    """The data set that the settings name; the code of a `file.py:factory` is run.

    Args:
        data: the settings.
        loading: how; None: as the settings want it, on the CPU.
        say: is told what takes long or much memory.

    Raises:
        DataError: naming the file that is missing or damaged.
    """
    return load_dataset(
        data.name,
        root=data.root,
        held_out_fraction=data.held_out_fraction,
        seed=_HOLD_OUT_SEED,
        train_limit=data.train_limit,
        loading=loading or data_loading(data, torch.device("cpu")),
        say=say,
    )


def data_loading(data: DataConfig, device: torch.device, root: Path | None = None) -> Loading:
    """How the settings of data want images to be loaded.

    Args:
        data: the settings.
        device: where batches are wanted.
        root: of the data set, in place of the settings'.

    Raises:
        DataError: files of the data set are listed as unusable, and are not to be skipped.
    """
    root = root or data.root
    least_area = data.crop_scale if data.crop == "resized" else None
    return Loading(
        loader=data.loader,
        device=device,
        framing=Framing(size=data.image_size, least_area=least_area, central=data.center_crop),
        workers=data.workers,
        resident_share=data.resident_share,
        # a user's own code opens what it wants to: the list says nothing about that
        skip=frozenset() if root is None or is_own(data.name) else bad_files(root, data.bad_files, path=data.bad_list),
    )


def load_dataset(
    name: str,
    *,
    root: Path | str | None,
    held_out_fraction: float,
    seed: int,
    train_limit: int | None = None,
    loading: Loading | None = None,
    need_train: bool = True,
    say: Callable[[str], None] = _silent,
) -> Dataset:
    """Opens a data set, and holds out a part of its training set for model selection.

    Args:
        name: one of `dataset_names`, or `package.module:factory` or `file.py:factory`, whose code is run.
        root: directory of the files; None for `digits`, which ship inside scikit-learn.
        held_out_fraction: part of every class that is held out, in [0, 1).
        seed: of the hold-out alone. Runs with different seeds should share it, so that their held-out figures compare.
        train_limit: train on so many images alone, as many of every class; None for all that are not held out. Neither
            the held-out images nor those of a smaller limit depend on it.
        loading: where the images are wanted, and how they get there; None reads all of them into the CPU's memory.
        need_train: else the training part may be missing, and is then empty.
        say: is told what takes long or much memory.

    Raises:
        DataError: the data set is unknown, or its files are missing or not as they should be, or it has fewer training
            images than train_limit, or more classes.
        ValueError: held_out_fraction out of range.
    """
    loading = loading or Loading()
    root = None if root is None else Path(root)
    if name not in dataset_names and not is_own(name):
        raise DataError(f"data set: unknown name {name!r}; expected one of {', '.join(dataset_names)}, or {OWN}")
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction: {held_out_fraction}; expected a number in [0, 1)")
    if name == "digits" and root is not None:
        raise DataError(
            f"--data.root {root} was given, but digits ship inside scikit-learn; drop it, or give --data.name or "
            "another preset"
        )
    divided = {"held_out_fraction": held_out_fraction, "seed": seed, "train_limit": train_limit}
    if name in source_names:
        source = open_source(name, _existing(name, root), skip=loading.skip, need_train=need_train)
        data = _from_source(name, source, loading, **divided)
        return data if source.train is not None else replace(data, notes=_test_alone(root))
    if is_own(name):
        return _load_own(name, root, loading, need_train, say, divided)
    try:
        if name == "digits":
            raw = read_digits()
        elif name == "svhn":
            raw = read_svhn(_existing(name, root), need_train=need_train)
        elif name in ("mnist", "fashion-mnist"):
            raw = read_mnist(_existing(name, root), name, need_train=need_train)
        else:
            raw = read_cifar(_existing(name, root), CIFAR10 if name == "cifar10" else CIFAR100, need_train=need_train)
    except OSError as error:
        raise DataError(
            f"{error.filename or root} cannot be read: {error.strerror}; expected a file of {name}"
        ) from error
    data = _placed(prepare(name, raw, **divided), loading)
    return data if len(raw.train_labels) else replace(data, notes=_test_alone(root))


def _test_alone(root: Path | None) -> tuple[str, ...]:
    return (f"{root} has no training images: its test images alone are used",)


def list_corruptions(name: str, root: Path | None) -> dict[str, tuple[int, ...]]:
    """The kinds of a corrupted test set that are there, with their severities.

    Raises:
        DataError: there is none.
    """
    root = _existing(name, root)
    try:
        return corruptions(root, name)
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read: {error.strerror}; expected {name}") from error


def load_corrupted(
    name: str, *, root: Path | None, kind: str | None, severity: int | None, loading: Loading | None = None
) -> Dataset:
    """Opens a corrupted test set, whose training part is empty.

    Args:
        name: one of `corrupted_names`.
        root: the directory that holds it.
        kind: of the corruption, as its file or folder is named.
        severity: 1 to 5.
        loading: as in `load_dataset`.

    Raises:
        DataError: there is no such corruption, which names those that are there, or files are not as they should be.
    """
    root, loading = _existing(name, root), loading or Loading()
    full_name, divided = f"{name} {kind} {severity}", {"held_out_fraction": 0.0, "seed": 0, "train_limit": None}
    try:
        if name in ("cifar10-c", "cifar100-c"):
            raw = read_cifar_c(root, name, kind, severity)
            return _placed(prepare(full_name, raw, **divided), replace(loading, framing=Framing()))
        source = open_folders_c(root, name, kind, severity)
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be read: {error.strerror}; expected {name}") from error
    if name == "imagenet-c":
        # its images were cut out of the middle before they were corrupted
        loading = replace(loading, framing=Framing(size=loading.framing.size))
    return _from_source(full_name, source, loading, **divided)


def load_shifted(name: str, *, root: Path | None, loading: Loading | None = None) -> Dataset:
    """Opens a shifted test set of ImageNet, whose training part is empty, with ImageNet's classes.

    Args:
        name: one of `shifted_names`.
        root: the directory of its class folders.
        loading: as in `load_dataset`.

    Raises:
        DataError: files are not as they should be.
    """
    root = _existing(name, root)
    return _from_source(
        name, open_shifted(root, name), loading or Loading(), held_out_fraction=0.0, seed=0, train_limit=None
    )


def _load_own(
    name: str,
    root: Path | None,
    loading: Loading,
    need_train: bool,
    say: Callable[[str], None],
    divided: dict[str, Any],
) -> Dataset:
    framing = loading.framing
    if framing.least_area is not None:
        raise DataError(f"--data.crop resized: the images of {name} are kept at one size; use --data.crop pad")

    def fit(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return framed(image, image.shape[2], framing, framing.window(image.shape[0], image.shape[1], None))

    available = int(_OWN_SHARE * free_memory(torch.device("cpu")))
    data = OwnData(name, root, fit=fit, available=available, say=say)
    raw = data.read(need_train=need_train)
    first = None if need_train else data.train_length()
    return _placed(prepare(name, raw, **divided, first_test_id=first), replace(loading, framing=Framing()))


def _existing(name: str, root: Path | None) -> Path:
    if root is None:
        raise DataError(
            f"--data.root is required for {name}: give the directory that holds its files{where_to_get(name)}"
        )
    if not root.is_dir():
        raise DataError(
            f"--data.root {root} is not a directory; expected the one that holds the files of {name}"
            f"{where_to_get(name)}"
        )
    return root


def _placed(data: Dataset, loading: Loading) -> Dataset:
    """A data set in the CPU's memory, where `loading` wants it."""
    splits: dict[str, Split] = {"train": data.train, "held_out": data.held_out, "test": data.test}  # pyright: ignore[reportAssignmentType]
    store = splits["train"]
    size = loading.framing.size
    if size is not None and store.shape[1:] != (size, size):
        height, width = store.shape[1:]
        raise DataError(f"--data.image-size {size}: {data.name} has images of {width}x{height}; leave it out")
    loader = loading.choose(InMemory(store), sum(map(len, splits.values())), store.shape)
    if loader == "resident":
        placed = {part: split.to(loading.device) for part, split in splits.items()}
    else:
        placed = {
            part: _streamed(InMemory(split), split.labels, split.ids, split.shape, loading, loader)
            for part, split in splits.items()
        }
    return replace(data, **placed, loader=loader)


def _streamed(
    store: EncodedImages | ImageArrays,
    labels: Tensor,
    ids: Tensor,
    shape: tuple[int, int, int],
    loading: Loading,
    loader: LoaderName,
) -> StreamedSplit:
    """All images of a store, made batch by batch."""
    rows, labels = torch.arange(len(store)), labels.to(loading.device)
    made_by = loading.open(loader, store, shape)
    return StreamedSplit(store=store, loader=made_by, shape=shape, rows=rows, labels=labels, ids=ids)


def _from_source(
    name: str, source: Source, loading: Loading, *, held_out_fraction: float, seed: int, train_limit: int | None
) -> Dataset:
    if source.train is None:
        return _from_test(name, source, loading)
    shape = shape_of(source.train, loading.framing)
    train_count, test_count = len(source.train), len(source.test)
    loader = loading.choose(source.train, train_count + test_count, shape)
    train_ids, test_ids = torch.arange(train_count + test_count).split([train_count, test_count])
    full = _streamed(source.train, source.train_labels, train_ids, shape, loading, loader)
    test = _streamed(source.test, source.test_labels, test_ids, shape, loading, loader)
    train, held_out, rows = divide(
        full, source.class_names, held_out_fraction=held_out_fraction, seed=seed, train_limit=train_limit
    )
    used = full.select(rows)
    digests = [streamed_fingerprint(part, source.class_names, _framing_key(loading)) for part in (used, test)]
    if loader == "resident":
        parts = [train, held_out, test]
        try:
            train, held_out, test = (split.resident() for split in parts)
        except DataError as error:
            raise _with_others(error, parts, loading) from None
    statistics = source.statistics or _statistics(train, held_out, sampled(used))
    return _of_source(name, source, (train, held_out, test), statistics, digests, loader)


def _from_test(name: str, source: Source, loading: Loading) -> Dataset:
    """A data set without a training part."""
    shape = shape_of(source.test, loading.framing)
    loader = loading.choose(source.test, len(source.test), shape)
    ids = torch.arange(len(source.test))
    test = _streamed(source.test, source.test_labels, ids, shape, loading, loader)
    digest = streamed_fingerprint(test, source.class_names, _framing_key(loading))
    statistics = source.statistics or channel_statistics([test.select(sampled(test)).resident().images])
    test = test.resident() if loader == "resident" else test
    none = test.select(ids[:0])
    data = _of_source(name, source, (none, none, test), statistics, [digest, digest], loader)
    return replace(data, of_test=source.statistics is None)


def _framing_key(loading: Loading) -> str:
    """What the fingerprint holds of how images are framed."""
    return "" if loading.framing.size is None else f"{loading.framing.central:.6g}"


def _of_source(
    name: str,
    source: Source,
    parts: tuple[_Part, _Part, _Part],
    statistics: Statistics,
    digests: list[str],
    loader: LoaderName,
) -> Dataset:
    train, held_out, test = parts
    (mean, std), (digest, test_digest) = statistics, digests
    return Dataset(
        name=name,
        train=train,
        held_out=held_out,
        test=test,
        class_names=source.class_names,
        named=source.named,
        mean=mean,
        std=std,
        fingerprint=digest,
        test_fingerprint=test_digest,
        loader=loader,
        notes=source.notes,
    )


def _statistics(train: Split | StreamedSplit, held_out: Split | StreamedSplit, ids: Tensor) -> Statistics:
    """Of the images with these ids: the same ones for every loader."""
    parts = [part.select(torch.nonzero(torch.isin(part.ids.cpu(), ids)).squeeze(1)) for part in (train, held_out)]
    return channel_statistics([part.resident().images for part in parts])


def _with_others(error: DataError, parts: list[StreamedSplit], loading: Loading) -> DataError:
    """The error about one file, and the names of all others that cannot be used either."""
    unusable: dict[int, tuple[str, str]] = {}
    for split in parts:
        store = split.store
        if not isinstance(store, EncodedImages):
            return error
        reader = Reader(split.shape, loading.framing)
        for row, sample in zip(split.rows.tolist(), split.ids.tolist(), strict=True):
            try:
                decode(reader.read(store, row, None).content, store.name(row))
            except DataError as found:
                unusable[sample] = store.name(row), str(found)
    if len(unusable) < 2:
        return error
    (_, first), *others = (unusable[sample] for sample in sorted(unusable))
    names = [name for name, _ in others]
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return DataError(f"{first}; {len(names)} more cannot be used: {shown}")

"""What every data set is made of: splits, statistics, a fingerprint, and the hold-out rule."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from awp_engine.config.errors import UserError
from awp_engine.data.order import random_order_key
from awp_engine.data.split import Split, StreamedSplit
from awp_kernels.philox import mix_seed

_STREAM_HOLD_OUT = 4
_STREAM_TRAIN_LIMIT = 5
# that a data set's statistics are taken of: all images of CIFAR, 1,337 of 224x224
_SAMPLED_PIXELS = 2**26

AnySplit = TypeVar("AnySplit", Split, StreamedSplit)
Part = tuple[Tensor, Tensor]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of images in [0, 1], one value a channel each."""


class DataError(UserError, ValueError):
    """A data set cannot be had as asked; the message is one line with the file, what was expected and what to do."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set whose training part is divided into `train` and `held_out`.

    Attributes:
        name: as given to `load_dataset`.
        train: what is trained on; less than the files hold where a limit was given; empty for a test-only data set,
            whose statistics and fingerprint are those of the test images.
        held_out: the part of the training set that model selection uses; empty for a fraction of 0.
        test: read once, after training.
        class_names: one a label.
        named: whether the files name their classes; if not, `class_names` are the labels' numbers.
        mean, std: one value a channel, of images in [0, 1]; customary ones, or those of the training images.
        of_test: for want of both they are the test images'.
        fingerprint: SHA-256, hexadecimal, of the training part that is used (train and held out, in file order) and the
            class names; so of the whole training part, however much is held out, unless a limit leaves some of it out.
        loader: what makes its batches: "resident", "dali" or "torch".
        notes: what a user should know of how the files were taken, a line each.
    """

    name: str
    train: Split | StreamedSplit
    held_out: Split | StreamedSplit
    test: Split | StreamedSplit
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    loader: str = "resident"
    named: bool = True
    notes: tuple[str, ...] = ()
    of_test: bool = False
    test_fingerprint: str = ""

    @property
    def first_extra_id(self) -> int:
        """The id after the last one, where those of extra images begin."""
        return int(self.test.ids.max()) + 1


@dataclass(frozen=True, kw_only=True)
class RawDataset:
    """A data set as its files hold it: images uint8 [N, C, H, W], labels int64 [N].

    There are no training images where only a test part was wanted and is there. `statistics` are mean and standard
    deviation; None means those of the training images. `named` is that of `Dataset`.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    statistics: Statistics | None = None
    named: bool = True

    @classmethod
    def of(cls, train: Part | None, test: Part, class_names: tuple[str, ...], **more: Any) -> Self:
        """Of images and labels; without `train` there are no training images. `more`: the other fields."""
        images, labels = test
        train_images, train_labels = train or (images[:0], labels[:0])
        more |= {"test_images": images, "test_labels": labels, "class_names": class_names}
        return cls(train_images=train_images, train_labels=train_labels, **more)


def prepare(
    name: str,
    raw: RawDataset,
    *,
    held_out_fraction: float,
    seed: int,
    train_limit: int | None = None,
    first_test_id: int | None = None,
) -> Dataset:
    """Numbers the samples, holds some out, limits the rest, and adds statistics and fingerprint of what is left.

    `first_test_id` is the first test image's; None: they go on after the training images.

    Raises:
        ValueError: held_out_fraction out of range.
        DataError: a class would have nothing left to train on, or train_limit cannot be had.
    """
    train_count, test_count = len(raw.train_labels), len(raw.test_labels)
    full = Split(images=raw.train_images, labels=raw.train_labels, ids=torch.arange(train_count))
    first_test_id = train_count if first_test_id is None else first_test_id
    test_ids = torch.arange(first_test_id, first_test_id + test_count)
    test = Split(images=raw.test_images, labels=raw.test_labels, ids=test_ids)
    train, held_out, rows = divide(
        full, raw.class_names, held_out_fraction=held_out_fraction, seed=seed, train_limit=train_limit
    )
    used = test if not train_count else full if len(rows) == train_count else full.select(rows)
    mean, std = raw.statistics or channel_statistics([used.images])
    return Dataset(
        name=name,
        train=train,
        held_out=held_out,
        test=test,
        class_names=raw.class_names,
        named=raw.named,
        mean=mean,
        std=std,
        fingerprint=fingerprint(used, raw.class_names),
        of_test=not train_count and raw.statistics is None,
        test_fingerprint=fingerprint(test, raw.class_names),
    )


def divide(
    full: AnySplit,
    class_names: tuple[str, ...],
    *,
    held_out_fraction: float,
    seed: int,
    train_limit: int | None,
) -> tuple[AnySplit, AnySplit, Tensor]:
    """Holds out some of the training part `full`, whose ids are 0 to N - 1, and limits the rest.

    Returns:
        What is trained on; what is held out; and the rows of `full` that are either, int64, in file order.

    Raises:
        ValueError, DataError: as `prepare`.
    """
    held_out = hold_out(full, held_out_fraction, seed=seed, class_names=class_names)
    train = full.select(torch.nonzero(~held_out).squeeze(1))
    is_used = torch.ones_like(held_out)
    if train_limit is not None:
        kept = limit_evenly(train, train_limit, seed=seed, classes=len(class_names))
        train = train.select(torch.nonzero(kept).squeeze(1))
        is_used = held_out.clone()
        is_used[train.ids.cpu()] = True
    return train, full.select(torch.nonzero(held_out).squeeze(1)), torch.nonzero(is_used).squeeze(1)


def hold_out(split: Split | StreamedSplit, fraction: float, *, seed: int, class_names: tuple[str, ...]) -> Tensor:
    """Chooses the nearest whole number to `fraction` of every class, at least 1 where the fraction is positive.

    A class's samples are ranked by random words of (seed, id), so the choice depends on neither the run nor the library
    version.

    Returns:
        bool [N], true for what is held out.

    Raises:
        ValueError: fraction outside [0, 1).
        DataError: a class would have nothing left to train on.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"held_out_fraction: {fraction}; expected a number in [0, 1)")
    chosen = torch.zeros(len(split), dtype=torch.bool)
    if fraction == 0:
        return chosen
    ranked = _ranked(split, len(class_names), seed=seed, stream=_STREAM_HOLD_OUT)
    for class_name, members in zip(class_names, ranked, strict=True):
        if len(members) == 0:
            continue
        count = max(1, int(fraction * len(members) + 0.5))
        if count >= len(members):
            raise DataError(
                f"class {class_name!r} has {len(members)} training images and none is left after holding out "
                f"{fraction:g}; add images or hold out less"
            )
        chosen[members[:count]] = True
    return chosen


def limit_evenly(split: Split | StreamedSplit, limit: int, *, seed: int, classes: int) -> Tensor:
    """Chooses `limit` samples, as many of every class as there are, to within one.

    A class's samples are ranked by random words of (seed, id), and the classes take turns until the limit is reached; a
    class that has run out is passed over. So a larger limit chooses what a smaller one does, and more.

    Returns:
        bool [N], true for what is chosen.

    Raises:
        DataError: the limit is below the number of classes or above that of the samples.
    """
    if not classes <= limit <= len(split):
        raise DataError(
            f"--data.train-limit {limit}: expected at least {classes}, one image a class, and at most {len(split)}, "
            "the training images that are not held out"
        )
    labels = split.labels.cpu()
    turn = torch.empty_like(labels)
    for members in _ranked(split, classes, seed=seed, stream=_STREAM_TRAIN_LIMIT):
        turn[members] = torch.arange(len(members))
    chosen = torch.zeros(len(split), dtype=torch.bool)
    chosen[torch.argsort(turn * classes + labels, stable=True)[:limit]] = True
    return chosen


def _ranked(split: Split | StreamedSplit, classes: int, *, seed: int, stream: int) -> Iterator[Tensor]:
    """The places of each class's samples, int64 [n], by random words of (seed, id)."""
    labels = split.labels.cpu()
    key = random_order_key(split.ids.cpu(), seed=mix_seed(seed), stream=stream)
    for label in range(classes):
        members = torch.nonzero(labels == label).squeeze(1)
        yield members[torch.argsort(key[members], stable=True)]


def channel_statistics(parts: Sequence[Tensor]) -> Statistics:
    """Mean and deviation of every channel of all images uint8 [N, C, H, W], in units of [0, 1], from exact sums."""
    means, deviations = [], []
    for channel in range(parts[0].shape[1]):
        histograms = [torch.bincount(images[:, channel].flatten(), minlength=256).cpu() for images in parts]
        values = torch.stack(histograms).sum(0).tolist()
        count = sum(values)
        total = sum(value * number for value, number in enumerate(values))
        squares = sum(value * value * number for value, number in enumerate(values))
        means.append(total / count / 255)
        # One grey level at the least: a constant channel must not divide by zero.
        deviations.append(max(((squares * count - total * total) ** 0.5) / count, 1.0) / 255)
    return tuple(means), tuple(deviations)


def sampled(split: StreamedSplit) -> Tensor:
    """The ids of images at even distances, of 2^26 pixels together at most."""
    count = min(len(split), max(1, _SAMPLED_PIXELS // (split.shape[1] * split.shape[2])))
    return split.ids[torch.arange(count) * len(split) // count]


def fingerprint(split: Split, class_names: tuple[str, ...]) -> str:
    """SHA-256, hexadecimal, of a split on the CPU: its shape, images, labels and class names."""
    digest = hashlib.sha256()
    digest.update(repr((tuple(split.images.shape), class_names)).encode())
    digest.update(split.images.contiguous().numpy().data)
    digest.update(split.labels.contiguous().numpy().astype("<i8").data)
    return digest.hexdigest()


def streamed_fingerprint(split: StreamedSplit, class_names: tuple[str, ...], framing: str) -> str:
    """SHA-256, hexadecimal, of where the images come from, as the store digests it, which rows are used, their labels,
    the class names, and how they are framed.
    """
    digest = hashlib.sha256()
    digest.update(repr((split.shape, framing, split.store.digest(), class_names)).encode())
    for values in (split.rows, split.labels.cpu()):
        digest.update(values.contiguous().numpy().astype("<i8").data)
    return digest.hexdigest()

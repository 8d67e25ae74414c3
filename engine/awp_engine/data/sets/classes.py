"""Labels: as weights mean them, how much each counts, and what is odd about them."""

import dataclasses
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from awp_engine.data.dataset import AnySplit, DataError, Dataset
from awp_engine.models.class_names import difference

_SHOWN = 6
# the largest class in terms of the smallest, from where on it is said
_UNEVEN = 10


def match_classes(class_names: tuple[str, ...] | None, data: Dataset, what: str) -> tuple[Dataset, str]:
    """The data set with labels as the weights mean them: by name, since number 0 is a cat here and a dog there.

    Args:
        class_names: those of the weights; None for weights that hold none.
        data: may have the weights' classes in another order, or a part of them.
        what: the weights, for messages.

    Returns:
        The data set, of the weights' `class_names` where both sides have names; and how labels were found, in a line.

    Raises:
        DataError: the data set has a class that the weights do not know.
    """
    if class_names is not None and not data.named and not len(data.train) and len(class_names) > len(data.class_names):
        # a test part alone does not show how many classes there are
        data = dataclasses.replace(data, class_names=class_names)
    if class_names is None or not data.named:
        side = "the weights hold none" if class_names is None else f"{data.name} has none"
        return data, f"unknown: {side}, so labels are compared as numbers"
    if class_names == data.class_names:
        return data, "the same"
    number = {name: place for place, name in enumerate(class_names)}
    if any(name not in number for name in data.class_names):
        raise DataError(
            f"{what}: was trained on other classes than those of {data.name}: "
            f"{difference(class_names, data.class_names)}; give the data that it was trained on, or some of its classes"
        )
    numbers = torch.tensor([number[name] for name in data.class_names])
    parts = {part: _relabelled(getattr(data, part), numbers) for part in ("train", "held_out", "test")}
    few = f"{len(data.class_names)} of the weights' {len(class_names)} classes"
    how = few if len(data.class_names) < len(class_names) else "the weights' classes in another order"
    return dataclasses.replace(data, class_names=class_names, **parts), f"by name: {data.name} has {how}"


def class_weights(wanted: str, data: Dataset) -> list[float]:
    """Weights of the classes in the loss, whose mean over the training images is 1.

    "balanced" weighs class k by N / (K n_k), where n_k of the N training images are of it and K classes there are, so
    that every class counts the same.

    Args:
        wanted: "balanced", or the path of a JSON file: {"CLASS": WEIGHT} by name, or a list in the labels' order.
        data: whose training images count; extra ones do not.

    Raises:
        DataError: a class has no training image, or the file is no such one.
    """
    counts = _counts(data)
    if 0 in counts:
        name = data.class_names[counts.index(0)]
        raise DataError(
            f"--data.class-weights {wanted}: class {name!r} has no training image; add some or leave it out"
        )
    given = [1 / count for count in counts] if wanted == "balanced" else _given_weights(Path(wanted), data)
    mean = math.fsum(weight * count for weight, count in zip(given, counts, strict=True)) / sum(counts)
    return [weight / mean for weight in given]


def _given_weights(path: Path, data: Dataset) -> list[float]:
    flag, names = f"--data.class-weights {path}", data.class_names
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{flag}: cannot be read: {error.strerror}; expected a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f'{flag}: is no JSON ({error}); expected {{"CLASS": WEIGHT, ...}}') from error
    if isinstance(found, dict):
        if found.keys() != set(names):
            odd = min(found.keys() ^ set(names))
            what = "is no class of the data" if odd in found else "has no weight"
            raise DataError(f"{flag}: {odd!r} {what}; expected one weight for each of {len(names)} classes")
        found = [found[name] for name in names]
    if not isinstance(found, list) or len(found) != len(names):
        raise DataError(f'{flag}: expected {{"CLASS": WEIGHT}} or a list, of {len(names)} weights')
    for name, weight in zip(names, found, strict=True):
        if type(weight) not in (int, float) or not 1e-6 <= weight <= 1e6:
            raise DataError(f"{flag}: {name!r} has {weight!r}; expected a number from 1e-6 to 1e6")
    return list(map(float, found))


def label_notes(data: Dataset, *, weighted: bool = False) -> list[str]:
    """What is odd about a data set's labels, one line each: a class without images, and classes of unlike sizes.

    Args:
        data: the data set.
        weighted: whether its classes have weights already, which are advised else.
    """
    counts, tested = _counts(data), torch.bincount(data.test.labels.cpu(), minlength=len(data.class_names)).tolist()
    notes = []
    for only, lacks, images in (
        ("test images", "training images", [n for n, count in enumerate(counts) if not count and tested[n]]),
        ("training images", "test images", [n for n, count in enumerate(counts) if count and not tested[n]]),
        ("a name", "images", [n for n, count in enumerate(counts) if not count and not tested[n]]),
    ):
        if images and lacks == "images" and not data.named:
            unused = ", ".join(map(str, images[:_SHOWN])) + (", ..." if len(images) > _SHOWN else "")
            notes.append(
                f"no image has the label {unused}: labels count from 0, so make them start there and leave no gap"
            )
            continue
        names = ", ".join(repr(data.class_names[number]) for number in images[:_SHOWN])
        if images:
            more = ", ..." if len(images) > _SHOWN else ""
            notes.append(f"{len(images)} of {len(counts)} classes have {only} but no {lacks}: {names}{more}")
    some = {name: count for name, count in zip(data.class_names, counts, strict=True) if count}
    if some and max(some.values()) >= _UNEVEN * min(some.values()):
        least, most = min(some, key=lambda name: some[name]), max(some, key=lambda name: some[name])
        advice = "" if weighted else "; --data.class-weights balanced lets all count the same"
        notes.append(
            f"the classes have {some[least]:,} ({least!r}) to {some[most]:,} ({most!r}) training images{advice}"
        )
    return notes


def _counts(data: Dataset) -> list[int]:
    """Training images of every class."""
    return torch.bincount(data.train.labels.cpu(), minlength=len(data.class_names)).tolist()


def _relabelled(split: AnySplit, numbers: Tensor) -> AnySplit:
    return dataclasses.replace(split, labels=numbers.to(split.labels.device)[split.labels])

"""Labels as weights mean them."""

import dataclasses

import torch
from torch import Tensor

from awp_engine.data.dataset import AnySplit, DataError, Dataset
from awp_engine.models.class_names import difference


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


def _relabelled(split: AnySplit, numbers: Tensor) -> AnySplit:
    return dataclasses.replace(split, labels=numbers.to(split.labels.device)[split.labels])

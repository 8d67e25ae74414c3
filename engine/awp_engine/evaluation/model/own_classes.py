"""Data sets of some of a model's classes, of which only these compete for an answer."""

from dataclasses import replace

import torch

from awp_engine.config.data_sets import OWN_CLASSES_ALONE
from awp_engine.data import Dataset
from awp_engine.evaluation.model.loaded_model import LoadedModel
from awp_engine.models.some_classes import SomeClasses


def among_own_classes(loaded: LoadedModel, dataset: Dataset) -> tuple[LoadedModel, Dataset, str]:
    """The model and images as the authors of `OWN_CLASSES_ALONE` measure: among the classes that have images.

    Args:
        loaded: the model.
        dataset: its images, with labels and class names as the model has them.

    Returns:
        Both with these classes alone, and what a receipt says of it; all other data sets as they are, and "".
    """
    kept = dataset.test.labels.unique().tolist()
    if dataset.name not in OWN_CLASSES_ALONE or len(kept) == len(dataset.class_names):
        return loaded, dataset, ""
    numbers = torch.full((len(dataset.class_names),), -1)
    numbers[kept] = torch.arange(len(kept))
    test = replace(dataset.test, labels=numbers.to(dataset.test.labels.device)[dataset.test.labels])
    names = tuple(dataset.class_names[number] for number in kept)
    return (
        replace(loaded, model=SomeClasses(loaded.model, kept)),
        replace(dataset, test=test, class_names=names),
        f"; the {len(kept)} classes of {dataset.name}, of the model's {len(dataset.class_names)}, alone compete",
    )

"""Shifted test sets of ImageNet: other images of its classes, in folders by WordNet id, those of V2 by number.

ImageNet-A (Hendrycks et al., CVPR 2021), -R (Hendrycks et al., ICCV 2021), -Sketch (Wang et al., NeurIPS 2019) and -V2
(Recht et al., ICML 2019).
"""

import dataclasses
from pathlib import Path

import torch

from awp_engine.config import ConfigError
from awp_engine.config.data_sets import where_to_get
from awp_engine.data.dataset import DataError
from awp_engine.data.sets.files import has_class_folders, shown
from awp_engine.data.sets.imagenet import IMAGENET_STATISTICS
from awp_engine.data.sets.sources import Source, files_of_test
from awp_engine.models.import_timm import import_timm

_CLASSES = {"imagenet-a": 200, "imagenet-r": 200, "imagenet-sketch": 1000, "imagenet-v2": 1000}


def imagenet_wnids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in the order of the logits of public models: that of the ids.

    Raises:
        ConfigError: timm, which has the list, is missing or broken.
    """
    import_timm()
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def open_shifted(root: Path, name: str) -> Source:
    """The images of ROOT/CLASS, as a test-only data set of ImageNet's 1,000 classes.

    Raises:
        DataError: a folder is no class of ImageNet, there are not as many as the data set has, or timm is missing.
    """
    if not has_class_folders(root):
        raise DataError(f"{root} has no class folders; expected those of {name}{where_to_get(name)}")
    source = files_of_test(root)
    try:
        wnids = imagenet_wnids()
    except ConfigError as error:
        reason = str(error).removeprefix("--model.name: this model ")
        raise DataError(f"--data.name {name}: the order of ImageNet's classes {reason}") from None
    number = {wnid: place for place, wnid in enumerate(wnids)}
    # V2's folders; as text they would be in another order
    number |= {str(place): place for place in range(len(wnids))}
    expected, folders = _CLASSES[name], source.class_names
    if odd := next((folder for folder in folders if folder not in number), None):
        raise DataError(
            f"{shown(root / odd)}: expected folders by WordNet id such as {wnids[0]}, or by number from 0 to "
            f"{len(wnids) - 1}: is it {name}?"
        )
    # of 200 classes the logits of these alone are compared: fewer would be easier
    if len(folders) != expected:
        raise DataError(f"{root} has {len(folders)} class folders; expected the {expected} of {name}: unpack it again")
    labels = torch.tensor([number[folder] for folder in folders])[source.test_labels]
    return dataclasses.replace(
        source, train_labels=labels[:0], test_labels=labels, class_names=wnids, statistics=IMAGENET_STATISTICS
    )

"""SVHN, format 2: cropped digits (Netzer et al., "Reading Digits in Natural Images", NIPS workshop 2011)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from awp_engine.config.data_sets import where_to_get
from awp_engine.data.dataset import DataError, RawDataset
from awp_engine.data.sets.mat import read_mat

_TRAIN, _TEST = "train_32x32.mat", "test_32x32.mat"
# Not the images' own statistics: what the public code of robust training normalises SVHN with.
_STATISTICS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def read_svhn(root: Path, *, need_train: bool = True) -> RawDataset:
    """Reads `train_32x32.mat` and `test_32x32.mat` from `root`.

    A file holds X, uint8 [32, 32, 3, N], and y, [N, 1] of 1 to 10, where 10 is the digit 0. The number of images is not
    prescribed, so `extra_32x32.mat` may be merged into the training file. That one may be missing unless `need_train`.

    Raises:
        DataError: a file is missing, damaged or of other content.
    """
    train = _read(root / _TRAIN) if need_train or (root / _TRAIN).is_file() else None
    return RawDataset.of(train, _read(root / _TEST), tuple("0123456789"), statistics=_STATISTICS)


def _read(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise DataError(
            f"{path} is missing; svhn has the files {_TRAIN} and {_TEST}: give the directory that holds them "
            f"as --data.root{where_to_get('svhn')}"
        )
    content = read_mat(path, ("X", "y"))
    images, labels = content.get("X"), content.get("y")
    if (
        images is None
        or images.values is None
        or images.kind != "uint8"
        or len(images.shape) != 4
        or images.shape[:3] != (32, 32, 3)
        or images.shape[3] == 0
    ):
        raise DataError(f"{path}: X is {images or 'missing'}; expected uint8 [32, 32, 3, N]: download the file again")
    count = images.shape[3]
    if labels is None or labels.values is None or labels.shape != (count, 1):
        raise DataError(
            f"{path}: y is {labels or 'missing'}; expected whole numbers [{count}, 1]: download the file again"
        )
    digits = labels.values[:, 0]
    wrong = np.flatnonzero((digits < 1) | (digits > 10))
    if len(wrong):
        raise DataError(
            f"{path}: image {wrong[0]} has label {digits[wrong[0]]}; expected 1 to 10, where 10 is the digit 0: "
            "download the file again"
        )
    pixels = np.ascontiguousarray(images.values.transpose(3, 2, 0, 1))
    return torch.from_numpy(pixels), torch.from_numpy(digits.astype(np.int64) % 10)

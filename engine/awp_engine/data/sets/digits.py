"""The handwritten digits that ship inside scikit-learn (Alpaydin and Kaynak, UCI, 1998): 1,797 images of 8x8 pixels."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from awp_engine.data.dataset import DataError, RawDataset


def read_digits() -> RawDataset:
    """1,437 training and 360 test images; a grey level v of 0 to 16 becomes round(255 v / 16).

    The split is fixed: with the samples sorted by class, and by file order within a class, every fifth from the first
        on is test.

    Raises:
        DataError: scikit-learn is not installed, or has the digits no more.
    """
    # of a line 64 grey levels and the class
    values = torch.from_numpy(np.loadtxt(_file(), delimiter=",", dtype=np.int64))
    images = values[:, :-1].mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = values[:, -1].contiguous()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[torch.argsort(labels, stable=True)[::5]] = True
    train, test = (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])
    return RawDataset.of(train, test, tuple("0123456789"))


def _file() -> Path:
    """Where it lies; importing scikit-learn, for `load_digits`, would take as long as importing torch."""
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError(
            "the digits data set is a part of scikit-learn, which is not installed; run: pip install scikit-learn"
        )
    path = Path(found.origin).with_name("datasets") / "data" / "digits.csv.gz"
    if not path.exists():
        raise DataError(f"{path}: the digits data set is not there; run: pip install --force-reinstall scikit-learn")
    return path

"""The handwritten digits that ship inside scikit-learn (Alpaydin and Kaynak, UCI, 1998): 1,797 images of 8x8 pixels."""

import torch

from awp_engine.data.dataset import DataError, RawDataset


def read_digits() -> RawDataset:
    """1,437 training and 360 test images; a grey level v of 0 to 16 becomes round(255 v / 16).

    The split is fixed: with the samples sorted by class, and by file order within a class, every fifth from the first
        on is test.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits data set is a part of scikit-learn, which is not installed; run: pip install scikit-learn"
        ) from error
    values, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(values).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.from_numpy(targets).to(torch.int64)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[torch.argsort(labels, stable=True)[::5]] = True
    train, test = (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])
    return RawDataset.of(train, test, tuple("0123456789"))

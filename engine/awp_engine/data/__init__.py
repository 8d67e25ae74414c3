"""Image classification data, kept as uint8 on the training device.

Order and augmentation are functions of (seed, epoch, sample id) alone: neither batch order, nor the number of ranks,
nor the device, nor a resumed run changes what a sample looks like in an epoch.
"""

from awp_engine.data._batches import Batch, augment, eval_batches, train_batches
from awp_engine.data._dataset import DataError, Dataset, Split
from awp_engine.data._load import dataset_names, load_dataset

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "Split",
    "augment",
    "dataset_names",
    "eval_batches",
    "load_dataset",
    "train_batches",
]

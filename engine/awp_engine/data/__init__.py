"""Image classification data, kept as uint8 on the training device.

Order and augmentation are functions of (seed, epoch, sample id) alone: neither batch order, nor the number of ranks,
nor the device, nor a resumed run changes what a sample looks like in an epoch.
"""

from awp_engine.data._augment import augment
from awp_engine.data._batches import batch_sizes, eval_batches, rank_share, train_batches
from awp_engine.data._dataset import DataError, Dataset, Split
from awp_engine.data._extra import extra_fingerprint, load_extra
from awp_engine.data._load import dataset_names, load_dataset
from awp_engine.data._recipe import Batch

__all__ = [
    "Batch",
    "DataError",
    "Dataset",
    "Split",
    "augment",
    "batch_sizes",
    "dataset_names",
    "eval_batches",
    "extra_fingerprint",
    "load_dataset",
    "load_extra",
    "rank_share",
    "train_batches",
]

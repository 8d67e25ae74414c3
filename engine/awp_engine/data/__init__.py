"""Image classification data: kept as uint8 on the training device, or read and decoded batch by batch.

Order and augmentation are functions of (seed, epoch, sample id) alone: neither batch order, nor the number of ranks,
nor the loader, nor the device, nor a resumed run changes what a sample looks like in an epoch.
"""

from awp_engine.data.augment.augmentation import Augmentation
from awp_engine.data.batches import Batches, batch_sizes, eval_batches, train_batches
from awp_engine.data.dataset import DataError, Dataset
from awp_engine.data.extra import load_extra, place_extra
from awp_engine.data.load import (
    corrupted_names,
    data_loading,
    dataset_names,
    list_corruptions,
    load_corrupted,
    load_data,
    load_dataset,
    load_shifted,
    shifted_names,
)
from awp_engine.data.loaders.choose import Loading
from awp_engine.data.loaders.framing import Framing
from awp_engine.data.sets.classes import class_weights, label_notes, match_classes
from awp_engine.data.sets.files import shown
from awp_engine.data.sets.sources import source_names
from awp_engine.data.split import Split, StreamedSplit
from awp_engine.distributed.batch import Batch

__all__ = [
    "Augmentation",
    "Batch",
    "Batches",
    "DataError",
    "Dataset",
    "Framing",
    "Loading",
    "Split",
    "StreamedSplit",
    "batch_sizes",
    "class_weights",
    "corrupted_names",
    "data_loading",
    "dataset_names",
    "eval_batches",
    "label_notes",
    "list_corruptions",
    "load_corrupted",
    "load_data",
    "load_dataset",
    "load_extra",
    "load_shifted",
    "match_classes",
    "place_extra",
    "shifted_names",
    "shown",
    "source_names",
    "train_batches",
]

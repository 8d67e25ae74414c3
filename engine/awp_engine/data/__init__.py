"""Image classification data: kept as uint8 on the training device, or read and decoded batch by batch.

Order and augmentation are functions of (seed, epoch, sample id) alone: neither batch order, nor the number of ranks,
nor the loader, nor the device, nor a resumed run changes what a sample looks like in an epoch.
"""

from awp_engine.data._batches import Batches, batch_sizes, eval_batches, rank_share, train_batches
from awp_engine.data._classes import match_classes
from awp_engine.data._dataset import DataError, Dataset
from awp_engine.data._extra import load_extra
from awp_engine.data._extra_split import place_extra
from awp_engine.data._files import shown
from awp_engine.data._framing import Framing
from awp_engine.data._load import dataset_names, load_dataset
from awp_engine.data._loading import Loading, data_loading
from awp_engine.data._recipe import Batch
from awp_engine.data._sources import source_names
from awp_engine.data._split import Split, StreamedSplit

__all__ = [
    "Batch",
    "Batches",
    "DataError",
    "Dataset",
    "Framing",
    "Loading",
    "Split",
    "StreamedSplit",
    "batch_sizes",
    "data_loading",
    "dataset_names",
    "eval_batches",
    "load_dataset",
    "load_extra",
    "match_classes",
    "place_extra",
    "rank_share",
    "shown",
    "source_names",
    "train_batches",
]

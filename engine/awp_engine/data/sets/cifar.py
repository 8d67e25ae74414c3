"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009).

Both the binary and the python version of the official archives.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from awp_engine.config.data_sets import where_to_get
from awp_engine.data.dataset import DataError, RawDataset
from awp_engine.data.sets.files import class_folders_in
from awp_engine.data.sets.unpickle import read_pickle

_PIXELS = 3 * 32 * 32
_CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


@dataclass(frozen=True, kw_only=True)
class CifarLayout:
    """Where a CIFAR version keeps what.

    Attributes:
        name: of the data set.
        binary_folder, binary_train, binary_test: the binary version; a record is the label bytes and then the pixels.
        python_folder, python_train, python_test: the python version, one pickled dictionary a file.
        label_bytes: label bytes before the pixels of a binary record, of which the last is used.
        label_key: the labels in a pickled dictionary.
        train_records, test_records: images a file.
        class_names: one a label.
        mean, std: the constants that the field normalises with.
    """

    name: str
    binary_folder: str
    binary_train: tuple[str, ...]
    binary_test: str
    python_folder: str
    python_train: tuple[str, ...]
    python_test: str
    label_bytes: int
    label_key: str
    train_records: int
    test_records: int
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR10 = CifarLayout(
    name="cifar10",
    binary_folder="cifar-10-batches-bin",
    binary_train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    binary_test="test_batch.bin",
    python_folder="cifar-10-batches-py",
    python_train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    python_test="test_batch",
    label_bytes=1,
    label_key="labels",
    train_records=10_000,
    test_records=10_000,
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2471, 0.2435, 0.2616),
)

CIFAR100 = CifarLayout(
    name="cifar100",
    binary_folder="cifar-100-binary",
    binary_train=("train.bin",),
    binary_test="test.bin",
    python_folder="cifar-100-python",
    python_train=("train",),
    python_test="test",
    label_bytes=2,
    label_key="fine_labels",
    train_records=50_000,
    test_records=10_000,
    class_names=tuple(_CIFAR100_NAMES.split()),
    mean=(0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    std=(0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
)


def read_cifar(root: Path, layout: CifarLayout, *, need_train: bool = True) -> RawDataset:
    """Reads the standard files from `root`, which holds them or holds the folder that the official archive unpacks to.

    Args:
        root: the directory.
        layout: of which of the two.
        need_train: else the test file alone is enough, and the training part empty where that of it is not whole.

    Raises:
        DataError: a file is missing, has another size than the standard, is refused, or holds labels out of range.
    """
    folder, binary, whole = _find(root, layout, need_train)
    train_names, test_name = (
        (layout.binary_train, layout.binary_test) if binary else (layout.python_train, layout.python_test)
    )
    read = _read_binary if binary else _read_python
    train = None
    if whole:
        parts = [read(folder / name, layout.train_records, layout) for name in train_names]
        train = torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
    test = read(folder / test_name, layout.test_records, layout)
    return RawDataset.of(train, test, layout.class_names, statistics=(layout.mean, layout.std))


def _find(root: Path, layout: CifarLayout, need_train: bool) -> tuple[Path, bool, bool]:
    """The folder to read, whether it holds the binary version, and whether it is complete, which is preferred."""
    places = [
        (root, True, (*layout.binary_train, layout.binary_test)),
        (root / layout.binary_folder, True, (*layout.binary_train, layout.binary_test)),
        (root, False, (*layout.python_train, layout.python_test)),
        (root / layout.python_folder, False, (*layout.python_train, layout.python_test)),
    ]
    missing = {(folder, binary): [n for n in names if not (folder / n).is_file()] for folder, binary, names in places}
    for place, names in missing.items():
        if not names:
            return *place, True
    for folder, binary, names in places:
        if not need_train and names[-1] not in missing[folder, binary]:
            return folder, binary, False
    for folder, binary, names in places:
        absent = missing[folder, binary]
        if len(absent) < len(names):
            raise DataError(
                f"{folder / absent[0]} is missing; "
                f"{layout.name} has the files {', '.join(names)}: unpack the archive again"
            )
    if (meant := class_folders_in(root)) is not None:
        place = root if meant == "." else root / meant
        raise DataError(
            f"{root} holds no {layout.name}, but {place} has class folders of images: give --data.name folder"
        )
    raise DataError(
        f"{root} holds no {layout.name}; expected {layout.binary_train[0]} or {layout.python_train[0]} there "
        f"or in {layout.binary_folder} or {layout.python_folder}: give the unpacked official archive as --data.root"
        f"{where_to_get(layout.name)}"
    )


def cifar_in(root: Path) -> str | None:
    """The name of the CIFAR version whose files lie in `root`, if there is one."""
    for layout in (CIFAR10, CIFAR100):
        folders = {layout.binary_test: layout.binary_folder, layout.python_test: layout.python_folder}
        # "test" alone says nothing: any folder of images has one
        if any(
            (root / folder / test).is_file() or ((root / test).is_file() and test != "test")
            for test, folder in folders.items()
        ):
            return layout.name
    return None


def _read_binary(path: Path, records: int, layout: CifarLayout) -> tuple[Tensor, Tensor]:
    record_bytes = layout.label_bytes + _PIXELS
    size, expected = path.stat().st_size, records * record_bytes
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes; expected {expected} ({records} records of {record_bytes}): "
            "it is truncated or another file; download it again"
        )
    content = np.fromfile(path, dtype=np.uint8).reshape(records, record_bytes)
    labels = content[:, layout.label_bytes - 1].astype(np.int64)
    return _checked(path, content[:, layout.label_bytes :].copy(), labels, layout)


def _read_python(path: Path, records: int, layout: CifarLayout) -> tuple[Tensor, Tensor]:
    content = read_pickle(path)
    if "data" not in content or layout.label_key not in content:
        raise DataError(
            f"{path} has the keys {sorted(content)[:6]}; expected 'data' and {layout.label_key!r}: is it {layout.name}?"
        )
    data = content["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (records, _PIXELS):
        found = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{path}: 'data' is {found}; expected uint8 [{records}, {_PIXELS}]: download the file again")
    labels = content[layout.label_key]
    if isinstance(labels, np.ndarray):
        labels = labels.ravel().tolist()
    if not isinstance(labels, list) or len(labels) != records or not all(map(_is_byte, labels)):
        raise DataError(f"{path}: {layout.label_key!r} is no list of {records} labels; download the file again")
    return _checked(path, data.copy(), np.array(labels, dtype=np.int64), layout)


def _is_byte(label: object) -> bool:
    return type(label) is int and 0 <= label <= 255


def _checked(
    path: Path, pixels: NDArray[np.uint8], labels: NDArray[np.int64], layout: CifarLayout
) -> tuple[Tensor, Tensor]:
    classes = len(layout.class_names)
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise DataError(
            f"{path}: record {wrong[0]} has label {labels[wrong[0]]}; expected 0 to {classes - 1}: "
            f"is it {layout.name}? Download it again if it is"
        )
    return torch.from_numpy(pixels).view(-1, 3, 32, 32), torch.from_numpy(labels)

"""How images get from where they lie to where they are trained on."""

import contextlib
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from awp_engine.data.dataset import DataError, fingerprint
from awp_engine.data.loaders.array_loader import ArrayLoader
from awp_engine.data.loaders.dali_loader import DaliLoader, dali_problem
from awp_engine.data.loaders.files_loader import Reader
from awp_engine.data.loaders.framing import Framing
from awp_engine.data.loaders.torch_loader import TorchLoader
from awp_engine.data.sets.files import evenly
from awp_engine.data.sets.inspect import Header, check
from awp_engine.data.sets.store import EncodedImages, ImageArrays
from awp_engine.data.split import Loader, Split
from awp_engine.distributed.ranks import Ranks

LoaderName = Literal["auto", "resident", "dali", "torch"]
_MOST_WORKERS = 16


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The settings of loading.

    Attributes:
        loader: "resident" keeps all images in the device's memory; "dali" and "torch" make them batch by batch, from
            files by NVIDIA DALI or by Pillow in processes, from arrays by a thread that copies them; "auto" is resident
            where the images fit and are of one size, else dali for files where it is installed, else torch.
        device: where the images are wanted.
        framing: how images of files become images of one size.
        workers: threads or processes that decode; None takes one a core, shared among the ranks of a machine.
        resident_share: part of the device's free memory that auto fills with images.
        free: bytes of that memory; None: as `free_memory` finds them once it is to be chosen. See `agreed`.
        skip: files to leave out, as a scan lists them.
    """

    loader: LoaderName = "resident"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    framing: Framing = field(default_factory=Framing)
    workers: int | None = None
    resident_share: float = 0.25
    free: int | None = None
    skip: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        # without its number it is not the device of any tensor
        if self.device == torch.device("cuda"):
            object.__setattr__(self, "device", torch.device("cuda", torch.cuda.current_device()))

    def agreed(self, ranks: Ranks) -> "Loading":
        """With the least free memory of all ranks, which all have to call it before they read images.

        Each that has read its images leaves less to the others of its machine: some would come to another loader.
        """
        free = torch.tensor([free_memory(self.device)], device=self.device)
        return replace(self, free=int(ranks.gather(free).min()))

    def choose(self, store: EncodedImages | ImageArrays, images: int, shape: tuple[int, int, int]) -> LoaderName:
        """The loader that auto stands for.

        Args:
            store: what is trained on.
            images: of all parts of the data set.
            shape: channels, height and width.

        Raises:
            DataError: resident was asked for and cannot be had, or arrays are to be cut.
        """
        size, least_area, central = self.framing.size, self.framing.least_area, self.framing.central
        random_windows = size is not None and least_area is not None
        if size is not None and (random_windows or central != 1) and not isinstance(store, EncodedImages):
            raise DataError(
                f"--data.{'crop resized' if random_windows else f'center-crop {central:g}'}: the images are arrays, "
                "which are taken as they are; leave it out"
            )
        if self.loader == "resident" and random_windows:
            raise DataError(
                "--data.loader resident: random-resized crops are cut from the files' own images; "
                "use auto, dali or torch, or --data.crop pad"
            )
        if self.loader != "auto":
            return self.loader
        in_bytes = images * shape[0] * shape[1] * shape[2]
        free = free_memory(self.device) if self.free is None else self.free
        if not random_windows and in_bytes <= self.resident_share * free:
            return "resident"
        return "dali" if isinstance(store, EncodedImages) and dali_problem() is None else "torch"

    def open(self, name: LoaderName, store: EncodedImages | ImageArrays, shape: tuple[int, int, int]) -> Loader:
        """A loader for a store; for "resident" the one that fills the memory.

        Raises:
            DataError: it is not installed.
        """
        workers = self.workers if self.workers is not None else default_workers()
        reader = Reader(shape, self.framing)
        if name == "dali" or (name == "resident" and isinstance(store, EncodedImages) and dali_problem() is None):
            return DaliLoader(reader, self.device, workers)
        if isinstance(store, EncodedImages):
            return TorchLoader(reader, self.device, workers)
        return ArrayLoader(self.device)


def shape_of(store: EncodedImages | ImageArrays, framing: Framing) -> tuple[int, int, int]:
    """Channels, height and width of a store's images once they are framed.

    The first usable file stands for all; where images are resized, most of up to 1,000 decide about colour.

    Raises:
        DataError: no file can be used, or arrays are to be framed.
    """
    if isinstance(store, ImageArrays):
        size = framing.size
        if size is not None and store.shape[1:] != (size, size):
            height, width = store.shape[1:]
            raise DataError(
                f"--data.image-size {size}: the images are arrays of {width}x{height}, which are taken as they are; "
                "leave it out"
            )
        return store.shape
    first, mode = _usual(store, framing)
    return 3 if mode == "RGB" else 1, framing.size or first.height, framing.size or first.width


def _usual(store: EncodedImages, framing: Framing) -> tuple[Header, str]:
    """The first usable file's header, and the mode of most images: grey ones that are resized become colour."""
    first, refused = None, None
    for row in range(len(store)):
        try:
            first = check(store.read(row), store.name(row))
            break
        except DataError as error:
            refused = refused or error
    if first is None:
        raise refused or DataError("no images: expected at least one")
    if first.mode == "RGB" or framing.size is None:
        return first, first.mode
    modes: Counter[str] = Counter()
    for row in evenly(len(store)):
        with contextlib.suppress(DataError):
            modes[check(store.read(row), store.name(row)).mode] += 1
    return first, "RGB" if modes["RGB"] >= modes["L"] else "L"


class InMemory:
    """Images that lie in memory, as `ImageArrays`.

    Args:
        split: on the CPU.
    """

    def __init__(self, split: Split) -> None:
        self._split = split
        self.shape = split.shape
        """Channels, height, width."""

    def __len__(self) -> int:
        return len(self._split)

    def gather(self, rows: Tensor) -> Tensor:
        """uint8 [n, C, H, W] of rows int64 [n]."""
        return self._split.images[rows]

    def digest(self) -> str:
        """SHA-256, hexadecimal, of shape, images and labels."""
        return fingerprint(self._split, ())


def default_workers() -> int:
    """One a core, shared among the ranks of a machine; 16 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def free_memory(device: torch.device) -> int:
    """Bytes that nobody uses: of the device, or of this machine by its ranks."""
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[0]
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:  # noqa: PTH123
            available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = pages
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

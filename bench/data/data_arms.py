"""The processes of bench/data/data.py: one way of making batches each."""

import gc
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from awp_engine.data import Augmentation, Batches, Loading, load_dataset
from awp_engine.data.loaders.choose import LoaderName

NAMES = {"files": "folder", "arrays": "shards"}
"""Where images lie, and the data set's name for it."""
LOADERS = ("resident", "dali", "torch", "user")
"""Ours, and torch's DataLoader as its users write it: a sample at a time."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What batches are made of.

    Attributes:
        kind: "files" or "arrays".
        root: of the data set.
        batch_size: images a batch.
        device: "cpu" or "cuda".
        workers: threads or processes.
        pad, flip: of the augmentation.
    """

    kind: str
    root: Path
    batch_size: int
    device: str
    workers: int = 2
    pad: int = 4
    flip: bool = True


class LoaderWorker:
    """Makes epochs of batches, and notes how long that takes and how much memory is held."""

    def __init__(self, name: str, feed: Feed, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.name, self.feed, self.epoch = name, feed, 0

    def prepare(self) -> dict[str, Any]:
        """Opens the data set; seconds, and images."""
        begin = time.perf_counter()
        self.batches = (
            _UserBatches(self.feed) if self.name == "user" else _engine_batches(cast(LoaderName, self.name), self.feed)
        )
        return {"seconds": time.perf_counter() - begin, "images": sum(self.batches.sizes)}

    def turn(self) -> dict[str, Any]:
        """One epoch."""
        self.epoch += 1
        self.batches.set_epoch(self.epoch)
        begin, seen, most = time.perf_counter(), 0, 0
        ids = torch.zeros(sum(self.batches.sizes) * 2, dtype=torch.int64)
        for number, batch in enumerate(self.batches):
            seen += len(batch.labels)
            ids[batch.ids.cpu()] += 1
            if number % 100 == 0:
                most = max(most, _held()["anonymous"])
        if self.feed.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        gc.collect()
        return {
            "seconds": seconds,
            "images": seen,
            "every_image_once": bool((ids <= 1).all()) and int(ids.sum()) == seen,
            "peak_anonymous": most,
            **_held(),
        }


def _engine_batches(loader: LoaderName, feed: Feed) -> Batches:
    data = load_dataset(
        NAMES[feed.kind],
        root=feed.root,
        held_out_fraction=0.0,
        seed=0,
        loading=Loading(loader=loader, device=torch.device(feed.device), workers=feed.workers),
    )
    return Batches(
        data.train,
        Augmentation(pad=feed.pad, flip=feed.flip),
        global_batch_size=feed.batch_size,
        seed=0,
        memory_format=torch.channels_last,
    )


class _Sample:
    """A batch as the DataLoader of a user gives it."""

    def __init__(self, images: Tensor, labels: Tensor, ids: Tensor) -> None:
        self.images, self.labels, self.ids = images, labels, ids


class _UserDataset(Dataset):
    """One sample at a time: decode, pad and crop, mirror, to fp32; as tutorials have it."""

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        part = feed.root / "train"
        if feed.kind == "files":
            classes = sorted(entry.name for entry in part.iterdir())
            self.samples = [
                (str(path), label) for label, name in enumerate(classes) for path in sorted((part / name).iterdir())
            ]
        else:
            shards = sorted(part.glob("images-*.npy"))
            self.images = np.concatenate([np.load(path) for path in shards])
            self.labels = np.concatenate([np.load(str(path).replace("images-", "labels-")) for path in shards])

    def __len__(self) -> int:
        return len(self.samples) if self.feed.kind == "files" else len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if self.feed.kind == "files":
            path, label = self.samples[index]
            image = np.asarray(Image.open(path).convert("RGB"))
        else:
            image, label = self.images[index], int(self.labels[index])
        pad = self.feed.pad
        height, width, _ = image.shape
        image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        top, left = random.randint(0, 2 * pad), random.randint(0, 2 * pad)
        image = image[top : top + height, left : left + width]
        if self.feed.flip and random.random() < 0.5:
            image = image[:, ::-1]
        return torch.from_numpy(image.transpose(2, 0, 1).copy()).float().div(255), label, index


class _UserBatches:
    """What `Batches` offers, by a DataLoader."""

    def __init__(self, feed: Feed) -> None:
        self.feed, data = feed, _UserDataset(feed)
        self.sizes = [min(feed.batch_size, len(data) - start) for start in range(0, len(data), feed.batch_size)]
        self.loader = DataLoader(
            data,
            batch_size=feed.batch_size,
            shuffle=True,
            num_workers=feed.workers,
            pin_memory=feed.device == "cuda",
            persistent_workers=True,
        )

    def set_epoch(self, _: int) -> None:
        """Shuffled anyway."""

    def __iter__(self) -> Iterator[_Sample]:
        for images, labels, ids in self.loader:
            yield _Sample(images.to(self.feed.device, non_blocking=True), labels, ids)


def _held() -> dict[str, int]:
    """Bytes of this process and its children: memory of their own, and pages of files, which can be taken back."""
    anonymous = files = 0
    for process in [os.getpid(), *_children(os.getpid())]:
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            continue
        fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
        anonymous += (int(fields.get("RssAnon", 0)) + int(fields.get("RssShmem", 0))) << 10
        files += int(fields.get("RssFile", 0)) << 10
    return {"anonymous": anonymous, "file_pages": files}


def _children(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        try:
            own = [int(number) for number in (task / "children").read_text().split()]
        except OSError:
            continue
        found += own + [grandchild for child in own for grandchild in _children(child)]
    return found

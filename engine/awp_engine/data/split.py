"""Some of a data set's images: on the training device as a whole, or made batch by batch."""

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from awp_engine.data.loaders.framing import Images, Requests, every_row
from awp_engine.data.sets.store import EncodedImages, ImageArrays
from awp_kernels import augment

_CHUNK = 256


class AugmentArgs(NamedTuple):
    """What `awp_kernels.augment` does to an image; by default nothing."""

    pad: int = 0
    flip: bool = False
    cutout: int = 0
    fill: tuple[float, ...] | None = None


class Loader(Protocol):
    """Makes images of a store on a device."""

    device: torch.device

    def stream(self, store: Any, requests: Requests) -> Images:
        """uint8 [n, C, H, W] for each request, on the device; `store` is of a kind that the loader reads."""
        ...


class Samples(Protocol):
    """What batches are made of: a `Split`, a `StreamedSplit` or an `ExtraSplit`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of every image, [C, H, W]."""
        ...

    @property
    def device(self) -> torch.device:
        """Where images come to."""
        ...

    @property
    def largest_label(self) -> int:
        """Of all samples."""
        ...

    def __len__(self) -> int: ...

    def ids_of(self, rows: Tensor) -> Tensor:
        """The samples' ids, int64 [n], on the CPU."""
        ...

    def labels_of(self, rows: Tensor) -> Tensor:
        """The samples' labels, int64 [n]."""
        ...

    def others(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """The rows of the images that are number `numbers`, in [0, len - 1), among all but `rows`, by their ids."""
        ...

    def augmented(self, requests: Requests, args: AugmentArgs, memory_format: torch.memory_format) -> Images:
        """The images of every request, fp32 [n, C, H, W] in [0, 1]."""
        ...


class _Labelled:
    """What a split knows of its samples, wherever their images are."""

    labels: Tensor
    ids: Tensor

    @property
    def largest_label(self) -> int:
        """Of all labels; -1 if there are none."""
        return int(self.labels.max()) if len(self.labels) else -1

    def others(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Which rows have the place `numbers`, in [0, N - 1), among all but `rows` in the order of ids; on the CPU."""
        by_id = torch.argsort(self._ids_on_cpu, stable=True)
        place = torch.argsort(by_id, stable=True)
        return by_id[numbers + (numbers >= place[rows])]

    @functools.cached_property
    def _ids_on_cpu(self) -> Tensor:
        # asking a GPU for them waits for it
        return self.ids.cpu()

    def ids_of(self, rows: Tensor) -> Tensor:
        """Sample ids, int64 [n] on the CPU, of rows int64 [n] on the CPU."""
        return self._ids_on_cpu[rows]

    def labels_of(self, rows: Tensor) -> Tensor:
        """Labels, int64 [n] on the split's device, of rows int64 [n] on the CPU."""
        return self.labels[rows.to(self.labels.device, non_blocking=True)]


@dataclass(frozen=True, kw_only=True)
class Split(_Labelled):
    """Some of a data set's images, all on one device.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        ids: int64 [N]; a sample's place in the order of the files, the test part after the training part and extra
            images after both, so unique in the data set.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.images.device

    def to(self, device: torch.device | str) -> Self:
        """The same split on another device."""
        return type(self)(images=self.images.to(device), labels=self.labels.to(device), ids=self.ids.to(device))

    def select(self, indices: Tensor) -> Self:
        """The samples at `indices`, int64 [M], in that order."""
        return type(self)(images=self.images[indices], labels=self.labels[indices], ids=self.ids[indices])

    def resident(self) -> "Split":
        """Itself."""
        return self

    def augmented(self, requests: Requests, args: AugmentArgs, memory_format: torch.memory_format) -> Images:
        """fp32 [n, C, H, W] in [0, 1] for each request, on the split's device."""
        for request in requests.make():
            yield augment(
                self.images,
                rows=request.rows.to(self.device, non_blocking=True),
                sample_ids=request.ids.to(self.device, non_blocking=True),
                seed=request.seed or 0,
                memory_format=memory_format,
                **args._asdict(),
            )


@dataclass(frozen=True, kw_only=True)
class StreamedSplit(_Labelled):
    """Some of a data set's images, which are read and decoded batch by batch.

    Attributes:
        store: where they lie.
        loader: what makes them.
        shape: channels, height and width of what it makes.
        rows: of the store, int64 [N] on the CPU.
        labels: int64 [N], on the loader's device.
        ids: int64 [N] on the CPU, as those of `Split`.
    """

    store: EncodedImages | ImageArrays
    loader: Loader
    shape: tuple[int, int, int]
    rows: Tensor
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def device(self) -> torch.device:
        """Where batches are."""
        return self.loader.device

    def select(self, indices: Tensor) -> Self:
        """The samples at `indices`, int64 [M], in that order."""
        indices = indices.cpu()
        labels = self.labels[indices.to(self.labels.device)]
        return replace(self, rows=self.rows[indices], labels=labels, ids=self.ids[indices])

    def resident(self) -> Split:
        """All of it in the device's memory."""
        channels, height, width = self.shape
        pixels = torch.empty(len(self), height, width, channels, dtype=torch.uint8, device=self.device)
        done = 0
        for images in self._stream(every_row(len(self), _CHUNK)):
            pixels[done : done + len(images)] = images.permute(0, 2, 3, 1)
            done += len(images)
        return Split(images=pixels.permute(0, 3, 1, 2), labels=self.labels, ids=self.ids.to(self.device))

    def augmented(self, requests: Requests, args: AugmentArgs, memory_format: torch.memory_format) -> Images:
        """As `Split.augmented`."""
        return augment_streamed(self, self._stream(requests), requests, args, memory_format)

    def _stream(self, requests: Requests) -> Images:
        return self.loader.stream(self.store, requests.nonempty(self.rows))


def augment_streamed(
    of: Samples, streamed: Images, requests: Requests, args: AugmentArgs, memory_format: torch.memory_format
) -> Images:
    """What `args` makes of images uint8 [n, *of.shape] as they come; no image comes for an empty request."""
    shape, device = of.shape, of.device
    with contextlib.closing(streamed):
        for request in requests.make():
            if not len(request.rows):
                yield torch.empty(0, *shape, device=device)
                continue
            ids, seed = request.ids.to(device, non_blocking=True), request.seed or 0
            yield augment(next(streamed), sample_ids=ids, seed=seed, memory_format=memory_format, **args._asdict())

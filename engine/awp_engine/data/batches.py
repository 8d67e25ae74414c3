"""Batches of one epoch, cut and augmented on the device that holds the images."""

import contextlib
import functools
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from awp_engine.config import own_images
from awp_engine.data.augment.augmentation import Augmentation, DrawnSamples
from awp_engine.data.loaders.framing import Images, Request, Requests, every_row
from awp_engine.data.order import drawn_rows, extra_rows, own_rows, random_order_key
from awp_engine.data.split import AugmentArgs, Samples, Split, StreamedSplit
from awp_engine.distributed.batch import Batch
from awp_engine.distributed.share import rank_share
from awp_kernels.philox import mix_seed

_STREAM_PLACE = 9
_VIEW = 6


def train_batches(
    split: Samples,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    drop_last: bool = False,
    extra: Samples | None = None,
    extra_fraction: float = 0.5,
    extra_replacement: bool = False,
    extra_alone: int = 0,
    epoch_images: int | None = None,
    first: int = 0,
    rank: int = 0,
    ranks: int = 1,
    memory_format: torch.memory_format = torch.contiguous_format,
    view: int = 0,
) -> Generator[Batch, None, None]:
    """One epoch of shuffled, augmented batches; every sample of `split` comes exactly once, unless `epoch_images`.

    What a sample looks like depends on (seed, epoch, id) alone, and under CutMix and MixUp on the set it belongs to.

    Extra images are taken in a random order that goes on from epoch to epoch: each is used before any is used again,
    and the order is drawn anew for every pass, the first of which begins with epoch 1. An epoch that takes more of them
    than there are has some more than once, with the same pixels. With `extra_replacement` each place of an epoch draws
    its own from all of them. In which place of its batch a sample stands is random too.

    Args:
        split: what is trained on, in memory or made batch by batch.
        augmentation: what is done to images and labels.
        batch_size: samples a batch, extra ones included; the last one may be smaller.
        seed: the run's seed.
        epoch: with the seed, decides order and augmentation.
        drop_last: leave out a last batch that is not full, for the sake of equal shapes.
        extra: further images, of the same shape on the same device, with ids of their own. They are mixed with each
            other, not with those of `split`.
        extra_fraction: part of every batch that is extra, rounded to whole images, more than 0 and less than 1. The
            last batch keeps the ratio as closely as it can. With `epoch_images` it is rounded down, and may be 1.
        extra_replacement: see above.
        extra_alone: epochs at the beginning whose batches are extra images alone; with `epoch_images`.
        epoch_images: an epoch is as many full batches as hold this many images, of both kinds together. Where a pass
            over `split` ends in its middle, another one begins; the last own images of a pass are filled up to a batch
            with extra ones.
        first: batches of the epoch that are left out, for a run that goes on in its middle.
        rank: whose part of every batch is wanted: see `rank_share`.
        ranks: how many there are.
        memory_format: of the images.
        view: another one has the same samples in the same places, and augments them by draws of its own.

    Raises:
        DataError: an image cannot be read or decoded.
        ValueError: an argument is out of range or missing, or does not fit `split`.

    Source of the batches' composition: Carmon et al.: Unlabeled Data Improves Adversarial Robustness, NeurIPS 2019;
    that of `epoch_images` Wang et al.: Better Diffusion Models Further Improve Adversarial Training, ICML 2023.
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank: {rank}; expected 0 to {ranks - 1}, of {ranks} ranks")
    if extra_alone < 0 or (extra_alone and epoch_images is None):
        raise ValueError(f"extra_alone: {extra_alone}; expected at least 0, and 0 without epoch_images")
    augmentation.require_fit(split, "split")
    fraction = None if extra is None else extra_fraction
    sizes = _sizes(len(split), batch_size, fraction, drop_last, epoch_images, alone=epoch <= extra_alone > 0)
    count = sum(own for own, _ in sizes)
    order = own_rows(split.ids_of(torch.arange(len(split))), count=count, seed=seed, epoch=epoch)
    look = mix_seed(seed, view, _VIEW) if view else seed
    drawn = [augmentation.draw(split, order, seed=look, epoch=epoch)]
    pieces = [_pieces(own for own, _ in sizes)]
    if extra is not None:
        augmentation.require_fit(extra, "extra")
        if len(extra) == 0:
            raise ValueError("extra: no images; expected at least 1")
        if extra.shape != split.shape or extra.device != split.device:
            raise ValueError(
                f"extra: images {list(extra.shape)} on {extra.device}; "
                f"expected {list(split.shape)} on {split.device} as those of split"
            )
        pieces.append(_pieces(more for _, more in sizes))
        count = sum(more for _, more in sizes)
        if extra_replacement:
            rows = drawn_rows(len(extra), count=count, seed=mix_seed(seed, epoch))
        else:
            # epochs of extra images alone take more of them
            alone = min(max(epoch - 1, 0), extra_alone)
            later = sum(more for _, more in _sizes(len(split), batch_size, fraction, drop_last, epoch_images))
            taken = alone * batch_size * len(sizes) + (epoch - 1 - alone) * later
            rows = extra_rows(len(extra), first=taken, count=count, seed=seed)
        drawn.append(augmentation.draw(extra, rows, seed=look, epoch=epoch))
    plan = _Plan(drawn, list(zip(*pieces, strict=True)), mix_seed(seed, epoch), rank, ranks)
    return _made(plan, range(first, len(sizes)), augmentation.args, batch_size, memory_format)


class Batches:
    """A rank's training batches, epoch by epoch, with a place to go on from.

    Iterating gives what is left of the epoch; `set_epoch` begins another one. The state is where the run is and what
    batches it has, so it goes on at any batch, with any number of ranks and any loader.

    Args:
        split: what is trained on; where it lies and what makes its images is its own affair.
        global_batch_size: images of a batch, over all ranks.
        augmentation, seed, rank, ranks, extra, extra_fraction, extra_replacement, extra_alone, epoch_images, drop_last,
            memory_format: see `train_batches`.
        views: how further views of each image are augmented, which stand beside the first one as channels.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from awp_engine.data import Augmentation, Split
        >>> split = Split(images=torch.zeros(5, 1, 2, 2).byte(), labels=torch.arange(5), ids=torch.arange(5))
        >>> batches = Batches(split, Augmentation(), global_batch_size=2, seed=0)
        >>> first = next(iter(batches)).ids
        >>> later = Batches(split, Augmentation(), global_batch_size=2, seed=0)
        >>> later.load_state_dict(batches.state_dict())
        >>> sorted(torch.cat([first, *(batch.ids for batch in later)]).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(
        self,
        split: Samples,
        augmentation: Augmentation,
        *,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        extra: Samples | None = None,
        extra_fraction: float = 0.5,
        extra_replacement: bool = False,
        extra_alone: int = 0,
        epoch_images: int | None = None,
        drop_last: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
        views: Sequence[Augmentation] = (),
    ) -> None:
        fraction = None if extra is None else extra_fraction
        sizes = _sizes(len(split), global_batch_size, fraction, drop_last, epoch_images)
        self.sizes = [own + more for own, more in sizes]
        """Images of every batch, over all ranks."""
        self._views = [augmentation, *views]
        self._train_batches = functools.partial(
            train_batches,
            split,
            batch_size=global_batch_size,
            seed=seed,
            drop_last=drop_last,
            extra=extra,
            extra_fraction=extra_fraction,
            extra_replacement=extra_replacement,
            extra_alone=extra_alone,
            epoch_images=epoch_images,
            rank=rank,
            ranks=ranks,
            memory_format=memory_format,
        )
        self._epoch, self._next = 1, 0
        self._of = {
            "batches": len(self.sizes),
            "images": sum(self.sizes),
            "global_batch_size": global_batch_size,
            "seed": seed,
        }
        self._just_loaded = False

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        self._just_loaded = False
        with contextlib.closing(self.epoch(self._epoch, first=self._next)) as batches:
            for batch in batches:
                # counted before it is used: a state that is saved meanwhile is that of after its step
                self._next += 1
                yield batch

    def epoch(self, epoch: int, *, first: int = 0) -> Generator[Batch, None, None]:
        """The batches of an epoch from number `first` on, whatever the state is."""
        views = [
            self._train_batches(augmentation, epoch=epoch, first=first, view=view)
            for view, augmentation in enumerate(self._views)
        ]
        return views[0] if len(views) == 1 else _side_by_side(views)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; the one that a state has just been loaded for is gone on with."""
        if not self._just_loaded or epoch != self._epoch:
            self._epoch, self._next = epoch, 0
        self._just_loaded = False

    def state_dict(self) -> dict[str, int]:
        """Where iteration stands: the epoch, how many of its batches were given, and of what batches."""
        return {"epoch": self._epoch, "batch": self._next, **self._of}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: it is of other numbers of images, or another batch size or seed.
        """
        for key, expected in self._of.items():
            if state.get(key) != expected:
                raise ValueError(
                    f"state_dict: {key} {state.get(key)}; expected {expected}: the state of the same data, "
                    "global_batch_size and seed"
                )
        if not 0 <= state["batch"] <= len(self):
            raise ValueError(f"state_dict: batch {state['batch']}; expected 0 to {len(self)}")
        self._epoch, self._next, self._just_loaded = state["epoch"], state["batch"], True


def _side_by_side(views: Sequence[Generator[Batch, None, None]]) -> Generator[Batch, None, None]:
    """Batches of the same samples as one, whose images are channel by channel those of all."""
    with contextlib.ExitStack() as stack:
        for batches in views:
            stack.enter_context(contextlib.closing(batches))
        for same in zip(*views, strict=True):
            yield same[0]._replace(images=torch.cat([batch.images for batch in same], 1))


def batch_sizes(split_size: int, batch_size: int, extra_fraction: float | None = None) -> list[int]:
    """Images in each batch that `train_batches` makes of `split_size`, extra ones included unless that is None.

    Raises:
        ValueError: batch_size or extra_fraction out of range.

    >>> batch_sizes(300, 128), len(batch_sizes(50_000, 128, 0.5))
    ([128, 128, 44], 782)
    """
    return [own + more for own, more in _sizes(split_size, batch_size, extra_fraction, drop_last=False)]


def eval_batches(
    split: Split | StreamedSplit, batch_size: int, *, memory_format: torch.memory_format = torch.contiguous_format
) -> Generator[Batch, None, None]:
    """The split's samples in their order, each once, unchanged but for the conversion to fp32; the last batch may be
    smaller.

    Raises:
        DataError: an image cannot be read or decoded.
        ValueError: batch_size below 1.
    """
    _check_batch_size(batch_size)
    return _evaluated(split, every_row(len(split), batch_size), memory_format)


def _evaluated(
    split: Split | StreamedSplit, requests: Requests, memory_format: torch.memory_format
) -> Generator[Batch, None, None]:
    with contextlib.closing(split.augmented(requests, AugmentArgs(), memory_format)) as augmented:
        for request, images in zip(requests.make(), augmented, strict=True):
            labels, ids = split.labels_of(request.rows), split.ids_of(request.rows).to(split.device)
            yield Batch(images, labels, ids, len(images))


def _sizes(
    count: int,
    batch_size: int,
    extra_fraction: float | None,
    drop_last: bool,
    epoch_images: int | None = None,
    *,
    alone: bool = False,
) -> list[tuple[int, int]]:
    """Own images and extra ones of every batch; the latter rounded half up in the last one, as in the full ones."""
    _check_batch_size(batch_size)
    if epoch_images is not None:
        if epoch_images < 1 or extra_fraction is None or not 0 < extra_fraction <= 1:
            raise ValueError(
                f"epoch_images: {epoch_images} with a part {extra_fraction} of extra images; expected at least 1, with "
                "extra images that are more than 0 of a batch and at most all"
            )
        size = 0 if alone else own_images(batch_size, extra_fraction, filled=True)
        # of one pass over the own images
        chunks = [min(size, count - start) for start in range(0, count, size)] if size else [0]
        number = -(-epoch_images // batch_size)
        return [(own, batch_size - own) for own in (chunks[index % len(chunks)] for index in range(number))]
    size = batch_size
    if extra_fraction is not None:
        if not 0 < extra_fraction < 1:
            raise ValueError(f"extra_fraction: {extra_fraction}; expected a number more than 0 and less than 1")
        size = own_images(batch_size, extra_fraction)
        if not 0 < size < batch_size:
            raise ValueError(
                f"extra_fraction: {extra_fraction} of a batch of {batch_size} leaves {size} images of the data set and "
                f"{batch_size - size} extra ones; expected at least 1 of both"
            )
    extra = batch_size - size
    own_sizes = [min(size, count - start) for start in range(0, count, size)]
    return [(own, (2 * own * extra + size) // (2 * size)) for own in own_sizes if not drop_last or own == size]


def _pieces(sizes: Iterable[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


class _Plan(NamedTuple):
    """Where the samples of every batch stand in what was drawn: for the split, and for extra images if there are any.

    Attributes:
        drawn: for the split, and for the extra images.
        pieces: for every batch, its part of each.
        seed: of the places in a batch.
        rank, ranks: whose part is wanted.
    """

    drawn: list[DrawnSamples]
    pieces: list[tuple[slice, ...]]
    seed: int
    rank: int
    ranks: int

    def size(self, index: int) -> int:
        """Samples of a batch, over all ranks."""
        return sum(piece.stop - piece.start for piece in self.pieces[index])

    def places(self, index: int) -> list[Tensor]:
        """Of a batch's own samples and extra ones, int64 [n] each, and how they are put in order, int64 [their sum]."""
        pieces = self.pieces[index]
        places = [torch.arange(piece.start, piece.stop) for piece in pieces]
        share, _ = rank_share(self.size(index), self.rank, self.ranks)
        if len(places) == 1:
            own = places[0][share]
            return [own, torch.arange(len(own))]
        ids = torch.cat([drawn.ids[piece] for drawn, piece in zip(self.drawn, pieces, strict=True)])
        # mixed, since ranks and their batch normalisation see a part of the batch
        key = random_order_key(ids, seed=self.seed, stream=_STREAM_PLACE)
        order = torch.argsort(key, stable=True)[share]
        is_own = order < len(places[0])
        place = torch.where(is_own, is_own.cumsum(0) - 1, is_own.sum() + (~is_own).cumsum(0) - 1)
        return [places[0][order[is_own]], places[1][order[~is_own] - len(places[0])], place]


def _made(
    plan: _Plan, indices: range, args: AugmentArgs, batch_size: int, memory_format: torch.memory_format
) -> Generator[Batch, None, None]:
    """The batches at `indices`."""

    def augmented(which: int) -> Images:
        drawn = plan.drawn[which]

        def make() -> Iterator[Request]:
            return (drawn.request(plan.places(index)[which]) for index in indices)

        # every image may have another one mixed in
        return drawn.split.augmented(Requests(make, 2 * batch_size), args, memory_format)

    with contextlib.ExitStack() as stack:
        streams = [augmented(which) for which in range(len(plan.drawn))]
        for stream in streams:
            stack.enter_context(contextlib.closing(stream))
        for index in indices:
            *places, order = plan.places(index)
            size = plan.size(index)
            parts = [d.batch(p, next(s), size) for d, p, s in zip(plan.drawn, places, streams, strict=True)]
            batch = parts[0]
            if len(parts) > 1:
                order = order.to(batch.images.device, non_blocking=True)
                fields = zip(*(part[:3] for part in parts), strict=True)
                images, labels, ids = (torch.cat(tensors)[order] for tensors in fields)
                batch = Batch(images, labels, ids, size)
            # RandAugment and erasing have an order of their own
            yield batch._replace(images=batch.images.contiguous(memory_format=memory_format))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}; expected at least 1")

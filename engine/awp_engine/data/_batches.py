"""Batches of one epoch, cut and augmented on the device that holds the images."""

import math
from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from awp_engine.data._augment import to_float
from awp_engine.data._dataset import Split, random_order_key
from awp_engine.data._recipe import Batch, Drawn, Recipe
from awp_kernels.philox import mix_seed

_STREAM_ORDER = 3
_STREAM_EXTRA_ORDER = 8
_STREAM_PLACE = 9


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    pad: int,
    flip: bool,
    drop_last: bool = False,
    cutout: int = 0,
    fill: tuple[float, ...] | None = None,
    cutmix: float = 0.0,
    num_classes: int | None = None,
    extra: Split | None = None,
    extra_fraction: float = 0.5,
    first: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Batch]:
    """One epoch of shuffled, augmented batches; every sample of `split` comes exactly once.

    What a sample looks like depends on (seed, epoch, id) alone, and under CutMix on the set it belongs to. First comes
    the crop, then mirroring, then Cutout, then CutMix, whose partner is cropped, mirrored and cut as in its own place.

    Extra images are taken in a random order that goes on from epoch to epoch: each is used before any is used again,
    and the order is drawn anew for every pass. An epoch that takes more of them than there are has some more than once,
    with the same pixels. In which place of its batch a sample stands is random too.

    Args:
        split: on the device where the batches are wanted.
        batch_size: samples a batch, extra ones included; the last one may be smaller.
        seed: the run's seed.
        epoch: with the seed, decides order and augmentation.
        pad: zero padding of the random crop, in pixels; 0 for no crop.
        flip: mirror half of the images.
        drop_last: leave out a last batch that is not full, for the sake of equal shapes.
        cutout: side in pixels of the square that is filled in every image; 0 for none.
        fill: what Cutout fills with, one value in [0, 1] a channel: the data set's mean does what is done to normalised
            images by zeros. Needed with cutout.
        cutmix: probability that an image has a box replaced by that of another; 0 for never. Otherwise all labels are
            shares, fp32 [B, num_classes].
        num_classes: needed with cutmix.
        extra: further images, of the same shape on the same device, with ids of their own. They are mixed with each
            other, not with those of `split`.
        extra_fraction: part of every batch that is extra, rounded to whole images, more than 0 and less than 1. The
            last batch keeps the ratio as closely as it can.
        first: batches of the epoch that are left out, for a run that goes on in its middle.
        rank: whose part of every batch is wanted: see `rank_share`.
        ranks: how many there are.

    Raises:
        ValueError: an argument is out of range or missing, or does not fit `split`.

    Source of the batches' composition: Carmon et al.: Unlabeled Data Improves Adversarial Robustness, NeurIPS 2019.
    """
    _check_batch_size(batch_size)
    recipe = Recipe(seed, epoch, pad, flip, cutout, fill, cutmix, num_classes)
    recipe.check(split, "split")
    own_size, extra_size = (batch_size, 0) if extra is None else _shares(batch_size, extra_fraction)
    order = torch.argsort(random_order_key(split.ids, seed=mix_seed(seed, epoch), stream=_STREAM_ORDER), stable=True)
    if drop_last:
        order = order[: len(order) // own_size * own_size]
    sizes = _sizes(len(order), own_size)
    drawn = recipe.draw(split, order)
    if extra is None:
        return (drawn.samples(_part(piece, rank, ranks)) for piece in _pieces(sizes)[first:])
    recipe.check(extra, "extra")
    _check_extra(extra, split)
    extra_sizes = _extra_sizes(sizes, own_size, extra_size)
    count = sum(extra_sizes)
    drawn_extra = recipe.draw(extra, _extra_rows(extra.ids, first=epoch * count, count=count, seed=seed))
    pieces = list(zip(_pieces(sizes), _pieces(extra_sizes), strict=True))[first:]
    whole = _joined(drawn, drawn_extra, pieces, seed=mix_seed(seed, epoch))
    return (Batch(*(field[_part(slice(0, len(b.ids)), rank, ranks)] for field in b)) for b in whole)


def batch_sizes(split_size: int, batch_size: int, extra_fraction: float | None = None) -> list[int]:
    """Images in each batch that `train_batches` makes of `split_size`, extra ones included unless that is None.

    Raises:
        ValueError: batch_size or extra_fraction out of range.

    >>> batch_sizes(300, 128), len(batch_sizes(50_000, 128, 0.5))
    ([128, 128, 44], 782)
    """
    _check_batch_size(batch_size)
    own_size, extra_size = (batch_size, 0) if extra_fraction is None else _shares(batch_size, extra_fraction)
    sizes = _sizes(split_size, own_size)
    return [a + b for a, b in zip(sizes, _extra_sizes(sizes, own_size, extra_size), strict=True)]


def rank_share(count: int, rank: int, ranks: int) -> tuple[slice, float]:
    """Which of a batch's `count` images a rank computes, and what part of the batch's mean they stand for.

    The ranks' parts follow each other and differ by one image at most. A batch with fewer images than there are ranks
    is computed whole by every rank, which then counts as one part in `ranks`: no rank is left without a forward pass.

    >>> [rank_share(10, rank, 4) for rank in (0, 3)], rank_share(3, 1, 4)
    ([(slice(0, 2, None), 0.2), (slice(7, 10, None), 0.3)], (slice(0, 3, None), 0.25))
    """
    if count < ranks:
        return slice(0, count), 1 / ranks
    begin, end = count * rank // ranks, count * (rank + 1) // ranks
    return slice(begin, end), (end - begin) / count


def eval_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """The split's samples in their order, unchanged but for the conversion to fp32; the last batch may be smaller.

    Raises:
        ValueError: batch_size below 1.
    """
    _check_batch_size(batch_size)
    return (
        Batch(
            to_float(split.images[i : i + batch_size]), split.labels[i : i + batch_size], split.ids[i : i + batch_size]
        )
        for i in range(0, len(split), batch_size)
    )


def _extra_rows(ids: Tensor, *, first: int, count: int, seed: int) -> Tensor:
    """Places `first` to `first + count - 1` of an endless sequence of shuffled passes over all rows."""
    size = len(ids)
    pieces = [torch.empty_like(ids[:0])]
    for number in range(first // size, -(-(first + count) // size)):
        key = random_order_key(ids, seed=mix_seed(seed, number), stream=_STREAM_EXTRA_ORDER)
        start = number * size
        pieces.append(torch.argsort(key, stable=True)[max(first - start, 0) : first + count - start])
    return torch.cat(pieces)


def _sizes(count: int, size: int) -> list[int]:
    return [min(size, count - start) for start in range(0, count, size)]


def _extra_sizes(sizes: list[int], own_size: int, extra_size: int) -> list[int]:
    """Rounded half up, as in the full batches."""
    return [(2 * size * extra_size + own_size) // (2 * own_size) for size in sizes]


def _pieces(sizes: list[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _part(piece: slice, rank: int, ranks: int) -> slice:
    rows, _ = rank_share(piece.stop - piece.start, rank, ranks)
    return slice(piece.start + rows.start, piece.start + rows.stop)


def _joined(own: Drawn, extra: Drawn, pieces: list[tuple[slice, slice]], *, seed: int) -> Iterator[Batch]:
    own_key, extra_key = (random_order_key(drawn.ids, seed=seed, stream=_STREAM_PLACE) for drawn in (own, extra))
    for piece, extra_piece in pieces:
        # Mixed, since ranks and their batch normalisation see a part of the batch.
        place = torch.argsort(torch.cat([own_key[piece], extra_key[extra_piece]]), stable=True)
        parts = zip(own.samples(piece), extra.samples(extra_piece), strict=True)
        yield Batch(*(torch.cat(fields)[place] for fields in parts))


def _shares(batch_size: int, extra_fraction: float) -> tuple[int, int]:
    """How many images of a full batch are the split's and how many extra."""
    if not 0 < extra_fraction < 1:
        raise ValueError(f"extra_fraction: {extra_fraction}; expected a number more than 0 and less than 1")
    own = math.floor(batch_size * (1 - extra_fraction) + 0.5)
    if not 0 < own < batch_size:
        raise ValueError(
            f"extra_fraction: {extra_fraction} of a batch of {batch_size} leaves {own} images of the data set and "
            f"{batch_size - own} extra ones; expected at least 1 of both"
        )
    return own, batch_size - own


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}; expected at least 1")


def _check_extra(extra: Split, split: Split) -> None:
    if len(extra) == 0:
        raise ValueError("extra: no images; expected at least 1")
    shape, device = tuple(split.images.shape[1:]), split.images.device
    if extra.images.shape[1:] != shape or extra.images.device != device:
        raise ValueError(
            f"extra: images {list(extra.images.shape[1:])} on {extra.images.device}; "
            f"expected {list(shape)} on {device} as those of split"
        )

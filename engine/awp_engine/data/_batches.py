"""Batches of one epoch, cut and augmented on the device that holds the images."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from awp_engine.data._dataset import Split, random_order_key
from awp_kernels.philox import STREAM_AUGMENT, mix_seed, sample_words

_STREAM_ORDER = 3


class Batch(NamedTuple):
    """images: fp32 [B, C, H, W] in [0, 1]; labels: int64 [B]; ids: int64 [B]."""

    images: Tensor
    labels: Tensor
    ids: Tensor


def train_batches(
    split: Split, *, batch_size: int, seed: int, epoch: int, pad: int, flip: bool, drop_last: bool = False
) -> Iterator[Batch]:
    """One epoch of shuffled, augmented batches; every sample comes exactly once.

    Args:
        split: on the device where the batches are wanted.
        batch_size: samples a batch; the last one may be smaller.
        seed: the run's seed.
        epoch: with the seed, decides order and augmentation.
        pad: zero padding of the random crop, in pixels; 0 for no crop.
        flip: mirror half of the images.
        drop_last: leave out a last batch that is not full, for the sake of equal shapes.

    Raises:
        ValueError: batch_size or pad out of range.
    """
    _check(batch_size=batch_size, pad=pad)
    order = torch.argsort(random_order_key(split.ids, seed=mix_seed(seed, epoch), stream=_STREAM_ORDER), stable=True)
    # Drawn for the whole epoch at once: a few large operations instead of a few hundred small ones a batch.
    window = _draw_windows(split.ids, seed=seed, epoch=epoch, pad=pad, flip=flip)
    return _cut(split, order, window, batch_size, drop_last)


def eval_batches(split: Split, batch_size: int) -> Iterator[Batch]:
    """The split's samples in their order, unchanged but for the conversion to fp32; the last batch may be smaller.

    Raises:
        ValueError: batch_size below 1.
    """
    _check(batch_size=batch_size)
    return (
        Batch(
            _to_float(split.images[i : i + batch_size]), split.labels[i : i + batch_size], split.ids[i : i + batch_size]
        )
        for i in range(0, len(split), batch_size)
    )


def augment(images: Tensor, ids: Tensor, *, seed: int, epoch: int, pad: int, flip: bool) -> Tensor:
    """Random crop from zero padding, then random mirroring, each sample by itself.

    With Philox words w of (seed, epoch, id) (stream 2), the crop starts at row w0 * (2 pad + 1) // 2^32 and column
    w1 * (2 pad + 1) // 2^32 of the padded image, and is mirrored where w2 is odd.

    Args:
        images: uint8 [B, C, H, W].
        ids: int64 [B], on the same device.
        seed: the run's seed.
        epoch: with seed and id, all that a sample's augmentation depends on.
        pad: pixels of zero padding on all sides; 0 for no crop.
        flip: mirror half of the images.

    Returns:
        fp32 [B, C, H, W] in [0, 1], contiguous.

    Raises:
        ValueError: pad below 0.
    """
    _check(pad=pad)
    return _apply_windows(images, _draw_windows(ids, seed=seed, epoch=epoch, pad=pad, flip=flip))


class _Windows(NamedTuple):
    """Crop offsets relative to the unpadded image, int64 [B], and bool [B]; None where nothing is to be done."""

    rows: Tensor
    columns: Tensor
    mirrored: Tensor


def _draw_windows(ids: Tensor, *, seed: int, epoch: int, pad: int, flip: bool) -> _Windows | None:
    if pad == 0 and not flip:
        return None
    words = sample_words(ids, 3, seed=mix_seed(seed, epoch), stream=STREAM_AUGMENT)
    offsets = ((words[:, :2] * (2 * pad + 1)) >> 32) - pad
    mirrored = (words[:, 2] & 1).bool() if flip else torch.zeros_like(words[:, 2], dtype=torch.bool)
    return _Windows(offsets[:, 0], offsets[:, 1], mirrored)


def _apply_windows(images: Tensor, windows: _Windows | None) -> Tensor:
    if windows is None:
        return _to_float(images)
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) + windows.rows.unsqueeze(1)  # [B, H]
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    columns = torch.where(windows.mirrored.unsqueeze(1), width - 1 - columns, columns) + windows.columns.unsqueeze(
        1
    )  # [B, W]
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(
        1
    )  # [B, H, W]
    pixels = rows.clamp(0, height - 1).unsqueeze(2) * width + columns.clamp(0, width - 1).unsqueeze(1)  # [B, H, W]
    pixels = pixels.flatten(1).unsqueeze(1).expand(-1, images.shape[1], -1)  # [B, C, H*W]
    cropped = images.flatten(2).gather(2, pixels).view(images.shape)
    return _to_float(cropped * inside.unsqueeze(1))


def _to_float(images: Tensor) -> Tensor:
    # A tensor as divisor: CUDA multiplies by a Python number's reciprocal, which differs from the CPU in the last bit.
    return images.to(torch.float32) / images.new_full((), 255, dtype=torch.float32)


def _cut(split: Split, order: Tensor, windows: _Windows | None, batch_size: int, drop_last: bool) -> Iterator[Batch]:
    end = len(order) - len(order) % batch_size if drop_last else len(order)
    for start in range(0, end, batch_size):
        chosen = order[start : start + batch_size]
        chosen_windows = None if windows is None else _Windows(*(field[chosen] for field in windows))
        yield Batch(_apply_windows(split.images[chosen], chosen_windows), split.labels[chosen], split.ids[chosen])


def _check(*, batch_size: int = 1, pad: int = 0) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}; expected at least 1")
    if pad < 0:
        raise ValueError(f"pad: {pad}; expected at least 0 pixels")

"""Random crops and mirroring, each sample by itself."""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from awp_kernels.philox import STREAM_AUGMENT, mix_seed, sample_words


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
    if pad < 0:
        raise ValueError(f"pad: {pad}; expected at least 0 pixels")
    return apply_windows(images, draw_windows(ids, seed=seed, epoch=epoch, pad=pad, flip=flip))


class Windows(NamedTuple):
    """Crop offsets relative to the unpadded image, int64 [B], and bool [B]; None where nothing is to be done."""

    rows: Tensor
    columns: Tensor
    mirrored: Tensor

    def part(self, piece: slice) -> Self:
        return type(self)(*(field[piece] for field in self))


def draw_windows(ids: Tensor, *, seed: int, epoch: int, pad: int, flip: bool) -> Windows | None:
    if pad == 0 and not flip:
        return None
    words = sample_words(ids, 3, seed=mix_seed(seed, epoch), stream=STREAM_AUGMENT)
    offsets = ((words[:, :2] * (2 * pad + 1)) >> 32) - pad
    mirrored = (words[:, 2] & 1).bool() if flip else torch.zeros_like(words[:, 2], dtype=torch.bool)
    return Windows(offsets[:, 0], offsets[:, 1], mirrored)


def apply_windows(images: Tensor, windows: Windows | None) -> Tensor:
    if windows is None:
        return to_float(images)
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
    return to_float(cropped * inside.unsqueeze(1))


def to_float(images: Tensor) -> Tensor:
    # A tensor as divisor: CUDA multiplies by a Python number's reciprocal, which differs from the CPU in the last bit.
    return images.to(torch.float32) / images.new_full((), 255, dtype=torch.float32)

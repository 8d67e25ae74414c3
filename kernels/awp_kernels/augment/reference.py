"""The definition of `augment`, in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from awp_kernels.philox import STREAM_AUGMENT, STREAM_CUTOUT, sample_words


def _inside(begin: Tensor, end: Tensor, size: int) -> Tensor:
    """Which of `size` places lie in begin to end - 1: bool [B, size]."""
    places = torch.arange(size, device=begin.device)
    return (places >= begin.unsqueeze(1)) & (places < end.unsqueeze(1))


class Rule(NamedTuple):
    """What is done to all images alike."""

    seed: int
    pad: int
    flip: bool
    cutout: int
    fill: list[float]


def augment(images: Tensor, rows: Tensor | None, sample_ids: Tensor, rule: Rule, out: Tensor) -> None:
    """Write the images at `rows`, cropped, mirrored, cut and over 255, to `out`."""
    _, channels, height, width = out.shape
    seed, pad, flip, cutout, fill = rule
    device = images.device
    chosen = images if rows is None else images[rows]

    words = sample_words(sample_ids, 3, seed=seed, stream=STREAM_AUGMENT)
    offsets = ((words[:, :2] * (2 * pad + 1)) >> 32) - pad
    mirrored = (words[:, 2:] & 1).bool() & flip
    columns = torch.arange(width, device=device).expand(len(out), width)
    # where every pixel of the result comes from, in the image without its padding
    from_row = torch.arange(height, device=device) + offsets[:, :1]  # [B, H]
    from_column = torch.where(mirrored, width - 1 - columns, columns) + offsets[:, 1:]  # [B, W]
    in_image = ((from_row >= 0) & (from_row < height)).unsqueeze(2) & (
        (from_column >= 0) & (from_column < width)
    ).unsqueeze(1)
    pixels = from_row.clamp(0, height - 1).unsqueeze(2) * width + from_column.clamp(0, width - 1).unsqueeze(1)
    pixels = pixels.flatten(1).unsqueeze(1).expand(-1, channels, -1)  # [B, C, H W]
    cropped = chosen.flatten(2).gather(2, pixels).view(out.shape) * in_image.unsqueeze(1)
    # a tensor as divisor: CUDA multiplies by a Python number's reciprocal, which differs in the last bit
    result = cropped.to(torch.float32) / torch.full((), 255.0, device=device)

    if cutout:
        words = sample_words(sample_ids, 2, seed=seed, stream=STREAM_CUTOUT)
        top = ((words[:, 0] * height) >> 32) - cutout // 2
        left = ((words[:, 1] * width) >> 32) - cutout // 2
        square = _inside(top, top + cutout, height).unsqueeze(2) & _inside(left, left + cutout, width).unsqueeze(1)
        values = torch.tensor(fill, dtype=torch.float32, device=device).view(-1, 1, 1)
        result = torch.where(square.unsqueeze(1), values, result)
    out.copy_(result)

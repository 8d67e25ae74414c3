"""Pillow's operations on several 8-bit images at once, to the last level what Pillow gives on the CPU.

Images are levels, int32 [n, C, H, W] in [0, 255], of 1 or 3 channels. An amount is fp64 [n], what Pillow is given for
each image, and may be on the CPU while the images are elsewhere. Results are new levels of the same shape.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Operation: TypeAlias = Callable[..., Tensor]
"""Makes levels of levels [n, C, H, W] and one or more amounts [n]."""
Fill: TypeAlias = int | Sequence[int]
"""Level of what comes in from outside: of all channels, or one a channel."""
Matrix: TypeAlias = Sequence[Tensor | float]
"""Where an output pixel comes from, a to f of x = a x' + b y' + c, y = d x' + e y' + f; numbers or fp64 [n] each."""


def to_levels(images: Tensor, method: str) -> Tensor:
    """Levels of images, fp32 [B, C, H, W], multiples of 1/255 in [0, 1]; contiguous.

    Raises:
        ValueError: another number of channels than 1 or 3; `method` is who asks.
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels for {method}, got {images.shape[1]}")
    return (images * 255).round().to(torch.int32).contiguous()


def to_images(levels: Tensor) -> Tensor:
    """Images, fp32 [B, C, H, W] in [0, 1], of levels."""
    # a tensor as divisor: CUDA multiplies by a Python number's reciprocal, which differs in the last bit
    return levels.to(torch.float32) / torch.full((), 255.0, device=levels.device)


def apply_in_turn(levels: Tensor, choice: Tensor, operations: Sequence[Operation], *amounts: Tensor) -> None:
    """Do to each image, in place, the operations that were chosen for it. A choice on a GPU is waited for.

    Args:
        levels: int32 [B, C, H, W].
        choice: int64 [B, places], a place in `operations`, or -1 for nothing; done one place after the other.
        operations: what there is to choose from.
        amounts: fp64 [B, places] each, what the operations are given.
    """
    chosen = choice.tolist()
    for place in range(choice.shape[1]):
        for number, operation in enumerate(operations):
            rows = [row for row, choices in enumerate(chosen) if choices[place] == number]
            if rows:
                index = torch.tensor(rows)
                given = [amount[index.to(amount.device), place] for amount in amounts]
                index = index.to(levels.device)
                levels[index] = operation(levels[index], *given)


def color(levels: Tensor, factor: Tensor) -> Tensor:
    """From gray (0) to the image (1) and beyond."""
    return _blended(_gray(levels), levels, factor)


def brightness(levels: Tensor, factor: Tensor) -> Tensor:
    """From black (0) to the image (1) and beyond."""
    return _blended(torch.zeros_like(levels), levels, factor)


def contrast(levels: Tensor, factor: Tensor) -> Tensor:
    """From the mean gray (0) to the image (1) and beyond."""
    gray = _gray(levels).flatten(1)
    mean = (gray.sum(1).double() / gray.shape[1] + 0.5).to(torch.int32).view(-1, 1, 1, 1)
    return _blended(mean, levels, factor)


def sharpness(levels: Tensor, factor: Tensor) -> Tensor:
    """From a smoothed image (0) to the image (1) and beyond."""
    return _blended(_smooth(levels), levels, factor)


def autocontrast(levels: Tensor, *_: Tensor) -> Tensor:
    """Every channel stretched to all levels."""
    flat = levels.flatten(2).double()
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    # a number over a tensor would be its reciprocal times the number, which may round otherwise
    scale = torch.full_like(high, 255) / (high - low)
    stretched = (flat * scale + -low * scale).trunc().clamp(0, 255)
    return torch.where(high <= low, flat, stretched).to(torch.int32).view(levels.shape)


def equalize(levels: Tensor, *_: Tensor) -> Tensor:
    """Every channel's histogram made flat."""
    flat = levels.flatten(2).sort(2).values.contiguous()
    values = torch.arange(256, device=levels.device)
    below = torch.searchsorted(flat, values.to(torch.int32).expand(*flat.shape[:2], 256).contiguous())
    # of the highest level that there is; all but those pixels are spread
    spread = torch.searchsorted(flat, flat[..., -1:].contiguous())
    step = spread // 255
    table = torch.where(step == 0, values, ((step // 2 + below) // step.clamp(min=1)).clamp(max=255))
    return table.gather(2, levels.flatten(2).long()).view(levels.shape).to(torch.int32)


def invert(levels: Tensor, *_: Tensor) -> Tensor:
    """The negative."""
    return 255 - levels


def posterize(levels: Tensor, bits: Tensor) -> Tensor:
    """Only the highest `bits` of every level; none: black."""
    shift = (8 - _each(bits, levels)).to(torch.int32)
    return (levels >> shift) << shift


def solarize(levels: Tensor, threshold: Tensor) -> Tensor:
    """The negative of the levels from `threshold` on."""
    return torch.where(levels < _each(threshold, levels), levels, 255 - levels)


def solarize_add(levels: Tensor, added: Tensor) -> Tensor:
    """The levels below 128 made brighter."""
    more = (levels + _each(added, levels).to(torch.int32)).clamp(max=255)
    return torch.where(levels < 128, more, levels)


def rotation(degrees: Tensor, height: int, width: int) -> Matrix:
    """Against the clock, around the middle."""
    # Python's sines, as Pillow takes them: those of torch differ in the last bit, and from device to device
    angles = [-math.radians(angle % 360.0) for angle in degrees.tolist()]
    cos, sin = (
        torch.tensor([round(turned(angle), 15) for angle in angles], dtype=torch.float64)
        for turned in (math.cos, math.sin)
    )
    x, y = width / 2, height / 2
    return cos, sin, (-x * cos + -y * sin) + x, -sin, cos, (-x * -sin + -y * cos) + y


def rotate(levels: Tensor, degrees: Tensor, *, fill: Fill) -> Tensor:
    """Turned against the clock around the middle; the nearest pixel."""
    return affine(levels, rotation(degrees, *levels.shape[2:]), fill=fill, resample="nearest")


def affine(
    levels: Tensor, matrix: Matrix, *, fill: Fill, resample: Literal["nearest", "bilinear", "bicubic"]
) -> Tensor:
    """Pixels from elsewhere in the image, between their centres; up to the border its own value goes on."""
    count, _, height, width = levels.shape
    a, b, c, d, e, f = (
        torch.as_tensor(entry, dtype=torch.float64)
        .to(levels.device, non_blocking=True)
        .view(-1, 1, 1)
        .expand(count, 1, 1)
        for entry in matrix
    )
    if resample == "nearest":
        # Pillow counts in 65,536ths of a pixel
        column = torch.arange(width, device=levels.device)
        row = torch.arange(height, device=levels.device).unsqueeze(1)
        c, f = c + a * 0.5 + b * 0.5, f + d * 0.5 + e * 0.5
        a, b, c, d, e, f = ((entry * 65536 + 0.5).floor().long() for entry in (a, b, c, d, e, f))
        return gather_pixels(levels, (d * column + e * row + f) >> 16, (a * column + b * row + c) >> 16, fill=fill)
    x = torch.arange(width, device=levels.device, dtype=torch.float64) + 0.5
    y = (torch.arange(height, device=levels.device, dtype=torch.float64) + 0.5).unsqueeze(1)
    x, y = a * x + b * y + c, d * x + e * y + f  # [n, H, W]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    right, down = (x - left).unsqueeze(1), (y - top).unsqueeze(1)

    def at(row: int, column: int) -> Tensor:
        return _at(levels, top.long() + row, left.long() + column).double()

    if resample == "bilinear":
        upper, lower = (
            first + (at(row, 1) - first) * right for row in range(2) for first in (at(row, 0),)
        )  # fmt: skip
        value = upper + (lower - upper) * down
    else:
        rows = [_cubic([at(row, column) for column in range(-1, 3)], right) for row in range(-1, 3)]
        value = _cubic(rows, down).clamp(0, 255)
    return torch.where(inside.unsqueeze(1), value.to(torch.int32), _color(fill, levels))


def gather_pixels(levels: Tensor, row: Tensor, column: Tensor, *, fill: Fill) -> Tensor:
    """The pixels at rows and columns, int64 that broadcast to [n, H, W]; `fill` where they are outside the image."""
    height, width = levels.shape[2:]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return torch.where(inside.unsqueeze(1), _at(levels, row, column), _color(fill, levels))


def _at(levels: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """[n, C, H, W]: the pixels at rows and columns, or the nearest ones."""
    count, channels, height, width = levels.shape
    index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).expand(count, height, width)
    return levels.flatten(2).gather(2, index.flatten(1).unsqueeze(1).expand(-1, channels, -1)).view(levels.shape)


def _cubic(values: Sequence[Tensor], place: Tensor) -> Tensor:
    """Between the second and the third of four values, by Pillow's cubic of a = -1."""
    before, first, second, after = values
    low, high = 2 * (before - first) + second - after, -before + first - second + after
    return first + place * (-before + second + place * (low + place * high))


def _color(fill: Fill, levels: Tensor) -> Tensor:
    """int32 [1, C or 1, 1, 1]."""
    return torch.tensor(fill, dtype=torch.int32, device=levels.device).view(1, -1, 1, 1)


def _each(amount: Tensor, levels: Tensor) -> Tensor:
    """An amount of every image, [n, 1, 1, 1] beside it."""
    return amount.to(levels.device, non_blocking=True).view(-1, 1, 1, 1)


def _gray(levels: Tensor) -> Tensor:
    """Luma as Pillow rounds it, int32 [n, 1, H, W]."""
    if levels.shape[1] == 1:
        return levels
    red, green, blue = levels.unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).unsqueeze(1)


def _smooth(levels: Tensor) -> Tensor:
    """A 3x3 mean in which the middle counts five times; the border stays."""
    smooth = levels.clone()
    height, width = levels.shape[2:]
    if height > 2 and width > 2:
        parts = [levels[..., i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
        total = sum(parts[1:], parts[0]) + 4 * parts[4]
        smooth[..., 1:-1, 1:-1] = (2 * total + 13) // 26
    return smooth


def _blended(degenerate: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    """Of d = degenerate and v = levels, d + factor * (v - d), in fp32, without its fraction."""
    share = _each(factor, levels).float()
    return (degenerate.float() + share * (levels - degenerate).float()).clamp(0, 255).to(torch.int32)

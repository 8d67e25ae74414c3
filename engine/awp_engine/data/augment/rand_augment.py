"""RandAugment: a few operations an image, drawn from fifteen, as timm's "rand-m9-mstd0.5-inc1" has them.

Sources: Cubuk et al.: RandAugment: Practical Automated Data Augmentation with a Reduced Search Space, NeurIPS 2020; the
operations are Pillow's on 8-bit images, and the ranges of their magnitudes timm's.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from awp_kernels.philox import mix_seed, normals, sample_words

_STREAM = 10

OPERATIONS = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize-add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
)
_GEOMETRIC = frozenset({"rotate", "shear-x", "shear-y", "translate-x", "translate-y"})


class Operations(NamedTuple):
    """What is done to each image, in order.

    Attributes:
        choice: int64 [B, operations], a place in `OPERATIONS`, or -1 for nothing.
        level: fp64 [B, operations], in [0, 10].
        sign: fp64 [B, operations], 1 or -1: to which side.
    """

    choice: Tensor
    level: Tensor
    sign: Tensor

    def part(self, piece: slice) -> Self:
        """Those of some of the images."""
        return type(self)(*(field[piece] for field in self))


def draw_rand_augment(
    ids: Tensor, *, seed: int, epoch: int, operations: int = 2, magnitude: float = 9, std: float = 0.5
) -> Operations:
    """Which operations, how strong, and to which side.

    With words of stream 10, three an operation, it is number w0 * 15 // 2^32, is done where w1 < 2^31, and to the
    negative side where w2 is odd. Its level is magnitude + std * N(0, 1), clipped to [0, 10]. All of it has the same
    bits on every device.

    Args:
        ids: int64 [B].
        seed: the run's seed.
        epoch: with seed and id, all that is drawn depends on.
        operations: an image.
        magnitude: in [0, 10].
        std: of the magnitude.
    """
    words = sample_words(ids, 3 * operations, seed=mix_seed(seed, epoch), stream=_STREAM)
    words = words.view(len(ids), operations, 3)
    choice = torch.where(words[..., 1] < 2**31, (words[..., 0] * len(OPERATIONS)) >> 32, -1)
    noise = normals(ids, operations, seed=mix_seed(seed, epoch, _STREAM)).double()
    return Operations(choice, (magnitude + std * noise).clamp(0, 10), 1 - 2 * (words[..., 2] & 1).double())


def rand_augment(
    images: Tensor,
    ids: Tensor,
    *,
    seed: int,
    epoch: int,
    operations: int = 2,
    magnitude: float = 9,
    std: float = 0.5,
    increasing: bool = True,
    fill: Sequence[float] | None = None,
) -> Tensor:
    """Draw operations for a batch and apply them: see `draw_rand_augment` and `apply_rand_augment`."""
    drawn = draw_rand_augment(ids, seed=seed, epoch=epoch, operations=operations, magnitude=magnitude, std=std)
    return apply_rand_augment(images, drawn, increasing=increasing, fill=fill)


def apply_rand_augment(
    images: Tensor, drawn: Operations, *, increasing: bool = True, fill: Sequence[float] | None = None
) -> Tensor:
    """Do to each image what was drawn for it; the host waits for the device once.

    Every operation takes and gives 8-bit levels, to the last level what Pillow gives on the CPU. Geometry interpolates
    bilinearly (timm takes the interpolation of the crop). On another device the sine of a rotation may differ in its
    last bit, and with it, rarely, a pixel by one level.

    Args:
        images: fp32 [B, C, H, W], multiples of 1/255 in [0, 1]; 1 or 3 channels.
        drawn: as `draw_rand_augment` gives it, on the same device.
        increasing: whether a higher level means more of every operation; else posterize and solarize do less, and
            colour, contrast, brightness and sharpness go from little to much.
        fill: what comes in from outside, in [0, 1], one value a channel; by default 128/255.

    Returns:
        fp32 [B, C, H, W], multiples of 1/255 in [0, 1], contiguous.

    Raises:
        ValueError: another number of channels.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels for RandAugment, got {channels}")
    if fill is not None and len(fill) != channels:
        raise ValueError(f"fill: expected {channels} values, one a channel, got {len(fill)}")
    outside = [128] * channels if fill is None else [min(max(round(255 * value), 0), 255) for value in fill]
    levels = (images * 255).round().to(torch.int32).contiguous()
    chosen = drawn.choice.tolist()
    for place in range(drawn.choice.shape[1]):
        for number, name in enumerate(OPERATIONS):
            rows = [row for row, choices in enumerate(chosen) if choices[place] == number]
            if rows:
                index = torch.tensor(rows, device=levels.device)
                level, sign = drawn.level[index, place], drawn.sign[index, place]
                levels[index] = operate(name, levels[index], level, sign, increasing=increasing, fill=outside)
    return levels.to(torch.float32) / images.new_full((), 255)


def operate(name: str, levels: Tensor, level: Tensor, sign: Tensor, *, increasing: bool, fill: Sequence[int]) -> Tensor:
    """One operation on several images.

    Args:
        name: one of `OPERATIONS`.
        levels: int32 [n, C, H, W], in [0, 255].
        level: fp64 [n], in [0, 10].
        sign: fp64 [n], 1 or -1.
        increasing: see `apply_rand_augment`.
        fill: level of what comes in from outside, one a channel.

    Returns:
        int32 [n, C, H, W].
    """
    if name in _GEOMETRIC:
        return _transformed(levels, _matrix(name, level * sign, levels.shape[2], levels.shape[3]), fill)
    if name in ("color", "contrast", "brightness", "sharpness"):
        factor = (1 + sign * (level / 10 * 0.9)).clamp(min=0.1) if increasing else level / 10 * 1.8 + 0.1
        return _blended(_DEGENERATE[name](levels), levels, factor)
    if name == "autocontrast":
        table = _autocontrast(levels)
    elif name == "equalize":
        table = _equalize(levels)
    else:
        table = _pointwise(name, level.view(-1, 1, 1), increasing).expand(-1, levels.shape[1], -1)
    return table.gather(2, levels.flatten(2).long()).view(levels.shape).to(torch.int32)


def _every_level(like: Tensor) -> Tensor:
    return torch.arange(256, device=like.device)


def _pointwise(name: str, level: Tensor, increasing: bool) -> Tensor:
    """What becomes of every level, int64 [n, 1, 256], for level [n, 1, 1]."""
    values = _every_level(level)
    if name == "invert":
        return (255 - values).expand(len(level), 1, 256)
    if name == "solarize-add":
        added = (values + (level / 10 * 110).long().clamp(max=128)).clamp(max=255)
        return torch.where(values < 128, added, values)
    if name == "solarize":
        threshold = (level / 10 * 256).long().clamp(max=256)
        return torch.where(values < (256 - threshold if increasing else threshold), values, 255 - values)
    bits = (level / 10 * 4).long()
    # no bit left: black
    shift = 8 - (4 - bits if increasing else bits)
    return (values >> shift) << shift


def _autocontrast(levels: Tensor) -> Tensor:
    flat = levels.flatten(2).double()
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)
    scale = 255 / (high - low)
    values = _every_level(levels).double()
    stretched = (values * scale + -low * scale).trunc().clamp(0, 255)
    return torch.where(high <= low, values, stretched).long()


def _equalize(levels: Tensor) -> Tensor:
    flat = levels.flatten(2).sort(2).values.contiguous()
    values = _every_level(levels)
    below = torch.searchsorted(flat, values.to(torch.int32).expand(*flat.shape[:2], 256).contiguous())
    # of the highest level that there is; all but those pixels are spread
    spread = torch.searchsorted(flat, flat[..., -1:].contiguous())
    step = spread // 255
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step == 0, values, table)


def _gray(levels: Tensor) -> Tensor:
    """Luma as Pillow rounds it, int32 [n, 1, H, W]."""
    if levels.shape[1] == 1:
        return levels
    red, green, blue = levels.unbind(1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).unsqueeze(1)


def _mean_gray(levels: Tensor) -> Tensor:
    gray = _gray(levels).flatten(1)
    return (gray.sum(1).double() / gray.shape[1] + 0.5).to(torch.int32).view(-1, 1, 1, 1)


def _smooth(levels: Tensor) -> Tensor:
    """A 3x3 mean in which the middle counts five times; the border stays."""
    smooth = levels.clone()
    height, width = levels.shape[2:]
    if height > 2 and width > 2:
        parts = [levels[..., i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
        total = sum(parts[1:], parts[0]) + 4 * parts[4]
        smooth[..., 1:-1, 1:-1] = (2 * total + 13) // 26
    return smooth


_DEGENERATE: dict[str, Callable[[Tensor], Tensor]] = {
    "color": _gray,
    "contrast": _mean_gray,
    "brightness": torch.zeros_like,
    "sharpness": _smooth,
}


def _blended(degenerate: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    """Of d = degenerate and v = levels, d + factor * (v - d), in fp32, without its fraction."""
    share = factor.float().view(-1, 1, 1, 1)
    return (degenerate.float() + share * (levels - degenerate).float()).clamp(0, 255).to(torch.int32)


def _matrix(name: str, amount: Tensor, height: int, width: int) -> Tensor:
    """Where an output pixel comes from: x = a x + b y + c, y = d x + e y + f; fp64 [n, 6]."""
    zero, one = torch.zeros_like(amount), torch.ones_like(amount)
    if name == "shear-x":
        rows = [one, amount / 10 * 0.3, zero, zero, one, zero]
    elif name == "shear-y":
        rows = [one, zero, zero, amount / 10 * 0.3, one, zero]
    elif name == "translate-x":
        rows = [one, zero, amount / 10 * 0.45 * width, zero, one, zero]
    elif name == "translate-y":
        rows = [one, zero, zero, zero, one, amount / 10 * 0.45 * height]
    else:
        angle = torch.deg2rad(amount / 10 * 30)
        # against the clock, around the middle
        cos, sin, x, y = angle.cos(), angle.sin(), width / 2, height / 2
        rows = [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y]
    return torch.stack(rows, 1)


def _transformed(levels: Tensor, matrix: Tensor, fill: Sequence[int]) -> Tensor:
    """Bilinear between the centres of pixels, the border's value up to the border; without the fraction."""
    height, width = levels.shape[2:]
    x = torch.arange(width, device=levels.device, dtype=torch.float64) + 0.5
    y = (torch.arange(height, device=levels.device, dtype=torch.float64) + 0.5).unsqueeze(1)
    a, b, c, d, e, f = (matrix[:, i].view(-1, 1, 1) for i in range(6))
    x, y = a * x + b * y + c, d * x + e * y + f  # [n, H, W]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    flat = levels.flatten(2)

    def at(row: Tensor, column: Tensor) -> Tensor:
        index = row.long().clamp(0, height - 1) * width + column.long().clamp(0, width - 1)
        return flat.gather(2, index.flatten(1).unsqueeze(1).expand(-1, flat.shape[1], -1)).view(levels.shape).double()

    right, down = (x - left).unsqueeze(1), (y - top).unsqueeze(1)
    upper, lower = (first + (at(row, left + 1) - first) * right for row in (top, top + 1) for first in (at(row, left),))
    colour = torch.tensor(fill, dtype=torch.int32, device=levels.device).view(-1, 1, 1)
    return torch.where(inside.unsqueeze(1), (upper + (lower - upper) * down).to(torch.int32), colour)

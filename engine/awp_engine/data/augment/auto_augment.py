"""AutoAugment: one of 25 pairs of operations an image, as a search found them for CIFAR-10 and for SVHN.

Source: Cubuk, Zoph, Mane, Vasudevan, Le: AutoAugment: Learning Augmentation Strategies from Data, CVPR 2019, its
appendix. Magnitudes, pixels and fill are those of the file that DAJAT and IKL-AT share (DeepVoltaire/AutoAugment; OAAT
imports one of that name). Bin i of ten is i/9 of an operation's range. torchvision's policies have the same pairs and
bins, and differ in five things: there rotations go to either side, here against the clock alone; translations are whole
pixels, here the nearest pixel of a fraction; shears take the nearest pixel, here a cubic; solarize begins at 255, here
at 256; what comes from outside is 0, here 128.
"""

import functools
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from awp_engine.data.augment import image_operations as pillow
from awp_kernels.philox import mix_seed, sample_words

_STREAM = 16
_FILL = 128


def _shear(levels: Tensor, amount: Tensor, *, along_x: bool) -> Tensor:
    matrix = (1, amount, 0, 0, 1, 0) if along_x else (1, 0, 0, amount, 1, 0)
    return pillow.affine(levels, matrix, fill=_FILL, resample="bicubic")


def _translate(levels: Tensor, part: Tensor, *, along_x: bool) -> Tensor:
    height, width = levels.shape[2:]
    columns, rows = torch.arange(width, device=levels.device), torch.arange(height, device=levels.device).unsqueeze(1)
    moved = (part * (width if along_x else height)).to(levels.device, non_blocking=True).view(-1, 1, 1)
    if along_x:
        return pillow.gather_pixels(levels, rows, (columns + 0.5 + moved).floor().long(), fill=_FILL)
    return pillow.gather_pixels(levels, (rows + 0.5 + moved).floor().long(), columns, fill=_FILL)


class _Kind(NamedTuple):
    """An operation, and what Pillow is given for a bin: start + slope * bin / 9, or start +- that if signed."""

    operation: pillow.Operation
    start: float
    slope: float
    signed: bool


_KINDS = {
    "shear-x": _Kind(functools.partial(_shear, along_x=True), 0, 0.3, signed=True),
    "shear-y": _Kind(functools.partial(_shear, along_x=False), 0, 0.3, signed=True),
    "translate-x": _Kind(functools.partial(_translate, along_x=True), 0, 150 / 331, signed=True),
    "translate-y": _Kind(functools.partial(_translate, along_x=False), 0, 150 / 331, signed=True),
    "rotate": _Kind(functools.partial(pillow.rotate, fill=_FILL), 0, 30, signed=False),
    "color": _Kind(pillow.color, 1, 0.9, signed=True),
    "contrast": _Kind(pillow.contrast, 1, 0.9, signed=True),
    "sharpness": _Kind(pillow.sharpness, 1, 0.9, signed=True),
    "brightness": _Kind(pillow.brightness, 1, 0.9, signed=True),
    "posterize": _Kind(pillow.posterize, 8, -4, signed=False),
    "solarize": _Kind(pillow.solarize, 256, -256, signed=False),
    "autocontrast": _Kind(pillow.autocontrast, 0, 0, signed=False),
    "equalize": _Kind(pillow.equalize, 0, 0, signed=False),
    "invert": _Kind(pillow.invert, 0, 0, signed=False),
}
OPERATIONS = tuple(kind.operation for kind in _KINDS.values())
_NUMBERS = {name: number for number, name in enumerate(_KINDS)}
_Pairs: TypeAlias = tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...]

CIFAR10: _Pairs = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate-x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear-y", 0.5, 8), ("translate-y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear-y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate-x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate-y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate-y", 0.9, 9), ("translate-y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate-y", 0.7, 9), ("autocontrast", 0.9, 0)),
)
"""For CIFAR-10 and CIFAR-100: name, probability and bin of both operations."""
SVHN: _Pairs = (
    (("shear-x", 0.9, 4), ("invert", 0.2, 0)),
    (("shear-y", 0.9, 8), ("invert", 0.7, 0)),
    (("equalize", 0.6, 0), ("solarize", 0.6, 6)),
    (("invert", 0.9, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.6, 0), ("rotate", 0.9, 3)),
    (("shear-x", 0.9, 4), ("autocontrast", 0.8, 0)),
    (("shear-y", 0.9, 8), ("invert", 0.4, 0)),
    (("shear-y", 0.9, 5), ("solarize", 0.2, 6)),
    (("invert", 0.9, 0), ("autocontrast", 0.8, 0)),
    (("equalize", 0.6, 0), ("rotate", 0.9, 3)),
    (("shear-x", 0.9, 4), ("solarize", 0.3, 3)),
    (("shear-y", 0.8, 8), ("invert", 0.7, 0)),
    (("equalize", 0.9, 0), ("translate-y", 0.6, 6)),
    (("invert", 0.9, 0), ("equalize", 0.6, 0)),
    (("contrast", 0.3, 3), ("rotate", 0.8, 4)),
    (("invert", 0.8, 0), ("translate-y", 0.0, 2)),
    (("shear-y", 0.7, 6), ("solarize", 0.4, 8)),
    (("invert", 0.6, 0), ("rotate", 0.8, 4)),
    (("shear-y", 0.3, 7), ("translate-x", 0.9, 3)),
    (("shear-x", 0.1, 6), ("invert", 0.6, 0)),
    (("solarize", 0.7, 2), ("translate-y", 0.6, 7)),
    (("shear-y", 0.8, 4), ("invert", 0.8, 0)),
    (("shear-x", 0.7, 9), ("translate-y", 0.8, 3)),
    (("shear-y", 0.8, 5), ("autocontrast", 0.7, 0)),
    (("shear-x", 0.7, 2), ("invert", 0.1, 0)),
)
"""For SVHN."""


@functools.cache
def _table(pairs: _Pairs) -> Tensor:
    """fp64 [pairs, 2, 4]: of every operation its number, its limit among random words, start and slope of its bin."""
    rows = []
    for pair in pairs:
        for name, probability, magnitude in pair:
            kind = _KINDS[name]
            step = kind.slope * magnitude / 9
            start, slope = (kind.start, step) if kind.signed else (kind.start + step, 0)
            # Pillow keeps whole bits
            start = round(start) if name == "posterize" else start
            rows.append((_NUMBERS[name], round(probability * 2**32), start, slope))
    return torch.tensor(rows, dtype=torch.float64).view(len(pairs), 2, 4)


def draw_auto_augment(ids: Tensor, pairs: _Pairs, *, seed: int, epoch: int, part: float = 1.0) -> tuple[Tensor, Tensor]:
    """Which operations, and how strong.

    With words of stream 16, the pair is number w0 * 25 // 2^32. Its first operation is done where w1 < probability *
    2^32, to the negative side where w2 is odd; the second likewise, by w3 and w4. Where w5 >= part * 2^32, neither is.

    Args:
        ids: int64 [B].
        pairs: `CIFAR10` or `SVHN`.
        seed: the run's seed.
        epoch: with seed and id, all that is drawn depends on.
        part: of the images that are changed, each drawn by itself.

    Returns:
        int64 [B, 2], a place in `OPERATIONS`, or -1 for nothing; and fp64 [B, 2], what the operation is given.
    """
    words = sample_words(ids, 6, seed=mix_seed(seed, epoch), stream=_STREAM)
    drawn = _table(pairs).to(ids.device)[(words[:, 0] * len(pairs)) >> 32]  # [B, 2, 4]
    number, limit, start, slope = drawn.unbind(2)
    choice = torch.where(words[:, 1:4:2] < limit, number.long(), -1)
    if part < 1:
        choice = torch.where(words[:, 5:] < round(part * 2**32), choice, -1)
    return choice, start + slope * (1 - 2 * (words[:, 2:5:2] & 1))


def auto_augment(levels: Tensor, choice: Tensor, amount: Tensor) -> None:
    """Do what `draw_auto_augment` gave to levels, int32 [B, C, H, W], in place."""
    pillow.apply_in_turn(levels, choice, OPERATIONS, amount)

"""Images that show a concept, and others: from folders, made of a data set's own images, or made by a function."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from awp_engine.audit.classes import class_number
from awp_engine.config.model_names import is_code
from awp_engine.data import Dataset, Framing, Split, StreamedSplit, eval_batches, shown
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.evaluation.predict import Intake, find_images
from awp_engine.models.user_code import load_factory, told_in_one_line
from awp_kernels.philox import mix_seed, sample_words

LEAST = 10
"""Images of a concept, and others, that a classifier needs."""
SOURCES = (
    "a folder of images, pairs:FOLDER, crops:CLASS, textures:CLASS, colours:CLASS, random, or a function of your own, "
    "file.py:function"
)
WITH, WITHOUT = "with", "without"
Swap = Callable[[Tensor], Tensor]

_FLAG = "--concepts"
_STREAM = 41
_BATCH = 256
# parts of an image's shorter side
_TILE, _CROP = 4, 2


@dataclass(frozen=True, kw_only=True)
class Concept:
    """Images that show a concept, and others that do not.

    Attributes:
        name: of the concept.
        source: what was asked for.
        images: in [0, 1], fp32 [N, C, H, W].
        others: [M, C, H, W].
        pairs: whether others[i] is images[i] without the concept.
        swap: makes images with the concept of images [N, C, H, W] without it.
        code: SHA-256 of the code of `swap`.
    """

    name: str
    source: str
    images: Tensor
    others: Tensor
    pairs: bool = False
    swap: Swap | None = None
    code: str = ""

    def digest(self) -> str:
        """SHA-256 of all pixels, and of the code."""
        content = hashlib.sha256(repr((self.images.shape, self.others.shape, self.pairs, self.code)).encode())
        for images in (self.images, self.others):
            content.update(images.cpu().numpy().tobytes())
        return content.hexdigest()


def tested_class(data: Dataset, text: str, flag: str) -> int:
    """As `class_number`, of a class that has test images."""
    number = class_number(data, text, flag)
    if not bool((data.test.labels == number).any()):
        name = data.class_names[number]
        raise EvaluationError(f"{flag}: class {name} has no images in {data.name}'s test split; take another")
    return number


def images_of(split: Split | StreamedSplit, rows: Tensor) -> Tensor:
    """The images of rows int64 [n], fp32 [n, C, H, W] in [0, 1]."""
    return torch.cat([batch.images for batch in eval_batches(split.select(rows), _BATCH)])


def open_concepts(given: Sequence[str], data: Dataset, *, count: int, seed: int) -> list[Concept]:
    """The concepts that a user names, as NAME=SOURCE or SOURCE.

    Args:
        given: see `SOURCES`.
        data: whose images are cut, and are the others of a folder.
        count: images of a concept, and others, at most.
        seed: of which images are taken, and where they are cut.

    Raises:
        EvaluationError, DataError, ConfigError: one line that says what is wrong.
        OSError: a folder cannot be listed.
    """
    found = [_open(text, data, count, seed) for text in given]
    names = [concept.name for concept in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise EvaluationError(f"{_FLAG}: two are called {twice}; name one NAME={twice}")
    return found


def _open(text: str, data: Dataset, count: int, seed: int) -> Concept:
    # a folder's own name may have the sign
    name, equals, source = ("", "", text) if Path(text).is_dir() else text.partition("=")
    source = source if equals else text
    name = name if equals and name else Path(source).name or source
    kind, _, rest = source.partition(":")
    swap, code, pairs = None, "", kind == "pairs"
    if Path(source).is_dir() or pairs:
        images, others = _of_folder(Path(rest if pairs else source), data, count, seed, pairs)
    elif source == "random":
        rows = _drawn(data.test, torch.arange(len(data.test)), 2 * count, seed)
        images, others = images_of(data.test, rows).chunk(2)
    elif kind in _CUT:
        number = tested_class(data, rest, _FLAG)
        images, others = (
            _CUT[kind](images_of(data.test, rows), data.test.ids_of(rows.cpu()), seed)
            for of_class in (data.test.labels == number, data.test.labels != number)
            for rows in [_drawn(data.test, of_class.nonzero().squeeze(1).cpu(), count, seed)]
        )
    elif is_code(source):
        function, found = load_factory(source, _FLAG)
        swap, code = _checked(function, source), found.sha256
        rows = _drawn(data.test, torch.arange(len(data.test)), 2 * count, seed)
        images, others = images_of(data.test, rows).chunk(2)
        images = swap(images)
    else:
        raise EvaluationError(f"{_FLAG}: expected {SOURCES}; got {source[:80]!r}, which is none of them")
    for what, part in (("images", images), ("other images", others)):
        if len(part) < LEAST:
            raise EvaluationError(f"{_FLAG}: {name} has {len(part)} {what}; expected at least {LEAST}, better 100")
    return Concept(name=name, source=source, images=images, others=others, pairs=pairs, swap=swap, code=code)


def _drawn(split: Split | StreamedSplit, rows: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the rows, or all, by random words of their ids."""
    words = sample_words(split.ids_of(rows), 1, seed=mix_seed(seed, 1), stream=_STREAM)[:, 0]
    return rows[words.argsort(stable=True)[:count]]


def _of_folder(folder: Path, data: Dataset, count: int, seed: int, pairs: bool) -> tuple[Tensor, Tensor]:
    parts = folder / WITH, folder / WITHOUT
    if not all(part.is_dir() for part in parts):
        if pairs:
            raise EvaluationError(f"{_FLAG}: {folder}: expected the folders {WITH} and {WITHOUT} in it")
        rows = _drawn(data.test, torch.arange(len(data.test)), count, seed)
        return _read(_spread(find_images([folder]), count), data), images_of(data.test, rows)
    listed = [find_images([part]) for part in parts]
    if pairs:
        names = [
            {path.removeprefix(os.fsencode(part)) for path in paths} for part, paths in zip(parts, listed, strict=True)
        ]
        if alone := sorted(names[0] ^ names[1]):
            raise EvaluationError(
                f"{_FLAG}: {folder}: {shown(alone[0][1:])} is in {WITH if alone[0] in names[0] else WITHOUT} alone; "
                "expected each image in both folders, by the same name"
            )
    with_, without = (_read(_spread(paths, count), data) for paths in listed)
    return with_, without


def _spread(paths: list[bytes], count: int) -> list[bytes]:
    return [paths[k * len(paths) // count] for k in range(count)] if len(paths) > count else paths


def _read(paths: Sequence[bytes], data: Dataset) -> Tensor:
    channels, height, width = data.test.shape
    # of any size, where the model's images are square
    framing = Framing(size=height) if height == width else Framing()
    intake = Intake(channels=channels, height=height, width=width, framing=framing)
    pixels = torch.from_numpy(np.stack([intake.read(path) for path in paths]))
    return (pixels.permute(0, 3, 1, 2).contiguous().float() / 255).to(data.test.device)


def _windows(images: Tensor, ids: Tensor, seed: int, least: int, most: int) -> list[Tensor]:
    """A random square of each image, with a side from `least` to `most` pixels."""
    height, width = images.shape[2:]
    words = sample_words(ids, 3, seed=mix_seed(seed, 2), stream=_STREAM).tolist()
    sides = [least + size % (most - least + 1) for size, _, _ in words]
    places = [(y % (height - side + 1), x % (width - side + 1)) for side, (_, y, x) in zip(sides, words, strict=True)]
    return [
        image[:, top : top + side, left : left + side]
        for image, side, (top, left) in zip(images, sides, places, strict=True)
    ]


def _crops(images: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Random squares, enlarged."""
    size, side = images.shape[2:], min(images.shape[2:])
    windows = _windows(images, ids, seed, max(1, side // _TILE), max(1, side // _CROP))
    return torch.cat([F.interpolate(window[None], size=size, mode="bilinear") for window in windows])


def _textures(images: Tensor, ids: Tensor, seed: int) -> Tensor:
    """A small random square, repeated."""
    height, width = images.shape[2:]
    side = max(1, min(height, width) // _TILE)
    tiles = torch.stack(_windows(images, ids, seed, side, side))
    return tiles.repeat(1, 1, -(-height // side), -(-width // side))[:, :, :height, :width].contiguous()


def _colours(images: Tensor, *_: object) -> Tensor:
    """Plain images of the mean colour."""
    return images.mean((2, 3), keepdim=True).expand_as(images).contiguous()


_CUT = {"crops": _crops, "textures": _textures, "colours": _colours}


def _checked(function: Swap, source: str) -> Swap:
    def swap(images: Tensor) -> Tensor:
        with told_in_one_line(source, "it", _FLAG, EvaluationError), torch.no_grad():
            found = function(images.clone())
        if not isinstance(found, Tensor) or found.shape != images.shape or found.dtype != images.dtype:
            raise EvaluationError(f"{_FLAG}: {source}: expected images of the same shape and type as it was given")
        if not bool(((found >= 0) & (found <= 1)).all()):
            raise EvaluationError(f"{_FLAG}: {source}: expected pixels in [0, 1]")
        return found

    return swap

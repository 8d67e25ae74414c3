"""Which part of a file's image is looked at, and at what size."""

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from awp_kernels.philox import sample_words

_STREAM_WINDOW = 20
_TRIES = 10
_LOG_RATIO = math.log(4 / 3)

Images = Generator[Tensor, None, None]
"""Images of one request after the other; closing it ends whatever makes them."""


class Window(NamedTuple):
    """A part of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


class Request(NamedTuple):
    """Images that are wanted: rows of a store and sample ids, int64 [n] each; and the seed of what is random about
    them, None for evaluation.
    """

    rows: Tensor
    ids: Tensor
    seed: int | None


class Requests(NamedTuple):
    """Requests that can be gone through more than once, by several threads.

    Attributes:
        make: begins them anew.
        largest: images in one of them at most.
    """

    make: Callable[[], Iterator[Request]]
    largest: int

    def nonempty(self, rows: Tensor | None = None) -> Self:
        """Those that ask for something: no pipeline can make an empty batch. Rows become those of `rows`, int64 [N]."""

        def make() -> Iterator[Request]:
            for request in self.make():
                if len(request.rows):
                    yield request if rows is None else request._replace(rows=rows[request.rows])

        return type(self)(make, self.largest)


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How images of any size become images of one size.

    Attributes:
        size: side of the square that images are resized to, in pixels; None takes images as they are, and all have to
            be of one size.
        least_area: for training, the smallest part of an image's area that a random-resized crop takes; None takes the
            central square there too.
        central: side of the central square as a part of the image's shorter side.
    """

    size: int | None = None
    least_area: float | None = None
    central: float = 1.0

    def words(self, request: Request) -> list[list[int]] | None:
        """The random words of every image, for `window`; None where nothing is random."""
        if self.size is None or self.least_area is None or request.seed is None:
            return None
        words = sample_words(request.ids, 2 * _TRIES + 2, seed=request.seed, stream=_STREAM_WINDOW)
        return words.tolist()

    def window(self, height: int, width: int, words: list[int] | None) -> Window:
        """What to take of an image of this size.

        With words, a random-resized crop: of ten draws of area (uniform from least_area to 1) and ratio of width to
        height (log-uniform from 3/4 to 4/3) the first one that fits, at a uniform place; the central part with the
        nearest ratio if none fits.

        Source: Szegedy et al.: Going Deeper with Convolutions, CVPR 2015, in the form that became common.
        """
        if self.size is None:
            return Window(0, 0, height, width)
        if words is None or self.least_area is None:
            side = max(1, round(self.central * min(height, width)))
            return _centred(height, width, side, side)
        for k in range(_TRIES):
            area = height * width * (self.least_area + words[2 * k] * 2.0**-32 * (1 - self.least_area))
            ratio = math.exp((words[2 * k + 1] * 2.0**-31 - 1) * _LOG_RATIO)
            columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < columns <= width and 0 < rows <= height:
                top = words[2 * _TRIES] * (height - rows + 1) >> 32
                left = words[2 * _TRIES + 1] * (width - columns + 1) >> 32
                return Window(top, left, rows, columns)
        return _centred(
            height, width, min(height, max(1, round(width * 4 / 3))), min(width, max(1, round(height * 4 / 3)))
        )


def _centred(height: int, width: int, rows: int, columns: int) -> Window:
    return Window((height - rows) // 2, (width - columns) // 2, rows, columns)


def split_evenly(count: int, parts: int) -> list[range]:
    """`count` numbers in at most `parts` ranges that differ by one number at most.

    >>> split_evenly(5, 2)
    [range(0, 2), range(2, 5)]
    """
    parts = max(1, min(count, parts))
    return [range(count * k // parts, count * (k + 1) // parts) for k in range(parts)]


def every_row(count: int, size: int) -> Requests:
    """Every row once, in order, as for evaluation.

    >>> [len(request.rows) for request in every_row(5, 2).make()]
    [2, 2, 1]
    """

    def make() -> Iterator[Request]:
        for start in range(0, count, size):
            rows = torch.arange(start, min(start + size, count))
            yield Request(rows, rows, None)

    return Requests(make, min(count, size))

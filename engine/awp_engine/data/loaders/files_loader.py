"""What all loaders of image files share: one file, checked and ready to be decoded."""

from typing import NamedTuple

from awp_engine.data.dataset import DataError
from awp_engine.data.loaders.framing import Framing, Window
from awp_engine.data.sets.inspect import check
from awp_engine.data.sets.store import EncodedImages


class Picture(NamedTuple):
    """A file's bytes, and which part of its image is wanted."""

    content: bytes
    window: Window


class Reader:
    """Reads files of a store, and refuses those that cannot become an image of the wanted shape.

    Args:
        shape: channels, height and width of all images.
        framing: how they become that.
    """

    def __init__(self, shape: tuple[int, int, int], framing: Framing) -> None:
        self.shape, self.framing = shape, framing

    def read(self, store: EncodedImages, row: int, words: list[int] | None) -> Picture:
        """The file of a row.

        Raises:
            DataError: naming the file.
        """
        content, name = store.read(row), store.name(row)
        header = check(content, name)
        channels, height, width = self.shape
        mode = "RGB" if channels == 3 else "L"
        if self.framing.size is None and (header.height, header.width, header.mode) != (height, width, mode):
            raise DataError(
                f"{name} is {header.mode} {header.width}x{header.height}; expected {mode} {width}x{height} as the "
                "first image: convert all images to one size and mode, or give --data.image-size"
            )
        if header.mode == "RGB" and channels == 1:
            raise DataError(f"{name} is RGB; expected L (grey) as the first image: convert all images to one mode")
        return Picture(content, self.framing.window(header.height, header.width, words))

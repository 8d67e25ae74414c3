"""Where images lie: files that have to be decoded, or arrays; both are read by row number."""

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class EncodedImages(Protocol):
    """Image files by row: a folder, a tar, a column of a table. May be sent to other processes (picklable)."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> bytes:
        """The file's bytes.

        Raises:
            DataError: naming the file, if it cannot be read.
        """
        ...

    def name(self, row: int) -> str:
        """The file's name for messages: a path, or an archive and the member's name."""
        ...

    def digest(self) -> str:
        """SHA-256, hexadecimal, of names, sizes and contents; of 1,000 files' contents where they have > 256 MB."""
        ...


@runtime_checkable
class ImageArrays(Protocol):
    """Decoded images by row, all of one size, mostly in memory-mapped files."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        ...

    def __len__(self) -> int: ...

    def gather(self, rows: Tensor) -> Tensor:
        """uint8 [n, C, H, W] in any strides, on the CPU, of rows int64 [n] there, in their order, repeats allowed."""
        ...

    def digest(self) -> str:
        """SHA-256, hexadecimal, of shape, labels and images; of 1,000 of the images where they have > 256 MB."""
        ...

"""A standard output that may be lost - `| head -1`, a full disk - without ending a measurement of hours."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def lasting_output(work: str) -> Iterator[None]:
    """A block, or by decoration a function, whose standard output may be lost; `work` goes on then, says stderr."""
    with contextlib.redirect_stdout(_LastingOutput(sys.stdout, work)):
        try:
            yield
        finally:
            sys.stdout.flush()


class _LastingOutput(io.TextIOBase):
    """Writes to `stream` as long as that works; then says so once on stderr, and sends the rest to nowhere."""

    def __init__(self, stream: TextIO, work: str) -> None:
        self._stream, self._work, self._lost = stream, work, False

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The stream's."""
        return self._stream.encoding

    def fileno(self) -> int:
        """The stream's."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """The stream's."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """Always: what cannot be written is left out."""
        return True

    def write(self, text: str) -> int:
        """The whole text, or nothing of it."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Hands over what was written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if self._lost:
            return
        self._lost = True
        # what the stream still holds, and flushes as the program ends, must have somewhere to go
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        with contextlib.suppress(OSError):
            text = f"warning: standard output cannot be written, {self._work} goes on: {error.strerror}"
            print(text, file=sys.stderr, flush=True)

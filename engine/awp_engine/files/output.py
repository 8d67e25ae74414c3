"""Standard output and error that end no command: whatever a terminal cannot show, whoever stops reading."""

import contextlib
import io
import os
import sys
from typing import Any, TextIO


class _Survivor(io.FileIO):
    """A file whose first write that fails is the last one that is tried."""

    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            silence(self.fileno())
            if self.fileno() == 1:
                print(f"warning: standard output: {error.strerror}: the rest of it is lost", file=sys.stderr)
            return len(data)


def silence(number: int) -> None:
    """Sends what is still written to a file descriptor to nowhere, where it neither blocks nor fails."""
    # not a file of the system's: nothing to be blocked by
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)


def _survivor(number: int, stream: TextIO | None) -> io.TextIOWrapper:
    raw = _Survivor(number, "w", closefd=False)
    if not isinstance(stream, io.TextIOWrapper):
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace")
    return io.TextIOWrapper(
        # python -u has no buffer
        raw if stream.write_through else io.BufferedWriter(raw),  # pyright: ignore[reportArgumentType]
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def begin_output() -> None:
    """Have `sys.stdout` and `sys.stderr` escape what their encoding lacks, and survive the loss of who reads them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # closed by who started this: the next file opened would get the number, and what libraries print
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = _survivor(1, sys.stdout), _survivor(2, sys.stderr)

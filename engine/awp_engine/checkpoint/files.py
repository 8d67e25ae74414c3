"""What all files of checkpoints share: one error, one spelling of JSON, and reading of regular files alone."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from awp_engine.config.errors import UserError
from awp_engine.files.atomic import disk


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that could not be written, or is not what was written; the message is one line with the path."""


def canonical(value: object) -> bytes:
    """JSON in the one spelling that is written here."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


@contextlib.contextmanager
def open_regular(path: Path, size: int | None = None, limit: int | None = None) -> Iterator[BufferedReader]:
    """A regular file, of just `size` bytes or at most `limit` if they are given; links are not followed.

    Raises:
        CheckpointError: for anything else, and for errors while it is read.
    """
    try:
        # O_NONBLOCK: a named pipe must not hang the reader.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = "is a link" if isinstance(error, OSError) and error.errno == errno.ELOOP else None
        raise CheckpointError(f"{path}: cannot be read: {reason or getattr(error, 'strerror', error)}") from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        if size is not None and found.st_size != size:
            raise CheckpointError(f"{path}: has {found.st_size} bytes, expected {size}")
        if limit is not None and found.st_size > limit:
            raise CheckpointError(f"{path}: has {found.st_size} bytes, expected at most {limit}")
        with open(handle, "rb", closefd=False) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(handle)


def read_file(path: Path, size: int | None = None, limit: int | None = None) -> bytes:
    """The bytes of what `open_regular` opens."""
    with open_regular(path, size, limit) as file:
        return file.read()


def describe(error: OSError, path: Path, size: int) -> str:
    """What the user is told of a write that failed."""
    try:
        free = f"{disk(path.parent)[1]} bytes free"
    except OSError:
        free = "free bytes unknown"
    reason = error.strerror or str(error)
    return f"{path}: writing {size} bytes failed: {reason} ({free}); earlier checkpoints are untouched"

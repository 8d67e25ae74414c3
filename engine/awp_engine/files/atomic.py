"""Files that are written whole and synced."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".tmp-"
_THIS_PROCESS = uuid.uuid4().hex[:8]
_WRITER = re.compile(r"-(?P<process>[0-9a-f]{8})-(?P<pid>[1-9][0-9]*)@(?P<host>.*)$")


def temporary_beside(path: Path) -> Path:
    """A new name in the same directory, which says whose it is."""
    writer = f"{_THIS_PROCESS}-{os.getpid()}@{socket.gethostname()}"
    return path.with_name(f"{TEMPORARY}{path.name[:100]}-{uuid.uuid4().hex[:8]}-{writer}")


def remove_leftovers(directory: Path, name: str = "") -> None:
    """Removes what killed processes left in `directory` of files and directories whose names begin with `name`.

    What belongs to a process that is alive on this machine stays; those on other machines are kept out by
    `awp_engine.files.locking.locked`.
    """
    for entry in directory.glob(f"{TEMPORARY}{name}*"):
        if _is_in_use(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _is_in_use(name: str) -> bool:
    found = _WRITER.search(name)
    if found is None or found["host"] != socket.gethostname():
        return False
    if int(found["pid"]) == os.getpid():
        # in a container one process after another has the same number
        return found["process"] == _THIS_PROCESS
    try:
        os.kill(int(found["pid"]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def sync_directory(path: Path) -> None:
    """Makes names in `path` last through a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no sync of directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_file(path: Path, payload: bytes) -> None:
    """Writes a new file and syncs it."""
    with path.open("xb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, payload: bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old one or the new one, whole."""
    temporary = temporary_beside(path)
    try:
        write_file(temporary, payload)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block whose `OSError` names `path`, rather than a temporary file or none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file so that a reader, or a crash, sees the old one or the new one, whole.

    Bytes of names that are not UTF-8, which Python holds as lone surrogates, are written as escapes, as JSON has them.

    Raises:
        OSError: if it cannot be written; the old file is untouched.
    """
    with naming(path):
        replace_file(path, text.encode(errors="backslashreplace"))


def disk(path: Path) -> tuple[int, int]:
    """Total and free bytes where `path` is, or would be."""
    usage = shutil.disk_usage(next((place for place in (path, *path.parents) if place.is_dir()), Path("/")))
    return usage.total, usage.free


def require_space(directory: Path, size: int) -> None:
    """Raises `OSError` (ENOSPC) if `size` bytes do not fit."""
    total, free = disk(directory)
    # Some network file systems do not say how large they are.
    if total > 0 and free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

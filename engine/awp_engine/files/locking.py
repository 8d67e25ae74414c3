"""One process at a time writes into a directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from awp_engine.config import ConfigError

LOCK = ".lock"
_HOLDER = re.compile(r"process [0-9]{1,20} on [!-~]{1,255} since [0-9:T+-]{1,40}")
# file systems that have no locks, or whose server answers no more
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

_held: set[int] = set()


def _let_go() -> None:
    # a child that outlives this process would keep what it holds
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


class LockedError(ConfigError):
    """Another process writes there; the message is one line that names it."""


def _holder(handle: int) -> str:
    # who has only just taken the lock writes its name in a moment
    for _ in range(20):
        found = os.pread(handle, 400, 0).decode("ascii", "replace").strip()
        if _HOLDER.fullmatch(found):
            return found
        time.sleep(0.05)
    return "another process"


def _take(path: Path) -> int:
    """The lock file, open and locked; it stays so until it is closed, or this process ends, however it does."""
    while True:
        # a pipe must not be waited for, nor a link be followed; Python's files are not inherited by other programs
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file", str(path))
            _lock(handle, path.parent)
            # whoever held it may have removed it since it was opened
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.lstat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(
            f"{directory}: in use by {_holder(handle)}; wait for its end, or choose another directory"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"warning: {directory}: its file system has no locks ({error.strerror}): make sure that no other process "
            "writes there",
            file=sys.stderr,
            flush=True,
        )


def _make_and_take(path: Path) -> int:
    for _ in range(100):
        # where whoever made the directory removes it meanwhile
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return _take(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return _take(path)


@contextlib.contextmanager
def locked(directory: Path, name: str = LOCK) -> Iterator[None]:
    """A block in which no other process is in such a block for the same directory.

    A `flock` on a file in it, which the kernel releases when this process dies, however it does; forked children do not
    keep it. The directory is made if it is missing, and removed again if nothing was written into it. Reading needs no
    lock. Over NFS it holds between machines where the server keeps locks, as it does unless mounted with `nolock`.

    Args:
        directory: to write into.
        name: of the lock file, where it is for one file in the directory alone.

    Raises:
        LockedError: another process holds it; the message says which, where and since when.
        ConfigError: the directory cannot be written to.
    """
    path = directory / name
    try:
        made = [place for place in (directory, *directory.parents) if not place.exists()]
        handle = _make_and_take(path)
    except OSError as error:
        reason = "it is a file, not a directory" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(
            f"{error.filename or path}: cannot be written to: {reason}; choose another directory"
        ) from None
    owner = os.getpid()
    _held.add(handle)
    try:
        word = f"process {owner} on {socket.gethostname()} since {time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n"
        # on a full disk it locks all the same
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, word.encode("ascii", "replace"), 0)
        yield
    finally:
        if os.getpid() == owner:
            # removed before it is released: after that it may be another's
            with contextlib.suppress(OSError):
                path.unlink()
            _held.discard(handle)
            os.close(handle)
            with contextlib.suppress(OSError):
                for place in made:
                    place.rmdir()

"""A thread of its own for what may block or fail: a disk, a terminal that nobody reads."""

import functools
import io
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TextIO

_WAITING = 1000


class Lane:
    """Does jobs on a thread of its own, in order; what does not fit into its queue is left out.

    Args:
        name: what warnings call it.
        warn: is told, in a line, of what was not done.
    """

    def __init__(self, name: str, warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._jobs: queue.Queue[Callable[[], object] | threading.Event | None] = queue.Queue(maxsize=_WAITING)
        self._flushed = threading.Event()
        self._flushed.set()
        self.failing = False
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if isinstance(job, threading.Event):
                job.set()
                continue
            try:
                job()
                self.failing = False
            except Exception as error:
                # whatever a logger raises, the training goes on
                self.failing = True
                self._warn(f"{self._name}: cannot be written, training goes on: {error or type(error).__name__}")

    def _put(self, job: Callable[[], object] | threading.Event | None) -> bool:
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    def put(self, action: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Has `action` called, some time; never waits."""
        if not self._put(functools.partial(action, *args, **kwargs)):
            self._warn(f"{self._name}: is not written in time, training goes on; some of it is left out")

    def flush(self, seconds: float) -> bool:
        """Waits until all is done, `seconds` at most, and not at all while an earlier wait is not over."""
        flushed = threading.Event()
        if not self._flushed.is_set() or not self._put(flushed):
            return False
        self._flushed = flushed
        return flushed.wait(seconds)

    def close(self, seconds: float) -> bool:
        """Whether all was done in time; where it was not, the thread is left to itself."""
        done = self._flushed.wait(seconds) and self.flush(seconds)
        if not done:
            self._warn(f"{self._name}: is not written in time; the rest is left out")
        self._put(None)
        return done


def write_line(file: TextIO, text: str) -> None:
    """A line that is not buffered: a write that never returns would keep the lock, and the interpreter from exiting."""
    try:
        # a notebook's stream has the handle of the kernel's terminal, which nobody looks at
        handle = file.fileno() if isinstance(file, io.TextIOWrapper) else None
    except OSError:
        handle = None
    if handle is None:
        print(text, file=file, flush=True)
        return
    rest = f"{text}\n".encode(errors="replace")
    while rest:
        rest = rest[os.write(handle, rest) :]

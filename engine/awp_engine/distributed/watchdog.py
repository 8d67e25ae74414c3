"""Finds the rank that hangs.

Where one rank of many stands still, all wait for it, and from outside all look alike. Every rank therefore counts the
parts of steps it has begun, and leaves the count where the others find it; whoever has waited too long compares.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from torch.distributed.distributed_c10d import Store

from awp_engine.distributed.ranks import Ranks, tell_torchrun
from awp_engine.distributed.signals import TORCHRUN_ENDED, StopRequest
from awp_engine.observe.regions import listening


class HangError(RuntimeError):
    """Ranks that made no progress; the message is one line that names them."""


class _Watchdog:
    """A thread that tells the others how far this rank is, and looks at them when it stands still.

    Args:
        ranks: of the run.
        store: of the ranks.
        timeout: seconds without progress, or without a word of another rank, until the process is ended.
        stop: asked once the store is gone.
    """

    def __init__(self, ranks: Ranks, store: Store, timeout: float, stop: StopRequest) -> None:
        self._ranks, self._store, self._timeout, self._stop = ranks, store, timeout, stop
        self._count, self._part, self._words = 0, "start", 0
        self._moved = time.monotonic()
        self._over = threading.Event()
        # before any rank can wait for this one
        self._tell()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def note(self, part: str, begins: bool) -> None:
        """A part of a step begins or ends: see `regions.listening`."""
        self._count += 1
        self._part = part if begins else f"after {part}"
        self._moved = time.monotonic()

    def close(self) -> None:
        """Watch no longer."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        interval = min(self._timeout / 8, 5)
        while not self._over.wait(interval):
            try:
                self._tell()
                if time.monotonic() - self._moved > self._timeout:
                    self._end(interval)
            except RuntimeError:
                # the store is gone, and torchrun with it: a rank that went on would write where the next start does
                self._stop.reason = self._stop.reason or TORCHRUN_ENDED
                self._watch_alone(interval)
                return

    def _watch_alone(self, interval: float) -> None:
        """Nobody is left to ask, and nobody to end a rank that hangs and cannot heed."""
        while not self._over.wait(interval):
            if time.monotonic() - self._moved > self._timeout:
                print(
                    f"train.py: error: no progress of rank {self._ranks.rank} for {self._timeout:g} s, last seen in "
                    f"{self._part}, after the end of torchrun; start again to go on",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                os._exit(1)

    def _tell(self) -> None:
        self._words += 1
        word = {
            "words": self._words,
            "count": self._count,
            "part": self._part,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._store.set(f"rank{self._ranks.rank}", json.dumps(word))

    def _heard(self) -> list[dict]:
        nothing = json.dumps({"words": 0, "count": 0, "part": "start", "host": "an unknown host", "pid": 0})
        names = [f"rank{rank}" for rank in range(self._ranks.world)]
        # to ask for what was never said would be to wait for it
        return [json.loads(self._store.get(name) if self._store.check([name]) else nothing) for name in names]

    def _end(self, interval: float) -> NoReturn:
        before = self._heard()
        time.sleep(3 * interval)
        self._tell()
        now = self._heard()
        silent = [rank for rank, (a, b) in enumerate(zip(before, now, strict=True)) if a["words"] == b["words"]]
        behind = [rank for rank, word in enumerate(now) if word["count"] == min(word["count"] for word in now)]
        guilty = silent or behind
        for rank in silent:
            if now[rank]["host"] == socket.gethostname():
                # stopped, or out of memory's reach: torchrun would wait for it to end by itself
                with contextlib.suppress(OSError):
                    os.kill(now[rank]["pid"], signal.SIGKILL)
        told = "; ".join(
            f"rank {rank} ({'gives no sign of life' if rank in silent else 'runs'}, process {now[rank]['pid']} on "
            f"{now[rank]['host']}), last seen in {now[rank]['part']}"
            for rank in guilty
        )
        waiting: dict[str, list[str]] = {}
        for rank in sorted(set(range(self._ranks.world)) - set(guilty)):
            waiting.setdefault(now[rank]["part"], []).append(str(rank))
        told += "".join(f"; rank {', '.join(ranks)} waits in {part}" for part, ranks in waiting.items())
        error = HangError(f"no progress for {self._timeout:g} s because of {told}; start again to go on")
        if self._ranks.rank == min(set(range(self._ranks.world)) - set(guilty), default=guilty[0]):
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        # of those that wait as well: where ranks wait for each other, the one that is behind need not be to blame
        print(f"train.py: stacks of rank {self._ranks.rank}, in {self._part}:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        try:
            raise error
        except HangError:
            # inside, or torchrun's summary has no word of it
            tell_torchrun(error)
        # the main thread waits inside a collective, where no exception reaches it
        os._exit(1)


@contextlib.contextmanager
def watching(ranks: Ranks, timeout: float, stop: StopRequest) -> Iterator[None]:
    """A block in which a rank that makes no progress for `timeout` seconds is named, and all ranks are ended.

    Progress is a `region` that begins or ends. A process that is stopped on the same machine is killed. Ranks that
    torchrun's end has left behind are asked to `stop`.
    """
    if ranks.store is None:
        yield
        return
    watchdog = _Watchdog(ranks, ranks.store, timeout, stop)
    try:
        with listening(watchdog.note):
            yield
    finally:
        watchdog.close()

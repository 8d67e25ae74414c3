"""Work on many items in processes of their own, whose death costs one item and not the work."""

import contextlib
import multiprocessing
import signal
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, NamedTuple, TypeVar

from awp_engine.config.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

# of work on one chunk and then on one item, after which its process counts as hung; seconds
LIMIT = 120.0


class WorkerError(UserError, RuntimeError):
    """Processes cannot be started; the message is one line."""


class Died(NamedTuple):
    """In place of the result of an item that its process did not survive."""

    why: str


@dataclass
class _Worker:
    process: ForkServerProcess
    pipe: Connection
    started: bool = False
    task: range | None = None
    deadline: float = 0.0


@contextlib.contextmanager
def apart_from_main() -> Iterator[None]:
    """A block whose child processes do not import the script that this process runs.

    They need nothing of it, and one without `if __name__ == "__main__"` would be run again by each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def process_all(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    *,
    workers: int,
    chunk: int,
    limit: float | None = LIMIT,
) -> Generator[tuple[int, Result | Died], None, None]:
    """Applies `work` to all items in `workers` processes, and yields (place of the item, result) as they come.

    A chunk whose process dies, or takes longer than `limit` seconds, is done again item by item. To be closed if it is
    not used up, which ends the processes.

    Args:
        items: what can be pickled.
        work: a function, or a partial of one, that can be imported by its name.
        workers: at least 1.
        chunk: items that are sent together.
        limit: None for work that may take any time.

    Raises:
        Exception: the first one that `work` raised.
        WorkerError: processes cannot be started.
    """
    queue = deque(range(start, min(start + chunk, len(items))) for start in range(0, len(items), chunk))
    context = multiprocessing.get_context("forkserver")
    # Torch is imported once, in the server, and not by each process.
    context.set_forkserver_preload([__name__, "awp_engine.data.tools.scan", "awp_engine.data.tools.pack"])
    pool: dict[Connection, _Worker] = {}
    try:
        while queue or any(worker.task for worker in pool.values()):
            while queue and len(pool) < workers and sum(not worker.task for worker in pool.values()) < len(queue):
                worker = _start(context, work)
                pool[worker.pipe] = worker
            for worker in pool.values():
                if queue and worker.started and worker.task is None:
                    worker.task = queue.popleft()
                    worker.deadline = time.monotonic() + (limit or 0)
                    # A process that is gone shows when its answer is read.
                    with contextlib.suppress(OSError):
                        worker.pipe.send([items[place] for place in worker.task])
            deadlines = [worker.deadline for worker in pool.values() if worker.task and limit is not None]
            timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            for pipe in wait(list(pool), timeout):
                assert isinstance(pipe, Connection)
                yield from _receive(pool, pipe, queue)
            for worker in [worker for worker in pool.values() if worker.task and limit is not None]:
                # who asked may have been slow: what has come since is in time
                if time.monotonic() > worker.deadline and not worker.pipe.poll():
                    yield from _lose(pool, worker, queue, f"took more than {limit:g} s")
    finally:
        for worker in pool.values():
            worker.process.kill()
        for worker in pool.values():
            worker.process.join()
            worker.pipe.close()


def _start(context: ForkServerContext, work: Callable[[Any], Any]) -> _Worker:
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(work, there), daemon=True)
    # A terminal's Ctrl-C reaches all processes; only this one is to answer, once its children are known to it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with apart_from_main():
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()
    return _Worker(process, here)


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The other end closes when its process ends, however it does.
    with contextlib.suppress(EOFError, OSError):
        pipe.send(None)
        while True:
            items = pipe.recv()
            try:
                results = [work(item) for item in items]
            except Exception as error:
                results = error
            pipe.send(results)


def _receive(pool: dict[Connection, _Worker], pipe: Connection, queue: deque[range]) -> Iterator[tuple[int, Any]]:
    worker = pool[pipe]
    try:
        results = pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        yield from _lose(pool, worker, queue, how)
        return
    if not worker.started:
        worker.started = True
        return
    if isinstance(results, Exception):
        raise results
    assert worker.task is not None
    task, worker.task = worker.task, None
    yield from zip(task, results, strict=True)


def _lose(
    pool: dict[Connection, _Worker], worker: _Worker, queue: deque[range], how: str
) -> Iterator[tuple[int, Died]]:
    """Takes a worker out, and its items apart; a single item is what it died of."""
    del pool[worker.pipe]
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()
    if not worker.started:
        raise WorkerError(f"a worker process {how} before it began; memory may be short: take fewer workers")
    if worker.task is None:
        return
    if len(worker.task) == 1:
        yield worker.task[0], Died(how)
    else:
        queue.extendleft(range(place, place + 1) for place in reversed(worker.task))

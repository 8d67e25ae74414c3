"""Work done ahead of its use, by a thread."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
_END = object()


def ahead(items: Iterable[T], depth: int, *, name: str) -> Generator[T, None, None]:
    """The same items, made by a thread that is at most `depth` of them ahead.

    An exception of the thread is raised where its item would have come. Closing the generator ends the thread once the
    item that it is making is made.

    Args:
        items: to be made.
        depth: at least 1.
        name: of the thread.
    """
    made: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def give(item: Any, error: BaseException | None) -> None:
        while not closed.is_set():
            try:
                made.put((item, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                give(item, None)
                if closed.is_set():
                    return
            give(_END, None)
        # whatever it is, it belongs to who asked
        except BaseException as error:
            give(_END, error)

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        closed.set()
        thread.join()

"""A `with` block that no interrupt leaves without its end."""

import io
from collections.abc import Callable, Generator
from typing import Self


class Block(io.IOBase):
    """What `contextlib.contextmanager` makes of a generator, but for interrupts.

    Ctrl-C is raised at the first instruction of a Python function, too. In contextlib's `__exit__` that leaves the
    generator where it yielded, and what it was to put back is not put back. `io.IOBase.__exit__` is C and calls
    `close`, here the generator's own: that goes on in a frame whose `except` and `finally` hold already.

    Args:
        begin: makes a generator that yields once; GeneratorExit is raised there at the end of the block, with what the
            block raised as its `__context__`.
    """

    def __init__(self, begin: Callable[[], Generator[None]]) -> None:
        self._begin = begin

    def __enter__(self) -> Self:
        steps = self._begin()
        self.close = steps.close  # type: ignore[method-assign]
        try:
            next(steps)
        except BaseException:
            steps.close()
            raise
        return self

"""How far a long measurement is, and how long it may still take."""

import time
from collections.abc import Callable

from awp_engine.files.text import duration


class ProgressLines:
    """Prints a line every few seconds.

    Args:
        total: all units of work: gradients of images.
        interval: seconds between lines.
        write: what takes a line.
    """

    def __init__(self, total: int, interval: float = 10.0, write: Callable[[str], None] | None = None) -> None:
        self.total, self.done, self.label = total, 0, ""
        self._interval = interval
        self._write = write or (lambda line: print(line, flush=True))
        self._began = self._last = time.monotonic()

    def begin(self, label: str) -> None:
        """Name what comes next."""
        self.label = label

    def advance(self, units: int) -> None:
        """Count `units` as done."""
        self.done += units
        now = time.monotonic()
        if now - self._last >= self._interval and self.done < self.total:
            self._last = now
            spent = now - self._began
            left = spent * (self.total - self.done) / self.done
            self._write(
                f"{self.label}: {self.done / self.total:.0%} of all, {duration(spent)} so far, {duration(left)} left"
            )

"""How far something long is, and how long it may still take: on a terminal a bar, elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from awp_engine.files.text import duration, printable
from awp_engine.observe.terminal import console_of

_QUIET_S = 5.0
_LINES_S = 10.0
# of the work: what less took says little of the rest, as processes start first and hard images come at any place
_ESTIMATED = 0.05


class _TimeLeft(TimeRemainingColumn):
    """The time that is left, once enough is done to tell."""

    def render(self, task: Task) -> Text:
        """As it is shown."""
        return super().render(task) if task.percentage >= 100 * _ESTIMATED else Text("-:--:--", "progress.remaining")


class Bar:
    """Counts work that is done; a context manager. What takes less than `quiet` seconds shows nothing.

    Both go to standard error, so that standard output holds results alone.

    Args:
        label: what is done.
        total: all units of work; 0 where only `set` will tell.
        console: where to show it; standard error if not given.
        quiet: seconds until the first sign.
        interval: seconds between two lines where there is no terminal.
    """

    def __init__(
        self,
        label: str = "",
        total: int = 0,
        *,
        console: Console | None = None,
        quiet: float = _QUIET_S,
        interval: float = _LINES_S,
    ) -> None:
        self.label, self.total, self.done = label, total, 0
        self._console = console or console_of(sys.stderr)
        self._quiet, self._interval = quiet, interval
        self._began = time.monotonic()
        # the first line after `quiet`, the next ones after `interval`
        self._line = self._began + quiet - interval
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def begin(self, label: str) -> None:
        """Name what comes next."""
        self.label = label

    def advance(self, units: int = 1) -> None:
        """Count `units` as done."""
        self.set(self.done + units, self.total)

    def set(self, done: int, total: int) -> None:
        """So much of so much is done."""
        self.done, self.total = done, total
        now = time.monotonic()
        spent = now - self._began
        if spent < self._quiet or not 0 < done < total:
            return
        if self._console.is_terminal:
            self._draw()
        elif now - self._line >= self._interval:
            self._line = now
            left = f", {duration(spent * (total - done) / done)} left" if done >= _ESTIMATED * total else ""
            line = f"{printable(self.label)}: {done / total:.0%}, {duration(spent)} so far{left}"
            print(line, file=self._console.file, flush=True)

    def _draw(self) -> None:
        if self._progress is None:
            columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _TimeLeft()
            self._progress = Progress(
                *columns,
                console=self._console,
                transient=True,
                # results that are piped elsewhere stay out of the terminal
                redirect_stdout=sys.stdout.isatty(),
                speed_estimate_period=600,
            )
            self._progress.add_task("", total=self.total)
            self._progress.start()
        # brackets of a name are no markup
        label = Text(printable(self.label)).markup
        self._progress.update(self._progress.task_ids[0], description=label, completed=self.done, total=self.total)


# what makes the bar of a piece of work, from a label and all its units: how whatever takes long is asked for progress
MakeBar = Callable[[str, int], Bar]


class NoBar(Bar):
    """Counts, and shows nothing: what a library does unless it is asked for more."""

    def set(self, done: int, total: int) -> None:
        """So much of so much is done."""
        self.done, self.total = done, total


class Part(Bar):
    """A piece of a longer bar's work: what it counts is counted there."""

    def __init__(self, whole: Bar, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self._whole = whole
        # what was not foreseen makes it longer
        whole.total = max(whole.total, whole.done + total)
        whole.begin(label)

    def __exit__(self, *_: object) -> None:
        # what was not needed is done as well
        self.set(self.total, self.total)

    def set(self, done: int, total: int) -> None:
        """So much of so much is done."""
        self._whole.advance(done - self.done)
        self.done, self.total = done, total

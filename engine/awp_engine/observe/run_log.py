"""What a run says while it works: metrics.jsonl, the services of `--log`, and progress on the console.

Nothing in here may stop or delay the training: whatever cannot be written is reported once and left out.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, SupportsFloat

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID

from awp_engine.files.output import silence
from awp_engine.files.text import duration, printable
from awp_engine.observe import rows
from awp_engine.observe.lane import Lane, write_line
from awp_engine.observe.metrics import Metrics, MetricsFile
from awp_engine.observe.terminal import console_of
from awp_engine.observe.trackers import open_trackers

_REDRAWS, _REDRAW_SECONDS = 4, 0.2
_CLOSE_SECONDS = 10.0
_METRICS_SECONDS = 5.0
# rows on a terminal, after which the head has scrolled away
_SCREEN = 20


class RunLog:
    """Metrics, services and progress of one run; a context manager.

    Epochs count from 1, and each has a row of a table. Where the output is a terminal there is a progress bar below.
    Elsewhere epochs that were not evaluated are shown, and steps between them, once an interval.

        with RunLog(run_dir, to_json(config), config.epochs, config.log_interval, start_epoch=done) as log:
            for epoch in range(done + 1, config.epochs + 1):
                log.begin_epoch(epoch, steps)
                for x, y in batches:
                    ...
                    log.step(loss, lr, len(x))
                log.end_epoch(epoch, {"loss": ..., "held_out_pgd_accuracy": ...}, best=True)
            log.finish(report, files)
    """

    def __init__(
        self,
        run_dir: Path,
        config_text: str,
        total_epochs: int,
        interval: float,
        *,
        start_epoch: int = 0,
        console: Console | None = None,
        trackers: Sequence[str] = ("tensorboard",),
        kept_by: str = "PGD",
    ) -> None:
        """Opens the log; what metrics.jsonl says about epochs after `start_epoch` is dropped, atomically.

        Args:
            run_dir: made if it is missing.
            config_text: the run's configuration, JSON.
            total_epochs: of the whole run.
            interval: seconds between plain lines.
            start_epoch: epochs done before, by the checkpoint that the run goes on from.
            console: where to show progress; standard output by default.
            trackers: services that are given the numbers too, as `--log` names them.
            kept_by: see `rows.caption`.
        """
        self._total_epochs, self._interval, self._start_epoch = total_epochs, interval, start_epoch
        self._kept_by = kept_by
        self._console = console or console_of(sys.stdout)
        self._warned: set[str] = set()
        self._warnings = Lane("warnings", lambda text: None)
        self._output = Lane("console", self._warn_once)
        self._metrics = Lane("metrics", self._warn_once)
        self._progress: Progress | None = None
        self._epoch, self._steps, self._step, self._rows = start_epoch, 1, 0, 0
        self._measuring_since = 0.0
        self._images_since_shown = 0
        self._began = self._shown = self._rate_from = time.monotonic()
        self._metrics_file = MetricsFile(run_dir)
        self._metrics.put(self._metrics_file.open, start_epoch)
        self._metrics.flush(_METRICS_SECONDS)
        self._trackers = open_trackers(trackers, run_dir, start_epoch, config_text, self._warn_once)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                "{task.description}",
                BarColumn(bar_width=None),
                "{task.fields[numbers]}",
                console=self._console,
                expand=True,
                refresh_per_second=_REDRAWS,
                # what it said stands in the rows
                transient=True,
            )
            self._progress.add_task("starting", total=None, numbers="")
            self._output.put(self._progress.start)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the progress bar and waits a few seconds for what is still to be written.

        A standard output or error that cannot be written is then replaced by nothing, so that the program can end.
        """
        if self._progress is not None:
            self._output.put(self._progress.stop)
            self._progress = None
        for tracker in self._trackers:
            tracker.close(_CLOSE_SECONDS)
        self._metrics.put(self._metrics_file.close)
        self._metrics.close(_CLOSE_SECONDS)
        written = self._output.close(_CLOSE_SECONDS) and not self._output.failing
        if not written and self._console.file is sys.stdout:
            silence(1)
        if not self._warnings.close(_CLOSE_SECONDS):
            silence(2)

    def message(self, text: str) -> None:
        """Shows one line, above the progress bar where there is one."""
        text = printable(text)
        if self._console.is_terminal:
            self._output.put(self._console.print, text, markup=False, highlight=False)
        else:
            # not rich's print: a line of a log file is not folded at 80 columns
            self._output.put(write_line, self._console.file, text)

    def begin_epoch(self, epoch: int, steps: int, done: int = 0) -> None:
        """Starts epoch `epoch` (from 1) of `steps` steps, or goes on after `done` of them."""
        self._epoch, self._steps, self._step = epoch, steps, done
        self._images_since_shown = 0
        self._rate_from = time.monotonic()

    def step(self, loss: SupportsFloat, lr: float, images: int) -> None:
        """Counts one step over `images` images; a tensor `loss` is read, and so waited for, only when it is shown."""
        self._step += 1
        self._images_since_shown += images
        if not self._due():
            return
        now = time.monotonic()
        images_per_second = self._images_since_shown / max(now - self._rate_from, 1e-9)
        self._shown = self._rate_from = now
        self._images_since_shown = 0
        where = f"epoch {self._epoch}/{self._total_epochs} step {self._step}/{self._steps}"
        # in steps of this process
        done = (self._epoch - 1 - self._start_epoch) * self._steps + self._step
        total = (self._total_epochs - self._start_epoch) * self._steps
        left = duration((now - self._began) / max(done, 1e-9) * (total - done))
        self._show(where, done / total, f"loss {float(loss):.4f}  {images_per_second:,.0f} img/s  {left} left")

    def measuring(self, what: str, part: float) -> None:
        """Says what is being measured, and that `part` of it (0 to 1) is done."""
        if part == 0.0:
            self._measuring_since = time.monotonic()
        if self._due() or (self._progress is not None and part == 0.0):
            self._shown = time.monotonic()
            spent = self._shown - self._measuring_since
            left = f"{duration(spent * (1 - part) / part)} left" if part else ""
            self._show(what, part, f"{part:.0%}  {left}".rstrip())

    def end_epoch(self, epoch: int, metrics: Metrics, *, best: bool = False) -> None:
        """Records an epoch, and shows it as a row.

        The learning curves use `loss`, `lr`, `train_pgd_accuracy`, `held_out_clean_accuracy` and
        `held_out_pgd_accuracy` (fractions), None where nothing was measured.
        """
        self._metrics.put(self._metrics_file.append, epoch, metrics)
        self._metrics.flush(_METRICS_SECONDS)
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
        for tracker in self._trackers:
            tracker.add(epoch, numbers)
        evaluated = metrics.get("held_out_pgd_accuracy") is not None
        if self._progress is None and not evaluated and epoch != self._total_epochs and not self._due():
            return
        self._shown = time.monotonic()
        if self._rows == 0:
            self.message(rows.caption(self._kept_by))
        if self._rows == 0 or (self._progress is not None and self._rows % _SCREEN == 0):
            self.message(rows.head(self._total_epochs))
        self._rows += 1
        self.message(rows.row(epoch, self._total_epochs, metrics, best=best))

    def finish(self, report: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Hands the numbers of the report, and its files that were written, to the services."""
        found = [path for path in files if path.exists()]
        for tracker in self._trackers:
            tracker.finish(self._epoch, _numbers(report, "report/"), found)

    def _due(self) -> bool:
        """Whether it is time to show something again."""
        return time.monotonic() - self._shown >= (self._interval if self._progress is None else _REDRAW_SECONDS)

    def _show(self, where: str, part: float, numbers: str) -> None:
        """What is being done: in the bar, or as a line."""
        if self._progress is not None:
            shown = {"description": where, "completed": part, "total": 1.0, "numbers": numbers}
            self._output.put(self._progress.update, TaskID(0), **shown)
        else:
            self.message(f"{where}  {numbers}")

    def _warn_once(self, text: str) -> None:
        kind = text.partition(" ")[0]
        if kind in self._warned:
            return
        self._warned.add(kind)
        line = f"warning: {' '.join(text.split())}"
        if self._progress is not None and kind != "console:":
            # above the bar, which would be drawn over it
            self.message(line)
        else:
            self._warnings.put(write_line, sys.stderr, line)


def _numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The numbers in nested mappings, by the path to them."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found

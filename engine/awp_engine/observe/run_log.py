"""What a run says while it works: metrics.jsonl, TensorBoard events and progress on the console.

Nothing in here may stop or delay the training: whatever cannot be written is reported once and left out.
"""

from __future__ import annotations

import functools
import json
import math
import os
import queue
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn

from awp_engine.config import Config, to_json
from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.output import silence
from awp_engine.files.text import json_text, printable

METRICS = "metrics.jsonl"
_REDRAW_SECONDS = 0.2
_CLOSE_SECONDS = 10.0
_METRICS_SECONDS = 5.0
_WAITING = 1000

Metrics = Mapping[str, float | int | None]
# counted from 1; more than any run has
_MOST_EPOCHS = 2**31


class _Number(Protocol):
    def __float__(self) -> float: ...


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The epochs in a run's metrics.jsonl, in their order: numbers, and None for what is no finite number.

    A line that a crash cut short, or that is none of an epoch's, is left out; of two of one epoch the later one counts.
    """
    path = run_dir / METRICS
    epochs: dict[int, dict[str, float | int | None]] = {}
    # a named pipe would be waited for
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(epoch := entry.get("epoch")) is int and 0 < epoch <= _MOST_EPOCHS:
            epochs[epoch] = {name: _number(value) for name, value in entry.items()}
    return [epochs[epoch] for epoch in sorted(epochs)]


def _number(value: Any) -> float | int | None:
    """`value` if it is a finite number: JSON has no NaN, and files may hold anything."""
    try:
        return value if type(value) in (int, float) and math.isfinite(value) else None
    except OverflowError:
        return None


def _write_text(file: TextIO, text: str) -> None:
    try:
        handle = file.fileno()
    except OSError:
        print(text, file=file, flush=True)
        return
    # Not through Python's buffer: a write that never returns would keep its lock, and the interpreter from exiting.
    rest = f"{text}\n".encode(errors="replace")
    while rest:
        rest = rest[os.write(handle, rest) :]


class _Lane:
    """Does what may block or fail on a thread of its own, in order; what does not fit into its queue is left out."""

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
                # Whatever a logger raises, the training goes on.
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


class _Events:
    """One TensorBoard event file, written synchronously.

    SummaryWriter hands its bytes to a thread that dies of a full disk with a traceback, and then waits for it for ever.
    """

    def __init__(self, file: BinaryIO, start_epoch: int, config_text: str) -> None:
        # Imported here, on the events' thread: slow, and a missing package is only a warning.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self._records = RecordWriter(file)
        self._write(file_version="brain.Event:2")
        if start_epoch:
            # Readers drop what an earlier file says from this epoch on.
            self._write(step=start_epoch + 1, session_log=SessionLog(status=SessionLog.START))
        self._write(step=start_epoch, summary=text_pb("config", f"```json\n{config_text}\n```"))

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        summaries = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=epoch, summary=self._summary(value=summaries))


class _TensorBoard:
    """Writes events on a thread of its own, so that a slow or broken disk neither delays nor stops the training."""

    def __init__(self, directory: Path, start_epoch: int, config: Config, warn: Callable[[str], None]) -> None:
        self._jobs: queue.SimpleQueue[tuple[int, dict[str, float]] | None] = queue.SimpleQueue()
        self._directory = directory
        self._warn = warn
        self._thread = threading.Thread(
            target=self._work, args=(directory, start_epoch, to_json(config)), name="tensorboard", daemon=True
        )
        self._thread.start()

    def _work(self, directory: Path, start_epoch: int, config_text: str) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns() // 1000:017}.{socket.gethostname()}.{os.getpid()}"
            with (directory / name).open("xb") as file:
                events = _Events(file, start_epoch, config_text)
                while (job := self._jobs.get()) is not None:
                    events.write(*job)
        except Exception as error:
            # Whatever goes wrong with the events, the training goes on.
            self._warn(
                f"TensorBoard events in {directory} stop here, training goes on: {type(error).__name__}: {error}"
            )

    def add(self, epoch: int, values: dict[str, float]) -> None:
        if self._thread.is_alive():
            self._jobs.put((epoch, values))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(timeout=_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn(f"TensorBoard events in {self._directory} are not written in time; the last ones are left out")


class RunLog:
    """Metrics, events and progress of one run; a context manager.

    Epochs count from 1. Where the output is a terminal there is a progress bar, elsewhere one line an interval, and
    always one for the last epoch.

        with RunLog(run_dir, config, config.epochs, config.log_interval, start_epoch=done) as log:
            for epoch in range(done + 1, config.epochs + 1):
                log.begin_epoch(epoch, steps)
                for x, y in batches:
                    ...
                    log.step(loss, lr, len(x))
                log.end_epoch(epoch, {"loss": ..., "held_out_pgd_accuracy": ...})
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        total_epochs: int,
        interval: float,
        *,
        start_epoch: int = 0,
        console: Console | None = None,
    ) -> None:
        """Opens the log; what metrics.jsonl says about epochs after `start_epoch` is dropped, atomically.

        Args:
            run_dir: made if it is missing.
            config: written into the TensorBoard events.
            total_epochs: of the whole run.
            interval: seconds between plain lines.
            start_epoch: epochs done before, by the checkpoint that the run goes on from.
            console: where to show progress; standard output by default.
        """
        self._run_dir, self._total_epochs, self._interval = run_dir, total_epochs, interval
        self._console = console or Console(file=sys.stdout, highlight=False)
        self._warned: set[str] = set()
        self._warnings = _Lane("warnings", lambda text: None)
        self._output = _Lane("console", self._warn_once)
        self._metrics = _Lane("metrics", self._warn_once)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._epoch, self._steps, self._step = start_epoch, 1, 0
        self._start_epoch = start_epoch
        self._images_since_shown = 0
        self._began = self._shown = self._rate_from = time.monotonic()
        self._metrics_file: int | None = None
        self._metrics.put(self._open_metrics, start_epoch)
        self._metrics.flush(_METRICS_SECONDS)
        self._tensorboard = _TensorBoard(run_dir / "tensorboard", start_epoch, config, self._warn_once)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
                refresh_per_second=4,
            )
            self._task = self._progress.add_task("starting", total=None, numbers="")
            self._output.put(self._progress.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the progress bar and waits a few seconds for what is still to be written.

        A standard output or error that cannot be written is then replaced by nothing, so that the program can end.
        """
        if self._progress is not None:
            self._output.put(self._progress.stop)
            self._progress = None
        self._tensorboard.close()
        self._metrics.put(self._close_metrics)
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
            # Not rich's print: a line of a log file is not folded at 80 columns.
            self._output.put(_write_text, self._console.file, text)

    def begin_epoch(self, epoch: int, steps: int, done: int = 0) -> None:
        """Starts epoch `epoch` (from 1) of `steps` steps, or goes on after `done` of them."""
        self._epoch, self._steps, self._step = epoch, steps, done
        self._images_since_shown = 0
        self._rate_from = time.monotonic()

    def step(self, loss: _Number, lr: float, images: int) -> None:
        """Counts one step over `images` images; a tensor `loss` is read, and so waited for, only when it is shown."""
        self._step += 1
        self._images_since_shown += images
        now = time.monotonic()
        terminal = self._progress is not None
        if now - self._shown < (_REDRAW_SECONDS if terminal else self._interval):
            return
        images_per_second = self._images_since_shown / max(now - self._rate_from, 1e-9)
        numbers = f"loss {float(loss):.4f}  lr {lr:.4g}  {images_per_second:,.0f} images/s"
        self._shown = self._rate_from = now
        self._images_since_shown = 0
        where = f"epoch {self._epoch}/{self._total_epochs} step {self._step}/{self._steps}"
        if self._progress is not None:
            done = (self._epoch - 1 - self._start_epoch) * self._steps + self._step
            total = (self._total_epochs - self._start_epoch) * self._steps
            self._output.put(
                self._progress.update,
                self._task,
                description=where,
                completed=done,
                total=total,
                numbers=numbers,
            )
        else:
            self.message(f"{where}  {numbers}  ETA {self._time_left(now)}")

    def _time_left(self, now: float) -> str:
        done = self._epoch - 1 - self._start_epoch + self._step / self._steps
        left = int((now - self._began) / max(done, 1e-9) * (self._total_epochs - self._start_epoch - done))
        return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"

    def end_epoch(self, epoch: int, metrics: Metrics) -> None:
        """Records an epoch; the learning curves use `loss`, `lr`, `train_pgd_accuracy`, `held_out_clean_accuracy` and
        `held_out_pgd_accuracy` (fractions), None where nothing was measured.
        """
        entry = {"epoch": epoch, **{name: _number(value) for name, value in metrics.items()}}
        self._metrics.put(self._append, json_text(entry).encode())
        self._metrics.flush(_METRICS_SECONDS)
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
        self._tensorboard.add(epoch, numbers)
        now = time.monotonic()
        if self._progress is not None or epoch == self._total_epochs or now - self._shown >= self._interval:
            self._shown = now
            shown = "  ".join(f"{name} {_short(name, value)}" for name, value in metrics.items() if value is not None)
            self.message(f"epoch {epoch}/{self._total_epochs}  {shown}")

    def _open_metrics(self, start_epoch: int) -> None:
        self._run_dir.mkdir(parents=True, exist_ok=True)
        path = self._run_dir / METRICS
        if path.is_file():
            kept = [entry for entry in read_metrics(self._run_dir) if entry["epoch"] <= start_epoch]
            atomic_write_text(path, "".join(map(json_text, kept)))
        # O_NONBLOCK: a named pipe would be waited for
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(f"{path}: is not a regular file")
        self._metrics_file = handle

    def _close_metrics(self) -> None:
        if self._metrics_file is not None:
            os.close(self._metrics_file)
            self._metrics_file = None

    def _append(self, line: bytes) -> None:
        if self._metrics_file is None:
            return
        size = os.fstat(self._metrics_file).st_size
        reason = "no space"
        try:
            written = os.write(self._metrics_file, line)
        except OSError as error:
            written, reason = 0, error.strerror
        if written != len(line):
            # No half line: the next epoch's must begin on its own.
            os.ftruncate(self._metrics_file, size)
            raise OSError(f"{self._run_dir / METRICS}: {reason}, {written} of {len(line)} bytes written")

    def _warn_once(self, text: str) -> None:
        kind = text.partition(" ")[0]
        if kind in self._warned:
            return
        self._warned.add(kind)
        line = f"warning: {' '.join(text.split())}"
        if self._progress is not None and kind != "console:":
            # Above the bar, which would be drawn over it.
            self._output.put(self._console.print, line, markup=False, highlight=False)
        else:
            self._warnings.put(_write_text, sys.stderr, line)


def _short(name: str, value: float) -> str:
    if isinstance(value, float):
        return f"{value:.2%}" if name.endswith("accuracy") else f"{value:.4g}"
    return str(value)

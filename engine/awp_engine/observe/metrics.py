"""metrics.jsonl: a line of numbers an epoch."""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.text import json_text

METRICS = "metrics.jsonl"
# counted from 1; more than any run has
_MOST_EPOCHS = 2**31

Metrics = Mapping[str, float | int | None]


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


class MetricsFile:
    """A run's metrics.jsonl, to be added to; every call may block, or raise OSError."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._handle = run_dir / METRICS, -1

    def open(self, start_epoch: int) -> None:
        """Drop what it says about epochs after `start_epoch`, atomically; it and its directory are made if missing."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.is_file():
            kept = [entry for entry in read_metrics(self._path.parent) if entry["epoch"] <= start_epoch]
            atomic_write_text(self._path, "".join(map(json_text, kept)))
        # O_NONBLOCK: a named pipe would be waited for
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(f"{self._path}: is not a regular file")
        self._handle = handle

    def append(self, epoch: int, metrics: Metrics) -> None:
        """Add a whole line, or none; nothing where the file could not be opened."""
        if self._handle < 0:
            return
        line = json_text({"epoch": epoch, **{name: _number(value) for name, value in metrics.items()}}).encode()
        size = os.fstat(self._handle).st_size
        reason = "no space"
        try:
            written = os.write(self._handle, line)
        except OSError as error:
            written, reason = 0, error.strerror
        if written != len(line):
            # no half line: the next epoch's must begin on its own
            os.ftruncate(self._handle, size)
            raise OSError(f"{self._path}: {reason}, {written} of {len(line)} bytes written")

    def close(self) -> None:
        """Nothing can be added any more."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

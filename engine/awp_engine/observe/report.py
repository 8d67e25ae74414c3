"""What a run leaves at its end: report.json, the learning curves and a table."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import platform
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import awp_engine
from awp_engine.config import ConfigError
from awp_engine.files.atomic import atomic_write_text, temporary_beside
from awp_engine.files.text import json_text, printable
from awp_engine.observe.drawing import BLUE, GREEN, GREY, VERMILION, plottable, save, tidy
from awp_engine.observe.terminal import console_of

REPORT = "report.json"
CURVES = "learning_curves.png"
_REQUIRED = ("clean_accuracy", "pgd20_accuracy", "train_pgd_accuracy", "seconds", "epochs", "config_hash")
_PROBE_BYTES = 1 << 16


def versions(*more: str) -> dict[str, str | None]:
    """Versions of Python, of what every result depends on and of `more`; None for a package not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "numpy", *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"awp_engine": awp_engine.__version__}


def source_commit() -> str | None:
    """The git commit of this package's source tree, with "-dirty" where it was changed; None outside a checkout."""
    package = Path(__file__).resolve().parents[1]
    root = package.parent.parent
    # Not any repository above: an environment inside somebody's project is not our source tree.
    if package.parent.name != "engine" or not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def prepare_output(directory: Path) -> None:
    """Makes what `--output` names, and tries whether files can be written there: before hours of work, not after.

    Raises:
        ConfigError: they cannot.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"--output: {directory} is a file; expected a directory, which is made if it is missing")
    probe = temporary_beside(directory / "probe")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        raise ConfigError(f"--output: {directory} cannot be written: {error.strerror}; choose another") from None
    finally:
        # below a file there is nothing to be removed
        with contextlib.suppress(OSError):
            probe.unlink()


def write_report(run_dir: Path, fields: Mapping[str, Any]) -> Path:
    """Writes report.json atomically, with versions and commit added to `fields`.

    Args:
        run_dir: an existing directory.
        fields: at least clean_accuracy, pgd20_accuracy and train_pgd_accuracy (fractions), seconds, epochs and
            config_hash; NaN and infinity become null.

    Raises:
        ValueError: if a field is missing.
        OSError: if the file cannot be written.
    """
    missing = [name for name in _REQUIRED if name not in fields]
    if missing:
        raise ValueError(f"fields: expected {', '.join(_REQUIRED)}; missing {', '.join(missing)}")
    report = {**fields, "versions": versions(), "commit": source_commit()}
    path = run_dir / REPORT
    atomic_write_text(path, json_text(report, indent=2))
    return path


def curve(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Epochs and values of what metrics.jsonl calls `name`; NaN, which leaves a gap, for what cannot be drawn."""
    known = [(m["epoch"], m[name]) for m in metrics if m.get(name) is not None]
    # the log may be anybody's: an accuracy of 1e118 would need a label of 120 digits
    largest = 1.0 if name.endswith("accuracy") else math.inf
    return [epoch for epoch, _ in known], [
        plottable(value) if abs(value) <= largest else math.nan for _, value in known
    ]


def plot_learning_curves(
    run_dir: Path, metrics: Sequence[Mapping[str, Any]], selected_epoch: int | None = None
) -> Path:
    """Draws learning_curves.png: loss, accuracies and learning rate over the epochs.

    Args:
        run_dir: an existing directory.
        metrics: what `metrics.read_metrics` returns.
        selected_epoch: the epoch whose weights were kept, to be marked.

    Raises:
        OSError: if the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(6.4, 7.5))
    # a layout that matplotlib finds takes half of the time
    place = {"height_ratios": (3, 4, 1.5), "left": 0.13, "right": 0.97, "top": 0.98, "bottom": 0.07, "hspace": 0.08}
    loss_axes, accuracy_axes, rate_axes = figure.subplots(3, 1, sharex=True, gridspec_kw=place)
    few = len(metrics) <= 40
    lines = [
        (loss_axes, "loss", "training, attacked", GREY, "-", "o"),
        (accuracy_axes, "held_out_clean_accuracy", "held-out, clean", BLUE, "-", "o"),
        (accuracy_axes, "train_pgd_accuracy", "training, PGD", GREEN, "--", "^"),
        (accuracy_axes, "held_out_pgd_accuracy", "held-out, PGD", VERMILION, "-", "s"),
        (rate_axes, "lr", "", GREY, "-", "o" if len(metrics) == 1 else ""),
    ]
    for axes, name, label, colour, line, marker in lines:
        x, y = curve(metrics, name)
        style = {"color": colour, "linestyle": line, "marker": marker if few else "", "markersize": 4}
        axes.plot(x, y, label=label, drawstyle="steps-post" if name == "lr" else "default", **style)
        tidy(axes)
        if selected_epoch is not None:
            axes.axvline(selected_epoch, color="black", linewidth=1, linestyle=":")
    if selected_epoch is not None:
        accuracy_axes.plot([], [], color="black", linewidth=1, linestyle=":", label=f"selected epoch {selected_epoch}")
    loss_axes.set_ylabel("training loss")
    accuracy_axes.set_ylabel("accuracy")
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    accuracy_axes.legend(frameon=False, loc="best")
    rate_axes.set_ylabel("learning rate")
    if any(value > 0 for value in curve(metrics, "lr")[1]):
        rate_axes.set_yscale("log")
    rate_axes.set_xlabel("epoch")
    rate_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(metrics) == 1:
        rate_axes.set_xlim(metrics[0]["epoch"] - 0.5, metrics[0]["epoch"] + 0.5)
    figure.align_ylabels()
    path = run_dir / CURVES
    save(figure, path)
    return path


def print_table(rows: Sequence[Mapping[str, str]], title: str = "", console: Console | None = None) -> None:
    """Prints rows (column -> text; the first row's columns) as a table on a terminal, as aligned text elsewhere.

    Text is shown as it is: what is not printable by its escapes, and brackets as brackets.
    """
    console = console or console_of(sys.stdout)
    title = printable(title)
    rows = [{printable(column): printable(text) for column, text in row.items()} for row in rows]
    columns = list(rows[0]) if rows else []
    if console.is_terminal:
        # strings would be read as rich's markup
        table = Table(title=Text(title) if title else None)
        for index, column in enumerate(columns):
            table.add_column(Text(column), justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*(Text(row[column]) for column in columns))
        console.print(table)
        return
    print(as_text(rows, title), file=console.file, flush=True)


def as_text(rows: Sequence[Mapping[str, str]], title: str = "") -> str:
    """Rows as `print_table` takes them, as aligned text."""
    title = printable(title)
    rows = [{printable(column): printable(text) for column, text in row.items()} for row in rows]
    columns = list(rows[0]) if rows else []
    widths = [max(len(column), *(len(row[column]) for row in rows)) for column in columns]
    lines = [title] if title else []
    for cells in [columns, *([row[column] for column in columns] for row in rows)]:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def print_text(text: str) -> None:
    """Prints a line: on a terminal broken between words, elsewhere as it is."""
    text = printable(text)
    print(textwrap.fill(text, shutil.get_terminal_size().columns - 1) if sys.stdout.isatty() else text)

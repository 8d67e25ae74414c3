"""Learning curves of several settings over each other: a colour a setting, thin lines for single seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from awp_engine.compare.read import read_run
from awp_engine.compare.table import Setting, compare
from awp_engine.observe.drawing import drawable, legend, line_style, png, save, tidy
from awp_engine.observe.report import CURVES, curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# in metrics.jsonl, and what they are
PANELS = {
    "held_out_pgd_accuracy": "held-out PGD accuracy",
    "train_pgd_accuracy": "training PGD accuracy",
    "loss": "training loss",
    "lr": "learning rate",
}


def _mean(curves: Sequence[tuple[list[int], list[float]]]) -> tuple[list[int], list[float]]:
    """Over the epochs that all have."""
    values = [dict(zip(*pair, strict=True)) for pair in curves]
    epochs = [epoch for epoch in curves[0][0] if all(epoch in known for known in values)]
    return epochs, [fmean(known[epoch] for known in values) for epoch in epochs]


def _draw(axes: Axes, settings: Sequence[Setting], name: str) -> list[tuple[Any, str]]:
    """One panel; its artists with their settings' names, for a legend."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    artists, drawn = [], []
    for index, setting in enumerate(settings):
        curves = [found for run in setting.runs if (found := curve(run.metrics, name))[0]]
        style: dict[str, Any] = line_style(index) | {"drawstyle": "steps-post" if name == "lr" else "default"}
        # many markers hide the line; a single point is nothing but its marker
        many = max((len(epochs) for epochs, _ in curves), default=0) > 12
        if many:
            style["marker"] = ""
        if len(curves) > 1:
            for epochs, values in curves:
                axes.plot(epochs, values, color=style["color"], linewidth=0.6, alpha=0.55, drawstyle=style["drawstyle"])
        # without curves an empty one, for the legend
        line = axes.plot(*(_mean(curves) if curves else ((), ())), linewidth=1.8, **style)[0]
        artists.append((line, setting.label))
        drawn += [value for _, values in curves for value in values if math.isfinite(value)]
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(PANELS[name])
    if name.endswith("accuracy"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if name == "lr" and drawn and min(drawn) > 0:
        axes.set_yscale("log")
    tidy(axes)
    return artists


def panels(settings: Sequence[Setting]) -> list[tuple[str, bytes]]:
    """Names and PNG files of the panels that have something to show, without a legend."""
    from matplotlib.figure import Figure

    found = []
    for name, title in PANELS.items():
        if not any(curve(run.metrics, name)[0] for setting in settings for run in setting.runs):
            continue
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        _draw(figure.subplots(), settings, name)
        found.append((title, png(figure)))
    return found


def draw(settings: Sequence[Setting], title: str, path: Path) -> None:
    """Draws all panels, with a legend, into one PNG file.

    Raises:
        OSError: if it cannot be written.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(settings))
    rows = math.ceil(len(settings) / columns)
    figure = Figure(figsize=(10, 7.2 + 0.24 * rows), layout="constrained")
    series: list[tuple[Any, str]] = []
    for axes, name in zip(figure.subplots(2, 2, sharex=True).ravel(), PANELS, strict=True):
        series = _draw(axes, settings, name)
        axes.set_xlabel("epoch" if name in ("loss", "lr") else "")
    legend(figure, series, loc="outside lower center", ncols=columns)
    figure.suptitle(drawable(title, 120), fontsize="medium", parse_math=False)
    save(figure, path)


def draw_runs(runs: Sequence[Path], directory: Path) -> None:
    """Draws learning_curves.png of several runs that were measured alike into `directory`.

    Raises:
        ConfigError: one of them is no run.
        OSError: if it cannot be written.
    """
    first, *_ = compare([read_run(run) for run in runs])
    draw(first.settings, first.title, directory / CURVES)

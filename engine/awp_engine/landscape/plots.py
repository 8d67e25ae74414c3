"""The figures: curves, surfaces and flatness, several runs on one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from awp_engine.observe.drawing import drawable, legend, line_style, plottable, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# a wider range than this is drawn on a logarithmic axis
_WIDE = 12


def _plottable(values: Any) -> Any:
    """Numbers, or lists of them, with gaps for what is not finite."""
    if isinstance(values, list):
        return [_plottable(value) for value in values]
    return values if values is None else plottable(values)


def _loss_axis(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, ScalarFormatter

    values = [value for value in values if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > _WIDE * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_locator(LogLocator(subs=()))


_AXIS = {
    "random": "distance along a random direction,\nas a fraction of each filter's norm",
    "adversarial": "distance along the gradient of the robust loss,\nas a fraction of each layer's norm",
}


def plot_curves(runs: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draws the robust loss along the directions: one panel a kind, one line a run, with 95 % bands.

    Args:
        runs: each with `label` and `curves`: kind to `amounts`, `mean`, `low`, `high` [points] and `by_direction`
            [directions, points].
        title: one line on images and attack.
    """
    from matplotlib.figure import Figure

    kinds = list(runs[0]["curves"])
    figure = Figure(figsize=(5.6 * len(kinds), 4.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        drawn, series = [], []
        for index, run in enumerate(runs):
            curve = {name: _plottable(values) for name, values in run["curves"][kind].items()}
            style = line_style(index)
            if len(curve["by_direction"]) > 1:
                for single in curve["by_direction"]:
                    axes.plot(curve["amounts"], single, color=style["color"], linewidth=0.5, alpha=0.4)
                    drawn += single
            axes.fill_between(
                curve["amounts"], curve["low"], curve["high"], color=style["color"], alpha=0.18, linewidth=0
            )
            series.append((*axes.plot(curve["amounts"], curve["mean"], **style), run["label"]))
            drawn += [*curve["low"], *curve["high"]]
        axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel(_AXIS[kind])
        _loss_axis(axes, drawn)
        tidy(axes)
        if axes is panels[0]:
            legend(axes, series)
    panels[0].set_ylabel("robust loss (cross-entropy, nats)")
    figure.suptitle(f"{title}; bands: 95 % confidence", fontsize="medium")
    return figure


def plot_surfaces(runs: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draws the robust loss over a plane, one panel a run, with common colours and level lines.

    Args:
        runs: each with `label` and `surface`: `kinds` [2], `first` and `second` amounts, `mean` [first, second].
        title: one line on images and attack.

    Raises:
        ValueError: there is nothing to draw.
    """
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tables = [_plottable(run["surface"]["mean"]) for run in runs]
    every = [value for table in tables for row in table for value in row if math.isfinite(value)]
    if not every:
        raise ValueError("no point has a finite loss")
    lowest, highest = min(every), max(every)
    if lowest > 0 and highest > _WIDE * lowest:
        # a little wider, as rounding must leave no point outside
        lowest, highest, steps = lowest * 0.999, highest * 1.001, 16
        levels = [lowest * (highest / lowest) ** (i / steps) for i in range(steps + 1)]
        norm = LogNorm(lowest, highest)
    else:
        # a flat surface still needs rising levels
        levels = [float(level) for level in MaxNLocator(16).tick_values(lowest, max(highest, lowest + 1e-6))]
        norm = Normalize(levels[0], levels[-1])
    columns = min(len(runs), 3)
    lines = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(4.6 * columns + 1.2, 4.4 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    filled = None
    for axes, run, means in zip(panels, runs, tables, strict=False):
        surface = run["surface"]
        # rows of the table belong to the first, horizontal, direction
        table = [list(column) for column in zip(*means, strict=True)]
        filled = axes.contourf(surface["first"], surface["second"], table, levels=levels, norm=norm, cmap="cividis")
        drawn = axes.contour(
            surface["first"], surface["second"], table, levels=levels[2::3], colors="white", linewidths=0.7
        )
        axes.clabel(drawn, fmt="%.3g", fontsize=7)
        axes.plot(0, 0, marker="+", color="white", markersize=11, markeredgewidth=2)
        axes.set_title(drawable(run["label"]), fontsize="medium", parse_math=False)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        first, second = surface["kinds"]
        axes.set_xlabel(_AXIS[first])
        axes.set_ylabel(_AXIS[second].replace("a random", "another random") if first == second else _AXIS[second])
    for axes in panels[len(runs) :]:
        axes.set_visible(False)
    assert filled is not None
    bar = figure.colorbar(filled, ax=list(panels), format="%.3g", ticks=levels[::2])
    bar.set_label("robust loss (cross-entropy, nats)")
    figure.suptitle(title, fontsize="medium")
    return figure


def plot_flatness(runs: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draws average-case and worst-case flatness over xi, one series a run, with 95 % intervals.

    Args:
        runs: each with `label`, `average` and `worst`: lists of `xi`, `value`, `low`, `high`.
        title: one line on images and attack.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    kinds = [kind for kind in ("average", "worst") if runs[0][kind]]
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        radii = [entry["xi"] for entry in runs[0][kind]]
        series = []
        for index, run in enumerate(runs):
            # beside one another, as the intervals would hide each other
            places = [i + 0.09 * (index - (len(runs) - 1) / 2) for i in range(len(radii))]
            values, low, high = (_plottable([entry[name] for entry in run[kind]]) for name in ("value", "low", "high"))
            errors = [
                [max(0.0, value - end) for value, end in zip(values, low, strict=True)],
                [max(0.0, end - value) for value, end in zip(values, high, strict=True)],
            ]
            style = line_style(index) | {"markersize": 6}
            if len(radii) == 1:
                style["linestyle"] = "none"
            series.append((axes.errorbar(places, values, yerr=errors, capsize=4, **style), run["label"]))
        axes.set_xticks(range(len(radii)), [f"{radius:g}" for radius in radii])
        axes.set_xlim(-0.5, len(radii) - 0.5)
        axes.axhline(0, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel("xi: radius of the ball, as a fraction of each layer's norm")
        axes.set_title(f"{kind}-case flatness (lower is flatter)", fontsize="medium")
        tidy(axes)
        if axes is panels[0]:
            legend(axes, series)
    panels[0].set_ylabel("rise of the robust loss (nats)")
    figure.suptitle(f"{title}; bars: 95 % confidence", fontsize="medium")
    return figure

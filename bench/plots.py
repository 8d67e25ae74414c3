"""Results as plots."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.ops.suite import PREFERRED
from bench.ops.weight_lists import is_size
from bench.tables import fastest_format, machine_line, parts_of, ratio_text, step_title

Result = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers tell apart
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_PART_COLOURS = {
    "data": "#F0E442",
    "attack": "#0072B2",
    "ascent": "#E69F00",
    "descent": "#009E73",
    "update": "#D55E00",
    "log": "#CC79A7",
    "other": "#BBBBBB",
}
_OWN, _DEFINITION, _PUBLIC = "#D55E00", "#999999", "#000000"
_MARKERS = "osD^vP*X"


def _footer(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=7.5, color="#444444", x=0.01, ha="left")


def plot_step(result: Result, path: Path) -> None:
    """A bar an arm, stacked of the medians of its parts; a whisker for the quartiles of the whole step."""
    arms, parts = result["arms"], parts_of(result)
    slowest = max(arm["seconds"]["q3"] for arm in arms)
    scale, unit = (1e3, "ms") if slowest < 1 else (1.0, "s")
    figure = Figure(figsize=(10, 1.9 + 0.62 * len(arms)), layout="constrained")
    axes: Axes = figure.subplots()
    handles: dict[str, Any] = {}
    for place, arm in enumerate(reversed(arms)):
        left = 0.0
        medians = {part: arm["components"][part]["median"] * scale for part in parts if part in arm["components"]}
        # a step whose parts are not known is one bar
        for part, width in (medians or {"whole step": arm["seconds"]["median"] * scale}).items():
            colour = _PART_COLOURS.get(part, "#BBBBBB")
            (bar,) = axes.barh(place, width, left=left, color=colour, height=0.62, edgecolor="white", linewidth=0.5)
            handles.setdefault(part, bar)
            if width > 0.06 * slowest * scale:
                ink = "white" if part == "attack" else "black"
                axes.text(left + width / 2, place, f"{width:.3g}", ha="center", va="center", fontsize=8, color=ink)
            left += width
        seconds = {key: arm["seconds"][key] * scale for key in ("median", "q1", "q3")}
        whisker = [[seconds["median"] - seconds["q1"]], [seconds["q3"] - seconds["median"]]]
        axes.errorbar(seconds["median"], place + 0.36, xerr=whisker, color="black", capsize=3, linewidth=1, marker="|")
        ratio, form = result["ratios"].get(arm["name"]), fastest_format(result)
        compared = f"{ratio_text(ratio)} times the engine's" if ratio else "the engine"
        text = f"{seconds['median']:.3g} {unit}, {compared}\n{arm['tflops']:.3g} TFLOP/s of necessary work, "
        text += f"{arm['share_of_matmul'][form]:.0%} of a {form} product"
        axes.text(max(left, seconds["q3"]) + 0.012 * slowest * scale, place, text, va="center", fontsize=8)
    axes.set_yticks(range(len(arms)), [arm["name"] for arm in reversed(arms)])
    axes.set_xlim(0, slowest * scale * 1.6)
    axes.set_xlabel(f"time of one training step [{unit}]: medians of its parts; whisker: quartiles of the step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(step_title(result), fontsize=11, loc="left")
    ordered = [part for part in (*parts, "whole step") if part in handles]
    figure.legend(
        [handles[part] for part in ordered],
        ordered,
        loc="outside upper right",
        ncols=len(ordered),
        frameon=False,
        fontsize=8,
    )
    n, rounds = arms[0]["seconds"]["n"], result["settings"]["repeats"]
    _footer(figure, f"n = {n} steps an arm in {rounds} rounds, arms taking turns; {machine_line(result)}")
    figure.savefig(path, dpi=140)


def _style(name: str, others: list[str]) -> dict[str, Any]:
    if name == "reference":
        return {"color": _DEFINITION, "linestyle": "--", "marker": ".", "linewidth": 1.2}
    if name in PREFERRED:
        return {"color": _OWN, "linewidth": 2.4, "marker": _MARKERS[PREFERRED.index(name)], "markersize": 5}
    if name == "public":
        return {"color": _PUBLIC, "linewidth": 1.2, "marker": "x", "markersize": 5}
    place = others.index(name)
    colour = [c for c in _COLOURS if c not in (_OWN, _DEFINITION)][place % 6]
    return {"color": colour, "linewidth": 1.2, "marker": _MARKERS[place % 8], "markersize": 4}


def _label(name: str) -> str:
    if name == "reference":
        return "reference (awp_kernels, plain PyTorch)"
    return f"{name} (awp_kernels)" if name in PREFERRED else name


def plot_sizes(result: Result, path: Path, *, share: bool) -> bool:
    """A panel an operation over the number of elements: the time, or the share of a copy's bandwidth.

    Returns:
        Whether there was anything to draw.
    """
    rows = [row for row in result["rows"] if is_size(row["inputs"])]
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    if not operations:
        return False
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    others = sorted(name for name in names if name not in (*PREFERRED, "public"))
    columns = min(3, len(operations))
    lines = -(-len(operations) // columns)
    figure = Figure(figsize=(4.1 * columns, 2.9 * lines + 1.2), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=share)
    handles: dict[str, Any] = {}
    for axes, operation in zip(panels.flat, operations, strict=False):
        for name in names:
            chosen = [row for row in rows if (row["operation"], row["implementation"]) == (operation, name)]
            if not chosen:
                continue
            chosen.sort(key=lambda row: float(row["inputs"]))
            x = [float(row["inputs"]) for row in chosen]
            y = [row["share_of_copy"] * 100 if share else row["median_ms"] for row in chosen]
            (line,) = axes.plot(x, y, **_style(name, others))
            handles.setdefault(name, line)
            if not share and all("quartiles_ms" in row for row in chosen):
                low, high = zip(*(row["quartiles_ms"] for row in chosen), strict=True)
                axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_title(operation, fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if share:
            axes.axhline(100, color="#444444", linewidth=0.8, linestyle=":")
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=8, labelbottom=True)
        axes.set_xlabel("elements", fontsize=8)
    for axes in panels.flat[len(operations) :]:
        axes.remove()
    on_device = result["machine"]["device"] == "cuda"
    if share:
        heading = f"share of a copy's bandwidth ({result_copy(result)}) in %, every input read once and every output "
        heading += "written once" + ("; time on the device alone" if on_device else "")
    else:
        heading = "time in ms until the result is there: median, shaded between the quartiles"
        heading += "; launches included" if on_device else ""
    n = _numbers(sorted({row["rounds"] for row in rows}))
    below = f"fp32, in 32 tensors; n = {n} calls a point, cold caches; {machine_line(result)}"
    figure.suptitle(f"{heading}\n{below}", fontsize=8.5, x=0.01, ha="left")
    ordered = sorted(handles, key=lambda name: (name not in PREFERRED, name))
    figure.legend(
        [handles[name] for name in ordered],
        [_label(name) for name in ordered],
        loc="outside lower center",
        ncols=min(5, len(ordered)),
        frameon=False,
        fontsize=8,
    )
    figure.savefig(path, dpi=130)
    return True


def result_copy(result: Result) -> str:
    """The yardstick."""
    return f"{result['copy_gb_per_s']:.3g} GB/s" if "copy_gb_per_s" in result else "measured beside each call"


def _numbers(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def plot_models(result: Result, path: Path) -> bool:
    """Bars of times, one panel an operation on the tensors of a model or on a batch.

    Returns:
        Whether there was anything to draw.
    """
    rows = [row for row in result["rows"] if not is_size(row["inputs"])]
    groups = list(dict.fromkeys((row["operation"], row["inputs"]) for row in rows))
    if not groups:
        return False
    lines = -(-len(groups) // 2)
    figure = Figure(figsize=(11, 2.3 * lines + 0.8), layout="constrained")
    panels = figure.subplots(lines, 2, squeeze=False)
    for axes, group in zip(panels.flat, groups, strict=False):
        chosen = [row for row in rows if (row["operation"], row["inputs"]) == group][::-1]
        # where the device's own time is known, launches do not blur the comparison
        key = "device_ms" if "device_ms" in chosen[0] else "median_ms"
        values = [row[key] for row in chosen]
        own = next((name for name in PREFERRED if any(row["implementation"] == name for row in chosen)), None)
        colours = [_OWN if row["implementation"] == own else "#0072B2" for row in chosen]
        bars = axes.barh([row["implementation"] for row in chosen], values, color=colours)
        if key == "median_ms" and all("quartiles_ms" in row for row in chosen):
            for place, row in enumerate(chosen):
                axes.plot(row["quartiles_ms"], [place, place], color="black", linewidth=1.1)
        ratio = "device_ratio" if key == "device_ms" else "ratio"
        texts = [f"{row[key]:.3g}" + (f"  ({row[ratio]:.2f}x)" if ratio in row else "") for row in chosen]
        axes.bar_label(bars, texts, padding=14, fontsize=8)
        axes.margins(x=0.3)
        axes.set_title(
            f"{group[0]}, {group[1]} [{'ms on the device' if key == 'device_ms' else 'ms'}]", fontsize=9, loc="left"
        )
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(groups) :]:
        axes.remove()
    figure.suptitle(
        "medians; lines: quartiles; (ratio to this package's choice, inside a pass)", fontsize=10, x=0.01, ha="left"
    )
    n = sorted({row["rounds"] for row in rows})
    _footer(figure, f"n = {_numbers(n)} calls a bar, cold caches; {machine_line(result)}")
    figure.savefig(path, dpi=130)
    return True

"""The report's figures, as PNG bytes."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from awp_engine.evaluation.gates import GateReport
from awp_engine.evaluation.results import Pictures
from awp_engine.models.answers import NO_CLASS
from awp_engine.observe.drawing import drawable
from awp_engine.observe.metrics import read_metrics
from awp_engine.observe.report import CURVES, plot_learning_curves

# Okabe and Ito's colours, which colour-blind readers tell apart
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#666666"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # without the version of matplotlib in it, the same picture is the same bytes
    figure.savefig(buffer, dpi=130, format="png", metadata={"Software": None})
    return buffer.getvalue()


def learning_curves(run_dir: Path, selected_epoch: int | None = None) -> bytes | None:
    """The run's learning curves, from its metrics.jsonl; None where there are none."""
    metrics = read_metrics(run_dir)
    if not metrics:
        return None
    with tempfile.TemporaryDirectory() as directory:
        plot_learning_curves(Path(directory), metrics, selected_epoch)
        return (Path(directory) / CURVES).read_bytes()


def _accuracy_axes(figure: Figure) -> Axes:
    axes = figure.subplots()
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _tick_values(values: Sequence[Any], labels: Sequence[str], axes: Axes) -> None:
    axes.set_xticks(list(values), labels=list(labels))
    axes.minorticks_off()


def epsilon_curve(gates: GateReport, norm: str) -> bytes:
    """Accuracy against the radius of the ball."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = _accuracy_axes(figure)
    radii = [float(radius) for radius, _ in gates.epsilon_curve]
    right = [count / gates.images for _, count in gates.epsilon_curve]
    # even distances: from a grey level to the whole range is too much for a linear scale
    places = range(len(radii))
    axes.plot(places, right, color=_BLUE, marker="o", markersize=5)
    axes.axvline(
        [radius for radius, _ in gates.epsilon_curve].index(gates.epsilon), color=_GREY, linewidth=1, linestyle=":"
    )
    for place, value in zip(places, right, strict=True):
        axes.annotate(f"{value:.0%}", (place, value), textcoords="offset points", xytext=(6, 5), fontsize=8)
    _tick_values(places, [f"{radius:.3g}" for radius in radii], axes)
    axes.set_xlabel(f"epsilon ({norm}); dotted: the evaluation's")
    return _png(figure)


def steps_curve(gates: GateReport) -> bytes:
    """Accuracy against the number of PGD's steps."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = _accuracy_axes(figure)
    steps = [steps for steps, _ in gates.steps_curve]
    right = [count / gates.images for _, count in gates.steps_curve]
    axes.set_xscale("log")
    axes.plot(steps, right, color=_VERMILION, marker="s", markersize=5)
    for place, value in zip(steps, right, strict=True):
        axes.annotate(f"{value:.1%}", (place, value), textcoords="offset points", xytext=(6, 5), fontsize=8)
    _tick_values(steps, [str(number) for number in steps], axes)
    axes.set_xlabel("steps of PGD")
    return _png(figure)


def _image(axes: Axes, image: Tensor) -> None:
    values = image.clamp(0, 1).permute(1, 2, 0).numpy()
    grey = values.shape[2] == 1
    axes.imshow(values[..., 0] if grey else values, cmap="gray" if grey else None, vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])


def picture_rows(pictures: Pictures, class_names: Sequence[str]) -> bytes:
    """Clean image, attacked image and their difference, with what was predicted.

    The difference is shown on grey, stretched so that the largest change of the image is black or white.
    """
    count = len(pictures.labels)
    figure = Figure(figsize=(1.5 * count + 0.4, 5.6), layout="constrained")
    grid = figure.subplots(3, count, squeeze=False)
    for column in range(count):
        difference = pictures.attacked[column] - pictures.clean[column]
        largest = float(difference.abs().max())
        stretched = 0.5 + difference * (0.5 / largest if largest else 0.0)
        for row, image in enumerate((pictures.clean[column], pictures.attacked[column], stretched)):
            _image(grid[row, column], image)
        label = pictures.labels[column]
        for row, predicted in ((0, pictures.clean_predictions[column]), (1, pictures.predictions[column])):
            grid[row, column].set_title(
                "no answer" if predicted == NO_CLASS else drawable(class_names[predicted], 14),
                fontsize=9,
                color="black" if predicted == label else _VERMILION,
                parse_math=False,
            )
        grid[2, column].set_title(f"largest {largest:.3g}", fontsize=8, color=_GREY)
    for row, name in enumerate(("clean", "attacked", "difference")):
        grid[row, 0].set_ylabel(name)
    return _png(figure)

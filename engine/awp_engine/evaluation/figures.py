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
from awp_engine.observe.drawing import BLUE, GREY, VERMILION, drawable, tidy
from awp_engine.observe.metrics import read_metrics
from awp_engine.observe.report import plot_learning_curves


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # without the version of matplotlib in it, the same picture is the same bytes
    figure.savefig(buffer, dpi=130, format="png", metadata={"Software": None})
    return buffer.getvalue()


def learning_curves(run_dir: Path) -> bytes | None:
    """The run's learning curves, from its metrics.jsonl; None where there are none."""
    metrics = read_metrics(run_dir)
    if not metrics:
        return None
    with tempfile.TemporaryDirectory() as directory:
        return plot_learning_curves(Path(directory), metrics).read_bytes()


def _accuracy(
    places: Sequence[int], right: Sequence[int], images: int, digits: int, **style: Any
) -> tuple[Figure, Axes]:
    """A curve of `right` of `images`, each point with its percentage."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("accuracy")
    tidy(axes)
    values = [count / images for count in right]
    axes.plot(places, values, markersize=5, **style)
    for place, value in zip(places, values, strict=True):
        axes.annotate(f"{value:.{digits}%}", (place, value), textcoords="offset points", xytext=(6, 5), fontsize=8)
    return figure, axes


def _name_ticks(axes: Axes, places: Sequence[int], names: Sequence[str]) -> None:
    axes.set_xticks(list(places), labels=list(names))
    axes.minorticks_off()


def epsilon_curve(gates: GateReport, norm: str) -> bytes:
    """Accuracy against the radius of the ball."""
    radii, right = zip(*gates.epsilon_curve, strict=True)
    # even distances: from a grey level to the whole range is too much for a linear scale
    places = range(len(radii))
    figure, axes = _accuracy(places, right, gates.images, 0, color=BLUE, marker="o")
    axes.axvline(radii.index(gates.epsilon), color=GREY, linewidth=1, linestyle=":")
    _name_ticks(axes, places, [f"{float(radius):.3g}" for radius in radii])
    axes.set_xlabel(f"epsilon ({norm}); dotted: the evaluation's")
    return _png(figure)


def steps_curve(gates: GateReport) -> bytes:
    """Accuracy against the number of PGD's steps."""
    steps, right = zip(*gates.steps_curve, strict=True)
    figure, axes = _accuracy(steps, right, gates.images, 1, color=VERMILION, marker="s")
    axes.set_xscale("log")
    _name_ticks(axes, steps, [str(number) for number in steps])
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
                color="black" if predicted == label else VERMILION,
                parse_math=False,
            )
        grid[2, column].set_title(f"largest {largest:.3g}", fontsize=8, color=GREY)
    for row, name in enumerate(("clean", "attacked", "difference")):
        grid[row, 0].set_ylabel(name)
    return _png(figure)

"""The report's figures, as PNG bytes."""

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image
from torch import Tensor

from awp_engine.evaluation.gates.run import GateReport
from awp_engine.evaluation.reports.results import Pictures
from awp_engine.files.text import printable, shortened
from awp_engine.models.answers import NO_CLASS
from awp_engine.observe.drawing import BLUE, GREY, VERMILION, png, tidy
from awp_engine.observe.metrics import read_metrics
from awp_engine.observe.report import plot_learning_curves

# pixels a side; they are shown at about half of it
_LARGEST = 160


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
    return png(figure)


def steps_curve(gates: GateReport) -> bytes:
    """Accuracy against the number of PGD's steps."""
    steps, right = zip(*gates.steps_curve, strict=True)
    figure, axes = _accuracy(steps, right, gates.images, 1, color=VERMILION, marker="s")
    axes.set_xscale("log")
    _name_ticks(axes, steps, [str(number) for number in steps])
    axes.set_xlabel("steps of PGD")
    return png(figure)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image, clean and attacked, and their difference, as PNG files; `largest` is that of the difference."""

    label: str
    clean: bytes
    attacked: bytes
    difference: bytes
    clean_answer: str
    attacked_answer: str
    largest: float


def _image(values: Tensor) -> bytes:
    """PNG of fp32 [C, H, W], at most `_LARGEST` pixels a side."""
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def picture_cards(pictures: Pictures, class_names: Sequence[str]) -> list[Picture]:
    """Every image with what was predicted.

    The difference is shown on grey, stretched so that the largest change of the image is black or white.
    """
    names = [shortened(printable(name), 40) for name in class_names]

    def answer(predicted: int) -> str:
        return "no answer" if predicted == NO_CLASS else names[predicted]

    cards = []
    for number, label in enumerate(pictures.labels):
        difference = pictures.attacked[number] - pictures.clean[number]
        largest = float(difference.abs().max())
        cards.append(
            Picture(
                label=names[label],
                clean=_image(pictures.clean[number]),
                attacked=_image(pictures.attacked[number]),
                difference=_image(0.5 + difference * (0.5 / largest if largest else 0.0)),
                clean_answer=answer(pictures.clean_predictions[number]),
                attacked_answer=answer(pictures.predictions[number]),
                largest=largest,
            )
        )
    return cards

"""The audit's page: what each model leans on, with pictures of the concepts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from awp_engine.audit.concepts.images import Concept
from awp_engine.audit.concepts.run import ENOUGH, verdict
from awp_engine.audit.concepts.sensitivity import LEVEL
from awp_engine.evaluation.accuracy import evenly
from awp_engine.evaluation.reports.files import Reported
from awp_engine.files.text import shortened
from awp_engine.observe.drawing import attempt, drawable, legend, line_style, png, tidy
from awp_engine.observe.page import document, escaped, facts, figure, table

_SHOWN = 8
_READ = (
    "Each test adds a step along the concept's direction to the layer's output, for each image of the class. 'Raised' "
    "is the part of these images whose probability of the class does not fall. 'For it': more than chance, "
    f"p < {LEVEL} after correction, and the concept makes the class more probable; 'against it': less probable. "
    f"'Unclear': the layer tells less than {ENOUGH:.0%} of held-out concept images from others, so the direction may "
    "not be that of the concept. 'No': shuffled labels do as much."
)


def rows_of(tests: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The tests as a table's rows."""
    several = len({test["model"] for test in tests}) > 1
    swapped = any(test["swaps"] for test in tests)
    rows = []
    for test in tests:
        row = {"model": shortened(test["model"], 30)} if several else {}
        row |= {name: test[name] for name in ("class", "concept", "layer")}
        row |= {"held-out": f"{test['held_out_accuracy']:.0%}", "images": str(test["images"])}
        row |= {"raised": f"{test['raised']:.0%}"}
        row |= {"statistic": f"{test['statistic']:.3f}", "p": f"{test['p_corrected']:.3f}"}
        if swapped:
            tau = (test["swaps"] or {}).get("tau")
            row["tau"] = "-" if tau is None else f"{tau:+.2f}"
        rows.append(row | {"leans": verdict(test)})
    return rows


def plot(tests: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: of each concept, what part of the images a step raises, by layer and model; full markers are p < .05."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    concepts = list(dict.fromkeys(test["concept"] for test in tests))
    layers = list(dict.fromkeys(test["layer"] for test in tests))
    models = list(dict.fromkeys(test["model"] for test in tests))
    columns = min(3, len(concepts))
    rows = -(-len(concepts) // columns)
    drawn = Figure(figsize=(3.4 * columns + 0.6, 2.7 * rows + 0.5), layout="constrained")
    grid = drawn.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    lines = []
    for place, (axes, concept) in enumerate(zip(grid, concepts, strict=False)):
        lines = []
        for index, model in enumerate(models):
            own = {test["layer"]: test for test in tests if test["concept"] == concept and test["model"] == model}
            style = line_style(index) | {"markersize": 7, "marker": "o"}
            # beside each other, where they would hide each other
            x = np.arange(len(layers)) + 0.12 * (index - (len(models) - 1) / 2)
            y = [own[layer]["raised"] for layer in layers]
            lines.append(axes.plot(x, y, **style, markerfacecolor="white")[0])
            sure = [number for number, layer in enumerate(layers) if verdict(own[layer]) not in ("no", "unclear")]
            axes.plot(x[sure], [y[number] for number in sure], "o", color=style["color"], markersize=7)
        axes.axhline(0.5, color="black", linewidth=1, linestyle=":")
        axes.set_title(drawable(concept), fontsize=10, parse_math=False)
        axes.set_ylabel("" if place % columns else "images that are raised")
        axes.set_xticks(range(len(layers)), [drawable(layer, 16) for layer in layers], rotation=30, parse_math=False)
        axes.set_ylim(-0.05, 1.05)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        tidy(axes)
    for axes in grid[len(concepts) :]:
        axes.set_visible(False)
    legend(
        drawn, [(line, model) for line, model in zip(lines, models, strict=True)], loc="outside upper center", ncols=3
    )
    return png(drawn)


def sheet(concept: Concept) -> bytes:
    """A PNG: some of the concept's images, and of the others."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(_SHOWN * 0.9, 2.1), layout="constrained")
    grid = drawn.subplots(2, _SHOWN)
    for line, images in zip(grid, (concept.images, concept.others), strict=True):
        for axes, image in zip(line, evenly(images, _SHOWN).cpu(), strict=True):
            axes.imshow(image.permute(1, 2, 0).expand(-1, -1, 3).numpy(), vmin=0, vmax=1, interpolation="nearest")
            axes.set_axis_off()
    return png(drawn)


def render(result: Reported, concepts: Sequence[Concept], say: Callable[[str], object]) -> str:
    """The page's text; a picture that cannot be drawn is left out, after a line that says why.

    Args:
        result: of the audit.
        concepts: those of the first model.
        say: is told of pictures that cannot be drawn.
    """
    tests, receipt = result.report["tests"], result.report["receipt"]
    parts = [f"<p>{escaped(_READ)}</p>", table(rows_of(tests), result.title, colours={"no": "soft"})]
    for name in dict.fromkeys(test["class"] for test in tests):
        own = [test for test in tests if test["class"] == name]
        picture = attempt("audit-concepts.html", lambda own=own: plot(own), say)
        parts.append(f"<h2>Class {escaped(name)}</h2>")
        if picture is not None:
            caption = "images whose probability of the class a step does not lower; full markers: the class leans on it"
            parts.append(figure(picture, caption))
    parts.append("<h2>Concepts</h2>")
    for concept in concepts:
        picture = attempt("audit-concepts.html", lambda concept=concept: sheet(concept), say)
        caption = f"{concept.name} ({concept.source}): {len(concept.images)} images above, {len(concept.others)} others"
        parts.append(f"<h3>{escaped(concept.name)}</h3>")
        parts.append(f"<p>{escaped(caption)}</p>" if picture is None else figure(picture, caption))
    parts.append("<h2>Receipt</h2>")
    parts.append(facts((name, str(value)) for name, value in receipt["settings"].items()))
    for model in receipt["models"]:
        told = {"weights": model["checkpoint"]["sha256"], "images": model["data"]["sha256_of_these_images"]}
        told |= {"device": model["device"], "date": model["date"]}
        parts += [f"<h3>{escaped(model['label'])}</h3>", facts(told.items())]
    return document("Concepts that a decision leans on", parts)

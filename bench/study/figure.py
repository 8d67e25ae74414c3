"""README's figure: what AWP does to robust overfitting, from the committed results of the study.

python -m bench.study.figure OUT.png
"""

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

RESULTS = Path(__file__).parents[1] / "results" / "study-2026-11-23.json"
# Okabe and Ito's colours, which colour-blind readers tell apart
METHODS = {"at": ("AT", "#666666"), "at-awp": ("AT-AWP", "#D55E00")}


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy under PGD over the epochs, mean of the seeds; AutoAttack accuracy of the last weights of each seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(5, 2))
    for place, (method, (name, colour)) in enumerate(METHODS.items()):
        for column, style, images in ((1, "--", "training images"), (2, "-", "new images")):
            epochs = [row[0] for row in runs[method][0]["curve"] if row[column] is not None]
            values = [mean(run["curve"][epoch - 1][column] for run in runs[method]) for epoch in epochs]
            curves.plot(epochs, values, style, color=colour, label=f"{name}, {images}")
        autoattack = [run["evaluation"]["autoattack"] for run in runs[method]]
        bars.bar(place, mean(autoattack), 0.6, color=colour)
        bars.plot([place] * len(autoattack), autoattack, "o", color="white", markeredgecolor="black")
        middle = (place, mean(autoattack) / 2)
        bars.annotate(f"mean\n{mean(autoattack):.1%}", middle, ha="center", va="center", color="white")
    curves.set(xlabel="epoch", ylabel="accuracy", title="under PGD, mean of two seeds")
    curves.legend(frameon=False)
    bars.set(title="under AutoAttack", ylim=(0, 0.16))
    bars.set_xticks(range(len(METHODS)), [name for name, _ in METHODS.values()])
    for axes in (curves, bars):
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    draw(json.loads(RESULTS.read_text())["runs"], Path(sys.argv[1]))

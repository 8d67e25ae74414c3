"""One page of the weights' audit, of one model or of several side by side."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from awp_engine.audit.weights.budget import RULES
from awp_engine.audit.weights.words import Named, budget_rows, conclusions, defence_rows, trial_rows
from awp_engine.observe.drawing import BLUE, VERMILION, attempt, legend, png, tidy
from awp_engine.observe.page import document, escaped, facts, figure, listed, table


def page(models: Named, pictures: tuple[Tensor, Tensor] | None, say: Callable[[str], object]) -> str:
    """The page.

    Args:
        models: at least one, of the same settings.
        pictures: some test images [N, C, H, W] in [0, 1], and the same with the mark; None: none.
        say: is told of pictures that could not be drawn.
    """
    receipt = models[0][1]["receipt"]
    settings, data = receipt["settings"], receipt["data"]
    about = {
        "data": f"{data['name']}, {data['images']:,} images of the test split",
        "edits": f"{receipt['edit_images']['images']:,} training images, {settings['recipe']['epochs']} epochs of Adam",
        "trigger": f"{settings['trigger']['kind']}, to class {settings['target']}",
        "batch normalisation": settings["recipe"]["batch_norm"],
        "seed": str(receipt["seed"]),
        "date": receipt["date"].replace("T", " "),
    }
    sections = [
        f"<p>{escaped(models[0][1]['means'][:1].upper() + models[0][1]['means'][1:])}.</p>",
        facts(about.items()),
        "<h2>Smallest budgets</h2>",
        table(budget_rows(models)),
        listed([f"{kind}: {rule}" for kind, rule in RULES.items() if kind in settings["kinds"]]),
    ]
    if pictures is not None and (drawn := attempt("the trigger", lambda: _images(*pictures), say)) is not None:
        sections.append(figure(drawn, "Test images, and the same with the trigger."))
    for name, report in models:
        sections += [f"<h2>{escaped(name)}</h2>", listed(conclusions(report))]
        weights = report["receipt"]["checkpoint"]
        sections.append(facts([("weights", f"{weights['file']}, SHA-256 {weights['sha256']}")]))
        if (drawn := attempt("the budgets", lambda kinds=report["kinds"]: _curves(kinds, settings), say)) is not None:
            sections.append(figure(drawn, "What edits within a budget reach; a dotted line is what is asked for."))
        sections.append(table(trial_rows(report), "all budgets that were tried"))
        if rows := defence_rows(report):
            sections.append(table(rows, "defences; the threshold is the largest of random edits of the same size"))
    return document("How small an edit of the weights hides a backdoor", sections)


def _images(clean: Tensor, marked: Tensor) -> bytes:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(1.1 * len(clean), 2.3), layout="constrained")
    for row, images in enumerate((clean, marked)):
        for column, one in enumerate(images):
            axes = drawn.add_subplot(2, len(clean), row * len(clean) + column + 1)
            axes.imshow(one.permute(1, 2, 0).expand(-1, -1, 3).cpu().numpy(), interpolation="nearest")
            axes.set_axis_off()
    return png(drawn)


def _curves(kinds: Sequence[dict[str, Any]], settings: dict[str, Any]) -> bytes:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(max(7.2, 3.6 * len(kinds)), 2.8), layout="constrained")
    for number, kind in enumerate(kinds):
        axes = drawn.add_subplot(1, len(kinds), number + 1)
        trials = sorted((trial for trial in kind["trials"] if trial["finite"]), key=lambda trial: trial["budget"])
        series = []
        for what, colour, marker in (("success", BLUE, "o"), ("agreement", VERMILION, "s")):
            points = [trial["budget"] for trial in trials], [100 * trial[what] for trial in trials]
            series.append((axes.plot(*points, color=colour, marker=marker, markersize=4)[0], what))
            axes.axhline(100 * settings[what], color=colour, linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel=f"{kind['kind']} budget", ylabel="% of test images", ylim=(-3, 103))
        tidy(axes)
        legend(axes, series)
    return png(drawn)

"""Draws docs/architecture.svg from the imports of the sources.

    python tests/repo/draw_architecture.py        after an import between wings was added or removed

A test compares the file with what this draws. An arrow that follows from others is left out: the picture is the
transitive reduction of the imports.
"""

from html import escape
from pathlib import Path

import structure

PICTURE = structure.ROOT / "docs" / "architecture.svg"

# one line each for what does not fit into the name
WINGS = {
    "cli": ("awp train, evaluate,", "landscape, data, checkpoint"),
    "objects": ("fit and evaluate, for", "notebooks and scripts"),
    "train": ("the loop, its setup and", "state, selection"),
    "compare": ("runs side by side:", "tables, curves, a page"),
    "landscape": ("loss around the weights,", "flatness"),
    "audit": ("concepts, weights,", "training images"),
    "evaluation": ("attacks, AutoAttack,", "checks, receipts"),
    "step": ("attack, ascent, descent,", "update; the methods"),
    "data": ("sets, loaders, augmentation,", "batches"),
    "attack": ("PGD, Auto-PGD,", "one-step attacks"),
    "optim": ("SGD, AdamW, schedules,", "averages of weights"),
    "distributed": ("ranks, shards, replicas,", "watchdog, signals"),
    "models": ("ResNets, WRN, timm,", "batch normalisation"),
    "checkpoint": ("written whole,", "verified, background"),
    "observe": ("logs, reports, warnings,", "traces"),
    "device": ("where to compute,", "memory formats"),
    "config": ("settings, checks,", "presets"),
    "files": ("atomic writes, locks,", "text"),
    "awp_kernels": ("fused operations: C++,", "CUDA, Triton, PyTorch"),
}

WIDTH, BOX_WIDTH, BOX_HEIGHT, GAP, FLOOR_HEIGHT, TOP = 900, 190, 62, 48, 118, 24
INK, LINE, FILL, OWN = "#1a1a1a", "#0072b2", "#eef4f9", "#fdf1dc"  # blue and orange: told apart by every eye


def reduced(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that do not follow from others; there are no circles."""

    def reached(wing: str) -> set[str]:
        return set().union(*({other} | reached(other) for other in arrows[wing]))

    return {
        wing: {other for other in others if not any(other in reached(via) for via in others - {other})}
        for wing, others in arrows.items()
    }


def places(floors: tuple[tuple[str, ...], ...]) -> dict[str, tuple[float, float]]:
    """The upper left corner of every wing."""
    found = {}
    for number, wings in enumerate(floors):
        wide = len(wings) * BOX_WIDTH + (len(wings) - 1) * GAP
        for index, wing in enumerate(wings):
            found[wing] = ((WIDTH - wide) / 2 + index * (BOX_WIDTH + GAP), TOP + number * FLOOR_HEIGHT)
    return found


def way(
    start: tuple[float, float], floors: list[float], end: tuple[float, float], taken: dict[tuple[float, float], int]
) -> str:
    """A path down to `end`, through the gaps of the floors between, whose upper edges are given."""
    (x, y), path = start, f"M{start[0]:.0f} {start[1]:.0f}"
    stops = []
    for number, top in enumerate(floors, 1):
        straight = x + (end[0] - x) * number / (len(floors) + 1)
        wings = round((top - TOP) / FLOOR_HEIGHT)
        edges = sorted(corner for corner, upper in places(structure.FLOORS).values() if upper == top)
        gaps = [edges[0] - GAP / 2, *(edge + BOX_WIDTH + GAP / 2 for edge in edges)]
        gap = min(gaps, key=lambda middle: abs(middle - straight))
        taken[gap, wings] = taken.get((gap, wings), 0) + 1
        stops.append((gap + 10 * (taken[gap, wings] - 1), top))
    for stop, top in stops:
        bend = (top - y) / 2
        path += f" C{x:.0f} {y + bend:.0f} {stop:.0f} {top - bend:.0f} {stop:.0f} {top:.0f}"
        x, y = stop, top + BOX_HEIGHT
        path += f" L{x:.0f} {y:.0f}"
    bend = (end[1] - y) / 2
    return f"{path} C{x:.0f} {y + bend:.0f} {end[0]:.0f} {end[1] - bend:.0f} {end[0]:.0f} {end[1]:.0f}"


def arrow_paths(arrows: dict[str, set[str]]) -> list[str]:
    """The arrows, as SVG."""
    corner, drawn = places(structure.FLOORS), []
    taken: dict[tuple[float, float], int] = {}
    arriving = {wing: sorted((w for w in arrows if wing in arrows[w]), key=corner.__getitem__) for wing in corner}
    for wing, others in sorted(arrows.items()):
        leaving = sorted(others, key=corner.__getitem__)
        for index, other in enumerate(leaving):
            (x1, y1), (x2, y2) = corner[wing], corner[other]
            if y1 == y2:
                ends = (x1 + BOX_WIDTH, x2) if x1 < x2 else (x1, x2 + BOX_WIDTH)
                path = f"M{ends[0]:.0f} {y1 + BOX_HEIGHT / 2:.0f} L{ends[1]:.0f} {y2 + BOX_HEIGHT / 2:.0f}"
            else:
                x1 += BOX_WIDTH * (index + 1) / (len(leaving) + 1)
                x2 += BOX_WIDTH * (arriving[other].index(wing) + 1) / (len(arriving[other]) + 1)
                between = [
                    float(TOP + n * FLOOR_HEIGHT) for n in range(structure.FLOOR[wing] + 1, structure.FLOOR[other])
                ]
                path = way((x1, y1 + BOX_HEIGHT), between, (x2, y2), taken)
            drawn.append(f'<path d="{path}" marker-end="url(#head)"><title>{wing} imports {other}</title></path>')
    return drawn


def box(wing: str, x: float, y: float) -> str:
    """A wing, as SVG."""
    fill, middle = OWN if wing == "awp_kernels" else FILL, x + BOX_WIDTH / 2
    about = "".join(
        f'<text x="{middle:.0f}" y="{y + 37 + 15 * row:.0f}">{escape(line)}</text>'
        for row, line in enumerate(WINGS[wing])
    )
    return (
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="{fill}"/>'
        f'<text x="{middle:.0f}" y="{y + 20:.0f}" class="name">{escape(wing)}</text>{about}'
    )


def draw(arrows: dict[str, set[str]]) -> str:
    """The picture as SVG."""
    height = TOP + len(structure.FLOORS) * FLOOR_HEIGHT
    style = (
        f"text{{font:12px sans-serif;fill:{INK};text-anchor:middle}}.name{{font-weight:bold;font-size:15px}}"
        f"path{{fill:none;stroke:{LINE};stroke-width:1.5}}rect{{stroke:{INK};stroke-width:1}}"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        "<title>The wings of awp_engine and their imports; drawn by tests/repo/draw_architecture.py</title>",
        f"<style>{style}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        f'<path d="M0 0L8 4L0 8z" style="fill:{LINE};stroke:none"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" style="fill:#fff;stroke:none"/>',
        *arrow_paths(reduced(arrows)),
        *(box(wing, x, y) for wing, (x, y) in places(structure.FLOORS).items()),
        f'<text x="{WIDTH / 2:.0f}" y="{height - 12}">',
        "An arrow: imports. What follows from other arrows is left out.</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def picture(checkout: Path = structure.ROOT) -> str:
    """The picture of a checkout."""
    arrows = structure.wing_arrows(structure.imports(structure.modules(checkout)))
    if circles := structure.circles(arrows):
        raise SystemExit(f"wings import each other: {circles}; nothing can be drawn from top to bottom")
    return draw(arrows)


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(f"wrote {PICTURE}")

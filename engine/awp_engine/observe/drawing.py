"""What all figures share: names drawn as they are, files written whole, and failures that cost a line."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from awp_engine.files.atomic import temporary_beside
from awp_engine.files.text import printable, reason, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Drawn = TypeVar("Drawn")
# Okabe and Ito's colours, which colour-blind readers tell apart; markers and line styles differ as well
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
COLOURS = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# matplotlib's arithmetic on an axis overflows beyond
_LARGEST = 1e150


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def drawable(text: str, most: int = 48) -> str:
    """`text` as a figure shows it: short, and with escapes for what is not printable or not in the font.

    To be drawn with `parse_math=False`, as dollars are no formulas.
    """
    known = shortened(printable(text), most)
    return "".join(c if ord(c) in _glyphs() else ascii(c).strip("'") for c in known)


def legend(place: Axes | Figure, series: Sequence[tuple[Any, str]], loc: Any = "best", **options: Any) -> None:
    """A legend of artists and their names, whatever the names are: matplotlib hides those that begin with `_`."""
    drawn = place.legend([artist for artist, _ in series], [""] * len(series), frameon=False, loc=loc, **options)
    for text, (_, name) in zip(drawn.get_texts(), series, strict=True):
        text.set(text=drawable(name), parse_math=False)


def line_style(index: int) -> dict[str, Any]:
    """Colour, line and marker of the series of that number, unlike those of its neighbours."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _STYLES[index % len(_STYLES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 4,
    }


def png(figure: Figure) -> bytes:
    """A PNG file of the figure; without matplotlib's version in it, the same picture is the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png", metadata={"Software": None})
    return buffer.getvalue()


def tidy(axes: Axes) -> None:
    """A faint grid, and no frame above and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def plottable(value: float) -> float:
    """`value`, or NaN, which leaves a gap, where no axis can hold it."""
    return value if abs(value) < _LARGEST else math.nan


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG file whole.

    Raises:
        OSError: if it cannot be written.
    """
    temporary = temporary_beside(path)
    try:
        figure.savefig(temporary, dpi=140, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def attempt(what: str, draw: Callable[[], Drawn], say: Callable[[str], object]) -> Drawn | None:
    """What `draw` returns; whatever it raises is told in a line, as results do not depend on a picture."""
    try:
        return draw()
    except Exception as error:
        say(f"warning: {printable(what)} could not be drawn: {reason(error)}; the numbers are written")
        return None

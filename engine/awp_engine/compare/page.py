"""What `awp compare --output` writes: one page, its numbers as JSON, and the curves as a picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from awp_engine.compare.curves import draw, panels
from awp_engine.compare.formats import json_document, text_rows
from awp_engine.compare.table import Section
from awp_engine.files.atomic import atomic_write_text
from awp_engine.observe.drawing import attempt, line_style
from awp_engine.observe.page import document, escaped, figure, listed, table

PAGE, NUMBERS, PICTURE = "compare.html", "compare.json", "curves.png"
_STYLE = """
body { max-width: 78rem; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; }
.legend svg { vertical-align: middle; margin-right: .5rem; background: #fff; border-radius: 3px; }
"""
_DASHES = {"-": "", "--": "7 3", "-.": "8 3 2 3", ":": "2 3"}


def _legend(section: Section) -> str:
    entries = []
    for index, setting in enumerate(section.settings):
        style = line_style(index)
        line = (
            '<svg width="36" height="14" aria-hidden="true"><line x1="2" y1="7" x2="34" y2="7" stroke-width="3" '
            f'stroke="{style["color"]}" stroke-dasharray="{_DASHES[style["linestyle"]]}"/></svg>'
        )
        entries.append(f"<li>{line}{escaped(setting.label)}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def _curves(section: Section, drawn: Sequence[tuple[str, bytes]]) -> list[str]:
    several = any(len(setting.runs) > 1 for setting in section.settings)
    methods = {setting.columns["method"] for setting in section.settings}
    about = ["training PGD accuracy is under the attack that each run trains by"]
    about += ["thin lines are single seeds, thick ones their mean"] * several
    about += ["losses of different methods are different functions: look at their shapes"] * (len(methods) > 1)
    told = ", ".join(setting.label for setting in section.settings)
    figures = "\n".join(figure(png, name, f"{name} against the epoch: {told}") for name, png in drawn)
    return ["<h3>Learning curves</h3>", _legend(section), f'<div class="figures">{figures}</div>', listed(about)]


def _runs(section: Section) -> str:
    rows = [
        {
            "run": run.name,
            "setting": setting.label,
            "seed": str(run.config.seed),
            "epochs": f"{run.epoch} of {run.config.epochs}",
            "finished": "no" if run.result is None else "yes",
        }
        for setting in section.settings
        for run in setting.runs
    ]
    return table(rows)


def _evaluations(section: Section) -> str:
    rows = [
        {
            "file": one.name,
            "model": one.model,
            "SHA-256 of its weights": one.sha256,
            "SHA-256 of the images": one.evaluation.images_sha256,
        }
        for one in section.measured
    ]
    return table(rows)


def render(
    sections: Sequence[Section], left_out: Sequence[str], pictures: Sequence[Sequence[tuple[str, bytes]]]
) -> str:
    """The page's text; `pictures` are each section's panels."""
    counts = {
        "run": sum(len(setting.runs) for section in sections for setting in section.settings),
        "evaluation": sum(len(section.measured) for section in sections),
    }
    told = " and ".join(f"{count} {what}{'s' * (count != 1)}" for what, count in counts.items() if count)
    parts = [f"<p>{told}, as their own files say; nothing was measured anew.</p>"]
    parts += [listed([f"left out: {line}" for line in left_out])]
    for section, drawn in zip(sections, pictures, strict=True):
        parts.append(f"<h2>{escaped(section.title)}</h2>")
        for number, one in enumerate(section.tables):
            if number:
                parts.append(f"<h3>{escaped(one.title[:1].upper() + one.title[1:])}</h3>")
            parts += [table(text_rows(one)), listed(one.notes)]
        if drawn:
            parts += _curves(section, drawn)
        if section.settings:
            parts += ["<h3>Runs</h3>", _runs(section)]
        if section.measured:
            parts += ["<h3>Evaluations of other weights</h3>", _evaluations(section)]
    return document("Runs side by side", parts, _STYLE)


def write(
    output: Path, sections: Sequence[Section], left_out: Sequence[str], say: Callable[[str], object]
) -> list[Path]:
    """Writes compare.json, compare.html and curves.png, of several sections curves-2.png and so on.

    Returns:
        The files; a figure that cannot be drawn is left out, after a line that says why.

    Raises:
        OSError: one of them cannot be written.
    """
    page, numbers = output / PAGE, output / NUMBERS
    atomic_write_text(numbers, json_document(sections, left_out))
    pictures, written = [], [page, numbers]
    for number, section in enumerate(sections, 1):
        if not section.settings:
            pictures.append([])
            continue
        path = output / (PICTURE if number == 1 else re.sub(r"\.", f"-{number}.", PICTURE))
        pictures.append(attempt(PAGE, lambda section=section: panels(section.settings), say) or [])
        if attempt(str(path), lambda s=section, path=path: draw(s.settings, s.title, path) or path, say) is not None:
            written.append(path)
    atomic_write_text(page, render(sections, left_out, pictures))
    return written

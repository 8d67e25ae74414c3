"""The report as one HTML page: how the methods agree, and every class's strangest images beside usual ones."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from awp_engine.audit.data.methods import TITLES
from awp_engine.files.text import printable, shortened
from awp_engine.observe.page import document, escaped, facts, image, table

if TYPE_CHECKING:
    from awp_engine.data import Split
    from awp_engine.evaluation.reports.files import Reported

_STRANGE, _USUAL = 24, 12
# pixels a side
_LARGEST = 128
_STYLE = """
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: .6rem; margin: .5rem 0; }
.sheet figure { background: var(--box); border-radius: 6px; padding: .4rem; }
.sheet figure img { image-rendering: pixelated; }
.sheet figcaption { font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Pictures of one class: PNG files with what is said below them, the strangest first."""

    name: str
    strange: Sequence[tuple[bytes, str]]
    usual: Sequence[tuple[bytes, str]]

    @classmethod
    def of(cls, name: str, images: Split, order: Sequence[int], suspects: Sequence[Mapping[str, Any]]) -> Sheet:
        """Of a class's images, whose places come in `order`, the strangest first."""
        by_id = {suspect["id"]: suspect for suspect in suspects}

        def card(place: int) -> tuple[bytes, str]:
            suspect = by_id.get(number := int(images.ids[place]), {})
            file = suspect.get("file")
            words = [f"id {number}", *([] if file is None else [shortened(printable(file.rpartition("/")[2]), 40)])]
            # a score alone says little: the limit stands beside it
            beyond = suspect.get("beyond", {}).items()
            words += [f"{score} {value:.3g} (limit {limit:.3g})" for score, (value, limit) in beyond]
            words += ["unlearnt"] if suspect.get("unlearnt") else []
            return _png(images, place), "; ".join(words)

        strange = [place for place in order[:_STRANGE] if int(images.ids[place]) in by_id]
        return cls(name=name, strange=[*map(card, strange)], usual=[*map(card, list(reversed(order))[:_USUAL])])


def _png(images: Split, place: int) -> bytes:
    pixels = images.images[place].permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((_LARGEST, _LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def rows_of(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a table says of a class, a method a row."""
    first = summary["methods"][0]["method"]
    return [
        {
            "method": f"{row['method']}: {TITLES[row['method']]}",
            "suspects": f"{row['suspects']:,}",
            "share": f"{row['suspects'] / summary['images']:.1%}",
            f"of its {len(row['strangest'])} strangest, also {first}'s": str(row["agreed"]),
            "seconds": f"{row['seconds']:.0f}",
        }
        for row in summary["methods"]
    ]


def _learnt(method: str, epochs: Mapping[str, int]) -> str:
    return f"{method} ({epochs[method]:,} epochs)" if method in epochs else method


def _pictures(cards: Sequence[tuple[bytes, str]]) -> str:
    shown = (f"<figure>{image(png, text)}<figcaption>{escaped(text)}</figcaption></figure>" for png, text in cards)
    return f'<div class="sheet">{"".join(shown)}</div>'


def page(done: Reported, sheets: Sequence[Sheet]) -> str:
    """The whole page."""
    report, receipt = done.report, done.report["receipt"]
    asked, first = report["asked"], report["asked"]["methods"][0]
    weights = receipt["checkpoint"]
    percent = f"{asked['percentile']:g}"
    sections = [
        f"<p>Which training images look as if they did not belong to their class? The {escaped(TITLES[first])} has "
        f"learnt what is usual in a class, and a suspect is an image beyond the {percent}th percentile of a score. "
        "So a share of every class is marked, of a clean one too: look at the pictures from the top, and stop where "
        "they look usual.</p>",
        facts(
            {
                "suspects": f"{len(report['suspects']):,} of {sum(c['images'] for c in report['classes']):,} images",
                "screened": asked["on"],
                "model": "none" if weights is None else f"{weights['name']}, SHA-256 {weights['sha256']}",
                "data": f"{receipt['data']['name']}, training images, SHA-256 {receipt['data']['sha256']}",
                "methods": ", ".join(_learnt(method, asked["epochs"]) for method in asked["methods"]),
                "seed": str(receipt["seed"]),
                "date": receipt["date"].replace("T", " "),
                "versions": ", ".join(f"{name} {version}" for name, version in receipt["versions"].items() if version),
            }.items()
        ),
        f"<h2>What to do with the list</h2><p>{escaped(next_step(report, str(done.output)))}</p>",
    ]
    for summary, sheet in zip(report["classes"], sheets, strict=True):
        name = escaped(shortened(printable(summary["name"]), 60))
        sections += [f"<h2>Class {name}, {summary['images']:,} images</h2>", table(rows_of(summary))]
        sections += ["<h3>Suspects, the strangest first</h3>", _pictures(sheet.strange)] if sheet.strange else []
        sections += ["<h3>The most usual images</h3>", _pictures(sheet.usual)]
    sections.append(f"<details><summary>receipt</summary><code>{escaped(json.dumps(receipt))}</code></details>")
    return document(f"Suspects: {done.title}", sections, _STYLE)


def next_step(report: Mapping[str, Any], output: str) -> str:
    """What a user does with the list that there is."""
    if (name := report["files"].get("audit-data.jsonl")) is not None:
        return (
            "the same command with --keep and the ids of images that are all right takes them off the list; then train "
            f"without the rest: awp train ... --data.bad-files skip --data.bad-list {shlex.quote(f'{output}/{name}')}"
        )
    return (
        f"{report['files']['audit-data.csv']} has the suspects' ids: an image's place in the training files, counted "
        "from 0. Such files hold many images each, which no list can skip: drop those rows from the arrays, or look up "
        "why they are labelled as they are."
    )

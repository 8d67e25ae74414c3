"""The report as one HTML page that needs nothing else: no network, no other file, no script."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; } .failed { color: #b33c00; font-weight: 600; } .passed { color: #00694f; }
img { max-width: 100%; } code { font-size: .85rem; } figure { margin: 1rem 0; } figcaption { color: #555; }
"""


def _cell(text: str) -> str:
    return f"<td>{html.escape(text)}</td>"


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    header = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(_cell(text) for text in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{header}</tr>{body}</table>"


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for gate in gates:
        word = "passed" if gate["passed"] else "failed"
        rows.append(
            f'<tr>{_cell(gate["name"])}<td class="{word}">{word}</td>'
            f"{_cell(gate['measured'])}{_cell(gate['bound'])}{_cell(gate['failure_means'])}</tr>"
        )
    head = "<tr><th>gate</th><th></th><th>measured</th><th>bound</th><th>a failure means</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((prefix + key, value if isinstance(value, str) else json.dumps(value)))
    return lines


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def render_page(
    report: Mapping[str, Any],
    tables: Sequence[Sequence[Mapping[str, str]]],
    figures: Sequence[tuple[str, bytes]],
) -> str:
    """The page's text.

    Args:
        report: what evaluation.json holds.
        tables: the results as text; empty ones are left out.
        figures: captions and PNG files.
    """
    receipt = report["receipt"]
    title = f"{receipt['data']['name']}, {receipt['norm']} epsilon {receipt['epsilon']}"
    sections = [
        f"<h1>Evaluation: {html.escape(title)}</h1>",
        f"<p>{receipt['data']['images']} images of the {receipt['data']['split']} split. "
        f"Right means {html.escape(report['right_means'])}.</p>",
        "<h2>Accuracy</h2>",
        *(_table(table) for table in tables if table),
    ]
    sections += [f'<p class="failed">Unreliable: {html.escape(doubt)}</p>' for doubt in report["doubts"]]
    if report["gates"] is None:
        sections.append("<h2>Gates</h2><p>Not run (--no-gates); so there are no curves of accuracy either.</p>")
    else:
        sections += [
            f"<h2>Gates</h2><p>On {report['gates']['images']} images.</p>",
            _gates(report["gates"]["gates"]),
        ]
    sections.append("<h2>Figures</h2>")
    sections += [_figure(png, caption) for caption, png in figures]
    details = {row["attack"]: {**row["parameters"], **row["details"]} for row in report["attacks"]}
    for heading, values in (("Receipt", receipt), ("Attacks", details)):
        lines = [{"what": key, "value": value} for key, value in _flat(values)]
        sections += [f"<h2>{heading}</h2>", _table(lines)]
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Evaluation: {html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )

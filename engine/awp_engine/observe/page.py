"""What the HTML pages share: one file that needs nothing else, no network and no script; light and dark, any width."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Mapping, Sequence

_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --paper: #fff; --soft: #595959; --line: #d0d0d0; --box: #f4f5f7;
  --bad: #a83200; --good: #00634a; --shade: #0003; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e8e8; --paper: #15171a; --soft: #a9adb3; --line: #3c4047;
  --box: #1f2226; --bad: #ff9d75; --good: #5fd3ab; --shade: #fff3; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  color: var(--text); background: var(--paper); }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, li { max-width: 46rem; overflow-wrap: break-word; } ul { padding-left: 1.2rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); }
code { font-size: .85em; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: 1rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; background:
  linear-gradient(to right, var(--paper) 40%, transparent) left / 2rem 100% no-repeat local,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 2rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) left / .7rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) right / .7rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .92rem; margin: .25rem 0; }
caption { text-align: left; color: var(--soft); padding-bottom: .35rem; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem 1rem .3rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } tbody th { font-weight: 400; } thead th { white-space: nowrap; }
.numbers td { white-space: nowrap; font-variant-numeric: tabular-nums; } .numbers tbody th { min-width: 7rem; }
.numbers .short { white-space: nowrap; }
.numbers .number { text-align: right; }
figure { margin: 0; } figure img { width: 100%; height: auto; background: #fff; border-radius: 4px; display: block; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem; }
details { margin-top: 1rem; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 40rem) {
  dl { grid-template-columns: minmax(auto, 9.5rem) minmax(0, 1fr); gap: .25rem 1rem; }
  /* no table scrolls here: a row of sentences becomes a paragraph, one of numbers a line of names and numbers */
  .stack thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
  .stack table, .stack caption, .stack tbody, .stack tr, .stack th, .stack td { display: block; }
  .stack tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  .stack th, .stack td { border: 0; padding: 0; } .stack tbody th { font-weight: 600; }
  .stack.numbers td { display: inline-block; margin-right: 1.25rem; } .stack td:empty { display: none; }
  .stack td[data-name]::before { content: attr(data-name) ": "; color: var(--soft); }
}
"""
# a browser asks servers for an icon otherwise, and complains that there is none
_ICON = '<link rel="icon" href="data:,">'
# characters of a row's name that stay on one line
_SHORT = 24
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def escaped(text: object) -> str:
    """Text as HTML shows it, within attributes too."""
    return html.escape(str(text))


def _columns(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Name of every column but the first -> its cells' class."""
    numeric = {name for name in rows[0] if all(row[name][:1] in "-+0123456789" for row in rows)}
    return {name: "number" if name in numeric else "" for name in list(rows[0])[1:]}


def _attributes(**values: str) -> str:
    return "".join(f' {name.replace("_", "-")}="{escaped(value)}"' for name, value in values.items() if value)


def table(
    rows: Sequence[Mapping[str, str]],
    caption: str = "",
    *,
    sentences: bool = False,
    colours: Mapping[str, str] | None = None,
) -> str:
    """Rows of the same columns, the first of which names the row.

    Args:
        rows: at least one.
        caption: above the table.
        sentences: rather than numbers: on a narrow screen a row becomes a paragraph, one of numbers a few lines.
        colours: cells' text -> "good" or "bad".
    """
    first, columns, colours = next(iter(rows[0])), _columns(rows), colours or {}

    def line(row: Mapping[str, str]) -> str:
        cells = [
            f"<td{_attributes(role='cell', data_name=name, **shade)}>{escaped(row[name])}</td>"
            for name, kind in columns.items()
            for shade in [{"class": colours.get(row[name], kind)}]
        ]
        short = {"class": "short" if len(row[first]) <= _SHORT else ""}
        head = f"<th{_attributes(scope='row', role='rowheader', **short)}>{escaped(row[first])}</th>"
        return f"<tr{_attributes(role='row')}>{head}{''.join(cells)}</tr>"

    heads = "".join(
        f"<th{_attributes(scope='col', role='columnheader', **{'class': kind})}>{escaped(name)}</th>"
        for name, kind in {first: "", **columns}.items()
    )
    # what scrolls must be reachable by keyboard, and have a name
    region = {"tabindex": "0", "role": "region", "aria_label": caption or f"table by {first or 'name'}"}
    box = {"class": "stack"} if sentences else {"class": "stack scroll numbers"} | region
    # browsers forget that what is laid out in blocks is a table
    group = _attributes(role="rowgroup")
    title = f"<caption>{escaped(caption)}</caption>" if caption else ""
    body = "\n".join(map(line, rows))
    return (
        f"<div{_attributes(**box)}><table{_attributes(role='table')}>{title}"
        f"<thead{group}><tr{_attributes(role='row')}>{heads}</tr></thead><tbody{group}>\n{body}\n</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what they are; names such as data.images_in_split may break after their parts."""
    named = ((re.sub(r"([._])", r"\1<wbr>", escaped(name)), escaped(text)) for name, text in pairs)
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in named) + "</dl>"


def listed(lines: Sequence[str]) -> str:
    """Sentences; nothing where there are none."""
    return f"<ul>{''.join(f'<li>{escaped(line)}</li>' for line in lines)}</ul>" if lines else ""


def image(png: bytes, alt: str, more: str = "") -> str:
    """A PNG file within the page."""
    return f'<img alt="{escaped(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"{more}>'


def figure(png: bytes, caption: str, alt: str = "") -> str:
    """A picture with its caption."""
    return f"<figure>{image(png, alt or caption)}<figcaption>{escaped(caption)}</figcaption></figure>"


def document(title: str, sections: Sequence[str], style: str = "") -> str:
    """The whole page.

    Args:
        title: shown by the browser, and as the heading.
        sections: HTML.
        style: CSS that this page alone needs.
    """
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escaped(title)}</title>{_ICON}<style>{_STYLE}{style}</style></head>\n"
        f"<body><main>\n<h1>{escaped(title)}</h1>\n{body}\n</main></body></html>\n"
    )

"""Tables as text for a terminal, Markdown, LaTeX, CSV and JSON."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from awp_engine.compare.read import Measured, Run
from awp_engine.compare.table import NONE, Cell, Section, Statistic, Table
from awp_engine.files.text import json_text

_LATEX = {
    **{character: "\\" + character for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}


def cell_text(cell: Cell) -> str:
    """As people read it."""
    return cell if isinstance(cell, str) else cell.text()


def text_rows(table: Table) -> list[dict[str, str]]:
    """The table's rows as people read them."""
    return [{name: cell_text(cell) for name, cell in row.items()} for row in table.rows]


def _width(rows: Sequence[dict[str, str]]) -> int:
    """Of the box that `print_table` draws."""
    return 1 + sum(3 + max(len(name), *(len(row[name]) for row in rows)) for name in rows[0])


def fitted(rows: list[dict[str, str]], width: int) -> list[list[dict[str, str]]]:
    """The rows as one table; if that is wider than a terminal, turned by 90 degrees, into as many as it takes."""
    if _width(rows) <= width:
        return [rows]
    tables: list[list[dict[str, str]]] = []
    for number, row in enumerate(rows, 1):
        wider = [line | {str(number): row[line[""]]} for line in tables[-1]] if tables else []
        if wider and _width(wider) <= width:
            tables[-1] = wider
        else:
            tables.append([{"": name, str(number): text} for name, text in row.items()])
    return tables


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\|*_<`\[])", r"\\\1", text)


def _markdown(table: Table) -> str:
    names = list(table.rows[0])
    lines = [list(map(_markdown_text, row.values())) for row in text_rows(table)]
    first = [list(map(_markdown_text, names)), ["---", *["---:"] * (len(names) - 1)]]
    body = "\n".join(f"| {' | '.join(line)} |" for line in [*first, *lines])
    notes = "".join(f"\n- {_markdown_text(note)}" for note in table.notes)
    return f"**{_markdown_text(table.title)}**\n\n{body}\n" + (f"{notes}\n" if notes else "")


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _latex(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"  {' & '.join(map(_latex_text, cells))} \\\\"

    names = list(table.rows[0])
    return "\n".join(
        [
            f"% {table.title}",
            r"% \usepackage{booktabs}",
            *(f"% {note}" for note in table.notes),
            rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}",
            r"  \toprule",
            line(names),
            r"  \midrule",
            *(line(list(row.values())) for row in text_rows(table)),
            r"  \bottomrule",
            "\\end{tabular}\n",
        ]
    )


def _csv_text(text: str) -> str | None:
    # a spreadsheet would take text that begins so for a formula
    return None if text == NONE else f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text


def _number(value: float | None) -> float | None:
    """Without the last digits, which are rounding errors: 14.5, not 14.499999999999998."""
    return None if value is None else round(value, 10)


def _csv(tables: Sequence[Table]) -> str:
    """A row for every number of every table."""
    rows = []
    for table in tables:
        for row in table.rows:
            texts = {name: _csv_text(cell) for name, cell in row.items() if isinstance(cell, str) and name}
            for name, cell in row.items():
                if isinstance(cell, Statistic):
                    measure = name if row.get("") is None else f"{name}, {row['']}"
                    spread = {"mean": _number(cell.mean), cell.spread_name: _number(cell.spread)}
                    spread["runs"] = len(cell.values)
                    rows.append({"table": table.title, **texts, "measure": measure, **spread})
    names = dict.fromkeys(name for row in rows for name in row)
    last = ("measure", "mean", "deviation", "standard error", "runs")
    file = io.StringIO()
    columns = [*(name for name in names if name not in last), *(name for name in last if name in names)]
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _json_cell(cell: Cell) -> Any:
    if isinstance(cell, str):
        return cell
    numbers = {"mean": cell.mean, cell.spread_name.replace(" ", "_"): cell.spread, "values": cell.values}
    return numbers | {"runs": cell.runs, "doubted": cell.doubted}


def _json_run(run: Run, label: str) -> dict[str, Any]:
    result = run.result
    return {
        "run": run.name,
        "setting": label,
        "seed": run.config.seed,
        "finished": result is not None,
        "epoch": run.epoch,
        "epochs": run.config.epochs,
        "result": None if result is None else vars(result),
    }


def _json_measured(measured: Measured) -> dict[str, Any]:
    about = vars(measured.evaluation) | {"epsilon": str(measured.evaluation.epsilon)}
    about["attacks"] = [vars(attacked) for attacked in measured.evaluation.attacks]
    return {"file": measured.name, "model": measured.model, "sha256": measured.sha256, **about}


def json_document(sections: Sequence[Section], left_out: Sequence[str]) -> str:
    """All tables, runs and settings as JSON; accuracies of tables are percentages, those of runs fractions."""
    content = [
        {
            "title": section.title,
            "tables": [
                {
                    "title": table.title,
                    "rows": [{name or "measure": _json_cell(cell) for name, cell in row.items()} for row in table.rows],
                    "notes": table.notes,
                }
                for table in section.tables
            ],
            "runs": [_json_run(run, setting.label) for setting in section.settings for run in setting.runs],
            "evaluations": [_json_measured(measured) for measured in section.measured],
        }
        for section in sections
    ]
    return json_text({"sections": content, "left_out": left_out}, indent=2)


def formatted(sections: Sequence[Section], kind: str, left_out: Sequence[str]) -> str:
    """The tables as `kind`: markdown, latex, csv or json."""
    tables = [table for section in sections for table in section.tables]
    if kind == "json":
        return json_document(sections, left_out)
    if kind == "csv":
        return _csv(tables)
    return "\n".join(map({"markdown": _markdown, "latex": _latex}[kind], tables))

"""`awp compare RUN...`: tables and learning curves of several runs, side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from awp_engine.cli.command_line import OneLineParser
from awp_engine.cli.frame import add_shared, ending
from awp_engine.files.text import printable

if TYPE_CHECKING:
    from awp_engine.compare.table import Section

FORMATS = ("text", "markdown", "latex", "csv", "json")


def parse(argv: Sequence[str] | None = None, prog: str = "compare.py") -> argparse.Namespace:
    """The command line's settings.

    Raises:
        SystemExit: 0 after --help; 2 after one line on stderr.
    """
    parser = OneLineParser(
        prog=prog,
        example="runs/at-* runs/awp-* --output compared",
        description="Shows runs side by side: a table of their accuracies, of their evaluations, and, where there are "
        "two settings, of the second minus the first. Runs that differ in their seed alone are one row, with mean and "
        "standard deviation. Evaluations of other people's weights stand beside them, a row each. What was measured on "
        "other images or by another attack gets a table of its own. Nothing is trained or measured: it reads what "
        "`train` and `evaluate` wrote.",
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run directories, evaluation.json files, directories of them, or patterns such as 'runs/at-*'",
    )
    add("--format", choices=FORMATS, default="text", help="of the tables that are printed (text)")
    add_shared(parser, "output", help="also write compare.html, compare.json and curves.png there")
    return parser.parse_args(argv)


def show(sections: Sequence[Section]) -> None:
    """All tables as text, as wide as the terminal, and what is to be known about them."""
    from rich.text import Text

    from awp_engine.compare.formats import fitted, text_rows
    from awp_engine.observe.report import print_table
    from awp_engine.observe.terminal import console_of

    console = console_of(sys.stdout)
    for number, table in enumerate(table for section in sections for table in section.tables):
        rows, title = text_rows(table), table.title
        if number:
            console.print()
        for part in fitted(rows, console.width) if console.is_terminal else [rows]:
            print_table(part, title=title, console=console)
            title = ""
        for note in table.notes:
            console.print(Text(printable(note)), soft_wrap=not console.is_terminal)


def main(argv: Sequence[str] | None = None, prog: str = "compare.py") -> None:
    """Parse, read, show, write."""
    arguments = parse(argv, prog)

    from awp_engine.compare.formats import formatted
    from awp_engine.compare.read import read_runs
    from awp_engine.compare.table import compare
    from awp_engine.observe.report import prepare_output

    def warn(line: str) -> None:
        print(f"{prog}: {line}", file=sys.stderr)

    with ending(prog, place=arguments.output, needs_torch=False):
        if arguments.output is not None:
            prepare_output(arguments.output)
        runs, measured, left_out = read_runs(arguments.runs)
        sections = compare(runs, measured)
        for line in left_out:
            warn(f"warning: {line}")
        if arguments.format == "text":
            show(sections)
        else:
            print(formatted(sections, arguments.format, left_out), end="", flush=True)
        if arguments.output is not None:
            # which draws, and takes a second to be imported
            from awp_engine.compare.page import write

            for path in write(arguments.output, sections, left_out, warn):
                warn(f"wrote {printable(str(path))}")


if __name__ == "__main__":
    from awp_engine.cli import run

    run("compare", "python -m awp_engine.cli.compare")

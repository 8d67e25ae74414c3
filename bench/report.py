"""Draws what `bench/step/step.py` and `pytest bench --benchmark-json` measured, and prints it as Markdown tables.

    python -m bench.report step.json bench.json [--out docs] [--result bench/results/NAME.json]

`--result` keeps everything in one short file, which can be read again.
"""

import argparse
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awp_engine.cli.command_line import OneLineParser, fail
from awp_engine.files.text import json_text
from awp_engine.observe.drawing import attempt
from bench.ops.suite import suite_result
from bench.plots import plot_models, plot_sizes, plot_step
from bench.tables import step_tables, suite_tables

_PROG = "report.py"

Result = dict[str, Any]


def read(path: Path, command: str = "") -> list[Result]:
    """The results in a file: of a step, of the suite (raw or kept), or several together.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise ValueError(f"{path}: expected JSON; is the measurement still running?") from None
    if isinstance(content, dict):
        if "results" in content:
            return content["results"]
        if content.get("benchmarks"):
            return [suite_result(content, command)]
        if content.get("kind") == "step":
            return [content]
        if "rows" in content:
            return [{"kind": "suite"} | content]
    raise ValueError(f"{path}: expected a result of bench/step/step.py, or of pytest bench with --benchmark-json")


def file_name(*parts: str) -> str:
    """Small letters, digits and '-'."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def draw(result: Result, out: Path) -> list[Path]:
    """Writes the plots of one result; returns their paths."""
    machine = result["machine"]
    device = machine["device_name"] if machine["device"] == "cuda" else "cpu"
    if result["kind"] == "step":
        settings = result["settings"]
        told = [f"{name}-{value}" for name, value in settings["engine"].items()]
        path = out / f"{file_name('step', settings['model'], settings['method'], *told, device)}.png"
        plot_step(result, path)
        return [path]
    drawn = {
        out / f"{file_name('operations', device)}.png": plot_models,
        out / f"{file_name('sizes-time', device)}.png": lambda found, path: plot_sizes(found, path, share=False),
        out / f"{file_name('sizes-bandwidth', device)}.png": lambda found, path: plot_sizes(found, path, share=True),
    }
    return [path for path, plot in drawn.items() if plot(result, path)]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, read, draw, print."""
    parser = OneLineParser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, help="directory for the plots; none draws none")
    parser.add_argument("--result", type=Path, help="file that keeps all results")
    parser.add_argument(
        "--command", default="", help="the command that made pytest-benchmark's file, to be kept with it"
    )
    arguments = parser.parse_args(argv)
    try:
        named = ", ".join(map(str, arguments.files))
        results = [result for path in arguments.files for result in read(path, arguments.command)]
        if arguments.result is not None:
            arguments.result.parent.mkdir(parents=True, exist_ok=True)
            arguments.result.write_text(json_text({"results": results}, indent=1))
        for result in results:
            try:
                table = step_tables(result) if result["kind"] == "step" else suite_tables(result)
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise ValueError(f"{named}: no result as bench/ writes it: {error!r}; measure again") from None
            print(table, end="\n\n")
            if arguments.out is not None:
                arguments.out.mkdir(parents=True, exist_ok=True)
                drawn = attempt(named, functools.partial(draw, result, arguments.out), print)
                for path in drawn or ():
                    print(f"![{path.stem}]({path.name})\n")
    except ValueError as error:
        fail(str(error), prog=_PROG)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}", prog=_PROG)


if __name__ == "__main__":
    main()

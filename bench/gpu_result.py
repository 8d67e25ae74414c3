"""Puts what the commands of `bench/gpu.sh` left into one file and one table, beside what was predicted.

    python -m bench.gpu_result OUT [OUT ...] [--result bench/results/GPU-DATE.json]

The file holds the steps as `bench/report.py` reads and draws them, and everything else by name.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from awp_engine.cli.command_line import OneLineParser, fail
from awp_engine.files.text import json_text

_PROG = "gpu_result.py"
Found = dict[str, Any]


class Prediction(NamedTuple):
    """What was expected of a GPU before one had been seen (2026-11-28), and where the measured number is.

    Attributes:
        name: of the number, with its unit.
        gpu: part of the device's name.
        least, most: between which it was expected.
        measured: finds it in the results, None where it was not measured.
    """

    name: str
    gpu: str
    least: float
    most: float
    measured: Callable[[Found], float | None]


def _arm(model: str, arm: str) -> Callable[[Found], float | None]:
    def find(found: Found) -> float | None:
        for step in found["results"]:
            # on by default
            if step["settings"]["model"] == model and step["settings"]["engine"].get("cuda_graphs", True):
                return next((a["seconds"]["median"] * 1e3 for a in step["arms"] if a["name"] == arm), None)
        return None

    return find


def _ratio(model: str, arm: str) -> Callable[[Found], float | None]:
    engine, other = _arm(model, "engine"), _arm(model, arm)

    def find(found: Found) -> float | None:
        own, theirs = engine(found), other(found)
        return theirs / own if own and theirs else None

    return find


def _plain(model: str) -> Callable[[Found], float | None]:
    return lambda found: next((w["step_ms"] for w in found["where"] if w["settings"]["model"] == model), None)


def _kind(model: str, kind: str) -> Callable[[Found], float | None]:
    return lambda found: next(
        (w["kinds_ms"].get(kind) for w in found["where"] if w["settings"]["model"] == model), None
    )


def _epochs(found: Found) -> float | None:
    run = found["real_run"]
    return None if run is None or run["small"] else run["equal_epochs"]["epochs"]


_WRN, _R18 = "wrn-34-10", "preact-resnet-18"
PREDICTIONS = (
    Prediction("WRN-34-10, plain step, ms", "H100", 135, 165, _plain(_WRN)),
    Prediction("WRN-34-10, plain step, ms", "H200", 115, 145, _plain(_WRN)),
    Prediction("WRN-34-10, its convolutions, ms", "H", 85, 103, _kind(_WRN, "convolution")),
    Prediction("WRN-34-10, step in a graph, ms", "H100", 132, 160, _arm(_WRN, "engine")),
    Prediction("WRN-34-10, step in a graph, ms", "H200", 113, 142, _arm(_WRN, "engine")),
    Prediction("WRN-34-10, eager over engine", "H", 1.05, 1.05, _ratio(_WRN, "eager")),
    Prediction("WRN-34-10, public (TF32) over engine", "H", 3, 4, _ratio(_WRN, "public")),
    Prediction("PreActResNet-18, plain step, ms", "H100", 18, 24, _plain(_R18)),
    Prediction("PreActResNet-18, its convolutions, ms", "H", 10, 12, _kind(_R18, "convolution")),
    Prediction("PreActResNet-18, step in a graph, ms", "H100", 16, 20, _arm(_R18, "engine")),
    Prediction("PreActResNet-18, eager over engine", "H", 1.3, 1.3, _ratio(_R18, "eager")),
    Prediction("AT and AT-AWP on CIFAR-10 (JPEG), epochs each", "H", 24, 24, _epochs),
)


def read(folders: Sequence[Path]) -> Found:
    """Everything that the folders hold; what was not measured is missing or None.

    Raises:
        ValueError: a file is damaged.
    """
    found: Found = {"results": [], "stages": {}, "where": [], "first_contact": None, "rates": None, "real_run": None}
    for folder in folders:
        for path in sorted(folder.glob("*.json*")):
            texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            try:
                contents = [json.loads(text) for text in texts]
            except ValueError:
                raise ValueError(f"{path}: expected JSON") from None
            for content in contents:
                kind = content.get("kind")
                if "stage" in content:
                    # the last try of each
                    found["stages"][content["stage"]] = content
                elif kind == "where":
                    found[kind].append(content)
                elif kind == "step":
                    found["results"].append(content)
                elif kind in found:
                    found[kind] = content
    return found


def _device(found: Found) -> str:
    runs = [*found["results"], *found["where"], found["rates"], found["real_run"]]
    return next((run["machine"]["device_name"] for run in runs if run), "")


def predictions(found: Found) -> list[Found]:
    """Each number that was expected of this device, beside what came out."""
    return [
        {"name": p.name, "predicted": [p.least, p.most], "measured": p.measured(found)}
        for p in PREDICTIONS
        if p.gpu in _device(found)
    ]


def table(found: Found) -> Iterator[str]:
    """Lines of Markdown: stages, then numbers."""
    yield from ("| stage | outcome | s | limit |", "|---|---|---|---|")
    for stage in found["stages"].values():
        yield f"| {stage['stage']} | {stage['outcome']} | {stage['seconds']} | {stage['limit']} |"
    rows = [row for row in found["predictions"] if row["measured"] is not None]
    if rows:
        yield from ("", "| | predicted | measured |", "|---|---|---|")
    for row in rows:
        least, most = row["predicted"]
        yield f"| {row['name']} | {least:g}{'' if least == most else f' to {most:g}'} | {row['measured']:.3g} |"
    if (step := _arm(_R18, "engine")(found)) and found["real_run"] is None:
        # forward passes' worth of work: 2 K + 3 and 2 K + 6
        yield f'\nfor `train`: STEP_MS="{step * 23 / 26:.1f} {step:.1f}"'


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, read, print, write."""
    parser = OneLineParser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT")
    parser.add_argument("--result", type=Path, help="file that keeps all of it")
    arguments = parser.parse_args(argv)
    for folder in arguments.folders:
        if not folder.is_dir():
            fail(f"OUT: expected a folder of bench/gpu.sh, got {str(folder)!r}", prog=_PROG)
    try:
        found = read(arguments.folders)
    except ValueError as error:
        fail(str(error), prog=_PROG)
    found["predictions"] = predictions(found)
    print("\n".join(table(found)))
    if arguments.result is not None:
        arguments.result.write_text(json_text(found, indent=1))


if __name__ == "__main__":
    main()

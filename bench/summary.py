"""Reads pytest-benchmark's JSON: prints medians and ratios, draws them, and keeps a short result file.

    python bench/summary.py bench.json [--plot bench.png] [--result bench/results/cpu-2026-11-22.json] [--command "..."]

A ratio is an alternative's median over this package's, formed inside each pass, where both ran within seconds of each
other; the table shows the median over the passes. On GPUs there is one on the host's clock and one on the device alone.
"""

import argparse
import hashlib
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# the implementation that this package chooses by itself is the first of these that ran
_PREFERRED = ("cuda", "cpp", "triton", "reference")
# key of a row: heading, format; a column that no row of an operation fills is left out
_COLUMNS = {
    "median_ms": ("median ms", "{:.3f}"),
    "min_ms": ("least ms", "{:.3f}"),
    "ratio": ("time ratio", "{:.2f}"),
    "device_ms": ("on the device ms", "{:.3f}"),
    "device_ratio": ("ratio there", "{:.2f}"),
    "gb_per_s": ("GB/s", "{:.1f}"),
    "share_of_copy": ("of a copy", "{:.0%}"),
    "page_faults": ("page faults", "{:.0f}"),
}

Row = dict[str, Any]


def sources_digest() -> str:
    """SHA-256 over what was measured, so that a result from a changed checkout can be told apart."""
    digest = hashlib.sha256()
    for path in sorted((*ROOT.glob("csrc/**/*"), *ROOT.glob("kernels/**/*.py"))):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _passes(benchmarks: Iterable[Row]) -> dict[int, Row]:
    return {benchmark["extra_info"]["attempt"]: benchmark for benchmark in benchmarks}


def _ratios(runs: dict[int, Row], own: dict[int, Row], *, device: bool) -> list[float]:
    def value(run: Row) -> float:
        return run["extra_info"]["device_ms"] if device else run["stats"]["median"]

    return [value(runs[attempt]) / value(own[attempt]) for attempt in sorted(runs.keys() & own.keys())]


def summarise(report: dict[str, Any]) -> list[Row]:
    """One row for each operation, input and implementation."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for benchmark in report["benchmarks"]:
        names = groups.setdefault(benchmark["group"], {})
        names.setdefault(benchmark["extra_info"]["implementation"], []).append(benchmark)
    rows = []
    for names in groups.values():
        own_name = next((name for name in _PREFERRED if name in names), None)
        for name, benchmarks in names.items():
            info, runs = benchmarks[0]["extra_info"], _passes(benchmarks)
            times = [seconds * 1e3 for run in benchmarks for seconds in run["stats"]["data"]]
            row: Row = {key: info[key] for key in ("operation", "inputs", "implementation")}
            row |= {
                "median_ms": statistics.median(times),
                "min_ms": min(times),
                "rounds": len(times),
                "gb_per_s": statistics.median(run["extra_info"]["gb_per_s"] for run in benchmarks),
                "share_of_copy": statistics.median(run["extra_info"]["share_of_copy"] for run in benchmarks),
            }
            if info["device"] == "cpu":
                row["page_faults"] = statistics.median(run["extra_info"]["page_faults"] for run in benchmarks)
            if "device_ms" in info:
                row["device_ms"] = statistics.median(run["extra_info"]["device_ms"] for run in benchmarks)
            if own_name is not None and name != own_name:
                own = _passes(names[own_name])
                row |= {"ratio_to": own_name, "ratios": _ratios(runs, own, device=False)}
                row["ratio"] = statistics.median(row["ratios"])
                if "device_ms" in info:
                    row["device_ratio"] = statistics.median(_ratios(runs, own, device=True))
            rows.append(row)
    return rows


def print_table(rows: list[Row]) -> None:
    """A Markdown table for each operation."""
    for operation, inputs in dict.fromkeys((row["operation"], row["inputs"]) for row in rows):
        chosen = [row for row in rows if (row["operation"], row["inputs"]) == (operation, inputs)]
        columns = {key: column for key, column in _COLUMNS.items() if any(key in row for row in chosen)}
        print(f"\n{operation}, {inputs}\n")
        print(f"| implementation | {' | '.join(heading for heading, _ in columns.values())} |")
        print(f"|---|{'---:|' * len(columns)}")
        for row in chosen:
            cells = [form.format(row[key]) if key in row else "-" for key, (_, form) in columns.items()]
            print(f"| {row['implementation']} | {' | '.join(cells)} |")


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Bars of times relative to this package's, one panel an operation."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    groups = list(dict.fromkeys((row["operation"], row["inputs"]) for row in rows))
    figure, axes = pyplot.subplots(-(-len(groups) // 2), 2, figsize=(11, 2.2 * -(-len(groups) // 2)), squeeze=False)
    for axis, group in zip(axes.flat, groups, strict=False):
        chosen = [row for row in rows if (row["operation"], row["inputs"]) == group][::-1]
        # where the device's own time is known, launches do not blur the comparison
        key = "device_ms" if "device_ms" in chosen[0] else "median_ms"
        values = [row[key] for row in chosen]
        colours = ["tab:orange" if "ratio" not in row else "tab:blue" for row in chosen]
        bars = axis.barh([row["implementation"] for row in chosen], values, color=colours)
        axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=2, fontsize=8)
        axis.margins(x=0.15)
        axis.set_title(f"{group[0]}, {group[1]} [{'ms on the device' if key == 'device_ms' else 'ms'}]", fontsize=9)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse, print, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--plot", type=Path, help="a PNG to draw")
    parser.add_argument("--result", type=Path, help="a JSON file with machine, versions, commit and the rows")
    parser.add_argument("--command", default="", help="the command that made the report, for the result file")
    parser.add_argument("--commit", help="what was measured, where pytest-benchmark saw no git checkout")
    arguments = parser.parse_args()

    report = json.loads(arguments.report.read_text())
    machine, commit = report["machine_info"]["awp"], report["commit_info"]
    rows = summarise(report)
    title = (
        f"{machine['device_name']}, torch {machine['torch']}, {machine['threads']} threads, {report['datetime'][:10]}"
    )
    print(title)
    print_table(rows)
    if arguments.plot is not None:
        plot(rows, title, arguments.plot)
    if arguments.result is not None:
        loads = [benchmark["extra_info"]["load_average"] for benchmark in report["benchmarks"]]
        result = {
            "date": report["datetime"],
            "command": arguments.command,
            "machine": machine,
            "load_average": {"least": min(loads), "median": statistics.median(loads), "most": max(loads)},
            "commit": {"id": arguments.commit or commit.get("id"), "dirty": commit.get("dirty")},
            "sources_sha256": sources_digest(),
            "rows": rows,
        }
        arguments.result.parent.mkdir(parents=True, exist_ok=True)
        arguments.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

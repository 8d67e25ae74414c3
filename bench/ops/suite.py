"""What pytest-benchmark measured, as one row for each operation, input and implementation.

A ratio is an alternative's median over this package's, formed inside each pass, where both ran within seconds of each
other; the row has the median over the passes. On GPUs there is one on the host's clock and one on the device alone.
"""

import statistics
from collections.abc import Iterable
from typing import Any

from bench.machine import commit, sources_digest

# the implementation that this package chooses by itself is the first of these that ran
PREFERRED = ("cuda", "cpp", "triton", "reference")

Row = dict[str, Any]


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
        own_name = next((name for name in PREFERRED if name in names), None)
        for name, benchmarks in names.items():
            info, runs = benchmarks[0]["extra_info"], _passes(benchmarks)
            times = [seconds * 1e3 for run in benchmarks for seconds in run["stats"]["data"]]
            row: Row = {key: info[key] for key in ("operation", "inputs", "implementation")}
            row |= {
                "median_ms": statistics.median(times),
                "min_ms": min(times),
                "quartiles_ms": statistics.quantiles(times, method="inclusive")[::2] if len(times) > 1 else times * 2,
                "rounds": len(times),
                "passes": len(runs),
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


def suite_result(report: dict[str, Any], command: str) -> dict[str, Any]:
    """The fields of the result file.

    Args:
        report: what --benchmark-json wrote.
        command: the command that made it.
    """
    loads = [benchmark["extra_info"]["load_average"] for benchmark in report["benchmarks"]]
    measured = report["commit_info"].get("id")
    if measured is not None and report["commit_info"].get("dirty"):
        measured += "-dirty"
    copies = [benchmark["extra_info"]["copy_gb_per_s"] for benchmark in report["benchmarks"]]
    return {
        "kind": "suite",
        "date": report["datetime"],
        "command": command,
        "machine": report["machine_info"]["awp"],
        "load_average": {"least": min(loads), "median": statistics.median(loads), "most": max(loads)},
        "commit": measured or commit(),
        "sources_sha256": sources_digest(),
        "copy_gb_per_s": statistics.median(copies),
        "rows": summarise(report),
    }

"""The benchmarks of single operations, from the command to the plots; and that they refuse wrong results."""

import json
import os
import subprocess
import sys

import pytest
from places import BENCH, ROOT

from bench.ops.update_operations import update_workload
from bench.ops.weight_lists import Latest, TooLargeError, require_memory, sizes
from bench.ops.weight_operations import weight_workload
from bench.report import main as report_main


def pytest_bench(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "bench",
               "--device", "cpu", "--passes", "2", "--rounds", "2", *options]  # fmt: skip
    # pytest-benchmark would take this process's xdist for the other's
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture
def report(capsys):
    """Runs bench/report.py; returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            report_main(arguments)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.compile
def test_from_the_command_to_the_plots(tmp_path, report):
    raw, kept = tmp_path / "bench.json", tmp_path / "kept.json"
    done = pytest_bench("--benchmark-enable", f"--benchmark-json={raw}", "--sizes", "1e3,1e4", "-k",
                        "1e and (perturb_ or total_norm) or pgd_step_")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    code, text, error = report(str(raw), "--out", str(tmp_path), "--result", str(kept), "--command", "the command")
    assert code == 0, error
    assert "perturb_, by number of elements" in text
    assert "| implementation | 1e3 | 1e4 |" in text
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"sizes-time-cpu.png", "sizes-bandwidth-cpu.png", "operations-cpu.png"}

    (result,) = json.loads(kept.read_text())["results"]
    assert result["command"] == "the command"
    named = ("perturb_", "1e4", "loop")
    assert {"date", "machine", "load_average", "commit", "sources_sha256", "copy_gb_per_s"} <= result.keys()
    (row,) = (r for r in result["rows"] if (r["operation"], r["inputs"], r["implementation"]) == named)
    assert row["rounds"] == 4
    assert row["ratio_to"] == "cpp"
    assert len(row["ratios"]) == 2
    assert report(str(kept))[1].split("![")[0] == text.split("![")[0]


def test_results_of_a_step_are_drawn(tmp_path, report):
    def spread(median: float) -> dict:
        return {"median": median, "q1": median, "q3": median, "min": median, "max": median, "n": 1}

    memory = {"peak_bytes": 1 << 30, "peak_bytes_timed": None, "reserved_bytes": None, "base_bytes": 0}
    arms = [
        {
            "name": name,
            "seconds": spread(seconds),
            # parts of a captured graph may be unknown
            "components": parts,
            "tflops": 1.0,
            "share_of_matmul": {"fp32": 0.5},
            "update_share_of_copy": None,
            "memory": memory,
            "finite": True,
            "first_step_seconds": 1.0,
        }
        for name, seconds, parts in [
            ("engine", 1.0, {}),
            ("public", 2.0, {"attack": spread(1.5), "other": spread(0.5)}),
        ]
    ]
    result = {
        "kind": "step",
        "date": "2026-01-01T00:00:00+00:00",
        "machine": {"device": "cpu", "device_name": "A", "torch": "2", "threads": 1, "cores": 1},
        "load_average": {"least": 0.0, "median": 0.0, "most": 0.0},
        "settings": {
            "model": "wrn-34-10",
            "method": "at-awp",
            "batch_size": 1,
            "steps": 10,
            "repeats": 1,
            "engine": {"compile": True},
        },
        "work": {"forward_units": 26, "step_tflop": 1.0, "floor_seconds": 0.1},
        "ceilings": {"matmul_tflops": {"fp32": 2.0}, "copy_gb_per_s": 10.0},
        "arms": arms,
        "ratios": {"public": spread(2.0) | {"of_medians": 2.0}},
    }
    path = tmp_path / "step.json"
    path.write_text(json.dumps(result))
    code, text, error = report(str(path), "--out", str(tmp_path))
    assert code == 0, error
    assert "| public | 2000.0 (2000.0 to 2000.0) | 2000.0 | 2.00 (2.00 to 2.00) |" in text
    assert [p.name for p in tmp_path.glob("*.png")] == ["step-wrn-34-10-at-awp-compile-true-cpu.png"]


BY_HAND = [
    '{"results": [{}]}',
    '{"results": "x"}',
    '{"kind": "step"}',
    '{"rows": 3}',
    '{"results": [{"kind": "suite", "rows": [1]}]}',
]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"benchmarks": []}', *BY_HAND])
def test_unreadable_results_take_one_line(tmp_path, content, report):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    code, _, error = report(str(path))
    assert code == 2
    assert len(error.splitlines()) == 1
    assert error.startswith(f"report.py: error: {path}: ")


def test_kept_results_can_be_read(report):
    assert "perturb_, preact-resnet-18" in report(str(BENCH / "results" / "cpu-2026-11-23.json"))[1]


def test_sizes():
    assert sizes(None, "cpu")[-1] == "1e7"
    assert sizes(None, "cuda")[-1] == "1e9"
    assert sizes("1e3, 3e5", "cpu") == ["1e3", "3e5"]
    with pytest.raises(ValueError, match="--sizes: expected sizes such as 1e5,3e7, got '1000'"):
        sizes("1000", "cpu")
    with pytest.raises(TooLargeError, match=r"9e9 elements need about 9000000000\d* GB"):
        require_memory("9e9", "cpu", 10**18)
    done = pytest_bench("--sizes", "ten")
    assert "--sizes: expected sizes such as 1e5,3e7, got 'ten'" in done.stdout + done.stderr


def test_only_the_latest_is_kept():
    alive: list[int] = []

    class Large:
        def __init__(self, number: int) -> None:
            assert not alive
            alive.append(number)

        def __del__(self) -> None:
            alive.clear()

    latest = Latest()
    assert latest.get(Large, 1) is latest.get(Large, 1)
    latest.get(Large, 2)
    assert alive == [2]


@pytest.mark.parametrize(
    ("operation", "implementation"),
    [
        ("sgd_step_", "fused"),
        ("sgd_step_ clipped", "foreach"),
        ("sgd_step_ average out", "loop"),
    ],
)
def test_wrong_results_of_updates_are_refused(operation, implementation):
    workload = update_workload(operation, "1e3", "cpu")
    workload.check(implementation)
    call = workload.calls[implementation]
    workload.calls[implementation] = lambda: (call(), call())
    with pytest.raises(AssertionError, match="not timed"):
        workload.check(implementation)


def test_wrong_results_of_perturbations_are_refused():
    for operation in ("perturb_", "perturb_into_"):
        workload = weight_workload(operation, "1e3", "cpu")
        workload.check("foreach")
        workload.calls["foreach"] = lambda: None
        with pytest.raises(AssertionError, match="not timed"):
            workload.check("foreach")

"""Whether two versions of this project train to the same bits: runs recorded from two checkouts, and compared.

    python tests/soak/same_runs.py record CHECKOUT --data CIFAR --json before.json
    python tests/soak/same_runs.py compare before.json after.json

CIFAR holds train/<class>/ and test/<class>/. The runs: the default one on the digits, and two epochs of 500 images at
width 8 of AT, TRADES-AWP, free training, RWP, an EMA, one that is stopped and goes on in mid-epoch, and one on two
ranks. One thread; what the clock says, and what names the version or the settings, is left out.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMALL = [
    "--data.name",
    "folder",
    "--data.train-limit",
    "500",
    "--model.width",
    "8",
    "--epochs",
    "2",
    "--global-batch-size",
    "64",
    "--attack.steps",
    "3",
    "--evaluation.steps",
    "3",
    "--evaluation.held-out-limit",
    "100",
    "--evaluation.test-limit",
    "100",
    "--awp.warmup",
    "0",
    "--seed",
    "5",
]
# preset, further flags, ranks, whether it is stopped in mid-epoch
CASES: dict[str, tuple[str, list[str], int, bool]] = {
    "digits": ("digits", [], 1, False),
    "at": ("cifar10-preact-resnet18-at", SMALL, 1, False),
    "trades-awp": ("cifar10-preact-resnet18-trades-awp", SMALL, 1, False),
    "free": ("cifar10-preact-resnet18-free", [*SMALL, "--attack.replays", "3"], 1, False),
    "rwp": ("cifar10-preact-resnet18-at-rwp", [*SMALL, "--awp.ascent-steps", "3"], 1, False),
    "at-awp, ema": ("cifar10-preact-resnet18-at-awp", [*SMALL, "--average.kind", "ema"], 1, False),
    "mart-awp, resumed": ("cifar10-preact-resnet18-mart-awp", [*SMALL, "--checkpoint-steps", "3"], 1, True),
    "at-awp, two ranks": ("cifar10-preact-resnet18-at-awp", SMALL, 2, False),
}
_CHANGING = {
    "seconds",
    "images_per_second",
    "tflops",
    "share_of_matmul",
    "memory_gb",
    "versions",
    "commit",
    "config_hash",
    "preset",
}


def _kept(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _kept(inner) for key, inner in value.items() if key not in _CHANGING}
    return value


def _weights(path: Path) -> str:
    """SHA-256 of what stands behind a safetensors header: the header holds the settings' hash."""
    content = path.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def _stopped_in_mid_epoch(process: subprocess.Popen[str], run_dir: Path) -> None:
    while process.poll() is None and not list(run_dir.glob("checkpoints/epoch-1.step-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    if process.returncode != 75:
        sys.exit(f"{run_dir}: expected to be stopped in mid-epoch with code 75, got {process.returncode}")


def run(checkout: Path, case: str, data: Path, run_dir: Path) -> dict[str, Any]:
    """Train one case; returns what it ends with."""
    preset, flags, ranks, stops = CASES[case]
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(checkout / "engine" / "train.py"), preset, *flags, "--device", "cpu", "--run-dir", str(run_dir)]
    command += [] if preset == "digits" else ["--data.root", str(data)]
    paths = os.pathsep.join(str(checkout / folder) for folder in ("kernels", "engine"))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for attempt in range(1 + stops):
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=run_dir.parent
        )
        if stops and attempt == 0:
            _stopped_in_mid_epoch(process, run_dir)
            continue
        said = process.communicate()[0]
        if process.returncode:
            sys.exit(f"{case}: exit code {process.returncode}\n{said}")
    metrics = [_kept(json.loads(line)) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    report = _kept(json.loads((run_dir / "report.json").read_text()))
    return {"weights": _weights(run_dir / "model.safetensors"), "metrics": metrics, "report": report}


def record(options: argparse.Namespace) -> None:
    """Run the cases and write what they end with."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(options.cases):
            found[case] = run(options.checkout.resolve(), case, options.data.resolve(), Path(scratch) / f"{number}")
            print(f"{case}: {found[case]['weights'][:16]}", flush=True)
            options.json.write_text(json.dumps(found, indent=1) + "\n")


def compare(options: argparse.Namespace) -> None:
    """Say of each case that both have what is equal."""
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    different = 0
    for case in before:
        parts = [part for part in before[case] if before[case][part] != after.get(case, {}).get(part)]
        different += bool(parts)
        print(f"{case}: {'other ' + ', '.join(parts) if parts else 'equal to the bit'}")
    raise SystemExit(1 if different else 0)


def main() -> None:
    """Parse and do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record")
    recording.add_argument("checkout", type=Path)
    recording.add_argument("--data", type=Path, required=True)
    recording.add_argument("--json", type=Path, required=True)
    recording.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    recording.set_defaults(do=record)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.set_defaults(do=compare)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()

"""Signals at any moment of any command: one line, and the exit code that shells and schedulers know."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from awp_engine.signals import interrupted_code, interrupts

ROOT = Path(__file__).parent.parent
ENGINE = ROOT / "engine"
# what the command is called in its messages, and how it is started; each imports torch, for seconds
COMMANDS = {
    "train.py": [str(ENGINE / "train.py"), "--epochs", "500"],
    "evaluate.py": [str(ENGINE / "evaluate.py"), "nowhere"],
    "landscape.py": [str(ENGINE / "landscape.py"), "nowhere"],
    "python -m awp_engine.data": ["-m", "awp_engine.data", "scan", "."],
    "python -m awp_engine.checkpoint": ["-m", "awp_engine.checkpoint", "list", "."],
    "python -m awp_kernels": ["-m", "awp_kernels"],
}
def start(arguments: list[str], cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """A command with the signals of one that a terminal starts."""
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ENGINE)])
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_handler(process: subprocess.Popen[str]) -> None:
    """Wait for the command's first line; until then Python itself is being started, and SIGTERM ends it silently."""
    bit = 1 << (signal.SIGTERM - 1)
    while process.poll() is None:
        caught = re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{process.pid}/status").read_text())
        if caught is not None and int(caught[1], 16) & bit:
            return
        time.sleep(0.002)
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.5])
def test_a_signal_in_the_first_seconds_is_one_line(tmp_path, moment):
    for numbers in ((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)):
        running = [(prog, start(arguments, tmp_path)) for prog, arguments in COMMANDS.items()]
        for _, process in running:
            wait_for_handler(process)
        time.sleep(moment)
        for (prog, process), number in zip(running, numbers * 2, strict=True):
            process.send_signal(number)
        for (prog, process), number in zip(running, numbers * 2, strict=True):
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out) == (128 + number, ""), (prog, err)
            assert err == f"{prog}: error: interrupted by {number.name}\n"
    assert not list(tmp_path.iterdir())

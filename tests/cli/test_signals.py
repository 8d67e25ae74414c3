"""Signals at any moment of any command: one line, and the exit code that shells and schedulers know."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_runs import handles
from places import ENGINE, ROOT

# as the installed script has it
AWP = "from awp_engine.cli import main; main()"
# what the command is called in its messages, and how it is started; each imports torch, for seconds
COMMANDS = {
    "train.py": [str(ENGINE / "train.py"), "--epochs", "500", "--run-dir", "a"],
    "evaluate.py": [str(ENGINE / "evaluate.py"), "nowhere"],
    "landscape.py": [str(ENGINE / "landscape.py"), "nowhere"],
    "python -m awp_engine data": ["-m", "awp_engine", "data", "scan", "."],
    "python -m awp_engine checkpoint": ["-m", "awp_engine", "checkpoint", "list", "."],
    "python -m awp_kernels": ["-m", "awp_kernels"],
    "awp train": ["-c", AWP, "train", "--epochs", "500", "--run-dir", "b"],
    "awp evaluate": ["-c", AWP, "evaluate", "nowhere"],
    "python -m awp_engine.cli.train": ["-m", "awp_engine.cli.train", "--epochs", "500", "--run-dir", "c"],
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
    while not handles(process.pid, signal.SIGTERM):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.5])
def test_a_signal_in_the_first_seconds_is_one_line(tmp_path, moment):
    for numbers in ((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), (signal.SIGTERM, signal.SIGINT, signal.SIGTERM)):
        running = [(prog, start(arguments, tmp_path)) for prog, arguments in COMMANDS.items()]
        for _, process in running:
            wait_for_handler(process)
        time.sleep(moment)
        for (_, process), number in zip(running, numbers * 3, strict=True):
            process.send_signal(number)
        for (prog, process), number in zip(running, numbers * 3, strict=True):
            out, err = process.communicate(timeout=60)
            if err.startswith(f"{prog}: error: stopped by {number.name}: "):
                # it was training already, and has left a checkpoint
                assert (process.returncode, err.count("\n")) == (130 if number == signal.SIGINT else 75, 1)
                continue
            assert (process.returncode, out) == (128 + number, ""), (prog, err)
            # in its work, a command says what is left behind
            assert re.fullmatch(rf"{re.escape(prog)}: error: .*interrupted.*\n", err)
            assert not [path for path in tmp_path.iterdir() if path.name not in "abc"]


def test_a_signal_in_the_middle_leaves_a_command_in_order(tmp_path):
    """In work that cannot end by itself: it is put in order, and said in one line."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from awp_engine.distributed.signals import begin_command, interrupted_code, interrupts\n"
        "begin_command('script')\n"
        "from awp_engine.files.locking import locked\n"
        "try:\n"
        "    with interrupts(), locked(Path(sys.argv[1])):\n"
        "        print('locked', flush=True)\n"
        "        time.sleep(60)\n"
        "except KeyboardInterrupt as interrupt:\n"
        "    sys.exit(interrupted_code(interrupt))\n"
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process = start([str(script), str(tmp_path / "made")], tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        process.send_signal(number)
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 128 + number
        assert not (tmp_path / "made").exists()


def test_what_is_ignored_stays_ignored(tmp_path):
    """As a shell's background, and nohup, have it."""
    code = "import signal; from awp_engine.distributed.signals import *; begin_command('x')\n"
    code += (
        "with interrupts(), stop_requests():\n print(signal.getsignal(2), signal.getsignal(1), signal.getsignal(15))"
    )
    process = subprocess.run(
        ["sh", "-c", f"trap '' INT HUP; exec {sys.executable} -c \"$0\"", code],
        env=os.environ | {"PYTHONPATH": str(ENGINE)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.stdout.split()[:2] == ["1", "1"], process
    assert "note" in process.stdout


PRINTS = r"""
from awp_engine.distributed.signals import begin_command
begin_command("x")
print("caf\u00e9 \udcff", flush=True)
print("again", flush=True)
raise SystemExit(3)
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_show_is_escaped(encoding):
    environment = os.environ | {"PYTHONPATH": str(ENGINE), "PYTHONIOENCODING": encoding}
    process = subprocess.run([sys.executable, "-c", PRINTS], env=environment, capture_output=True, timeout=60)
    shown = "caf\\xe9" if encoding == "ascii" else "caf\u00e9"
    assert process.stdout == f"{shown} \\udcff\nagain\n".encode(encoding)
    assert (process.returncode, process.stderr) == (3, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("where", ["/dev/full", "reader gone", "closed"])
def test_a_lost_output_ends_nothing(where, unbuffered):
    environment = os.environ | {"PYTHONPATH": str(ENGINE), "PYTHONUNBUFFERED": unbuffered}
    close = (lambda: os.close(1)) if where == "closed" else None
    if where == "reader gone":
        reader, output = os.pipe()
        os.close(reader)
    else:
        output = os.open("/dev/full", os.O_WRONLY)
    try:
        process = subprocess.run(
            [sys.executable, "-c", PRINTS],
            env=environment,
            stdout=output,
            stderr=subprocess.PIPE,
            preexec_fn=close,
            timeout=60,
            text=True,
        )
    finally:
        os.close(output)
    reason = {"/dev/full": "No space left on device", "reader gone": "Broken pipe"}.get(where)
    said = "" if reason is None else f"warning: standard output: {reason}: the rest of it is lost\n"
    assert (process.returncode, process.stderr) == (3, said)

"""Runs that are killed or asked to stop: see kill_runs.py, which does the same for longer."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from kill_runs import SMALL, TRAIN, wait_until
from places import SOAK

from awp_engine.cli.command_line import parse_train
from awp_engine.config import ConfigError
from awp_engine.train.run_dir import prepare_run_dir

HARNESS = SOAK / "kill_runs.py"


def harness(tmp_path: Path, *arguments: str) -> dict:
    """The command's result; its processes are its own, and no server of this process has a part in them."""
    found = tmp_path / "found.json"
    command = [sys.executable, str(HARNESS), *arguments, "--directory", str(tmp_path / "runs"), "--json", str(found)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(found.read_text())


@pytest.mark.timeout(600)
def test_killed_and_stopped_runs_go_on_and_end_bit_equal(tmp_path):
    """25 SIGKILLs at random moments, of saves and of perturbed weights too; SIGTERM, SIGINT and SIGUSR1."""
    found = harness(tmp_path, "--kills", "25", "--signals", "4", "--seed", "1")
    kills, signals = found["kills"], found["signals"]
    assert (kills["kills"], kills["wrong"]) == (25, [])
    assert len({moment["part"] for moment in kills["moments"]}) >= 3
    assert kills["during_a_save"] >= 1
    assert (signals["stopped"], signals["wrong"]) == (4, [])
    assert {(stop["signal"], stop["code"]) for stop in signals["stops"]} == {
        ("SIGTERM", 75),
        ("SIGINT", 130),
        ("SIGUSR1", 75),
    }


def test_a_second_interrupt_ends_a_run_at_once(tmp_path):
    """In a step that would take an hour; the first interrupt waits for its end."""
    flags = [*SMALL, "--attack.steps", "200000", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts what runs in its background with SIGINT ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_until((tmp_path / "run" / "tensorboard").exists, "the run's log")
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    again = shlex.join(["python", str(TRAIN), *flags])
    assert said == f"train.py: error: interrupted; to go on: {again}\n"


def test_a_run_killed_before_its_first_file_was_whole_starts_again(tmp_path):
    config = parse_train([*SMALL, "--run-dir", str(tmp_path)])
    (tmp_path / ".tmp-config.json-0a1b2c3d").write_text("{")
    prepare_run_dir(config)
    assert (tmp_path / "config.json").exists()
    (tmp_path / "config.json").unlink()
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        prepare_run_dir(config)

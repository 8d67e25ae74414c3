"""Runs that are killed or asked to stop: see kill_runs.py, which does the same for longer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from kill_runs import SMALL

from awp_engine.command_line import parse_train
from awp_engine.config import ConfigError
from awp_engine.trainer import prepare_run_dir

HARNESS = Path(__file__).parent / "kill_runs.py"


def harness(tmp_path: Path, *arguments: str) -> dict:
    """The command's result; its processes are its own, and no server of this process has a part in them."""
    found = tmp_path / "found.json"
    command = [sys.executable, str(HARNESS), *arguments, "--directory", str(tmp_path / "runs"), "--json", str(found)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(found.read_text())


def test_killed_runs_go_on_and_end_bit_equal(tmp_path):
    """25 SIGKILLs at random moments, of saves and of perturbed weights too."""
    found = harness(tmp_path, "--kills", "25", "--seed", "1")["kills"]
    assert (found["kills"], found["wrong"]) == (25, [])
    assert len({moment["part"] for moment in found["moments"]}) >= 3
    assert found["during_a_save"] >= 1


def test_a_run_killed_before_its_first_file_was_whole_starts_again(tmp_path):
    config = parse_train([*SMALL, "--run-dir", str(tmp_path)])
    (tmp_path / ".tmp-config.json-0a1b2c3d").write_text("{")
    prepare_run_dir(config)
    assert (tmp_path / "config.json").exists()
    (tmp_path / "config.json").unlink()
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        prepare_run_dir(config)

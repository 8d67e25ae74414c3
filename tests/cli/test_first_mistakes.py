"""Mistakes of somebody's first day are answered by a line that says what to do."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from awp_engine.cli.command_line import parse_train
from awp_engine.config import ConfigError
from awp_engine.config.identity import require_same_run
from awp_engine.evaluation.run import evaluate_checkpoint
from awp_engine.observe.run_log import RunLog


@pytest.mark.parametrize(
    ("flags", "meant"), [(["--attack.epsilon", "8"], "8/255"), (["--model.name", "resnet18"], "resnet-18")]
)
def test_what_was_meant_is_said(flags: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train(flags)
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_another_model_in_the_same_directory_is_named_before_its_epochs() -> None:
    saved = dataclasses.replace(parse_train([]), epochs=6)
    with pytest.raises(ConfigError, match=r"holds another run: --model.name is 'preact-resnet-digits' there"):
        require_same_run(saved, parse_train(["--model.name", "net.py:make"]), Path("runs/x"))
    with pytest.raises(ConfigError, match="give --epochs 6 to go on with it"):
        require_same_run(saved, parse_train([]), Path("runs/x"))


def test_force_color_makes_no_terminal_of_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Notebooks set it: every picture of the bar would be a line of their output."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with RunLog(tmp_path, "{}", 1, 10.0, trackers=()) as log:
        log.message("said")
    assert capsys.readouterr().out == "said\n"


def test_a_run_that_is_not_there_comes_before_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(Exception, match="expected a run directory"):
        evaluate_checkpoint(tmp_path / "no")

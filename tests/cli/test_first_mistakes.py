"""Mistakes of somebody's first day are answered by a line that says what to do."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from awp_engine.checkpoint import CheckpointError
from awp_engine.cli.command_line import _parse, parse_train
from awp_engine.cli.compare import parse as parse_compare
from awp_engine.cli.evaluate import parse as parse_evaluate
from awp_engine.config import ConfigError
from awp_engine.config.identity import require_same_run
from awp_engine.config.model_names import in_file
from awp_engine.evaluation.asked import AttacksAsked
from awp_engine.evaluation.attacks.named import EvaluationError, parse_attack
from awp_engine.evaluation.model.external import ExternalModel
from awp_engine.evaluation.run import evaluate_checkpoint
from awp_engine.evaluation.smoothing import Smoothing
from awp_engine.observe.run_log import RunLog


@pytest.mark.parametrize(
    ("flags", "meant"),
    [
        (["--attack.epsilon", "8"], "8/255"),
        (["--model.name", "resnet18"], "resnet-18"),
        (["--data.name", "cifar-10"], "cifar10"),
        (["--method", "TRADES"], "trades"),
        (["--method", "at-awp"], "--awp.gamma"),
        (["--attack.norm", "L2"], "l2"),
    ],
)
def test_what_was_meant_is_said(flags: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train(flags)
    error = capsys.readouterr().err
    assert f"did you mean {meant}?" in error
    # before all that could be given
    assert error.index("did you mean") < 60 or meant == "8/255"


@pytest.mark.parametrize("flag", ["--model.name", "--method", "--data.name"])
def test_a_file_without_a_name_in_it_is_told_which_names_it_has(flag: str, tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text("import torch\nclass Net: ...\ndef _helper(): ...\ndef make(classes): ...\n")
    with pytest.raises(ConfigError, match=re.escape(f"did you mean {file}:Net or {file}:make? expected")):
        _parse([flag, str(file)], "awp train")
    with pytest.raises(EvaluationError, match=re.escape(f"did you mean {file}:Net or {file}:make? expected")):
        parse_attack(str(file))
    file.write_text("not Python")
    assert in_file(str(file)) == in_file(str(tmp_path)) == in_file("net") == ""


@pytest.mark.parametrize(
    ("parse", "arguments", "told"),
    [
        (parse_compare, ["runs", "--format", "tex"], "did you mean text or latex?\n"),
        (parse_evaluate, ["run", "--norm", "L2"], "did you mean l2?\n"),
        (parse_evaluate, ["run", "clean", "pgd20"], "did you mean --attacks clean pgd20?\n"),
        (parse_evaluate, ["run", "--epsilon", "8", "/", "255"], "write a fraction without spaces: 8/255\n"),
    ],
)
def test_other_commands_say_it_too(
    parse: Callable[[list[str]], object], arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert capsys.readouterr().err.endswith(told)


def test_the_usual_short_name_of_autoattack_is_known() -> None:
    with pytest.raises(EvaluationError, match=r"^--attacks: did you mean autoattack\? expected"):
        parse_attack("aa")


def test_one_attack_is_a_list_of_one() -> None:
    with pytest.raises(EvaluationError, match=r"^--attacks: expected a list of names, such as \['clean'\], got text$"):
        AttacksAsked(path=None, attacks="clean")


def test_noise_in_255ths_is_not_certified_for_hours() -> None:
    with pytest.raises(ValueError, match=r"^sigma: did you mean 25/255, 0.098\? expected"):
        Smoothing(sigma=25.0)


def test_another_model_in_the_same_directory_is_named_before_its_epochs() -> None:
    saved = dataclasses.replace(parse_train([]), epochs=6)
    with pytest.raises(ConfigError, match=r"holds another run: --model.name is 'preact-resnet-digits' there"):
        require_same_run(saved, parse_train(["--model.name", "net.py:make"]), Path("runs/x"))
    with pytest.raises(ConfigError, match="give --epochs 6 to go on with it"):
        require_same_run(saved, parse_train([]), Path("runs/x"))


def test_a_run_cannot_be_given_fewer_epochs() -> None:
    saved = parse_train(["--epochs", "10"])
    told = r"^--epochs: runs/x was given 10 epochs and cannot be given fewer, 5; give --epochs 10 to go on with it, or"
    with pytest.raises(ConfigError, match=told):
        require_same_run(saved, dataclasses.replace(saved, epochs=5), Path("runs/x"))
    # where more differs a new run was meant
    with pytest.raises(ConfigError, match=r"holds another run: --seed is 0 there and 1 here"):
        require_same_run(saved, dataclasses.replace(saved, epochs=10, seed=1), Path("runs/x"))
    with pytest.raises(ConfigError, match=r"holds another run"):
        require_same_run(saved, dataclasses.replace(saved, epochs=5, seed=1), Path("runs/x"))


def test_an_onnx_file_is_no_run(tmp_path: Path) -> None:
    (file := tmp_path / "model.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    told = r"model.onnx: ONNX files cannot be loaded here; give the run that it was exported from"
    with pytest.raises(CheckpointError, match=told):
        evaluate_checkpoint(file)
    external = ExternalModel(name="preact-resnet-digits", weights=file)
    with pytest.raises(CheckpointError, match=told):
        evaluate_checkpoint(None, external=external, data_name="digits", norm="linf", epsilon="1/5")


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

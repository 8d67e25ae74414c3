"""What commands share: numbers, one end for whatever goes wrong, and no torch for a command line that is wrong."""

import argparse
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies
from places import ROOT

from awp_engine.checkpoint import CheckpointError
from awp_engine.cli.command_line import OneLineParser
from awp_engine.cli.frame import add_alias, add_shared, ending, share, whole_number
from awp_engine.config import ConfigError
from awp_engine.data import DataError
from awp_engine.evaluation.attacks.named import EvaluationError

TOO_LITTLE = "the device has too little memory for such batches: give a smaller --batch-size"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("--seed: no"), 2, "--seed: no"),
        (EvaluationError("no"), 4, "no"),
        (DataError("no"), 4, "no"),
        (CheckpointError("two\nlines"), 4, "two lines"),
        (OSError(28, "No space left on device", "out/a.json"), 5, "out/a.json: No space left on device"),
        (OSError(28, "No space left on device", b"out/\xff.json"), 5, "out/\\udcff.json: No space left on device"),
        (OSError(28, "No space left on device"), 5, "PLACE: No space left on device"),
        (OSError("of a library"), 5, "PLACE: of a library"),
        (torch.OutOfMemoryError("CUDA out of memory"), 5, TOO_LITTLE),
        (KeyboardInterrupt(15), 143, "stopped"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_end_is_one_line(error: BaseException, code: int, line: str, capsys) -> None:
    with (
        pytest.raises(SystemExit) as ended,
        ending("awp x", interrupted="stopped", unusable=4, failed=5, place="PLACE"),
    ):
        raise error
    assert ended.value.code == code
    assert capsys.readouterr().err == f"awp x: error: {line}\n"


def test_a_defect_is_no_users_mistake() -> None:
    with pytest.raises(RuntimeError, match="a defect"), ending("awp x"):
        raise RuntimeError("a defect")


def test_an_error_without_a_place_names_none(capsys) -> None:
    with pytest.raises(SystemExit), ending("awp x"):
        raise OSError(28, "No space left on device")
    assert capsys.readouterr().err == "awp x: error: No space left on device\n"


@given(strategies.integers(-5, 15))
def test_whole_numbers_lie_in_their_range(number: int) -> None:
    read = whole_number(2, 9)
    if 2 <= number <= 9:
        assert read(str(number)) == number
        return
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number from 2 to 9, got "):
        read(str(number))


@pytest.mark.parametrize("text", ["", "many", "1.5", "9" * 5000, "nan"])
def test_what_is_no_number_is_told(text: str) -> None:
    for read, words in ((whole_number(), "a whole number from 1 to 2147483647"), (share, "more than 0 and at most 1")):
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            read(text)


def test_an_earlier_name_is_taken_and_not_shown(capsys) -> None:
    parser = OneLineParser(prog="x")
    add_shared(parser, "limit", default=7)
    add_alias(parser, "--images", "limit")
    assert [parser.parse_args(given).limit for given in ([], ["--limit", "3"], ["--images", "4"])] == [7, 3, 4]
    assert "--images" not in parser.format_help() + parser.short_help()
    meant = "did you mean --limit?"
    for flag, hint in (("--lim", meant), ("--limt", meant), ("--zzz", "--help lists the flags")):
        with pytest.raises(SystemExit):
            parser.parse_args([flag])
        assert capsys.readouterr().err == f"x: error: unrecognized arguments: {flag}; {hint}\n"


MODEL_COMMANDS = ("evaluate", "certify", "predict", "export", "landscape")


@pytest.mark.parametrize("command", MODEL_COMMANDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weights", "x.pt"), "--weights: says what model to make, and needs --model.name; a run has its own"),
        (("--model.width", "0"), "expected a whole number from 1 to 2147483647, got '0'"),
        (("--model.name", "wrn-28-10", "--weights", "x.pt", "--checkpoint", "last"), "--checkpoint: chooses among"),
    ],
)
def test_a_wrong_command_line_is_told_without_torch(command: str, arguments, message: str) -> None:
    program = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'awp'; from awp_engine.cli import main; main()"
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "engine")])
    place = ("a.png",) if command == "predict" else ()
    ended = subprocess.run(
        [sys.executable, "-c", program, command, *place, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        timeout=120,
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert message in ended.stderr

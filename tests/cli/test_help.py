"""--help is one screen of every command, --help-all is all of it, and neither imports torch."""

import os
import subprocess
import sys

import pytest
from places import ROOT

from awp_engine.cli import COMMANDS
from awp_engine.cli.command_line import _COMMON, OneLineParser
from awp_engine.config import Config, flags
from awp_engine.config.identity import key_types, to_flat
from awp_engine.config.presets import PRESETS

# torch cannot be imported there
AWP = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'awp'; from awp_engine.cli import main; main()"
SUBCOMMANDS = [["data", name] for name in ("scan", "pack", "verify")]
SUBCOMMANDS += [["checkpoint", name] for name in ("verify", "list", "export")]
SUBCOMMANDS += [["audit", name] for name in ("concepts", "weights", "data")]


def said(*arguments: str) -> list[str]:
    """The lines that `awp ARGUMENTS` prints on a terminal of 80 columns."""
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "engine")])
    done = subprocess.run(
        [sys.executable, "-c", AWP, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "COLUMNS": "80"},
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS), *SUBCOMMANDS], ids=" ".join)
def test_help_is_one_screen(arguments: list[str]) -> None:
    lines = said(*arguments, "--help")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(" ".join(["usage: awp", *arguments]))
    examples = [line for line in lines if line.startswith(" ".join(["example: awp", *arguments, ""]))]
    assert len(examples) == (arguments not in ([], ["data"], ["audit"], ["checkpoint"]))


@pytest.mark.parametrize("command", ["train", "evaluate", "landscape"])
def test_help_says_how_many_flags_help_all_explains(command: str) -> None:
    short, whole = "\n".join(said(command, "--help")), "\n".join(said(command, "--help-all"))
    assert "--help-all" in short
    assert len(short) < len(whole) / 2
    expected = {"train": flags(), "evaluate": ["--gates-limit", "--robustbench"], "landscape": ["--draws"]}[command]
    assert [name for name in expected if name not in whole] == []
    assert command == "train" or not any(name in short for name in expected)


def test_the_defaults_in_help_are_the_presets() -> None:
    lines = said("train", "cifar10-preact-resnet18-trades-awp", "--help")
    assert any(line.startswith("  --attack.epsilon X ") and line.endswith("(8/255)") for line in lines)
    assert all(key in key_types() and key in to_flat(Config()) for key in _COMMON)


def test_presets_are_listed_a_line_each() -> None:
    lines = said("train", "--presets")
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert max(map(len, lines)) <= 80


def test_what_is_not_common_is_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    parser = OneLineParser(prog="x", common=("often",), epilog="much more")
    parser.add_argument("--often", help="used by all")
    parser.add_argument_group("Papers", "for papers").add_argument("--seldom", help="used by few")
    for flag, shown in (("--help", False), ("--help-all", True), ("-h", False)):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([flag])
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert "--often" in out
        assert all((text in out) == shown for text in ("--seldom", "for papers", "much more"))
        assert ("x --help-all explains 1 more flags" in out) != shown
    # what is hidden is there
    assert parser.parse_args(["--seldom", "1"]).seldom == "1"
    for wrong, hint in (("--seldon", "did you mean --seldom?"), ("--zzz", "--help-all lists the flags")):
        with pytest.raises(SystemExit):
            parser.parse_args([wrong, "1"])
        assert capsys.readouterr().err.endswith(f"{hint}\n")

"""The command `awp` itself, and what it needs: a version from one source, and a line for what is missing."""

import os
import runpy
import subprocess
import sys
import tomllib

import pytest
from places import ROOT

import awp_engine
import awp_kernels
from awp_engine.cli import COMMANDS, NEEDED

# as the installed script has it
AWP = "import sys; sys.argv[0] = 'awp'; from awp_engine.cli import main; main()"
EXTRAS = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["EXTRAS"]


def awp(*arguments: str, without: tuple[str, ...] = (), code: str = AWP) -> subprocess.CompletedProcess[str]:
    """Run `awp ARGUMENTS` where the modules `without` cannot be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT / "engine")])
    return subprocess.run(
        [sys.executable, "-c", blocked + code, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        timeout=120,
    )


def test_one_file_holds_the_version():
    version = (ROOT / "kernels" / "awp_kernels" / "VERSION").read_text().strip()
    assert awp_kernels.__version__ == awp_engine.__version__ == version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"file": "kernels/awp_kernels/VERSION"}
    # which nothing but a person writes
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert awp("--version").stdout == f"awp-engine {version}\n"


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_it_answers_without_torch_and_any_other_package(argument):
    done = awp(argument, without=("torch", *NEEDED))
    assert (done.returncode, done.stderr) == (0, "")
    assert argument == "--version" or all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "trian: unknown command; did you mean train?"),
        (["x"], f"x: unknown command; expected one of {', '.join(COMMANDS)}; --help lists the flags"),
        (["--preset", "train"], f"--preset: unknown command; expected one of {', '.join(COMMANDS)}; --help lists"),
        (["train", "--epoch", "1"], "train: error: --epoch: unknown flag; did you mean --epochs?"),
    ],
)
def test_what_was_mistyped_is_named_in_one_line(arguments, said):
    done = awp(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("awp")
    assert said in done.stderr


def test_without_a_command_the_usage_is_shown():
    done = awp()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: awp COMMAND ...")


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_packages_are_named_in_one_line(command):
    done = awp(command, "--help", without=("scipy", "PIL"))
    expected = f"awp {command}: error: not installed: pillow, scipy; pip install pillow scipy\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


def test_what_is_needed_is_what_the_extra_installs():
    installed = {requirement.partition(">")[0] for requirement in EXTRAS["train"]}
    # they have lines of their own
    assert installed - set(NEEDED.values()) == {"scikit-learn", "tensorboard", "pyyaml"}
    assert set(NEEDED.values()) <= installed


def test_the_operations_need_torch_alone():
    others = (*NEEDED, "awp_engine", "sklearn", "tensorboard", "setuptools", "triton")
    code = "import torch, awp_kernels\nw = [torch.ones(4)]\nawp_kernels.perturb_(w, [torch.ones(4)], 0.5)\nprint(w[0])"
    done = awp(without=others, code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tensor([1.5000, 1.5000, 1.5000, 1.5000])\n"

"""`awp checkpoint`, as people call it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from awp_engine import load_model
from awp_engine.checkpoint import Retention, load, save
from awp_engine.cli.checkpoint import main
from awp_engine.models import build_model
from awp_engine.models.trained import ModelDescription

DESCRIPTION = ModelDescription(
    name="preact-resnet-digits", num_classes=10, mean=(0.5,), std=(0.25,), width=4, activation="relu"
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Three checkpoints of a small model, whose weights tell epochs and groups apart."""
    torch.manual_seed(0)
    model = DESCRIPTION.build().to(memory_format=torch.channels_last)
    for epoch, step in ((1, 0), (2, 0), (2, 5)):
        live = {name: tensor + epoch + step for name, tensor in model.state_dict().items()}
        best = {name: tensor + 100 for name, tensor in live.items()}
        average = {name: live[name] + 200 for name, _ in model.named_parameters()}
        state = {"epoch": epoch, "step": step, "best_robust": 0.5, **DESCRIPTION.to_metadata()}
        tensors = {"model": live, "best_model": best, "average": average}
        name = f"epoch-{epoch}.step-{step}" if step else f"epoch-{epoch}"
        save(tmp_path / "run" / "checkpoints", name, tensors, state, Retention(9))
    return tmp_path / "run"


def call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_verify_of_a_sound_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = (run_dir, run_dir / "checkpoints", run_dir / "checkpoints" / "epoch-2")
    for place, count in zip(places, (3, 3, 1), strict=True):
        assert call("verify", place) == 0
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("sound: ") for line in lines) == count
        assert lines[-1] == "3 of 3 checkpoints are sound" or count == 1


def test_verify_names_every_damaged_file(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_dir / "checkpoints"
    for name in ("model.safetensors", "average.safetensors"):
        file = directory / "epoch-1" / name
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    (directory / "epoch-2" / "manifest.json").unlink()
    assert call("verify", run_dir) == 1
    lines = capsys.readouterr().out.splitlines()
    damaged = [line for line in lines if line.startswith("damaged: ")]
    assert len(damaged) == 3
    assert f"{directory / 'epoch-1' / 'model.safetensors'}: SHA-256 differs" in damaged[1]
    assert f"{directory / 'epoch-1' / 'average.safetensors'}: SHA-256 differs" in damaged[0]
    assert f"{directory / 'epoch-2' / 'manifest.json'}: cannot be read" in damaged[2]
    assert lines[-1] == "1 of 3 checkpoints are sound"
    assert call("verify", directory / "epoch-2") == 1


def test_list(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / "epoch-1" / "state.json").write_text("{}")
    assert call("list", run_dir) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:6] == ["checkpoint", "epoch", "step", "bytes", "sound", "date"]
    cells = [row.split() for row in rows]
    assert [(c[0], c[1], c[2], c[4]) for c in cells] == [
        ("epoch-1", "1", "0", "no"),
        ("epoch-2", "2", "0", "yes"),
        ("epoch-2.step-5", "2", "5", "yes"),
    ]
    assert ["latest" in c for c in cells] == [False, False, True]
    assert [c[-1] for c in cells] == ["-", "50.00%", "50.00%"]
    assert "held-out PGD" not in header
    size = sum(file.stat().st_size for file in (run_dir / "checkpoints" / "epoch-2").iterdir())
    assert cells[1][3] == f"{size:,}"


@pytest.mark.parametrize("which", ["best_model", "model", "average"])
def test_export_fits_the_model_by_name(run_dir: Path, which: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = run_dir / "out.safetensors"
    assert call("export", run_dir, output, "--weights", which) == 0
    weights = safetensors.torch.load_file(output)
    held = load(run_dir / "checkpoints" / "epoch-2.step-5").tensors
    model = build_model("preact-resnet-digits", 10, [0.5], [0.25], width=4)
    model.load_state_dict(weights)
    assert all(tensor.is_contiguous() for tensor in weights.values())
    for name, tensor in weights.items():
        assert torch.equal(tensor, held[which].get(name, held["model"][name]))
    told = capsys.readouterr().out
    assert ("are not averaged: taken from the model in training" in told) == (which == "average")
    with safetensors.safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert {"weights": which, "checkpoint": "epoch-2.step-5", **DESCRIPTION.to_metadata()}.items() <= metadata.items()
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_model(output)(images), model.eval()(images))


def test_export_takes_the_latest_sound_one_and_says_so(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / "epoch-2.step-5" / "state.json").write_text("{}")
    assert call("export", run_dir, run_dir / "a.safetensors") == 0
    told = capsys.readouterr().out
    assert "skipped a checkpoint: " in told
    assert "best_model of " in told
    assert "/epoch-2, " in told
    assert call("export", run_dir / "checkpoints" / "epoch-1", run_dir / "b.safetensors", "--weights", "model") == 0
    first = load(run_dir / "checkpoints" / "epoch-1").tensors["model"]
    assert torch.equal(safetensors.torch.load_file(run_dir / "b.safetensors")["conv1.weight"], first["conv1.weight"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "the following arguments are required: verify|list|export"),
        (["destroy", "RUN"], 2, "invalid choice: 'destroy'"),
        (["verify"], 2, "the following arguments are required: DIR"),
        (["export", "RUN"], 2, "the following arguments are required: OUT.safetensors"),
        (["export", "RUN", "RUN/x.safetensors", "--weights", "worst"], 2, "invalid choice: 'worst'"),
        (["verify", "RUN/missing"], 1, "missing: cannot be read: No such file or directory"),
        (["list", "RUN/empty"], 1, "empty: expected a run directory, its checkpoints or one of them"),
        (["verify", "RUN/file"], 1, "file: cannot be read: Not a directory"),
        (["export", "RUN/bare", "RUN/x.safetensors"], 1, "bare: holds no weights 'best_model'"),
        (["export", "RUN", "RUN/x.pt"], 2, "OUT.safetensors: expected a name that ends so"),
        (["export", "RUN", "RUN/there.safetensors"], 1, "there.safetensors: is there already"),
        (["export", "RUN", "RUN/file/x.safetensors"], 2, "file: cannot be written to: it is a file, not a directory"),
    ],
)
def test_errors_are_one_line(
    run_dir: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "empty").mkdir()
    (run_dir / "file").write_text("mine")
    (run_dir / "there.safetensors").write_text("mine")
    save(run_dir, "bare", {"model": {"w": torch.ones(1)}}, {}, Retention(9))
    with pytest.raises(SystemExit) as caught:
        call(*(argument.replace("RUN", str(run_dir)) for argument in arguments))
    assert caught.value.code == code
    shown = capsys.readouterr()
    assert shown.err.startswith("awp checkpoint")
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not (run_dir / "x.safetensors").exists()
    assert (run_dir / "there.safetensors").read_text() == "mine"


def test_the_program(run_dir: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def program(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "awp_engine", "checkpoint", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)

    (run_dir / "checkpoints" / "epoch-1" / "state.json").unlink()
    result = program("verify", run_dir)
    assert (result.returncode, result.stderr) == (1, "")
    assert "state.json: cannot be read: No such file or directory" in result.stdout

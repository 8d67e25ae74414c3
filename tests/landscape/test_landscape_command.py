"""`engine/landscape.py` as a user starts it, on two small runs."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import forked
import pytest
import torch
from commands import run_command
from disks import small_tmpfs
from places import ENGINE
from safetensors.torch import load_file

from awp_engine.checkpoint import CheckpointError
from awp_engine.config import AttackConfig, Config, DataConfig, EvaluationConfig, ModelConfig
from awp_engine.evaluation import evaluation_attack
from awp_engine.landscape.files import Receipt, write
from awp_engine.landscape.measure import Measurement, Settings
from awp_engine.landscape.runs import open_runs
from awp_engine.models.trained import find_weights
from awp_engine.train.trainer import Trainer

COMMAND = ENGINE / "landscape.py"
# few images, few steps
SMALL = ["--images", "30", "--steps", "2", "--batch-size", "16", "--threads", "1"]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two epochs each, from other seeds."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("first", "second")):
        config = Config(
            run_dir=folder / name,
            seed=seed,
            epochs=2,
            global_batch_size=256,
            device="cpu",
            data=DataConfig(pad=1),
            model=ModelConfig(width=2),
            attack=AttackConfig(steps=1),
            evaluation=EvaluationConfig(steps=1, evaluate_every=2),
        )
        Trainer(config).run()
    return folder / "first", folder / "second"


def bits(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_all_modes_on_two_runs(two_runs, tmp_path):
    before = [bits(run) for run in two_runs]
    arguments = ["--mode", "1d,2d,flatness", "--output", tmp_path / "out", "--directions", "2", "--points", "3"]
    arguments += ["--points-2d", "3", "--draws", "2", "--worst-xi", "0.001,0.005", "--epochs", "2", "--attempts", "2"]
    result = forked.run(COMMAND, *two_runs, *SMALL, *arguments)
    assert result.returncode == 0, result.stderr
    assert [bits(run) for run in two_runs] == before
    out = tmp_path / "out"
    names = ("curves", "surface", "flatness")
    assert {path.name for path in out.iterdir()} == {f"{n}.{s}" for n in names for s in ("png", "json", "safetensors")}
    assert all(is_png(out / f"{name}.png") for name in names)
    assert "digits, 30 test images, Linf epsilon 0.2, PGD-2" in result.stdout
    numbers = {name: json.loads((out / f"{name}.json").read_text()) for name in names}
    for name, content in numbers.items():
        assert content["attack"] == content["attack"] | {
            "norm": "linf",
            "epsilon": "1/5",
            "step_size": "1/20",
            "steps": 2,
        }
        assert content["data"]["name"] == "digits"
        assert content["data"]["images"] == 30
        assert content["versions"]["torch"]
        assert content["losses"] == f"{name}.safetensors"
        assert [run["label"] for run in content["runs"]] == ["first", "second"]
        for run, folder in zip(content["runs"], two_runs, strict=True):
            assert run["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    check_curves(numbers["curves"], load_file(out / "curves.safetensors"))
    check_surface(numbers["surface"], load_file(out / "surface.safetensors"), numbers["curves"])
    check_flatness(numbers["flatness"], load_file(out / "flatness.safetensors"), numbers["curves"])


def check_curves(content, losses) -> None:
    for run in content["runs"]:
        for kind, shape in (("random", (2, 3, 30)), ("adversarial", (1, 3, 30))):
            curve, table = run["curves"][kind], losses[f"{run['label']}/{kind}"]
            assert table.shape == shape
            assert curve["mean"] == pytest.approx(table.mean((0, 2)).tolist())
            assert all(
                low < mean < high for low, mean, high in zip(*(curve[k] for k in ("low", "mean", "high")), strict=True)
            )
            assert curve["amounts"][1] == 0
        assert run["curves"]["random"]["mean"][1] == run["curves"]["adversarial"]["mean"][1]
        assert len(run["curves"]["random"]["spread"]) == 3


def check_surface(content, losses, curves) -> None:
    for run, other in zip(content["runs"], curves["runs"], strict=True):
        assert losses[f"{run['label']}/surface"].shape == (3, 3, 30)
        assert run["surface"]["mean"][1][1] == pytest.approx(other["curves"]["random"]["mean"][1], rel=1e-9)


def check_flatness(content, losses, curves) -> None:
    for run, other in zip(content["runs"], curves["runs"], strict=True):
        label = run["label"]
        assert run["robust_loss"]["value"] == pytest.approx(other["curves"]["random"]["mean"][1], rel=1e-9)
        assert [entry["xi"] for entry in run["average"]] == [0.5]
        assert [entry["xi"] for entry in run["worst"]] == [0.001, 0.005]
        rise = losses[f"{label}/average/0.5"] - losses[f"{label}/reference"]
        assert rise.shape == (2, 30)
        assert run["average"][0]["value"] == pytest.approx(rise.mean().item())
        for entry in run["worst"]:
            best = losses[f"{label}/worst/{entry['xi']:g}"].mean(1).max() - losses[f"{label}/reference"].mean()
            assert entry["value"] == pytest.approx(best.item())
            assert entry["low"] <= entry["value"] <= entry["high"]
            assert 0 < max(entry["largest_relative_move"]) <= entry["xi"] + 2.0**-23


def test_one_run_writes_beside_it_and_again_the_same(monkeypatch, two_runs, capsys):
    run = two_runs[0]
    arguments = [run, *SMALL, "--points", "3", "--seed", "4"]
    try:
        contents = []
        for _ in range(2):
            assert not run_command("landscape", monkeypatch, *arguments)
            content = json.loads((run / "landscape" / "curves.json").read_text())
            contents.append(content["runs"])
        assert contents[0] == contents[1]
        assert f"wrote {run / 'landscape' / 'curves.png'}" in capsys.readouterr().out
    finally:
        shutil.rmtree(run / "landscape", ignore_errors=True)


def test_which_weights_are_read(two_runs):
    run = two_runs[0]
    last = run / "checkpoints" / "epoch-2"
    assert find_weights(run) == find_weights(run, "best") == (run, run / "model.safetensors")
    assert find_weights(run, "last") == (last, last / "model.safetensors")
    assert find_weights(last) == (last, last / "model.safetensors")
    file = run / "model.safetensors"
    assert find_weights(file) == (file, file)


def test_unfinished_run_shows_its_best_weights(two_runs, tmp_path):
    shutil.copytree(two_runs[0], tmp_path / "unfinished")
    (tmp_path / "unfinished" / "model.safetensors").unlink()
    (opened,) = open_runs([tmp_path / "unfinished"], device=torch.device("cpu"))
    stored = load_file(opened.file)
    assert opened.file.name == "best_model.safetensors"
    for name, parameter in opened.model.named_parameters():
        assert torch.equal(parameter, stored[name])


def test_weights_that_change_meanwhile_are_refused(two_runs, tmp_path):
    shutil.copytree(two_runs[0], tmp_path / "run")
    runs = open_runs([tmp_path / "run"], device=torch.device("cpu"))
    shutil.copy(two_runs[1] / "model.safetensors", runs[0].file)
    settings = Settings(
        points=3,
        points_2d=3,
        radius=1.0,
        adversarial_radius=0.02,
        directions=1,
        plane="random",
        restarts=1,
        average_xi=(0.5,),
        draws=1,
        worst_xi=(0.003,),
        epochs=1,
        attempts=1,
        seed=0,
    )
    receipt = Receipt(
        mode="1d",
        runs=runs,
        split="test",
        images=runs[0].data.test,
        attack=dataclasses.replace(evaluation_attack(runs[0].config), steps=1, seed=0),
        settings=settings,
        batch_size=16,
        seconds=0.0,
    )
    with pytest.raises(CheckpointError, match="changed while it was measured"):
        write(tmp_path, receipt, Measurement(entries=[], losses={}))
    assert not list(tmp_path.glob("curves*"))


def changed(run: Path, to: Path, old: str, new: str) -> Path:
    """A copy of a run whose config.json says something else."""
    shutil.copytree(run, to)
    text = (to / "config.json").read_text()
    assert text.count(old) == 1
    (to / "config.json").write_text(text.replace(old, new))
    return to


BAD_FLAGS = [
    (["--mode", "3d"], ["--mode", "1d,2d,flatness", "3d"]),
    (["--points", "4"], ["--points", "odd number >= 3", "4"]),
    (["--points-2d", "1"], ["--points-2d", "odd number >= 3"]),
    (["--radius", "-1"], ["--radius", "> 0", "-1"]),
    (["--adversarial-radius", "nan"], ["--adversarial-radius", "nan"]),
    (["--images", "0"], ["--images", "from 1 to", "0"]),
    (["--steps", "0"], ["--steps", "from 1 to"]),
    (["--restarts", "0"], ["--restarts", "from 1 to"]),
    (["--seed", "-1"], ["--seed", "2^63", "-1"]),
    (["--worst-xi", "a,b"], ["--worst-xi", "numbers", "a,b"]),
    (["--worst-xi", "0"], ["--worst-xi", "more than 0"]),
    (["--split", "other"], ["--split", "other", "held-out"]),
    (["--direction", "1", "--attemps", "2"], ["--attemps", "did you mean --directions?"]),
    (["--checkpoint", "first"], ["--checkpoint", "first", "last"]),
]


def refused(monkeypatch, capsys, *arguments, words: list[str]) -> None:
    assert run_command("landscape", monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("landscape.py: error: ")
    assert all(word in error for word in words), error


@pytest.mark.parametrize(("arguments", "words"), BAD_FLAGS, ids=lambda value: " ".join(value))
def test_bad_flags_are_one_line(monkeypatch, capsys, two_runs, tmp_path, arguments, words):
    output = tmp_path / "out"
    refused(monkeypatch, capsys, two_runs[0], "--output", output, *arguments, words=words)
    assert not output.exists()


def test_bad_runs_are_one_line(monkeypatch, capsys, two_runs, tmp_path):
    first, second = two_runs
    alone = tmp_path / "elsewhere" / "deep" / "down" / "model.safetensors"
    alone.parent.mkdir(parents=True)
    shutil.copy(first / "model.safetensors", alone)
    damaged = tmp_path / "damaged"
    shutil.copytree(first, damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    other_epsilon = changed(first, tmp_path / "epsilon", '"epsilon": "0.2"', '"epsilon": "0.1"')
    output = tmp_path / "out"
    for arguments, words in (
        (["/nowhere/at/all"], ["/nowhere/at/all", "expected a run directory"]),
        ([], ["RUN"]),
        ([first, first], ["given twice"]),
        ([first, second], ["--output"]),
        ([alone, "--output", output], ["model.safetensors", "config.json"]),
        ([damaged, "--output", output], ["damaged", "SHA-256"]),
        ([first, other_epsilon, "--output", output], ["epsilon 1/10", "has 1/5", "one attack"]),
        ([first / "model.safetensors", "--checkpoint", "last", "--output", output], ["--checkpoint last"]),
        ([first, "--output", alone], ["--output", "model.safetensors"]),
    ):
        refused(monkeypatch, capsys, *arguments, words=words)
    assert not output.exists()


def test_runs_on_other_images_are_refused_where_it_matters(monkeypatch, capsys, two_runs, tmp_path):
    """Runs with another hold-out share the test images, not the held-out ones."""
    first = two_runs[0]
    other = changed(first, tmp_path / "hold-out", '"held_out_fraction": 0.1', '"held_out_fraction": 0.2')
    arguments = [first, other, "--output", tmp_path / "out", *SMALL, "--points", "3"]
    refused(monkeypatch, capsys, *arguments, "--split", "held-out", words=["held-out images", "same images"])
    assert not run_command("landscape", monkeypatch, *arguments)
    assert is_png(tmp_path / "out" / "curves.png")


def test_an_output_that_cannot_be_written_is_found_before_measuring(monkeypatch, capsys, two_runs, tmp_path):
    with small_tmpfs(tmp_path, "16k") as disk:
        refused(monkeypatch, capsys, two_runs[0], "--output", disk, words=["--output", "No space left"])
    below = two_runs[0] / "config.json" / "below"
    refused(monkeypatch, capsys, two_runs[0], "--output", below, words=["--output", f"{below} cannot be"])

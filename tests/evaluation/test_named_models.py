"""All commands name a model in the same ways: a run, weights by the model's name, and a run of somebody's own code."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command
from digits_model import WIDTH, clean_model, description, digits, write_run
from PIL import Image
from torch import nn

from awp_engine import load_model
from awp_engine.checkpoint import export_model
from awp_engine.evaluation.model.opened import open_model
from awp_engine.files.run_places import MODEL_FILE

NAMED = ("--model.name", "preact-resnet-digits", "--model.width", WIDTH)
MEAN, STD = description().mean, description().std
COLOUR = """
from torch import nn

def make(num_classes=4):
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({"net": clean_model().state_dict()}, path := tmp_path / "weights.pt")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (folder := tmp_path / "photos").mkdir()
    for number in range(6):
        Image.fromarray(digits().test.images[number, 0].numpy()).save(folder / f"{number}.png")
    return folder


def answers(path: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line)["classes"] for line in path.read_text().splitlines()]


def test_files_are_classified_by_weights_of_no_run(file: Path, photos: Path, tmp_path: Path, monkeypatch) -> None:
    run = write_run(tmp_path / "run", clean_model())
    given = ("--model.mean", MEAN[0], "--model.std", STD[0], "--data.name", "digits", "--top", 2)
    assert run_command("predict", monkeypatch, run, photos, "--top", 2, "--out", tmp_path / "run.jsonl") == 0
    for number, place in enumerate([("--weights", file, photos), (file, photos)]):
        out = tmp_path / f"{number}.jsonl"
        assert run_command("predict", monkeypatch, *place, *NAMED, *given, "--out", out) == 0
        assert answers(out) == answers(tmp_path / "run.jsonl")


@pytest.fixture
def colour(tmp_path: Path, monkeypatch) -> list[Any]:
    """A model of colour images that nothing but flags describe, and an image."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(COLOUR)
    space: dict[str, Any] = {}
    exec(COLOUR, space)
    torch.save(space["make"]().state_dict(), "theirs.pth")
    Image.new("RGB", (40, 30), (200, 10, 90)).save("a.png")
    Path("names.txt").write_text("cat\ndog\nold wolf\nzebra\n")
    return ["--model.name", "net.py:make", "--weights", "theirs.pth", "a.png"]


def test_flags_say_what_no_data_set_does(colour: list[Any], monkeypatch) -> None:
    described = ("--model.classes", "names.txt", "--image-size", 8, "--model.mean", 0.5, "--model.std", 0.25)
    assert run_command("predict", monkeypatch, *colour, *described, "--out", "out.jsonl") == 0
    network: Any = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 4))
    network.load_state_dict(torch.load("theirs.pth"))
    pixels = torch.tensor([200, 10, 90]).view(1, 3, 1, 1).expand(1, 3, 8, 8) / 255
    best = int(network((pixels - 0.5) / 0.25).argmax())
    ((first,),) = answers(Path("out.jsonl"))
    assert first["class"] == ["cat", "dog", "old wolf", "zebra"][best]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "theirs.pth: belongs to no run that says which classes it has: give either --data.name"),
        (["--model.classes", "4", "--data.name", "digits"], "give either --data.name"),
        (["--model.classes", "4"], "--model.classes: needs --image-size too"),
        (["--model.classes", "4", "--image-size", "8"], "nothing says how images are normalised: give --model.mean"),
        (["--model.classes", "1", "--image-size", "8"], "expected 2 to 1,000,000 classes, got 1"),
        (["--model.classes", "none.txt", "--image-size", "8"], "none.txt: No such file or directory"),
        (["--model.classes", "theirs.pth", "--image-size", "8"], "theirs.pth: is not text in UTF-8"),
        (["--model.classes", "twice.txt", "--image-size", "8"], "all different"),
        (["--model.classes", "5", "--image-size", "8", "--model.normalize", "none"], "does not fit"),
    ],
)
def test_a_model_that_is_half_described_is_refused(colour: list[Any], flags, message, monkeypatch, capsys) -> None:
    Path("twice.txt").write_text("cat\ncat\n")
    assert run_command("predict", monkeypatch, *colour, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_describes_a_model_is_refused_beside_a_run(photos: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run = write_run(tmp_path / "run", clean_model())
    assert run_command("predict", monkeypatch, run, photos, "--model.classes", 10) == 2
    assert run_command("export", monkeypatch, run, "--state-dict", tmp_path / "x.pt", "--image-size", 8) == 2
    assert run_command("predict", monkeypatch, photos) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert "--model.classes: goes with --model.name; a run says what it was trained on" in first
    assert "--image-size: goes with --model.name or --onnx" in second
    assert "FILE_OR_FOLDER: expected images, or folders of images, behind the model" in third


def test_radii_of_weights_of_no_run(file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run = write_run(tmp_path / "run", clean_model())
    few = ("--n", 20, "--n0", 10, "--limit", 4, "--seed", 3, "--batch-size", 16)
    given = ("--model.mean", MEAN[0], "--model.std", STD[0], "--data.name", "digits")
    assert run_command("certify", monkeypatch, run, *few) == 0
    assert run_command("certify", monkeypatch, file, *NAMED, *given, *few, "--output", tmp_path / "theirs") == 0
    own, theirs = (
        json.loads((place / "certification.json").read_text()) for place in (run / "evaluation", tmp_path / "theirs")
    )
    assert theirs["images_certified"] == own["images_certified"]
    assert theirs["receipt"]["checkpoint"]["normalisation_is"] == "as given"


def test_exported_weights_are_measured_as_before(tmp_path: Path, monkeypatch, capsys) -> None:
    """The line that the export prints, with its numbers, is the command that measures the file elsewhere."""
    run = write_run(tmp_path / "run", clean_model())
    assert run_command("export", monkeypatch, run, "--state-dict", tmp_path / "w.pt") == 0
    said = capsys.readouterr().out.splitlines()
    line = next(line for line in said if "--model.mean" in line)
    # digits take no --data.root
    arguments = shlex.split(line)
    arguments = arguments[arguments.index("evaluate") + 1 :]
    quick = ("--attacks", "clean", "pgd2", "--no-gates", "--limit", "60", "--step-size", "1/20")
    assert run_command("evaluate", monkeypatch, *arguments, *quick, "--output", tmp_path / "theirs") == 0
    assert run_command("evaluate", monkeypatch, run, *quick) == 0
    theirs, own = (
        json.loads((place / "evaluation.json").read_text()) for place in (tmp_path / "theirs", run / "evaluation")
    )
    assert [row["right"] for row in theirs["attacks"]] == [row["right"] for row in own["attacks"]]
    assert theirs["receipt"]["normalisation"] == own["receipt"]["normalisation"]


def test_others_weights_become_a_model_that_loads_by_itself(file: Path, tmp_path: Path, monkeypatch) -> None:
    given = (*NAMED, "--model.mean", MEAN[0], "--model.std", STD[0], "--data.name", "digits")
    assert run_command("export", monkeypatch, file, *given, "--hub", tmp_path / "hub") == 0
    loaded, x = load_model(tmp_path / "hub" / MODEL_FILE), digits().test.images[:9].float() / 255
    assert torch.equal(loaded(x), clean_model()(x))
    assert loaded.class_names == digits().class_names
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "Weights: those of weights.pt, SHA-256" in card
    assert "Not measured." in card


def test_a_run_of_own_code_is_named_in_all_commands(photos: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """One that came from elsewhere: its code is run where the user names it, and nowhere else."""
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run", clean_model())
    code = "from awp_engine.models import build_model\n\ndef make(num_classes):\n    "
    code += f"return build_model('preact-resnet-digits', num_classes, {MEAN}, {STD}, width={WIDTH})\n"
    Path("net.py").write_text(code)
    model = open_model(run).model
    told = description().to_metadata()
    fields = json.loads(told["model"]) | {"name": "net.py:make", "width": None, "image_size": [8, 8]}
    weights = {f"network.{name}": value for name, value in model.state_dict().items()}
    export_model(run / MODEL_FILE, weights, told | {"model": json.dumps(fields)})
    commands: dict[str, list[Any]] = {
        "predict": [photos],
        "certify": ["--n", 20, "--limit", 2],
        "evaluate": ["--attacks", "clean", "--no-gates", "--limit", 9],
        "landscape": ["--points", 3, "--steps", 1, "--limit", 9],
        "export": ["--state-dict", "w.pt"],
    }
    for command, more in commands.items():
        assert run_command(command, monkeypatch, run, *more) == 2, command
        assert "which is not run because a file says so" in capsys.readouterr().err
        assert run_command(command, monkeypatch, run, *more, "--model.name", "net.py:make") == 0, command
        capsys.readouterr()

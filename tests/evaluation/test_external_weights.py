"""Models that no run describes, evaluated and drawn by name and a file of weights; folders for the Hub."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command
from digits_model import WIDTH, clean_model, description, digits, trained, write_run
from huggingface_hub import ModelCard, constants, file_download
from places import ENGINE
from torch import nn

from awp_engine import load_model
from awp_engine.checkpoint import CheckpointError, read_model
from awp_engine.cli import landscape
from awp_engine.config import load_config
from awp_engine.data import eval_batches
from awp_engine.evaluation.model.external import ExternalModel, look_at_accuracy
from awp_engine.evaluation.model.loaded_model import LoadedModel, load_trained
from awp_engine.evaluation.run import evaluate_checkpoint
from awp_engine.files.digest import sha256_of
from awp_engine.models import NormalizedClassifier, hub

NAMED = ("--model.name", "preact-resnet-digits", "--model.width", str(WIDTH), "--data.name", "digits")
QUICK = ("--attacks", "clean", "pgd2", "--no-gates", "--limit", "120")
MEAN, STD = description().mean, description().std


def saved(path: Path, model: nn.Module, **more: Any) -> Path:
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"net": weights, "args": argparse.Namespace(lr=0.1), **more}, path)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path / "weights.pth", clean_model())


def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "evaluation.json").read_text())


def test_weights_in_place_of_a_run(tmp_path: Path, file: Path, monkeypatch, capsys) -> None:
    run = write_run(tmp_path / "run", clean_model(), trained(0.0, 1))
    ball = ("--epsilon", "1/5", "--norm", "linf", "--step-size", "1/20")
    given = (*ball, *NAMED, "--model.mean", MEAN[0], "--model.std", STD[0])
    assert run_command("evaluate", monkeypatch, file, *QUICK, *given) == 0
    told = capsys.readouterr().out
    assert run_command("evaluate", monkeypatch, run, *QUICK, *ball, "--output", tmp_path / "own") == 0
    theirs, own = report(tmp_path / "weights-evaluation"), report(tmp_path / "own")
    # the same model, images and seed
    assert [row["right"] for row in theirs["attacks"]] == [row["right"] for row in own["attacks"]]
    assert theirs["receipt"]["data"] | {"class_names": ""} == own["receipt"]["data"] | {"class_names": ""}
    origin = theirs["receipt"]["checkpoint"]
    assert origin["sha256"] == sha256_of(file)
    assert (origin["model"], origin["key"], origin["normalisation_is"]) == ("preact-resnet-digits", "net", "as given")
    assert origin["architecture"] == f"preact-resnet-digits (width {WIDTH})"
    assert all(note in told for note in origin["notes"])
    assert "left out, and not run: objects of argparse.Namespace" in told
    assert "class names: unknown: the weights hold none, so labels are compared as numbers" in told
    assert theirs["receipt"]["normalisation"]["mean"] == own["receipt"]["normalisation"]["mean"]


class NearestMean(NormalizedClassifier):
    """Which class's mean image is nearest, of images as they are: right on nine of ten digits."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(10, mean, std)
        images, labels = next(eval_batches(digits().train, 5000))[:2]
        means = torch.stack([images[labels == number].mean(0).flatten() for number in range(10)])
        self.register_buffer("means", means)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -torch.cdist(self.normalize(images).clamp(0, 1).flatten(1), self.get_buffer("means"))


@pytest.mark.parametrize(("by", "doubted"), [("the data set's", True), ("as given", False)])
def test_where_the_normalisation_was_a_guess_none_is_tried(by: str, doubted: bool) -> None:
    model = NearestMean((0.75,), (0.25,))
    place = Path("weights.pt")
    named = {"name": "w", "weights": place, "sha256": "", "architecture": None, "run_dir": None, "config": None}
    loaded = LoadedModel(model=model, **named, origin={"normalisation_is": by})
    doubts = look_at_accuracy(loaded, digits(), torch.device("cpu"), 500)
    assert [("without any" in doubt) for doubt in doubts] == [True] * doubted
    assert (model.mean.item(), model.std.item()) == (0.75, 0.25)
    # right as it is
    right = LoadedModel(model=NearestMean((0.0,), (1.0,)), **named, origin={"normalisation_is": by})
    assert look_at_accuracy(right, digits(), torch.device("cpu"), 500) == []


def test_a_guessed_normalisation_is_said_and_doubted(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt", clean_model())
    given = {"epsilon": "1/5", "norm": "linf", "attacks": ["clean"], "gates_limit": None, "data_name": "digits"}
    told: list[str] = []
    for normalize in ("auto", "data", "none"):
        external = ExternalModel(name="preact-resnet-digits", weights=path, width=WIDTH, normalize=normalize)
        done = evaluate_checkpoint(None, external=external, say=told.append, **given)
        receipt, page = done.report["receipt"], (done.output / "evaluation.html").read_text()
        said = any(
            line.startswith("NORMALISATION: nothing says which, so images are normalised by mean 0.3") for line in told
        )
        assert said is (normalize == "auto")
        guesses = [doubt for doubt in done.report["doubts"] if "if the guess is right, --model.normalize data" in doubt]
        assert [len(guesses), len(done.report["doubts"]), done.report["unreliable"]] == [said, said, said]
        front = "images are not normalised" if normalize == "none" else "images are normalised by mean 0.3"
        assert f"<dt>normalisation</dt><dd>{front}" in page
        assert "names without &#x27;module.&#x27;" in page
        by = {"auto": "the data set's", "data": "the data set's", "none": "none, as given"}[normalize]
        assert receipt["checkpoint"]["normalisation_is"] == by
        told.clear()
    assert receipt["normalisation"] == {"where": "inside the model", "mean": [0.0], "std": [1.0]}


def test_accuracy_at_chance_is_doubted_with_likely_causes(tmp_path: Path, monkeypatch, capsys) -> None:
    noise = clean_model().state_dict()
    torch.save(
        {name: value * 0 if value.is_floating_point() else value for name, value in noise.items()}, tmp_path / "w.pt"
    )
    given = ("--epsilon", "1/5", "--norm", "linf", "--attacks", "clean", "--no-gates", *NAMED)
    assert run_command("evaluate", monkeypatch, "--weights", tmp_path / "w.pt", *given) == 3
    told = capsys.readouterr().out
    assert told.index("WARNING: clean accuracy") < told.index("clean: ")
    assert "is that of guessing; likely causes: too little training, another normalisation (--model.mean" in told
    found = report(tmp_path / "w-evaluation")
    assert found["unreliable"]
    assert "is that of guessing" in found["doubts"][-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{file}",), "does not say what model its weights are of: give --model.name"),
        (("{file}", *NAMED), "give --norm, --epsilon; usual are linf and 8/255 for CIFAR"),
        (("{file}", "--model.name", "wrn-10-1", "--epsilon", "0", "--norm", "l2"), "measure it: give --data.name\n"),
        (
            ("--model.name", "nets.py:make", "--weights", "{file}", *NAMED[4:], "--epsilon", "0", "--norm", "l2"),
            "error: --model.name: expected a Python file",
        ),
        (("{file}", *NAMED, "--epsilon", "0", "--norm", "l2", "--attacks", "autoatack"), "did you mean autoattack?"),
        (("{pointer}", *NAMED, "--epsilon", "0", "--norm", "l2"), "git lfs pull fetches them"),
        (("{page}", *NAMED, "--epsilon", "0", "--norm", "l2"), "a file that begins with b'<!DOCTYPE html>"),
        (
            ("{file}", *NAMED[:2], *NAMED[4:], "--epsilon", "0", "--norm", "l2"),
            "another width, size of images, or number of classes?",
        ),
        (
            ("--model.name", "wrn-10-1", *NAMED[4:], "--epsilon", "0", "--norm", "l2"),
            "--weights: expected a file: wrn-10-1 as",
        ),
        (("{file}", "--weights", "{file}", *NAMED), "expected one of them"),
        (("{dir}", *NAMED), "is a directory; of a run, which has the rest, it is given alone"),
        (("{dir}", "--weights-key", "net"), "--weights-key: says what model to make, and needs --model.name"),
        ((), "RUN_OR_CHECKPOINT: expected a path, or --model.name with --weights"),
        (
            ("{file}", *NAMED, "--epsilon", "0", "--norm", "l2", "--model.mean", "1"),
            "--model.std: expected both or none",
        ),
        (("{file}", *NAMED, "--epsilon", "0", "--norm", "l2", "--weights-key", "ema"), "it has net"),
        (("hf://nobody",), "expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, message, file: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    pointer, page = tmp_path / "pointer.pt", tmp_path / "page.pt"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    page.write_text("<!DOCTYPE html><html></html>")
    places = {"{file}": file, "{dir}": tmp_path, "{pointer}": pointer, "{page}": page}
    assert run_command("evaluate", monkeypatch, *(places.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_flags_are_refused_before_torch() -> None:
    program = "import sys; from awp_engine.cli.evaluate import parse\n"
    program += "try: parse()\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", program, "--weights", "x.pt"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ENGINE)}, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "AssertionError" not in ended.stderr


def test_the_landscape_of_others_weights(tmp_path: Path, file: Path, monkeypatch, capsys) -> None:
    few = ("--images", "20", "--points", "3", "--steps", "1", "--output", tmp_path / "out")
    assert run_command("landscape", monkeypatch, file, *NAMED, "--epsilon", "0.2", *few) == 0
    assert "weights.pth: weights of 'net', names without 'module.'" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "out" / "curves.json").read_text())["runs"]
    assert (entry["sha256"], entry["key"]) == (sha256_of(file), "net")
    assert "config_hash" not in entry
    assert run_command("landscape", monkeypatch, file, *NAMED, *few) == 2
    assert "needs --data.name and --epsilon too" in capsys.readouterr().err


def test_a_landscape_is_measured_in_full_precision(tmp_path: Path, file: Path) -> None:
    few = ("--images", "4", "--points", "3", "--steps", "1", "--output", tmp_path / "out")
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        landscape.main([*map(str, (file, *NAMED, "--epsilon", "0.2", *few))])
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before


# -- the Hub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "run", clean_model(), trained(0.0, 1))
    evaluate_checkpoint(run, attacks=["clean", "pgd2"], gates_limit=None, limit=60)
    (run / "learning_curves.png").write_bytes(b"\x89PNG")
    return run


def cached(folder: Path, repository: str, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Lays `folder` where huggingface_hub keeps what it has fetched, and takes the network away."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef" * 2 + "01234567"
    storage = place / file_download.repo_folder_name(repo_id=repository, repo_type="model")
    file_download._cache_commit_hash_for_specific_revision(str(storage), "main", commit)
    for path in folder.iterdir():
        blob, pointer = storage / "blobs" / path.name, storage / "snapshots" / commit / path.name
        for parent in (blob.parent, pointer.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        file_download._create_symlink(str(blob), str(pointer))


def test_a_folder_for_the_hub_and_back(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    folder = tmp_path / "hub"
    assert run_command("export", monkeypatch, run, "--hub", folder, "--repository", "me/digits") == 0
    assert "upload it: hf upload me/digits" in capsys.readouterr().out
    names = {"README.md", "config.json", "model.safetensors", "learning_curves.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert sha256_of(folder / "model.safetensors") == sha256_of(run / "model.safetensors")
    text = (folder / "README.md").read_text()
    measured = report(run / "evaluation")
    card = ModelCard(text)
    (result, *_) = card.data.eval_results
    assert [f"{result.metric_value:.2f}" for result in card.data.eval_results] == [
        row["accuracy_percent"] for row in measured["attacks"]
    ]
    assert (card.data.library_name, result.dataset_name) == ("awp-engine", "digits")
    for said in (
        "# preact-resnet-digits, AT-AWP on digits",
        f"| pgd2 | {measured['attacks'][1]['accuracy_percent']}% |",
        "linf epsilon 1/5",
        sha256_of(run / "model.safetensors"),
        'load_model("hf://me/digits")',
        "Sanity gates: not run",
        "awp evaluate hf://me/digits --attacks",
    ):
        assert said in text
    # their names are their numbers
    assert "## Classes" not in text
    assert str(tmp_path) not in text + (folder / "config.json").read_text()
    assert load_config(folder / "config.json").attack.epsilon == "0.2"

    cached(folder, "me/digits", monkeypatch, tmp_path / "cache")
    x = torch.rand(4, 1, 8, 8)
    for address in ("hf://me/digits", "hf://me/digits@main"):
        model = load_model(address)
        assert torch.equal(model(x), clean_model()(x))
        assert model.class_names == description().class_names
    monkeypatch.chdir(tmp_path)
    assert run_command("evaluate", monkeypatch, "hf://me/digits", *QUICK, "--transfer-to", "hf://me/digits") == 0
    there = report(tmp_path / "me-digits-evaluation")["receipt"]
    assert there["transfer_to"]["name"] == "me-digits"
    assert (there["epsilon"], there["checkpoint"]["name"]) == ("1/5", "me-digits")
    assert load_trained("hf://me/digits").run_dir is None


def test_the_card_says_that_a_model_was_rounded(run: Path, tmp_path: Path, monkeypatch) -> None:
    evaluate_checkpoint(run, attacks=["clean", "fgsm"], gates_limit=None, limit=60, precision="bf16")
    assert run_command("export", monkeypatch, run, "--hub", tmp_path / "hub") == 0
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "linf epsilon 1/5, computed in bf16, measured by" in text
    names = [result.metric_name for result in ModelCard(text).data.eval_results]
    assert names == ["accuracy, computed in bf16", "accuracy under fgsm, linf epsilon 1/5, computed in bf16"]


def test_other_weights_of_the_same_file_are_another_question(tmp_path: Path) -> None:
    held = {"model": clean_model().state_dict(), "ema": trained(0.0, 1).state_dict()}
    torch.save(held, tmp_path / "two.pt")
    model: dict[str, Any] = {"name": "preact-resnet-digits", "width": WIDTH, "weights": tmp_path / "two.pt"}
    asked = {"data_name": "digits", "norm": "linf", "epsilon": "1/5", "attacks": ["clean"], "limit": 60}
    asked |= {"gates_limit": None, "output": tmp_path / "out"}
    for key in held:
        done = evaluate_checkpoint(None, external=ExternalModel(**model, key=key), **asked)
        assert done.report["receipt"]["checkpoint"]["key"] == key


def test_numbers_of_other_weights_are_not_in_the_card(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert run_command("export", monkeypatch, run, "--hub", tmp_path / "last", "--checkpoint", "last") == 0
    assert "no accuracies in the card: there is no" in capsys.readouterr().out
    assert "Not measured." in (tmp_path / "last" / "README.md").read_text()
    tensors, metadata = read_model(tmp_path / "last" / "model.safetensors")
    assert torch.equal(tensors["conv1.weight"], trained(0.0, 1).state_dict()["conv1.weight"])
    assert "model" in metadata
    place = run / "evaluation" / "evaluation.json"
    changed = json.loads(place.read_text())
    changed["receipt"]["checkpoint"]["sha256"] = "0" * 64
    place.write_text(json.dumps(changed))
    assert run_command("export", monkeypatch, run, "--hub", tmp_path / "other") == 0
    assert "is of other weights" in capsys.readouterr().out
    place.write_text(json.dumps({"receipt": {"checkpoint": {"sha256": sha256_of(run / "model.safetensors")}}}))
    assert run_command("export", monkeypatch, run, "--hub", tmp_path / "strange") == 0
    assert "is not a report of awp evaluate" in capsys.readouterr().out
    assert run_command("export", monkeypatch, run, "--hub", tmp_path / "other") == 2
    assert "not an empty folder; choose another" in capsys.readouterr().err
    assert run_command("export", monkeypatch, run, "--state-dict", tmp_path / "w.pt") == 0
    assert torch.load(tmp_path / "w.pt", weights_only=True).keys() == clean_model().state_dict().keys()


def test_what_the_hub_cannot_give_is_one_line(run: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    cached(tmp_path / "pickled", "me/pickled", monkeypatch, tmp_path / "cache")
    # nothing but safetensors is asked for
    for address in ("hf://me/pickled", "hf://me/nothing", "hf://me/nothing@v2"):
        with pytest.raises(CheckpointError, match="was not fetched before, and the Hub cannot be reached") as raised:
            load_model(address)
        assert "\n" not in str(raised.value)
    (tmp_path / "bare").mkdir()
    weights = tmp_path / "bare" / "model.safetensors"
    shutil.copyfile(run / "checkpoints" / "epoch-2" / "model.safetensors", weights)
    cached(tmp_path / "bare", "me/bare", monkeypatch, tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"say what model these are of: --model.name"):
        load_model("hf://me/bare")
    monkeypatch.chdir(tmp_path)
    external = ExternalModel(name="preact-resnet-digits", weights="hf://me/bare", width=WIDTH)
    given = {"epsilon": "1/5", "norm": "linf", "attacks": ["clean"], "gates_limit": None, "data_name": "digits"}
    assert evaluate_checkpoint(None, external=external, **given).output == Path("model-evaluation")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"not installed: pip install huggingface_hub"):
        hub.fetched("hf://me/bare")


# -- code of the user's

NETS = """
import torch
from torch import nn

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((1, 1, 1, 1), 0.25))
        self.register_buffer("std", torch.full((1, 1, 1, 1), 0.5))

    def forward(self, x):
        return (x - self.mean) / self.std

def plain(num_classes=10):
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, num_classes)
    return nn.Sequential(*layers)

def own(num_classes=10):
    return nn.Sequential(Norm(), plain(num_classes))

def trained():
    torch.manual_seed(0)
    return own()
"""


def test_code_of_the_users_makes_the_model(tmp_path: Path, monkeypatch, capsys) -> None:
    """With a normalisation inside, or with that of the file in front of it: the same answers each time."""
    (nets := tmp_path / "nets.py").write_text(NETS)
    space: dict[str, Any] = {}
    exec(NETS, space)
    network = space["trained"]()
    inner = {f"module.{name}": value for name, value in network[1].state_dict().items()}
    torch.save({"state_dict": nn.DataParallel(network).state_dict()}, whole := tmp_path / "whole.pt")
    torch.save({"net": inner | {"mu": network[0].mean, "sigma": network[0].std}}, bare := tmp_path / "bare.pt")
    given = ("--data.name", "digits", "--epsilon", "1/5", "--norm", "linf", *QUICK, "--output", tmp_path / "out")
    rights = []
    for arguments, by in (
        (("--model.name", f"{nets}:trained"), "the network's own"),
        (("--model.name", f"{nets}:own", "--weights", whole), "the network's own"),
        (("--model.name", f"{nets}:own", "--weights", bare), "the network's own"),
        (("--model.name", f"{nets}:plain", "--weights", whole), "the file's"),
        (("--model.name", f"{nets}:plain", "--weights", bare), "the file's"),
    ):
        # untrained: at chance, which makes it unreliable
        assert run_command("evaluate", monkeypatch, *arguments, *given) == 3
        found = report(tmp_path / "out")
        rights.append([row["right"] for row in found["attacks"]])
        origin = found["receipt"]["checkpoint"]
        assert origin["normalisation_is"] == by
        assert origin["code"] == {"file": "nets.py", "sha256": sha256_of(nets)}
    assert rights == [rights[0]] * 5
    capsys.readouterr()

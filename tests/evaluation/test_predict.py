"""`awp predict`: the classes that evaluation would give, and a reason for every file that gets none."""

import csv
import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import run_command
from digits_model import description, digits
from image_folders import picture, write_images
from PIL import Image

from awp_engine import load_model
from awp_engine.checkpoint import export_model
from awp_engine.config import Config, DataConfig, ModelConfig, to_json
from awp_engine.data import data_loading, eval_batches, load_dataset
from awp_engine.evaluation.model.loaded_model import load_trained
from awp_engine.evaluation.predict import find_images, find_intake, predict_files
from awp_engine.files.run_places import CONFIG_FILE, MODEL_FILE
from awp_engine.models.trained import ModelDescription


def write_run(path: Path, model: ModelDescription, data: DataConfig) -> Path:
    """A run whose network was never trained."""
    path.mkdir()
    (path / CONFIG_FILE).write_text(to_json(Config(run_dir=path, data=data, model=ModelConfig(width=6))))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        export_model(path / MODEL_FILE, model.build().state_dict(), model.to_metadata())
    return path


def colour(names: tuple[str, ...] = ("a", "b", "c")) -> ModelDescription:
    fields = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.2), "num_classes": 3, "class_names": names}
    return dataclasses.replace(description(), **fields)


@pytest.fixture
def digits_run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", description(), DataConfig(name="digits"))


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """Ten digits in a folder and one in it, beside what is no image."""
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for k in range(10):
        place = root / "more" if k % 3 == 0 else root
        Image.fromarray(digits().test.images[k, 0].numpy()).save(place / f"{k}.PNG")
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_text("no image")
    return root


def awp(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return run_command("predict", monkeypatch, *arguments)


@pytest.mark.parametrize(("image_size", "center_crop"), [(8, 0.8), (8, 1.0), (None, 1.0)])
def test_images_are_taken_as_evaluation_takes_them(tmp_path, image_size, center_crop):
    root = tmp_path / "data"
    write_images(root, 9, None if image_size else (12, 10))
    # a grey one among colour ones, where images are resized
    if image_size:
        one = next((root / "test" / "b").glob("*.jpg"))
        Image.open(one).convert("L").save(one)
    data = DataConfig(name="folder", root=root, image_size=image_size, center_crop=center_crop)
    run = write_run(tmp_path / "run", colour(), data)
    # DALI, where it is installed, rounds otherwise when it resizes
    loading = dataclasses.replace(data_loading(data, torch.device("cpu")), loader="torch", workers=0)
    test = load_dataset("folder", root=root, held_out_fraction=0, seed=0, loading=loading).test
    model = load_model(run)
    with torch.no_grad():
        expected = torch.cat([model(batch.images).double().softmax(1) for batch in eval_batches(test, 4)])
    loaded = load_trained(run)
    found = list(predict_files(loaded.model, find_images([root / "test"]), find_intake(loaded), top=3, batch_size=5))
    assert len(found) == len(test) == 9
    assert not any(prediction.error for prediction in found)
    for prediction, row in zip(found, expected, strict=True):
        assert list(prediction.classes) == row.argsort(descending=True, stable=True).tolist()
        assert prediction.probabilities == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-6)
    assert len({prediction.probabilities for prediction in found}) == 9


def test_the_table_and_both_files_say_the_same_in_one_order(digits_run, grey, tmp_path, capsys, monkeypatch):
    assert awp(monkeypatch, digits_run, grey, "--top", 2) == 0
    out = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in out[1:-1]]
    order = [f"{grey}/{k}.PNG" for k in (1, 2, 4, 5, 7, 8)] + [f"{grey}/more/{k}.PNG" for k in (0, 3, 6, 9)]
    assert [row[0] for row in rows] == order
    assert out[0].split() == ["file", "class", "probability", "class", "2", "probability", "2"]
    assert out[-1] == "10 of 10 files classified; images of 8x8, grey, taken as they are"
    assert all(float(row[2]) >= float(row[4]) > 0 for row in rows)
    table, lines = tmp_path / "out.csv", tmp_path / "out.jsonl"
    assert awp(monkeypatch, digits_run, grey, "--top", 2, "--out", table, "--batch-size", 3) == 0
    assert awp(monkeypatch, digits_run, grey, "--top", 10, "--out", lines) == 0
    with table.open(newline="") as file:
        written = list(csv.DictReader(file))
    fields = ("file", "class", "probability", "class_2", "probability_2")
    assert [[row[field] for field in fields] for row in written] == rows
    for text, row in zip(lines.read_text().splitlines(), rows, strict=True):
        entry = json.loads(text)
        assert [entry["file"], entry["classes"][0]["class"], entry["classes"][1]["class"]] == [row[0], row[1], row[3]]
        assert sum(one["probability"] for one in entry["classes"]) == pytest.approx(1, abs=1e-4)
    # folders come in the order in which they are given
    capsys.readouterr()
    assert awp(monkeypatch, digits_run, grey / "more", grey) == 0
    folders = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert folders == order[6:] + order[:6]
    # a file that is given twice counts once, and any name is taken that is given itself
    shutil.copy(grey / "1.PNG", grey / "one")
    capsys.readouterr()
    assert awp(monkeypatch, digits_run / MODEL_FILE, grey / "one", grey / "1.PNG", grey / "one") == 0
    first, second = (line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    assert (first[0], second[0]) == (f"{grey}/one", f"{grey}/1.PNG")
    assert first[1:] == second[1:] == rows[0][1:3]


def test_files_that_cannot_be_used_are_named_and_the_rest_is_written(digits_run, grey, tmp_path, capsys, monkeypatch):
    (grey / "a-broken.png").write_bytes((grey / "1.PNG").read_bytes()[:60])
    picture(0, (8, 8)).save(grey / "colour.png")
    picture(0, (9, 7)).convert("L").save(grey / "large.png")
    (grey / "link.png").symlink_to(grey / "nowhere")
    os.mkfifo(grey / "pipe.png")
    odd = os.fsencode(grey) + b"/odd\n\xff.png"
    Path(os.fsdecode(odd)).write_bytes(b"")
    reasons = {
        "a-broken.png": "is truncated",
        "colour.png": "is in colour (RGB); expected grey (L)",
        "large.png": "is 9x7; expected 8x8, as the model was trained on: resize it, or have it resized by "
        "--image-size 8",
        "link.png": "is a link to nothing",
        r"odd\n\xff.png": "is empty",
        "pipe.png": "is a named pipe",
    }
    assert awp(monkeypatch, digits_run, grey, "--out", tmp_path / "out.csv") == 1
    out, err = capsys.readouterr()
    assert "10 of 16 files classified" in out
    errors = err.splitlines()
    assert len(errors) == 6
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert len(rows) == 16
    for line, (name, words) in zip(errors, reasons.items(), strict=True):
        assert line.startswith(f"predict.py: not classified: {grey}/{name} ")
        assert words in line
        assert line.endswith(rows[f"{grey}/{name}"]["error"])
    assert sum(bool(row["class"]) and not row["error"] for row in rows.values()) == 10
    # what is resized may have any size
    assert awp(monkeypatch, digits_run, grey / "large.png", "--image-size", 8) == 0
    assert "the central square of every image, resized to 8x8, grey" in capsys.readouterr().out
    assert awp(monkeypatch, digits_run, grey / "large.png", "--image-size", 9) == 0
    assert "note: the model was trained on images of 8x8, and may be wrong at 9x9" in capsys.readouterr().out


def test_what_is_not_there_or_all_alike_costs_one_line(digits_run, grey, tmp_path, capsys, monkeypatch):
    large = tmp_path / "large"
    large.mkdir()
    for number in range(20):
        picture(number, (9, 7)).convert("L").save(large / f"{number:02}.png")
    assert awp(monkeypatch, digits_run, grey / "1.PNG", grey / "none.png", large) == 1
    out, err = capsys.readouterr()
    assert "1 of 22 files classified" in out
    missing, wrong = err.splitlines()
    assert missing.startswith(f"predict.py: not classified: {grey}/none.png ")
    assert wrong.startswith(f"predict.py: not classified: {large}/00.png is 9x7; expected 8x8")
    assert wrong.endswith("; likewise 19 more files, --out FILE names them")


def test_grey_is_not_made_colour_where_training_did_not(tmp_path):
    root = tmp_path / "data"
    write_images(root, 9)
    run = write_run(tmp_path / "run", colour(), DataConfig(name="folder", root=root))
    picture(0, (12, 10)).convert("L").save(tmp_path / "grey.png")
    loaded = load_trained(run)
    (found,) = predict_files(loaded.model, find_images([tmp_path / "grey.png"]), find_intake(loaded))
    assert "is grey (L); expected colour (RGB)" in found.error
    assert found.classes == ()


def test_answers_that_are_not_finite_are_none(digits_run, grey):
    loaded = load_trained(digits_run)
    with torch.no_grad():
        next(loaded.model.parameters())[:] = math.nan
    found = list(predict_files(loaded.model, find_images([grey]), find_intake(loaded)))
    assert {prediction.classes for prediction in found} == {()}
    assert all(prediction.error.endswith("the model's answer is not finite") for prediction in found)


def test_refusals_are_one_line_each(digits_run, grey, tmp_path, capsys, monkeypatch):
    root = tmp_path / "data"
    write_images(root, 9)
    moved = write_run(tmp_path / "moved", colour(), DataConfig(name="folder", root=root))
    shutil.rmtree(root)
    alone = tmp_path / "elsewhere" / "alone.safetensors"
    alone.parent.mkdir()
    shutil.copy(digits_run / MODEL_FILE, alone)
    empty = tmp_path / "empty"
    empty.mkdir()
    there = tmp_path / "there.csv"
    there.write_text("mine")
    for arguments, words in {
        (digits_run, grey / "none.png"): "none.png: is not there; expected an image or a folder",
        (digits_run, empty): "empty: has no image in it or below; expected *.jpg",
        (digits_run, grey, "--top", 11): "--top: expected at most 10, the classes of the model",
        (digits_run, grey, "--top", 0): "--top: expected a whole number from 1",
        (digits_run, grey, "--out", "x.txt"): "expected a name that ends in .csv or .jsonl",
        (digits_run, grey, "--out", there): "there.csv is there already",
        (digits_run, grey, "--out", tmp_path / "no" / "x.csv"): "is no folder that can be written to",
        (digits_run, grey, "--center-crop", 0.5): "--center-crop: goes with --image-size",
        (digits_run, grey, "--center-crop", 2): "expected a number more than 0 and at most 1",
        (alone, grey): "alone.safetensors: belongs to no run whose config.json could say how large its images were",
        (moved, grey): "how large the run's images were is not known, as they cannot be looked at",
        (empty, grey): "expected a run directory, a checkpoint or a .safetensors file",
    }.items():
        assert awp(monkeypatch, *arguments) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert words in errors[0]
    assert there.read_text() == "mine"

"""What a run tells somebody who has never made one, about settings and data that make its numbers worth little."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from awp_engine.cli.train import main
from awp_engine.config import Config, DataConfig
from awp_engine.data import DataError, label_notes, load_data
from awp_engine.data.sets.scan_list import LIST_NAME
from awp_engine.evaluation.prepare import open_data
from awp_engine.evaluation.reports.results import Measurement
from awp_engine.observe.metrics import read_metrics

SMALL = ("--epochs", "1", "--model.width", "2", "--attack.steps", "1", "--evaluation.steps", "1", "--log", "none")
FACTORY = """
import numpy as np
def make(root, split):
    count = 30 if split == "train" else 12
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), np.arange(count) % 3
class Broken(list):
    def __len__(self):
        return 5
    def __getitem__(self, number):
        if number == 3:
            raise OSError("truncated file")
        return np.full((4, 4), number, np.uint8), number % 2
def broken(root, split):
    return Broken()
def absent(root, split):
    from pathlib import Path
    return [(path, 0) for path in Path("nowhere").iterdir()]
"""

UNEVEN = """
import numpy as np
def make(root, split):
    counts = (60, 60, 30) if split == "train" else (12, 12, 12)
    labels = np.repeat(np.arange(3), counts)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    images[labels == 0], images[labels == 1] = 0, 255
    return images, labels
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(FACTORY)
    return tmp_path


def test_a_run_says_what_makes_its_numbers_worth_little(own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # a list of unusable files is about class folders, and says nothing about what a user's own code opens
    (own / LIST_NAME).write_text("not a list of a scan")
    name, run = f"{own / 'own.py'}:make", own / "run"
    main(
        ["--data.name", name, "--data.root", str(own), "--run-dir", str(run), *SMALL, "--optimizer.lr", "1e-6"],
        "awp train",
    )
    said = capfd.readouterr().out
    assert "--attack.epsilon 0.2 is far more than colour images are usually attacked with" in said
    assert "only 3 held-out images choose the best epoch" in said
    # code that a file names is not run, so the command that comes next has to name it
    assert f"awp evaluate {run} --data.name {name} --attacks" in said
    clean = float(re.search(r"^AT-AWP +([0-9.]+)%", said, re.MULTILINE)[1])
    assert (clean <= 33.34) == ("no better than one answer for every image (33.33%)" in said)


def test_a_class_that_is_never_right_is_named_and_held_out_images_have_class_weights(
    own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Black, white, and 8 noisy images among 120, of which a network that learns anything knows the first two."""
    (own / "uneven.py").write_text(UNEVEN)
    given = ["--data.name", f"{own / 'uneven.py'}:make", "--data.root", str(own), "--data.held-out-fraction", "0.2"]
    given += ["--data.class-weights", str(own / "weights.json"), "--global-batch-size", "16", "--data.pad", "0"]
    (own / "weights.json").write_text("[1, 1, 1e-6]")
    main(
        [*given, "--run-dir", str(own / "run"), *SMALL, "--epochs", "4", "--evaluation.evaluate-every", "1"],
        "awp train",
    )
    said = capfd.readouterr().out
    assert "held-out accuracies weigh images by them, too" in said
    assert "under attack no test image is right of class '2' (12): it may need more training images" in said
    held_out = [m["held_out_clean_accuracy"] for m in read_metrics(own / "run")]
    # the third class counts next to nothing
    assert max(held_out) > 0.99


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        (
            "broken",
            r"own.py:broken: train item 3 raised OSError: truncated file \(.*own.py, line 11\)$",
        ),
        (
            "absent",
            r"own.py:absent: its call for train images raised FileNotFoundError: .*nowhere.* \(.*own.py, line 17\)$",
        ),
    ],
)
def test_an_error_of_the_users_code_names_the_item_and_their_line(own: Path, factory: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        load_data(DataConfig(name=f"{own / 'own.py'}:{factory}", root=own))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (("train/a/1.png", "train/b/1.png", "test/a/1.png"), "test has 1 class folder, a; .* the same as in train"),
        (
            ("train/a/1.png", "train/b/1.png"),
            r"test is not a directory; .* awp data split .*/train OUT divides the images into training and test",
        ),
        (("train/all.npz", "test/all.npz"), "train has no class folders; .* did you mean --data.name shards"),
    ],
)
def test_a_folder_that_lacks_something_says_what_to_do(tmp_path: Path, files: tuple[str, ...], told: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(DataError, match=told):
        load_data(DataConfig(name="folder", root=tmp_path))


def test_labels_that_start_at_one_are_said(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        np.savez(tmp_path / part / "all.npz", image=np.zeros((40, 4, 4, 3), np.uint8), label=np.arange(40) % 2 + 1)
    (note,) = label_notes(load_data(DataConfig(name="shards", root=tmp_path)))
    assert note == "no image has the label 0: labels count from 0, so make them start there and leave no gap"


def test_images_elsewhere_need_no_scan_of_a_run_that_left_files_out(tmp_path: Path) -> None:
    # the run's own folder is gone
    run = Config(data=DataConfig(name="folder", root=tmp_path / "photos", image_size=8, bad_files="skip"))
    for number, file in enumerate(("a/1.png", "a/2.png", "b/1.png", "b/2.png")):
        path = tmp_path / "photos-c/fog/1" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 99, 99)).save(path)
    assert len(open_data(run, "w", "folder-c", tmp_path / "photos-c", ("fog", 1)).test) == 4
    assert len(open_data(run, "w", None, tmp_path / "photos-c/fog/1").test) == 4


@pytest.mark.parametrize(("clean", "name"), [((4, 0, 0), "a"), ((3, 0, 0), None), ((4, 1, 0), None), ((0, 0, 0), None)])
def test_a_model_that_knows_one_class_is_told(clean: tuple[int, ...], name: str | None) -> None:
    rows = [{"class": c, "images": 4, "clean": right} for c, right in zip("abc", clean, strict=True)]
    nothing: Any = dict.fromkeys(("rows", "worst_over", "pictures"), ()) | {"gates": None, "per_image": None}
    found = Measurement(clean=sum(clean), not_finite=0, worst=0, images=12, per_class=rows, **nothing)
    assert found.constant_class() == name

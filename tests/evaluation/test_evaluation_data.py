"""What a finished run is measured on: a test part alone, corrupted test sets, and data that Python code makes."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run_command
from image_folders import picture
from numpy.lib.format import open_memmap
from PIL import Image

from awp_engine import checkpoint, load_model
from awp_engine.config import AttackConfig, Config, ConfigError, DataConfig, ModelConfig, to_json
from awp_engine.data import DataError, load_corrupted, load_dataset
from awp_engine.data.sets.cifar import CIFAR10, cifar_in, read_cifar
from awp_engine.evaluation.attacks import EvaluationError
from awp_engine.evaluation.foreign import Foreign
from awp_engine.evaluation.run import Evaluated, evaluate_checkpoint
from awp_engine.landscape.runs import open_runs
from awp_engine.models.trained import MODEL_FILE, ModelDescription

ROWS, SEVERITIES = 10_000, 5


def write_run(run_dir: Path, data: DataConfig, class_names: tuple[str, ...]) -> Path:
    """A run whose weights were not trained, with settings as its config.json says them."""
    run_dir.mkdir(parents=True)
    model = ModelConfig(name="preact-resnet-18", width=2)
    config = Config(run_dir=run_dir, data=data, model=model, attack=AttackConfig(epsilon="0.2", step_size="0.05"))
    (run_dir / "config.json").write_text(to_json(config))
    description = ModelDescription(
        name=model.name,
        num_classes=len(class_names),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        width=model.width,
        activation="relu",
        class_names=class_names,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = description.build().state_dict()
    checkpoint.export_model(run_dir / MODEL_FILE, weights, description.to_metadata())
    return run_dir


def measured(run: Path | None, **given) -> Evaluated:
    return evaluate_checkpoint(run, attacks=["clean"], gates_limit=None, **given)


def write_folder(part: Path, classes: str, images: int, first: int = 0) -> None:
    for number in range(images):
        folder = part / classes[number % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        picture(first + number, (16, 16)).save(folder / f"{number}.png")


@pytest.fixture
def folder_run(tmp_path: Path) -> tuple[Path, Path]:
    root = tmp_path / "images"
    write_folder(root / "train", "abc", 9)
    write_folder(root / "valid", "abc", 12, 100)
    return write_run(tmp_path / "run", DataConfig(name="folder", root=root), ("a", "b", "c")), root


def test_a_test_part_alone_is_enough(folder_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, root = folder_run
    told: list[str] = []
    whole = measured(run, say=told.append).measurement.rows[0].right
    assert told[0] == f"{root / 'valid'} is taken as the test split, as there is no test folder"
    for name, part in (("one", "test"), ("two", "validation"), ("three", ".")):
        shutil.copytree(root / "valid", tmp_path / name / part, dirs_exist_ok=True)
        told.clear()
        done = measured(run, data_root=tmp_path / name, say=told.append)
        assert done.measurement.rows[0].right == whole
        assert told[0] == f"{tmp_path / name} has no training images: its test images alone are used"
    shutil.rmtree(tmp_path / "one" / "test" / "a")
    done = measured(run, data_root=tmp_path / "one")
    assert done.report["receipt"]["data"]["class_names"] == "by name: folder has 2 of the weights' 3 classes"
    with pytest.raises(DataError, match="has no images to test on"):
        measured(run, data_root=tmp_path)
    # training needs both
    with pytest.raises(DataError, match=r"the class folders lie in .*three itself: move them into .*train"):
        load_dataset("folder", root=tmp_path / "three", held_out_fraction=0.0, seed=0)


def test_test_images_do_not_say_how_weights_want_them_normalised(folder_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, root = folder_run
    torch.save(load_model(run).state_dict(), tmp_path / "w.pt")
    (tmp_path / "own.py").write_text(FACTORY)
    shutil.copytree(root / "valid", tmp_path / "alone" / "test")

    def foreign(name: str, place: Path | None, **more: Any) -> Evaluated:
        made = Foreign(name="preact-resnet-18", weights=tmp_path / "w.pt", width=2, **more)
        given = {"epsilon": "1/5", "norm": "linf", "data_name": name, "data_root": place}
        return measured(None, foreign=made, output=tmp_path / "out", **given)

    for name, place in ((f"{tmp_path / 'own.py'}:make", None), ("folder", tmp_path / "alone")):
        for normalize in ("auto", "data"):
            with pytest.raises(ConfigError, match=r"^--model\.mean: .* has no training images .*normalize none$"):
                foreign(name, place, normalize=normalize)
        receipt = foreign(name, place, mean=(0.5,), std=(0.25,)).report["receipt"]
        assert receipt["normalisation"]["mean"] == [0.5] * 3
    # with a training part it does not depend on the images that are measured
    means = []
    for _ in range(2):
        means.append(foreign("folder", root).report["receipt"]["normalisation"]["mean"])
        shutil.rmtree(root / "valid")
        write_folder(root / "valid", "abc", 6, 50)
    assert means[0] == means[1] == pytest.approx(load_dataset("folder", root=root, held_out_fraction=0.0, seed=0).mean)
    # as ImageNet's do not either, whatever lies there
    data = load_dataset("imagenet", root=tmp_path / "alone", held_out_fraction=0.0, seed=0, need_train=False)
    assert (data.mean, data.of_test) == ((0.485, 0.456, 0.406), False)


def test_corrupted_folders_by_kind_and_severity(folder_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, root = folder_run
    for severity, shade in (("1", 0), ("3", 255)):
        for file in sorted((root / "valid").rglob("*.png")):
            copied = tmp_path / "c" / "fog" / severity / file.relative_to(root / "valid")
            copied.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (shade,) * 3).save(copied)
    given = {"data_name": "folder-c", "data_root": tmp_path / "c"}
    done = measured(run, **given, data_corruption="fog", data_severity=3)
    assert done.report["receipt"]["data"]["name"] == "folder-c fog 3"
    assert done.title.startswith("folder-c fog 3 test split")
    data = load_corrupted("folder-c", root=tmp_path / "c", kind="fog", severity=3)
    assert int(data.test.resident().images.min()) == 255
    for kind, severity, message in (
        ("snow", 1, r"--data.corruption: expected one of those in .*c: fog; got 'snow'"),
        (None, 1, "fog; got nothing"),
        ("fog", 2, r"--data.severity: expected one of those in .*fog: 1, 3; got 2"),
        ("fog", None, "1, 3; got nothing"),
    ):
        with pytest.raises(DataError, match=message):
            measured(run, **given, data_corruption=kind, data_severity=severity)
    with pytest.raises(EvaluationError, match=r"go with --data.name cifar10-c or .*, got folder"):
        measured(run, data_corruption="fog")


def test_cifar_c(tmp_path: Path) -> None:
    """Images of a severity are 10,000 rows of an array, whose other rows are not read."""
    images = open_memmap(tmp_path / "fog.npy", "w+", np.uint8, (SEVERITIES * ROWS, 32, 32, 3))
    images[2 * ROWS], images[3 * ROWS - 1, 0, 1, 2] = 7, 9
    images.flush()
    np.save(tmp_path / "labels.npy", np.arange(SEVERITIES * ROWS) % 10)
    data = load_corrupted("cifar10-c", root=tmp_path, kind="fog", severity=3)
    assert (len(data.train), len(data.test), data.class_names) == (0, ROWS, CIFAR10.class_names)
    assert (data.mean, data.std, data.of_test) == (CIFAR10.mean, CIFAR10.std, False)
    assert data.test.resident().images[0].unique().tolist() == [7]
    assert int(data.test.resident().images[-1, 2, 0, 1]) == 9
    assert data.test.labels[:12].tolist() == [*range(10), 0, 1]
    for name, kind, severity, message in (
        ("cifar10-c", "fog", 6, "one of those in .*fog.npy: 1, 2, 3, 4, 5; got 6"),
        ("cifar10-c", "snow", 1, "one of those in .*: fog; got 'snow'"),
    ):
        with pytest.raises(DataError, match=message):
            load_corrupted(name, root=tmp_path, kind=kind, severity=severity)
    np.save(tmp_path / "fog.npy", np.zeros((10, 32, 32, 3), np.uint8))
    with pytest.raises(DataError, match=r"fog.npy: the array is uint8 \[10, 32, 32, 3\]; expected uint8 \[50000"):
        load_corrupted("cifar10-c", root=tmp_path, kind="fog", severity=1)
    (tmp_path / "labels.npy").unlink()
    with pytest.raises(DataError, match=r"holds no cifar100-c; .*to get it: https://zenodo.org"):
        load_corrupted("cifar100-c", root=tmp_path, kind="fog", severity=1)


def test_cifars_test_file_alone(tmp_path: Path) -> None:
    layout = dataclasses.replace(CIFAR10, train_records=2, test_records=2)
    (tmp_path / "test_batch.bin").write_bytes(bytes([3] + 3072 * [1] + [4] + 3072 * [2]))
    raw = read_cifar(tmp_path, layout, need_train=False)
    assert (len(raw.train_images), raw.test_labels.tolist()) == (0, [3, 4])
    with pytest.raises(DataError, match=r"data_batch_1.bin is missing"):
        read_cifar(tmp_path, layout)
    assert cifar_in(tmp_path) == "cifar10"
    with pytest.raises(DataError, match=r"holds the files of cifar10, not class folders: give --data.name cifar10"):
        load_dataset("folder", root=tmp_path, held_out_fraction=0.0, seed=0)
    write_folder(tmp_path / "images" / "train", "abc", 3)
    with pytest.raises(
        DataError, match=r"holds no cifar10, but .*train has class folders of images: give --data.name f"
    ):
        load_dataset("cifar10", root=tmp_path / "images", held_out_fraction=0.0, seed=0)


FACTORY = """
from pathlib import Path
import numpy as np

Path(__file__).with_suffix(".ran").touch()

class Made(list):
    classes = ["a", "b", "c"]

def make(split):
    return Made((np.full((16, 16, 3), 40 * n, np.uint8), n % 3) for n in range(6))
"""


def test_code_that_a_runs_file_names_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, ran = tmp_path / "theirs.py", tmp_path / "theirs.ran"
    code.write_text(FACTORY)
    name = f"{code}:make"
    run = write_run(tmp_path / "run", DataConfig(name=name), ("a", "b", "c"))
    with pytest.raises(EvaluationError, match="code that is not run because a file names it"):
        measured(run)
    with pytest.raises(ConfigError, match="code that is not run because a file names it"):
        open_runs([run], which=None, device=torch.device("cpu"))
    for arguments in (["--config", run / "config.json"], ["--config", run / "config.json", "--data.flip"]):
        assert run_command("train", monkeypatch, *arguments) == 2
        assert "code that is not run because a file names it" in capsys.readouterr().err
    assert not ran.exists()
    done = measured(run, data_name=name)
    assert ran.exists()
    assert json.loads((done.output / "evaluation.json").read_text())["receipt"]["data"]["name"] == name
    (opened,) = open_runs([run], which=None, device=torch.device("cpu"), data_name=name)
    assert len(opened.data.train) > 0

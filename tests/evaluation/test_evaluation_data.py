"""What a finished run is measured on: a test part alone, corrupted test sets, and data that Python code makes."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
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
from awp_engine.data import DataError, Framing, Loading, load_corrupted, load_dataset, load_shifted
from awp_engine.data.sets.cifar import CIFAR10, cifar_in, read_cifar
from awp_engine.data.sets.imagenet import IMAGENET_STATISTICS
from awp_engine.data.sets.shifted import imagenet_wnids
from awp_engine.device import full_precision
from awp_engine.evaluation import corruptions
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.evaluation.corruptions import evaluate_corruptions
from awp_engine.evaluation.model.external import ExternalModel
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
    page = (run / "evaluation" / "evaluation.html").read_text()
    # two sets of photographs are both called folder
    assert "folder images, linf epsilon" in page.partition("</title>")[0]
    assert "folder images, test split, 12 images" in page
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
    with pytest.raises(DataError, match=r"the class folders lie in .*three itself: awp data split .*three OUT"):
        load_dataset("folder", root=tmp_path / "three", held_out_fraction=0.0, seed=0)


def test_images_that_are_not_where_the_run_says_are_asked_for(
    folder_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, root = folder_run
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "other", DataConfig(name="folder", root=Path("images")), ("a", "b", "c"))
    assert measured(Path("other")).measurement.rows[0].right >= 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    run, told = Path("../other"), r"says that its images are in images, as seen from the directory .* give --data.root$"
    with pytest.raises(EvaluationError, match=told):
        measured(run, again=True)
    with pytest.raises(EvaluationError, match=told):
        open_runs([run], which="best", device=torch.device("cpu"))
    assert measured(run, data_root=root, again=True).measurement.rows[0].right >= 0
    root.rename(tmp_path / "moved")
    with pytest.raises(EvaluationError, match=rf"says that its images are in {root}, which is no directory here"):
        measured(folder_run[0])


def test_test_images_do_not_say_how_weights_want_them_normalised(folder_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, root = folder_run
    torch.save(load_model(run).state_dict(), tmp_path / "w.pt")
    (tmp_path / "own.py").write_text(FACTORY)
    shutil.copytree(root / "valid", tmp_path / "alone" / "test")

    def external(name: str, place: Path | None, **more: Any) -> Evaluated:
        made = ExternalModel(**({"name": "preact-resnet-18", "weights": tmp_path / "w.pt", "width": 2} | more))
        given = {"epsilon": "1/5", "norm": "linf", "data_name": name, "data_root": place}
        return measured(None, external=made, output=tmp_path / "out", **given)

    for name, place in ((f"{tmp_path / 'own.py'}:make", None), ("folder", tmp_path / "alone")):
        for normalize in ("auto", "data"):
            with pytest.raises(ConfigError, match=r"^--model\.mean: .* no training images .*normalize none$"):
                external(name, place, normalize=normalize)
        receipt = external(name, place, mean=(0.5,), std=(0.25,)).report["receipt"]
        assert receipt["normalisation"]["mean"] == [0.5] * 3
        # nor are they the numbers that a file's are compared with
        weights = {"net": load_model(run).state_dict(), "mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)}
        torch.save(weights, tmp_path / "own-mean.pt")
        told = external(name, place, weights=tmp_path / "own-mean.pt").report["receipt"]["checkpoint"]["notes"]
        assert "normalisation of the file: mean (0.5, 0.5, 0.5), std (0.25, 0.25, 0.25)" in told
    # with a training part it does not depend on the images that are measured
    means = []
    for _ in range(2):
        means.append(external("folder", root).report["receipt"]["normalisation"]["mean"])
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


def write_corrupted(root: Path, kinds: dict[str, int], valid: Path) -> None:
    """The images of `valid`, of kinds whose five severities darken them more and more, up to a share of 1/`depth`."""
    for kind, depth in kinds.items():
        for severity in range(1, 6):
            for file in sorted(valid.rglob("*.png")):
                copied = root / kind / str(severity) / file.relative_to(valid)
                copied.parent.mkdir(parents=True, exist_ok=True)
                Image.open(file).point(lambda value, by=severity * depth: value // by).save(copied)


def test_all_corruptions_in_one_call(folder_run: tuple[Path, Path], tmp_path: Path, monkeypatch, capsys) -> None:
    run, root = folder_run
    write_corrupted(tmp_path / "c", {"fog": 1, "snow": 9, "spatter": 2}, root / "valid")
    given = {"data_name": "folder-c", "data_root": tmp_path / "c"}
    # as the command has it below
    full_precision()
    done = evaluate_corruptions(run, **given, device="cpu")
    single = {
        (kind, severity): measured(run, **given, data_corruption=kind, data_severity=severity).report
        for kind in ("fog", "snow", "spatter")
        for severity in range(1, 6)
    }
    for one in done.report["sets"]:
        report = single[one["kind"], one["severity"]]
        assert one["right"] == report["clean"]["right"]
        assert one["sha256"] == report["receipt"]["data"]["sha256_of_split"]
    errors = {
        kind: 1 - sum(single[kind, s]["clean"]["right"] for s in range(1, 6)) / (5 * 12) for kind in ("fog", "snow")
    }
    assert done.report["mean_over"] == ["fog", "snow"]
    assert done.report["mean_error"] == pytest.approx(sum(errors.values()) / 2)
    assert done.report["mce"] is None
    assert "keeps them for validation: spatter" in done.report["notes"][0]
    # the same command: nothing is measured again, but of images that are others now
    name = next((run / "evaluation").glob("corruptions-*.json")).name
    file = next((tmp_path / "c" / "fog" / "2").rglob("*.png"))
    Image.new("RGB", (16, 16)).save(file)
    calls = []
    monkeypatch.setattr(corruptions, "count_right", lambda *given: calls.append(given) or 12)
    command = [run, "--data.name", "folder-c", "--data.root", tmp_path / "c", "--data.corruption", "all"]
    assert run_command("evaluate", monkeypatch, *command, "--device", "cpu", "--attacks", "clean") == 0
    assert len(calls) == 1
    out = capsys.readouterr().out
    assert "mean of 2" in out
    assert "14 of 15 sets were measured before; --again measures them anew" in out
    report = json.loads((run / "evaluation" / name).read_text())
    assert report["receipt"]["resumed"] == {"sets": 14}
    assert [s["right"] for s in report["sets"] if (s["kind"], s["severity"]) == ("fog", 2)] == [12]
    assert "severity 5" in (run / "evaluation" / "corruptions.html").read_text()
    assert not list((run / "evaluation").glob("*.partial.json"))
    for more in (["--attacks", "pgd20"], ["--epsilon", "0.1"], ["--per-class"]):
        assert run_command("evaluate", monkeypatch, *command, *more) == 2
        assert f"measures clean accuracy alone, without {more[0]}" in capsys.readouterr().err


def test_a_killed_call_goes_on_with_the_sets_that_it_measured(folder_run, tmp_path: Path, monkeypatch) -> None:
    run, root = folder_run
    write_corrupted(tmp_path / "c", {"fog": 1}, root / "valid")
    given = {"data_name": "folder-c", "data_root": tmp_path / "c", "device": "cpu"}
    whole = evaluate_corruptions(run, **given, output=tmp_path / "whole").report["sets"]
    counted, real = [], corruptions.count_right

    def count(*of):
        if len(counted) == 3:
            raise KeyboardInterrupt
        counted.append(of)
        return real(*of)

    monkeypatch.setattr(corruptions, "count_right", count)
    with pytest.raises(KeyboardInterrupt):
        evaluate_corruptions(run, **given)
    counted.clear()
    assert evaluate_corruptions(run, **given).report["sets"] == whole
    assert len(counted) == 2


def test_mean_corruption_error_by_hand() -> None:
    def sets(kinds, right=250, severities=range(1, 6)):
        return [
            corruptions.CorruptedSet(kind=kind, severity=s, images=1000, right=right, sha256="")
            for kind in kinds
            for s in severities
        ]

    found = corruptions.summary("imagenet-c", sets([*corruptions.ALEXNET, "saturate"]))
    assert found["mean_error"] == pytest.approx(0.75)
    # 0.75 / 0.886428, and so on for 15 kinds
    assert found["kinds"][0]["corruption_error"] == pytest.approx(0.846092)
    assert found["mce"] == pytest.approx(sum(0.75 / error for error in corruptions.ALEXNET.values()) / 15)
    # AlexNet itself has 1
    exact = [s for kind, error in corruptions.ALEXNET.items() for s in sets([kind], round(1000 * (1 - error)))]
    assert corruptions.summary("imagenet-c", exact)["mce"] == pytest.approx(1, abs=1e-3)
    for name, others in (
        ("cifar10-c", sets(corruptions.ALEXNET)),
        ("imagenet-c", sets(corruptions.ALEXNET, severities=(1, 2))),
        ("imagenet-c", sets(["fog"])),
    ):
        assert corruptions.summary(name, others)["mce"] is None
    assert (
        "does not compare with published means: gaussian_noise"
        in corruptions.summary("imagenet-c", sets(["fog"]))["notes"][0]
    )
    assert (
        "fewer than five severities: fog 1 2"
        in corruptions.summary("folder-c", sets(["fog"], severities=(1, 2)))["notes"][0]
    )


@pytest.fixture
def imagenet_run(tmp_path: Path) -> Path:
    """A model of ImageNet's classes."""
    return write_run(tmp_path / "run", DataConfig(name="imagenet", root=tmp_path, image_size=16), imagenet_wnids())


def write_wnids(root: Path, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        picture(number, (20 + number % 2, 24)).save(root / name / "1.png")


def test_imagenet_a_is_measured_among_its_200_classes(imagenet_run: Path, tmp_path: Path) -> None:
    wnids = imagenet_wnids()
    chosen = sorted(wnids[number] for number in torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:200])
    write_wnids(tmp_path / "a", chosen)
    given = {"data_name": "imagenet-a", "data_root": tmp_path / "a", "device": "cpu"}
    done = measured(imagenet_run, **given, transfer_to=imagenet_run)
    # by hand: the largest of these 200 logits
    data = load_shifted("imagenet-a", root=tmp_path / "a", loading=Loading(framing=Framing(size=16))).test.resident()
    kept = torch.tensor([wnids.index(name) for name in chosen])
    assert data.labels.tolist() == kept.tolist()
    with torch.no_grad():
        logits = load_model(imagenet_run)(data.images / 255)
    right = int((kept[logits[:, kept].argmax(1)] == data.labels).sum())
    assert right > int((logits.argmax(1) == data.labels).sum())
    assert done.measurement.rows[0].right == right
    assert (
        "the 200 classes of imagenet-a, of the model's 1000, alone compete"
        in done.report["receipt"]["data"]["class_names"]
    )
    assert len(done.measurement.per_class) == 200
    # what is not whole would be easier
    shutil.rmtree(tmp_path / "a" / chosen[0])
    with pytest.raises(DataError, match=r"a has 199 class folders; expected the 200 of imagenet-a"):
        measured(imagenet_run, **given)
    (tmp_path / "a" / chosen[1]).rename(tmp_path / "a" / "n99999999")
    with pytest.raises(DataError, match=r"n99999999: expected folders by WordNet id such as n01440764, or by number"):
        measured(imagenet_run, **given)


def test_imagenet_v2s_folders_are_numbers_of_classes(imagenet_run: Path, tmp_path: Path, monkeypatch) -> None:
    write_wnids(tmp_path / "v2", [str(number) for number in range(1000)])
    data = load_shifted("imagenet-v2", root=tmp_path / "v2", loading=Loading(framing=Framing(size=16)))
    # not 0, 1, 10, 100, 101, as their names are sorted
    assert data.test.labels[:4].tolist() == [0, 1, 10, 100]
    assert data.class_names == imagenet_wnids()
    # weights that name no classes
    torch.save(load_model(imagenet_run).state_dict(), tmp_path / "w.pt")
    command = ["--model.name", "preact-resnet-18", "--model.width", "2", "--weights", tmp_path / "w.pt"]
    command += ["--data.name", "imagenet-v2", "--data.root", tmp_path / "v2", "--norm", "linf", "--epsilon", "4/255"]
    command += ["--attacks", "clean", "--no-gates", "--device", "cpu", "--output", tmp_path / "out"]
    assert run_command("evaluate", monkeypatch, *command) == 2
    assert run_command("evaluate", monkeypatch, *command, "--data.image-size", "16") in (0, 3)
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["receipt"]["data"]["class_names"].startswith("unknown: the weights hold none")
    # taken in the order of public models
    data = load_shifted("imagenet-v2", root=tmp_path / "v2", loading=Loading(framing=Framing(size=16))).test.resident()
    model = load_model(imagenet_run)
    model.normalize_by_(*IMAGENET_STATISTICS)
    with torch.no_grad():
        assert report["clean"]["right"] == int((model(data.images / 255).argmax(1) == data.labels).sum())


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
    with pytest.raises(EvaluationError, match="code that is not run because a file names it"):
        open_runs([run], device=torch.device("cpu"))
    for arguments in (["--config", run / "config.json"], ["--config", run / "config.json", "--data.flip"]):
        assert run_command("train", monkeypatch, *arguments) == 2
        assert "code that is not run because a file names it" in capsys.readouterr().err
    assert not ran.exists()
    done = measured(run, data_name=name)
    assert ran.exists()
    assert json.loads((done.output / "evaluation.json").read_text())["receipt"]["data"]["name"] == name
    # a path may be longer than a file's name
    assert list(done.output.glob("evaluation-theirs_py_make-*.json"))
    (opened,) = open_runs([run], device=torch.device("cpu"), data_name=name)
    assert len(opened.data.train) > 0

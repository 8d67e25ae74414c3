"""Labels mean what the weights were trained on: class names in files, and what compares them."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from awp_engine import checkpoint, load_model
from awp_engine.checkpoint import CheckpointError
from awp_engine.cli.checkpoint import main as checkpoint_command
from awp_engine.cli.data import main as data_command
from awp_engine.config import AttackConfig, Config, ConfigError, DataConfig, EvaluationConfig, ModelConfig
from awp_engine.data import DataError, eval_batches, load_dataset, load_extra, match_classes
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.evaluation.run import evaluate_checkpoint
from awp_engine.landscape.runs import common_images, open_runs
from awp_engine.models import build_model, load_pretrained
from awp_engine.models.class_names import difference
from awp_engine.models.trained import MODEL_FILE, ModelDescription
from awp_engine.train.trainer import Trainer

ANIMALS = ("cat", "dog", "eel")
# any text but what no file system or JSON could hold; surrogates are bytes that are not UTF-8
TEXT = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=12) | st.sampled_from(
    ["\udcff\udc80", "a\nb", "\x1b[31m", "<script>", "[bold]", "[/]", "$\\foo$", "_x", "", "x" * 3000]
)


def description(names: tuple[str, ...] | None, classes: int = 3, channels: int = 3) -> ModelDescription:
    return ModelDescription(
        name="preact-resnet-digits",
        num_classes=classes,
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        width=1,
        activation="relu",
        class_names=names,
    )


def weights(path: Path, names: tuple[str, ...] | None, *, seed: int = 0, classes: int = 3) -> Path:
    """Random weights with these names in their file."""
    made = description(names, classes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = made.build()
    state = model.state_dict()
    state["linear.bias"].zero_()
    checkpoint.export_model(path, state, made.to_metadata())
    return path


def write_folder(root: Path, names: tuple[str, ...] = ANIMALS, count: int = 6) -> Path:
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in names:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                # of a colour of its own, so that random weights tell some apart
                pixels = generator.integers(0, 60, (8, 8, 3)) + generator.integers(0, 196, (1, 1, 3))
                pixels = pixels.astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("animals"))


def folder_data(root: Path, name: str = "folder"):
    return load_dataset(name, root=root, held_out_fraction=0.0, seed=0)


@given(names=st.lists(TEXT, min_size=2, max_size=6, unique=True).map(tuple))
@settings(max_examples=8)
def test_any_names_come_back(tmp_path_factory: pytest.TempPathFactory, names: tuple[str, ...]) -> None:
    path = tmp_path_factory.mktemp("weights")
    weights(path / "model.safetensors", names, classes=len(names))
    assert load_model(path / "model.safetensors").class_names == names
    made = description(names, len(names))
    groups = {group: made.build().state_dict() for group in ("model", "best_model")}
    saved = checkpoint.save(path / "checkpoints", "epoch-1", groups, made.to_metadata(), checkpoint.Retention())
    assert load_model(saved).class_names == names
    for which in groups:
        exported = path / f"exported-{which}.safetensors"
        assert checkpoint_command(["export", str(path), str(exported), "--weights", which]) == 0
        assert load_model(exported).class_names == names


def test_a_thousand_names_and_none(tmp_path: Path) -> None:
    names = tuple(f"{number:04}{'ä' * 120}" for number in range(1000))
    assert load_model(weights(tmp_path / "many.safetensors", names, classes=1000)).class_names == names
    assert load_model(weights(tmp_path / "old.safetensors", None)).class_names is None


@pytest.mark.parametrize("text", ['["a"]', '["a", "a", "b"]', '["a", "b", 3]', "{}", "[[[", '{"0": "a"}', "null"])
def test_names_that_do_not_fit_the_weights_are_refused(tmp_path: Path, text: str) -> None:
    made = description(None)
    checkpoint.export_model(
        tmp_path / "w.safetensors", made.build().state_dict(), made.to_metadata() | {"class_names": text}
    )
    with pytest.raises(CheckpointError, match=r"w\.safetensors: expected weights written by this program"):
        load_model(tmp_path / "w.safetensors")


def test_labels_are_matched_by_name(folder: Path) -> None:
    """Every image keeps its class's name, whatever the order of the weights' classes and how many more they know."""
    found = load_dataset("folder", root=folder, held_out_fraction=0.2, seed=0)
    for names in [*itertools.permutations(ANIMALS), *itertools.permutations((*ANIMALS, "ant", "\udcff"))]:
        matched, how = match_classes(names, found, "it")
        assert matched.class_names == names
        assert (how == "the same") == (names == ANIMALS)
        for part in ("train", "held_out", "test"):
            before, after = getattr(found, part), getattr(matched, part)
            assert [names[label] for label in after.labels] == [ANIMALS[label] for label in before.labels]
            assert torch.equal(before.ids, after.ids)


def test_evaluation_is_by_name(tmp_path: Path, folder: Path) -> None:
    """The model of {cat, dog, eel}, and what other orders and sets of names make of its weights."""

    def evaluated(names: tuple[str, ...] | None, root: Path = folder, **more):
        path = weights(tmp_path / "w.safetensors", names)
        done = evaluate_checkpoint(
            path,
            attacks=["clean"],
            epsilon="8/255",
            norm="linf",
            gates_limit=None,
            data_name="folder",
            data_root=root,
            output=tmp_path / "out",
            say=said.append,
            **more,
        )
        return done.measurement.clean, done.report["receipt"]["data"]["class_names"]

    said: list[str] = []
    counts: list[int] = []
    model = load_model(weights(tmp_path / "w.safetensors", ANIMALS))
    split = folder_data(folder).test
    predictions = torch.cat([model(batch.images).argmax(1) for batch in eval_batches(split, 9)])
    assert len(predictions.unique()) > 1
    for names in (ANIMALS, ("dog", "eel", "cat")):
        right = sum(names[p] == ANIMALS[label] for p, label in zip(predictions, split.labels, strict=True))
        clean, how = evaluated(names)
        assert clean == right
        assert ("the same" in how) == (names == ANIMALS)
        counts.append(clean)
    assert counts[0] != counts[1]
    assert said.count("class names: by name: folder has the weights' classes in another order") == 1
    # some of the classes
    pair = write_folder(tmp_path / "pair", ("cat", "eel"))
    split = folder_data(pair).test
    predictions = torch.cat([model(batch.images).argmax(1) for batch in eval_batches(split, 9)])
    right = sum(ANIMALS[p] == ("cat", "eel")[label] for p, label in zip(predictions, split.labels, strict=True))
    assert evaluated(ANIMALS, pair)[0] == right
    assert "class names: by name: folder has 2 of the weights' 3 classes" in said
    # another set
    with pytest.raises(DataError, match="trained on other classes than those of folder: 'wolf' where the other has"):
        evaluated(("cat", "dog", "wolf"))
    assert "unknown: the weights hold none" in evaluated(None)[1]
    # a second model of the same images
    others = weights(tmp_path / "second.safetensors", ("dog", "cat", "eel"), seed=1)
    with pytest.raises(EvaluationError, match=r"--transfer-to .*in another order: class 0 is 'dog', not 'cat'"):
        evaluated(ANIMALS, transfer_to=others)
    evaluated(ANIMALS, transfer_to=weights(tmp_path / "second.safetensors", ANIMALS, seed=1))


def test_difference() -> None:
    assert difference(ANIMALS, ANIMALS) == ""
    assert difference(("dog", "cat", "eel"), ANIMALS) == (
        "the same names in another order: class 0 is 'dog', not 'cat'"
    )
    assert difference(("cat", "dog"), ANIMALS) == "it lacks 'eel'"
    assert difference((*ANIMALS, "\udcff\n"), ANIMALS) == r"'\\udcff\\n' more"
    names = [f"n{number}" for number in range(9)]
    assert difference(names, ["a", "b"]) == "'n0', 'n1', 'n2' and 6 more where the other has 'a', 'b'"
    assert len(difference(["x" * 9999], ["y"])) < 100


def test_a_classifier_of_other_classes_starts_anew(tmp_path: Path) -> None:
    """Fine-tuning from pretrained weights: the last layer is kept only where its outputs mean the same."""
    path = weights(tmp_path / "w.safetensors", ANIMALS)
    stored = load_model(path).state_dict()
    for names, classes, kept in [
        (ANIMALS, 3, True),
        (None, 3, True),
        (("dog", "cat", "eel"), 3, False),
        (("cat", "dog", "wolf"), 3, False),
        (("cat", "dog"), 2, False),
    ]:
        model = description(names, classes).build()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        new = load_pretrained(model, path, names).kept
        assert new == (() if kept else ("linear.weight", "linear.bias"))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name] if name in new else stored[name])
    wide = build_model("wrn-10-1", 3, (0.5,) * 3, (0.5,) * 3)
    checkpoint.export_model(tmp_path / "wide.safetensors", wide.state_dict(), description(ANIMALS).to_metadata())
    other = build_model("wrn-10-1", 5, (0.5,) * 3, (0.5,) * 3)
    assert load_pretrained(other, tmp_path / "wide.safetensors").kept == ("fc.weight", "fc.bias")


def config(root: Path, run_dir: Path, name: str = "folder") -> Config:
    return Config(
        run_dir=run_dir,
        epochs=1,
        global_batch_size=9,
        device="cpu",
        data=DataConfig(name=name, root=root, pad=0, flip=False, held_out_fraction=0.2),
        model=ModelConfig(width=1),
        attack=AttackConfig(steps=1),
        evaluation=EvaluationConfig(steps=1),
    )


def test_a_run_keeps_the_names_and_goes_on_only_with_them(tmp_path: Path, folder: Path) -> None:
    root = shutil.copytree(folder, tmp_path / "data")
    run = tmp_path / "run"
    Trainer(config(root, run)).run()
    for place in (run, run / MODEL_FILE, run / "checkpoints" / "epoch-1"):
        assert load_model(place).class_names == ANIMALS
    given = ModelConfig(width=1, pretrained=run / MODEL_FILE)
    for part in ("train", "test"):
        (root / part / "dog").rename(root / part / "wolf")
    with pytest.raises(ConfigError, match="trained on other images, of other classes: the data now have 'wolf' where"):
        Trainer(config(root, run))
    other = config(root, tmp_path / "other")
    tuned = Trainer(Config(**{**vars(other), "model": given}))
    assert any("new, for 3 classes: linear.weight, linear.bias" in message for message in tuned.messages)
    # a landscape of the run measures on what it was trained on, or not at all
    with pytest.raises(DataError, match=r"run: was trained on other classes than those of folder: 'dog' where"):
        open_runs([run], device=torch.device("cpu"))


def test_runs_of_other_labels_are_not_compared(tmp_path: Path, folder: Path) -> None:
    runs = [tmp_path / "first", tmp_path / "second"]
    Trainer(config(folder, runs[0])).run()
    shutil.copytree(runs[0], runs[1])
    weights(runs[1] / MODEL_FILE, ("eel", "dog", "cat"))
    opened = open_runs(runs, device=torch.device("cpu"))
    with pytest.raises(DataError, match=r"second: its test images .* are not those of"):
        common_images(opened, "test", 9)
    weights(runs[1] / MODEL_FILE, (*ANIMALS, "fox"), classes=4)
    opened = open_runs(runs, device=torch.device("cpu"))
    with pytest.raises(DataError, match=r"second: its classes are not those of .*first: 'fox' more"):
        common_images(opened, "test", 9)


def test_stores_without_names_have_none_and_packs_have_the_folders(tmp_path: Path) -> None:
    names = (r"$\foo$", "a\nb", "cat")
    root = write_folder(tmp_path / "folder", names)
    assert folder_data(root).class_names == names
    for form, name in (("npy", "shards"), ("tar", "webdataset")):
        out = tmp_path / form
        assert data_command(["pack", str(root), "--out", str(out), "--format", form, "--workers", "1"]) == 0
        data = folder_data(out, name)
        assert (data.named, data.class_names) == (True, names)
        assert match_classes(names, data, "it")[1] == "the same"
        (out / "classes.json").unlink()
        data = folder_data(out, name)
        assert (data.named, data.class_names) == (False, ("0", "1", "2"))
        assert match_classes(names, data, "it") == (
            data,
            f"unknown: {name} has none, so labels are compared as numbers",
        )
    # what is trained on numbers says so
    assert Trainer(config(tmp_path / "npy", tmp_path / "run", "shards")).description.class_names is None


def test_bytes_that_are_not_utf_8_are_names(tmp_path: Path) -> None:
    names = ("a", "b\udcff")
    root = write_folder(tmp_path, names)
    assert folder_data(root).class_names == names


def test_extra_images_of_other_classes_are_refused(tmp_path: Path, folder: Path) -> None:
    assert (
        data_command(["pack", str(folder), "--out", str(tmp_path / "packed"), "--format", "npy", "--workers", "1"]) == 0
    )
    extra, like = tmp_path / "packed" / "train", folder_data(folder)
    assert len(load_extra(extra, like=like)) == 18
    (tmp_path / "packed" / "classes.json").write_text(json.dumps(["dog", "cat", "eel"]))
    with pytest.raises(DataError, match=r"--data\.extra .*classes\.json are not those of folder: the same names in"):
        load_extra(extra, like=like)

"""A run trains anybody's classifier, says what it made of it, and its weights never bring code along."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import own_models
import pytest
import torch
from places import ROOT
from ranks import run_ranks
from test_resume import resumed_everywhere

from awp_engine import load_model
from awp_engine.checkpoint import CheckpointError, export_model, read_model
from awp_engine.cli.checkpoint import main as checkpoint_command
from awp_engine.cli.command_line import parse_train
from awp_engine.config import (
    AttackConfig,
    AwpConfig,
    Config,
    ConfigError,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    ModelConfig,
    PrecisionConfig,
    to_json,
)
from awp_engine.config.model_names import source_of
from awp_engine.data import load_data
from awp_engine.evaluation.model.external import ExternalModel, load_external
from awp_engine.evaluation.model.loaded_model import load_trained
from awp_engine.models import WrappedClassifier, build_model
from awp_engine.models.trained import MODEL_FILE, ModelDescription
from awp_engine.models.user_code import code_of
from awp_engine.observe.report import REPORT
from awp_engine.step.precision import Precision
from awp_engine.train.network import build_network
from awp_engine.train.run_dir import finished_report
from awp_engine.train.trainer import Trainer

IMAGES = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SMALL = Config(
    device="cpu",
    epochs=1,
    global_batch_size=20,
    data=DataConfig(train_limit=40),
    attack=AttackConfig(steps=1),
    awp=AwpConfig(gamma=0.005),
    evaluation=EvaluationConfig(steps=1, held_out_limit=8, test_limit=8),
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the file of models in it."""
    shutil.copy(own_models.__file__, tmp_path / "net.py")
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        # else a later test would import the net.py of an earlier one
        patch.setattr(sys, "path", [*sys.path])
        yield tmp_path


def config(name: str, **changes) -> Config:
    model = ModelConfig(name=name, **changes.pop("model", {}))
    return dataclasses.replace(SMALL, model=model, run_dir=Path("run"), **changes)


def trained(name: str, **changes) -> Trainer:
    trainer = Trainer(config(name, **changes))
    trainer.run()
    return trainer


def refusal(name: str, **changes) -> str:
    with pytest.raises(ConfigError) as refused:
        Trainer(config(name, **changes))
    assert not Path("run").exists()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_run_of_ones_own_model_needs_no_further_word(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained("net.py:Net")
    told = "\n".join(trainer.messages)
    assert "mean 0.3" in told
    assert "those of digits" in told
    assert "does not take channels_last" in told
    assert (
        "AWP perturbs 3 of 10 tensors, 97.1% of parameters; left out: conv1.bias, norm1.weight, norm1.bias and 4"
        in told
    )
    monkeypatch.chdir("/")
    model = load_model(here / "run")
    assert isinstance(model, WrappedClassifier)
    assert not model.training
    expected = trainer.model.eval()(IMAGES)
    torch.testing.assert_close(model(IMAGES), expected)
    assert load_trained(here / "run").architecture == "net.py:Net"
    checkpoint_command(["export", str(here / "run"), str(here / "out.safetensors")])
    assert torch.equal(load_model(here / "out.safetensors")(IMAGES), model(IMAGES))


def test_a_module_is_found_in_the_working_directory_and_again_from_elsewhere(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "__init__.py").touch()
    shutil.copy("net.py", here / "mine" / "nets.py")
    trained("mine.nets:Attention")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert load_model(here / "run").name == "mine.nets:Attention"
    # what was made for one size says so of others
    with pytest.raises(ConfigError, match="was made for images of 8x8 pixels, got 9x8"):
        load_model(here / "run")(torch.rand(1, 1, 9, 8))


def test_code_is_run_for_nobody_but_who_trained_by_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("net.py:Net").model.eval()
    # as another user's, who has none
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "other"))
    with pytest.raises(
        CheckpointError, match=r"code, 'net\.py:Net', which is not run.*not trained by you.*--model\.name"
    ):
        load_model("run")
    assert not (here / "other").exists()
    given = ["net.py:Net", own_models.Net, own_models.Net(), lambda num_classes: own_models.Net(num_classes)]
    for one in given:
        assert torch.equal(load_model("run", model=one)(IMAGES), model(IMAGES))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_model("run", model="net.py:Attention")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    (here / "net.py").write_text((here / "net.py").read_text() + "# changed\n")
    with pytest.raises(CheckpointError, match=r"net\.py has changed since"):
        load_model("run")
    with pytest.raises(ConfigError, match=r"run was trained by other code of --model\.name net\.py:Net; restore"):
        Trainer(config("net.py:Net"))


@pytest.mark.parametrize("name", ["evil.py:Net", "evil:Net"])
@pytest.mark.parametrize("seal", [None, "0" * 64, "of another description"])
def test_a_file_that_names_code_runs_none(here: Path, name: str, seal: str | None) -> None:
    (here / "evil.py").write_text("open('ran', 'w')\nfrom net import Net\n")
    model = build_model("net.py:Net", 10, [0.5], [0.5])
    fields = {"name": name, "num_classes": 10, "mean": [0.5], "std": [0.5], "width": None, "activation": "relu"}
    if seal is not None:
        evil = code_of(here / "evil.py")
        mine = ModelDescription(**{**fields, "name": "net.py:Net"}, code=code_of(here / "net.py")).sealed()
        assert mine.is_sealed()
        fields |= {"code": dataclasses.asdict(evil), "seal": mine.seal if seal.startswith("of") else seal}
    export_model(here / "evil.safetensors", model.state_dict(), {"model": json.dumps(fields)})
    with pytest.raises(CheckpointError, match="is not run because a file says so"):
        load_model("evil.safetensors")
    assert not (here / "ran").exists()
    # nor by a file of settings
    (here / "evil.json").write_text(to_json(dataclasses.replace(SMALL, model=ModelConfig(name=name))))
    with pytest.raises(SystemExit):
        parse_train(["--config", "evil.json"])
    assert parse_train(["--config", "evil.json", "--model.name", name]).model.name == name


@pytest.mark.parametrize("world", [1, 2])
def test_dropout_repeats_its_bits_after_an_interruption(here: Path, world: int) -> None:
    changed = dataclasses.replace(
        config(f"{own_models.__file__}:Attention", epochs=2), checkpoint_steps=1, keep_checkpoints=100
    )
    if world == 1:
        compared, wrong = resumed_everywhere(0, 1, here, changed, 2)
    else:
        compared, wrong = run_ranks(resumed_everywhere, world, here, changed, 2, timeout=270)[0]
    assert compared >= 2
    assert not wrong


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a_tuple", "returns tuple for one image"),
        ("a_dict", "returns dict for one image"),
        ("of_pixels", r"returns Tensor of shape [1, 10, 1] for one image"),
        ("in_training", "returns tuple in train mode"),
        ("probabilities", "expected logits, got rows of probabilities"),
        ("not_finite", "not finite for an image of zeros"),
        ("no_gradient", "do not depend on the image by operations that have a gradient"),
        ("nothing", "returned NoneType; expected a torch.nn.Module"),
        ("needs_depth", "missing 1 required positional argument: 'depth'"),
        ("fails", "the call with (num_classes=10) raised OSError: no disk of that name ("),
        ("unclear", "gives 36 logits, the data have 10 classes, and which layer to replace is not clear"),
        ("made", "is Net; expected a function or a class"),
        ("Nett", "has no Nett; did you mean Net?"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(name: str, told: str) -> None:
    message = refusal(f"net.py:{name}")
    assert told in message
    assert message.startswith("--model.name: ")


def test_other_refusals(here: Path) -> None:
    (here / "wrong.py").write_text("import torch\n\n1 / 0\n")
    assert "its import raised ZeroDivisionError: division by zero (" in refusal("wrong.py:Net")
    assert f"{here / 'wrong.py'}, line 3)" in refusal("wrong.py:Net")
    assert "expected a Python file" in refusal("none.py:Net")
    assert "No module named 'none'" in refusal("none:Net")
    bf16 = PrecisionConfig(attack="bf16")
    assert refusal("net.py:half", precision=bf16).startswith("--precision.attack: fp32 is needed, as in torch.bfloat16")
    assert "expected one number a channel, 1, got 3" in refusal(
        "net.py:Net", model={"mean": (0.5,) * 3, "std": (1,) * 3}
    )
    assert "holds no mean and deviation" in refusal("net.py:Net", model={"normalize": "model"})
    assert "no trainable parameter matches 'fc.w'" in refusal("net.py:Net", awp=AwpConfig(layers=("fc.w",)))
    with pytest.raises(ConfigError, match=r"--model\.width: expected nothing with --model\.name net\.py:Net"):
        ModelConfig(name="net.py:Net", width=4)
    with pytest.raises(
        ConfigError, match=r"--model\.name: expected a built-in model with --distributed\.strategy fsdp"
    ):
        Config(model=ModelConfig(name="net.py:Net"), distributed=DistributedConfig(strategy="fsdp"))
    with pytest.raises(ConfigError, match=r"timm:NAME, torchvision:NAME, package\.module:factory or file\.py:factory"):
        ModelConfig(name="resnet18")


def test_names_are_told_apart() -> None:
    names = {
        "timm:resnet18.a1_in1k": "timm",
        "torchvision:vit_b_16": "torchvision",
        "a.b:C.d": "module",
        "some dir/net.py:make": "file",
        "resnet-18": "built-in",
        "timm:hf-hub:x/y": None,
        "timm:../x": None,
        "net.py": None,
        "a:b()": None,
        "wrn-29-10": None,
    }
    assert {name: source_of(name) for name in names} == names


def test_another_number_of_classes_gets_a_new_last_layer() -> None:
    trainer = Trainer(config("net.py:seventeen"))
    assert "net.py:seventeen: its layer fc, of 17 classes, is replaced by a new one of 10" in trainer.messages
    assert trainer.model(IMAGES).shape == (3, 10)


@pytest.mark.parametrize(
    ("name", "given", "expected", "told"),
    [
        ("Normalizing", {}, ((0.0,), (1.0,)), "normalises images by itself, in Normalizing (mean 0.25, deviation 0.5)"),
        ("Normalizing", {"normalize": "data"}, None, "those of digits"),
        ("Net", {}, None, "those of digits"),
        ("Net", {"normalize": "none"}, ((0.0,), (1.0,)), "images are not normalised"),
        ("Net", {"mean": (0.25,), "std": (0.5,)}, ((0.25,), (0.5,)), "as given"),
    ],
)
def test_what_normalises_images_is_chosen_and_said(name: str, given: dict, expected: tuple | None, told: str) -> None:
    trainer = Trainer(config(f"net.py:{name}", model=given))
    data = trainer.data
    assert any(told in message for message in trainer.messages)
    found = trainer.description.mean, trainer.description.std
    assert found == (expected or (data.mean, data.std))
    plain = trainer.model.network.eval()
    mean, std = (torch.tensor(value).view(1, -1, 1, 1) for value in found)
    torch.testing.assert_close(trainer.model.eval()(IMAGES), plain((IMAGES - mean) / std))


DIGITS, NOTHING, GIVEN, BESIDE, HEADER = ("digits",), (0.0, 1.0), (0.25, 0.5), (0.4, 0.2), (0.6, 0.8)


@pytest.mark.parametrize(
    ("name", "file", "flags", "expected", "whose"),
    [
        ("net.py:Net", "bare", {}, DIGITS, "the data set's"),
        ("net.py:Net", "beside", {}, BESIDE, "the file's"),
        ("net.py:Net", "header", {}, HEADER, "the file's"),
        ("net.py:Net", "beside", {"mean": (0.25,), "std": (0.5,)}, GIVEN, "as given"),
        ("net.py:Net", "header", {"mean": (0.25,), "std": (0.5,)}, GIVEN, "as given"),
        ("net.py:Net", "beside", {"normalize": "none"}, NOTHING, "none, as given"),
        ("net.py:Net", "header", {"normalize": "data"}, DIGITS, "the data set's"),
        ("net.py:Normalizing", "bare", {}, NOTHING, "the network's own"),
        ("net.py:Normalizing", "header", {}, HEADER, "the file's"),
        ("net.py:Normalizing", "header", {"normalize": "model"}, NOTHING, "the network's own"),
        ("net.py:Normalizing", "bare", {"normalize": "data"}, DIGITS, "the data set's"),
        ("net.py:Misnamed", "bare", {}, DIGITS, "the data set's"),
        ("net.py:Misnamed", "beside", {}, BESIDE, "the file's"),
        ("net.py:given", "bare", {}, GIVEN, "the network's own"),
        ("net.py:given", "beside", {}, BESIDE, "the file's"),
        ("net.py:given", "bare", {"normalize": "model"}, GIVEN, "the network's own"),
        ("net.py:given", "bare", {"normalize": "none"}, NOTHING, "none, as given"),
        ("preact-resnet-digits", "bare", {}, DIGITS, "the data set's"),
        ("preact-resnet-digits", "beside", {}, BESIDE, "the file's"),
        ("preact-resnet-digits", "header", {}, HEADER, "the file's"),
        ("preact-resnet-digits", "header", {"mean": (0.25,), "std": (0.5,)}, GIVEN, "as given"),
    ],
)
def test_training_and_measuring_choose_one_normalisation(
    here: Path, name: str, file: str, flags: dict, expected: tuple, whose: str
) -> None:
    data, cpu, width = load_data(DataConfig()), torch.device("cpu"), 2 if name.startswith("preact") else None
    if expected == DIGITS:
        expected = (data.mean[0], data.std[0])
    weights = build_model(name, 10, data.mean, data.std, width=width, image_size=(8, 8)).state_dict()
    path = here / ("w.safetensors" if file == "header" else "w.pt")
    if file == "header":
        fields = {"name": name, "num_classes": 10, "mean": [0.6], "std": [0.8], "width": width, "activation": "relu"}
        export_model(path, weights, {"model": json.dumps(fields)})
    else:
        beside = {} if file == "bare" else {"mu": torch.tensor([0.4]), "sigma": torch.tensor([0.2])}
        torch.save(weights | beside, path)
    trains = build_network(config(name, model={"pretrained": path, "width": width, **flags}), data, cpu, Precision())
    external = load_external(ExternalModel(name=name, weights=path, width=width, **flags), data, cpu)
    for model in (trains.model, external.model):
        torch.testing.assert_close([model.mean.item(), model.std.item()], [*expected])
    torch.testing.assert_close([*trains.description.mean, *trains.description.std], [*expected])
    assert external.origin is not None
    assert external.origin["normalisation_is"] == whose
    assert any(message in external.origin["notes"][-1] for message in trains.messages)
    torch.testing.assert_close(external.model(IMAGES), trains.model.eval()(IMAGES))


@pytest.mark.parametrize("change", ["removed", "other"])
def test_a_run_goes_on_without_the_weights_it_started_from(here: Path, change: str) -> None:
    start = here / "start.safetensors"
    for mean in (0.25, 0.75):
        fields = {"name": "x", "num_classes": 10, "mean": [mean], "std": [0.5], "width": None, "activation": "relu"}
        weights = build_model("net.py:Net", 10, [0.5], [0.5], image_size=(8, 8)).state_dict()
        export_model(here / f"{mean}.safetensors", weights, {"model": json.dumps(fields)})
    shutil.copy(here / "0.25.safetensors", start)
    settings = dataclasses.replace(config("net.py:Net", model={"pretrained": start}), epochs=2, run_dir=here / "whole")
    Trainer(settings).run()
    (here / "run" / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl", "checkpoints/epoch-1"):
        copy = shutil.copytree if (here / "whole" / name).is_dir() else shutil.copy
        copy(here / "whole" / name, here / "run" / name)
    start.unlink()
    if change == "other":
        shutil.copy(here / "0.75.safetensors", start)
    trainer = Trainer(dataclasses.replace(settings, run_dir=here / "run"))
    assert trainer.progress.epoch == 1
    assert trainer.description.mean == (0.25,)
    assert trainer.model.mean.item() == 0.25
    trainer.run()
    whole, resumed = (read_model(here / run / MODEL_FILE) for run in ("whole", "run"))
    assert whole[1]["model"] == resumed[1]["model"]
    assert all(torch.equal(value, resumed[0][name]) for name, value in whole[0].items())
    # a run that has not begun needs it
    start.unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"^--model\.pretrained: .*start\.safetensors"):
        Trainer(dataclasses.replace(settings, run_dir=here / "new"))


def test_a_finished_run_of_other_code_or_images_is_not_taken_for_this_one(here: Path) -> None:
    (here / "own.py").write_text(OWN_DATA)
    settings = config("net.py:Net", data=DataConfig(name="own.py:data"), evaluation=EvaluationConfig(steps=1))
    report = Trainer(settings).run()
    assert finished_report(settings) == json.loads((here / "run" / REPORT).read_text())
    net = (here / "net.py").read_text()
    (here / "net.py").write_text(net + "# changed\n")
    with pytest.raises(ConfigError, match=r"was trained by other code of --model\.name net\.py:Net; restore"):
        finished_report(settings)
    (here / "net.py").write_text(net)
    for part, told in (("train", "was trained on other images"), ("test", "was measured on other test images")):
        (here / "own.py").write_text(OWN_DATA.replace(f"# {part}", "images = 255 - images"))
        with pytest.raises(ConfigError, match=told):
            finished_report(settings)
    # reports of earlier versions say less
    del report["data"]["test_fingerprint"], report["made_by"]
    (here / "run" / REPORT).write_text(json.dumps(report))
    (here / "net.py").write_text(net + "# changed\n")
    assert finished_report(settings) is not None


OWN_DATA = """
import numpy as np

def data(split):
    images = np.random.default_rng(0 if split == "train" else 1).integers(0, 256, (60, 8, 8), np.uint8)
    if split == "train":
        pass
        # train
    else:
        pass
        # test
    return images, np.arange(60) % 10
"""


def test_a_buffer_that_training_changes_has_to_be_in_checkpoints() -> None:
    told = "its buffer seen changes in training, and is registered with persistent=False"
    assert told in refusal("net.py:Counting")
    assert Trainer(config("net.py:counting_in_checkpoints")).messages


def test_weights_of_other_classes_and_their_normalisation_serve_as_a_start(here: Path) -> None:
    before = trained("net.py:Net", model={"mean": (0.25,), "std": (0.5,)}).model.state_dict()
    tensors, metadata = read_model(here / "run" / MODEL_FILE)
    # those of other classes
    tensors |= {"network.fc.weight": torch.zeros(3, 128), "network.fc.bias": torch.zeros(3)}
    fields = json.loads(metadata["model"]) | {"num_classes": 3}
    export_model(here / "three.safetensors", tensors, {"model": json.dumps(fields)})
    shutil.rmtree("run")
    trainer = Trainer(config("net.py:Net", model={"pretrained": Path("three.safetensors")}))
    told = "\n".join(trainer.messages)
    assert "new, for 10 classes: network.fc.weight, network.fc.bias" in told
    assert "images are normalised by mean 0.25, deviation 0.5: those that three.safetensors was trained with" in told
    after = trainer.model.state_dict()
    assert [name for name in before if not torch.equal(before[name].cpu(), after[name])] == [
        "network.fc.weight",
        "network.fc.bias",
    ]


def test_layers_to_perturb_can_be_given() -> None:
    trainer = Trainer(config("net.py:Net", awp=AwpConfig(layers=("fc.*", "network.conv1.weight"))))
    assert trainer.awp_step.awp is not None
    assert [*trainer.awp_step.awp.parameters] == ["network.conv1.weight", "network.fc.weight", "network.fc.bias"]
    assert any("AWP perturbs 3 of 10 tensors" in message for message in trainer.messages)


def test_the_documents_model_is_complete_and_short(here: Path) -> None:
    text = (ROOT / "docs" / "own-model.md").read_text()
    code = text.partition("A complete `net.py`:\n\n```python\n")[2].partition("```")[0]
    assert 0 < len(code.splitlines()) <= 20
    (here / "net.py").write_text(code)
    assert Trainer(config("net.py:Net")).messages

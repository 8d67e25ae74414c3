"""The frozen network that a run learns from: found, checked, and part of what the run is."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import images
from teachers import write_teacher

from awp_engine import load_model
from awp_engine.config import (
    AttackConfig,
    AwpConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    TeacherConfig,
    config_hash,
    from_json,
    to_json,
)
from awp_engine.config.rules import TAUGHT
from awp_engine.data import eval_batches
from awp_engine.distributed.ranks import Ranks
from awp_engine.evaluation import spread
from awp_engine.evaluation.reports.hub_folder import without_paths
from awp_engine.files.digest import sha256_of
from awp_engine.train.run_dir import finished_report
from awp_engine.train.setup import Setup
from awp_engine.train.trainer import Trainer

BASE = Config(
    device="cpu",
    epochs=1,
    global_batch_size=25,
    method="hat",
    data=DataConfig(train_limit=100),
    model=ModelConfig(width=2),
    attack=AttackConfig(steps=1),
    awp=AwpConfig(gamma=0.01),
    evaluation=EvaluationConfig(steps=1, held_out_limit=8, test_limit=8),
    keep_checkpoints=9,
    checkpoint_steps=1,
    log=("none",),
)


def taught(directory: Path, *, weights: str = "teacher.safetensors", **changed: Any) -> Config:
    teacher = TeacherConfig(weights=str(directory / weights), **changed.pop("teacher", {}))
    return dataclasses.replace(BASE, teacher=teacher, run_dir=directory / "run", **changed)


def beside_uniform(logits: torch.Tensor) -> float:
    """The mean of KL(p || equal answers)."""
    p = logits.softmax(1)
    return float((p * (p * p.shape[1]).log()).sum(1).mean())


@pytest.mark.parametrize("method", ["at", "mart", "score", "hat", "ard", "rslad"])
def test_the_loss_of_guessing_is_the_methods_own(method, tmp_path):
    """What tells a collapse; against the formulas of equal answers."""
    teacher = write_teacher(tmp_path / "teacher.safetensors").double()
    own = TeacherConfig(weights=str(tmp_path / "teacher.safetensors") if method in TAUGHT else None)
    config = dataclasses.replace(BASE, run_dir=tmp_path / "run", method=method, beta=2.0, teacher=own)
    trainer = Trainer(config)
    log10, held_out = math.log(10), next(eval_batches(spread(trainer.data.held_out, 8), 8))[0]
    logits = teacher.eval()(held_out.double()).detach()
    expected = {
        "at": log10,
        "mart": log10 + math.log(10 / 9),
        "score": 0.9,
        "hat": 1.5 * log10,
        "ard": 30**2 * 2 * beside_uniform(logits / 30),
        "rslad": 2 * beside_uniform(logits),
    }
    assert trainer.selection.guessing_loss == pytest.approx(expected[method], rel=1e-3)


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("ended")
    write_teacher(directory / "teacher.safetensors")
    config = taught(directory)
    trainer = Trainer(config)
    teacher = trainer.awp_step.passes.objective.teacher
    assert teacher is not None
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    report = trainer.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.model.state_dict().items())
    assert report["made_by"] == {"teacher": sha256_of(directory / "teacher.safetensors")}
    return directory


def test_its_weights_are_not_in_checkpoints_and_it_normalises_by_itself(ended):
    setup = Setup(taught(ended), Ranks())
    assert re.search(r"teacher .*: right on [0-9.]+% of 100 training images", str(setup.messages))
    teacher = setup.awp_step.passes.objective.teacher
    assert teacher is not None
    x = images((3, 1, 8, 8))
    torch.testing.assert_close(teacher.descent(x), load_model(ended / "teacher.safetensors")(x), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    groups = {path.stem for path in (ended / "run" / "checkpoints" / "epoch-1").glob("*.safetensors")}
    assert groups == {"model", "optimizer", "best_model", "epoch"}


def test_a_run_that_is_stopped_in_an_epoch_ends_bit_equal(ended, tmp_path):
    directory = shutil.copytree(ended, tmp_path / "copy")
    (directory / "run" / "report.json").unlink()
    checkpoints = directory / "run" / "checkpoints"
    for name in ("epoch-1", "epoch-0.step-3", "epoch-0.step-2"):
        shutil.rmtree(checkpoints / name)
    (checkpoints / "latest").write_text("epoch-0.step-1\n")
    Trainer(taught(directory)).run()
    for name in ("model", "optimizer", "best_model", "epoch"):
        one, other = (root / "run" / "checkpoints" / "epoch-1" / f"{name}.safetensors" for root in (ended, directory))
        assert one.read_bytes() == other.read_bytes()


def test_other_weights_make_another_run(ended, tmp_path):
    """Under the same name; the same weights elsewhere do not."""
    directory = shutil.copytree(ended, tmp_path / "copy")
    moved = taught(directory, weights="elsewhere.safetensors")
    shutil.move(directory / "teacher.safetensors", directory / "elsewhere.safetensors")
    assert config_hash(moved) == config_hash(taught(directory))
    assert finished_report(moved) is not None
    Setup(moved, Ranks())
    write_teacher(directory / "elsewhere.safetensors", seed=4)
    for goes_on in (lambda: Setup(moved, Ranks()), lambda: finished_report(moved)):
        with pytest.raises(ConfigError, match=r"^--teacher\.weights: .*run learnt from other weights than .*elsewhere"):
            goes_on()
    (directory / "elsewhere.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"^--teacher\.weights: .*expected a run directory, a checkpoint or"):
        Setup(moved, Ranks())
    # it trains nothing any more
    assert finished_report(moved) is not None
    with pytest.raises(ConfigError, match=r"--teacher\.weights: expected .*--method hat learns from, got nothing"):
        dataclasses.replace(moved, teacher=TeacherConfig()).require_files()


def test_a_run_is_a_teacher(ended, tmp_path):
    config = dataclasses.replace(taught(ended, weights="run"), method="rslad", beta=0.1, run_dir=tmp_path / "run")
    setup = Setup(config, Ranks())
    teacher = setup.awp_step.passes.objective.teacher
    assert teacher is not None
    x = images((3, 1, 8, 8))
    torch.testing.assert_close(teacher.model(x), load_model(ended / "run")(x), rtol=0, atol=0)
    assert setup.made_by == {"teacher": sha256_of(ended / "run" / "model.safetensors")}
    trains_still = shutil.copytree(ended / "run", tmp_path / "other")
    for name in ("model.safetensors", "report.json"):
        (trains_still / name).unlink()
    with pytest.raises(ConfigError, match=r"--teacher\.weights: .*other: expected a run that has ended"):
        Setup(dataclasses.replace(config, teacher=TeacherConfig(weights=str(trains_still))), Ranks())


def test_a_file_that_knows_its_model_needs_no_name(tmp_path):
    write_teacher(tmp_path / "teacher.safetensors")
    says = r"; leave --teacher\.name out: the file says that it holds 'preact-resnet-digits' of width 2"
    with pytest.raises(ConfigError, match=rf"^--teacher\.weights: .*conv1\.weight \[2, 1, 3, 3\].*{says}$"):
        Setup(taught(tmp_path, teacher={"name": "preact-resnet-digits"}), Ranks())


def test_a_file_that_knows_another_activation_is_refused(tmp_path):
    """Its weights would fit, and answer otherwise; as weights to start from, too."""
    write_teacher(tmp_path / "teacher.safetensors", width=None, activation="silu")
    named = {"name": "preact-resnet-digits", "normalize": "none"}
    expected = (
        r"holds weights of a network with the activation silu, the model has relu: expected --{}\.activation silu$"
    )
    with pytest.raises(ConfigError, match=r"^--teacher\.weights: .*" + expected.format("teacher")):
        Setup(taught(tmp_path, teacher=named), Ranks())
    started = {"model": ModelConfig(pretrained=str(tmp_path / "teacher.safetensors"))}
    with pytest.raises(ConfigError, match=r"^--model\.pretrained: .*" + expected.format("model")):
        Setup(taught(tmp_path, teacher=named | {"activation": "silu"}, **started), Ranks())
    Setup(taught(tmp_path, teacher=named | {"activation": "silu"}), Ranks())


def test_weights_of_others_are_named(tmp_path):
    """What normalises images before them is said, never guessed."""
    model = write_teacher(tmp_path / "teacher.safetensors", width=None)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pt")

    def set_up(**teacher: Any) -> Setup:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return Setup(taught(tmp_path, weights="w.pt", teacher=teacher), Ranks())

    with pytest.raises(ConfigError, match=r"^--teacher\.weights: .*give --teacher\.name NAME --teacher\.weights"):
        set_up()
    with pytest.raises(ConfigError, match=r"^--teacher\.normalize: nothing says by what mean and deviation .*w\.pt"):
        set_up(name="preact-resnet-digits")
    with pytest.raises(ConfigError, match=r"^--teacher\.weights: .*w\.pt: state_dict does not fit"):
        set_up(name="preact-resnet-18", normalize="none")
    x = images((3, 1, 8, 8))
    for given, mean, std in (({"normalize": "none"}, 0.0, 1.0), ({"mean": (0.2,), "std": (0.6,)}, 0.2, 0.6)):
        teacher = set_up(name="preact-resnet-digits", **given).awp_step.passes.objective.teacher
        assert teacher is not None
        model.normalize_by_([mean], [std])
        torch.testing.assert_close(teacher.model(x), model.eval()(x))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "classes": ({"num_classes": 7}, {}, "has 7 classes; expected 10, as digits has"),
    "channels": ({"channels": 3}, {}, "has 3 channels of images; expected 1, as digits has"),
    "order": ({"class_names": tuple("1234567890")}, {}, "has other classes, or in another order, than digits: 1, 2"),
    "another method": ({}, {"method": "at"}, "expected none with --method at, which learns from no other network"),
    "unknown name": ({}, {"teacher": {"name": "net.py:make"}}, "expected a built-in model, timm:NAME or"),
    "of a run": ({}, {"teacher": {"normalize": "none"}}, "expected nothing without --teacher.name"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused_in_one_line(case, tmp_path):
    written, changed, message = CASES[case]
    write_teacher(tmp_path / "teacher.safetensors", **written)
    with pytest.raises(ConfigError) as told:
        Setup(taught(tmp_path, **changed), Ranks())
    assert str(told.value).startswith("--teacher.")
    assert message in str(told.value)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_to_publish_does_not_say_where_it_was(tmp_path):
    for name in ("large/", "large.safetensors"):
        teacher = TeacherConfig(weights=f"{tmp_path}/{name}")
        public = without_paths(dataclasses.replace(taught(tmp_path), teacher=teacher))
        assert public.teacher.weights == name.rstrip("/")
        assert str(tmp_path) not in to_json(public)


def test_runs_of_earlier_versions_have_no_teacher():
    config = dataclasses.replace(BASE, method="at")
    values = json.loads(to_json(config))
    del values["teacher"]
    assert from_json(json.dumps(values)) == config

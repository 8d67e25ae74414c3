"""A training method of somebody's own, `--method file.py:Class`."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from awp_engine import checkpoint
from awp_engine.checkpoint import CheckpointError
from awp_engine.cli.command_line import parse_train
from awp_engine.config import ConfigError
from awp_engine.files.digest import sha256_of
from awp_engine.step.objectives import Mart, build_objective

CODE = """
import torch
from torch.nn.functional import cross_entropy

from awp_engine.step.objectives import AdversarialTraining, Objective


class Same(AdversarialTraining):
    pass


class Pairing(Objective):
    def __init__(self, beta):
        self.beta = beta

    def losses(self, model, x_adv, x, y):
        logits_adv, logits = model(x_adv).float(), model(x).float()
        distance = (logits_adv - logits).square().mean(1)
        return cross_entropy(logits_adv, y, reduction="none") + self.beta * distance, logits_adv


class Counting(AdversarialTraining):
    # smooths more with every image that it has seen
    def __init__(self):
        super().__init__()
        self.seen = torch.zeros(1)

    def losses(self, model, x_adv, x, y):
        if self.descending:
            self.seen += len(x)
        self.label_smoothing = min(float(self.seen) / 1000, 0.5)
        return super().losses(model, x_adv, x, y)

    def state(self):
        return {"seen": self.seen}


def number():
    return 7
"""
TINY = {"model.width": 4, "epochs": 1, "attack.steps": 2, "evaluation.steps": 2, "data.train-limit": 64, "log": "none"}
TINY = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def code(tmp_path):
    (tmp_path / "pairing.py").write_text(CODE)
    return tmp_path / "pairing.py"


def train(*arguments):
    from awp_engine.distributed.ranks import Ranks
    from awp_engine.distributed.signals import StopRequest
    from awp_engine.train.run import train as train_run

    return train_run(parse_train([*map(str, arguments), *TINY]), Ranks(), StopRequest())


def test_a_run_by_it_is_that_of_the_method_it_equals(code, tmp_path):
    title, own, _ = train("--method", f"{code}:Same", "--run-dir", tmp_path / "own")
    assert title == "Same-AWP"
    _, built_in, _ = train("--run-dir", tmp_path / "at")
    differ = {"seconds", "method", "config_hash", "made_by"}
    assert {k: v for k, v in own.items() if k not in differ} == {k: v for k, v in built_in.items() if k not in differ}
    assert own["method"] == f"{code}:Same"
    assert (own["made_by"], built_in["made_by"]) == ({"method": sha256_of(code)}, {})


def test_another_loss_of_the_same_name_is_another_run(code, tmp_path):
    run = tmp_path / "run"
    train("--method", f"{code}:Pairing", "--run-dir", run, "--beta", "0.5")
    (run / "report.json").unlink()
    code.write_text(CODE + "\n# another\n")
    with pytest.raises(ConfigError, match="was trained by other code of --method"):
        train("--method", f"{code}:Pairing", "--run-dir", run, "--beta", "0.5")
    assert json.loads((run / "config.json").read_text())["method"] == f"{code}:Pairing"


def test_what_it_keeps_goes_on_from_a_checkpoint(code, tmp_path):
    flags = "--method", f"{code}:Counting", "--global-batch-size", 16, "--checkpoint-steps", 1, "--keep-checkpoints", 9
    whole = tmp_path / "whole"
    train(*flags, "--run-dir", whole)
    assert load_file(whole / "checkpoints" / "epoch-1" / "method.safetensors")["seen"] == 64
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "report.json").unlink()
    shutil.rmtree(run / "checkpoints" / "epoch-1")
    (run / "checkpoints" / "latest").write_text("epoch-0.step-2\n")
    shutil.rmtree(run / "checkpoints" / "epoch-0.step-3")
    train(*flags, "--run-dir", run)
    assert load_file(run / "checkpoints" / "epoch-1" / "method.safetensors")["seen"] == 64
    ends = [folder / "checkpoints" / "epoch-1" / "model.safetensors" for folder in (whole, run)]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    (run / "report.json").unlink()
    held = checkpoint.load(run / "checkpoints" / "epoch-1")
    del held.tensors["method"]
    checkpoint.save(run / "checkpoints", "epoch-9", held.tensors, held.state, checkpoint.Retention())
    with pytest.raises(CheckpointError, match=r"epoch-9: lacks what this run needs.*method"):
        train(*flags, "--run-dir", run)


def test_it_is_given_what_it_names(code):
    assert build_objective(f"{code}:Pairing", beta=0.25).beta == 0.25
    assert build_objective("awp_engine.step.objectives:Mart", beta=3.0).beta == 3.0
    assert isinstance(build_objective("awp_engine.step.objectives:Mart"), Mart)
    losses, logits = build_objective(f"{code}:Pairing", beta=0.0).losses(
        torch.nn.Flatten(), torch.eye(3), torch.eye(3), torch.arange(3)
    )
    torch.testing.assert_close(losses, torch.full((3,), 0.5514447))
    assert logits.shape == (3, 3)


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("number", (), "--method: .* gives int; expected an awp_engine.step.objectives.Objective"),
        ("Pairin", (), "--method: .* has no Pairin; did you mean Pairing?"),
        (
            "Pairing",
            ("--label-smoothing", "0.1"),
            "--label-smoothing: expected 0 with .*takes no label_smoothing",
        ),
    ],
)
def test_what_is_wrong_is_one_line(code, tmp_path, method, more, message):
    with pytest.raises(ConfigError, match=message):
        train("--method", f"{code}:{method}", "--run-dir", tmp_path / "run", *more)
    assert not (tmp_path / "run" / "report.json").exists()


def test_a_file_that_names_one_runs_no_code(code, tmp_path, capsys):
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"method": f"{code}:Same"}))
    code.write_text("raise SystemExit('it was run')")
    with pytest.raises(SystemExit):
        parse_train(["--config", str(settings)])
    assert "--method: " in (err := capsys.readouterr().err)
    assert "which is not run because a file says so" in err

"""Evaluation in 16 bits: the model under autocast, said in receipt and page; and top-5."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import run_command
from digits_model import description, digits, trained, write_run
from torch import Tensor, nn

from awp_engine.checkpoint import read_model
from awp_engine.data import eval_batches
from awp_engine.evaluation import spread
from awp_engine.evaluation.attacks.autoattack import Budget
from awp_engine.evaluation.attacks.named import Threat, Trial, in_top5, measuring
from awp_engine.evaluation.gates.run import run_gates
from awp_engine.evaluation.model.precision import ROUNDING, Lowered
from awp_engine.evaluation.run import evaluate_checkpoint


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "digits", trained(0.0, 1), trained(0.0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_and_gradients_are_those_of_autocast(dtype):
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    net.load_state_dict({k: torch.linspace(-0.3, 0.3, v.numel()).view_as(v) for k, v in net.state_dict().items()})
    x, y, *_ = next(eval_batches(spread(digits().test, 20), 20))

    def of(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = x.clone().requires_grad_()
        logits = model(seen)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), seen)
        return logits, gradient

    logits, gradient = of(Lowered(net, dtype), x)
    with torch.autocast("cpu", dtype):
        expected = net(x).float()
    assert torch.equal(logits, expected)
    exact_logits, exact = of(net.double(), x.double())
    assert not torch.equal(logits.double(), exact_logits)
    assert (gradient - exact).norm() < 0.02 * exact.norm()


def test_gradients_do_not_vanish_in_fp16():
    """2e-8, that of a confident answer, is 0 in fp16."""
    layer = nn.Linear(4, 3, bias=False)
    nn.init.ones_(layer.weight)
    found = []
    for lowered in (True, False):
        x = torch.ones(2, 4, requires_grad=True)
        with torch.autocast("cpu", torch.float16, enabled=not lowered):
            logits = Lowered(layer, torch.float16)(x) if lowered else layer(x)
        (gradient,) = torch.autograd.grad(2e-8 * logits.float().sum(), x)
        found.append(gradient)
    assert torch.allclose(found[0], torch.full((2, 4), 6e-8), rtol=0.01, atol=0)
    assert not found[1].any()


def test_the_numbers_are_those_of_the_rounded_model_and_say_so(run_dir, tmp_path):
    arguments = {"attacks": ["clean", "pgd3", "square"], "limit": 40, "gates_limit": None, "output": tmp_path}
    arguments |= {"save_images": 0, "save_per_image": "npz", "budget": Budget(queries=4)}
    full = evaluate_checkpoint(run_dir, **arguments)
    done = evaluate_checkpoint(run_dir, precision="bf16", **arguments)
    assert [each.report["receipt"]["precision"]["computes_in"] for each in (full, done)] == ["fp32", "bf16"]
    assert ["bf16" in each.title for each in (full, done)] == [False, True]
    page = (tmp_path / "evaluation.html").read_text().partition("<h2>")[0]
    assert "bf16: all numbers are those of the model rounded so" in page
    # nor is what fp32 saved gone on from
    assert "resumed" not in done.report["receipt"]
    reports = {path.stem.partition("-")[2]: json.loads(path.read_text()) for path in tmp_path.glob("evaluation-*.json")}
    (name,) = (name for name, report in reports.items() if report["receipt"]["precision"]["computes_in"] == "bf16")
    assert len(reports) == 2
    for attack in ("pgd3", "square"):
        tensors, _ = read_model(tmp_path / f"images-{name}-{attack}.safetensors")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rounded = trained(0.0, 1)(tensors["x_adv"]).float()
        assert torch.equal(rounded.argmax(1), tensors["predictions"])
    assert np.load(tmp_path / f"per-image-{name}.npz")["clean_top5"].sum() == done.measurement.top5


def test_fp16_on_a_cpu_is_refused_in_one_line(run_dir, tmp_path, monkeypatch, capsys):
    given = ("--precision", "fp16", "--device", "cpu", "--output", tmp_path / "out")
    assert run_command("evaluate", monkeypatch, run_dir, *given) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--precision: fp16 needs a GPU" in err
    assert not (tmp_path / "out").exists()


def test_gates_do_not_take_rounding_for_a_defence():
    model, split = Lowered(trained(0.0, 1), torch.bfloat16), spread(digits().test, 12)
    threat = Threat(epsilon=Fraction(1, 20), norm="linf")
    with measuring(model):
        trial = Trial(model=model, split=split, threat=threat, seed=1, batch_size=12, rounding=ROUNDING)
        report = run_gates(trial, queries=40)
    assert [gate.name for gate in report.gates if not gate.passed] == []


def test_top5_is_its_definition(run_dir, tmp_path):
    split = spread(digits().test, 50)
    x, y, *_ = next(eval_batches(split, 50))

    def found(model: nn.Module) -> Tensor:
        with torch.no_grad():
            logits = model(x)
        return (logits > logits.gather(1, y.unsqueeze(1))).sum(1) < 5

    model = description().build().eval()
    trial = Trial(model=model, split=split, threat=Threat(epsilon=Fraction(0), norm="linf"), seed=0, batch_size=7)
    assert torch.equal(in_top5(trial, x, y), found(model))
    assert 0 < int(found(model).sum()) < 50
    done = evaluate_checkpoint(run_dir, attacks=["clean"], limit=50, gates_limit=None, output=tmp_path)
    clean = json.loads((tmp_path / "evaluation.json").read_text())["clean"]
    assert clean["top5"] == int(found(trained(0.0, 1)).sum()) > clean["right"]
    (row,) = (row for row in done.measurement.table() if row["attack"].startswith("top-5"))
    assert row.keys() == done.measurement.table()[0].keys()
    low, high = (float(bound) for bound in re.findall(r"[0-9.]+", row["95% CI"]))
    assert low < 2 * clean["top5"] < high
    assert clean["top5_confidence_interval"] == pytest.approx([low / 100, high / 100], abs=1e-3)

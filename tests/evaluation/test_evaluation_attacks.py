"""The evaluation's attacks against independent implementations."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from digits_model import clean_model, description, digits, robust_model
from hypothesis import given
from hypothesis import strategies as st
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from safetensors.torch import load_file, save_file
from torch import nn

from awp_engine.attack import Attack, pgd
from awp_engine.data import Split, eval_batches
from awp_engine.evaluation import evaluate, evaluation_seed, spread
from awp_engine.evaluation.attacks.autoattack import Budget, autoattack
from awp_engine.evaluation.attacks.named import (
    NORMS,
    EvaluationError,
    Threat,
    Trial,
    gradient_attack,
    measuring,
    parse_attack,
    predict,
)
from awp_engine.evaluation.attacks.regional import perturbation_norms, region_mask, regional_attack
from awp_engine.evaluation.attacks.state import StateFile
from awp_engine.models import load_public_state_dict

THREAT = Threat(epsilon=Fraction(1, 5), norm="linf")
SHORT = Budget(iterations=6, queries=30)
SEED, BATCH = 5, 25


def trial(model: nn.Module, split: Split, threat: Threat = THREAT, **changes) -> Trial:
    return Trial(**({"model": model, "split": split, "threat": threat, "seed": SEED, "batch_size": BATCH} | changes))


@pytest.fixture(scope="module")
def model():
    net = robust_model()
    with measuring(net):
        yield net


def test_pgd_agrees_with_torchattacks_on_every_image(model):
    """From the same start, predictions are equal for 200 images, and the iterates for all but rounding's few."""
    x, y, *_ = next(eval_batches(spread(digits().test, 200), 200))
    theirs = torchattacks.PGD(model, eps=0.2, alpha=0.05, steps=20)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        their_x_adv = theirs(x, y)
        torch.manual_seed(3)
        start = (x + torch.empty_like(x).uniform_(-0.2, 0.2)).clamp(0, 1)
    x_adv = pgd(model, x, y, epsilon=0.2, step_size=0.05, steps=20, start=start)
    assert torch.equal(predict(model, x_adv, 200), predict(model, their_x_adv, 200))
    assert 0.3 < (predict(model, x_adv, 200) == y).double().mean() < 0.9
    differing = ((x_adv - their_x_adv).abs() > 1e-5).flatten(1).any(1)
    assert differing.double().mean() < 0.05


def direct_autoattack(model: nn.Module, norm: str, epsilon: float, budget: Budget) -> AutoAttack:
    """The package by itself, shortened by means of its own constructors."""
    package = AutoAttack(model, norm=norm, eps=epsilon, version="standard", seed=SEED)
    # the standard version has more restarts, fewer targets and three radii in L1
    restarts, targets, stages = (5, 5, True) if norm == "L1" else (1, 9, False)
    shared = {"n_iter": budget.iterations, "norm": norm, "eps": epsilon, "seed": SEED, "device": "cpu"}
    shared |= {"use_largereps": stages, "logger": package.logger}
    package.apgd = APGDAttack(model, **shared, n_restarts=restarts)
    package.apgd_targeted = APGDAttack_targeted(model, **shared, n_restarts=1, n_target_classes=targets)
    package.fab.n_iter = budget.iterations
    package.square.n_queries, package.square.rescale_schedule = budget.queries, True
    return package


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", "1/5"), ("l2", "1/2"), ("l1", "2")])
def test_autoattack_equals_the_package_to_the_bit(model, norm, epsilon):
    split = spread(digits().test, 25 if norm == "l1" else 60)
    x, y, *_ = next(eval_batches(split, len(split)))
    package = direct_autoattack(model, NORMS[norm], float(Fraction(epsilon)), SHORT)
    tracer = sys.gettrace()
    with torch.random.fork_rng():
        x_adv, predicted = package.run_standard_evaluation(x, y, batch_size=BATCH)
    sys.settrace(tracer)  # the package removes it, and coverage with it
    threat = Threat(epsilon=Fraction(epsilon), norm=norm)
    before, lines = torch.get_rng_state(), []
    outcome = autoattack(trial(model, split, threat, say=lines.append), budget=SHORT)
    assert torch.equal(torch.get_rng_state(), before)
    assert sys.gettrace() is tracer
    assert torch.equal(outcome.x_adv, x_adv)
    assert torch.equal(outcome.robust, predicted == y)
    counts = list(outcome.details["right_after"].values())
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[-1] < counts[0]
    assert "at most" in lines[0]


def autoattack_until_killed(directory: Path, weights: Path) -> None:
    """What the process that is killed runs; slowed down, so that the kill comes between two attacks."""
    net = description().build()
    load_public_state_dict(net, load_file(weights))
    with measuring(net):
        state_file = StateFile(directory, {"checkpoint": "robust"})
        slow = trial(net, spread(digits().test, 60), say=lambda _: time.sleep(1))
        autoattack(slow, budget=SHORT, state_file=state_file)


def test_a_killed_autoattack_goes_on_to_the_same_result(model, tmp_path):
    attacks_done, weights = 2, tmp_path / "weights.safetensors"
    save_file(model.state_dict(), weights)
    arguments = f"Path({str(tmp_path)!r}), Path({str(weights)!r})"
    code = f"from test_evaluation_attacks import *; autoattack_until_killed({arguments})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    )
    state_file = StateFile(tmp_path, {"checkpoint": "robust"})
    progress = state_file.path.with_suffix(".json")
    while process.poll() is None:
        if progress.exists() and json.loads(progress.read_text())["progress"]["attack"] >= attacks_done:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    split, lines = spread(digits().test, 60), []
    resumed = autoattack(trial(model, split, say=lines.append), budget=SHORT, state_file=state_file)
    assert "going on with" in lines[0]
    assert len(lines) == 1 + 4 - attacks_done
    whole = autoattack(trial(model, split), budget=SHORT)
    assert torch.equal(resumed.x_adv, whole.x_adv)
    assert torch.equal(resumed.robust, whole.robust)
    assert resumed.details == whole.details
    # and once more from the finished state, without an attack
    again = autoattack(trial(model, split), budget=SHORT, state_file=state_file)
    assert torch.equal(again.x_adv, whole.x_adv)


def test_the_state_of_another_evaluation_is_left_alone_and_a_damaged_one_replaced(model, tmp_path):
    lines = []
    attacked = trial(model, spread(digits().test, 10), say=lines.append)
    arguments = {"attacks": ("square",), "budget": SHORT}
    first = StateFile(tmp_path, {"checkpoint": "a", "epsilon": "1/5"})
    result = autoattack(attacked, state_file=first, **arguments)
    kept = first.path.read_bytes()
    other = StateFile(tmp_path, {"checkpoint": "a", "epsilon": "1/10"})
    autoattack(attacked, state_file=other, **arguments)
    assert any("is left alone: other epsilon" in line for line in lines)
    assert first.path.read_bytes() == kept
    lines.clear()
    first.path.write_bytes(kept[:-9] + b"123456789")
    repaired = autoattack(attacked, state_file=first, **arguments)
    assert "starting anew" in lines[0]
    assert "SHA-256 differs" in lines[0]
    assert first.path.with_suffix(".refused").read_bytes() == kept[:-9] + b"123456789"
    assert torch.equal(repaired.x_adv, result.x_adv)


class FewClasses(nn.Module):
    """The first logits of a model."""

    def __init__(self, inner: nn.Module, classes: int) -> None:
        super().__init__()
        self.inner, self.classes = inner, classes

    def forward(self, x):
        return self.inner(x)[:, : self.classes]


def test_autoattack_with_few_classes(model):
    members = torch.nonzero(digits().test.labels < 3).squeeze(1)[::10]
    split = digits().test.select(members)
    six = autoattack(trial(FewClasses(model, 6), split), budget=SHORT)
    assert six.parameters["target_classes"] == 5
    with pytest.raises(EvaluationError, match="at least 4 classes"):
        autoattack(trial(FewClasses(model, 3), split))


def test_a_suspicious_model_is_noted(model):
    split = spread(digits().test, 10)
    probabilities = nn.Sequential(model, nn.Softmax(1))
    outcome = autoattack(trial(probabilities, split), attacks=("square",), budget=SHORT)
    assert any("probability distribution" in warning for warning in outcome.details["warnings"])


def run(model, name, split=None, threat=THREAT, **changes):
    attacked = trial(model, split or digits().test, threat, seed=evaluation_seed(0), batch_size=100)
    return gradient_attack(attacked, parse_attack(name), **({"step_size": Fraction(1, 20), "restarts": 1} | changes))


def test_pgd_is_what_the_run_itself_measured(model):
    attack = Attack(epsilon=0.2, step_size=0.05, steps=20, norm="linf", seed=evaluation_seed(0))
    accuracy = evaluate(model, digits().test, attack, batch_size=100)
    assert int(run(model, "pgd20").robust.sum()) == round(accuracy.robust * 360)
    assert int(run(model, "clean").robust.sum()) == round(accuracy.clean * 360)


def test_fgsm_is_one_signed_step_of_epsilon(model):
    split = spread(digits().test, 50)
    x, y, *_ = next(eval_batches(split, 50))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    expected = (x.detach() + 0.2 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(run(model, "fgsm", split).x_adv, expected, rtol=0, atol=1e-6)


def test_restarts_only_ever_break_more(model):
    once, thrice = (run(model, "pgd2", step_size=Fraction(1, 5), restarts=number).robust for number in (1, 3))
    assert not bool((thrice & ~once).any())
    assert thrice.sum() < once.sum()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_attacks_stay_in_the_ball_and_hurt(model, norm):
    epsilon = Fraction(1, 5) if norm == "linf" else Fraction(3, 4)
    threat = Threat(epsilon=epsilon, norm=norm)
    x = next(eval_batches(digits().test, 360)).images
    clean = run(model, "clean").robust.sum()
    for name in ("fgsm", "pgd10", "cw10"):
        outcome = run(model, name, threat=threat, step_size=epsilon / 4)
        largest = perturbation_norms(outcome.x_adv, x)["Linf" if norm == "linf" else "L2"].max()
        assert 0.5 * float(epsilon) < largest <= float(epsilon)
        assert outcome.robust.sum() < clean - 20


@pytest.mark.parametrize(
    "name",
    [
        "pgd",
        "pgd0",
        "cw-5",
        "pgd20-towards",
        "fgsm-targeted",
        "regional-circle-17",
        "regional-square-0",
        "PGD20",
        "",
        "aa",
    ],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(EvaluationError, match=r"--attacks: .*expected clean"):
        parse_attack(name)


def test_measuring_puts_everything_back():
    net = clean_model()
    net.train()
    list(net.parameters())[1].requires_grad_(False)
    before = ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()])
    with measuring(net):
        assert not net.training
        assert not any(p.requires_grad for p in net.parameters())
    assert ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]) == before
    net.eval().requires_grad_(True)


@given(
    shape=st.sampled_from(["square", "frame", "boxes", "pixels"]),
    percent=st.integers(1, 99),
    height=st.integers(4, 40),
    width=st.integers(4, 40),
    seed=st.integers(0, 2**63 - 1),
)
def test_regions_have_the_share_that_was_asked_for(shape, percent, height, width, seed):
    ids = torch.tensor([3, 1000, 7])
    wanted = percent / 100 * height * width
    try:
        mask = region_mask(shape, percent, height, width, sample_ids=ids, seed=seed)
    except EvaluationError:
        assert wanted < (1 if shape in ("boxes", "pixels") else (height + width) / 2 + 0.25)
        return
    assert mask.shape == (3, 1, height, width)
    assert mask.dtype == torch.bool
    areas = mask.sum((1, 2, 3)).double()
    tolerance = 0.5 if shape in ("boxes", "pixels") else (height + width) / 2 + 0.25
    assert ((areas - wanted).abs() <= tolerance + 1e-9).all()
    alone = region_mask(shape, percent, height, width, sample_ids=ids[1:2], seed=seed)
    assert torch.equal(mask[1:2], alone)
    rows, columns = mask[0, 0].any(1), mask[0, 0].any(0)
    if shape == "square":
        assert mask[0, 0].sum() == rows.sum() * columns.sum()
        assert abs(int(rows.nonzero().min()) - (height - 1 - int(rows.nonzero().max()))) <= 1
    if shape == "frame":
        hole = ~mask[0, 0]
        assert hole.sum() == hole.any(1).sum() * hole.any(0).sum()


def test_random_regions_differ_between_samples_and_seeds():
    ids = torch.arange(20)
    for shape in ("boxes", "pixels"):
        masks = region_mask(shape, 28, 16, 16, sample_ids=ids, seed=1)
        assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 20
        assert not torch.equal(masks, region_mask(shape, 28, 16, 16, sample_ids=ids, seed=2))
        # every part of the image is as likely as another
        many = region_mask(shape, 28, 16, 16, sample_ids=torch.arange(3000), seed=1).double().mean((0, 1))
        assert many.min() > 0.2
        assert many.max() < 0.36


def test_norms_by_their_definitions():
    rng = np.random.default_rng(0)
    x, x_adv = rng.random((5, 3, 4, 6)), rng.random((5, 3, 4, 6))
    same = rng.random((5, 1, 4, 6)) < 0.5
    x_adv = np.where(same, x, x_adv)
    x_adv[0] = x[0]
    x_adv[1, :2] = x[1, :2]  # one channel alone counts as its pixel
    found = perturbation_norms(torch.from_numpy(x_adv), torch.from_numpy(x))
    for n in range(5):
        changed = {(i, j) for c in range(3) for i in range(4) for j in range(6) if x[n, c, i, j] != x_adv[n, c, i, j]}
        assert found["L0"][n] == len(changed)
        assert found["L1"][n].item() == pytest.approx(np.abs(x_adv[n] - x[n]).sum())
        assert found["L2"][n].item() == pytest.approx(np.sqrt(((x_adv[n] - x[n]) ** 2).sum()))
        assert found["Linf"][n].item() == pytest.approx(np.abs(x_adv[n] - x[n]).max())


@pytest.mark.parametrize("name", ["regional-square-17", "regional-frame-45", "regional-boxes-28", "regional-pixels-28"])
def test_regional_attack_is_its_formula(name):
    """On a linear model, whose gradient's signs no rounding can change, image by image."""
    torch.manual_seed(1)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    linear.requires_grad_(False)
    images = digits().test.images[:20]
    labels = linear(images.float() / 255).argmax(1)
    labels[3] = (labels[3] + 1) % 10  # one that is wrong from the start
    split = Split(images=images, labels=labels, ids=digits().test.ids[:20])
    attack, step = parse_attack(name), Fraction(1, 50)
    outcome = regional_attack(trial(linear, split, seed=9, batch_size=8), attack, step_size=step, steps=40)
    x, y, ids, _ = next(eval_batches(split, 20))
    masks = region_mask(attack.shape, attack.percent, 8, 8, sample_ids=ids, seed=9)
    norms = []
    for n in range(20):
        one, logits = x[n : n + 1].clone(), linear(x[n : n + 1])[0]
        target = next(c for c in logits.argsort(descending=True) if c != y[n])
        right = logits.argmax() == y[n]
        for _ in range(40 if right else 0):
            one.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(linear(one), target.view(1)), one)
            one = (one.detach() - float(step) * gradient.sign() * masks[n]).clamp(0, 1)
            if linear(one).argmax() != y[n]:
                found = perturbation_norms(one, x[n : n + 1])
                norms.append([float(found[name]) for name in ("L0", "L2", "Linf")])
                break
        torch.testing.assert_close(outcome.x_adv[n], one.detach()[0], rtol=0, atol=1e-5)
        assert bool(outcome.robust[n]) == bool(right and linear(one).argmax() == y[n])
    assert outcome.details["flipped"] == len(norms) > 0
    means = np.mean(norms, axis=0)
    details = outcome.concluded(outcome.details)
    assert [details[key] for key in ("L0", "L2", "Linf")] == pytest.approx(means.tolist(), abs=1e-5)
    outside = ~masks.expand_as(x)
    assert torch.equal(outcome.x_adv[outside], x[outside])
    assert float(outcome.x_adv.min()) >= 0
    assert float(outcome.x_adv.max()) <= 1

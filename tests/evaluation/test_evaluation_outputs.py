"""L1 and targeted attacks, what is told of classes and of single images, and reports that are read again."""

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow.parquet
import pytest
import torch
from commands import run_command
from digits_model import clean_model, digits, robust_model, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import APGDAttack
from scipy.optimize import minimize

from awp_engine.attack import project_l1
from awp_engine.checkpoint import read_model
from awp_engine.evaluation import spread
from awp_engine.evaluation.attacks.named import (
    Norm,
    Target,
    Threat,
    Trial,
    gradient_attack,
    in_ball,
    measuring,
    parse_attack,
    perturbation_norms,
    predict,
)
from awp_engine.evaluation.reports.results import class_table
from awp_engine.evaluation.reports.saved import ImageSaver
from awp_engine.evaluation.run import evaluate_checkpoint
from awp_engine.evaluation.suite import measure

STEP = Fraction(1, 40)


def trial(norm: Norm, epsilon: str, images: int = 60) -> Trial:
    threat = Threat(epsilon=Fraction(epsilon), norm=norm)
    return Trial(model=clean_model(), split=spread(digits().test, images), threat=threat, seed=3, batch_size=100)


@given(seed=st.integers(0, 2**31), epsilon=st.sampled_from([0.0, 0.3, 1.0, 2.5, 9.0]))
@settings(max_examples=25)
def test_the_projection_is_the_nearest_point_of_ball_and_box(seed, epsilon):
    """Against a solver of the quadratic programme: min |z - d|^2 with sum |z| <= epsilon and x + z in [0, 1]."""
    rng = np.random.default_rng(seed)
    x, moved = rng.random(6).round(1), rng.normal(0.5, 1.0, 6)
    change = moved - x
    # z = p - q with p, q >= 0, within the box
    limits = [*((0.0, v) for v in 1 - x), *((0.0, v) for v in x)]
    constraint = {"type": "ineq", "fun": lambda z: epsilon - z.sum()}
    best = minimize(
        lambda z: ((z[:6] - z[6:] - change) ** 2).sum(), np.zeros(12), bounds=limits, constraints=[constraint]
    )
    found = project_l1(torch.tensor(moved)[None], torch.tensor(x)[None], epsilon)[0].numpy()
    assert np.abs(found - x).sum() <= epsilon + 1e-9
    assert found.min() >= 0
    assert found.max() <= 1
    assert ((found - moved) ** 2).sum() <= best.fun + 1e-6
    np.testing.assert_allclose(found - x, best.x[:6] - best.x[6:], atol=2e-3)


def test_what_lies_inside_is_left_alone():
    x = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    near = (x + 0.01 * (x - 0.5)).clamp(0, 1)
    assert torch.equal(project_l1(near, x, 48.0), near)


def test_l1_attacks_stay_in_the_ball_and_are_as_strong_as_the_authors():
    attacked = trial("l1", "3")
    x, y, *_ = attacked.whole
    with measuring(attacked.model):
        with torch.random.fork_rng():
            theirs = APGDAttack(
                attacked.model, n_iter=30, norm="L1", n_restarts=1, eps=3.0, seed=0, device="cpu", use_largereps=True
            )
            fallen = int((predict(attacked.model, theirs.perturb(x, y), 100) != y).sum())
        ours = gradient_attack(attacked, parse_attack("pgd30"), step_size=STEP, restarts=1)
        margin = gradient_attack(attacked, parse_attack("cw30-targeted"), step_size=STEP, restarts=1)
    assert fallen > 15
    assert int((~ours.robust).sum()) >= fallen - 2
    assert int((~margin.robust).sum()) >= fallen - 2
    for outcome in (ours, margin):
        assert bool(in_ball(outcome.x_adv, x, attacked.threat).all())
    largest = perturbation_norms(ours.x_adv, x)["L1"].max()
    assert largest == pytest.approx(3.0, rel=1e-4)
    assert not bool(in_ball(x + 3.1 / 64, x, attacked.threat).any())


@pytest.mark.parametrize("target", get_args(Target))
def test_targeted_attacks_reach_their_targets(target):
    attacked = trial("linf", "1/4")
    with measuring(attacked.model):
        outcome, plain = (
            gradient_attack(attacked, parse_attack(name), step_size=STEP, restarts=1)
            for name in (f"pgd20-{target}", "pgd20")
        )
        once = gradient_attack(attacked, parse_attack(f"pgd20-{target}"), step_size=STEP, restarts=1)
        _, y, *_ = attacked.whole
        after = attacked.predict(outcome.x_adv)
    assert torch.equal(once.x_adv, outcome.x_adv)
    assert torch.equal(outcome.robust, after == y)
    fallen, without = int((~outcome.robust).sum()), int((~plain.robust).sum())
    if target == "targeted":
        assert fallen >= without - 1
        return
    # towards one class, whatever it is, is harder
    assert 5 < outcome.details["target_reached"] <= fallen <= without
    if target == "least-likely":
        wrong = attacked.model(attacked.whole.images).scatter(1, y[:, None], math.inf).argmin(1)
        right = attacked.predict(attacked.whole.images) == y
        assert int(((after == wrong) & right).sum()) == outcome.details["target_reached"]
    else:
        # of 60 images, all wrong classes are somebody's target
        assert len(after[~outcome.robust].unique()) >= 7


def test_a_random_target_is_never_the_label():
    """In a ball that holds every image, everybody is led somewhere else."""
    attacked = trial("linf", "1")
    with measuring(attacked.model):
        outcome = gradient_attack(attacked, parse_attack("pgd30-random-target"), step_size=Fraction(1, 10), restarts=1)
    assert outcome.robust.sum() <= 1


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "robust")


@pytest.fixture(scope="module")
def saved(run_dir, tmp_path_factory):
    """An evaluation with all that is written on request, and its directory."""
    output = tmp_path_factory.mktemp("saved")
    arguments = {"attacks": ["clean", "pgd3", "cw2"], "limit": 70, "gates_limit": None, "output": output}
    return evaluate_checkpoint(run_dir, save_images=0, save_per_image="npz", **arguments), output


def test_every_class_is_counted(saved):
    done, _ = saved
    rows = done.report["per_class"]
    assert [row["class"] for row in rows] == [str(n) for n in range(10)]
    assert sum(row["images"] for row in rows) == 70
    assert sum(row["clean"] for row in rows) == done.measurement.clean
    assert sum(row["worst"] for row in rows) == done.measurement.worst
    for row in done.measurement.rows:
        assert sum(found["attacked"][row.attack] for found in rows) == row.right
    assert len({row["attacked"]["pgd3"] / row["images"] for row in rows}) > 1
    line = class_table(done.measurement.per_class)[3]
    assert list(line) == ["class", "images", "clean", "pgd3", "cw2", "worst"]
    assert line["pgd3"] == f"{100 * rows[3]['attacked']['pgd3'] / rows[3]['images']:.2f}%"


def test_saved_images_give_the_saved_answers(saved):
    done, output = saved
    (file,) = output.glob("per-image-digits-70-*.npz")
    with np.load(file) as arrays:
        assert arrays["attacks"].tolist() == ["clean", "pgd3", "cw2"]
        assert json.loads(str(arrays["receipt"]))["data"]["images"] == 70
        for attack in ("pgd3", "cw2"):
            (images,) = output.glob(f"images-digits-70-*-{attack}.safetensors")
            tensors, _ = read_model(images)
            assert tensors["x_adv"].dtype == torch.float32
            after = predict(robust_model(), tensors["x_adv"], 100)
            assert torch.equal(after, tensors["predictions"])
            np.testing.assert_array_equal(arrays[f"prediction/{attack}"], after)
            np.testing.assert_array_equal(arrays["label"], tensors["labels"])
            np.testing.assert_array_equal(arrays["clean_prediction"], predict(robust_model(), tensors["x"], 100))
            right = (arrays["clean_prediction"] == arrays["label"]) & (after.numpy() == arrays["label"])
            np.testing.assert_array_equal(arrays[f"robust/{attack}"], right)
            largest = (tensors["x_adv"] - tensors["x"]).abs().amax((1, 2, 3))
            np.testing.assert_allclose(arrays[f"perturbation/{attack}"], largest, atol=1e-7)
        broken = arrays["first_broken_by"]
        assert (broken == 0).sum() == 0
        assert (broken == -2).sum() == 70 - done.measurement.clean
        assert (broken == -1).sum() == arrays["robust_to_all"].sum() == done.measurement.worst
        assert (broken == 1).sum() == done.measurement.clean - done.measurement.rows[1].right


def test_parquet_and_a_few_images(run_dir, tmp_path):
    arguments = {"attacks": ["fgsm"], "limit": 12, "gates_limit": None, "output": tmp_path}
    evaluate_checkpoint(run_dir, save_images=5, save_per_image="parquet", **arguments)
    (file,) = tmp_path.glob("per-image-*.parquet")
    table = pyarrow.parquet.read_table(file)
    assert table.num_rows == 12
    assert {"label", "prediction_fgsm", "robust_to_all"} <= set(table.column_names)
    (images,) = tmp_path.glob("images-*-fgsm.safetensors")
    tensors, _ = read_model(images)
    right = [row for row in range(12) if table["first_broken_by"][row].as_py() != -2]
    assert len(right) > 5
    chosen = [right[place * len(right) // 5] for place in range(5)]
    assert tensors["ids"].tolist() == [table["id"][row].as_py() for row in chosen]


@pytest.mark.parametrize(
    ("right", "count", "rows"),
    [
        ([1, 3, 4, 6, 8], 2, [1, 4]),
        # filled up by others
        ([1, 8], 5, [0, 1, 3, 6, 8]),
        ([], 3, [0, 3, 6]),
        ([2], 0, list(range(10))),
        ([2], 99, list(range(10))),
    ],
)
def test_saved_images_are_first_of_all_right_ones(tmp_path, right, count, rows):
    clean = torch.isin(torch.arange(10), torch.tensor(right, dtype=torch.int64))
    assert ImageSaver(trial("linf", "1/10"), tmp_path, "name", count).rows(clean).tolist() == rows


def test_both_ways_to_count_stand_side_by_side():
    attacked = trial("linf", "1/10")
    done = measure(attacked, [parse_attack("fgsm")], step_size=STEP, gates_limit=None)
    with measuring(attacked.model):
        after = attacked.predict(gradient_attack(attacked, parse_attack("fgsm"), step_size=STEP, restarts=1).x_adv)
    alone = int((after == attacked.whole.labels).sum())
    assert done.rows[0].right_attacked == alone >= done.rows[0].right
    row = done.to_dict()["attacks"][0]
    assert row["accuracy_of_attacked_images_alone"] == alone / 60


def test_example_pictures_are_of_all_classes(saved):
    done, _ = saved
    labels = done.measurement.pictures[0].labels
    assert sorted(labels) == list(range(10))
    # fooled ones where a class has any
    flipped = [p != label for p, label in zip(done.measurement.pictures[0].predictions, labels, strict=True)]
    fooled = [row["attacked"]["pgd3"] < row["clean"] for row in done.report["per_class"]]
    assert sum(flipped) >= sum(fooled) > 3


QUICK = ("--attacks", "clean", "--limit", "20", "--no-gates")


def test_a_finished_evaluation_is_read_again(run_dir, tmp_path, monkeypatch, capsys):
    command = (run_dir, *QUICK, "--output", tmp_path)
    assert run_command("evaluate", monkeypatch, *command, "--per-class") == 0
    first = capsys.readouterr().out
    assert "accuracy of every class" in first
    assert run_command("evaluate", monkeypatch, *command) == 0
    second = capsys.readouterr().out
    assert second.startswith("measured before, and read again from evaluation-digits-20-")
    table = first[first.index("digits test split") : first.index("accuracy of every class")]
    assert table in second
    (path,) = tmp_path.glob("evaluation-digits-20-*.json")
    # a report that this user's runs have not written is not believed, and not overwritten
    forged = json.loads(path.read_text())
    forged["attacks"][0]["right"] = 20
    path.write_text(json.dumps(forged))
    assert run_command("evaluate", monkeypatch, *command) == 0
    third = capsys.readouterr().out
    assert "measured before" not in third
    assert table in third
    assert json.loads(path.read_text()) == forged
    assert path.with_name(f"{path.stem}-2.json").exists()
    # that one is believed
    assert run_command("evaluate", monkeypatch, *command) == 0
    assert f"{path.stem}-2.json" in capsys.readouterr().out


def test_files_beside_an_earlier_report_that_are_gone_are_named(run_dir, tmp_path):
    arguments = {"attacks": ["fgsm"], "limit": 12, "gates_limit": None, "output": tmp_path}
    arguments |= {"save_images": 5, "save_per_image": "npz"}
    evaluate_checkpoint(run_dir, **arguments)
    said: list[str] = []
    evaluate_checkpoint(run_dir, **arguments, say=said.append)
    assert len(said) == 1
    for kind in ("images", "per-image"):
        (path,) = tmp_path.glob(f"{kind}-*")
        path.unlink()
        evaluate_checkpoint(run_dir, **arguments, say=said.append)
        assert said[-1] == f"{path.name}: was saved then, and is not there any more; --again writes it anew"

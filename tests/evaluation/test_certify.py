"""Randomised smoothing: bounds by their definition, a classifier whose true radius is known, and resuming."""

import dataclasses
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from commands import run_command
from digits_model import description
from scipy.stats import binomtest, norm
from torch import Tensor, nn

from awp_engine.checkpoint import export_model
from awp_engine.config import AttackConfig, Config, EvaluationConfig, ModelConfig, load_config, to_json
from awp_engine.evaluation.certify import certify_checkpoint, summary
from awp_engine.evaluation.model.loaded_model import load_trained
from awp_engine.evaluation.reports.hub_folder import model_card
from awp_engine.evaluation.smoothing import Certificate, Smoothing, certify, count_answers, lower_bound
from awp_engine.files.run_places import CONFIG_FILE, MODEL_FILE
from awp_engine.observe.bars import NoBar
from awp_kernels.philox import mix_seed, normals


def at_least(successes: int, trials: int, p: float) -> float:
    """The probability of so many successes or more."""
    return sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(successes, trials + 1))


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_the_bound_is_the_least_probability_that_is_not_ruled_out(alpha):
    for trials in (1, 2, 7, 25):
        assert lower_bound(0, trials, alpha) == 0
        for successes in range(1, trials + 1):
            bound = lower_bound(successes, trials, alpha)
            assert at_least(successes, trials, bound) == pytest.approx(alpha, rel=1e-9)
    for successes, trials in ((9_990, 10_000), (5_001, 10_000), (99_999, 100_000), (100_000, 100_000)):
        exact = binomtest(successes, trials, alternative="greater").proportion_ci(1 - alpha, method="exact").low
        assert lower_bound(successes, trials, alpha) == pytest.approx(exact, rel=1e-9)
    assert lower_bound(50, 50, alpha) == pytest.approx(alpha ** (1 / 50), rel=1e-12)


def test_the_radius_is_that_of_theorem_1():
    smoothing = Smoothing(sigma=0.5, n=1000, alpha=0.01)
    for votes in (560, 800, 999, 1000):
        low = binomtest(votes, 1000, alternative="greater").proportion_ci(0.99, method="exact").low
        assert smoothing.radius(votes) == pytest.approx(0.5 * norm.ppf(low), rel=1e-9)
    # half of the answers, and little more, are no majority that is certain
    assert all(smoothing.radius(votes) <= 0 for votes in (0, 1, 500, 530))
    assert smoothing.largest_radius == smoothing.radius(1000) == pytest.approx(0.5 * norm.ppf(0.01**0.001))


class Linear(nn.Module):
    """Class 1 on one side of a plane, class 0 on the other; `distance` of a constant image from the plane."""

    def __init__(self, distance: float) -> None:
        super().__init__()
        self.direction = nn.functional.normalize(torch.arange(1.0, 49.0), dim=0)
        self.distance = distance

    def forward(self, x: Tensor) -> Tensor:
        side = (x - 0.5).flatten(1) @ self.direction + self.distance
        return torch.stack([-side, side], 1)


IMAGE = torch.full((3, 4, 4), 0.5)


def certified(model: nn.Module, smoothing: Smoothing, *, seed: int = 0, sample_id: int = 7, batch_size: int = 64):
    return certify(model, IMAGE, 1, smoothing, sample_id=sample_id, seed=seed, batch_size=batch_size)


@pytest.mark.parametrize("distance", [0.1, -0.3])
def test_radii_of_a_linear_classifier_are_right_but_for_alpha(distance):
    # under noise it answers by its side with probability Phi(distance / sigma), so its radius is the distance
    smoothing = Smoothing(sigma=0.25, n0=15, n=150, alpha=0.05)
    model = Linear(distance)
    runs = [certified(model, smoothing, seed=seed, batch_size=150) for seed in range(300)]
    beyond = sum(run.radius > abs(distance) for run in runs if run.prediction == (distance > 0))
    wrong = sum(run.prediction not in (None, int(distance > 0)) for run in runs)
    assert beyond + wrong <= smoothing.alpha * 300
    # neither is it never right, nor far too careful
    radii = [run.radius for run in runs]
    assert max(radii) > 0.9 * abs(distance)
    assert sum(radii) / 300 > 0.4 * abs(distance)
    share = sum(run.votes if run.chosen == (distance > 0) else 150 - run.votes for run in runs) / (300 * 150)
    assert share == pytest.approx(NormalDist().cdf(abs(distance) / 0.25), abs=0.01)


def test_a_tie_is_abstained_from():
    found = [certified(Linear(0.0), Smoothing(sigma=0.25, n=400), seed=seed) for seed in range(20)]
    assert {(run.prediction, run.radius) for run in found} == {(None, 0.0)}
    assert all(120 < run.votes < 280 for run in found)


def test_answers_are_those_to_noise_of_the_image_and_the_copy():
    model, sigma = Linear(0.05), 0.3
    seed = mix_seed(5, 19, 7)
    noise = normals(torch.arange(40, 340), IMAGE.numel(), seed=seed).view(-1, *IMAGE.shape)
    answers = Counter(model(IMAGE + sigma * noise).argmax(1).tolist())
    seen = []
    handle = model.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    for batch_size in (1, 7, 300, 1000):
        seen.clear()
        counts = count_answers(
            model, IMAGE, range(40, 340), sigma=sigma, sample_id=7, seed=5, batch_size=batch_size
        ).tolist()
        assert counts == [answers[0], answers[1], 0]
        assert torch.equal(torch.cat(seen), IMAGE + sigma * noise)
    handle.remove()
    # as the paper has it, class and bound by different copies: 0 to 39 and 40 to 339
    run = certified(model, Smoothing(sigma=sigma, n0=40, n=300), seed=5)
    assert run.votes == answers[run.chosen]
    others = [certified(model, Smoothing(sigma=sigma, n=300), seed=s, sample_id=i) for s, i in ((5, 8), (6, 7))]
    assert len({run.votes, *(other.votes for other in others)}) > 1


class Silent(nn.Module):
    """The class 2 of 3, but NaN for part of the images."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.bound = NormalDist(0.5, 0.25).inv_cdf(share) if 0 < share < 1 else math.inf

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(len(x), 1)
        logits[x[:, 0, 0, 0] < self.bound] = math.nan
        return logits


def test_what_is_not_finite_is_a_vote_for_nobody():
    run = certified(Silent(0.1), Smoothing(sigma=0.25, n=1000))
    assert (run.chosen, run.prediction, run.majority) == (2, 2, 2)
    assert run.votes + run.not_finite - 10 == pytest.approx(1000, abs=20)
    assert run.radius < 0.25 * NormalDist().inv_cdf(0.9)
    mute = certified(Silent(1.0), Smoothing(sigma=0.25, n=1000))
    assert (mute.prediction, mute.majority, mute.votes, mute.not_finite) == (None, None, 0, 1100)


def test_the_figures_of_a_certification():
    def image(label: int, prediction: int | None, radius: float, majority: int | None = None) -> Certificate:
        known = {"lower_bound": 0.9, "chosen": 0, "votes": 1, "not_finite": 1}
        majority = prediction if majority is None else majority
        return Certificate(id=0, label=label, prediction=prediction, radius=radius, majority=majority, **known)

    found = [image(0, 0, 0.5), image(1, 1, 0.2), image(0, 1, 0.9), image(1, None, 0.0, majority=1)]
    figures = summary(found, (0.0, 0.25, 0.5, 0.75))
    assert [row["right"] for row in figures["certified_accuracy"]] == [2, 1, 1, 0]
    assert figures["certified_accuracy"][1] == {"radius": 0.25, "right": 1, "accuracy": 0.25}
    assert figures["average_certified_radius"] == pytest.approx(0.7 / 4)
    assert (figures["smoothed_accuracy"], figures["abstained"], figures["answers_not_finite"]) == (0.75, 1, 4)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run whose network was never trained: what counts here is what becomes of its answers."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    path.mkdir()
    settings = {"model": ModelConfig(width=6), "evaluation": EvaluationConfig(batch_size=50)}
    (path / CONFIG_FILE).write_text(to_json(Config(run_dir=path, **settings)))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = description().build()
    export_model(path / MODEL_FILE, model.state_dict(), description().to_metadata())
    return path


SMOOTHING = Smoothing(sigma=2.0, n0=20, n=60, alpha=0.01)


def without_resume(report: dict) -> dict:
    """But for what every call has of its own."""
    own = ("resumed", "date")
    return report | {"receipt": {key: value for key, value in report["receipt"].items() if key not in own}}


def test_a_killed_certification_goes_on_to_the_same_bits(run_dir, tmp_path):
    said = []

    def go(name: str, **more) -> dict:
        done = certify_checkpoint(run_dir, SMOOTHING, limit=6, output=tmp_path / name, say=said.append, **more)
        written = json.loads((done.output / "certification.json").read_text())
        assert written == done.report
        return written

    whole = go("whole")
    assert [image["id"] for image in whole["images_certified"]] == [1437 + 60 * k for k in range(6)]
    assert len({image["votes"] for image in whole["images_certified"]}) > 1
    assert whole["receipt"]["largest_radius"] == SMOOTHING.largest_radius
    assert not {"epsilon", "norm", "resumed"} & whole["receipt"].keys()

    class Interrupted(NoBar):
        def set(self, done: int, total: int) -> None:
            super().set(done, total)
            assert total == 6 * 80
            if done > 3.5 * 80:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go("killed", bar=Interrupted)
    (saved,) = (tmp_path / "killed").glob("certify-*.jsonl")
    assert not list((tmp_path / "killed").glob("*.json"))
    assert len(saved.read_text().splitlines()) == 3
    # of the fourth line half was written
    with saved.open("a") as file:
        file.write(saved.read_text().splitlines()[0][:40])
    resumed = go("killed")
    assert resumed["receipt"]["resumed"] == {"images": 3}
    assert without_resume(resumed) == without_resume(whole)
    assert said == ["going on after image 3"]
    assert without_resume(go("killed")) == without_resume(whole)
    assert said[1:] == ["all images were certified before"]

    # with other settings nothing is gone on from
    other = go("killed", seed=1)
    assert "resumed" not in other["receipt"]
    assert other["images_certified"] != whole["images_certified"]


def test_what_a_run_under_noise_is_for_is_said(run_dir, tmp_path):
    place, said = shutil.copytree(run_dir, tmp_path / "noise"), []
    attack = AttackConfig(kind="none", noise=0.5)
    (place / CONFIG_FILE).write_text(to_json(dataclasses.replace(load_config(place / CONFIG_FILE), attack=attack)))
    for sigma in (0.5, 0.25):
        certify_checkpoint(place, smoothing=dataclasses.replace(SMOOTHING, sigma=sigma), limit=1, say=said.append)
    assert said == ["trained under noise of 0.5, certified by another, 0.25: best is --sigma 0.5"]
    card = model_card(description(), load_trained(place), None, "", "", curves=False)
    assert "- Training: Noise-AWP, gamma 0.002, without an attack, noise of 0.5, 30 epochs" in card
    assert "adversarial-training" not in card
    named = dataclasses.replace(description(), class_names=tuple("zabcdefghi"))
    card = model_card(named, load_trained(place), None, "", "", curves=False, epoch="4")
    assert "30 epochs (weights of epoch 4), seed" in card
    assert "## Classes\n\n0 z, 1 a, 2 b" in card


def test_a_stronger_attack_of_later_epochs_is_told(run_dir, tmp_path):
    place = shutil.copytree(run_dir, tmp_path / "stronger")
    attack = AttackConfig(
        epsilon="8/255", step_size="2/255", stronger_after=4, stronger_epsilon="10/255", stronger_steps=12
    )
    (place / CONFIG_FILE).write_text(to_json(dataclasses.replace(load_config(place / CONFIG_FILE), attack=attack)))
    card = model_card(description(), load_trained(place), None, "", "", curves=False)
    assert "linf epsilon 8/255, 10 steps of 2/255, from epoch 5 on epsilon 10/255 and 12 steps, 30 epochs" in card


def test_the_command_prints_the_table_and_refuses_in_one_line(run_dir, tmp_path, capsys, monkeypatch):
    flags = ("--sigma", 0.1, "--n0", 20, "--n", 60, "--alpha", 0.01, "--images", 5)
    assert run_command("certify", monkeypatch, run_dir, *flags, "--output", tmp_path / "out") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == [
        "digits test split, 5 images, sigma 0.1, n 60, alpha 0.01",
        "L2 radius  certified accuracy",
    ]
    assert out[-1] == f"report in {tmp_path / 'out'}"
    assert len(list((tmp_path / "out").glob("certification-digits-5-sigma0_1-*.json"))) == 1
    for wrong, words in {
        ("--sigma", 0): "--sigma: expected a number from 0.000001",
        ("--sigma", "nan"): "--sigma: expected a number",
        ("--n", 9): "--n: expected at least 10 copies, or nothing can be certified at alpha 0.001",
        ("--n0", 0): "--n0: expected a whole number from 1",
        ("--alpha", 0.5): "--alpha: expected a probability",
        ("--images", 0): "--images: expected a whole number from 1",
        ("--data.name", "cifar10"): "--data.root is required for cifar10",
        ("--seed", -1): "--seed: expected a whole number >= 0",
    }.items():
        assert run_command("certify", monkeypatch, run_dir, *wrong) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert words in errors[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMOOTHING.n = 5

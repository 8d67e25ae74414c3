"""Screening training images: the losses and ITSR's weights by their definitions, features, lists, kills."""

import csv
import json
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import run_command
from digits_model import description, digits
from image_folders import write_images
from scipy.optimize import minimize
from torch import Tensor, nn

from awp_engine.audit.data import methods, refine
from awp_engine.audit.data.autoencoder import GAME_BETAS, LR, Autoencoder, Scores, log_density
from awp_engine.audit.data.features import features, last_layer, pixels, stretched
from awp_engine.audit.data.methods import Epochs, beyond, fit, strangeness, thresholds
from awp_engine.audit.data.run import Screening, audit_data
from awp_engine.checkpoint import export_model
from awp_engine.config import Config, DataConfig, EvaluationConfig, ModelConfig, to_json
from awp_engine.data import load_data
from awp_engine.data.sets.scan_list import read_scan, write_scan
from awp_engine.data.tools.scan import scan_folder
from awp_engine.files.run_places import CONFIG_FILE, MODEL_FILE
from awp_kernels.philox import mix_seed

CPU = torch.device("cpu")


def double(model: Autoencoder) -> Autoencoder:
    """In fp64: the optimisers go on with the same parameters."""
    for net in (model.encoder, model.decoder, model.discriminator):
        if net is not None:
            net.double()
    return model


def positive(x: Tensor) -> Tensor:
    """ReLU, with no slope at 0."""
    return x * (x > 0)


class Plain:
    """The adversarial autoencoder by its definition, in functions of a list of tensors."""

    def __init__(self, model: Autoencoder) -> None:
        assert model.discriminator is not None

        def copied(net: nn.Module) -> list[Tensor]:
            return [p.detach().clone().requires_grad_() for p in net.parameters()]

        self.encoder, self.decoder, self.discriminator = map(
            copied, (model.encoder, model.decoder, model.discriminator)
        )
        self.statistics = [[torch.zeros(6).double(), torch.ones(6).double()] for _ in range(2)]
        self.moments: dict[tuple[str, int], list] = {}

    def encode(self, x: Tensor, training: bool) -> Tensor:
        w1, g1, s1, w2, g2, s2, w3, b3 = self.encoder
        for weight, gain, shift, (mean, var) in ((w1, g1, s1, self.statistics[0]), (w2, g2, s2, self.statistics[1])):
            x = x @ weight.T
            m, v = (x.mean(0), x.var(0, correction=0)) if training else (mean, var)
            if training:
                with torch.no_grad():
                    mean += 0.1 * (m - mean)
                    var += 0.1 * (v * len(x) / (len(x) - 1) - var)
            x = positive((x - m) / (v + 1e-5).sqrt() * gain + shift)
        return x @ w3.T + b3

    @staticmethod
    def through(parameters: list[Tensor], x: Tensor) -> Tensor:
        w1, b1, w2, b2, w3, b3 = parameters
        return positive(positive(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3

    def decode(self, z: Tensor) -> Tensor:
        return 1 / (1 + (-self.through(self.decoder, z)).exp())

    def descend(self, name: str, loss: Tensor, parameters: list[Tensor], betas: tuple[float, float]) -> None:
        """A step of Adam (Kingma, Ba, 2015), Algorithm 1."""
        for number, (p, g) in enumerate(zip(parameters, torch.autograd.grad(loss, parameters), strict=True)):
            m, v, t = self.moments.get((name, number), [0.0, 0.0, 0])
            m, v, t = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2, t + 1
            self.moments[name, number] = [m, v, t]
            with torch.no_grad():
                p -= LR * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8)

    def step(self, x: Tensor, weights: Tensor, prior: Tensor) -> None:
        errors = ((x - self.decode(self.encode(x, True))) ** 2).sum(1) / x.shape[1]
        self.descend("r", (weights * errors).sum() / len(x), self.encoder + self.decoder, (0.9, 0.999))
        normal = weights > 0
        if not normal.any():
            return
        z = self.encode(x, True)[normal]
        real, fake = (self.through(self.discriminator, value) for value in (prior[normal], z.detach()))
        loss = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
        loss = loss + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
        self.descend("d", loss, self.discriminator, GAME_BETAS)
        fake = self.through(self.discriminator, z)
        loss = F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
        self.descend("g", loss, self.encoder, GAME_BETAS)


def test_training_is_that_of_the_definition():
    x = torch.rand(230, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.ones(230)
    weights[5:25], weights[200:204] = 0, -1
    model = double(Autoencoder(7, code=2, adversarial=True, seed=3, hidden=6))
    plain = Plain(model)
    model.train(x, weights, 3)
    kept = torch.nonzero(weights).squeeze(1)
    for epoch in range(3):
        generator = torch.Generator().manual_seed(mix_seed(3, epoch))
        order = torch.randperm(210, generator=generator)
        # 210 images in 3 batches
        for rows in (order[:70], order[70:140], order[140:]):
            prior = torch.randn(70, 2, generator=generator)
            plain.step(x[kept[rows]], weights[kept[rows]].double(), prior.double())
    codes = plain.encode(x, False).detach()
    errors = ((x - plain.decode(codes)) ** 2).mean(1).detach()
    found = model.score(x)
    assert torch.allclose(found.codes, codes, rtol=0, atol=1e-9)
    assert torch.allclose(found.errors, errors, rtol=0, atol=1e-9)
    assert model.discriminator is not None
    for own, by_definition in zip(model.discriminator.parameters(), plain.discriminator, strict=True):
        assert torch.allclose(own, by_definition, rtol=0, atol=1e-9)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    assert torch.allclose(log_density(codes), normal.log_prob(codes), rtol=0, atol=1e-12)


def test_networks_are_those_of_the_paper():
    model = Autoencoder(784, code=2, adversarial=True, seed=0)
    kinds = [type(layer).__name__ for layer in model.encoder]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [type(layer).__name__ for layer in model.decoder] == [
        "Linear",
        "ReLU",
        "Linear",
        "ReLU",
        "Linear",
        "Sigmoid",
    ]
    assert model.discriminator is not None
    assert [tuple(p.shape) for p in model.discriminator.parameters()][::2] == [(1000, 2), (1000, 1000), (1, 1000)]
    assert vars(Epochs()) == {"ae": 4000, "aae": 1000, "pretrain": 500, "refine": 100, "final": 1000}
    assert Epochs().of("itsr") == 500 + 10 * 100 + 1000


def outliers(points: np.ndarray, nu: float) -> np.ndarray:
    """f(x) of the one-class SVM, below 0 of an outlier, by its dual problem (Schölkopf et al., 2001)."""
    gamma = 1 / (points.shape[1] * points.var())
    kernel = np.exp(-gamma * ((points[:, None] - points[None]) ** 2).sum(2))
    most = 1 / (nu * len(points))
    found = minimize(
        lambda a: a @ kernel @ a / 2,
        np.full(len(points), 1 / len(points)),
        jac=lambda a: kernel @ a,
        bounds=[(0, most)] * len(points),
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1, "jac": np.ones_like},
        options={"maxiter": 500, "ftol": 1e-14},
    )
    inner = (found.x > 1e-5) & (found.x < most - 1e-5)
    values = kernel @ found.x
    return values - values[inner].mean()


def test_a_round_drops_the_outliers_of_those_that_are_left():
    codes = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.ones(50)
    weights[[3, 40]] = 0
    codes[40] = 100.0
    after = refine.round_weights(weights, codes, nu=0.2)
    left = weights.bool().numpy()
    f = np.zeros(50)
    f[left] = outliers(codes.numpy()[left], 0.2)
    certain = left & (abs(f) > 1e-4)
    assert certain.sum() > 35
    assert (after.numpy()[certain] == (f[certain] > 0)).all()
    assert after[[3, 40]].tolist() == [0, 0]
    assert 4 <= int((after == 0).sum()) - 2 <= 12


def test_suspects_of_the_largest_errors_are_unlearnt():
    weights = torch.tensor([0.0, 1, 0, 0, 1, 0, 0, 0])
    errors = torch.tensor([0.5, 9, 0.1, 0.2, 8, 0.3, 0.4, 0.6])
    suspects = errors[weights == 0].double().numpy()
    expected = [0 if w == 0 else 1 for w in weights.tolist()]
    for place, error in enumerate(errors.tolist()):
        if weights[place] == 0 and error > np.percentile(suspects, 80):
            expected[place] = -1
    assert refine.final_weights(weights, errors).tolist() == expected
    assert expected.count(-1) == 1
    assert refine.final_weights(torch.ones(3), errors[:3]).tolist() == [1, 1, 1]


class Recorded(Autoencoder):
    """Remembers how it was trained, and what it then said."""

    def __init__(self) -> None:
        super().__init__(9, code=2, adversarial=True, seed=1, hidden=12)
        self.trained: list[tuple[Tensor, int]] = []
        self.said: list[Scores] = []

    def train(self, x, weights, epochs, advance=lambda _: None) -> None:
        self.trained.append((weights.clone(), epochs))
        super().train(x, weights, epochs, advance)

    def score(self, x) -> Scores:
        self.said.append(super().score(x))
        return self.said[-1]


def test_refinement_is_ten_rounds_and_one_last_training():
    x = torch.rand(120, 9, generator=torch.Generator().manual_seed(2))
    model, told = Recorded(), []
    weights = refine.refine(model, x, pretrain=3, round_epochs=2, final=4, advance=told.append)
    assert [epochs for _, epochs in model.trained] == [3, *[2] * 10, 4]
    assert sum(told) == 3 + 20 + 4
    expected = torch.ones(120)
    # ten looks at codes, one at errors
    assert len(model.said) == 11
    for (used, _), said in zip(model.trained[:10], model.said[:10], strict=True):
        assert torch.equal(used, expected)
        expected = refine.round_weights(expected, said.codes)
    assert torch.equal(model.trained[10][0], expected)
    dropped = expected == 0
    assert int(dropped.sum()) >= 10
    last = model.said[-1].errors.double().numpy()
    negative = dropped.numpy() & (last > np.percentile(last[dropped.numpy()], 80))
    assert weights.tolist() == [-1 if n else 0 if d else 1 for n, d in zip(negative, dropped.tolist(), strict=True)]
    assert torch.equal(model.trained[-1][0], weights)


def test_the_rule_marks_what_is_beyond_either_percentile():
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(200, generator=generator).double() for name in ("error", "density")}
    limits = thresholds(scores, 90)
    assert limits == {
        name: pytest.approx(np.percentile(values.numpy(), 90), abs=1e-12) for name, values in scores.items()
    }
    marks = beyond(scores, limits)
    assert {name: int(found.sum()) for name, found in marks.items()} == {"error": 20, "density": 20}
    shares = [(values[:, None] > values).double().mean(1) for values in scores.values()]
    assert torch.allclose(strangeness(scores, scores), torch.stack(shares).amax(0), rtol=0, atol=1e-12)


def test_the_same_seed_is_the_same_bits_and_planted_images_are_found():
    split = digits().train.resident()
    zeros, fours = (split.select(torch.nonzero(split.labels == digit).squeeze(1)) for digit in (0, 4))
    x = torch.cat([pixels(zeros), pixels(fours)[:3]])
    state = torch.random.get_rng_state()
    for method in methods.TITLES:
        epochs = Epochs(ae=2, aae=2, pretrain=1, refine=1, final=1)
        first, again, other = (fit(method, x, seed=seed, epochs=epochs).score(x) for seed in (5, 5, 6))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert method == "ocsvm" or not all(torch.equal(first[name], other[name]) for name in first)
        if method in ("ocsvm", "forest"):
            assert set(strangeness(first, first).argsort(descending=True)[:5].tolist()) >= {len(zeros) + 1}
    assert torch.equal(torch.random.get_rng_state(), state)


class Convolutional(nn.Module):
    """Logits by a 1x1 convolution, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Conv2d(1, 5, 3), nn.Dropout(), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x).relu()).mean((2, 3), keepdim=True)).flatten(1)


@pytest.mark.parametrize("kind", ["run", "convolution"])
def test_features_are_what_the_logits_are_made_of_and_the_model_stays_as_it_is(kind):
    torch.manual_seed(0)
    model = (description().build() if kind == "run" else Convolutional()).eval()
    next(model.parameters()).requires_grad_(False)
    split = digits().train.resident().select(torch.arange(23))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, layer = last_layer(model, split.images[:1].float() / 255)
    found = features(model, layer, split, CPU, 10)
    weight, bias = (dict(layer.named_parameters())[name].detach() for name in ("weight", "bias"))
    with torch.no_grad():
        logits = model(split.images.float() / 255)
    assert torch.allclose(found @ weight.flatten(1).T + bias, logits, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()][:2] == [False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    inside = stretched(found[:9], found)
    low, high = found.amin(0), found.amax(0)
    known = high > low
    assert torch.equal(inside[:, known], ((found[:9] - low) / (high - low))[:, known])
    assert not inside[:, ~known].any()


QUICK = ("--epochs-scale", 0.001, "--methods", "itsr", "forest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    write_images(root, 180)
    return root


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run whose network was never trained: it has features all the same."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    path.mkdir()
    settings = {"model": ModelConfig(width=6), "evaluation": EvaluationConfig(batch_size=50)}
    (path / CONFIG_FILE).write_text(to_json(Config(run_dir=path, **settings)))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = description().build()
    export_model(path / MODEL_FILE, model.state_dict(), description().to_metadata())
    return path


def test_training_skips_what_the_list_names(folder, tmp_path, monkeypatch, capsys):
    # what a scan found before stays listed
    (folder / "train/b/broken.jpg").write_bytes(b"no image")
    (folder / "awp-scan.jsonl").unlink(missing_ok=True)
    try:
        write_scan(folder / "awp-scan.jsonl", scan_folder(folder, workers=1))
        out = tmp_path / "my out"
        given = ("data", "--data.name", "folder", "--data.root", folder, "--class", "a", "--methods", "ocsvm")
        assert run_command("audit", monkeypatch, *given, "--output", out) == 0
        assert f"--data.bad-files skip --data.bad-list '{out}/audit-data-" in capsys.readouterr().out
        report = json.loads((out / "audit-data.json").read_text())
        suspects = [suspect["file"] for suspect in report["suspects"]]
        assert 5 <= len(suspects) <= 7
        listed = read_scan(out / "audit-data.jsonl").bad
        assert set(listed) == {*suspects, "train/b/broken.jpg"}
        assert {listed[name].kind for name in suspects} == {"suspect"}
        assert listed[suspects[0]].why.startswith("is a suspect of awp audit data, by ocsvm, in class a: distance ")
        rows = list(csv.DictReader((out / "audit-data.csv").read_text().splitlines()))
        assert [row["file"] for row in rows] == suspects
        # looked at, and all right
        assert run_command("audit", monkeypatch, *given, "--output", out, "--keep", rows[0]["id"]) == 0
        assert "all was screened before" in capsys.readouterr().out
        assert set(read_scan(out / "audit-data.jsonl").bad) == {*suspects[1:], "train/b/broken.jpg"}
        suspects.pop(0)
        assert run_command("audit", monkeypatch, *given, "--output", out, "--keep", 99999) == 2
        assert "--keep: 99999 is no suspect's id" in capsys.readouterr().err
        run = tmp_path / "run"
        flags = ("--data.name", "folder", "--data.root", folder, "--data.bad-files", "skip")
        flags += ("--data.bad-list", out / "audit-data.jsonl", "--data.held-out-fraction", 0.2, "--log", "none")
        flags += ("--model.width", 4, "--epochs", 1, "--attack.steps", 1, "--evaluation.steps", 1, "--run-dir", run)
        assert run_command("train", monkeypatch, *flags) == 0
        trained = json.loads((run / "report.json").read_text())["train_images"]
        # of every class a fifth is held out
        assert trained == 180 - len(suspects) - 12 - 12 - round((60 - len(suspects)) / 5)
    finally:
        (folder / "train/b/broken.jpg").unlink()
        (folder / "awp-scan.jsonl").unlink(missing_ok=True)


def test_the_command_shows_suspects_and_leaves_the_run_as_it_is(run_dir, tmp_path, monkeypatch, capsys):
    before = {path: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    assert run_command("audit", monkeypatch, "data", run_dir, *QUICK, "--class", 3, 8, "--output", tmp_path) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "digits, training images of 2 of 10 classes, by features before linear"
    assert "itsr marks" in "\n".join(out)
    assert out[-1].startswith("next: audit-data-digits-2-features-")
    assert {path: path.read_bytes() for path in run_dir.iterdir() if path.is_file()} == before
    report = json.loads((tmp_path / "audit-data.json").read_text())
    own = digits().train
    assert [c["images"] for c in report["classes"]] == [int((own.labels == digit).sum()) for digit in (3, 8)]
    for suspect in report["suspects"]:
        assert own.labels[suspect["id"]] == int(suspect["class"])
        assert all(value > limit for value, limit in suspect["beyond"].values())
    for summary in report["classes"]:
        (first, second) = summary["methods"]
        assert first["suspects"] == sum(suspect["class"] == summary["name"] for suspect in report["suspects"])
        assert sum(first["weights"].values()) == summary["images"]
        assert 0.09 * summary["images"] < second["suspects"] < 0.12 * summary["images"]
    html = (tmp_path / "audit-data.html").read_text()
    assert html.count("data:image/png") >= 2 * 12 + 20
    assert "The most usual images" in html
    assert list(tmp_path.glob("audit-data-digits-2-features-*.html"))


def test_what_cannot_be_screened_is_refused_in_one_line(run_dir, folder, tmp_path, monkeypatch, capsys):
    few = tmp_path / "few"
    write_images(few, 60)
    of_folder, out = ("--data.name", "folder", "--data.root"), ("--output", tmp_path / "out")
    unreadable = tmp_path / "unreadable"
    write_images(unreadable, 180)
    (unreadable / "train/a/0000.jpg").write_bytes(b"no image")
    net = tmp_path / "net.py"
    net.write_text(
        "import torch\nclass N(torch.nn.Module):\n    def forward(self, x):\n"
        "        return x.flatten(1)[:, :10]\ndef make(num_classes=10):\n    return N()\n"
    )
    picky = tmp_path / "picky.py"
    picky.write_text(net.read_text().replace("return x.flatten(1)[:, :10]", "raise ValueError('x: of another shape')"))
    for wrong, words in {
        ("--data.name", "digits", "--model.name", f"{picky}:make"): "digits's 1x8x8 images: x: of another shape; give",
        ("--data.name", "digits", "--class", "ten"): "--class: digits has no class 'ten'; expected one of 0, 1, 2",
        (*of_folder, folder, "--class", "aa"): "--class: folder has no class 'aa'; did you mean a?",
        (*of_folder, few, "--class", "a"): "class a has 20 training images; expected at least 50",
        (*of_folder, few): "folder: no class has 50 training images",
        (*of_folder, tmp_path / "none"): "is not a directory",
        (*of_folder, unreadable, "--class", "a"): "0000.jpg",
        (*of_folder, folder, "--data.image-size", 100): "pixels are screened of images of up to 64x64",
        (run_dir, *of_folder, folder): "cannot take folder's 3x10x12 images",
        (): "--data.name: expected the data set to be screened",
        ("--data.name", "digits", "--percentile", 100): "--percentile: expected a number from 50 to below 100",
        ("--data.name", "digits", "--epochs-scale", 0): "--epochs-scale: expected a number more than 0",
        ("--data.name", "digits", "--methods", "ae", "ae"): "--methods: expected different ones",
        ("--data.name", "digits", "--methods", "vae"): "argument --methods: invalid choice: 'vae'",
        ("--data.name", "digits", "--model.name", f"{net}:make"): "no linear layer that gives its 10 logits",
    }.items():
        assert run_command("audit", monkeypatch, "data", *wrong, *(out if wrong else ())) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1, errors
        assert words in errors[0]
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert run_command("audit", monkeypatch, "data", "--data.name", "digits", *out) == 2
    assert capsys.readouterr().err.splitlines()[0].endswith("scikit-learn: pip install scikit-learn")
    assert not list(tmp_path.glob("out/*.json*"))


def but_for_times(report: dict) -> dict:
    """But for what every call has of its own."""
    report = json.loads(json.dumps(report))
    for own in ("date", "resumed"):
        report["receipt"].pop(own, None)
    for summary in report["classes"]:
        for row in summary["methods"]:
            row.pop("seconds")
    return report


def test_a_killed_audit_goes_on_to_the_same_bits(tmp_path):
    flags = ["--data.name", "digits", "--class", "3", "--methods", "forest", "itsr", "aae", "--threads", "1"]
    command = ["-m", "awp_engine", "audit", "data", *flags, "--epochs-scale", "0.004", "--output"]
    whole, killed = (forked.Program(*command, tmp_path / name) for name in ("whole", "killed"))
    deadline = time.monotonic() + 120
    while not (saved := list((tmp_path / "killed").glob("audit-data-*.jsonl"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    # the networks of the second part are learning now
    time.sleep(0.2)
    killed.kill()
    lines = saved[0].read_text().splitlines()
    assert 1 <= len(lines) <= 2
    assert not (tmp_path / "killed/audit-data.json").exists()
    again = forked.run(*command, tmp_path / "killed")
    assert (again.returncode, whole.end().returncode) == (0, 0), again.stderr
    assert f"going on after part {len(lines)} of 3" in again.stdout
    first, second = (json.loads((tmp_path / name / "audit-data.json").read_text()) for name in ("whole", "killed"))
    assert second["receipt"]["resumed"] == {"parts": len(lines)}
    assert but_for_times(first) == but_for_times(second)
    # finished: read again
    said: list[str] = []
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        screening = Screening(methods=("forest", "itsr", "aae"), epochs_scale=0.004)
        done = audit_data(
            None, screening, classes=["3"], data_name="digits", output=tmp_path / "whole", say=said.append
        )
    finally:
        torch.set_num_threads(torch_threads)
    assert said == ["all was screened before"]
    assert but_for_times(done.report) == but_for_times(first)
    assert but_for_times(done.report)["classes"] == but_for_times(second)["classes"]


def test_a_scan_takes_a_list_with_suspects_for_what_it_is(folder, tmp_path):
    done = audit_data(None, Screening(methods=("ocsvm",)), data_name="folder", data_root=folder, output=tmp_path)
    names = {suspect["file"] for suspect in done.report["suspects"]}
    data = DataConfig(name="folder", root=folder, bad_files="skip", bad_list=tmp_path / "audit-data.jsonl")
    whole, rest = (load_data(settings) for settings in (DataConfig(name="folder", root=folder), data))
    count = len(whole.train) + len(whole.held_out)
    assert len(rest.train) + len(rest.held_out) == count - len(names)
    assert len(names) == pytest.approx(0.1 * count, abs=4)
    assert not scan_folder(folder, workers=1).bad

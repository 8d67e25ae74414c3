"""The audit of concepts: directions by scikit-learn's own, S by its definition, what was planted, and the command."""

import json
import shutil
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from commands import run_command
from digits_model import digits, write_run
from PIL import Image
from sklearn.linear_model import SGDClassifier
from torch import Tensor, nn

from awp_engine.audit.concepts.directions import find_directions, fit_all, split_rows
from awp_engine.audit.concepts.images import open_concepts
from awp_engine.audit.concepts.layers import Cut, list_layers
from awp_engine.audit.concepts.run import Settings, audit_concepts
from awp_engine.audit.concepts.sensitivity import (
    changes,
    least_images,
    least_nulls,
    measure,
    most_exceedances,
    statistic,
)
from awp_engine.checkpoint import export_model, read_model
from awp_engine.evaluation.asked import Asked
from awp_engine.evaluation.attacks.named import EvaluationError


class Shortcut(nn.Module):
    """A layer that is bypassed, a part in place, a block with two outputs, and a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block = Block()
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.shared = nn.Tanh()
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.shared(self.stem(x))
        kept, changed = self.block(first)
        changed += kept
        out = self.twice(self.twice(changed).relu_())
        return self.head(self.shared(out + x).flatten(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.inner(x)


def model_of(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Shortcut().double().eval().requires_grad_(False)


IMAGES = torch.rand(40, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def with_activation(model: nn.Module, name: str, image: Tensor, step: Tensor) -> Tensor:
    """The logits by one pass of the whole network, whose layer's output is replaced."""
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, out: out + step.view_as(out))
    try:
        return model(image)
    finally:
        handle.remove()


def labels_of(count: int) -> np.ndarray:
    return np.repeat([1, 0], [count // 2, count - count // 2])


@pytest.mark.parametrize(("rows", "features"), [(20, 7), (60, 300)])
def test_all_classifiers_at_once_are_those_of_scikit_learn(rows, features):
    draws = np.random.RandomState(0)
    x = draws.randn(rows, features)
    x[: rows // 2, 0] += 1
    labels = np.stack([labels_of(rows), *(draws.permutation(labels_of(rows)) for _ in range(15))])
    weights, intercepts = fit_all(x @ x.T, 2.0 * labels - 1, 5)
    for own, intercept, y in zip(weights, intercepts, labels, strict=True):
        known = SGDClassifier(loss="hinge", alpha=0.01, max_iter=1000, tol=1e-3, random_state=5).fit(x, y)
        np.testing.assert_allclose(own @ x, known.coef_[0], rtol=1e-9, atol=1e-9)
        assert intercept == pytest.approx(known.intercept_[0], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", ["stem", "block.inner", "head"])
def test_s_and_the_statistic_are_those_of_the_definition(name):
    model, images = model_of(), IMAGES[:12]
    cut = Cut(model, name, images[:1])
    activations = cut.activations(IMAGES).numpy()
    labels = labels_of(len(IMAGES))
    fit, held_out = split_rows(labels, 3)
    assert (len(fit), len(held_out), labels[fit].sum()) == (26, 14, 13)
    found = find_directions(activations, labels, fit, held_out, nulls=30, seed=4)
    classifier = SGDClassifier(loss="hinge", alpha=0.01, max_iter=1000, tol=1e-3, random_state=4)
    v = classifier.fit(activations[fit], labels[fit]).coef_[0]
    assert found.accuracy == classifier.score(activations[held_out], labels[held_out])
    steps = torch.from_numpy(found.unit(0, 31)) * 10
    torch.testing.assert_close(steps[0], torch.from_numpy(10 * v / np.linalg.norm(v)), rtol=1e-9, atol=1e-9)

    expected = torch.stack(
        [
            torch.stack([with_activation(model, name, x, step).softmax(1)[0, 2] for step in steps])
            - model(x).softmax(1)[0, 2]
            for x in images.split(1)
        ]
    )
    kept = [cut.below(x) for x in images.split(1)]
    s = torch.stack([changes(cut, below, steps, 2)[0] for below in kept])
    torch.testing.assert_close(s, expected, rtol=1e-9, atol=1e-9)
    by_definition = ((expected >= 0).double().mean(0) - 0.5).abs()
    result = measure(cut, lambda: kept, found, 2, step=10, tests=1, batch_size=8)
    assert result.changes == pytest.approx(expected[:, 0].tolist(), rel=1e-9, abs=1e-9)
    assert result.statistic == pytest.approx(float(by_definition[0]), abs=1e-12)
    assert result.nulls == pytest.approx(by_definition[1 : 1 + len(result.nulls)].tolist(), abs=1e-12)
    above = [value >= float(by_definition[0]) - 1e-12 for value in by_definition[1:].tolist()]
    # it ends with the exceedance after which p cannot be small
    ended = next((k + 1 for k in range(30) if sum(above[: k + 1]) == most_exceedances(30, 1)), 30)
    assert (len(result.nulls), result.at_or_above) == (ended, sum(above[:ended]))
    assert result.p == (1 + result.at_or_above) / (1 + ended)


def test_fractions_the_same_way_from_a_half_are_the_same():
    # .7 - .5 is more than .5 - .3 in floating point
    raised = torch.arange(10)[:, None] < torch.tensor([7, 3, 5, 0])
    assert statistic(raised).tolist() == [0.2, 0.2, 0.0, 0.5]


def test_probabilities_that_round_to_one_are_told_apart():
    class Certain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Flatten()

        def forward(self, x: Tensor) -> Tensor:
            side = self.layer(x).sum(1) + 200
            return torch.stack([side, -side], 1)

    image = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    cut = Cut(Certain(), "layer", image)
    steps = torch.tensor([[1.0] * 4, [-1.0] * 4, [1.0, -1.0, 0.0, 0.0]], dtype=torch.float64)
    s, raised = changes(cut, cut.below(image), steps, 0)
    assert s.tolist() == [0, 0, 0]
    assert raised.tolist() == [True, False, True]


def test_an_early_end_leaves_no_p_that_would_count():
    for tests in (1, 3, 25):
        for nulls in (least_nulls(tests), 500, 1001):
            most = most_exceedances(nulls, tests)
            # whenever it ends, and whatever the other nulls would be
            assert tests * (1 + most) / (1 + nulls) > 0.05
        assert tests / (1 + least_nulls(tests)) < 0.05 <= tests / least_nulls(tests)


@pytest.mark.parametrize("tests", [1, 2, 6, 40])
def test_fewer_images_cannot_be_more_than_chance(tests):
    def coins_agree(images: int) -> float:
        return 2 / 2**images

    least = least_images(tests)
    assert tests * coins_agree(least) < 0.05 <= tests * coins_agree(least - 1)


def test_a_network_is_left_as_it_was_and_what_is_below_runs_once():
    model, ran = model_of(), []
    model.stem.register_forward_hook(lambda *_: ran.append("stem"))
    model.block.inner.forward = model.block.inner.forward
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    cut = Cut(model, "block.inner", IMAGES[:1])
    below = cut.below(IMAGES[:1])
    forwards: list[int] = []
    handle = model.stem._forward_pre_hooks
    assert not handle
    model.stem.__class__.forward, own = (lambda self, x: forwards.append(1) or own(self, x)), nn.Conv2d.forward
    try:
        cut.above(below, below.activation.repeat(9, 1, 1, 1))
    finally:
        nn.Conv2d.forward = own
    # that of `twice`, called two times; neither the stem nor the layer
    assert len(forwards) == 2
    with pytest.raises(RuntimeError):
        cut.above(below, torch.zeros(3, 7))
    for name, module in model.named_modules():
        assert {key for key in module.__dict__ if "forward" in key} == {key for key in before[name] if "forward" in key}
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blok.inner", "no layer 'blok.inner'; did you mean block.inner?"),
        ("twice", "twice is called 2 times for an image"),
        ("shared", "shared is called 2 times"),
        ("block", "block gives no single tensor"),
        ("unused", "unused is never called"),
    ],
)
def test_layers_that_cannot_be_cut_are_refused_in_one_line(name, words):
    with pytest.raises(EvaluationError) as error:
        Cut(model_of(), name, IMAGES[:1])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_network_that_mixes_images_is_refused():
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Flatten()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).cumsum(0)[:, :3]

    with pytest.raises(EvaluationError, match="its answers are others then"):
        Cut(Mixing(), "layer", IMAGES[:1])


def test_layers_are_listed_as_an_image_runs_through_them():
    found = {layer.name: layer for layer in list_layers(model_of(), IMAGES[:1])}
    assert list(found) == ["stem", "shared", "block.inner", "block", "twice", "head", "unused"]
    assert found["block.inner"].shape == (4, 6, 6)
    assert {name for name, layer in found.items() if layer.problem} == {"shared", "block", "twice", "unused"}


def test_shuffled_concepts_are_not_found():
    model, found = model_of(), []
    images = torch.rand(60, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cut = Cut(model, "stem", images[:1])
    kept = [cut.below(x) for x in images[:11].split(1)]
    for seed in range(60):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        activations = cut.activations(images[order[:24]]).numpy()
        fit, held_out = split_rows(labels_of(24), seed)
        directions = find_directions(activations, labels_of(24), fit, held_out, nulls=59, seed=seed)
        found.append(measure(cut, lambda: kept, directions, 1, step=10, tests=1, batch_size=64).p)
    assert sum(p < 0.05 for p in found) <= 60 * (0.05 + 2 * (0.05 * 0.95 / 60) ** 0.5)
    assert max(found) > 0.5


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Digits with a bright corner and the same without, as pairs."""
    place = tmp_path_factory.mktemp("concepts") / "corner"
    for part in ("with", "without"):
        (place / part).mkdir(parents=True)
        for k, image in enumerate(digits().test.images[:30]):
            pixels = image[0].clone()
            if part == "with":
                pixels[:2, :2] = 255
            Image.fromarray(pixels.numpy()).save(place / part / f"{k}.png")
    return place


LAYERS = ("layer1.0.conv2", "layer2.0.conv2")


def audit(run_dir: Path, output: Path, *concepts: str, **more) -> dict:
    settings = Settings(nulls=80, images=8, concept_images=20, seed=1)
    given = {"concepts": concepts, "layers": LAYERS, "classes": ["3"], "settings": settings} | more
    return audit_concepts([Asked(path=run_dir, output=output)], **given).report


def test_the_report_of_a_run(run_dir, folders, tmp_path):
    report = audit(run_dir, tmp_path, f"pairs:{folders}", "crops:4")
    assert json.loads((tmp_path / "audit-concepts.json").read_text()) == report
    assert [(test["layer"], test["concept"]) for test in report["tests"]] == [
        (layer, concept) for layer in LAYERS for concept in ("corner", "crops:4")
    ]
    for test in report["tests"]:
        assert test["p_corrected"] == min(1, 4 * test["p"])
        assert (test["swaps"] is not None) == (test["concept"] == "corner")
    # of 20 pairs, those that were held out
    assert report["tests"][0]["swaps"]["pairs"] == 7
    page = (tmp_path / "audit-concepts.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "corner" in page


def test_the_swaps_change_is_that_of_the_network(run_dir, tmp_path):
    (tmp_path / "own.py").write_text("def corner(x):\n    x[:, :, :2, :2] = 1\n    return x\n")
    report = audit(run_dir, tmp_path / "out", f"{tmp_path}/own.py:corner", layers=LAYERS[:1])
    from scipy.stats import kendalltau

    from awp_engine.models.trained import load_model

    model, split = load_model(run_dir), digits().test
    rows = (split.labels == 3).nonzero().squeeze(1)
    x = split.images[rows[torch.arange(8) * len(rows) // 8]].float() / 255
    marked = x.clone()
    marked[:, :, :2, :2] = 1
    with torch.no_grad():
        true = (model(marked).double().softmax(1) - model(x).double().softmax(1))[:, 3]
    (test,) = report["tests"]
    assert test["swaps"]["mean_change"] == pytest.approx(float(true.mean()), abs=1e-6)
    assert test["swaps"]["tau"] == pytest.approx(kendalltau(test["changes"], true.numpy())[0], abs=1e-6)


def test_concepts_that_are_made_of_the_data():
    given = ["crops:3", "textures:3", "colours:3", "random"]
    crops, textures, colours, random = open_concepts(given, digits(), count=20, seed=0)
    for concept in (crops, textures, colours, random):
        assert concept.images.shape == concept.others.shape == (20, 1, 8, 8)
        assert 0 <= float(concept.images.min()) < float(concept.images.max()) <= 1
    assert torch.equal(textures.images, textures.images[:, :, :2, :2].repeat(1, 1, 4, 4))
    assert torch.equal(colours.images, colours.images[:, :, :1, :1].expand(-1, -1, 8, 8))
    threes = digits().test.images[digits().test.labels == 3].float() / 255
    means = threes.mean((1, 2, 3))
    assert all(bool((means - value).abs().min() < 1e-6) for value in colours.images[:, 0, 0, 0])
    assert crops.digest() == open_concepts(["crops:3"], digits(), count=20, seed=0)[0].digest()
    assert crops.digest() != open_concepts(["crops:3"], digits(), count=20, seed=1)[0].digest()


def test_what_cannot_be_used_is_one_line(run_dir, folders, tmp_path, capsys, monkeypatch):
    few, damaged, lone = tmp_path / "few", tmp_path / "damaged", tmp_path / "lone"
    for place, count in ((few, 9), (damaged, 12)):
        place.mkdir()
        for k in range(count):
            (place / f"{k}.png").write_bytes((folders / "with" / f"{k}.png").read_bytes())
    (damaged / "5.png").write_bytes((folders / "with" / "5.png").read_bytes()[:60])
    for part, names in (("with", "01"), ("without", "0")):
        (lone / part).mkdir(parents=True)
        for name in names:
            (lone / part / f"{name}.png").write_bytes((folders / "with" / "0.png").read_bytes())
    given = {"--concepts": folders, "--layers": LAYERS[0], "--classes": 3}
    for (flag, value), words in {
        ("--concepts", few): "few has 9 images; expected at least 10",
        ("--concepts", damaged): "5.png",
        ("--concepts", f"pairs:{lone}"): "1.png is in with alone",
        ("--concepts", tmp_path / "none"): "--concepts: expected a folder of images",
        ("--concepts", "crops:12"): "--concepts: digits has no class '12'",
        ("--layers", "layer1.0.conv3"): "no layer 'layer1.0.conv3'; did you mean",
        ("--layers", "layer1"): "layer1 is never called",
        ("--classes", "ten"): "--classes: digits has no class 'ten'",
        ("--step", 0): "--step: expected a number > 0",
        ("--nulls", 19): "1 tests (concepts x layers x classes) need at least 20",
        ("--limit", 0): "--limit: expected a whole number from 1",
    }.items():
        flags = [part for name, own in (given | {flag: value}).items() for part in (name, own)]
        output = tmp_path / "out"
        assert run_command("audit_concepts", monkeypatch, run_dir, *flags, "--output", output) == 2, flag
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert not list(tmp_path.glob("out/*.json"))


def test_the_command_prints_layers_and_a_table(run_dir, folders, tmp_path, capsys, monkeypatch):
    assert run_command("audit_concepts", monkeypatch, run_dir, "--list-layers") == 0
    out = capsys.readouterr().out.splitlines()
    assert any(line.split()[:3] == ["layer1.0.conv2", "Conv3x3", "6x8x8"] for line in out)
    flags = ("--concepts", f"c={folders}", "random", "--layers", LAYERS[0], "--classes", 3, 5, "--nulls", 80)
    place = tmp_path / "out"
    assert run_command("audit_concepts", monkeypatch, run_dir, *flags, "--limit", 8, "--output", place) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "digits, 1 model, 80 directions of shuffled labels"
    assert out[1].split() == ["class", "concept", "layer", "held-out", "images", "raised", "statistic", "p", "leans"]
    assert len([line for line in out if LAYERS[0] in line and line[0] in "35"]) == 4
    assert out[-1] == f"report in {place}"


def test_a_run_that_was_renamed_has_its_new_name(run_dir, tmp_path):
    whole = audit(run_dir, tmp_path, "random", layers=LAYERS[:1], classes=["3", "5"])
    (journal,) = tmp_path.glob("*.jsonl")
    journal.write_text(journal.read_text().splitlines(keepends=True)[0])
    shutil.copytree(run_dir, tmp_path / "renamed")
    found = audit(tmp_path / "renamed", tmp_path, "random", layers=LAYERS[:1], classes=["3", "5"])["tests"]
    assert found == [test | {"model": "renamed"} for test in whole["tests"]]


def test_models_side_by_side_are_asked_the_same(run_dir, tmp_path):
    names = "abcdefghij"
    (tmp_path / "own.py").write_text(
        "import torch\ndef make():\n    x, y = torch.linspace(0, 1, 2560).view(40, 1, 8, 8), torch.arange(40) % 10\n"
        f"    return {{'train': (x, y), 'test': (x, y), 'class_names': list({names!r})}}\n"
    )
    shutil.copytree(run_dir, other := tmp_path / "other")
    weights, header = read_model(other / "model.safetensors")
    export_model(other / "model.safetensors", weights, header | {"class_names": json.dumps(list(names))})
    asked = [Asked(path=run_dir), Asked(path=other, data_name=f"{tmp_path}/own.py:make")]
    with pytest.raises(EvaluationError, match=r"other is asked about d of .*, and digits about 3 of digits; expected"):
        audit_concepts(asked, concepts=["random"], layers=LAYERS[:1], classes=["3"])


def test_few_images_of_a_class_are_said_and_precision_is_full(run_dir, tmp_path):
    told, precisions = [], []
    settings = Settings(nulls=20, images=5, concept_images=20)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        audit_concepts(
            [Asked(path=run_dir, output=tmp_path)],
            concepts=["random"],
            layers=LAYERS[:1],
            classes=["3"],
            settings=settings,
            say=told.append,
            tell=lambda _: precisions.append(torch.backends.cuda.matmul.fp32_precision),
        )
        assert (precisions, torch.backends.cuda.matmul.fp32_precision) == (["ieee"], "tf32")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert "digits: class 3 is tested on 5 images; so few move" in "\n".join(told)
    assert "it takes 6 at least" in "\n".join(told)


def test_a_folder_may_have_an_equals_sign_in_its_name(folders, tmp_path):
    shutil.copytree(folders / "with", tmp_path / "a=b")
    (found,) = open_concepts([f"{tmp_path}/a=b"], digits(), count=20, seed=0)
    assert found.name == "a=b"
    (named,) = open_concepts([f"corner={tmp_path}/a=b"], digits(), count=20, seed=0)
    assert named.name == "corner"
    assert torch.equal(found.images, named.images)


def without_resume(report: dict) -> dict:
    receipt = report["receipt"]
    models = [{key: value for key, value in model.items() if key != "date"} for model in receipt["models"]]
    return report | {"receipt": {key: value for key, value in receipt.items() if key != "resumed"} | {"models": models}}


def test_a_killed_audit_goes_on_to_the_same_bits(run_dir, folders, tmp_path):
    flags = ["--concepts", f"pairs:{folders}", "crops:4", "--layers", *LAYERS, "--classes", "3", "5"]
    command = ["-m", "awp_engine", "audit", "concepts", run_dir, *flags, "--nulls", "200", "--output"]

    def report(name: str) -> dict:
        return json.loads((tmp_path / name / "audit-concepts.json").read_text())

    whole, killed = (forked.Program(*command, tmp_path / name) for name in ("whole", "killed"))
    ended = time.monotonic() + 120
    while time.monotonic() < ended:
        saved = list((tmp_path / "killed").glob("*.jsonl"))
        if saved and 1 <= len(saved[0].read_text().splitlines()) <= 6:
            break
        time.sleep(0.005)
    killed.kill()
    assert not list((tmp_path / "killed").glob("*.json"))
    assert whole.end().returncode == 0
    again = forked.run(*command, tmp_path / "killed")
    assert "going on after test" in again.stdout
    assert again.returncode == 0
    assert 1 <= report("killed")["receipt"]["resumed"]["tests"] < 8
    assert without_resume(report("killed")) == without_resume(report("whole"))

"""The audits of objects of Python: a module and arrays, as a notebook has them."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import awp_engine
from awp_engine.audit.concepts import run as concepts_run
from awp_engine.audit.data.run import Screening
from awp_engine.audit.weights import run as weights_run
from awp_engine.audit.weights.edit import Recipe
from awp_engine.evaluation.attacks.named import EvaluationError

NAMES = [f"d{digit}" for digit in range(10)]


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(data.target)


@pytest.fixture(scope="module")
def network(digits):
    x, y = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(10):
            for rows in torch.randperm(1400).split(100):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
    return model.eval()


def test_a_modules_weights_are_audited_and_stay(digits, network, tmp_path):
    (x, y), before = digits, {name: tensor.clone() for name, tensor in network.state_dict().items()}
    settings = weights_run.Settings(
        kinds=("layer",),
        target="d3",
        success=0.5,
        agreement=0.7,
        recipe=Recipe(learning_rate=0.01),
        edit_images=640,
        tolerance=4,
        harmless=2,
    )
    done = awp_engine.audit_weights(
        network, (x[:1400], y[:1400]), (x[1400:], y[1400:]), class_names=NAMES, settings=settings, output=tmp_path
    )
    (kind,) = done.report["kinds"]
    assert done.report["receipt"]["settings"]["target"] == "d3"
    assert kind["effect"]["success"] >= 0.5
    assert kind["effect"]["agreement"] >= 0.7
    assert 0 < kind["budget"] <= 1
    assert (tmp_path / "audit-weights.html").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_images_of_another_class_are_listed_by_a_modules_features(digits, network, tmp_path):
    x, y = digits
    wrong = torch.nonzero(y == 1).squeeze(1)[:3]
    labels = y.clone()
    labels[wrong] = 0
    done = awp_engine.audit_data(network, x, labels, class_names=NAMES, classes=("d0",), output=tmp_path)
    assert done.report["asked"]["methods"] == ["forest", "ocsvm"]
    assert done.report["asked"]["on"] == "features before network.3"
    found = {suspect["id"] for suspect in done.report["suspects"]}
    assert set(wrong.tolist()) <= found
    assert len(found) < 0.15 * int((labels == 0).sum())
    other = awp_engine.audit_data(
        network, x, labels, screening=Screening(methods=("ocsvm",)), classes=("0",), output=tmp_path / "other"
    )
    assert other.report["asked"]["methods"] == ["ocsvm"]


def test_concepts_of_modules_are_asked_by_the_modules_own_names(digits, network, tmp_path):
    x, y = digits
    asked = {"concepts": ("crops:d8", "random"), "classes": ("d8",), "class_names": NAMES, "output": tmp_path}
    settings = concepts_run.Settings(nulls=100, images=20, concept_images=30)
    done = awp_engine.audit_concepts(
        {"a": network, "b": nn.Sequential(*network)}, x, y, layers=("1",), settings=settings, **asked
    )
    tests = {name: one.report["tests"] for name, one in done.items()}
    assert [test["layer"] for test in tests["a"]] == ["network.1", "network.1"]
    # two modules of the same numbers
    assert [test["changes"] for test in tests["a"]] == [test["changes"] for test in tests["b"]]
    assert {place.parent.name for place in tmp_path.glob("*/audit-concepts.json")} == {"a", "b"}
    with pytest.raises(EvaluationError, match="has no argument 'step'"):
        awp_engine.audit_concepts({"a": network}, x, y, layers=("1",), step=2, **asked)
    with pytest.raises(EvaluationError, match=r"expected modules by plain names, got \.\./a"):
        awp_engine.audit_concepts({"../a": network}, x, y, layers=("1",), **asked)
    with pytest.raises(EvaluationError, match=r"--layers: the model has no layer '9'"):
        awp_engine.audit_concepts({"a": network}, x, y, layers=("9",), settings=settings, **asked)

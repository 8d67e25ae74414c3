"""The examples of README and of the guides, run as they stand."""

import re

import pytest
import torch
from places import ROOT
from samples import images

import awp_engine
from awp_engine.models import build_model

# with the number of their examples
DOCUMENTS = {
    "README.md": 2,
    "docs/trained-models.md": 5,
    "docs/own-trainer.md": 4,
    "docs/python.md": 3,
    "docs/operations.md": 1,
    "docs/extend.md": 8,
}
TEXTS = {name: (ROOT / name).read_text() for name in DOCUMENTS}
BLOCKS = {name: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for name, text in TEXTS.items()}


@pytest.fixture
def namespace(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    theirs = build_model("preact-resnet-18", 10, (0.5,) * 3, (0.25,) * 3)
    torch.save({"net": {f"module.{name}": value for name, value in theirs.state_dict().items()}}, "FILE.pt")
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4)
    model.class_names = tuple("0123456789")
    monkeypatch.setattr(awp_engine, "load_model", lambda path, **given: model.eval(), raising=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = images((4, 1, 8, 8)), torch.arange(4)
    loss = torch.nn.functional.cross_entropy
    return {
        "torch": torch,
        "steps": 3,
        "model": model,
        "optimizer": optimizer,
        "opt": optimizer,
        "x": x,
        "x_adv": x.clone(),
        "y": y,
        "loader": [(x, y)],
        "loss_fn": loss,
        "criterion": loss,
    }


@pytest.mark.parametrize(("name", "count"), DOCUMENTS.items())
def test_documents_have_their_examples(name, count):
    assert len(BLOCKS[name]) == count
    assert "@@" not in TEXTS[name]


def test_objects_of_python_are_trained_and_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = {}
    for block in BLOCKS["docs/python.md"]:
        exec(block, place)
    assert place["done"].measurement.images == 30
    assert (tmp_path / "evaluation" / "evaluation.html").is_file()
    assert place["model"].class_names == ("cat", "dog", "wolf")


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "docs/python.md"])
def test_examples_run_in_order(namespace, name):
    before = [p.detach().clone() for p in namespace["model"].parameters()]
    for block in BLOCKS[name]:
        exec(block, namespace)
    assert namespace["x_adv"].shape == namespace["x"].shape
    after = list(namespace["model"].parameters())
    trains = name not in ("docs/trained-models.md", "docs/operations.md")
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)) == trains

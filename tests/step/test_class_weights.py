"""Weights of the classes in the loss: their definition in fp64, where they come from, and what is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from test_methods import GAMMA, batch, build_step, descend, gradient, relative, small_model

from awp_engine.attack import Attack
from awp_engine.config import ConfigError, from_json, to_json
from awp_engine.config.presets import build_preset
from awp_engine.data import DataError, Dataset, Split, class_weights, label_notes
from awp_engine.evaluation import evaluate
from awp_engine.step.objectives import build_objective

WEIGHTS = torch.linspace(0.2, 3.0, 10, dtype=torch.float64)


@pytest.mark.parametrize("method", ["at", "trades", "mart"])
def test_every_images_loss_is_weighed_in_ascent_and_descent(method: str) -> None:
    """sum(w[y] * loss) / N, at w and at w + v; the attack on an image does not depend on its weight."""
    ours, (x, y, ids) = small_model(), batch(4)
    model, objective = copy.deepcopy(ours), build_objective(method)

    def loss(of: torch.nn.Module) -> torch.Tensor:
        losses, _ = objective.losses(of, x_adv, x, y)
        return (WEIGHTS[y] * losses).sum() / len(y)

    step = build_step(ours, method, class_weights=WEIGHTS)
    x_adv = step.attacked(copy.deepcopy(ours), x, y, ids, 0)
    climber = copy.deepcopy(model)
    gradients = gradient(climber, loss(climber))
    moved = {
        name: w + GAMMA * w.norm() / gradients[name].norm() * gradients[name]
        for name, w in model.named_parameters()
        if w.ndim > 1 and "weight" in name
    }
    expected = descend(model, moved, loss)
    result = step(x, y, sample_ids=ids, seed=0)
    assert relative(ours, expected) <= 1e-9
    # weights that say nothing change nothing
    same, plain = small_model(), small_model()
    build_step(same, method, class_weights=torch.ones_like(WEIGHTS))(x, y, sample_ids=ids)
    other = build_step(plain, method)(x, y, sample_ids=ids)
    assert relative(same, plain) == 0
    assert relative(ours, plain) > 1e-3
    assert float(result.loss) != float(other.loss)


def test_accuracies_weigh_images_by_the_weights_of_their_class() -> None:
    model, (x, y, ids) = small_model(), batch(n=40)
    split = Split(images=(x * 255).to(torch.uint8), labels=y, ids=ids)
    attack = Attack(epsilon=0.05, step_size=0.05, steps=1, norm="linf")
    with torch.no_grad():
        right = model.eval()(split.images.float() / 255).argmax(1) == y
    plain = evaluate(model, split, attack, batch_size=7)
    found = evaluate(model, split, attack, batch_size=7, class_weights=WEIGHTS.tolist())
    assert plain.clean == pytest.approx(float(right.double().mean()))
    assert found.clean == pytest.approx(float((WEIGHTS[y] * right).sum() / WEIGHTS[y].sum()))
    assert abs(found.clean - plain.clean) > 1e-3
    robust = torch.tensor(plain.robust_by_class)
    assert plain.robust == pytest.approx(int(robust.sum()) / 40)
    present = WEIGHTS[: len(robust)]
    assert found.robust == pytest.approx(float((present * robust).sum() / WEIGHTS[y].sum()))


def labelled(*counts: int, tested: tuple[int, ...] | None = None) -> Dataset:
    """A data set of so many training images of every class."""

    def split(numbers: tuple[int, ...]) -> Split:
        labels = torch.repeat_interleave(torch.arange(len(numbers)), torch.tensor(numbers))
        return Split(images=torch.zeros(len(labels), 1, 2, 2, dtype=torch.uint8), labels=labels, ids=labels)

    names = tuple("abcdefgh"[: len(counts)])
    part = split(counts)
    test = split(tested or tuple(1 for _ in counts))
    return Dataset(
        name="some",
        train=part,
        held_out=part,
        test=test,
        class_names=names,
        mean=(0.0,),
        std=(1.0,),
        fingerprint="",
    )


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    data = labelled(1, 3, 16)
    assert class_weights("balanced", data) == pytest.approx([20 / 3, 20 / 9, 20 / 48])
    with pytest.raises(DataError, match=r"class 'b' has no training image"):
        class_weights("balanced", labelled(1, 0, 16))


def test_weights_of_a_file_have_mean_1_over_the_training_images(tmp_path: Path) -> None:
    path, data = tmp_path / "weights.json", labelled(1, 3)
    for content in ({"b": 1, "a": 5}, [5, 1.0]):
        path.write_text(json.dumps(content))
        assert class_weights(str(path), data) == pytest.approx([2.5, 0.5])
    for content, message in (
        ('{"a": 1}', "'b' has no weight"),
        ('{"a": 1, "b": 1, "cat": 1}', "'cat' is no class"),
        ("[1]", "of 2 weights"),
        ("[1, 0]", "'b' has 0; expected a number from 1e-6"),
        ("[1, true]", "'b' has True"),
        ("[1, NaN]", "'b' has nan"),
        ("{", "is no JSON"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            class_weights(str(path), data)
    with pytest.raises(DataError, match="cannot be read"):
        class_weights(str(tmp_path / "nowhere.json"), data)


def test_odd_labels_are_told() -> None:
    assert label_notes(labelled(5, 6)) == []
    assert label_notes(labelled(5, 0, 5, 0, tested=(1, 1, 0, 0))) == [
        "1 of 4 classes have test images but no training images: 'b'",
        "1 of 4 classes have training images but no test images: 'c'",
        "1 of 4 classes have a name but no images: 'd'",
    ]
    said = "the classes have 5 ('b') to 50 ('c') training images"
    assert label_notes(labelled(9, 5, 50)) == [f"{said}; --data.class-weights balanced lets all count the same"]
    assert label_notes(labelled(9, 5, 50), weighted=True) == [said]


def test_runs_of_earlier_versions_had_no_weights_and_senseless_ones_are_refused() -> None:
    config = build_preset("digits")
    text = to_json(config)
    values = json.loads(text)
    del values["data"]["class_weights"]
    assert from_json(json.dumps(values)) == config
    for changes, flag in (
        ({"cutmix": 0.5}, "--data.cutmix"),
        ({"mixup": 0.5}, "--data.mixup"),
        ({"class_weights": "heavy"}, "--data.class-weights"),
    ):
        values = json.loads(text)
        values["data"] |= {"class_weights": "balanced"} | changes
        with pytest.raises(ConfigError, match=flag):
            from_json(json.dumps(values))
    values = json.loads(text)
    values["data"]["class_weights"], values["awp"]["ascent"] = "balanced", "shared"
    with pytest.raises(ConfigError, match=r"--awp.ascent: expected exact with --data.class-weights"):
        from_json(json.dumps(values))

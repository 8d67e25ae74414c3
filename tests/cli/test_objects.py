"""`awp_engine.fit` and `awp_engine.evaluate`: a model and images as objects of Python."""

import dataclasses
import io
import json
import threading

import pytest
import torch
from commands import run_command
from samples import images
from torch import nn
from torch.utils.data import TensorDataset

import awp_engine
from awp_engine.checkpoint import CheckpointError, export_model, read_model
from awp_engine.cli.command_line import parse_train
from awp_engine.compare.read import read_run
from awp_engine.config import ConfigError, load_config, require_same_run
from awp_engine.config.model_names import source_of
from awp_engine.data import DataError
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.evaluation.model.loaded_model import require_named_data
from awp_engine.models.given import given, given_data, name_of

QUICK = {"epochs": 2, "attack.steps": 2, "evaluation.steps": 2, "global-batch-size": 16, "log": ["none"]}


def network(num_classes):
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, num_classes))


@pytest.fixture
def data():
    x, y = images((60, 1, 8, 8)), torch.arange(60) % 3
    return (x[:45], y[:45]), (x[45:], y[45:])


def test_a_run_of_objects_is_trained_gone_on_with_and_loaded(data, tmp_path):
    done = awp_engine.fit(network, *data, run_dir=tmp_path / "run", settings=QUICK, class_names=("a", "b", "c"))
    assert done.report["epochs"] == 2
    assert done.model.class_names == ("a", "b", "c")
    assert json.loads((done.run_dir / "config.json").read_text())["attack"]["steps"] == 2
    before = (done.run_dir / "report.json").stat().st_mtime_ns
    # it has ended
    again = awp_engine.fit(network, *data, run_dir=tmp_path / "run", settings=QUICK, class_names=("a", "b", "c"))
    assert (done.run_dir / "report.json").stat().st_mtime_ns == before
    title, head, row, place = str(again).splitlines()
    assert (title.split()[1:3], head.split()[:2]) == (["test", "split,"], ["method", "clean"])
    assert row.split()[:2] == ["AT-AWP", f"{done.report['clean_accuracy']:.2%}"]
    assert place == f"results in {tmp_path / 'run'}"
    x = data[1][0]
    assert torch.equal(again.model(x), done.model(x))
    with pytest.raises(awp_engine.checkpoint.CheckpointError, match="given as an object of Python: give it again"):
        awp_engine.load_model(done.run_dir)
    assert torch.equal(awp_engine.load_model(done.run_dir, model=network)(x), done.model(x))


class Wide(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 3))


@pytest.fixture
def run(data, tmp_path):
    awp_engine.fit(network, *data, run_dir=tmp_path / "run", settings=QUICK | {"epochs": 1})
    return tmp_path / "run"


def test_two_models_are_two_settings(run, data, tmp_path):
    done = awp_engine.fit(Wide(), *data, run_dir=tmp_path / "wide", settings=QUICK | {"epochs": 1})
    configs = [load_config(place / "config.json") for place in (run, done.run_dir)]
    assert [config.model.name for config in configs] == ["given(test_objects.network)", "given(test_objects.Wide)"]
    assert [config.data.name for config in configs] == ["given-images"] * 2
    first, second = (read_run(place).settings for place in (run, done.run_dir))
    assert [key for key in first if first[key] != second[key]] == ["model.name"]
    # what goes on with a trained model has the name of the class inside it
    assert name_of(done.model) == configs[1].model.name
    assert source_of(name_of(lambda: 0)) == source_of(name_of(Signed(1.0))) == "object"


@pytest.mark.parametrize(
    ("model", "images"),
    [
        ("given(test_objects.network)", "given-images"),
        # of earlier runs
        ("awp_engine.cli.objects:model", "awp_engine.cli.objects:data"),
        # of a stranger, who would like it to be imported
        ("given(os.abort)", "given-images"),
    ],
)
def test_names_of_objects_load_nothing(run, data, model, images, tmp_path, monkeypatch, capsys):
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(
        config.replace("given(test_objects.network)", model).replace("given-images", images)
    )
    weights, metadata = read_model(run / "model.safetensors")
    metadata |= {"model": metadata["model"].replace("given(test_objects.network)", model)}
    export_model(run / "model.safetensors", weights, metadata)
    with pytest.raises(CheckpointError, match="given as an object of Python: give it again"):
        awp_engine.load_model(run)
    assert awp_engine.load_model(run, model=network)(data[1][0]).shape == (15, 3)
    assert run_command("evaluate", monkeypatch, run) == 2
    with pytest.raises(EvaluationError, match=r"its run were given as objects of Python: give --data\.name"):
        require_named_data(load_config(run / "config.json"), run)
    with pytest.raises(SystemExit):
        parse_train(["--config", str(run / "config.json"), "--run-dir", str(tmp_path / "new")])
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert "its model was given as an object of Python" in first
    assert "data.name is an object of Python, which awp_engine.fit takes; give --data.name" in second


def test_a_run_of_an_earlier_version_goes_on(data, tmp_path, monkeypatch, capsys):
    settings = QUICK | {"optimizer.schedule": "constant"}
    with monkeypatch.context() as earlier:
        earlier.setattr("awp_engine.objects.name_of", lambda _: "awp_engine.cli.objects:model")
        awp_engine.fit(network, *data, run_dir=tmp_path / "run", settings=settings | {"epochs": 1})
    saved = load_config(tmp_path / "run" / "config.json")
    assert saved.model.name == "awp_engine.cli.objects:model"
    images = dataclasses.replace(saved.data, name="awp_engine.cli.objects:data")
    require_same_run(dataclasses.replace(saved, data=images), saved, tmp_path)
    assert awp_engine.fit(network, *data, run_dir=tmp_path / "run", settings=settings).report["epochs"] == 2
    assert "going on after epoch 1" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--model\.name is 'given\(test_objects\.network\)' there"):
        awp_engine.fit(Wide(), *data, run_dir=tmp_path / "run", settings=settings)


def test_another_thread_may_train(data, tmp_path):
    done = []
    settings = QUICK | {"epochs": 1}
    thread = threading.Thread(
        target=lambda: done.append(awp_engine.fit(network, *data, run_dir=tmp_path / "run", settings=settings))
    )
    thread.start()
    thread.join()
    assert done[0].report["epochs"] == 1


def test_a_module_is_copied_and_starts_from_its_weights(data, tmp_path):
    torch.manual_seed(3)
    module = network(3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    still = QUICK | {"optimizer.lr": 1e-30, "awp.gamma": 0.0, "optimizer.weight-decay": 0.0}
    done = awp_engine.fit(module, *data, run_dir=tmp_path / "run", settings=still)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    torch.testing.assert_close(done.model.state_dict(), {f"network.{name}": value for name, value in before.items()})


def test_a_module_is_measured_as_it_is(data, tmp_path):
    x, y = data[1]
    torch.manual_seed(3)
    module = network(3)
    done = awp_engine.evaluate(
        module, x, y, epsilon="1/10", attacks=["clean", "pgd5"], output=tmp_path / "out", gates_limit=None
    )
    # images are held as bytes
    x = (x * 255).round() / 255
    assert done.measurement.clean == int((module(x).argmax(1) == y).sum())
    assert done.report["receipt"]["epsilon"] == "1/10"
    assert (tmp_path / "out" / "evaluation.json").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 7}, "model: expected a module, or a function that makes one, got int"),
        ({"settings": {"atack.steps": 2}}, "settings: unknown name 'atack.steps'; did you mean attack.steps"),
        ({"settings": {"epochs": "many"}}, "--epochs: expected a whole number"),
        ({"settings": {"attack.epsilon": 8 / 255}}, 'expected text in quotes, such as "8/255" or "0.1", got 0.03137'),
        ({"train": (torch.randn(9, 1, 8, 8), torch.arange(9) % 3)}, "train image 0 has values from"),
        ({"preset": "digtis"}, "did you mean digits"),
        ({"classnames": ["a", "b"]}, "^fit: has no argument 'classnames'; did you mean class_names\\?$"),
        ({"epochs": 3}, r"^fit: has no argument 'epochs'; settings=\{...\} has what flags say$"),
    ],
)
def test_what_is_wrong_is_one_line(data, tmp_path, change, message):
    parts = {"model": network, "train": data[0], "test": data[1], "run_dir": tmp_path / "run"} | change
    with pytest.raises((ConfigError, DataError), match=message) as error:
        awp_engine.fit(**parts)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="given as objects of Python"):
        given_data()


def test_calls_of_two_threads_take_turns():
    seen = []

    def other():
        with given(network, {"test": 2}):
            seen.append(given_data())

    with given(network, {"test": 1}):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        assert given_data() == {"test": 1}
        assert not seen
    thread.join()
    assert seen == [{"test": 2}]


def test_a_trained_model_is_measured_with_its_own_normalisation(data, tmp_path):
    x, y = data[1]
    done = awp_engine.fit(network, *data, run_dir=tmp_path / "run", settings=QUICK)
    assert done.model.mean.abs().max() > 0.1
    with torch.no_grad():
        expected = done.model((x * 255).round() / 255).argmax(1)
    measured = awp_engine.evaluate(
        done.model,
        *(x, y),
        epsilon="1/10",
        attacks=["clean"],
        output=tmp_path / "out",
        gates_limit=None,
        save_per_image="npz",
    )
    assert torch.equal(measured.measurement.per_image.attacks["clean"].predictions, expected)
    assert measured.report["receipt"]["normalisation"]["mean"] == done.model.mean.flatten().tolist()
    gone_on = awp_engine.fit(
        done.model, *((part[0][:30], part[1][:30]) for part in data), run_dir=tmp_path / "on", settings=QUICK
    )
    assert torch.equal(gone_on.model.mean, done.model.mean)
    lines = str(measured).splitlines()
    assert lines[2].split()[:2] == ["clean", f"{100 * int((expected == y).sum()) / len(y):.2f}%"]


def test_a_data_set_and_the_models_own_class_names_are_taken(data, tmp_path):
    module, names = network(3), ("a", "b", "c")
    done = awp_engine.fit(module, *data, run_dir=tmp_path / "run", settings=QUICK, class_names=names)
    given = {"epsilon": "1/10", "attacks": ["clean"], "output": tmp_path / "out"}
    measured = awp_engine.evaluate(done.model, TensorDataset(*data[1]), **given, gates_limit=15)
    assert [row["class"] for row in measured.report["per_class"]] == list(names)
    assert "weights: those of the module that was given" in measured.report["receipt"]["checkpoint"]["notes"]
    assert f"; {measured.measurement.gates.words}\n" in str(measured)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 8 / 255}, r'^--epsilon: expected text, .* such as "8/255", got 0\.03137'),
        ({"gates": False}, "^evaluate: has no argument 'gates'; gates_limit=None leaves the gates out$"),
        ({"no_gates": True}, "gates_limit=None"),
        ({"restart": 3}, "^evaluate: has no argument 'restart'; did you mean restarts\\?$"),
    ],
)
def test_what_evaluate_does_not_take_is_one_line(data, tmp_path, change, message):
    given = {"epsilon": "1/10", "attacks": ["clean"], "output": tmp_path / "out", "gates_limit": None} | change
    with pytest.raises((ConfigError, EvaluationError), match=message):
        awp_engine.evaluate(network(3), *data[1], **given)


class Probabilities(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :3].softmax(1)


@pytest.mark.parametrize(
    ("model", "labels", "message"),
    [
        # never a new last layer, whose weights nobody has trained
        (network(3), 2, "has 3 classes, .* 2; if these are images of some of its classes, name all 3 in class_names"),
        (Probabilities(), 3, "model: expected logits, got rows of probabilities"),
    ],
)
def test_what_would_be_measured_wrongly_is_refused(data, tmp_path, model, labels, message):
    x, y = data[1]
    with pytest.raises(EvaluationError, match=message):
        awp_engine.evaluate(model, x, y % labels, epsilon="1/10", attacks=["pgd5"], output=tmp_path, gates_limit=None)


def test_a_notebook_shows_the_training_under_its_cell(data, tmp_path, monkeypatch):
    class Cell(io.StringIO):
        def fileno(self):
            return terminal.fileno()

    cell = Cell()
    with (tmp_path / "terminal").open("w") as terminal:
        monkeypatch.setattr("sys.stdout", cell)
        awp_engine.fit(network, *data, run_dir=tmp_path / "run", settings=QUICK)
    assert "measuring on 15 test images" in cell.getvalue()
    assert not (tmp_path / "terminal").read_text()


class Signed(nn.Module):
    """Two of these differ in a plain attribute alone."""

    def __init__(self, sign):
        super().__init__()
        self.inner, self.sign = network(3), sign

    def forward(self, x):
        return self.sign * self.inner(x)


def test_no_report_of_another_object_is_read_again(data, tmp_path):
    x, y = data[1]
    torch.manual_seed(1)
    one, other = Signed(1.0), Signed(-1.0)
    other.load_state_dict(one.state_dict())
    given = {"epsilon": "1/10", "attacks": ["clean"], "output": tmp_path, "gates_limit": None}
    right = [awp_engine.evaluate(model, x, y, **given).measurement.clean for model in (one, other)]
    x = (x * 255).round() / 255
    assert right == [int((model(x).argmax(1) == y).sum()) for model in (one, other)]
    assert right[0] != right[1]


def test_an_ended_run_of_other_images_is_refused(data, tmp_path):
    settings = QUICK | {"epochs": 1}
    awp_engine.fit(network, *data, run_dir=tmp_path / "run", settings=settings)
    (x, y), test = data
    with pytest.raises(ConfigError, match="was trained on other images"):
        awp_engine.fit(network, (x.flip(0), y), test, run_dir=tmp_path / "run", settings=settings)
    with pytest.raises(ConfigError, match="has ended, and was measured on other test images"):
        awp_engine.fit(network, (x, y), (test[0].flip(0), test[1]), run_dir=tmp_path / "run", settings=settings)

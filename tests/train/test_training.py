"""Whole runs as a user starts them: real processes, real signals, real files."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from places import ENGINE, TRAIN
from safetensors.torch import load_file
from samples import images

import awp_engine
from awp_engine.attack import Attack
from awp_engine.compare.curves import draw_runs
from awp_engine.config import (
    AttackConfig,
    AverageConfig,
    AwpConfig,
    Config,
    ConfigError,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
)
from awp_engine.data import DataError, load_dataset
from awp_engine.evaluation import evaluate
from awp_engine.train.hooks import TrainingError
from awp_engine.train.progress import EpochSums
from awp_engine.train.trainer import Trainer

# small enough for a test: a narrow network, two attack steps
SMALL = ["--model.width", "2", "--attack.steps", "2", "--evaluation.steps", "3", "--global-batch-size", "256"]


def run(*arguments: str | Path, cwd: Path | None = None) -> tuple[int, str, str]:
    done = forked.run(TRAIN, *arguments, cwd=cwd)
    return done.returncode, done.stdout, done.stderr


def small_config(run_dir: Path, **changes) -> Config:
    config = Config(
        run_dir=run_dir,
        epochs=3,
        global_batch_size=256,
        data=DataConfig(pad=1),
        model=ModelConfig(width=2),
        attack=AttackConfig(steps=2),
        awp=AwpConfig(gamma=0.005),
        evaluation=EvaluationConfig(steps=3),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    code, out, err = run(*SMALL, "--epochs", "2", "--evaluation.steps", "20", "--run-dir", run_dir)
    assert code == 0, err
    assert "digits test split" in out
    assert str(run_dir) in out
    return run_dir


def test_a_run_leaves_what_was_promised(finished):
    report = json.loads((finished / "report.json").read_text())
    for name in ("clean_accuracy", "pgd20_accuracy", "train_pgd_accuracy"):
        assert 0 <= report[name] <= 1
    assert report["epochs"] == 2
    assert report["seconds"] > 0
    assert report["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert "commit" in report
    assert json.loads((finished / "config.json").read_text())["model"]["width"] == 2
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(line["loss"] > 0 for line in lines)
    assert 0 <= lines[1]["held_out_pgd_accuracy"] <= 1  # the digits preset looks at every second epoch
    assert list((finished / "tensorboard").iterdir())
    assert (finished / "checkpoints" / "epoch-2" / "manifest.json").exists()
    assert (finished / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_what_the_selected_weights_give(finished):
    """Measured again from model.safetensors alone."""
    model = awp_engine.load_model(finished)
    assert not model.training
    report = json.loads((finished / "report.json").read_text())
    data = load_dataset("digits", root=None, held_out_fraction=0.1, seed=0)
    with torch.no_grad():
        predicted = model(data.test.images / 255).argmax(1)
    assert (predicted == data.test.labels).double().mean().item() == pytest.approx(report["clean_accuracy"])
    attack = Attack(epsilon=0.2, step_size=0.05, steps=20, norm="linf", seed=1)
    accuracy = evaluate(model, data.test, attack, batch_size=100)
    assert accuracy.robust == pytest.approx(report["pgd20_accuracy"], abs=0.03)
    by_checkpoint = awp_engine.load_model(finished / "checkpoints" / f"epoch-{report['selected_epoch']}")
    for a, b in zip(model.state_dict().values(), by_checkpoint.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_starting_a_finished_run_again_trains_nothing(finished):
    before = weights(finished)
    code, out, err = run(*SMALL, "--epochs", "2", "--evaluation.steps", "20", "--run-dir", finished)
    assert code == 0, err
    assert out.startswith(f"finished: {finished} has all its 2 epochs; its learning rate falls over all epochs")
    assert "measuring" not in out
    assert "going on" not in out
    assert equal(weights(finished), before)


def test_evaluate_command(finished):
    result = forked.run(ENGINE / "evaluate.py", finished, "--gates-limit", "20")
    # two epochs of a narrow model may well fail a gate
    assert result.returncode in (0, 3), result.stderr
    report = json.loads((finished / "report.json").read_text())
    assert f"{report['clean_accuracy']:.2%}" in result.stdout
    assert f"{report['pgd20_accuracy']:.2%}" in result.stdout
    missing = forked.run(ENGINE / "evaluate.py", "/nowhere/at/all")
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1
    assert "/nowhere/at/all" in missing.stderr


def test_an_l2_ball_that_no_image_fits_is_refused_before_anything_is_written(tmp_path):
    attack = AttackConfig(norm="l2", epsilon="128", step_size="15", steps=2)
    with pytest.raises(ConfigError, match=r"^--attack\.epsilon: expected at most 9 for l2, as values lie in \[0, 1\]"):
        Trainer(small_config(tmp_path / "run", attack=attack))
    assert not (tmp_path / "run").exists()


def test_sums_of_an_earlier_version_are_gone_on_from():
    """They end before the gradients that are not finite, or before the rise of the loss."""
    numbers = torch.tensor([2.0, 0.5, 0.1, 0.3, 0.2, 0.8], dtype=torch.float64)
    sums, loaded = EpochSums(torch.device("cpu")), EpochSums(torch.device("cpu"))
    sums.add_(numbers, torch.tensor(False), 10)
    whole = sums.metrics()
    assert whole["awp_rise"] == pytest.approx(0.25)
    for count, known in ((7, {"nonfinite_gradients": 0.0}), (8, {})):
        loaded.values.fill_(7.0)
        loaded.load({"sums": sums.values[:count]})
        assert loaded.metrics() == {name: value for name, value in whole.items() if name != "awp_rise"} | known
    loaded.load(sums.state())
    assert loaded.metrics() == whole
    with pytest.raises(RuntimeError):
        loaded.load({"sums": torch.zeros(11)})


def test_a_run_that_ended_before_its_first_checkpoint_says_that_it_starts_anew(tmp_path):
    told = f"{tmp_path / 'run'} has no checkpoint: the run starts anew"
    assert [told in Trainer(small_config(tmp_path / "run")).messages for _ in range(2)] == [False, True]


def test_a_run_starts_from_given_weights(finished, tmp_path):
    given = ModelConfig(width=2, pretrained=finished / "model.safetensors")
    trainer = Trainer(small_config(tmp_path / "run", model=given))
    assert equal(weights(finished), {name: trainer.model.state_dict()[name] for name in weights(finished)})
    assert f"weights of {given.pretrained}" in trainer.messages
    wrong = dataclasses.replace(given, pretrained=tmp_path / "none.safetensors")
    with pytest.raises(ConfigError, match=r"^--model\.pretrained: .*none\.safetensors"):
        Trainer(small_config(tmp_path / "other", model=wrong))
    assert not (tmp_path / "other").exists()


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checkpoint_bits(run_dir: Path, epoch: int) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / f"epoch-{epoch}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    losses = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        Trainer(small_config(tmp_path / name, seed=seed, epochs=1)).run()
        losses.append(json.loads((tmp_path / name / "metrics.jsonl").read_text())["loss"])
    assert losses[0] == losses[1] != losses[2]
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_comparison_without_awp_adds_a_row(tmp_path):
    code, out, err = run(*SMALL, "--epochs", "1", "--compare-without-awp", "--run-dir", tmp_path / "run")
    assert code == 0, err
    assert "AT-AWP" in out
    assert (tmp_path / "run" / "without-awp" / "report.json").exists()
    assert not equal(weights(tmp_path / "run"), weights(tmp_path / "run" / "without-awp"))
    draw_runs([tmp_path / "run", tmp_path / "run" / "without-awp"], tmp_path)
    both = (tmp_path / "learning_curves.png").read_bytes()
    assert (tmp_path / "run" / "learning_curves.png").read_bytes() == both
    assert json.loads((tmp_path / "run" / "report.json").read_text())["data"]["test_sha256"]


def test_warmup_trains_without_perturbation_at_first(tmp_path):
    Trainer(small_config(tmp_path / "warm", awp=AwpConfig(gamma=0.02, warmup=1), epochs=1)).run()
    Trainer(small_config(tmp_path / "plain", awp=AwpConfig(gamma=0.0), epochs=1)).run()
    Trainer(small_config(tmp_path / "awp", awp=AwpConfig(gamma=0.02), epochs=1)).run()
    assert equal(weights(tmp_path / "warm"), weights(tmp_path / "plain"))
    assert not equal(weights(tmp_path / "awp"), weights(tmp_path / "plain"))


def test_training_learns(tmp_path):
    """Clean training (epsilon 0) of a small network classifies the digits."""
    config = small_config(
        tmp_path / "clean",
        epochs=8,
        global_batch_size=64,
        model=ModelConfig(width=8),
        attack=AttackConfig(epsilon="0", step_size="0", steps=1),
        evaluation=EvaluationConfig(steps=1, evaluate_every=8),
    )
    assert Trainer(config).run()["clean_accuracy"] > 0.93


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path):
    Trainer(small_config(tmp_path / "run", epochs=3)).run()
    whole = weights(tmp_path / "run")
    damaged = tmp_path / "run" / "checkpoints" / "epoch-3" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-7] ^= 1
    damaged.write_bytes(content)
    trainer = Trainer(small_config(tmp_path / "run", epochs=3))
    assert trainer.progress.epoch == 2
    assert any("epoch-3" in message for message in trainer.messages)
    trainer.run()
    assert equal(weights(tmp_path / "run"), whole)


def test_a_run_without_momentum_goes_on(tmp_path):
    """Its optimizer has no tensors to keep."""
    config = small_config(tmp_path / "run", epochs=2)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, momentum=0.0))
    Trainer(config).run()
    whole = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "epoch-2")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("epoch-1\n")
    trainer = Trainer(config)
    assert trainer.progress.epoch == 1
    trainer.run()
    assert equal(weights(tmp_path / "run"), whole)


def test_shards_of_one_rank_are_refused_before_anything_is_written(tmp_path):
    config = small_config(tmp_path / "run", distributed=DistributedConfig(strategy="fsdp"))
    with pytest.raises(ConfigError, match=r"^--distributed\.strategy: expected ddp for one rank"):
        Trainer(config)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    config = small_config(tmp_path / "run")
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=1e20))
    with pytest.raises(TrainingError, match=r"10 steps in a row were not finite.*smaller --optimizer.lr"):
        Trainer(config).run()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def cifar_batch(count: int, seed: int) -> bytes:
    pixels = (images((count, 3072), seed=seed) * 255).to(torch.uint8).numpy()
    labels = (np.arange(count, dtype=np.uint8) % 10).reshape(-1, 1)
    return np.concatenate([labels, pixels], axis=1).tobytes()


def write_cifar10(root: Path, last: int = 10_000) -> None:
    root.mkdir(parents=True)
    for index in range(1, 6):
        (root / f"data_batch_{index}.bin").write_bytes(cifar_batch(10_000 if index < 5 else last, index))
    (root / "test_batch.bin").write_bytes(cifar_batch(10_000, 6))


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def elsewhere(tmp_path):
    """A folder to start in; nothing may appear in it."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--attack.epsilom", "0.1"], ["--attack.epsilom", "--attack.epsilon"]),
        (["--attack.epsilon", "-0.1"], ["--attack.epsilon", "-0.1"]),
        (["--attack.epsilon", "nan"], ["--attack.epsilon", "nan", "8/255"]),
        (["--attack.epsilon", "8/0"], ["--attack.epsilon", "8/0", "8/255"]),
        (["--awp.gamma", "nan"], ["--awp.gamma", "nan"]),
        (["--epochs", "many"], ["--epochs", "many", "whole number"]),
        (["cifar"], ["preset", "cifar10-preact-resnet18-at-awp"]),
        (["cifar10-preact-resnet18-at-awp"], ["--data.root", "cifar10"]),
        (["cifar10-preact-resnet18-at-awp", "--data.root", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--device", "cuda"], ["--device", "cuda"]),
        (["--device", "cpu", "--cuda-graphs"], ["--cuda-graphs", "no CUDA device"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_writes_nothing(elsewhere, arguments, words):
    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code, _, err = run(*arguments, cwd=elsewhere)
    assert code == 2
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not list(elsewhere.iterdir())


def test_what_was_asked_for_is_among_the_first_lines(tmp_path):
    plain, told = (
        Trainer(small_config(tmp_path / name, device="cpu", **asked)).messages
        for name, asked in (("plain", {}), ("told", {"cuda_graphs": False, "compile": False}))
    )
    assert told == ["CUDA graphs off (as told), torch.compile off (as told)", *plain]


def test_truncated_cifar_file_is_named(tmp_path, elsewhere):
    write_cifar10(tmp_path / "data", last=9_999)
    code, _, err = run("cifar10-preact-resnet18-at", "--data.root", tmp_path / "data", cwd=elsewhere)
    assert code == 2
    assert err.count("\n") == 1
    assert "data_batch_5.bin" in err
    assert not list(elsewhere.iterdir())


def test_pickle_with_a_payload_is_refused(tmp_path, elsewhere):
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    for name in (*[f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta"):
        (root / name).write_bytes(pickle.dumps({b"data": Payload(tmp_path / "executed")}))
    code, _, err = run("cifar10-preact-resnet18-at", "--data.root", root, cwd=elsewhere)
    assert code == 2
    assert err.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def test_a_run_directory_of_another_configuration_is_refused(finished):
    before = sorted(path.stat().st_mtime_ns for path in finished.rglob("*"))
    code, _, err = run(*SMALL, "--epochs", "2", "--attack.epsilon", "0.1", "--run-dir", finished)
    assert code == 2
    assert err.count("\n") == 1
    assert "--attack.epsilon" in err or "--evaluation.steps" in err
    assert sorted(path.stat().st_mtime_ns for path in finished.rglob("*")) == before


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = run(*SMALL, "--run-dir", tmp_path)
    assert code == 2
    assert "holds no config.json" in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def further_images(path: Path, count: int = 200) -> Path:
    pixels = (images((count, 8, 8, 1), seed=9) * 255).to(torch.uint8).numpy()
    np.savez(path, image=pixels, label=np.arange(count) % 10)
    return path


OPTIONS = {
    "ema": {"average": AverageConfig(kind="ema", decay=0.9, bn_images=300)},
    "swa": {"average": AverageConfig(kind="swa", start=0.3, bn_images=300)},
    "trades-awp": {"method": "trades", "attack": AttackConfig(steps=2, bn_mode="eval", start="normal")},
    "ramp": {"attack": AttackConfig(steps=2, ramp="linear"), "average": AverageConfig(kind="ema", bn_images=300)},
    "free": {"attack": AttackConfig(fast="free", replays=2, fast_epochs=3), "awp": AwpConfig(gamma=0.005, warmup=3)},
    "n-fgsm": {"attack": AttackConfig(steps=2, fast="n-fgsm", fast_epochs=2)},
    "mixed": {"data": DataConfig(pad=1, cutout=2, cutmix=0.5, train_limit=600), "label_smoothing": 0.1},
    "every": {"awp": AwpConfig(gamma=0.005, every=3), "optimizer": OptimizerConfig(clip_norm=1.0, decay_all=False)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_ends_bit_equal_with(name, tmp_path):
    """All that an option remembers is in the checkpoint: the run goes on after epoch 2 of 4 as if nothing was."""
    config = small_config(tmp_path / "run", epochs=4, keep_checkpoints=4, deterministic=True, **OPTIONS[name])
    whole = Trainer(config).run()
    bits, last = weights(tmp_path / "run"), checkpoint_bits(tmp_path / "run", 4)
    for epoch in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"epoch-{epoch}")
    trainer = Trainer(config)
    assert trainer.progress.epoch == 2
    again = trainer.run()
    assert equal(weights(tmp_path / "run"), bits)
    assert checkpoint_bits(tmp_path / "run", 4) == last
    for key in ("clean_accuracy", "pgd3_accuracy", "last", "selected_epoch"):
        assert again[key] == whole[key]
    torch.use_deterministic_algorithms(False)


def test_an_averages_statistics_are_computed_in_micro_batches(tmp_path):
    averaged = AverageConfig(kind="ema", decay=0.9, bn_images=300)
    trainer = Trainer(small_config(tmp_path / "run", epochs=1, average=averaged, micro_batch_size=20))
    sizes = []
    trainer.average.model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    trainer.average.before_step()
    trainer.selection.measured_model(1)
    assert 0 < max(sizes) <= 20


@pytest.mark.parametrize("statistics", ["clean", "averaged", "live"])
def test_an_averages_statistics_are_those_that_were_chosen(statistics, tmp_path):
    """Of a layer near the images: by formula over augmented clean ones, or as the steps left them, without a pass."""
    averaged = AverageConfig(kind="ema", decay=0.9, bn_images=64, statistics=statistics)
    trainer = Trainer(small_config(tmp_path / "run", epochs=1, global_batch_size=32, average=averaged))
    average, seen = trainer.average.model, []
    average.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    for index, batch in zip(range(2), trainer.batches.epoch(1), strict=False):
        trainer.step(batch, trainer.schedule(1, index))
    before = [buffer.clone() for buffer in average.buffers()]
    model = trainer.selection.measured_model(1)
    assert model is average
    if statistics != "clean":
        assert not seen
        assert all(torch.equal(a, b) for a, b in zip(before, average.buffers(), strict=True))
        alike = [torch.equal(a, b) for a, b in zip(average.buffers(), trainer.model.buffers(), strict=True)]
        assert all(alike) == (statistics == "live")
        return
    with torch.no_grad():
        batches = [batch.images for _, batch in zip(range(2), trainer.batches.epoch(1), strict=False)]
        expected = [average.conv1(average.normalize(x)) for x in batches]
    for found, wanted in zip(seen[:2], expected, strict=True):
        torch.testing.assert_close(found, wanted)
    layer = average.layer1[0].bn1
    mean = torch.stack([x.mean((0, 2, 3)) for x in expected]).mean(0)
    var = torch.stack([x.var((0, 2, 3), unbiased=True) for x in expected]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)


def test_the_average_is_what_is_measured_and_exported(tmp_path):
    averaged = AverageConfig(kind="ema", decay=0.9, bn_images=300)
    trainer = Trainer(small_config(tmp_path / "run", epochs=1, average=averaged))
    report = trainer.run()
    exported, live, average = weights(tmp_path / "run"), trainer.model.state_dict(), trainer.average.model.state_dict()
    assert equal(exported, average)
    assert not any(torch.equal(exported[name], live[name]) for name in exported if name.endswith("running_mean"))
    data = trainer.data.test
    model = awp_engine.load_model(tmp_path / "run")
    with torch.no_grad():
        right = (model(data.images / 255).argmax(1) == data.labels).double().mean().item()
    assert report["clean_accuracy"] == pytest.approx(right)


def test_patience_stops_the_run(tmp_path):
    """With a learning rate of almost nothing no epoch is better than another."""
    config = small_config(
        tmp_path / "run",
        epochs=30,
        optimizer=OptimizerConfig(lr=1e-12),
        evaluation=EvaluationConfig(steps=1, patience=2),
    )
    report = Trainer(config).run()
    assert report["epochs"] < 10
    again = Trainer(config)
    assert again.progress.epoch == report["epochs"]
    assert again.run()["epochs"] == report["epochs"]


def test_robust_self_training_draws_from_both_sources(tmp_path):
    extra = further_images(tmp_path / "extra.npz")
    data = DataConfig(pad=1, extra=extra, extra_fraction=0.25)
    trainer = Trainer(small_config(tmp_path / "run", epochs=1, method="rst", data=data, global_batch_size=128))
    first = len(trainer.data.train) + len(trainer.data.held_out) + len(trainer.data.test)
    batches = list(trainer.batches.epoch(1))
    assert [int((batch.ids >= first).sum()) for batch in batches[:-1]] == [32] * (len(batches) - 1)
    own = torch.cat([batch.ids[batch.ids < first] for batch in batches])
    assert sorted(own.tolist()) == sorted(trainer.data.train.ids.tolist())
    assert trainer.run()["train_images"] == len(own)
    # the same images may lie elsewhere
    extra = extra.rename(tmp_path / "moved.npz")
    moved = dataclasses.replace(trainer.config, data=dataclasses.replace(data, extra=extra))
    assert Trainer(moved).progress.epoch == 1
    np.savez(extra, image=np.zeros((40, 8, 8, 1), dtype=np.uint8), label=np.zeros(40, dtype=np.int64))
    with pytest.raises(ConfigError, match="was trained on other images"):
        Trainer(moved)
    missing = dataclasses.replace(trainer.config, data=DataConfig(extra=tmp_path / "nowhere.npz"))
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        Trainer(dataclasses.replace(missing, run_dir=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_best_and_last_are_both_reported(finished):
    report = json.loads((finished / "report.json").read_text())
    assert set(report["last"]) == {"clean_accuracy", "pgd20_accuracy", "train_pgd_accuracy"}
    if report["selected_epoch"] == report["epochs"]:
        assert report["last"]["pgd20_accuracy"] == report["pgd20_accuracy"]


def test_limits_are_kept(tmp_path):
    config = small_config(
        tmp_path / "run",
        epochs=1,
        data=DataConfig(train_limit=120),
        evaluation=EvaluationConfig(steps=1, held_out_limit=50, test_limit=70),
    )
    report = Trainer(config).run()
    assert (report["train_images"], report["test_images"]) == (120, 70)


def test_sam_trains_on_clean_images(tmp_path):
    """epsilon 0: no attack pass at all; ascent and descent are two passes on the images themselves."""
    config = small_config(
        tmp_path / "run",
        epochs=1,
        attack=AttackConfig(epsilon="0"),
        awp=AwpConfig(gamma=0.05, scope="global", scale="absolute"),
    )
    trainer = Trainer(config)
    calls = []
    trainer.model.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0]))
    batch = next(trainer.batches.epoch(1))
    trainer.step(batch, trainer.schedule(1, 0))
    assert len(calls) == 2
    assert all(torch.equal(x, batch.images) for x in calls)


def test_gradient_masking_is_said_while_training(tmp_path, capsys):
    """Logits times 1e6: the softmax saturates, and the input gradient is exactly zero."""
    trainer = Trainer(small_config(tmp_path / "run", epochs=1))
    trainer.model.linear.register_forward_hook(lambda module, inputs, output: output * 1e6)
    trainer.run()
    assert "warning: gradient masking: " in capsys.readouterr().out

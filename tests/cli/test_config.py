"""Configurations, presets and the command line: whatever a user writes is accepted, or refused in one line."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from awp_engine.cli.command_line import parse_train
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
    choose_speed,
    config_hash,
    flags,
    from_json,
    load_config,
    parse_amount,
    require_same_run,
    to_json,
)
from awp_engine.config.presets import PRESETS, build_preset
from awp_engine.optim.learning_rate import cycled_momentum, learning_rate


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "300"}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


PARSE = "import sys; from awp_engine.cli.command_line import parse_train; print(parse_train(sys.argv[1:]))"


@pytest.mark.parametrize("name", PRESETS)
def test_preset_round_trips(name: str) -> None:
    config = build_preset(name)
    assert config.preset == name
    assert from_json(to_json(config)) == config
    assert config_hash(from_json(to_json(config))) == config_hash(config)


def test_presets_hold_the_papers_values() -> None:
    config = build_preset("cifar10-preact-resnet18-at-awp")
    assert (config.attack.epsilon_value, config.attack.step_size_value, config.attack.steps) == (8 / 255, 2 / 255, 10)
    assert (config.awp.gamma, config.awp.warmup) == (0.01, 0)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.1, 0.9, 5e-4)
    assert (config.epochs, config.global_batch_size, config.attack.bn_mode) == (200, 128, "train")
    assert build_preset("cifar10-preact-resnet18-at").awp.gamma == 0
    l2 = build_preset("cifar10-preact-resnet18-at-awp-l2")
    assert (l2.attack.epsilon_value, l2.attack.step_size_value) == (128 / 255, 15 / 255)
    assert build_preset("digits").evaluation_step_size == 0.05


@pytest.mark.parametrize(
    ("name", "method", "gamma", "warmup", "bn_mode", "start"),
    [
        ("cifar10-preact-resnet18-trades-awp", "trades", 0.005, 10, "eval", "normal"),
        ("cifar10-wrn-34-10-mart-awp", "mart", 0.005, 10, "eval", "normal"),
        ("cifar10-wrn-28-10-rst-awp", "rst", 0.005, 10, "eval", "normal"),
        ("cifar10-wrn-34-10-trades", "trades", 0.0, 0, "eval", "normal"),
        ("svhn-preact-resnet18-at-awp", "at", 0.01, 5, "train", "uniform"),
        ("svhn-preact-resnet18-at-awp-l2", "at", 0.01, 0, "train", "uniform"),
        ("cifar100-preact-resnet18-at-awp", "at", 0.01, 0, "train", "uniform"),
    ],
)
def test_every_method_has_the_papers_values(
    name: str, method: str, gamma: float, warmup: int, bn_mode: str, start: str
) -> None:
    config = build_preset(name)
    assert (config.method, config.beta, config.epochs) == (method, 6.0, 200)
    assert (config.awp.gamma, config.awp.warmup) == (gamma, warmup)
    assert (config.attack.bn_mode, config.attack.start, config.attack.steps) == (bn_mode, start, 10)
    assert config.model.name in name.replace("resnet18", "resnet-18")
    assert (config.optimizer.weight_decay, config.optimizer.momentum) == (5e-4, 0.9)
    if method == "rst":
        assert (config.global_batch_size, config.optimizer.nesterov, config.optimizer.schedule) == (256, True, "cosine")
        assert config.data.extra_fraction == 0.5
    if "svhn" in name:
        assert config.optimizer.lr == 0.01
        assert (config.data.pad, config.data.flip) == (0, False)
    if name == "svhn-preact-resnet18-at-awp":
        assert config.attack.step_size == "1/255"


def test_piecewise_changes_at_the_papers_epochs() -> None:
    optimizer = OptimizerConfig()
    rates = [learning_rate(optimizer, 200, epoch) for epoch in (0, 99, 99.999, 100, 149.5, 150, 199.9)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_piecewise_changes_at_epoch_boundaries_only() -> None:
    optimizer = OptimizerConfig(milestones=(0.75,))
    # 0.75 of 30 epochs is 22.5: the rate changes with the next epoch.
    assert [learning_rate(optimizer, 30, p) for p in (22.5, 22.99, 23.0)] == pytest.approx([0.1, 0.1, 0.01])
    assert learning_rate(OptimizerConfig(milestones=(0.7,)), 30, 21) == pytest.approx(0.01)
    dropping = OptimizerConfig(drop=1 / 1.5)
    assert [learning_rate(dropping, 200, epoch) for epoch in (99, 100, 150)] == pytest.approx(
        [0.1, 0.1 / 1.5, 0.1 / 2.25]
    )


def test_other_schedules() -> None:
    cosine = OptimizerConfig(schedule="cosine")
    assert [learning_rate(cosine, 10, p) for p in (0, 5, 10)] == pytest.approx([0.1, 0.05, 0.0])
    assert learning_rate(OptimizerConfig(schedule="constant"), 10, 9.9) == 0.1
    linear = OptimizerConfig(schedule="linear")
    ares = OptimizerConfig(schedule="cosine", lr=0.1, warmup=2.0, warmup_lr=0.02, min_lr=0.01)
    assert [learning_rate(ares, 10, p) for p in (0, 1, 2, 6, 10)] == pytest.approx([0.02, 0.06, 0.1, 0.055, 0.01])
    assert [learning_rate(linear, 10, p) for p in (0, 2.5, 10)] == pytest.approx([0.1, 0.075, 0.0])
    cycle = OptimizerConfig(schedule="one-cycle", lr=0.2)
    rates = [learning_rate(cycle, 30, p) for p in (0, 6, 12, 21, 30)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.1, 0.0])
    for schedule, half in (("cosine", 0.05), ("linear", 0.05), ("constant", 0.1)):
        warm = OptimizerConfig(schedule=schedule, warmup=2.0)
        rates = [learning_rate(warm, 10, p) for p in (0, 1, 2, 6, 10)]
        assert rates == pytest.approx([0, 0.05, 0.1, half, 0.1 if schedule == "constant" else 0])
    assert learning_rate(OptimizerConfig(schedule="cosine", warmup=10.0), 10, 10) == 0.1
    for wrong, key in (
        ({"warmup_lr": 0.01}, "warmup-lr"),
        ({"warmup_lr": 0.1, "warmup": 1.0}, "warmup-lr"),
        ({"warmup_lr": 0.01, "warmup": 1.0, "schedule": "one-cycle-cosine"}, "warmup-lr"),
        ({"min_lr": 0.01}, "min-lr"),
        ({"min_lr": 0.2, "schedule": "cosine"}, "min-lr"),
    ):
        with pytest.raises(ConfigError, match=rf"--optimizer\.{key}: expected 0, or less than --optimizer\.lr with"):
            OptimizerConfig(**wrong)
    stepped = OptimizerConfig(warmup=6.0)
    assert [learning_rate(stepped, 10, p) for p in (3, 5, 6)] == pytest.approx([0.05, 0.1 * 0.1 * 5 / 6, 0.01])


@given(
    epochs=st.integers(1, 12), steps=st.integers(1, 5), part=st.floats(0, 1), lr=st.floats(1e-3, 1), whole=st.booleans()
)
def test_one_cycle_by_cosines_is_that_of_torch(epochs: int, steps: int, part: float, lr: float, whole: bool) -> None:
    """Rate and momentum of every step, against OneCycleLR stepped once a step, or once an epoch."""
    changes = epochs if whole else epochs * steps
    # torch divides by 0 where the rise has one step
    assume(changes > 1 and abs(part * changes - 1) > 1e-6)
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    theirs = torch.optim.SGD([weight], lr=1.0, momentum=0.9, nesterov=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=lr, total_steps=changes, pct_start=part)
    warmup = part * epochs
    ours = OptimizerConfig(schedule="one-cycle-cosine", lr=lr, warmup=warmup, per_epoch=whole, cycle_momentum=True)
    for number in range(epochs * steps):
        place = number // steps + number % steps / steps
        (group,) = theirs.param_groups
        found = learning_rate(ours, epochs, place, steps=steps)
        assert found == pytest.approx(group["lr"], rel=1e-9, abs=1e-9 * lr)
        assert cycled_momentum(ours, epochs, place, steps=steps) == pytest.approx(group["momentum"], rel=1e-9)
        if number + 1 < epochs * steps and (not whole or (number + 1) % steps == 0):
            weight.grad = torch.zeros_like(weight)
            theirs.step()
            cycle.step()


def test_rates_may_change_by_epochs() -> None:
    whole = OptimizerConfig(schedule="cosine", per_epoch=True)
    assert [learning_rate(whole, 10, p) for p in (5, 5.9, 6)] == pytest.approx([0.05, 0.05, 0.1 * 0.3454915])
    assert cycled_momentum(whole, 10, 5, steps=3) is None
    # Wang 2023: 400 epochs, the top at index 9
    cycle = OptimizerConfig(schedule="one-cycle-cosine", lr=0.2, warmup=10, per_epoch=True, cycle_momentum=True)
    rates = [learning_rate(cycle, 400, p, steps=98) for p in (0, 9, 9.99, 399, 399.9)]
    assert rates == pytest.approx([0.008, 0.2, 0.2, 8e-7, 8e-7])
    assert cycled_momentum(cycle, 400, 9.5, steps=98) == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.2", 0.2), ("0", 0.0), ("1e-3", 0.001), (".5", 0.5)]
)
def test_amounts(text: str, value: float) -> None:
    config = AttackConfig(epsilon=text)
    assert config.epsilon == text
    assert config.epsilon_value == value


@pytest.mark.parametrize(
    "text", ["8/0", "nan", "inf", "-1", "-8/255", "", "1/2/3", "8/255 ", "1e999999999", "0x1", "٣", "1_0", "1/-2", "\n"]
)
@pytest.mark.parametrize("key", ["epsilon", "step_size"])
def test_bad_amounts_name_the_flag(key: str, text: str) -> None:
    name = key.replace("_", "-")
    with pytest.raises(
        ConfigError, match=rf"^--attack\.{name}: expected a fraction or number >= 0 such as 8/255, got "
    ):
        dataclasses.replace(AttackConfig(), **{key: text})


def attacked(**attack) -> Config:
    return Config(attack=AttackConfig(**attack), evaluation=EvaluationConfig())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_that_no_ball_can_want_are_refused(norm: str) -> None:
    ball = {"norm": norm, "epsilon": "8/255"}
    longer = r"^--attack\.step-size: expected at most twice --attack\.epsilon 8/255, .*, got '"
    for step in ("2", "0.0628", "17/255"):
        with pytest.raises(ConfigError, match=longer + step):
            attacked(step_size=step, **ball)
    attacked(step_size="16/255", **ball)
    shorter = (
        r"^--attack\.step-size: expected steps that go farther, 4 of them, than a tenth of --attack\.epsilon 8/255"
    )
    for step in ("0", "0.0001", "19/25500"):
        with pytest.raises(ConfigError, match=shorter):
            attacked(step_size=step, steps=4, **ball)
    attacked(step_size="20/25500", steps=4, **ball)
    # where no such step is taken
    attacked(epsilon="0", step_size="2", norm=norm)
    attacked(kind="apgd", step_size="2", **ball)
    if norm == "linf":
        attacked(fast="fgsm-rs", step_size="2", **ball)
        with pytest.raises(ConfigError, match=longer):
            attacked(fast="fgsm-rs", fast_epochs=3, step_size="2", **ball)
        attacked(fast="n-fgsm", epsilon="0.5")
        with pytest.raises(ConfigError, match=r"^--attack\.epsilon: expected at most 1/2 with --attack\.fast n-fgsm"):
            attacked(fast="n-fgsm", epsilon="0.6")


def test_the_evaluations_step_fits_the_ball_as_well() -> None:
    attack = AttackConfig(epsilon="8/255", step_size="2/255")
    with pytest.raises(ConfigError, match=r"^--evaluation\.step-size: expected at most twice --attack\.epsilon 8/255"):
        Config(attack=attack, evaluation=EvaluationConfig(step_size="2"))
    with pytest.raises(ConfigError, match=r"^--evaluation\.step-size: expected steps that go farther, 20 of them"):
        Config(attack=attack, evaluation=EvaluationConfig(step_size="1e-5"))
    Config(attack=attack, evaluation=EvaluationConfig(step_size="1/255"))


BAD = {
    "--attack.epsilon": lambda: AttackConfig(epsilon="1.01"),
    "--attack.steps": lambda: AttackConfig(steps=0),
    "--attack.norm": lambda: AttackConfig(norm="l3"),
    "--attack.bn-mode": lambda: AttackConfig(bn_mode="x"),
    "--awp.gamma": lambda: AwpConfig(gamma=float("nan")),
    "--awp.warmup": lambda: AwpConfig(warmup=-1),
    "--data.held-out-fraction": lambda: DataConfig(held_out_fraction=1),
    "--data.pad": lambda: DataConfig(pad=-1),
    "--model.name": lambda: ModelConfig(name="wrn-33-10"),
    "--model.width": lambda: ModelConfig(width=0),
    "--optimizer.lr": lambda: OptimizerConfig(lr=0),
    "--optimizer.momentum": lambda: OptimizerConfig(momentum=1),
    "--optimizer.weight-decay": lambda: OptimizerConfig(weight_decay=-1e-9),
    "--optimizer.nesterov": lambda: OptimizerConfig(nesterov=True, momentum=0),
    "--optimizer.milestones": lambda: OptimizerConfig(milestones=(0.75, 0.5)),
    "--evaluation.step-size": lambda: EvaluationConfig(step_size="x"),
    "--evaluation.held-out-limit": lambda: EvaluationConfig(held_out_limit=0),
    "--evaluation.test-limit": lambda: EvaluationConfig(test_limit=0),
    "--evaluation.patience": lambda: EvaluationConfig(patience=0),
    "--data.cutout": lambda: DataConfig(cutout=-1),
    "--data.cutmix": lambda: Config(method="mart", data=DataConfig(cutmix=0.5)),
    "--data.train-limit": lambda: DataConfig(train_limit=0),
    "--data.extra-fraction": lambda: DataConfig(extra_fraction=1.0),
    "--attack.fast": lambda: Config(attack=AttackConfig(fast="free"), awp=AwpConfig(gamma=0.01)),
    "--attack.fast-epochs": lambda: AttackConfig(fast_epochs=0),
    "--attack.replays": lambda: AttackConfig(replays=0),
    "--attack.ramp": lambda: AttackConfig(ramp="linear", fast="free"),
    "--attack.stronger-after": lambda: AttackConfig(stronger_after=3),
    "--attack.start": lambda: AttackConfig(start="x"),
    "--awp.every": lambda: AwpConfig(every=0),
    "--awp.scale": lambda: AwpConfig(scale="x"),
    "--awp.ascent": lambda: AwpConfig(ascent="shared", c_min=1.7),
    "--awp.ascent-steps": lambda: AwpConfig(ascent_steps=0),
    "--awp.c-min": lambda: AwpConfig(c_min=0.0),
    "--optimizer.warmup": lambda: OptimizerConfig(schedule="one-cycle", warmup=1.0),
    "--optimizer.per-epoch": lambda: OptimizerConfig(schedule="cosine", warmup=1.0, per_epoch=True),
    "--optimizer.cycle-momentum": lambda: OptimizerConfig(schedule="cosine", cycle_momentum=True),
    "--optimizer.drop": lambda: OptimizerConfig(drop=0.0),
    "--optimizer.clip-norm": lambda: OptimizerConfig(clip_norm=0.0),
    "--average.decay": lambda: AverageConfig(decay=1.0),
    "--average.start": lambda: AverageConfig(start=-0.1),
    "--average.bn-images": lambda: AverageConfig(bn_images=0),
    "--beta": lambda: Config(beta=-1.0),
    "--label-smoothing": lambda: Config(method="mart", label_smoothing=0.1),
    "--epochs": lambda: Config(epochs=True),
    "--seed": lambda: Config(seed=-1),
    "--cuda-graphs": lambda: Config(optimizer=OptimizerConfig(kind="adamw"), cuda_graphs=True),
    "--compile": lambda: Config(compile=True, distributed=DistributedConfig(strategy="fsdp")),
    "--global-batch-size": lambda: Config(global_batch_size="3"),
    "--log-interval": lambda: Config(log_interval=float("inf")),
    "--keep-checkpoints": lambda: Config(keep_checkpoints=0),
    "--preset": lambda: Config(preset="../x"),
    "--compare-without-awp": lambda: Config(awp=AwpConfig(gamma=0), compare_without_awp=True),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_values_name_the_flag_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BAD[name]()
    assert str(caught.value).startswith(name + ": expected ")
    assert "\n" not in str(caught.value)


def test_l2_epsilon_may_exceed_one() -> None:
    assert AttackConfig(norm="l2", epsilon="3/2").epsilon_value == 1.5


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def without(key: str) -> str:
    values = json.loads(to_json(Config()))
    del values["attack"][key]
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (to_json(Config()).replace('"seed"', '"sed"'), "f.json: sed: unknown key"),
        (to_json(Config()).replace('"gamma"', '"gama"'), "f.json: awp.gama: unknown key"),
        (without("steps"), "f.json: attack.steps: missing key"),
        (to_json(Config()).replace('"steps": 10', '"steps": "10"'), "f.json: --attack.steps: expected a whole number"),
        (to_json(Config()).replace('"steps": 10', '"steps": 10.0'), "f.json: --attack.steps: expected a whole number"),
        (to_json(Config()).replace('"steps": 10', '"steps": 10, "steps": 3'), "f.json: not JSON"),
        (to_json(Config()).replace('"gamma": 0.002', '"gamma": NaN'), "f.json: --awp.gamma: expected a finite number"),
        (json.dumps({**json.loads(to_json(Config())), "awp": 3}), "f.json: awp: expected a group of settings"),
        ("[]", "f.json: top level: expected a group of settings"),
        ("", "f.json: not JSON"),
        ("[" * 100_000, "f.json: not JSON"),
        ('{"seed": ' + "9" * 5000 + "}", "f.json: not JSON"),
    ],
    ids=range(12),
)
def test_json_is_read_strictly(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(text, "f.json")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_load_config_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        load_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"config\.json: not JSON"):
        load_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(to_json(Config(seed=3)))
    assert load_config(tmp_path / "config.json") == Config(seed=3)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(name=st.sampled_from(sorted(flags())), value=json_values)
def test_any_json_value_is_taken_or_refused_by_name(name: str, value: object) -> None:
    values = json.loads(to_json(Config()))
    *groups, key = name[2:].replace("-", "_").split(".")
    target = values[groups[0]] if groups else values
    target[key] = value
    refused = ""
    try:
        config = from_json(json.dumps(values), "f.json")
    except ConfigError as error:
        refused = str(error)
    else:
        assert from_json(to_json(config)) == config
    assert not refused or refused.startswith(f"f.json: {name}: ")
    assert "\n" not in refused


bad_text = {
    "--attack.epsilon": st.sampled_from(["nan", "-1", "8/0", "inf", "1e9999", "2", "8//255", "eight"]),
    "--awp.gamma": st.sampled_from(["nan", "-inf", "1e999", "x", "-0.1", "", "1,5"]),
    "--attack.steps": st.integers(max_value=0).map(str) | st.floats().map(str) | st.just("9" * 5000),
    "--epochs": st.integers(max_value=0).map(str) | st.text(alphabet="abc =-./", max_size=5),
    "--seed": st.integers(max_value=-1).map(str) | st.integers(min_value=2**63).map(str),
    "--attack.norm": st.text(max_size=6).filter(lambda text: text not in ("linf", "l2")),
    "--optimizer.lr": st.sampled_from(["0", "-1", "nan", "None"]),
    "--device": st.text(max_size=6).filter(lambda text: text not in get_args(flags()["--device"])),
}


@settings(max_examples=100, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(bad_text)), joined=st.booleans())
def test_malformed_flags_exit_2_in_one_line(data: st.DataObject, name: str, joined: bool) -> None:
    value = data.draw(bad_text[name])
    errors = StringIO()
    with pytest.raises(SystemExit) as caught, redirect_stderr(errors):
        parse_train([f"{name}={value}"] if joined else [name, value])
    assert caught.value.code == 2
    text = errors.getvalue()
    assert text.startswith("train.py: error: ")
    assert text.count("\n") == 1
    assert text.endswith("\n")
    # A value that itself begins with -- is a flag by its looks.
    assert name in text or value.startswith("--")


@settings(max_examples=100, deadline=None)
@given(argv=st.lists(st.text(max_size=12) | st.sampled_from([*sorted(flags()), "digits", "8/255", "3"]), max_size=4))
def test_any_arguments_give_a_configuration_or_one_line(argv: list[str]) -> None:
    errors = StringIO()
    code: object = 0
    try:
        with redirect_stderr(errors), redirect_stdout(StringIO()):
            assert isinstance(parse_train(argv), Config)
    except SystemExit as stop:
        code = stop.code
    assert (code, errors.getvalue().count("\n")) in ((0, 0), (2, 1))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lr", "1"], "--lr: unknown flag; did you mean --optimizer.lr?"),
        (["--batch_size", "32"], "--batch-size: unknown flag; did you mean --global-batch-size?"),
        (["--run_dir", "a", "--run-dir", "b"], "--run-dir: the same flag as --run_dir; expected one of them"),
        (["--attack.epsilon", "8", "/", "255"], "--attack.epsilon: write a fraction without spaces: 8/255"),
        (["--no-awp"], "--no-awp: unknown flag; did you mean --awp.gamma 0?"),
        (["--resume", "x"], "--resume: unknown flag; leave it out: the same command"),
        (["--attack.epsilom", "1"], "--attack.epsilom: unknown flag; did you mean --attack.epsilon?"),
        (["digts"], "preset: did you mean digits? there is no 'digts'; awp train --presets lists all "),
        (["--epochs"], "--epochs: expected a whole number, got nothing"),
        (["--epochs", "3", "digits"], "'digits': unexpected argument"),
        (["--deterministic=yes"], "--deterministic: takes no value"),
        (["--no-cuda-graphs", "auto"], "--no-cuda-graphs: takes no value"),
        (["--cuda-graphs", "yes"], "--cuda-graphs: expected one of auto, true, false, got 'yes'"),
        (["--cuda-graphs="], "--cuda-graphs: expected one of auto, true, false, got ''"),
        (["cifar10-preact-resnet18-at-awp"], "--data.root: expected the directory that holds cifar10"),
        (["--method", "rst"], "--data.extra: expected an .npz, or a directory of shards"),
        (["--data.extra-fraction", "0.7"], "--data.extra: expected an .npz, or a directory of shards, for --data.ex"),
        (
            ["--data.extra", "x.npz", "--data.extra-fraction", "0.7", "--global-batch-size", "1"],
            "--data.extra-fraction: expected a part that gives a batch of 1 images of both kinds, got 0.7",
        ),
        (["--model.name", "wrn-10-1", "--model.width", "1"], "--model.width: expected none with wrn-10-1"),
        (["--data.crop-scale", "0.5"], "--data.crop-scale: expected 0.08, unless --data.crop is resized"),
        (["--attack.fast", "n-fgsm", "--attack.norm", "l2"], "--attack.fast: expected none with --attack.norm l2"),
        (["digits", "--preset", "digits-at"], "--preset: expected 'digits'"),
        (["--run-dir", ""], "--run-dir: expected a path or none, got ''"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_line_errors(args: list[str], message: str) -> None:
    result = run_python(PARSE, *args)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"train.py: error: {message}")
    assert result.stderr.count("\n") == 1


def test_command_line_builds_on_the_preset() -> None:
    base = build_preset("cifar10-preact-resnet18-at-awp")
    run = [base.preset, "--run-dir", "r", "--seed", "3", "--deterministic", "--epochs=2", "--data.root", "d"]
    attacks = ["--attack.epsilon", "4/255", "--attack.steps", "3", "--attack.norm", "l2", "--awp.gamma", "0.005"]
    rest = ["--awp.warmup", "1", "--optimizer.lr", "0.2", "--model.width", "none"]
    config = parse_train([*run, *attacks, *rest])
    attack = dataclasses.replace(base.attack, epsilon="4/255", steps=3, norm="l2")
    assert config == dataclasses.replace(
        base,
        run_dir=Path("r"),
        seed=3,
        deterministic=True,
        epochs=2,
        data=dataclasses.replace(base.data, root=Path("d")),
        attack=attack,
        awp=AwpConfig(gamma=0.005, warmup=1),
        optimizer=dataclasses.replace(base.optimizer, lr=0.2),
    )


def test_switches_that_may_be_left_to_the_run() -> None:
    told = [([], "auto"), (["--cuda-graphs"], True), (["--no-cuda-graphs"], False), (["--cuda-graphs=auto"], "auto")]
    told += [(["--no-cuda-graphs", "--cuda-graphs", "auto"], "auto"), (["--cuda-graphs", "--epochs", "2"], True)]
    for argv, value in told:
        assert parse_train(argv).cuda_graphs == value, argv
    # runs from before there was auto
    for value in (True, False):
        old = json.dumps(json.loads(to_json(Config())) | {"cuda_graphs": value, "compile": value})
        assert (from_json(old).cuda_graphs, from_json(old).compile) == (value, value)
    for wrong in (1, 0, None, "on", "true"):
        with pytest.raises(ConfigError, match=r"--compile: expected one of auto, true, false, got "):
            Config(compile=wrong)


ADAMW, COUNTED = OptimizerConfig(kind="adamw"), AwpConfig(c_min=1.7)
FREE, FREE_AT_FIRST = (
    {"attack": AttackConfig(fast="free", fast_epochs=epochs), "awp": AwpConfig(gamma=0.0)} for epochs in (None, 2)
)
CYCLED = OptimizerConfig(schedule="one-cycle-cosine", cycle_momentum=True)
BY_EPOCH = dataclasses.replace(CYCLED, per_epoch=True)
UNMEASURED = "torch.compile off (auto: not measured yet)"


@pytest.mark.parametrize(
    ("told", "cuda", "ranks", "graphs", "compiled", "message"),
    [
        ({}, True, 1, True, False, f"CUDA graphs on (auto: one rank), {UNMEASURED}"),
        ({}, True, 2, False, False, f"CUDA graphs off (auto: several ranks), {UNMEASURED}"),
        ({}, False, 1, False, False, None),
        ({}, False, 2, False, False, None),
        ({"optimizer": ADAMW}, True, 1, False, False, f"CUDA graphs off (auto: --optimizer.kind adamw), {UNMEASURED}"),
        ({"awp": COUNTED}, True, 1, False, False, f"CUDA graphs off (auto: --awp.c-min), {UNMEASURED}"),
        (
            {"optimizer": CYCLED},
            True,
            1,
            False,
            False,
            f"CUDA graphs off (auto: --optimizer.cycle-momentum at every step), {UNMEASURED}",
        ),
        ({"optimizer": BY_EPOCH}, True, 1, True, False, f"CUDA graphs on (auto: one rank), {UNMEASURED}"),
        (FREE, True, 1, False, False, f"CUDA graphs off (auto: --attack.fast free), {UNMEASURED}"),
        (FREE_AT_FIRST, True, 1, True, False, f"CUDA graphs on (auto: one rank), {UNMEASURED}"),
        ({"cuda_graphs": True}, True, 1, True, False, f"CUDA graphs on (as told), {UNMEASURED}"),
        ({"cuda_graphs": True}, True, 2, None, None, "several ranks"),
        ({"cuda_graphs": True}, False, 1, None, None, "no CUDA device"),
        ({"cuda_graphs": True, "awp": COUNTED}, True, 1, None, None, "--awp.c-min"),
        ({"cuda_graphs": True} | FREE, True, 1, None, None, "--attack.fast free"),
        ({"cuda_graphs": False}, True, 1, False, False, f"CUDA graphs off (as told), {UNMEASURED}"),
        ({"cuda_graphs": False}, False, 4, False, False, "CUDA graphs off (as told)"),
        ({"compile": True}, True, 1, True, True, "CUDA graphs on (auto: one rank), torch.compile on (as told)"),
        ({"compile": True}, False, 1, False, True, "torch.compile on (as told)"),
        ({"compile": False}, False, 1, False, False, "torch.compile off (as told)"),
    ],
)
def test_what_makes_a_step_fast_is_chosen_by_rule(
    told: dict[str, Any], cuda: bool, ranks: int, graphs: bool | None, compiled: bool | None, message: str | None
) -> None:
    if graphs is not None:
        assert choose_speed(Config(**told), cuda=cuda, ranks=ranks) == (graphs, compiled, message)
        return
    # a step that cannot be captured is refused where graphs were asked for
    with pytest.raises(ConfigError) as refused:
        choose_speed(Config(**told), cuda=cuda, ranks=ranks)
    why = f"expected a step that can be captured, got {message}; leave the flag out"
    assert str(refused.value) == f"--cuda-graphs: {why}"


def test_no_arguments_mean_digits() -> None:
    config = parse_train([])
    assert config == build_preset("digits")
    assert config.resolved_run_dir == Path("runs/digits-seed0")
    assert parse_train(["--preset", "digits-at"]) == build_preset("digits-at")


def test_help_all_shows_every_flag_documented() -> None:
    result = run_python(PARSE, "--help-all")
    assert result.returncode == 0
    assert result.stderr == ""
    assert all(name in result.stdout for name in flags())
    lines = [line.strip("│ ") for line in result.stdout.splitlines()]
    for before, line in itertools.pairwise(lines):
        # a long help text ends in a line with the default alone
        assert not (line.startswith("(default:") and before.startswith("--")), f"{before}: a flag without help text"


def test_neither_config_nor_command_line_imports_torch() -> None:
    result = run_python(PARSE + "; assert 'torch' not in sys.modules")
    assert result.returncode == 0, result.stderr


def test_hash_covers_the_trajectory_only() -> None:
    base = Config()
    free = dataclasses.replace(base, run_dir=Path("x"), log_interval=1.0, keep_checkpoints=9, device="cpu")
    free = dataclasses.replace(free, compile=True, cuda_graphs=False)
    assert config_hash(free) == config_hash(base)
    assert config_hash(dataclasses.replace(base, attack=AttackConfig(epsilon="1/5"))) == config_hash(base)
    for other in (Config(seed=1), Config(epochs=31), Config(awp=AwpConfig(gamma=0.01)), Config(deterministic=True)):
        assert config_hash(other) != config_hash(base)


def test_a_run_of_another_configuration_is_refused_by_key_and_values() -> None:
    base = Config()
    require_same_run(base, dataclasses.replace(base, compare_without_awp=True, run_dir=Path("x")), Path("r"))
    with pytest.raises(ConfigError, match=r"^--run-dir: r holds .* --attack\.epsilon is '1/5' there and '1/10' here"):
        require_same_run(base, Config(attack=AttackConfig(epsilon="0.1")), Path("r"))
    # images may lie elsewhere: they have fingerprints
    places = [DataConfig(name="folder", root=Path(a), extra=Path(f"{a}.npz")) for a in "ab"]
    require_same_run(Config(data=places[0]), Config(data=places[1]), Path("r"))


def test_parse_amount_is_exact() -> None:
    assert parse_amount("8/255") * 255 == 8
    assert parse_amount("0.1") * 10 == 1

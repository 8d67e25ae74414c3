"""`--config FILE`: what is written is read back; flags go on top; whatever is wrong with a file takes one line."""

import dataclasses
import io
import json
import os
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from awp_engine.cli.command_line import parse_train
from awp_engine.config import Config, ConfigError, flag, from_json, load_config, show, to_json
from awp_engine.config.identity import from_flat, key_types, to_flat
from awp_engine.config.presets import PRESETS, build_preset

TYPES = key_types()
# of settings that accept few of their type's values, some that go together
KNOWN = {
    "preset": st.sampled_from(sorted(PRESETS)),
    "method": st.sampled_from(["at", "trades", "mart", "rst"]),
    "method_args": st.sampled_from([[], ["tau=2.5,2.0", "far=true"]]),
    "data.name": st.sampled_from(["digits", "cifar10", "mnist", "folder", "shards"]),
    "data.class_weights": st.sampled_from(["none", "balanced", "weights.json"]),
    "model.name": st.sampled_from(["preact-resnet-18", "wrn-34-10", "preact-resnet-digits"]),
    "attack.epsilon": st.sampled_from(["8/255", "0.2", "0.10", ".5"]),
    "attack.step_size": st.sampled_from(["10/255", "5e-2", "0.05"]),
    "evaluation.step_size": st.sampled_from([None, "5/255", "0.02"]),
    "model.mean": st.sampled_from([[], [0.5], [0.485, 0.456, 0.406]]),
    "model.std": st.sampled_from([[], [0.25], [0.229, 0.224, 0.225]]),
    "teacher.mean": st.sampled_from([[], [0.5]]),
    "teacher.std": st.sampled_from([[], [0.25]]),
    "attack.also": st.sampled_from([[], ["l1=12"], ["l1=12,1", "l2=0.5"]]),
    "optimizer.no_decay": st.sampled_from([[], ["*bn*", "fc.bias"]]),
    "awp.layers": st.sampled_from([[], ["fc.weight", "layer?.*.weight"]]),
    "optimizer.kind": st.sampled_from(["sgd", "adamw", "torch:Adam", "timm:lion"]),
    "optimizer.args": st.sampled_from([[], ["betas=0.9,0.99", "eps=1e-6"]]),
    "optimizer.milestones": st.sampled_from([[], [0.5], [0.25, 0.75], [1e-3, 1.0], [2.0, 30.0]]),
    "log": st.sampled_from([[], ["none"], ["tensorboard", "wandb"], ["mlflow"], ["none", "trackio"]]),
}
# "none" is a path in JSON alone
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8)
paths = names.filter(lambda text: text.lower() != "none")


def value_of(key: str) -> st.SearchStrategy[Any]:
    hint = TYPES[key]
    parts = get_args(hint) or (hint,)
    if key in KNOWN:
        return KNOWN[key]
    if hint is bool:
        return st.booleans()
    if get_origin(hint) is Literal:
        return st.sampled_from(parts)
    some = {
        int: st.integers(0, 40),
        float: st.floats(0, 1) | st.sampled_from([1e-5, 2.0]),
        Path: paths,
        str: paths,
    }[parts[0]]
    return some | st.none() if type(None) in parts else some


@st.composite
def changes(draw: st.DrawFn, most: int = 4) -> dict[str, Any]:
    """A few settings that may go together, or not."""
    keys = draw(st.lists(st.sampled_from(sorted(TYPES)), max_size=most, unique=True))
    return {key: draw(value_of(key)) for key in keys}


def nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[name] = value
    return tree


def arguments(values: dict[str, Any]) -> list[str]:
    """The flags that say the same."""
    argv = []
    for key, value in values.items():
        if isinstance(value, bool):
            head, _, last = flag(key)[2:].rpartition(".")
            argv.append(flag(key) if value else f"--{head}.no-{last}" if head else f"--no-{last}")
        elif isinstance(value, list):
            argv += [flag(key), *map(str, value)]
        else:
            argv.append(f"{flag(key)}={'none' if value is None else value}")
    return argv


def outcome(argv: list[str]) -> Config | str:
    """The configuration that a command line gives, or what it is refused with."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            return parse_train(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    text = errors.getvalue()
    assert text.startswith("train.py: error: ")
    assert text.count("\n") == 1
    return text.removeprefix("train.py: error: ").removesuffix("\n")


def refused(path: Path, *argv: str) -> str:
    told = outcome(["--config", str(path), *argv])
    assert isinstance(told, str), told
    return told


def written(folder: Path, values: dict[str, Any], kind: str) -> Path:
    path = folder / f"settings.{kind}"
    text = yaml.safe_dump(values, allow_unicode=True) if kind == "yaml" else json.dumps(values)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("settings")


@settings(max_examples=150, deadline=None)
@given(told=changes())
def test_any_configuration_is_read_back_as_it_was_written(folder: Path, told: dict[str, Any]) -> None:
    config = None
    try:
        config = from_flat({**to_flat(Config()), **told})
        config.require_files()
    except ConfigError:
        assume(False)
    assert config is not None
    assert from_json(to_json(config)) == config
    path = folder / "config.json"
    path.write_text(to_json(config))
    assert load_config(path) == config
    assert outcome(["--config", str(path)]) == config
    assert outcome(["--config", str(written(folder, json.loads(to_json(config)), "yaml"))]) == config


@settings(max_examples=150, deadline=None)
@given(in_file=changes(), on_top=changes(), kind=st.sampled_from(["json", "yaml"]))
def test_a_file_and_flags_are_the_same_as_flags_alone(
    folder: Path, in_file: dict[str, Any], on_top: dict[str, Any], kind: str
) -> None:
    on_top.pop("preset", None)
    path = written(folder, nested(in_file), kind)
    both = outcome(["--config", str(path), *arguments(on_top)])
    alone = outcome(arguments({**in_file, **on_top}))
    # what the file is to blame for is told with its name
    assert both == alone or both == f"{path}: {alone}"


def test_the_others_are_the_presets(folder: Path) -> None:
    path = folder / "partial.yaml"
    path.write_text("preset: digits-mart-awp\nawp: {gamma: 1e-3}\nattack:\n  steps: 3\n")
    base = build_preset("digits-mart-awp")
    expected = dataclasses.replace(
        base, awp=dataclasses.replace(base.awp, gamma=1e-3), attack=dataclasses.replace(base.attack, steps=3)
    )
    assert outcome(["--config", str(path)]) == expected
    assert outcome([base.preset, "--config", str(path)]) == expected
    assert outcome(["--config", str(path), "--epochs=2"]) == dataclasses.replace(expected, epochs=2)
    told = f"--preset: expected 'digits-mart-awp' as in {path}, got 'digits'; give one of them"
    assert refused(path, "--preset", "digits") == told
    path.write_text("epochs: 2\n")
    assert outcome(["--config", str(path)]) == dataclasses.replace(build_preset("digits"), epochs=2)
    at = dataclasses.replace(build_preset("digits-at"), epochs=2)
    assert outcome(["digits-at", "--config", str(path)]) == at


def test_words_are_what_their_settings_say(folder: Path) -> None:
    path = folder / "words.yaml"
    lines = [
        "attack: {epsilon: 0.20, step_size: 8/255, start: none}",
        "optimizer: {lr: 1e-3, milestones: [.25, 5e-1], clip_norm: none, nesterov: TRUE}",
        "data: {root: ~, extra: null, train_limit: , flip: false}",
        'run_dir: "none"',
        "seed: 010",
    ]
    path.write_text("\n".join(lines))
    config = outcome(["--config", str(path)])
    assert isinstance(config, Config), config
    assert (config.attack.epsilon, config.attack.step_size, config.attack.start) == ("0.20", "8/255", "none")
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.milestones, optimizer.clip_norm) == (0.001, (0.25, 0.5), None)
    assert (optimizer.nesterov, config.data.flip) == (True, False)
    assert (config.data.root, config.data.extra, config.data.train_limit) == (None, None, None)
    assert (config.run_dir, config.seed) == (Path("none"), 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("awp:\n  gama: 1\n", "awp.gama: unknown key; did you mean awp.gamma?"),
        ("lr: 1\n", "lr: unknown key; did you mean optimizer.lr?"),
        ("zzzzzz: 1\n", "zzzzzz: unknown key; expected one of preset, method,"),
        ("awp.gamma: 1\n", "awp.gamma: unknown key; expected the group awp, and gamma inside it"),
        ("data: {flip: no}\n", "--data.flip: expected true or false, got 'no'"),
        ('epochs: "3"\n', "--epochs: expected a whole number, got '3'"),
        ("epochs: 3.0\n", "--epochs: expected a whole number, got '3.0'"),
        ("epochs: 1:30\n", "--epochs: expected a whole number, got '1:30'"),
        ("epochs: 0\n", "--epochs: expected a whole number >= 1, got 0"),
        ("epochs: null\n", "--epochs: expected a whole number, got None"),
        ("epochs: [3]\n", "--epochs: expected a whole number, got ['3']"),
        ("epochs: {a: 3}\n", "--epochs: expected a whole number, got {'a': '3'}"),
        ("optimizer: {milestones: 0.5}\n", "--optimizer.milestones: expected a list of finite numbers, got '0.5'"),
        ("optimizer: {lr: .nan}\n", "--optimizer.lr: expected a finite number, got '.nan'"),
        ("awp: {gamma: -1}\n", "--awp.gamma: expected a number from 0 to 1000, got -1"),
        ('data: {root: "a\\0b"}\n', "--data.root: expected a path or none, got 'a\\x00b'"),
        ('data: {root: "\\ud800"}\n', "--data.root: expected a path or none, got '\\ud800'"),
        ('data: {root: "\\UFFFFFFFF"}\n', "not YAML: "),
        ("preset: digts\n", "preset: did you mean digits? there is no 'digts';"),
        ("preset: [digits]\n", "--preset: expected text, got ['digits']"),
        ("data: {crop: resized}\n", "--data.crop: expected pad, unless --data.image-size is given, got 'resized'"),
        ("awp:\n", "awp: expected a group of settings, got None"),
        ("", "top level: expected a group of settings, got None"),
        ("- 1\n", "top level: expected a group of settings, got ['1']"),
        ("epochs: 1\nseed: 2\nepochs: 3\n", "not YAML: line 1: a key is given twice"),
        ("seed: 1\nawp: {gamma: 1,\n gamma: 2}\n", "not YAML: line 2: a key is given twice"),
        ("? [a]\n: 1\n", "not YAML: line 1: found unhashable key"),
        ("~: 1\n", "None: unknown key; "),
        ("data: &a {pad: 1}\nawp: *a\n", "not YAML: line 1: anchors, aliases and tags are not taken"),
        ("awp: *a\n", "not YAML: line 1: anchors, aliases and tags are not taken"),
        ("awp:\n  <<: *a\n", "not YAML: line 2: anchors, aliases and tags are not taken"),
        ("!!python/object/apply:os.abort []\n", "not YAML: line 1: anchors, aliases and tags are not taken"),
        ("epochs: !!int 3\n", "not YAML: line 1: anchors, aliases and tags are not taken"),
        ("epochs: 1\n---\nepochs: 2\n", "not YAML: line 2: but found another document"),
        ("epochs: 1\n\tseed: 2\n", "not YAML: line 2: "),
        ("epochs: [1\n", "not YAML: line 2: "),
        ("epochs: \x01\n", "not YAML: "),
        ("[" * 20_000, "not YAML: "),
        ("a: " + "x" * 70_000, "not YAML: more than 65536 bytes"),
    ],
    ids=range(39),
)
def test_yaml_is_read_strictly(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert refused(path).startswith(f"{path}: {message}")


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30))]
    path.write_text("\n".join(lines))
    assert "anchors, aliases and tags are not taken" in refused(path)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_what_is_no_file_of_settings_is_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"c.{kind}"
    assert refused(path) == f"{path}: cannot be read: No such file or directory"
    path.mkdir()
    assert refused(path) == f"{path}: cannot be read: not a regular file"
    pipe = tmp_path / f"pipe.{kind}"
    os.mkfifo(pipe)
    assert refused(pipe) == f"{pipe}: cannot be read: not a regular file"
    noise = tmp_path / f"noise.{kind}"
    noise.write_bytes(b"\xff\xfe\x00")
    assert refused(noise).startswith(f"{noise}: not {kind.upper()}")
    assert refused(noise).endswith(": not UTF-8 text")
    long = tmp_path / f"{'x' * 300}.{kind}"
    assert refused(long).endswith(": cannot be read: File name too long")
    with noise.open("wb") as file:
        file.truncate(1 << 40)
    assert refused(noise).endswith(": more than 65536 bytes")


def test_other_kinds_of_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    assert refused(path) == f"--config: expected a .yaml, .yml or .json file, got {show(path)}"
    assert outcome(["--config"]) == "--config: expected a path, got nothing"
    assert outcome(["--config="]) == "--config: expected a path, got ''"
    assert str(outcome(["--confg=x"])) == "--confg: unknown flag; did you mean --config?"


def test_a_flag_mends_what_its_file_leaves_open(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"data": {"crop": "resized"}}')
    assert refused(path).startswith(f"{path}: --data.crop: ")
    mended = ["--config", str(path), "--data.image-size", "32", "--data.pad", "0"]
    assert isinstance(outcome(mended), Config)
    assert refused(path, "--data.image-size", "0").startswith("--data.image-size: ")


def test_yaml_needs_pyyaml_and_json_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    for kind in ("json", "yaml"):
        (tmp_path / f"c.{kind}").write_text('{"epochs": 2}')
    assert outcome(["--config", str(tmp_path / "c.json")]) == dataclasses.replace(build_preset("digits"), epochs=2)
    told = refused(tmp_path / "c.yaml")
    assert told.endswith(": the package pyyaml is missing; install it with: pip install pyyaml, or give a .json file")


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), kind=st.sampled_from(["json", "yaml"]))
def test_any_bytes_are_settings_or_one_line(folder: Path, data: bytes, kind: str) -> None:
    path = folder / f"bytes.{kind}"
    path.write_bytes(data)
    told = outcome(["--config", str(path)])
    assert isinstance(told, Config) or told.startswith(f"{path}: ")


marks = st.sampled_from(
    [*": {}[],&*!|>'\"%@`#?-~\n\t<", "null", "1e-3", "no", "awp", "gamma", "epochs", "\\", "é", "\x85"]
)


@settings(max_examples=300, deadline=None)
@given(text=st.lists(marks, max_size=15).map("".join))
def test_any_yaml_is_settings_or_one_line(folder: Path, text: str) -> None:
    path = folder / "marks.yaml"
    path.write_text(text, encoding="utf-8")
    told = outcome(["--config", str(path)])
    assert isinstance(told, Config) or told.startswith(f"{path}: ")


def test_runs_of_the_first_version_are_read(tmp_path: Path) -> None:
    values = json.loads(to_json(Config()))
    values["awp"]["public_code"] = False
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    assert load_config(path) == Config()
    values["awp"]["public_code"] = True
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"config\.json: awp\.public_code: unknown key"):
        load_config(path)

"""Malformed configurations: always exit code 2 and one line that names the key, before torch is imported.

`AWP_FUZZ_CASES=2000 pytest tests/cli/test_config_fuzz.py` for the long run.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

import forked
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import TRAIN

from awp_engine.cli.command_line import one_line, parse_train
from awp_engine.config import Config, ConfigError, flag, flags, load_config, to_json
from awp_engine.config.identity import ADDED

CASES = int(os.environ.get("AWP_FUZZ_CASES", "150"))

HINTS = flags()
AMOUNTS = ["--attack.epsilon", "--attack.step-size", "--attack.stronger-epsilon", "--evaluation.step-size"]

NOT_NUMBERS = ["nan", "NaN", "-nan", "inf", "-inf", "Infinity", "1e999", "-1", "-0.5", "-9" * 30, "9" * 5000]
NOT_NUMBERS += ["", " ", "x", "1,5", "1;2", "0x10", "1e", "--1", "1/0", "²", "\x00", "1\n2", "[]", "{}", "true", "ten"]
SWITCHED = ("true", "false")
words = st.text(max_size=12) | st.sampled_from(NOT_NUMBERS)


def parts_of(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def is_number(text: str, kind: type) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def malformed(name: str) -> st.SearchStrategy[str]:
    """Text that no setting of this flag's type is."""
    hint = HINTS[name]
    parts = parts_of(hint)
    optional = type(None) in parts
    known = [str(each) for part in parts if typing.get_origin(part) is Literal for each in typing.get_args(part)]
    if int in parts or float in parts:
        kind = int if int in parts else float
        text = st.text(max_size=12).filter(lambda text: not is_number(text, kind))
        wrong = text | st.sampled_from(NOT_NUMBERS)
        if kind is int:
            limit = 2**63 if name == "--seed" else 2**31
            wrong |= st.floats().map(repr) | st.integers(min_value=limit).map(str) | st.integers(max_value=-1).map(str)
        else:
            # what fp32 cannot hold, and what of it a sum or a product would leave
            wrong |= (st.floats(min_value=1.01e30) | st.integers(min_value=10**31)).map(str)
    elif known:
        # of a switch true and false are read in any case
        wrong = words.filter(lambda text: text not in known and not ("True" in known and text.lower() in SWITCHED))
    elif name in AMOUNTS:
        wrong = st.sampled_from(NOT_NUMBERS) | st.text(alphabet="ab/.-e ", min_size=1, max_size=9)
    elif typing.get_origin(hint) is tuple:
        # any text but the empty one is a pattern
        wrong = st.just("") if str in typing.get_args(hint) else st.sampled_from([text for text in NOT_NUMBERS if text])
    elif name == "--preset":
        wrong = words.map(lambda text: "no such " + text)
    elif name in ("--method", "--model.name", "--data.name", "--data.class-weights", "--optimizer.kind"):
        wrong = words
    elif name.startswith("--teacher."):
        # the method of the default has none
        wrong = words
    else:
        wrong = st.sampled_from(["", "a\0b"]) if Path in parts else st.nothing()
    return wrong.filter(lambda text: not (optional and text.lower() == "none"))


FUZZED = [name for name in sorted(HINTS) if HINTS[name] is not bool]


def refused(argv: list[str]) -> str:
    """What `train.py` says to `argv`: one line, with exit code 2 and nothing on standard output."""
    errors, output = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as caught, contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        parse_train(argv)
    text = errors.getvalue()
    assert caught.value.code == 2, argv
    assert text.startswith("train.py: error: "), argv
    assert text.count("\n") == 1, argv
    assert text.endswith("\n"), argv
    assert "Traceback" not in text
    assert len(text) < 2000
    assert output.getvalue() == ""
    return text


def test_every_flag_but_switches_is_fuzzed() -> None:
    for name in FUZZED:
        assert not malformed(name).is_empty, name


good = st.sampled_from([["--seed", "3"], ["--epochs=2"], ["--deterministic"], ["--awp.gamma", "0.01"], []])


@settings(max_examples=CASES)
@given(data=st.data(), name=st.sampled_from(FUZZED), joined=st.booleans(), before=good, after=good)
def test_malformed_values_name_their_flag(
    data: st.DataObject, name: str, joined: bool, before: list[str], after: list[str]
) -> None:
    value = data.draw(malformed(name))
    # a value that looks like a flag is one, unless it is joined
    joined = joined or value.startswith("-")
    before, after = ([] if part and part[0].startswith(name) else part for part in (before, after))
    argv = [*before, *([f"{name}={value}"] if joined else [name, value]), *(after if after != before else [])]
    # a preset's message is that of the first argument
    assert name.lstrip("-") in refused(argv), argv


@settings(max_examples=CASES)
@given(data=st.data(), name=st.sampled_from(sorted(HINTS)), where=st.integers(0, 30), letter=st.characters())
def test_unknown_flags_are_named(data: st.DataObject, name: str, where: int, letter: str) -> None:
    place = min(2 + where, len(name))
    changed = name[:place] + data.draw(st.sampled_from([letter, "-x", ".x", "x", "9"])) + name[place:]
    flag = changed.partition("=")[0].replace("_", "-")
    heads = [name[2:].rpartition(".") for name in HINTS]
    switches = {f"--{head}{dot}no-{last}" for head, dot, last in heads}
    if flag in HINTS or flag in switches or flag in ("--help", "-h"):
        return
    text = refused([changed, "1"])
    assert one_line(f"{flag}: unknown flag") in text, changed


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(10**400) | st.just("nan"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=CASES)
@given(data=st.data(), name=st.sampled_from(sorted(HINTS)), value=values)
def test_files_with_malformed_values_name_file_and_key(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str, value: object
) -> None:
    content = json.loads(to_json(Config()))
    *groups, key = name[2:].replace("-", "_").split(".")
    target = content[groups[0]] if groups else content
    change = data.draw(st.sampled_from(["value", "missing", "unknown", "group"]))
    if change == "missing":
        del target[key]
    elif change == "unknown":
        target[key + "x"] = target.pop(key)
    elif change == "group":
        content[groups[0] if groups else key] = value
    else:
        target[key] = value
    # not beside what other tests take for run directories
    path = tmp_path_factory.getbasetemp() / "fuzz" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    text = ""
    try:
        load_config(path)
    except ConfigError as error:
        text = str(error)
    # a value that fits by chance is taken, and what earlier versions lacked may be missing
    assert text or change in ("value", "group") or (change == "missing" and name in map(flag, ADDED))
    assert not text or text.startswith(f"{path}: ")
    assert "\n" not in text
    named = [key, key.replace("_", "-"), *groups]
    assert not text or any(part in text for part in named) or "not JSON" in text


@settings(max_examples=CASES)
@given(data=st.data())
def test_damaged_files_are_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(to_json(Config()).encode())
    kind = data.draw(st.sampled_from(["cut", "bytes", "noise"]))
    if kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 3)) :]
    elif kind == "bytes":
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + 1] = data.draw(st.binary(min_size=1, max_size=4))
    else:
        content = bytearray(data.draw(st.binary(max_size=50)))
    path = tmp_path_factory.getbasetemp() / "fuzz" / "damaged.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    refusal = None
    try:
        load_config(path)
    except ConfigError as error:
        refusal = str(error)
    assert refusal is not None or kind == "bytes"
    assert refusal is None or (refusal.startswith(f"{path}: ") and "\n" not in refusal)


REAL = [
    ["--attack.epsilon", "nan"],
    ["--optimizer.lr=inf"],
    ["--awp.gamma", "-1"],
    ["--epochs", "9" * 30],
    ["--seed", "three"],
    ["--gpu", "0"],
    ["--attack.norm", "l3"],
]


def test_train_refuses_before_torch_is_imported() -> None:
    code = f"""
import json, runpy, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise AssertionError("torch is imported")
sys.meta_path.insert(0, NoTorch())
for argv in json.loads(sys.argv[1]):
    sys.argv = ["train.py", *argv]
    try:
        runpy.run_path({str(TRAIN)!r}, run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    print(code, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, json.dumps(REAL)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True)
    assert result.stdout.split() == ["2"] * len(REAL)
    for argv, line in zip(REAL, result.stderr.splitlines(), strict=True):
        assert line.startswith(f"train.py: error: {argv[0].partition('=')[0]}: ")


@pytest.mark.parametrize("argv", REAL[:3], ids=" ".join)
def test_train_as_a_program(argv: list[str]) -> None:
    result = forked.run(TRAIN, *argv)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"train.py: error: {argv[0].partition('=')[0]}: ")
    assert result.stderr.count("\n") == 1

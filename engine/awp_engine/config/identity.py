"""A configuration in other forms: flat, as JSON, as read from a file; and what tells two runs apart.

What is no configuration is refused by a `ConfigError` that names the file, if there is one, and the key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awp_engine.config.data_sets import is_given
from awp_engine.config.documents import JSON, parse_json, read_document, read_text
from awp_engine.config.model_names import EARLIER_OBJECT
from awp_engine.config.schema import ConfigError, coerce, did_you_mean, fields, flag, parse_amount, show
from awp_engine.config.settings import Config

# What a resumed run may change: none of it moves the weights, or the choice of the epoch; images may lie elsewhere, as
# long as their fingerprints are the same.
_FREE_ON_RESUME = frozenset(
    {
        "preset",
        "run_dir",
        "device",
        "threads",
        "data.root",
        "data.extra",
        "data.bad_list",
        "data.loader",
        "data.resident_share",
        "data.workers",
        "teacher.weights",
        "model.checkpoint_activations",
        "keep_checkpoints",
        "keep_every",
        "checkpoint_every",
        "checkpoint_steps",
        "distributed.strategy",
        "distributed.check_every",
        "distributed.timeout",
        "log",
        "log_interval",
        "compare_without_awp",
        "compile",
        "cuda_graphs",
        "profile",
        "evaluation.batch_size",
        "evaluation.test_limit",
    }
)

# Keys that runs of earlier versions lack, with the value, as JSON holds it, that means what those versions did.
ADDED: dict[str, Any] = {
    "log": ["tensorboard"],
    "data.class_weights": "none",
    "data.policy": "none",
    "data.policy_first": False,
    "data.policy_part": 1.0,
    "data.rotate": 0.0,
    "model.normalize": "auto",
    "model.mean": [],
    "model.std": [],
    "awp.layers": [],
    "attack.ramp": "none",
    "attack.step_warmup": 0,
    "attack.stronger_after": None,
    "attack.stronger_epsilon": None,
    "attack.stronger_steps": None,
    "optimizer.warmup_lr": 0.0,
    "optimizer.min_lr": 0.0,
    "optimizer.no_decay": [],
    "attack.also": [],
    "awp.max_rise": None,
    "attack.noise": 0.0,
    "attack.noise_samples": 1,
    "optimizer.layer_decay": 1.0,
    "optimizer.args": [],
    "data.extra_replacement": False,
    "data.extra_alone": 0,
    "data.epoch_images": None,
    "model.bn_momentum": None,
    "optimizer.drop": 0.1,
    "optimizer.decay_norms": True,
    "optimizer.per_epoch": False,
    "optimizer.cycle_momentum": False,
    "evaluation.loss": "ce",
    "model.checkpoint_activations": False,
    "threads": None,
    "method_args": [],
    "average.ramp": True,
    "average.warmup": 0.0,
    "average.statistics": "attacked",
    "teacher.weights": None,
    "teacher.name": None,
    "teacher.key": None,
    "teacher.activation": "relu",
    "teacher.normalize": "auto",
    "teacher.mean": [],
    "teacher.std": [],
}


def key_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every key, such as "awp.gamma", with its type."""
    found: dict[str, Any] = {}
    for name, (hint, _) in fields(cls).items():
        inner = dataclasses.is_dataclass(hint)
        found |= key_types(typing.cast(type, hint), f"{prefix}{name}.") if inner else {prefix + name: hint}
    return found


def flags() -> dict[str, Any]:
    """Every flag with its type."""
    return {flag(key): hint for key, hint in key_types().items()}


def to_flat(config: Config) -> dict[str, Any]:
    """The value of every key, such as "awp.gamma", as JSON holds it."""
    return _flatten(json.loads(to_json(config)), "configuration", whole=True)


def from_flat(values: Mapping[str, Any]) -> Config:
    """The configuration of the value of every key."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        groups.setdefault(group, {})[name] = value
    inner = {name: hint(**groups[name]) for name, (hint, _) in fields(Config).items() if name in groups}
    return Config(**groups[""], **inner)


def to_json(config: Config) -> str:
    """`config` as indented JSON, every key written out."""
    return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False, default=str) + "\n"


def _flatten(values: Any, source: str, cls: type = Config, prefix: str = "", *, whole: bool) -> dict[str, Any]:
    """Nested values under their dotted keys; `whole`: no key may be missing."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source}: {prefix[:-1] or 'top level'}: expected a group of settings, got {show(values)}")
    known, flat = fields(cls), {}
    # what runs of version 0.1 were not told
    values = {key: value for key, value in values.items() if (prefix, key, value) != ("awp.", "public_code", False)}
    for key in values:
        if key not in known:
            hint = did_you_mean(f"{prefix}{key}", key_types(), f"expected one of {', '.join(known)}")
            if not prefix and key in key_types():
                hint = "expected the group {0}, and {2} inside it".format(*key.partition("."))
            raise ConfigError(f"{source}: {prefix}{show(str(key))[1:-1]}: unknown key; {hint}")
    for key, (hint, _) in known.items():
        group = typing.cast(type, hint) if dataclasses.is_dataclass(hint) else None
        if group is not None and (key in values or (whole and ADDED.keys() >= {f"{key}.{n}" for n in fields(group)})):
            # earlier versions may have had no such group
            flat |= _flatten(values.get(key, {}), source, group, f"{prefix}{key}.", whole=whole)
        elif key in values:
            flat[prefix + key] = values[key]
        elif whole and prefix + key in ADDED:
            flat[prefix + key] = ADDED[prefix + key]
        elif whole:
            raise ConfigError(f"{source}: {prefix}{key}: missing key; add it, or write the file again")
    return flat


def from_json(text: str, source: str = "config.json") -> Config:
    """Reads what `to_json` wrote; `source` is the file's name for messages.

    Raises:
        ConfigError: naming the file and the key, for unknown and missing keys, wrong types and refused values.
    """
    values = _flatten(parse_json(text, source), source, whole=True)
    try:
        return from_flat(values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def load_config(path: Path) -> Config:
    """Reads a `config.json`.

    Raises:
        ConfigError: naming the file, if it cannot be read or does not hold a configuration.
    """
    return from_json(read_text(path, JSON), str(path))


def load_settings(path: Path) -> dict[str, Any]:
    """The settings that a file names, flat: YAML, or JSON such as a `config.json`."""
    known, values = key_types(), _flatten(read_document(path), str(path), whole=False)
    try:
        return {key: coerce(known[key], value, key) for key, value in values.items()}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def decisive(config: Config) -> dict[str, Any]:
    """Dotted key -> value for all that determines the run's weights and its choice of epoch; equal amounts alike."""
    values = to_flat(config)
    quarter = parse_amount(config.attack.epsilon) / 4  # the evaluation's step where none is given
    for key in ("attack.epsilon", "attack.step_size", "evaluation.step_size"):
        values[key] = str(quarter if values[key] is None else parse_amount(values[key]))
    if config.attack.stronger_epsilon is not None:
        values["attack.stronger_epsilon"] = str(parse_amount(config.attack.stronger_epsilon))
    values["attack.also"] = [f"{norm}={epsilon},{step}" for norm, epsilon, step in config.attack.further]
    return {key: value for key, value in values.items() if key not in _FREE_ON_RESUME}


def _trajectory(config: Config) -> dict[str, Any]:
    """`decisive`, without what earlier versions did not know and this run does not use."""
    values = decisive(config)
    # what runs from before it was removed had, all that can go on
    values["awp.public_code"] = False
    return {key: value for key, value in values.items() if key not in ADDED or ADDED[key] != value}


def config_hash(config: Config) -> str:
    """SHA-256 (hex) over all that determines the run's weights and its choice of epoch.

    Left out are the run directory, the device, checkpoint and log settings, and the places of images, which have
    fingerprints; "8/255" and "16/510" count as equal.
    """
    canonical = json.dumps(_trajectory(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def why_not_longer(config: Config) -> str | None:
    """Why a run of these settings cannot be given more epochs later, None where it can."""
    schedule = config.optimizer.schedule
    if schedule not in ("constant", "piecewise"):
        return f"its learning rate falls over all epochs (--optimizer.schedule {schedule})"
    if config.method in ("adr", "adr-trades", "liet", "oaat"):
        return f"its loss changes over all epochs (--method {config.method})"
    if config.average.kind == "swa":
        return "its average begins after a part of all epochs (--average.kind swa)"
    if config.attack.ramp != "none":
        return f"its epsilon grows over all epochs (--attack.ramp {config.attack.ramp})"
    return None


def longer_flags(config: Config, epochs: int) -> list[str]:
    """The flags that give a run more epochs, where `why_not_longer` has nothing against them."""
    optimizer, flags = config.optimizer, ["--epochs", str(epochs)]
    if optimizer.schedule == "piecewise" and max(optimizer.milestones, default=2) <= 1:
        # the same fractions of more epochs would be other epochs; 1 is a fraction
        marks = optimizer.milestone_epochs(config.epochs)
        flags += ["--optimizer.milestones", *(str(mark if min(marks) > 1 else mark / epochs) for mark in marks)]
    return flags


def _require_longer(saved: Config, given: Config, run_dir: Path) -> None:
    """Refuses more epochs where the rates of the first ones would have been others."""
    reason = why_not_longer(saved)
    if reason is not None:
        raise ConfigError(
            f"--epochs: {run_dir} was begun with {saved.epochs} epochs and cannot be given {given.epochs}: {reason}; "
            f"give --epochs {saved.epochs} to go on with it, or another --run-dir for a new run"
        )
    before, now = (config.optimizer.milestone_epochs(config.epochs) for config in (saved, given))
    if saved.optimizer.schedule == "piecewise" and [m for m in before if m < saved.epochs] != [
        m for m in now if m < saved.epochs
    ]:
        flags = " ".join(longer_flags(saved, given.epochs))
        raise ConfigError(f"--epochs: the rate of {run_dir} fell at other epochs; to train on give {flags}")


def _differing(saved: Config, given: Config) -> str | None:
    """The first key, of those that move the weights, in which two runs differ: data and model before their settings."""
    before, now = _trajectory(saved), _trajectory(given)
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    return min(keys, key=lambda key: (key not in ("model.name", "data.name"), key), default=None)


def _named_as_now(saved: Config, given: Config) -> Config:
    """Objects of Python, which all had one name in earlier versions, by the names that they have now."""
    data, model = saved.data, saved.model
    if is_given(data.name) and is_given(given.data.name):
        data = dataclasses.replace(data, name=given.data.name)
    if model.name == EARLIER_OBJECT and given.model.source == "object":
        model = dataclasses.replace(model, name=given.model.name)
    return dataclasses.replace(saved, data=data, model=model)


def require_same_run(saved: Config, given: Config, run_dir: Path) -> None:
    """Refuses to go on with a run under other settings; more epochs are none where its schedule allows them.

    Raises:
        ConfigError: naming the first key that differs, with both values.
    """
    saved = _named_as_now(saved, given)
    # the epochs are the reason only where nothing else differs: most often a new run was meant
    others = dataclasses.replace(given, epochs=saved.epochs)
    if given.epochs > saved.epochs and _differing(saved, others) in (None, "optimizer.milestones"):
        _require_longer(saved, given, run_dir)
        optimizer = dataclasses.replace(saved.optimizer, milestones=given.optimizer.milestones)
        saved = dataclasses.replace(saved, epochs=given.epochs, optimizer=optimizer)
    elif given.epochs < saved.epochs and _differing(saved, others) is None:
        raise ConfigError(
            f"--epochs: {run_dir} was given {saved.epochs} epochs and cannot be given fewer, {given.epochs}; give "
            f"--epochs {saved.epochs} to go on with it, or another --run-dir for a new run"
        )
    key = _differing(saved, given)
    if key is not None:
        before, now = (show(_trajectory(config).get(key)) for config in (saved, given))
        raise ConfigError(
            f"--run-dir: {run_dir} holds another run: {flag(key)} is {before} there and {now} here; give another "
            "--run-dir for a new run, or the same value to go on with that one"
        )

"""Command line -> `Config`; whatever is wrong with it becomes one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from awp_engine.config import Config, ConfigError, expectation, flag, show
from awp_engine.config.identity import from_flat, key_types, load_settings, to_flat
from awp_engine.config.model_names import is_code
from awp_engine.config.presets import DEFAULT, PRESETS, build_preset
from awp_engine.config.schema import Word, coerce, did_you_mean, fields, help_texts, is_switch
from awp_engine.files.text import one_line


def _rank() -> str | None:
    """This process's rank, None where it is alone."""
    return os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else None


def fail(message: str, code: int = 2, prog: str = "train.py", *, once: bool = False) -> NoReturn:
    """Ends the program with one line on stderr: `PROG: error: MESSAGE`, with the rank where there are several.

    Args:
        message: any text.
        code: to exit with.
        prog: the program's name.
        once: every rank says the same, and the first one is enough.

    Raises:
        SystemExit: always, with `code`.
    """
    rank = _rank()
    if not once or rank in (None, "0"):
        where = "" if rank is None or once else f"rank {rank}: "
        print(f"{prog}: error: {where}{one_line(message)}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def whole_number(text: str) -> int:
    """An argument's value, as `type=` of an argparse flag."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {show(text)}") from None
    if abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2^63, got {show(number)}")
    return number


def thread_count(text: str) -> int:
    """The same for a number of threads: the system starts as many as it is told, until it has no room for another."""
    number = whole_number(text)
    if not 1 <= number <= 1024:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 1024, got {number}")
    return number


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints take one line: the message alone, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the program as `fail` does."""
        fail(f"{message}; --help lists the flags", prog=self.prog, once=True)


def _off(name: str) -> str:
    """The switch that turns a flag off: `--data.no-flip`."""
    head, dot, last = name[2:].rpartition(".")
    return f"--{head}{dot}no-{last}"


def _unexpected(argument: str) -> ConfigError:
    return ConfigError(f"{show(argument)}: unexpected argument; expected a flag (a preset goes first)")


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Key -> value of every flag, `--config` among them; of a flag that is given twice the last value.

    Raises:
        ConfigError: naming the flag.
    """
    types = {**key_types(), "config": Path}
    on = {flag(key): key for key in types}
    off = {_off(name): key for name, key in on.items() if is_switch(types[key])}
    words: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            words.append((name.replace("_", "-"), [value] if equals else []))
        elif words:
            words[-1][1].append(token)
        else:
            raise _unexpected(token)
    given: dict[str, Any] = {}
    for name, values in words:
        key = on.get(name) or off.get(name)
        if key is None:
            raise ConfigError(f"{name}: unknown flag; {did_you_mean(name, [*on, *off], '--help lists the flags')}")
        is_list = typing.get_origin(types[key]) is tuple
        if values and (types[key] is bool or name in off):
            raise ConfigError(f"{name}: takes no value, got {show(values[0])}; the flag with no- turns it off")
        if len(values) > 1 and not is_list:
            raise _unexpected(values[1])
        if is_switch(types[key]) and not values:
            given[key] = name in on
        elif values or is_list:
            value = [Word(text) for text in values] if is_list else Word(values[0])
            given[key] = coerce(types[key], value, key)
        else:
            raise ConfigError(f"{name}: expected {expectation(types[key])}, got nothing")
    return given


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _help(default: Config, prog: str) -> str:
    """Every preset and every flag, with what it means, its range and its default."""
    presets = "\n".join(f"  {name}: {summary}" for name, summary in PRESETS.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [PRESET] [--config FILE] [flags]",
        description=f"Trains a classifier.\n\nPresets (none means {DEFAULT}):\n\n{presets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "Settings from a .yaml file, or a .json file such as a run's config.json; the preset has the others."
    parser.add_argument("--config", metavar="FILE", help=f"{text} Flags go on top.")
    names = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
    inner = [getattr(default, name) for name, (hint, _) in fields(Config).items() if dataclasses.is_dataclass(hint)]
    for group in (default, *inner):
        cls = type(group)
        texts, add = help_texts(cls), parser.add_argument_group(cls.section[:-1] or "run", cls.__doc__).add_argument
        for name, (hint, accepted) in fields(cls).items():
            if dataclasses.is_dataclass(hint):
                continue
            key, parts = flag(cls.section + name), typing.get_args(hint) or (hint,)
            words = "" if accepted is None else f"{accepted.words}; "
            shown = f"{texts[name]} ({words}default: {_shown(getattr(group, name))})".replace("%", "%%")
            if is_switch(hint):
                add(key, _off(key), action="store_true", help=shown)
            else:
                choices = "{" + ",".join(map(str, parts)) + "}"
                add(key, metavar=names.get(parts[0], choices) + " ..." * (... in parts), help=shown)
    return parser.format_help()


def _parse(argv: Sequence[str], prog: str) -> Config:
    rest = list(argv)
    first = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if any(token in ("-h", "--help") for token in rest):
        if _rank() in (None, "0"):
            print(_help(build_preset(DEFAULT if first is None else first), prog), end="")
        raise SystemExit(0)
    given = _read_flags(rest)
    file = given.pop("config", None)
    in_file = {} if file is None else load_settings(file)
    preset = given.get("preset", first)
    for name, where in ((first, "the first argument"), (in_file.get("preset"), file)):
        if None not in (name, preset) and name != preset:
            raise ConfigError(f"--preset: expected {name!r} as in {where}, got {preset!r}; give one of them")
    given |= {} if preset is None else {"preset": preset}
    asked = in_file | given
    if is_code(str(in_file.get("model.name"))) and "model.name" not in given:
        name = in_file["model.name"]
        raise ConfigError(
            f"--model.name: {file} asks for code of its own, {show(name)}, which is not run because a file says so; if "
            "you trust it, give the name as a flag as well"
        )
    try:
        values = to_flat(build_preset(asked.get("preset", DEFAULT)))
        if asked.get("model.name", values["model.name"]) != values["model.name"]:
            # the preset's are those of its own model
            values |= {"model.width": None, "model.activation": "relu"}
        return from_flat(values | asked)
    except ConfigError as error:
        key = str(error).partition(":")[0].removeprefix("--").replace("-", "_")
        raise ConfigError(f"{file}: {error}" if key in in_file.keys() - given.keys() else str(error)) from None


def parse_train(argv: Sequence[str] | None = None, prog: str = "train.py") -> Config:
    """The configuration that `[PRESET] [--config FILE] [--flag value ...]` asks for.

    Args:
        argv: the arguments without the program's name; None takes them from `sys.argv`.
        prog: the program's name for messages.

    Raises:
        SystemExit: 0 after --help; 2 after one line on stderr that names the key, for everything a user can get wrong.
    """
    try:
        config = _parse(sys.argv[1:] if argv is None else argv, prog)
        config.require_files()
        return config
    except ConfigError as error:
        fail(str(error), prog=prog, once=True)

"""Command line -> `Config`; whatever is wrong with it becomes one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from awp_engine.config import Config, ConfigError, expectation, flags, show
from awp_engine.config.presets import DEFAULT, PRESETS, build_preset
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


def _unknown_flag(given: str, known: Sequence[str]) -> ConfigError:
    same_end = [name for name in known if name.lstrip("-").rpartition(".")[2] == given.lstrip("-")]
    near = same_end or difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the flags"
    return ConfigError(f"{given}: unknown flag; {hint}")


def _tyro_value(name: str, hint: Any, value: str) -> str:
    """`value` in tyro's spelling, if it is one that `hint` allows."""
    parts = typing.get_args(hint)
    if type(None) in parts and value.lower() == "none":
        return "None"
    numbers = [part for part in (parts or (hint,)) if part in (int, float)]
    try:
        accepted = value in parts if typing.get_origin(hint) is Literal else bool(value or parts)
        for number in numbers:
            number(value)
    except ValueError:
        accepted = False
    if not accepted or (not value and Path in parts):
        raise ConfigError(f"{name}: expected {expectation(hint)}, got {show(value)}")
    return value


def _tyro_arguments(argv: Sequence[str]) -> list[str]:
    """`argv` with every flag known and followed by values of its type, in tyro's spelling.

    Raises:
        ConfigError: naming the flag, where tyro would print several lines.
    """
    hints = flags()
    switches = {name for name, hint in hints.items() if hint is bool}
    for name in list(switches):
        head, _, last = name[2:].rpartition(".")
        switches.add(f"--{head}.no-{last}" if head else f"--no-{last}")
    arguments: list[str] = []
    current, values = "", 0

    def is_list() -> bool:
        return typing.get_origin(hints[current]) is tuple

    def finish_flag() -> None:
        if current and not values and not is_list():
            raise ConfigError(f"{current}: expected {expectation(hints[current])}, got nothing")

    for token in argv:
        value = token
        if token.startswith("--"):
            finish_flag()
            name, equals, value = token.partition("=")
            name = name.replace("_", "-")
            if name not in hints and name not in switches:
                raise _unknown_flag(name, [*hints, *switches])
            if name in switches and equals:
                raise ConfigError(f"{name}: takes no value, got {show(value)}; the flag with no- turns it off")
            arguments.append(name)
            current, values = ("" if name in switches else name), 0
            if not equals:
                continue
        elif not current or (values == 1 and not is_list()):
            raise ConfigError(f"{show(token)}: unexpected argument; expected a flag (a preset goes first)")
        arguments.append(_tyro_value(current, hints[current], value))
        values += 1
    finish_flag()
    return arguments


def _root_error(error: BaseException | None) -> ConfigError | None:
    while error is not None and not isinstance(error, ConfigError):
        error = error.__context__
    return error


def _parse(argv: Sequence[str], prog: str) -> Config:
    rest = list(argv)
    named = rest.pop(0) if rest and not rest[0].startswith("-") else None
    help_wanted = any(token in ("-h", "--help") for token in rest)
    if help_wanted and _rank() not in (None, "0"):
        raise SystemExit(0)
    rest = ["--help"] if help_wanted else _tyro_arguments(rest)
    if "--preset" in rest:
        by_flag = rest[rest.index("--preset") + 1]
        if named not in (None, by_flag):
            raise ConfigError(
                f"--preset: expected {named!r} as in the first argument, got {by_flag!r}; give one of them"
            )
        named = by_flag
    default = build_preset(DEFAULT if named is None else named)
    try:
        import tyro
    except ImportError:
        raise ConfigError("the package tyro is missing; install it with: pip install tyro") from None
    presets = "\n\n".join(f"{name}: {summary}" for name, summary in PRESETS.items())
    description = f"Trains a classifier: {prog} [PRESET] [flags].\n\nPresets (none means {DEFAULT}):\n\n{presets}"
    boxes = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes):
            return tyro.cli(Config, prog=prog, description=description, args=rest, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        known = _root_error(stop.__context__)
        # Whatever tyro alone finds wrong: its box's first paragraph, without the frame.
        text = re.split(r"[─]{8,}\s*│", re.sub(r"[╭╮╰╯]", "", boxes.getvalue()))[0]
        raise known or ConfigError(one_line(re.sub(r"[│─]+", " ", text)) or "cannot be parsed; see --help") from None


def parse_train(argv: Sequence[str] | None = None, prog: str = "train.py") -> Config:
    """The configuration that `[PRESET] [--flag value ...]` asks for.

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

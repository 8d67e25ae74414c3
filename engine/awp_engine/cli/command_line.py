"""Command line -> `Config`; whatever is wrong with it becomes one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from awp_engine.config import Config, ConfigError, expectation, flag, show
from awp_engine.config.data_sets import is_given, is_own
from awp_engine.config.identity import from_flat, key_types, load_settings, to_flat
from awp_engine.config.model_names import is_code, optimizer_source, source_of
from awp_engine.config.presets import DEFAULT, PRESETS, build_preset
from awp_engine.config.schema import Word, coerce, did_you_mean, fields, help_texts, is_switch, nearest
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


def command_again(prog: str, arguments: Sequence[str]) -> str:
    """The line, for a shell, that starts this command as it was started.

    Args:
        prog: the program's name for messages: "awp train", "python -m awp_engine train", "train.py".
        arguments: of the command.
    """
    # a script's name is as it was given
    start = ["python", sys.argv[0]] if prog.endswith(".py") else prog.split()
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        # torchrun's other flags are its own
        start = ["torchrun", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', world)}", *start[1:]]
    return shlex.join([*start, *arguments])


def other_command(prog: str, name: str, *arguments: object) -> str:
    """The line that starts another command in the way that this one was started."""
    start = ["awp", name] if prog.startswith("awp ") else ["python", "-m", "awp_engine", name]
    return shlex.join([*start, *map(str, arguments)])


_FRACTION = "write a fraction without spaces: 8/255"


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        assert isinstance(parser, OneLineParser)
        print(parser.format_help() if given[-1] == "--help-all" else parser.short_help(), end="")
        parser.exit()


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints take one line, and whose --help takes one screen: --help-all has the rest.

    Args:
        common: names (`dest`) of the arguments that --help shows; None: all of them.
        example: arguments of a command line, which --help shows.
        loose: the flag that words without one are likely meant for.
        arguments: of `ArgumentParser`.
    """

    def __init__(
        self, *, common: Sequence[str] | None = None, example: str = "", loose: str = "", **arguments: Any
    ) -> None:
        super().__init__(**arguments, allow_abbrev=False, add_help=False)
        self._common, self._example, self._loose = common, example, loose
        add = functools.partial(self.add_argument, action=_Help, nargs=0, default=argparse.SUPPRESS)
        add("-h", "--help", help="the most used flags" if common else "this text")
        add("--help-all", help="every flag" if common else argparse.SUPPRESS)

    def _hidden(self) -> list[argparse.Action]:
        shown = None if self._common is None else {"help", *self._common}
        known = [action for action in self._actions if action.help != argparse.SUPPRESS]
        hidden = [] if shown is None else [action for action in known if action.dest not in shown]
        return [] if [action.dest for action in hidden] == ["help_all"] else hidden

    def short_help(self) -> str:
        """What --help shows: the common arguments, in few lines."""
        # all of argparse's own take it
        formatter = self.formatter_class(prog=self.prog, max_help_position=30)  # pyright: ignore[reportCallIssue]
        given = [action for action in self._actions if not action.option_strings]
        more = {"+": " ...", "*": " ...", argparse.PARSER: " ..."}
        named = [f"{action.metavar or action.dest}{more.get(str(action.nargs), '')}" for action in given]
        formatter.add_usage(self.usage or " ".join(["%(prog)s", *named, "[flags]"]), [], [])
        formatter.add_text(self.description)
        hidden = self._hidden()
        flags = [action for action in self._actions if action.option_strings and action not in hidden]
        for title, group in (("", given), ("flags", flags)):
            formatter.start_section(title or None)
            formatter.add_arguments(group)
            formatter.end_section()
        if not hidden:
            formatter.add_text(self.epilog)
        # --help-all is one of them
        last = [f"{self.prog} --help-all explains {len(hidden) - 1} more flags."] if hidden else []
        last += [f"example: {self.prog} {self._example}"] if self._example else []
        return "\n".join([formatter.format_help(), *last, ""]) if last else formatter.format_help()

    def error(self, message: str) -> NoReturn:
        """Ends the program as `fail` does."""
        hint = f"{'--help-all' if self._hidden() else '--help'} lists the flags"
        if (given := message.removeprefix("unrecognized arguments: ")) != message:
            flag, shown = given.split()[0], [action for action in self._actions if action.help != argparse.SUPPRESS]
            known = [name for action in shown for name in action.option_strings]
            longer = next((name for name in known if name.startswith(flag)), None)
            if flag == "/":
                hint = _FRACTION
            elif self._loose and not flag.startswith("-"):
                hint = f"did you mean {self._loose} {given}?"
            else:
                hint = f"did you mean {longer}?" if longer else did_you_mean(flag, known, hint)
        elif message.endswith("?"):
            fail(message, prog=self.prog, once=True)
        fail(f"{message}; {hint}", prog=self.prog, once=True)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = nearest(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, error.message + (near and f"; {near}")) from None


def _off(name: str) -> str:
    """The switch that turns a flag off: `--data.no-flip`."""
    head, dot, last = name[2:].rpartition(".")
    return f"--{head}{dot}no-{last}"


def _unexpected(argument: str) -> ConfigError:
    return ConfigError(f"{show(argument)}: unexpected argument; expected a flag (a preset goes first)")


# what users of other programs type -> what it is called here
_ELSEWHERE = {
    **dict.fromkeys(("--batch", "--batch-size", "--bs"), "did you mean --global-batch-size?"),
    **dict.fromkeys(("--data", "--dataset"), "did you mean --data.name?"),
    **dict.fromkeys(("--data-dir", "--data-path"), "did you mean --data.root?"),
    **dict.fromkeys(("--arch", "--model"), "did you mean --model.name?"),
    **dict.fromkeys(("--out", "--output", "--output-dir", "--save-dir"), "did you mean --run-dir?"),
    **dict.fromkeys(("--eps",), "did you mean --attack.epsilon?"),
    **dict.fromkeys(("--learning-rate",), "did you mean --optimizer.lr?"),
    **dict.fromkeys(("--awp-gamma", "--awp"), "did you mean --awp.gamma?"),
    "--no-awp": "did you mean --awp.gamma 0?",
    "--resume": "leave it out: the same command, with the same --run-dir, goes on with a run",
}


def _read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Key -> value of every flag, `--config` among them; of a flag that is given twice the last value.

    Raises:
        ConfigError: naming the flag.
    """
    types = {**key_types(), "config": Path}
    on = {flag(key): key for key in types} | {"--limit": "evaluation.test_limit"}
    off = {_off(name): key for name, key in on.items() if is_switch(types[key])}
    words: list[tuple[str, list[str]]] = []
    spelt: dict[str, str] = {}
    for token in argv:
        if token.startswith("--"):
            written, equals, value = token.partition("=")
            name = written.replace("_", "-")
            # a script may set a flag anew, but nobody writes it in two ways on purpose
            if (before := spelt.setdefault(name, written)) != written:
                raise ConfigError(f"{written}: the same flag as {before}; expected one of them")
            words.append((name, [value] if equals else []))
        elif words:
            words[-1][1].append(token)
        else:
            raise _unexpected(token)
    given: dict[str, Any] = {}
    for name, values in words:
        key = on.get(name) or off.get(name)
        if key is None:
            hint = _ELSEWHERE.get(name) or did_you_mean(name, [*on, *off], "--help-all lists the flags")
            raise ConfigError(f"{name}: unknown flag; {hint}")
        is_list = typing.get_origin(types[key]) is tuple
        if values and (types[key] is bool or name in off):
            raise ConfigError(f"{name}: takes no value, got {show(values[0])}; the flag with no- turns it off")
        if len(values) > 1 and not is_list:
            raise ConfigError(f"{name}: {_FRACTION}") if values[1] == "/" else _unexpected(values[1])
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


_DOES = "Trains an image classifier to withstand adversarial examples."
# the flags that --help shows, in fewer words than the settings have
_COMMON = {
    "data.name": ("NAME", "data set: digits, cifar10, folder, ..."),
    "data.root": ("DIR", "directory that holds it; the digits need none"),
    "model.name": ("NAME", "or timm:NAME, net.py:make"),
    "run_dir": ("DIR", "for results; a run there goes on"),
    "epochs": ("N", "passes over the training images"),
    "global_batch_size": ("N", "images a step, over all GPUs"),
    "optimizer.lr": ("X", "learning rate"),
    "method": ("NAME", "loss: at, trades, mart, ...; docs/methods.md"),
    "awp.gamma": ("X", "size of weight perturbation; 0 turns it off"),
    "attack.norm": ("NAME", "norm of the attack: linf, l2 or l1"),
    "attack.epsilon": ("X", "radius of the attack, exact: 8/255 or 0.2"),
    "attack.step_size": ("X", "length of its steps, exact"),
    "attack.steps": ("N", "steps of the attack"),
    "device": ("NAME", "auto, cpu, cuda, ..."),
    "seed": ("N", "of weights, order and noise"),
    "log": ("NAME ...", "also wandb, mlflow, trackio; or none"),
}


def _usage(prog: str) -> str:
    return f"{prog} [PRESET] [--config FILE] [flags]"


def _short_help(default: Config, prog: str) -> str:
    """One screen: what it does, and the flags that most people use."""
    values = to_flat(default) | {"run_dir": "runs/PRESET-seed0", "log": default.log}
    rows = [(f"{flag(key)} {name}", f"{text} ({_shown(values[key])})") for key, (name, text) in _COMMON.items()]
    rows += [
        ("--config FILE", "settings from .yaml or .json, say a run's config.json"),
        ("--presets, --help-all", f"list the presets; explain all {len(key_types())} flags"),
    ]
    lines = [f"  {name:<22}  {text}" for name, text in rows]
    preset = f"PRESET sets everything as in a paper; none means {DEFAULT}. Flags go on top of it."
    example = f"example: {prog} cifar10-preact-resnet18-at-awp --data.root DIR"
    return "\n".join([f"usage: {_usage(prog)}", "", _DOES, preset, "", *lines, example, ""])


def _preset_list() -> str:
    """Every preset and a line about it."""
    width = max(map(len, PRESETS))
    return "".join(f"{name:<{width}}  {summary}\n" for name, summary in PRESETS.items())


def _help(default: Config, prog: str) -> str:
    """Every flag, with what it means, its range and its default."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=_usage(prog),
        description=f"{_DOES} `{prog} --presets` lists the presets; none means {DEFAULT}.",
    )
    text = "Settings from a .yaml file, or a .json file such as a run's config.json; the preset has the others."
    parser.add_argument("--config", metavar="FILE", help=f"{text} Flags go on top.")
    parser.add_argument("--limit", metavar="INT", help="Short for --evaluation.test-limit.")
    parser.add_argument("--presets", action="store_true", help="List the presets.")
    parser.add_argument("--help-all", action="store_true", help="This text; --help has the most used flags.")
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
                several = ... in parts
                parts = typing.get_args(parts[0]) or parts if several else parts
                choices = "{" + ",".join(map(str, parts)) + "}"
                add(key, metavar=names.get(parts[0], choices) + " ..." * several, help=shown)
    return parser.format_help()


def _parse(argv: Sequence[str], prog: str) -> Config:
    rest = list(argv)
    first = rest.pop(0) if rest and not rest[0].startswith("-") else None
    told: dict[str, Callable[[Config, str], str]] = {
        "-h": _short_help,
        "--help": _short_help,
        "--help-all": _help,
        "--presets": lambda *_: _preset_list(),
    }
    if (asked_for := next((token for token in rest if token in told), None)) is not None:
        if _rank() in (None, "0"):
            print(told[asked_for](build_preset(DEFAULT if first is None else first), prog), end="")
        raise SystemExit(0)
    given = _read_flags(rest)
    file = given.pop("config", None)
    in_file = {} if file is None else load_settings(file)
    own = in_file.get("data.name", "")
    objects = {"data.name": is_given(own), "model.name": source_of(in_file.get("model.name", "")) == "object"}
    if key := next((key for key, is_object in objects.items() if is_object and key not in given), None):
        raise ConfigError(f"{file}: {key} is an object of Python, which awp_engine.fit takes; give {flag(key)}")
    if is_own(own) and "data.name" not in given:
        raise ConfigError(
            f"{file}: data.name is {own}, Python code that is not run because a file names it: if you trust it, give "
            f"--data.name {own}"
        )
    preset = given.get("preset", first)
    for name, where in ((first, "the first argument"), (in_file.get("preset"), file)):
        if None not in (name, preset) and name != preset:
            raise ConfigError(f"--preset: expected {name!r} as in {where}, got {preset!r}; give one of them")
    given |= {} if preset is None else {"preset": preset}
    asked = in_file | given
    for key in ("model.name", "method", "optimizer.kind"):
        name = str(in_file.get(key))
        is_own_code = optimizer_source(name) == "code" if key == "optimizer.kind" else is_code(name)
        if is_own_code and key not in given:
            raise ConfigError(
                f"{flag(key)}: {file} asks for code of its own, {show(in_file[key])}, which is not run because a file "
                "says so; if you trust it, give the name as a flag as well"
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

"""How one setting is checked: its type, its range, and the words for what is wrong with it. Imports no torch."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import operator
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from awp_engine.config.errors import UserError

_DECIMAL = r"(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,2})?"
_AMOUNT = re.compile(rf"{_DECIMAL}|[0-9]{{1,20}}/[0-9]{{1,20}}")
# what fp32 holds, and room for a factor
_FLOAT_LIMIT = 1e30


class ConfigError(UserError, ValueError):
    """A setting that cannot be used; the message is one line that names it as its flag."""


class Word(str):
    """Text whose type its setting gives: an argument of the command line, or an unquoted word of a YAML file."""

    __slots__ = ()


def parse_amount(text: str) -> Fraction:
    """The exact value of a fraction of whole numbers ("8/255") or a decimal ("0.2", "1e-3").

    Raises:
        ValueError: for anything else, a zero denominator and negative numbers included.
    """
    if not _AMOUNT.fullmatch(text):
        raise ValueError(f"not a fraction or number >= 0: {text!r}")
    _, _, denominator = text.partition("/")
    if denominator and int(denominator) == 0:
        raise ValueError(f"zero denominator: {text!r}")
    return Fraction(text)


def parse_value(text: str) -> Any:
    """The value of an argument given as text: a number, also 2/255, or (0.9, 0.99), true, none; else the text."""
    # as other settings have them; as text, false and none would count as true
    constants = {"true": True, "false": False, "none": None}
    if text in constants:
        return constants[text]
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    with contextlib.suppress(ValueError):
        return float(parse_amount(text))
    return text


def parse_arguments(words: Iterable[str]) -> dict[str, Any] | None:
    """Words NAME=VALUE by name, as Python's values; None where they are anything else, or a name comes twice."""
    pairs = [word.partition("=") for word in words]
    if len({name for name, _, _ in pairs}) < len(pairs) or not all(n.isidentifier() and text for n, _, text in pairs):
        return None
    return {name: parse_value(text) for name, _, text in pairs}


class Amounts:
    """The text that `parse_amount` takes."""

    words = "a fraction or number >= 0 such as 8/255"

    def __contains__(self, text: str) -> bool:
        try:
            return parse_amount(text) >= 0
        except ValueError:
            return False


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting takes, in the words of an error message and as bounds."""

    words: str
    _: dataclasses.KW_ONLY
    gt: float = -math.inf
    ge: float = -math.inf
    lt: float = math.inf
    le: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.gt < number < self.lt and self.ge <= number <= self.le


Amount = Annotated[str, Amounts()]
OptionalAmount = Annotated[str | None, Amounts()]
Count = Annotated[int, Range("a whole number >= 1", ge=1)]
OptionalCount = Annotated[int | None, Range("a whole number >= 1, or none", ge=1)]
Probability = Annotated[float, Range("a probability, 0 to 1", ge=0, le=1)]
# of a whole: all of it, only a part, or as little as nothing
Share = Annotated[float, Range("a number more than 0, at most 1", gt=0, le=1)]
Part = Annotated[float, Range("a number more than 0 and less than 1", gt=0, lt=1)]
Fading = Annotated[float, Range("a number >= 0 and < 1", ge=0, lt=1)]
# a switch that the run may be left to choose
Switch = Literal["auto", True, False]


def flag(key: str) -> str:
    """The flag of a key: `attack.bn_mode` is set by `--attack.bn-mode`."""
    return "--" + key.replace("_", "-")


def show(value: object) -> str:
    """A value as messages quote it, long ones cut."""
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def refusal(key: str, expected: str, value: object, hint: str = "") -> ConfigError:
    """The error of a setting that cannot be `value`; `hint` is a question, and comes first."""
    return ConfigError(f"{flag(key)}: {hint and hint + ' '}expected {expected}, got {show(value)}")


def did_you_mean(given: str, known: Iterable[str], otherwise: str) -> str:
    """The names in `known` that `given` was meant as: of the same last part, or else the most similar one."""
    import difflib

    known, last = list(known), given.lstrip("-").rpartition(".")[2]
    near = [name for name in known if name.lstrip("-").rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(given, known, n=1)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def nearest(given: str, known: Iterable[str]) -> str:
    """As `did_you_mean`, of a few short words: also in other letters, and two where both are near; or nothing."""
    import difflib

    known, low = list(known), given.lower()
    near = [low] if low in known else difflib.get_close_matches(low, known, n=2)
    return f"did you mean {' or '.join(near)}?" if near else ""


def expectation(hint: Any) -> str:
    """A type in the words of an error message."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(part).lower() for part in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join("none" if part is type(None) else expectation(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if inner is str:
            return "a list of names or patterns"
        return "a list of finite numbers" if inner is float else expectation(inner).replace("one", "some", 1)
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", Path: "a path"}
    return words.get(hint, "a group of settings")


def is_switch(hint: Any) -> bool:
    """Whether a setting of this type can be true or false, which flags say without a value."""
    return hint is bool or hint == Switch


def _of_word(kind: Any, word: str) -> Any:
    if is_switch(kind):
        return {"true": True, "false": False}.get(word.lower(), word)
    try:
        return kind(word) if kind in (int, float) else word
    except ValueError:
        return word


def _names_a_file(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def coerce(hint: Any, value: Any, key: str, expected: str | None = None) -> Any:
    """`value` as the type `hint` says, where that loses nothing (an int is a float, a list is a tuple).

    Args:
        hint: the type of a field of the settings.
        value: of any type; a `Word` is read as the type's text.
        key: the setting's name.
        expected: the words for the type; None takes `expectation`'s.

    Raises:
        ConfigError: naming the key.
    """
    origin, parts, expected = typing.get_origin(hint), typing.get_args(hint), expected or expectation(hint)
    if isinstance(hint, types.UnionType):
        if value is None or (isinstance(value, Word) and value.lower() == "none"):
            return None
        return coerce(next(part for part in parts if part is not type(None)), value, key, expected)
    if isinstance(value, Word):
        value = _of_word(hint, str(value))
    if origin is Literal:
        # 1 is equal to True
        accepted = isinstance(value, str | bool) and value in parts
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(coerce(parts[0], item, key, expected) for item in value)
        accepted = False
    elif hint is float:
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _FLOAT_LIMIT:
            value = float(value)
        accepted = isinstance(value, float) and math.isfinite(value)
        if accepted and abs(value) > _FLOAT_LIMIT:
            raise refusal(key, f"a number of at most {_FLOAT_LIMIT:g}", value)
    elif hint is int:
        accepted = isinstance(value, int) and not isinstance(value, bool)
        power = 63 if key == "seed" else 31
        if accepted and abs(value) >= 2**power:
            raise refusal(key, f"a whole number below 2^{power}", value)
    elif hint is Path:
        if isinstance(value, str) and value:
            value = Path(value)
        accepted = isinstance(value, Path) and _names_a_file(str(value))
    else:
        accepted = isinstance(value, hint)
        if hint is str and isinstance(value, (int, float)):
            # of Python: a float is rarely the fraction that is meant
            expected = f'{expected} in quotes, such as "8/255" or "0.1"'
    if not accepted:
        meant = nearest(value, (part for part in parts if isinstance(part, str))) if isinstance(value, str) else ""
        raise refusal(key, expected, value, meant if origin is Literal else "")
    return value


@functools.cache
def fields(cls: type) -> dict[str, tuple[Any, Range | Amounts | None]]:
    """The type of every field, and what it accepts of that type where that is not all."""
    found = typing.get_type_hints(cls, include_extras=True)
    given = {field.name: found[field.name] for field in dataclasses.fields(cls)}
    parts = {name: typing.get_args(hint) for name, hint in given.items() if typing.get_origin(hint) is Annotated}
    return {name: parts.get(name, (hint, None)) for name, hint in given.items()}


def help_texts(cls: type) -> dict[str, str]:
    """The string under every field."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """Checks every field's type and range, then what the class itself demands; refuses by a `ConfigError`."""

    section: ClassVar[str]

    def __init_subclass__(cls, section: str = "") -> None:
        cls.section = section

    def __post_init__(self) -> None:
        for name, (hint, accepted) in fields(type(self)).items():
            value = coerce(hint, getattr(self, name), self.section + name)
            object.__setattr__(self, name, value)
            if accepted is not None:
                self.require(value is None or value in accepted, name, accepted.words)
        self._check()

    def _check(self) -> None:
        pass

    def require(self, condition: bool, name: str, expected: str, hint: str = "") -> None:
        """Refuse the setting `name`, which may be one of an inner group ("data.cutmix"), unless `condition` holds."""
        if not condition:
            raise refusal(self.section + name, expected, operator.attrgetter(name)(self), hint)

    def require_value(self, name: str, value: object, reason: str) -> None:
        """Refuse the setting `name` if it is anything but `value`, for a reason such as "with --method mart"."""
        words = str(value).lower() if isinstance(value, bool) else str(value)
        self.require(operator.attrgetter(name)(self) == value, name, f"{words} {reason}")

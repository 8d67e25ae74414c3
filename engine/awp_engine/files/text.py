"""Text that came from elsewhere, fit to be shown, and JSON that every reader takes."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def printable(text: str) -> str:
    r"""With escapes for what is not printable: line breaks, terminal codes, bytes of a name that are not UTF-8.

    >>> print(printable("a\nb\x1b[31m"))
    a\nb\x1b[31m
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """`text` without line breaks or control characters."""
    return printable(" ".join(text.split()))


def reason(error: object) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return one_line(str(error)) or type(error).__name__


def first_line(error: object) -> str:
    """Of what an exception says; its type where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def shortened(text: str, most: int) -> str:
    """At most `most` characters: of a longer text the beginning and the end.

    >>> shortened("0123456789", 5)
    '01…89'
    """
    end = (most - 1) // 2
    return text if len(text) <= most else f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def path_end(path: str, most: int) -> str:
    """At most `most` characters, if that is possible: of a longer path the last parts, whole ones.

    >>> path_end("/home/me/nets/wide.py:make", 20)
    '…/nets/wide.py:make'
    >>> path_end("/home/me/nets/wide.py:make", 5)
    '…/wide.py:make'
    """
    while len(path) > most and "/" in path.removeprefix("…/"):
        path = "…/" + path.removeprefix("…/").partition("/")[2]
    return path


def duration(seconds: float) -> str:
    """75 -> 1:15, 4000 -> 1:06:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON of numbers, text, paths, lists and mappings; NaN and infinity, which JSON (RFC 8259) lacks, become null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

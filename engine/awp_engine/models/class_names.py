"""Names of classes: what tells two lists of them apart, and how weights hold them."""

import json
from collections.abc import Sequence

from awp_engine.files.text import printable, shortened

_SHOWN = 3


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(repr(shortened(printable(name), 40)) for name in names[:_SHOWN]) + rest


def difference(names: Sequence[str], others: Sequence[str]) -> str:
    """In what the first classes differ from the second ones, in a few words; empty where they do not.

    >>> difference(("dog", "wolf"), ("cat", "dog"))
    "'wolf' where the other has 'cat'"
    """
    if tuple(names) == tuple(others):
        return ""
    here, there = set(names), set(others)
    more, less = [n for n in names if n not in there], [n for n in others if n not in here]
    if more and less:
        return f"{_listed(more)} where the other has {_listed(less)}"
    if more or less:
        return f"{_listed(more)} more" if more else f"it lacks {_listed(less)}"
    at = next((at for at, (name, other) in enumerate(zip(names, others, strict=False)) if name != other), 0)
    return f"the same names in another order: class {at} is {_listed([names[at]])}, not {_listed([others[at]])}"


def to_json(class_names: Sequence[str]) -> str:
    """As a safetensors header holds them: ASCII, whatever the names are."""
    return json.dumps(list(class_names))


def from_json(text: str, num_classes: int) -> tuple[str, ...]:
    """What `to_json` wrote.

    Raises:
        ValueError: it is no list of so many different names.
    """
    names = json.loads(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("not a list of names")
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise ValueError(f"{len(names)} names for {num_classes} classes")
    return tuple(names)

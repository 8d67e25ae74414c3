"""Parameters of a model by patterns of their names."""

import fnmatch
from collections.abc import Sequence

from torch import nn

from awp_engine.config import ConfigError
from awp_engine.models.layers import AUXILIARY

_SHOWN = 3


def public_name(name: str) -> str:
    """A parameter's name as the wrapped network itself has it."""
    return name.removeprefix("network.")


def _spoken(name: str) -> tuple[str, ...]:
    """How a pattern may have a name: a second set of batch normalisation goes by its layer's, too."""
    return name, public_name(name), name.replace(f".{AUXILIARY}", "")


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def chosen(model: nn.Module, patterns: Sequence[str], flag: str) -> set[str]:
    """The names of the trainable parameters that one of the patterns matches.

    Raises:
        ConfigError: a pattern that matches none, naming the flag that gave it.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if any(fnmatch.fnmatchcase(n, pattern) for n in _spoken(name))}
        if not matched:
            known = listed([public_name(name) for name in names])
            raise ConfigError(f"{flag}: no trainable parameter matches {pattern!r}; there are {known}")
        found |= matched
    return found

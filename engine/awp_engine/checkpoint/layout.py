"""What files and checkpoints are called, and in which order they were made."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

FORMAT = 1
LATEST = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_NUMBER = r"(0|[1-9][0-9]{0,17})"
_POSITION = re.compile(rf"epoch-{_NUMBER}(?:\.step-{_NUMBER})?(?:\.{_NUMBER})?")


class Position(NamedTuple):
    """How far a checkpoint is, by its name."""

    epoch: int
    """Whole epochs."""
    step: int
    """Steps of the epoch after them."""
    repeat: int
    """0, or which one of those that wanted the same name."""


def checkpoint_name(epoch: int, step: int = 0) -> str:
    """`epoch-12` after 12 whole epochs, `epoch-12.step-40` after 40 more steps."""
    return f"epoch-{epoch}.step-{step}" if step else f"epoch-{epoch}"


def position(name: str) -> Position | None:
    """What `checkpoint_name` made a name of (with `.1` if it was taken), or None for other names."""
    found = _POSITION.fullmatch(name)
    return Position(*(int(part or 0) for part in found.groups())) if found else None


def _order(name: str) -> tuple[int, tuple[str | int, ...]]:
    place = position(name)
    if place is not None:
        return 1, place
    # Other names, by the numbers in them: a-9 before a-10.
    return 0, tuple(int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name))


def names(directory: Path) -> list[str]:
    """The checkpoints in `directory`, sound or not, oldest first by their names; links are none."""
    with os.scandir(directory) as entries:
        found = [e.name for e in entries if NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    return sorted(found, key=_order)

"""Writing checkpoints, and removing those that newer ones replace."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from awp_engine.checkpoint.files import CheckpointError, canonical, describe
from awp_engine.checkpoint.layout import FORMAT, GROUP, LATEST, MANIFEST, NAME, STATE, Position, names, position
from awp_engine.checkpoint.model_file import packable
from awp_engine.checkpoint.read import damage, verify
from awp_engine.files.atomic import (
    remove_leftovers,
    replace_file,
    require_space,
    sync_directory,
    temporary_beside,
    write_file,
)

Groups = Mapping[str, Mapping[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a newer one was written and verified; the others of their kind go.

    Raises:
        ValueError: for numbers less than 1, and for a `best` that is no checkpoint's name.
    """

    last: int = 2
    """The newest sound ones, the one just written included."""
    every_epochs: int | None = None
    """All after a multiple of this many whole epochs."""
    best: str | None = None
    """The one of this name, as `save` or `Writer.wait` returned it."""

    def __post_init__(self) -> None:
        for name in ("last", "every_epochs"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1) and not (value is None and name == "every_epochs"):
                raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
        if self.best is not None and not NAME.fullmatch(self.best):
            raise ValueError(f"best: expected a checkpoint's name, got {self.best!r}")

    def keeps(self, name: str, place: Position) -> bool:
        """Whether a checkpoint stays however old it is."""
        whole = place.step == 0 and self.every_epochs is not None and place.epoch % self.every_epochs == 0
        return whole or name == self.best


def state_bytes(name: str, tensors: Groups, state: Mapping[str, Any], retention: Retention) -> bytes:
    """`state` as JSON, after a look at every argument of `save`: a `ValueError` names what cannot be used."""
    if not NAME.fullmatch(name) or name == LATEST:
        raise ValueError(f"name: expected letters, digits, '.', '_' and '-', and not {LATEST!r}, got {name!r}")
    for group, members in tensors.items():
        if not GROUP.fullmatch(group):
            raise ValueError(f"tensors: expected group names of letters, digits, '_' and '-', got {group!r}")
        for key, tensor in members.items():
            if hasattr(tensor, "full_tensor"):
                raise ValueError(f"tensors: expected whole tensors, got a sharded one; gather {group} {key!r} first")
    if not isinstance(retention, Retention):
        raise ValueError(f"retention: expected a Retention, got {retention!r}")
    try:
        return json.dumps(dict(state), indent=1, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"state: expected what JSON holds: {error}") from error


def _remove(path: Path) -> None:
    # Renamed first: a kill halfway must not leave half a checkpoint under a checkpoint's name.
    doomed = temporary_beside(path)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _prune(directory: Path, saved: str, retention: Retention) -> None:
    newest = position(saved)
    # Only names of this kind: anything else in the directory is the user's.
    places = {name: place for name in names(directory) if (place := position(name)) is not None}
    sound = 1
    for name in sorted(places, key=lambda name: places[name], reverse=True):
        if newest is None or places[name] >= newest:
            continue
        if sound < retention.last:
            # A damaged one replaces nothing.
            sound += not damage(directory / name)
        elif not retention.keeps(name, places[name]):
            _remove(directory / name)


def _write_all(temporary: Path, tensors: Groups, state: bytes) -> None:
    listed = {}

    def add(name: str, payload: bytes) -> None:
        listed[name] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
        try:
            write_file(temporary / name, payload)
        except OSError as error:
            raise CheckpointError(describe(error, temporary / name, len(payload))) from error

    # One group at a time is held in memory as bytes.
    for group, members in tensors.items():
        add(f"{group}.safetensors", safetensors.torch.save(packable(members)))
    add(STATE, state)
    write_file(temporary / MANIFEST, canonical({"format": FORMAT, "files": listed}))
    sync_directory(temporary)


def write(directory: Path, name: str, tensors: Groups, state: bytes, retention: Retention) -> Path:
    """`save`, once its arguments were checked."""
    # rounded up: headers and the manifest take a few hundred bytes a tensor and a file
    size = sum(t.numel() * t.element_size() + 256 for group in tensors.values() for t in group.values())
    size += len(state) + 4096 * (len(tensors) + 2)
    target = directory / name
    temporary = temporary_beside(target)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
        require_space(directory, size)
        temporary.mkdir()
        _write_all(temporary, tensors, state)
        repeat = 0
        while os.path.lexists(target):
            repeat += 1
            target = directory / f"{name}.{repeat}"
        temporary.rename(target)
        sync_directory(directory)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(describe(error, target, size)) from error
        raise
    try:
        verify(target)
        replace_file(directory / LATEST, target.name.encode() + b"\n")
    except OSError as error:
        raise CheckpointError(describe(error, directory / LATEST, len(target.name) + 1)) from error
    try:
        _prune(directory, target.name, retention)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or directory}: {target.name} is written, but an older checkpoint cannot be removed: "
            f"{error.strerror}"
        ) from error
    return target


def save(directory: Path, name: str, tensors: Groups, state: Mapping[str, Any], retention: Retention) -> Path:
    """Writes `directory/name`, makes it the latest, and removes what it replaces; `Writer` does so in the background.

    Modes follow the umask. Tensors are stored contiguous: one in channels_last comes back with its values and
    contiguous strides. Where `name` is taken (a run that goes on from an older checkpoint), `name.1` is written, and so
    on: no checkpoint is ever overwritten. Only one process may save into a directory at a time.

    Args:
        directory: made if it is missing.
        name: of `checkpoint_name`: "epoch-12", "epoch-12.step-40". Others are written too, but never removed.
        tensors: group ("model", "optimizer") -> name -> whole tensor; one safetensors file a group.
        state: what JSON holds: step, epoch, configuration hash.
        retention: which older ones stay; the others go after this one was read back and verified.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: if it could not be written (path and bytes are named); the earlier checkpoints are untouched.
        ValueError: for a name, group, state or retention that cannot be used.
    """
    return write(directory, name, tensors, state_bytes(name, tensors, state, retention), retention)

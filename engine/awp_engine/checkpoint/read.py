"""Reading checkpoints, by the manifest alone; what cannot be read or is damaged is refused by a `CheckpointError`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from awp_engine.checkpoint.files import CheckpointError, canonical, open_regular, read_file
from awp_engine.checkpoint.layout import FORMAT, GROUP, LATEST, MANIFEST, STATE, names
from awp_engine.checkpoint.model_file import unpack

_MANIFEST_LIMIT = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `save` was given, read back and verified."""

    tensors: dict[str, dict[str, torch.Tensor]]
    """Group -> name -> contiguous CPU tensor."""
    state: dict[str, Any]
    path: Path
    skipped: tuple[str, ...] = ()
    """One line for each newer checkpoint that was refused, with the reason."""


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files, every entry checked."""
    manifest_path = path / MANIFEST
    raw = read_file(manifest_path, limit=_MANIFEST_LIMIT)
    try:
        manifest = json.loads(raw)
        # The one spelling that `save` writes: no doubled keys, no other numbers, no flipped blank.
        written_here = canonical(manifest) == raw
    except (ValueError, RecursionError):
        manifest, written_here = None, False
    if not written_here or not isinstance(manifest, dict) or manifest.keys() != {"format", "files"}:
        raise CheckpointError(f"{manifest_path}: damaged, or not a manifest")
    if type(manifest["format"]) is not int or manifest["format"] != FORMAT:
        raise CheckpointError(f"{manifest_path}: has format {str(manifest['format'])[:20]!r}, expected {FORMAT}")
    files = manifest["files"]
    if not isinstance(files, dict) or STATE not in files:
        raise CheckpointError(f"{manifest_path}: lists no {STATE}")
    for name, entry in files.items():
        group, dot, ending = name.rpartition(".")
        if name != STATE and not (dot and ending == "safetensors" and GROUP.fullmatch(group)):
            raise CheckpointError(f"{manifest_path}: lists a file that no checkpoint has: {name[:100]!r}")
        known = isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"} and isinstance(entry["sha256"], str)
        if not known or type(entry["bytes"]) is not int or not 0 <= entry["bytes"] < 2**63:
            raise CheckpointError(f"{manifest_path}: damaged entry for {name}")
    return files


def _require_digest(path: Path, found: str, entry: dict[str, Any]) -> None:
    if found != entry["sha256"]:
        raise CheckpointError(f"{path}: SHA-256 differs from the manifest's: the file is damaged")


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    with open_regular(path, size=entry["bytes"]) as file:
        _require_digest(path, hashlib.file_digest(file, "sha256").hexdigest(), entry)


def damage(path: Path) -> list[str]:
    """What is wrong with a checkpoint, a line for each file; empty if every file is what the manifest says."""
    try:
        files = _manifest(path)
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, entry in files.items():
        try:
            _check_file(path / name, entry)
        except CheckpointError as error:
            found.append(str(error))
    return found


def verify(path: Path) -> None:
    """Raises `CheckpointError` for the first damaged file."""
    for name, entry in _manifest(path).items():
        _check_file(path / name, entry)


def load(path: Path) -> Checkpoint:
    """Reads one checkpoint, whole.

    Raises:
        CheckpointError: naming the file that is missing, or is not what the manifest says.
    """
    tensors, state = {}, None
    for name, entry in _manifest(path).items():
        # the very bytes that are compared are used
        payload = read_file(path / name, size=entry["bytes"])
        _require_digest(path / name, hashlib.sha256(payload).hexdigest(), entry)
        if name != STATE:
            tensors[name.removesuffix(".safetensors")] = unpack(payload, path / name)
            continue
        try:
            state = json.loads(payload)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path / name}: not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE}: expected an object of settings")
    return Checkpoint(tensors=tensors, state=state, path=path)


def latest_name(directory: Path) -> str:
    """What `latest` says."""
    return read_file(directory / LATEST, limit=1000).decode(errors="replace").removesuffix("\n")


def load_latest(directory: Path) -> Checkpoint | None:
    """Reads the checkpoint that `latest` names or, where that is damaged, the newest sound one.

    Returns:
        The checkpoint, whose `skipped` says which others were refused and why; None where there is no checkpoint.

    Raises:
        CheckpointError: if there are checkpoints and none is sound: starting over must be the user's choice.
    """
    try:
        found = names(directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}") from error
    if not found:
        return None
    skipped: list[str] = []
    order = found[::-1]
    try:
        latest = latest_name(directory)
        if latest in found:
            order = [latest, *(name for name in order if name != latest)]
        else:
            skipped.append(f"{directory / LATEST}: names {latest[:100]!r}, which is not there")
    except CheckpointError as error:
        skipped.append(str(error))
    for name in order:
        try:
            return dataclasses.replace(load(directory / name), skipped=tuple(skipped))
        except CheckpointError as error:
            skipped.append(str(error))
    raise CheckpointError(f"{directory}: no sound checkpoint ({'; '.join(skipped)}); remove it to start over")

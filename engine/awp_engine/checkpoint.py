"""Checkpoints that are whole or refused: directories of safetensors and JSON under a manifest of sizes and SHA-256.

A checkpoint is written beside its place, synced, and renamed into it, so that a kill or a full disk at any moment
leaves the one before. Nothing is unpickled, and nothing outside the checkpoint's directory is read.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

FORMAT = 1
_LATEST = "latest"
_MANIFEST = "manifest.json"
_STATE = "state.json"
_TEMPORARY = ".tmp-"
_CONTENT_HASH = "content_sha256"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_MANIFEST_LIMIT = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or is not what was written; the message is one line with the path."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `save` was given, read back and verified."""

    tensors: dict[str, dict[str, torch.Tensor]]
    """Group -> name -> contiguous CPU tensor."""
    state: dict[str, Any]
    path: Path
    skipped: tuple[str, ...] = ()
    """One line for each newer checkpoint that was refused, with the reason."""


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no sync of directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _write_file(path: Path, payload: bytes) -> None:
    with path.open("xb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _read_file(path: Path, size: int | None = None, limit: int | None = None) -> bytes:
    """The bytes of a regular file, of just `size` bytes if that is given; links are not followed."""
    try:
        # O_NONBLOCK: a named pipe must not hang the reader.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = "is a link" if error.errno == errno.ELOOP else error.strerror
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: is not a regular file")
        if size is not None and found.st_size != size:
            raise CheckpointError(f"{path}: has {found.st_size} bytes, expected {size}")
        if limit is not None and found.st_size > limit:
            raise CheckpointError(f"{path}: has {found.st_size} bytes, expected at most {limit}")
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(handle)


def _replace_file(path: Path, payload: bytes) -> None:
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        _write_file(temporary, payload)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file so that a reader, or a crash, sees the old one or the new one, whole.

    Raises:
        OSError: if it cannot be written; the old file is untouched.
    """
    _replace_file(path, text.encode())


def _canonical(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _packable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CPU copies that safetensors takes: contiguous (channels_last keeps its values, not strides), no shared memory."""
    seen: set[int] = set()
    packable = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        # A view of a larger storage, or a tied weight, is cloned.
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        packable[name] = plain
    return packable


def _unpack(payload: bytes, path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(payload)
    except Exception as error:
        # Whatever a hostile header provokes in the parser, the file is refused.
        raise CheckpointError(f"{path}: not a safetensors file: {' '.join(str(error).split())}") from error


def _age(name: str) -> list[str | int]:
    """Sorts names by the numbers in them: epoch-9 before epoch-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def _names(directory: Path) -> list[str]:
    """The checkpoints in `directory`, oldest first."""
    with os.scandir(directory) as entries:
        names = [e.name for e in entries if _NAME.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    return sorted(names, key=_age)


def _remove(path: Path) -> None:
    # Renamed first: a kill halfway must not leave half a checkpoint under a checkpoint's name.
    doomed = path.with_name(f"{_TEMPORARY}old-{path.name}-{uuid.uuid4().hex[:8]}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _prune(directory: Path, name: str, saved: str, keep: int) -> None:
    for entry in directory.glob(_TEMPORARY + "*"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    # Only names made like this one: anything else in the directory is the user's.
    alike = re.compile(re.escape(name.rstrip("0123456789")) + r"[0-9]+(?:\.[0-9]+)?")
    older = [other for other in _names(directory) if alike.fullmatch(other) and _age(other) < _age(saved)]
    for other in older[: max(0, len(older) - (keep - 1))]:
        _remove(directory / other)


def _describe(error: OSError, path: Path, size: int) -> str:
    directory = next((parent for parent in path.parents if parent.is_dir()), Path("/"))
    free = shutil.disk_usage(directory).free
    reason = error.strerror or str(error)
    return f"{path}: writing {size} bytes failed: {reason} ({free} bytes free); earlier checkpoints are untouched"


def _write_all(temporary: Path, files: Iterable[tuple[str, Callable[[], bytes]]]) -> None:
    listed = {}
    for name, make in files:
        payload = make()
        listed[name] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
        try:
            _write_file(temporary / name, payload)
        except OSError as error:
            raise CheckpointError(_describe(error, temporary / name, len(payload))) from error
    _write_file(temporary / _MANIFEST, _canonical({"format": FORMAT, "files": listed}))
    _sync_directory(temporary)


def save(
    directory: Path,
    name: str,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes `directory/name`, makes it the latest, and removes what it replaces.

    Modes follow the umask. Tensors are stored contiguous: one in channels_last comes back with its values and
    contiguous strides. Where `name` is taken (a run that goes on from an older checkpoint), `name.1` is written, and so
    on: no checkpoint is ever overwritten. Only one process may save into a directory at a time.

    Args:
        directory: made if it is missing.
        name: such as "epoch-12"; names sort by the numbers in them, and a later one must sort later.
        tensors: group ("model", "optimizer") -> name -> tensor; one safetensors file a group.
        state: what JSON holds: step, epoch, configuration hash.
        keep: how many "epoch-N" stay, this one included. Older ones go after this one was read back and verified.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: if it could not be written (path and bytes are named); the earlier checkpoints are untouched.
        ValueError: for a name, group, state or `keep` that cannot be used.
    """
    if not _NAME.fullmatch(name) or name == _LATEST:
        raise ValueError(f"name: expected letters, digits, '.', '_' and '-', and not {_LATEST!r}, got {name!r}")
    for group in tensors:
        if not _GROUP.fullmatch(group):
            raise ValueError(f"tensors: expected group names of letters, digits, '_' and '-', got {group!r}")
    if keep < 1:
        raise ValueError(f"keep: expected at least 1, got {keep}")
    try:
        state_bytes = json.dumps(dict(state), indent=1).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"state: expected what JSON holds: {error}") from error

    def pack(group: str) -> Callable[[], bytes]:
        return lambda: safetensors.torch.save(_packable(tensors[group]))

    # One group at a time is held in memory as bytes.
    files = [(f"{group}.safetensors", pack(group)) for group in tensors] + [(_STATE, lambda: state_bytes)]
    size = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()) + len(state_bytes)
    temporary = directory / f"{_TEMPORARY}{name}-{uuid.uuid4().hex[:8]}"
    target = directory / name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        _write_all(temporary, files)
        repeat = 0
        while os.path.lexists(target):
            repeat += 1
            target = directory / f"{name}.{repeat}"
        temporary.rename(target)
        _sync_directory(directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_describe(error, target, size)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        _verified(target)
        _replace_file(directory / _LATEST, target.name.encode() + b"\n")
        _prune(directory, name, target.name, keep)
    except OSError as error:
        raise CheckpointError(_describe(error, directory / _LATEST, len(target.name) + 1)) from error
    return target


def _manifest(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files, every entry checked."""
    manifest_path = path / _MANIFEST
    raw = _read_file(manifest_path, limit=_MANIFEST_LIMIT)
    try:
        manifest = json.loads(raw)
        # The one spelling that `save` writes: no doubled keys, no other numbers, no flipped blank.
        written_here = _canonical(manifest) == raw
    except (ValueError, RecursionError):
        manifest, written_here = None, False
    if not written_here or not isinstance(manifest, dict) or manifest.keys() != {"format", "files"}:
        raise CheckpointError(f"{manifest_path}: damaged, or not a manifest")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{manifest_path}: has format {str(manifest['format'])[:20]!r}, expected {FORMAT}")
    files = manifest["files"]
    if not isinstance(files, dict) or _STATE not in files:
        raise CheckpointError(f"{manifest_path}: lists no {_STATE}")
    for name, entry in files.items():
        group, dot, ending = name.rpartition(".")
        if name != _STATE and not (dot and ending == "safetensors" and _GROUP.fullmatch(group)):
            raise CheckpointError(f"{manifest_path}: lists a file that no checkpoint has: {name[:100]!r}")
        known = isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"}
        if not known or type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise CheckpointError(f"{manifest_path}: damaged entry for {name}")
    return files


def _verified(path: Path, use: Callable[[str, bytes], None] | None = None) -> None:
    """Compares every file with the manifest, and hands the very bytes that were compared to `use`."""
    for name, entry in _manifest(path).items():
        payload = _read_file(path / name, size=entry["bytes"])
        if hashlib.sha256(payload).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{path / name}: SHA-256 differs from the manifest's: the file is damaged")
        if use is not None:
            use(name, payload)


def load(path: Path) -> Checkpoint:
    """Reads one checkpoint, whole.

    Raises:
        CheckpointError: naming the file that is missing, or is not what the manifest says.
    """
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    states: list[Any] = []

    def use(name: str, payload: bytes) -> None:
        if name != _STATE:
            tensors[name.removesuffix(".safetensors")] = _unpack(payload, path / name)
            return
        try:
            states.append(json.loads(payload))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path / name}: not JSON: {' '.join(str(error).split())}") from error

    _verified(path, use)
    if len(states) != 1 or not isinstance(states[0], dict):
        raise CheckpointError(f"{path / _STATE}: expected an object of settings")
    return Checkpoint(tensors=tensors, state=states[0], path=path)


def load_latest(directory: Path) -> Checkpoint | None:
    """Reads the checkpoint that `latest` names or, where that is damaged, the newest sound one.

    Returns:
        The checkpoint, whose `skipped` says which others were refused and why; None where there is no checkpoint.

    Raises:
        CheckpointError: if there are checkpoints and none is sound: starting over must be the user's choice.
    """
    try:
        names = _names(directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}") from error
    if not names:
        return None
    skipped: list[str] = []
    order = names[::-1]
    try:
        latest = _read_file(directory / _LATEST, limit=1000).decode(errors="replace").removesuffix("\n")
        if latest in names:
            order = [latest, *(name for name in order if name != latest)]
        else:
            skipped.append(f"{directory / _LATEST}: names {latest[:100]!r}, which is not there")
    except CheckpointError as error:
        skipped.append(str(error))
    for name in order:
        try:
            return dataclasses.replace(load(directory / name), skipped=tuple(skipped))
        except CheckpointError as error:
            skipped.append(str(error))
    raise CheckpointError(f"{directory}: no sound checkpoint ({'; '.join(skipped)}); remove it to start over")


def _content_hash(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(_canonical({key: metadata[key] for key in metadata if key != _CONTENT_HASH}))
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def export_model(path: Path, state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes weights as one safetensors file, atomically, with `metadata` and a SHA-256 of it all in the header.

    Raises:
        CheckpointError: if it could not be written; a file that was there before is untouched.
    """
    tensors = _packable(state_dict)
    header = {**metadata, _CONTENT_HASH: _content_hash(tensors, metadata)}
    payload = safetensors.torch.save(tensors, metadata=header)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace_file(path, payload)
    except OSError as error:
        raise CheckpointError(_describe(error, path, len(payload))) from error


def read_model(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Weights and metadata of a safetensors file; verified if `export_model` wrote it, others are taken as they are.

    Raises:
        CheckpointError: if it cannot be read, is not safetensors, or is damaged.
    """
    # A link to a model is the user's own.
    payload = _read_file(Path(os.path.realpath(path)))
    tensors = _unpack(payload, path)
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    metadata: dict[str, str] = header.get("__metadata__") or {}
    expected = metadata.pop(_CONTENT_HASH, None)
    if expected is not None and expected != _content_hash(tensors, metadata):
        raise CheckpointError(f"{path}: SHA-256 differs from the one in its header: the file is damaged")
    return tensors, metadata

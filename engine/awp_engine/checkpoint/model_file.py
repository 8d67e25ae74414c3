"""Weights as one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from awp_engine.checkpoint.files import CheckpointError, canonical, describe, read_file
from awp_engine.files.atomic import replace_file, require_space

_CONTENT_HASH = "content_sha256"


def packable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CPU copies that safetensors takes: contiguous (channels_last keeps its values, not strides), no shared memory."""
    seen: set[int] = set()
    packed = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        # A view of a larger storage, or a tied weight, is cloned.
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        packed[name] = plain
    return packed


def unpack(payload: bytes, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file's bytes; `path` is for messages."""
    try:
        return safetensors.torch.load(payload)
    except Exception as error:
        # Whatever a hostile header provokes in the parser, the file is refused.
        raise CheckpointError(f"{path}: not a safetensors file: {' '.join(str(error).split())}") from error


def content_hash(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256, hexadecimal, of contiguous CPU tensors with their names, dtypes and shapes, and of metadata."""
    digest = hashlib.sha256(canonical({key: metadata[key] for key in metadata if key != _CONTENT_HASH}))
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _saved(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file's bytes: always the same ones for the same contents; its library shuffles the metadata."""
    payload = memoryview(safetensors.torch.save(dict(tensors), metadata=dict(metadata)))
    end = 8 + int.from_bytes(payload[:8], "little")
    header = json.loads(bytes(payload[8:end]))
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    # tensors begin at a multiple of 8 bytes
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, payload[end:]))


def export_model(path: Path, state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes weights as one safetensors file, atomically, with `metadata` and a SHA-256 of it all in the header.

    Raises:
        CheckpointError: if it could not be written; a file that was there before is untouched.
    """
    tensors = packable(state_dict)
    header = {**metadata, _CONTENT_HASH: content_hash(tensors, metadata)}
    payload = _saved(tensors, header)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        require_space(path.parent, len(payload))
        replace_file(path, payload)
    except OSError as error:
        raise CheckpointError(describe(error, path, len(payload))) from error


def read_model(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Weights and metadata of a safetensors file; verified if `export_model` wrote it, others are taken as they are.

    Raises:
        CheckpointError: if it cannot be read, is not safetensors, or is damaged.
    """
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"{path}: ONNX files cannot be loaded here; give the run that it was exported from, or its .safetensors"
        )
    # A link to a model is the user's own.
    payload = read_file(Path(os.path.realpath(path)))
    tensors = unpack(payload, path)
    header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
    metadata: dict[str, str] = header.get("__metadata__") or {}
    expected = metadata.pop(_CONTENT_HASH, None)
    if expected is not None and expected != content_hash(tensors, metadata):
        raise CheckpointError(f"{path}: SHA-256 differs from the one in its header: the file is damaged")
    return tensors, metadata

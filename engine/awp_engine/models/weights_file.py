"""Weights as other programs write them: safetensors, and what `torch.save` wrote, of which nothing is run."""

import hashlib
import io
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from awp_engine.checkpoint import CheckpointError, read_file, read_model
from awp_engine.files.text import one_line, shortened

_ZIP = b"PK\x03\x04"
# or a pickle of protocol 2 and above
_SAVED_BY_TORCH = (_ZIP, b"\x80")
# what git leaves where it did not fetch a large file
_LFS = b"version https://git-lfs"
_ASKED_FOR = re.compile(r"Unsupported global: GLOBAL (\S+) was not")
# the reason, in torch's long messages
_SAID = re.compile(r"(?:error: |source\. )((?:Trying|Unsupported|Can only|Only|Detected).+?)(?: Check the|$)")
_MOST_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """A file's content.

    Attributes:
        document: what was saved: tensors by name, and dictionaries of such.
        metadata: of a safetensors file's header.
        sha256: of the bytes that were read, hexadecimal.
        inert: classes that a pickle asked for; their objects are empty here.
    """

    document: Any
    metadata: Mapping[str, str]
    sha256: str
    inert: tuple[str, ...] = ()


class Inert:
    """Stands for an object of whatever class a pickle names: takes its state, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":  # noqa: D102
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)


def _empty(*_: Any) -> dict[Any, Any]:
    """In place of collections.defaultdict, whose items follow one by one."""
    return {}


def saved_module(value: object) -> dict[str, Tensor] | None:
    """The state dict of a module that was pickled whole, by what its pickle holds; None for anything else."""
    state = value.state if isinstance(value, Inert) else None
    if not isinstance(state, Mapping) or not isinstance(state.get("_modules"), Mapping):
        return None
    found: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        tensors = state.get(kind)
        if isinstance(tensors, Mapping):
            found |= {str(name): tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    for name, module in state["_modules"].items():
        found |= {f"{name}.{inner}": tensor for inner, tensor in (saved_module(module) or {}).items()}
    return found


def read_weights(path: Path) -> WeightsFile:
    """A safetensors file, or one of `torch.save`, told apart by their first bytes.

    Of a pickle only tensors, numbers, text, lists and dictionaries are made (`weights_only`). Objects of any other
    class become `Inert`: the class is neither imported nor called.

    Raises:
        CheckpointError: it cannot be read, is neither, or holds what cannot be passed over.
    """
    payload = read_file(Path(os.path.realpath(path)))
    sha256 = hashlib.sha256(payload).hexdigest()
    # a header of 128 bytes more than a multiple of 256 begins as a pickle does
    safetensors = payload[8:9] == b"{" and int.from_bytes(payload[:8], "little") <= len(payload) - 8
    if safetensors or not payload.startswith(_SAVED_BY_TORCH):
        if payload.startswith(_LFS):
            raise CheckpointError(f"{path}: a Git LFS pointer in place of the weights; git lfs pull fetches them")
        # of these two their reader says more
        if path.suffix not in (".safetensors", ".onnx") and payload and payload[8:9] != b"{":
            raise CheckpointError(
                f"{path}: expected weights as torch.save or safetensors write them, got a file that begins with "
                f"{payload[:16]!r}; was it downloaded whole?"
            )
        tensors, metadata = read_model(path)
        return WeightsFile(document=tensors, metadata=metadata, sha256=sha256)
    # its list of contents is at the end, and torch's message about that is long
    if payload.startswith(_ZIP) and not zipfile.is_zipfile(io.BytesIO(payload)):
        raise CheckpointError(
            f"{path}: cut off: a file of torch.save without its end ({len(payload):,} bytes are here); download or "
            "copy it again"
        )
    document, inert = _unpickled(payload, path)
    return WeightsFile(document=document, metadata={}, sha256=sha256, inert=tuple(sorted(inert)))


def _unpickled(payload: bytes, path: Path) -> tuple[Any, set[str]]:
    try:
        asked = set(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(payload)))
    except ValueError as error:
        if "torchscript" in str(error):
            raise CheckpointError(
                f"{path}: a TorchScript program, not weights; write its weights by "
                "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
            ) from None
        asked = set()  # from before torch 1.6: told one by one below
    except Exception as error:
        raise _unreadable(path, error) from None
    while len(asked) < _MOST_CLASSES:
        stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
            (_empty if name == "collections.defaultdict" else Inert, name) for name in asked
        ]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
                warnings.simplefilter("ignore")
                return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True), asked
        except Exception as error:
            # whatever a hostile file provokes in the reader, it is refused
            name = _ASKED_FOR.search(str(error))
            if name is None or name[1] in asked or f"builtins.{name[1]}" in asked:
                raise _unreadable(path, error, asked) from None
            asked |= {name[1], f"builtins.{name[1]}"} if "." not in name[1] else {name[1]}
    raise CheckpointError(f"{path}: asks for more than {_MOST_CLASSES} classes")


def _unreadable(path: Path, error: Exception, asked: set[str] | None = None) -> CheckpointError:
    text = one_line(str(error))
    said = _SAID.search(text)
    if said is None:
        return CheckpointError(
            f"{path}: damaged, or neither safetensors nor a file of torch.save: {shortened(text, 120)}"
        )
    classes = f"; it holds objects of {', '.join(sorted(asked)[:5])}" if asked else ""
    return CheckpointError(
        f"{path}: cannot be read without running code from it ({said[1].rstrip('. ')}{classes}); if you trust the "
        "file, write its weights alone, where its classes can be imported: "
        "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW), with the key that holds them"
    )

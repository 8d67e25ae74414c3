"""Files written by somebody who means harm: nothing is executed, and nothing outside is touched."""

import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from awp_engine.checkpoint import (
    CheckpointError,
    Retention,
    load,
    read_model,
    save,
)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def hostile(path: Path, files: dict[str, bytes], manifest_names: dict[str, str] | None = None) -> None:
    """A checkpoint whose manifest agrees with its files, written by somebody else."""
    path.mkdir(parents=True)
    listed = {}
    for name, payload in files.items():
        (path / name).write_bytes(payload)
        shown = (manifest_names or {}).get(name, name)
        listed[shown] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    text = json.dumps({"files": listed, "format": 1}, indent=1, sort_keys=True) + "\n"
    (path / "manifest.json").write_text(text)


def payloads(executed: Path) -> dict[str, bytes]:
    def header(text: bytes, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(text) if length is None else length) + text

    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    return {
        "pickle": pickle.dumps(Bomb(executed)),
        "oversized header": header(b"{}", 2**63),
        "header beyond the file": header(b"{}", 10_000),
        "header of 200 MB": header(b" " * 1000, 200_000_000),
        "offsets beyond the file": header(json.dumps({"a": entry}).encode()),
        "overlapping": header(json.dumps({"a": entry, "b": entry}).encode()) + bytes(16),
        "huge shape": header(json.dumps({"a": {**entry, "shape": [2**62, 2**62]}}).encode()) + bytes(16),
        "unknown type": header(json.dumps({"a": {**entry, "dtype": "OBJ"}}).encode()) + bytes(16),
        "nested": header(b'{"a":' * 5000),
        "empty": b"",
    }


def test_hostile_tensor_files_are_refused_and_not_executed(tmp_path: Path) -> None:
    executed = tmp_path / "executed"
    for number, (what, payload) in enumerate(payloads(executed).items()):
        path = tmp_path / f"x-{number}"
        hostile(path, {"model.safetensors": payload, "state.json": b"{}\n"})
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a safetensors file") as caught:
            load(path)
        assert "\n" not in str(caught.value), what
        (tmp_path / "single.safetensors").write_bytes(payload)
        with pytest.raises(CheckpointError, match=r"single\.safetensors: not a safetensors file"):
            read_model(tmp_path / "single.safetensors")
    assert not executed.exists()


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.pt", "manifest.json", ".", "a\0.safetensors"]
)
def test_a_manifest_cannot_name_what_is_outside(tmp_path: Path, name: str) -> None:
    secret = safetensors.torch.save({"a": torch.ones(1)})
    (tmp_path / "secret.safetensors").write_bytes(secret)
    hostile(tmp_path / "x", {"state.json": b"{}\n", "model.safetensors": secret}, {"model.safetensors": name})
    with pytest.raises(CheckpointError, match="lists a file that no checkpoint has"):
        load(tmp_path / "x")


@pytest.mark.parametrize(
    "manifest",
    [
        {"format": 2, "files": {}},
        {"format": "1", "files": {}},
        {"format": 1, "files": {}},
        {"format": 1, "files": []},
        {"format": 1},
        {"format": 1, "files": {"state.json": {"bytes": "3", "sha256": ""}}},
        {"format": 1, "files": {"state.json": {"bytes": True, "sha256": ""}}},
        {"format": 1, "files": {"state.json": {"bytes": -1, "sha256": ""}}},
        {"format": 1, "files": {"state.json": None}},
        [],
        None,
    ],
    ids=str,
)
def test_malformed_manifests_are_refused(tmp_path: Path, manifest: object) -> None:
    path = save(tmp_path, "x", {}, {}, Retention(1))
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    (path / "manifest.json").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(CheckpointError, match="expected at most"):
        load(path)


@pytest.mark.parametrize("state", [b"[]", b"nonsense", b"[" * 100_000, b"\xff"])
def test_a_state_that_is_no_object_is_refused(tmp_path: Path, state: bytes) -> None:
    hostile(tmp_path / "x", {"state.json": state})
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load(tmp_path / "x")

"""Checkpoints under kills, full disks, flipped bits and hostile files: all on real files and real processes."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from awp_engine import checkpoint
from awp_engine.checkpoint import (
    CheckpointError,
    Retention,
    _save,
    atomic_write_text,
    export_model,
    load,
    load_latest,
    read_model,
    save,
)

Groups = dict[str, dict[str, torch.Tensor]]


def sample(seed: int = 0, size: int = 8) -> Groups:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 3, size, size, generator=generator)
    return {
        "model": {"conv.weight": weight, "steps": torch.tensor(seed)},
        "optimizer": {"conv.weight": torch.randn(4, 3, size, size, generator=generator)},
    }


def assert_equal(found: Groups, expected: Groups) -> None:
    assert found.keys() == expected.keys()
    for group, tensors in expected.items():
        assert found[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[group][name].dtype == tensor.dtype
            assert torch.equal(found[group][name], tensor)


def leftovers(directory: Path) -> list[str]:
    return [entry.name for entry in directory.iterdir() if entry.name.startswith(".")]


def test_round_trip(tmp_path: Path) -> None:
    state = {"step": 12, "best": 0.5, "history": [1, None, "é"], "nested": {"a": True}}
    path = save(tmp_path / "deep" / "checkpoints", "epoch-1", sample(), state, Retention(2))
    assert path == tmp_path / "deep" / "checkpoints" / "epoch-1"
    assert {file.name for file in path.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    found = load_latest(path.parent)
    assert found is not None
    assert (found.path, found.state, found.skipped) == (path, state, ())
    assert_equal(found.tensors, sample())
    assert leftovers(path.parent) == []


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (5, 7)], ids=str)
def test_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"model": {"a": torch.randint(0, 2, shape).to(dtype), "b": torch.ones(shape).to(dtype)}, "none": {}}
    assert_equal(load(save(tmp_path, "x", tensors, {}, Retention(1))).tensors, tensors)


def test_layouts_and_shared_memory_keep_their_values(tmp_path: Path) -> None:
    base = torch.randn(6, 4, 5, 5)
    model = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 1),
        "slice": base[1:3],
        "strided": base[:, ::2],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "tied": base,
        "tied_again": base,
        "parameter": torch.nn.Parameter(base),
    }
    found = load(save(tmp_path, "x", {"model": model}, {}, Retention(1))).tensors["model"]
    assert_equal({"model": found}, {"model": model})
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_names_sort_by_number_and_old_ones_go(tmp_path: Path) -> None:
    (tmp_path / "epoch-notes").mkdir()
    for epoch in (8, 9, 10, 11):
        save(tmp_path, f"epoch-{epoch}", sample(epoch), {"epoch": epoch}, Retention(2))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["epoch-10", "epoch-11", "epoch-notes", "latest"]
    found = load_latest(tmp_path)
    assert found is not None
    assert found.state == {"epoch": 11}


def test_a_taken_name_is_not_overwritten(tmp_path: Path) -> None:
    first = save(tmp_path, "epoch-1", sample(1), {"n": 1}, Retention(9))
    second = save(tmp_path, "epoch-1", sample(2), {"n": 2}, Retention(9))
    third = save(tmp_path, "epoch-1", sample(3), {"n": 3}, Retention(9))
    assert [path.name for path in (first, second, third)] == ["epoch-1", "epoch-1.1", "epoch-1.2"]
    assert [load(path).state["n"] for path in (first, second, third)] == [1, 2, 3]
    found = load_latest(tmp_path)
    assert found is not None
    assert found.path == third
    save(tmp_path, "epoch-2", sample(), {}, Retention(1))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["epoch-2", "latest"]


def test_stale_temporaries_go(tmp_path: Path) -> None:
    (tmp_path / ".tmp-epoch-1-0000").mkdir()
    (tmp_path / ".tmp-epoch-1-0000" / "model.safetensors").write_bytes(b"x")
    (tmp_path / ".tmp-latest-0000").write_text("x")
    save(tmp_path, "epoch-1", sample(), {}, Retention(1))
    assert leftovers(tmp_path) == []


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path, "epoch-1", sample(), {}, Retention(1))
        export_model(tmp_path / "model.safetensors", sample()["model"], {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["", ".x", "../x", "a/b", "latest", "/abs", "a\n"])
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name: expected"):
        save(tmp_path, name, sample(), {}, Retention(1))
    assert list(tmp_path.iterdir()) == []


def test_bad_groups_states_and_keep_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensors: expected group names"):
        save(tmp_path, "x", {"../model": {}}, {}, Retention(1))
    with pytest.raises(ValueError, match="state: expected what JSON holds"):
        save(tmp_path, "x", {}, {"a": torch.ones(1)}, Retention(1))
    with pytest.raises(ValueError, match="last: expected a whole number >= 1, got 0"):
        Retention(0)
    with pytest.raises(ValueError, match="every_epochs: expected a whole number >= 1, got 0"):
        Retention(every_epochs=0)
    with pytest.raises(ValueError, match="best: expected a checkpoint's name"):
        Retention(best="../x")
    with pytest.raises(ValueError, match="retention: expected a Retention, got 2"):
        save(tmp_path, "x", {}, {}, 2)  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_load(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "missing") is None
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be read: Not a directory"):
        load_latest(tmp_path / "file")


SAVE_FOREVER = """
import sys
from pathlib import Path
import torch
from awp_engine.checkpoint import Retention, save, load_latest
torch.set_num_threads(1)
directory = Path(sys.argv[1])
found = load_latest(directory)
epoch = 0 if found is None else found.state["epoch"]
print("ready", flush=True)
while True:
    epoch += 1
    full = {"a": torch.full((200_000,), float(epoch)), "b": torch.full((3,), epoch)}
    save(directory, f"epoch-{epoch}", {"model": full, "optimizer": full}, {"epoch": epoch}, Retention(2))
    print(epoch, flush=True)
"""


def test_sigkill_mid_save_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    draw = random.Random(0)
    reached = 0
    for _ in range(6):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(draw.uniform(0.02, 0.4))
            process.send_signal(signal.SIGKILL)
            printed = process.stdout.read().split("\n")[:-1]
        reached = max([reached, *map(int, printed)])
        found = load_latest(tmp_path)
        if found is None:
            assert reached == 0
            continue
        # What a save returned from is there, and every directory under a checkpoint's name is whole.
        epoch = found.state["epoch"]
        assert epoch >= reached
        assert found.skipped == ()
        assert all(torch.equal(group["b"], torch.full((3,), epoch)) for group in found.tensors.values())
        assert all(bool((group["a"] == epoch).all()) for group in found.tensors.values())
        for entry in tmp_path.glob("epoch-*"):
            load(entry)
    assert reached > 3
    save(tmp_path, f"epoch-{reached + 10}", {}, {}, Retention(2))
    assert leftovers(tmp_path) == []


def test_no_flipped_bit_is_accepted(tmp_path: Path) -> None:
    save(tmp_path, "epoch-1", sample(1, size=2), {"epoch": 1}, Retention(2))
    path = save(tmp_path, "epoch-2", sample(2, size=2), {"epoch": 2}, Retention(2))
    draw = random.Random(0)
    files = list(path.iterdir())
    accepted = []
    for _ in range(600):
        file = draw.choice(files)
        original = file.read_bytes()
        damaged = bytearray(original)
        position, bit = draw.randrange(len(damaged)), draw.randrange(8)
        damaged[position] ^= 1 << bit
        file.write_bytes(damaged)
        found = load_latest(tmp_path)
        assert found is not None
        if found.path == path:
            accepted.append((file.name, position, bit))
        else:
            assert found.state == {"epoch": 1}
            assert len(found.skipped) == 1
            assert str(path) in found.skipped[0]
            assert "\n" not in found.skipped[0]
        file.write_bytes(original)
    assert accepted == []


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "longer", "other", "directory", "link", "pipe"])
def test_every_fault_names_the_file_and_the_one_before_is_used(tmp_path: Path, name: str, fault: str) -> None:
    directory = tmp_path / "checkpoints"
    older = save(directory, "epoch-1", sample(1), {"epoch": 1}, Retention(2))
    path = save(directory, "epoch-2", sample(2), {"epoch": 2}, Retention(2))
    file = path / name
    content = file.read_bytes()
    file.unlink()
    if fault == "empty":
        file.write_bytes(b"")
    elif fault == "truncated":
        file.write_bytes(content[:-1])
    elif fault == "longer":
        file.write_bytes(content + b"\0")
    elif fault == "other":
        shutil.copy(older / name, file)
    elif fault == "directory":
        file.mkdir()
    elif fault == "link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    elif fault == "pipe":
        os.mkfifo(file)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert name in str(caught.value) or (name == "manifest.json" and fault == "other")
    found = load_latest(directory)
    assert found is not None
    assert found.state == {"epoch": 1}
    assert found.skipped == (str(caught.value),)


@pytest.mark.parametrize("content", [None, b"", b"epoch-7\n", b"../epoch-1\n", b"\xff" * 2000, b"epoch-2"])
def test_a_damaged_latest_is_not_needed(tmp_path: Path, content: bytes | None) -> None:
    save(tmp_path, "epoch-1", sample(1), {"epoch": 1}, Retention(2))
    save(tmp_path, "epoch-2", sample(2), {"epoch": 2}, Retention(2))
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    found = load_latest(tmp_path)
    assert found is not None
    assert found.state == {"epoch": 2}
    assert len(found.skipped) == (content != b"epoch-2")


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    path = save(tmp_path, "epoch-1", sample(), {}, Retention(1))
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        load_latest(tmp_path)


def test_going_on_from_an_older_checkpoint_supersedes_the_damaged_one(tmp_path: Path) -> None:
    save(tmp_path, "epoch-1", sample(1), {"epoch": 1}, Retention(1))
    damaged = save(tmp_path, "epoch-2", sample(2), {"epoch": 2}, Retention(2))
    (damaged / "state.json").write_text("{}")
    save(tmp_path, "epoch-2", sample(3), {"epoch": 2, "again": True}, Retention(2))
    found = load_latest(tmp_path)
    assert found is not None
    assert found.state == {"epoch": 2, "again": True}
    assert found.skipped == ()


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def check_failed_save(directory: Path, error: CheckpointError, before: Path) -> None:
    assert "epoch-2" in str(error)
    assert "bytes" in str(error)
    assert "\n" not in str(error)
    assert leftovers(directory) == []
    found = load_latest(directory)
    assert found is not None
    assert (found.path, found.state, found.skipped) == (before, {"epoch": 1}, ())
    assert_equal(found.tensors, sample(1))


def test_full_disk_leaves_the_one_before(small_disk: Path) -> None:
    before = save(small_disk, "epoch-1", sample(1), {"epoch": 1}, Retention(1))
    big = {"model": {"a": torch.zeros(600_000)}}
    for _ in range(3):
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            save(small_disk, "epoch-2", big, {"epoch": 2}, Retention(1))
        check_failed_save(small_disk, caught.value, before)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export_model(small_disk / "model.safetensors", big["model"], {})
    assert not (small_disk / "model.safetensors").exists()
    assert leftovers(small_disk) == []
    (small_disk / "config.json").write_text("old")
    with pytest.raises(OSError, match="No space left"):
        atomic_write_text(small_disk / "config.json", "x" * 2_000_000)
    assert (small_disk / "config.json").read_text() == "old"


def test_read_only_disk_leaves_the_one_before(small_disk: Path) -> None:
    before = save(small_disk, "epoch-1", sample(1), {"epoch": 1}, Retention(1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match="Read-only file system") as caught:
        save(small_disk, "epoch-2", sample(2), {"epoch": 2}, Retention(1))
    check_failed_save(small_disk, caught.value, before)


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
@pytest.mark.parametrize("nth", [0, 1, 2])
def test_an_error_at_any_write_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int
) -> None:
    before = save(tmp_path, "epoch-1", sample(1), {"epoch": 1}, Retention(1))
    calls = 0

    def failing(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls > nth:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return real(*args, **kwargs)

    owner, name = (_save, "write_file") if call == "write" else (os, call)
    real = getattr(owner, name)
    if call == "rename":
        calls = nth
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(CheckpointError, match="Disk quota exceeded") as caught:
            save(tmp_path, "epoch-2", sample(2), {"epoch": 2}, Retention(1))
    check_failed_save(tmp_path, caught.value, before)


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(CheckpointError, match=r"checkpoints.*bytes failed"):
        save(tmp_path / "checkpoints", "epoch-1", sample(), {}, Retention(1))
    assert (tmp_path / "checkpoints").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_leaves_the_one_before(tmp_path: Path) -> None:
    before = save(tmp_path, "epoch-1", sample(1), {"epoch": 1}, Retention(1))
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match="Permission denied") as caught:
            save(tmp_path, "epoch-2", sample(2), {"epoch": 2}, Retention(1))
    finally:
        tmp_path.chmod(0o755)
    check_failed_save(tmp_path, caught.value, before)


def test_exported_models_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "run" / "model.safetensors"
    model = {"w": torch.randn(3, 4), "half": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}
    export_model(path, model, {"config": "{}"})
    export_model(path, model, {"config": "{}", "epoch": "3"})
    tensors, metadata = read_model(path)
    assert_equal({"model": tensors}, {"model": model})
    assert metadata == {"config": "{}", "epoch": "3"}
    assert leftovers(path.parent) == []
    original = path.read_bytes()
    draw = random.Random(0)
    accepted = 0
    for _ in range(300):
        damaged = bytearray(original)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found, about = read_model(path)
        except CheckpointError:
            continue
        # Only the hash's own name in the header is not covered, and then the weights are sound.
        assert_equal({"model": found}, {"model": model})
        accepted += about == metadata
    assert accepted == 0


def test_other_programs_models_can_be_read(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors")
    (tmp_path / "link").symlink_to("m.safetensors")
    for name in ("m.safetensors", "link"):
        tensors, metadata = read_model(tmp_path / name)
        assert torch.equal(tensors["w"], torch.ones(2))
        assert metadata == {}
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_model(tmp_path / "missing")


def test_no_pickle_in_the_source() -> None:
    source = "".join(file.read_text() for file in Path(checkpoint.__file__).parent.glob("*.py"))
    assert "import pickle" not in source
    assert "torch.load(" not in source.replace("safetensors.torch.load(", "")
    assert "torch.save(" not in source.replace("safetensors.torch.save(", "")

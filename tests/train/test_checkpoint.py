"""Checkpoints as they are written, read, and damaged: all on real files."""

import os
import random
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_samples import assert_equal, leftovers, sample

from awp_engine import checkpoint
from awp_engine.checkpoint import CheckpointError, Retention, export_model, load, load_latest, read_model, save


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
        save(tmp_path, "x", {}, {}, 2)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_load(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "missing") is None
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be read: Not a directory"):
        load_latest(tmp_path / "file")


def test_no_flipped_bit_is_accepted(tmp_path: Path) -> None:
    save(tmp_path, "epoch-1", sample(1, size=2), {"epoch": 1}, Retention(2))
    path = save(tmp_path, "epoch-2", sample(2, size=2), {"epoch": 2}, Retention(2))
    draw = random.Random(0)
    files = list(path.iterdir())
    accepted = []
    for _ in range(1000):
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
            assert found.path == tmp_path / "epoch-1"
            assert len(found.skipped) == 1
            assert str(path) in found.skipped[0]
            assert "\n" not in found.skipped[0]
        file.write_bytes(original)
    assert accepted == []


def break_at_random(path: Path, older: Path, draw: random.Random) -> str:
    """Spoils a checkpoint in one of the ways in which disks, copies and people do; says which."""
    file = draw.choice(sorted(path.iterdir()))
    what = draw.choice(["truncated", "missing", "no files", "of another step", "weights of another step", "longer"])
    if what == "truncated":
        os.truncate(file, draw.randrange(file.stat().st_size))
    elif what == "longer":
        with file.open("ab") as end:
            end.write(draw.randbytes(draw.randrange(1, 100)))
    elif what == "missing":
        file.unlink()
    elif what == "no files":
        for each in path.iterdir():
            each.unlink()
    elif what == "of another step":
        shutil.copy(older / file.name, file)
    else:
        for name in ("model.safetensors", "optimizer.safetensors"):
            shutil.copy(older / name, path / name)
    return f"{what}: {file.name}"


def test_200_broken_checkpoints_are_clear_errors(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    older = save(directory, "epoch-1", sample(1, size=2), {"epoch": 1}, Retention())
    path = save(directory, "epoch-2", sample(2, size=2), {"epoch": 2}, Retention())
    shutil.copytree(path, tmp_path / "sound")
    draw = random.Random(0)
    clear = 0
    for _ in range(200):
        what = break_at_random(path, older, draw)
        with pytest.raises(CheckpointError) as caught:
            load(path)
        text = str(caught.value)
        assert text.startswith(f"{path}/"), what
        assert "\n" not in text
        found = load_latest(directory)
        assert found is not None
        assert (found.path, found.state, found.skipped) == (older, {"epoch": 1}, (text,)), what
        clear += 1
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "sound", path)
    assert clear == 200
    assert load(path).state == {"epoch": 2}


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


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    """The metadata's order is random in the library, of a hundred entries surely another one each time."""
    weights = {"b": torch.randn(3, 5), "a": torch.arange(7), "odd \u00e9": torch.ones(3, dtype=torch.uint8)}
    metadata = {f"key {number}": f'"caf\u00e9" \n {number}' for number in range(100)}
    for name, entries in (("one", metadata), ("two", dict(reversed(metadata.items())))):
        export_model(tmp_path / name, weights, entries)
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    with safetensors.safe_open(tmp_path / "one", "pt") as file:
        assert {name: text for name, text in file.metadata().items() if name in metadata} == metadata
        assert set(file.keys()) == set(weights)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in weights.items())
    assert read_model(tmp_path / "two")[1] == metadata


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
    for _ in range(300):
        damaged = bytearray(original)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found, about = read_model(path)
        except CheckpointError:
            continue
        # Only the hash's own name in the header is not covered: then it is one key more, and the weights are sound.
        assert_equal({"model": found}, {"model": model})
        assert len(about) == len(metadata) + 1


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

"""Saving in the background, and what stays: real files, threads and processes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awp_engine.checkpoint import (
    CheckpointError,
    Retention,
    Writer,
    checkpoint_name,
    load,
    load_latest,
    names,
    position,
    save,
)


def groups(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((300, 40), value), "n": torch.tensor(int(value))},
        "average": {"w": torch.full((40, 300), value, dtype=torch.bfloat16).t()},
    }


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_save_holds_the_tensors_as_they_were_at_the_call(tmp_path: Path) -> None:
    tensors = {
        "model": {
            "parameter": torch.nn.Parameter(torch.randn(200, 300)),
            "channels_last": torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last),
            "strided": torch.randn(6, 8)[:, ::2],
            "expanded": torch.randn(1, 3).expand(4, 3),
            "half": torch.randn(5).bfloat16(),
            "empty": torch.empty(0, 3),
            "count": torch.tensor(3),
        }
    }
    expected = {name: tensor.detach().clone() for name, tensor in tensors["model"].items()}
    state = {"history": [1, 2]}
    with Writer(tmp_path) as writer:
        writer.save("epoch-1", tensors, state, Retention())
        for name, tensor in tensors["model"].items():
            if name != "expanded":
                tensor.detach().fill_(-1)
        state["history"].append(3)
        path = writer.wait()
    assert path == tmp_path / "epoch-1"
    found = load(tmp_path / "epoch-1")
    assert found.state == {"history": [1, 2]}
    assert found.tensors["model"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.tensors["model"][name].dtype == tensor.dtype
        assert torch.equal(found.tensors["model"][name], tensor)


def test_copies_are_reused_and_follow_the_tensors(tmp_path: Path) -> None:
    addresses: list[int] = []
    with Writer(tmp_path) as writer:
        for epoch in (1, 2, 3):
            writer.save(f"epoch-{epoch}", groups(epoch), {"epoch": epoch}, Retention(9))
            if epoch == 1:
                addresses = [t.data_ptr() for group in writer._copies.values() for t in group.values()]
        assert addresses == [t.data_ptr() for group in writer._copies.values() for t in group.values()]
        # another shape, a group less, one more
        writer.save("epoch-4", {"model": {"w": torch.ones(3)}, "x": {"y": torch.zeros(1)}}, {}, Retention(9))
    for epoch in (1, 2, 3):
        assert load(tmp_path / f"epoch-{epoch}").tensors["model"]["w"].unique().tolist() == [epoch]
        assert load(tmp_path / f"epoch-{epoch}").tensors["average"]["w"].unique().tolist() == [epoch]
    found = load(tmp_path / "epoch-4").tensors
    assert {group: list(members) for group, members in found.items()} == {"model": ["w"], "x": ["y"]}


def test_a_copy_made_in_inference_mode_serves_outside_of_it(tmp_path: Path) -> None:
    with Writer(tmp_path) as writer:
        with torch.inference_mode():
            writer.save("epoch-1", groups(1), {}, Retention())
        writer.save("epoch-2", groups(2), {}, Retention())
    assert names(tmp_path) == ["epoch-1", "epoch-2"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    # The disk takes no more until it is read: a pipe in place of the file that `latest` is written beside.
    before = save(tmp_path, "epoch-1", groups(1), {}, Retention())
    os.mkfifo(tmp_path / "gate")
    code = """
import os, sys, threading
from pathlib import Path
import torch
from awp_engine.checkpoint import Retention, Writer, write
directory = Path(sys.argv[1])
real = write.verify
def gated(path):
    (directory / "gate").read_bytes()
    real(path)
write.verify = gated
with Writer(directory) as writer:
    writer.save("epoch-2", {"model": {"w": torch.ones(3)}}, {"epoch": 2}, Retention())
    print("training", flush=True)
    writer.save("epoch-3", {"model": {"w": torch.ones(3)}}, {"epoch": 3}, Retention())
    print("second", flush=True)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        latest = load_latest(tmp_path)
        assert latest is not None
        assert latest.path == before
        # the second save waits for the first
        assert process.poll() is None
        (tmp_path / "gate").write_bytes(b"")
        assert process.stdout.readline() == "second\n"
        (tmp_path / "gate").write_bytes(b"")
        assert process.wait(timeout=60) == 0
    latest = load_latest(tmp_path)
    assert latest is not None
    assert latest.state == {"epoch": 3}


def test_an_error_is_raised_once_at_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    writer = Writer(tmp_path / "file")
    writer.save("epoch-1", groups(1), {}, Retention())
    with pytest.raises(CheckpointError, match=r"file.*bytes failed"):
        writer.save("epoch-2", groups(2), {}, Retention())
    assert writer.wait() is None
    writer.save("epoch-3", groups(3), {}, Retention())
    with pytest.raises(CheckpointError, match=r"file.*bytes failed"):
        writer.wait()
    writer.save("epoch-4", groups(4), {}, Retention())
    with pytest.raises(CheckpointError, match=r"file.*bytes failed"):
        writer.close()
    writer.close()
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ValueError, match="writer: closed"):
        writer.save("epoch-5", groups(5), {}, Retention())


def test_a_failed_save_does_not_spoil_the_next(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    directory.write_text("in the way")
    with Writer(directory) as writer:
        writer.save("epoch-1", groups(1), {}, Retention())
        with pytest.raises(CheckpointError):
            writer.wait()
        directory.unlink()
        writer.save("epoch-2", groups(2), {}, Retention())
        assert writer.wait() == directory / "epoch-2"
    assert load(directory / "epoch-2").tensors["model"]["w"].unique().tolist() == [2]


def test_what_cannot_be_saved_is_refused_at_once(tmp_path: Path) -> None:
    with Writer(tmp_path) as writer:
        with pytest.raises(ValueError, match="name: expected"):
            writer.save("../x", groups(1), {}, Retention())
        with pytest.raises(ValueError, match="state: expected what JSON holds"):
            writer.save("epoch-1", groups(1), {"a": torch.ones(1)}, Retention())
        with pytest.raises(ValueError, match="retention: expected a Retention, got 2"):
            writer.save("epoch-1", groups(1), {}, 2)
        assert writer.wait() is None
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_the_block_comes_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(KeyError, match="root") as caught, Writer(tmp_path / "file") as writer:
        writer.save("epoch-1", groups(1), {}, Retention())
        raise KeyError("root")
    assert "bytes failed" in caught.value.__notes__[0]
    with pytest.raises(KeyError), Writer(tmp_path / "good") as writer:
        writer.save("epoch-1", groups(1), {}, Retention())
        raise KeyError("root")
    assert load(tmp_path / "good" / "epoch-1").tensors["model"]["n"] == 1


LEAVE = """
import sys
from pathlib import Path
import torch
from awp_engine.checkpoint import Retention, Writer
writer = Writer(Path(sys.argv[1]))
writer.save("epoch-1", {"model": {"w": torch.ones(3_000_000)}}, {"epoch": 1}, Retention())
if sys.argv[2] == "error":
    raise RuntimeError("training")
if sys.argv[2] == "exit":
    sys.exit(3)
"""


@pytest.mark.parametrize(("end", "code"), [("return", 0), ("exit", 3), ("error", 1)])
def test_leaving_without_close_finishes_the_checkpoint(tmp_path: Path, end: str, code: int) -> None:
    command = [sys.executable, "-c", LEAVE, str(tmp_path), end]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == code, result.stderr
    found = load_latest(tmp_path)
    assert found is not None
    assert found.state == {"epoch": 1}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["epoch-1", "latest"]


SAVE_FOREVER = """
import sys
from pathlib import Path
import torch
from awp_engine.checkpoint import Retention, Writer, load_latest
torch.set_num_threads(1)
directory = Path(sys.argv[1])
found = load_latest(directory)
epoch = 0 if found is None else found.state["epoch"]
weights = torch.full((200_000,), float(epoch))
print("ready", flush=True)
with Writer(directory) as writer:
    while True:
        epoch += 1
        # one buffer changed in place, as an optimizer does, while the one before is being written
        weights.fill_(epoch)
        print(epoch, flush=True)
        tensors = {"model": {"a": weights}, "optimizer": {"a": weights}}
        writer.save(f"epoch-{epoch}", tensors, {"epoch": epoch}, Retention())
"""


def test_sigkill_at_any_moment_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    draw = random.Random(1)
    begun = 0
    for _ in range(5):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(draw.uniform(0.02, 0.3))
            process.send_signal(signal.SIGKILL)
            begun = max([begun, *map(int, process.stdout.read().split("\n")[:-1])])
        found = load_latest(tmp_path)
        if found is None:
            continue
        # Two saves before the last that was begun are on disk.
        epoch = found.state["epoch"]
        assert begun - 2 <= epoch <= begun
        assert found.skipped == ()
        assert all(bool((group["a"] == epoch).all()) for group in found.tensors.values())
        for entry in tmp_path.glob("epoch-*"):
            load(entry)
    assert begun > 3
    save(tmp_path, f"epoch-{begun + 10}", {}, {}, Retention())
    assert not list(tmp_path.glob(".tmp-*"))


POSITIONS = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 3))


def spelled(place: tuple[int, int, int]) -> str:
    epoch, step, repeat = place
    return checkpoint_name(epoch, step) + (f".{repeat}" if repeat else "")


@given(st.lists(POSITIONS, unique=True, max_size=12))
def test_names_sort_as_the_run_made_them(tmp_path_factory: pytest.TempPathFactory, places: list) -> None:
    directory = tmp_path_factory.mktemp("names")
    for place in places:
        (directory / spelled(place)).mkdir()
        assert position(spelled(place)) == place
    assert [position(name) for name in names(directory)] == sorted(places)
    shutil.rmtree(directory)


def test_names_in_words(tmp_path: Path) -> None:
    expected = ["notes-2", "notes-10", "epoch-9", "epoch-12", "epoch-12.1", "epoch-12.step-5", "epoch-12.step-40"]
    expected += ["epoch-12.step-40.1", "epoch-13"]
    for name in reversed(expected):
        (tmp_path / name).mkdir()
    assert names(tmp_path) == expected
    assert checkpoint_name(12) == "epoch-12"
    assert checkpoint_name(12, 40) == "epoch-12.step-40"
    for name in (
        "epoch-",
        "epoch-01",
        "epoch-1.step",
        "epoch-1.step-x",
        "epoch-1.1.1",
        "epoch--1",
        "epoch-" + "9" * 50,
    ):
        assert position(name) is None


@given(
    places=st.lists(POSITIONS, unique=True, min_size=1, max_size=10),
    last=st.integers(1, 4),
    every=st.none() | st.integers(1, 4),
    best=st.integers(0, 9),
)
def test_retention(
    tmp_path_factory: pytest.TempPathFactory, places: list, last: int, every: int | None, best: int
) -> None:
    directory = tmp_path_factory.mktemp("retention")
    chosen = spelled(places[best % len(places)])
    earlier = sorted(places)
    for place in earlier[:-1]:
        save(directory, spelled(place), {}, {}, Retention(99))
    others = ["epoch-notes", "mine", ".hidden"]
    for name in others:
        (directory / name).mkdir()
    save(directory, spelled(earlier[-1]), {}, {}, Retention(last, every, chosen))
    expected = {
        spelled(place)
        for place in places
        if place in earlier[-last:] or spelled(place) == chosen or (every and place[1] == 0 and place[0] % every == 0)
    }
    assert {entry.name for entry in directory.iterdir()} == expected | {*others, "latest"}
    shutil.rmtree(directory)


def test_a_damaged_checkpoint_replaces_none(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        save(tmp_path, f"epoch-{epoch}", groups(epoch), {}, Retention(9))
    (tmp_path / "epoch-3" / "state.json").write_text("damaged")
    save(tmp_path, "epoch-4", groups(4), {}, Retention(2))
    assert names(tmp_path) == ["epoch-2", "epoch-3", "epoch-4"]
    save(tmp_path, "epoch-5", groups(5), {}, Retention(2))
    assert names(tmp_path) == ["epoch-4", "epoch-5"]


def test_what_is_newer_by_name_is_left_alone(tmp_path: Path) -> None:
    save(tmp_path, "epoch-5", groups(5), {"n": 1}, Retention())
    save(tmp_path, "epoch-2.step-3", groups(2), {"n": 2}, Retention(1))
    found = load_latest(tmp_path)
    assert found is not None
    assert found.state == {"n": 2}
    assert names(tmp_path) == ["epoch-2.step-3", "epoch-5"]

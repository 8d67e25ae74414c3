"""Checkpoints on disks that are full, read-only, forbidden or elsewhere: the one before stays whole."""

import contextlib
import errno
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_samples import assert_equal, leftovers, sample
from disks import small_tmpfs

from awp_engine.checkpoint import CheckpointError, Retention, Writer, export_model, load_latest, save, write
from awp_engine.files.atomic import atomic_write_text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_tmpfs(tmp_path, "1m") as mount:
        yield mount


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
        assert re.search(r"epoch-2: writing 24\d{5} bytes failed: .* \(\d+ bytes free\)", str(caught.value))
    with Writer(small_disk) as writer:
        writer.save("epoch-2", big, {"epoch": 2}, Retention(1))
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            writer.wait()
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

    owner, name = (write, "write_file") if call == "write" else (os, call)
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


def test_a_disk_that_fills_while_a_checkpoint_is_written(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save(small_disk, "epoch-1", sample(1), {"epoch": 1}, Retention(1))
    monkeypatch.setattr(write, "require_space", lambda directory, size: None)
    for size in (600_000, 240_000):
        tensors = {"model": {"a": torch.zeros(size)}, "optimizer": {"a": torch.zeros(size)}}
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            save(small_disk, "epoch-2", tensors, {"epoch": 2}, Retention(1))
        check_failed_save(small_disk, caught.value, before)


def test_a_disk_without_room_for_another_file(small_disk: Path) -> None:
    before = save(small_disk, "epoch-1", sample(1), {"epoch": 1}, Retention(1))
    used = sum(1 for _ in small_disk.rglob("*")) + 1
    # Each of directory, two groups, state and manifest is the one too many in turn.
    for spare in range(5):
        subprocess.run(["mount", "-o", f"remount,nr_inodes={used + spare}", str(small_disk)], check=True)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            save(small_disk, "epoch-2", sample(2), {"epoch": 2}, Retention(1))
        check_failed_save(small_disk, caught.value, before)
    subprocess.run(["mount", "-o", f"remount,nr_inodes={used + 6}", str(small_disk)], check=True)
    save(small_disk, "epoch-2", sample(2), {"epoch": 2}, Retention(1))


def test_what_a_killed_writer_left_does_not_fill_the_disk(small_disk: Path) -> None:
    (small_disk / ".tmp-epoch-1-0123abcd").mkdir()
    (small_disk / ".tmp-epoch-1-0123abcd" / "model.safetensors").write_bytes(bytes(900_000))
    tensors = {"model": {"a": torch.zeros(100_000)}}
    save(small_disk, "epoch-1", tensors, {}, Retention(1))
    assert leftovers(small_disk) == []


def test_checkpoints_on_another_file_system_than_the_run(small_disk: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(small_disk)
    assert run.stat().st_dev != small_disk.stat().st_dev
    for epoch in (1, 2, 3):
        save(run / "checkpoints", f"epoch-{epoch}", sample(epoch), {"epoch": epoch}, Retention(1))
    found = load_latest(run / "checkpoints")
    assert found is not None
    assert_equal(found.tensors, sample(3))
    assert sorted(entry.name for entry in small_disk.iterdir()) == ["epoch-3", "latest"]


NOBODY = 65534


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write everywhere: somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("owner", ["root's", "one's own"])
def test_a_directory_that_may_not_be_written(owner: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        before = save(directory, "epoch-1", sample(1), {"epoch": 1}, Retention(1))
        if owner == "one's own" and os.geteuid() == 0:
            os.chown(directory, NOBODY, NOBODY)
        directory.chmod(0o555)
        try:
            with as_nobody():
                with pytest.raises(CheckpointError, match="Permission denied") as caught:
                    save(directory, "epoch-2", sample(2), {"epoch": 2}, Retention(1))
                with pytest.raises(CheckpointError, match="Permission denied"):
                    export_model(directory / "model.safetensors", {}, {})
                check_failed_save(directory, caught.value, before)
        finally:
            directory.chmod(0o755)


def test_a_checkpoint_that_may_not_be_read_is_skipped_by_name() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        save(directory, "epoch-1", sample(1), {"epoch": 1}, Retention())
        path = save(directory, "epoch-2", sample(2), {"epoch": 2}, Retention())
        (path / "model.safetensors").chmod(0)
        with as_nobody():
            found = load_latest(directory)
        assert found is not None
        assert found.state == {"epoch": 1}
        assert found.skipped == (f"{path / 'model.safetensors'}: cannot be read: Permission denied",)

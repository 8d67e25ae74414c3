"""Two processes and one directory: one writes there, the other is refused at once, and nothing is lost."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_runs import SMALL, TRAIN, Run, _train_command, differences, outcome, wait_until

from awp_engine.cli.checkpoint import main as checkpoint_command
from awp_engine.cli.data import main as data_command
from awp_engine.config import ConfigError
from awp_engine.evaluation.run import evaluate_checkpoint
from awp_engine.files.atomic import remove_leftovers, temporary_beside
from awp_engine.files.locking import LOCK, LockedError, locked

HOLDER = """
import sys, time
from pathlib import Path
from awp_engine.files.locking import locked
with locked(Path(sys.argv[1]), *sys.argv[2:]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held(directory: Path, *name: str):
    """Another process holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory), *name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def train(run_dir: Path) -> Run:
    return Run(_train_command, run_dir, {"OMP_NUM_THREADS": "1"}, TRAIN, given=[*SMALL, "--run-dir", str(run_dir)])


def test_two_trainings_of_one_directory(tmp_path):
    """Started together, one is refused; the other one is killed, and the next goes on and ends bit-equal."""
    whole, run_dir = train(tmp_path / "undisturbed"), tmp_path / "run"
    both = [train(run_dir), train(run_dir)]
    wait_until(lambda: any(run.process.exitcode is not None for run in both), "one that is refused")
    refused, winner = sorted(both, key=lambda run: run.process.exitcode is None)
    assert refused.process.exitcode == 2
    told = f"train.py: error: {run_dir}: in use by process {winner.pid} on {os.uname().nodename} since 20"
    assert refused.said().startswith(told)
    assert refused.said().count("\n") == 1
    wait_until(lambda: winner.board.read()[-1] >= 8 or winner.process.exitcode is not None, "an epoch")
    os.kill(winner.pid, signal.SIGSTOP)
    late = train(run_dir)
    assert (late.end(), late.said().startswith(told)) == (2, True)
    # who only reads is let in
    found = evaluate_checkpoint(run_dir, checkpoint="last", attacks=["clean"], gates_limit=None, limit=8, device="cpu")
    assert found.measurement.images == 8
    winner.kill()
    assert (run_dir / LOCK).exists()
    assert train(run_dir).end() == 0
    assert not (run_dir / LOCK).exists()
    assert whole.end() == 0
    assert differences(run_dir, outcome(whole.run_dir)) == []
    # and two evaluations into one directory
    with held(run_dir / "evaluation") as other, pytest.raises(LockedError, match=f"in use by process {other.pid} on "):
        evaluate_checkpoint(run_dir, attacks=["clean"], gates_limit=None, limit=8, device="cpu")
    evaluate_checkpoint(run_dir, attacks=["clean"], gates_limit=None, limit=8, device="cpu")


def test_two_exports_scans_and_packs(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for command, arguments, held_there in (
        (checkpoint_command, ["export", tmp_path, tmp_path / "out.safetensors"], (tmp_path, f"{LOCK}-out.safetensors")),
        (data_command, ["scan", tmp_path / "images"], (tmp_path / "images", f"{LOCK}-awp-scan.jsonl")),
    ):
        with held(*held_there) as other, pytest.raises(SystemExit) as caught:
            command(list(map(str, arguments)))
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert f": in use by process {other.pid} on " in said
        assert said.count("\n") == 1


@pytest.mark.parametrize("how", ["fork", "subprocess", "forkserver"])
def test_what_outlives_its_parent_keeps_no_lock(tmp_path, how):
    script = f"""
import multiprocessing, os, subprocess, sys, time
from pathlib import Path
from awp_engine.files.locking import locked
if __name__ == "__main__":
    with locked(Path(sys.argv[1])):
        if {how!r} == "subprocess":
            child = subprocess.Popen(["sleep", "60"]).pid
        else:
            process = multiprocessing.get_context({how!r}).Process(target=time.sleep, args=(60,))
            process.start()
            child = process.pid
        print(child, flush=True)
        time.sleep(60)
"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        with pytest.raises(LockedError), locked(tmp_path / "run"):
            pass
        process.kill()
        process.wait()
        os.kill(child, 0)
        with locked(tmp_path / "run"):
            os.kill(child, signal.SIGKILL)


def count(directory: Path, counter: Path, times: int) -> None:
    done = 0
    while done < times:
        with contextlib.suppress(LockedError), locked(directory):
            before = int(counter.read_text())
            time.sleep(0.001)
            counter.write_text(str(before + 1))
            done += 1


def test_no_two_are_ever_inside(tmp_path):
    """Though the directory and the lock file are removed and made again all the time."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("forkserver")
    workers = [context.Process(target=count, args=(tmp_path / "a" / "b", counter, 40)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert counter.read_text() == "160"


def test_what_is_written_stays_and_nothing_else(tmp_path):
    with locked(tmp_path / "made" / "kept"):
        (tmp_path / "made" / "kept" / "file").touch()
    assert [path.name for path in (tmp_path / "made" / "kept").iterdir()] == ["file"]
    with locked(tmp_path / "made" / "empty"):
        pass
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["kept"]


@pytest.mark.parametrize("place", ["file", "link", "file/below", "pipe", "directory", "/proc/nothing"])
def test_where_no_lock_can_be(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("pipe", "directory"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / LOCK)
    (tmp_path / "directory" / LOCK).mkdir()
    with pytest.raises(ConfigError) as caught, locked(tmp_path / place):
        pass
    assert "choose another directory" in str(caught.value)
    assert str(tmp_path / place).removesuffix("/below") in str(caught.value)


def test_only_what_dead_processes_left_is_removed(tmp_path):
    """A name says whose it is: the process, its number and its machine."""
    dead = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from awp_engine.checkpoint import temporary_beside;"
            "temporary_beside(Path(sys.argv[1])).mkdir()",
            str(tmp_path / "epoch-1"),
        ],
        check=True,
    )
    assert dead.returncode == 0
    (left,) = tmp_path.iterdir()
    number = int(left.name.rpartition("-")[2].partition("@")[0])
    own = temporary_beside(tmp_path / "epoch-2")
    stays = [own, tmp_path / left.name.replace(f"-{number}@", f"-{os.getppid()}@")]
    goes = [
        tmp_path / left.name.replace(f"-{number}@", f"-{os.getpid()}@"),
        tmp_path / f"{left.name}.another.machine",
        tmp_path / left.name.replace(f"-{number}@", f"-{10**30}@"),
        tmp_path / ".tmp-epoch-1-0000",
    ]
    for path in (*stays, *goes):
        path.touch()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(stays)

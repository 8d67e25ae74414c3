"""Runs of several ranks that are killed, stopped or made to fail: see kill_runs.py, which does the same for longer."""

import contextlib
import itertools
import os
import re
import signal
import socket
import threading

import forked
import pytest
from kill_runs import FAULTY, RANKS, SMALL, TRAIN, Torchrun, differences, ranks, store_server, undisturbed_ranks
from torch.distributed import TCPStore

from awp_engine.distributed.ranks import _agree


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What two ranks end with that nobody disturbs."""
    return undisturbed_ranks(2, tmp_path_factory.mktemp("ranks") / "undisturbed")


def test_a_killed_and_a_stopped_rank_are_restarted_and_the_run_ends_bit_equal(tmp_path, whole):
    run_dir = tmp_path / "run"
    with Torchrun(2, tmp_path / "out", *SMALL, *RANKS, "--run-dir", str(run_dir)) as job:
        first = job.wait_ranks({})
        job.wait_steps(2)
        os.kill(first[0], signal.SIGKILL)
        second = job.wait_ranks(first, seconds=60)
        job.wait_steps(job.steps() + 2)
        os.kill(second[1], signal.SIGSTOP)
        job.wait_ranks(second, seconds=60)
        assert job.end() == 0, job.said()
        assert not job.all_ranks()
    assert f"because of rank 1 (gives no sign of life, process {second[1]} on " in job.said()
    assert differences(run_dir, whole) == []


def test_sigterm_to_torchrun_leaves_a_checkpoint_and_no_process(tmp_path, whole):
    run_dir = tmp_path / "run"
    with Torchrun(2, tmp_path / "out", *SMALL, *RANKS, "--run-dir", str(run_dir)) as job:
        job.wait_steps(3)
        steps = job.steps()
        job.process.send_signal(signal.SIGTERM)
        # torchrun has no other code for it
        assert job.end() == 1
        assert not job.all_ranks()
    said = re.findall(r"train\.py: error: (.*)", job.said())
    assert len(said) == 1, job.said()
    # whichever rank heard it first
    whom = "(?: to rank 1)?"
    stopped = re.fullmatch(
        rf"stopped by SIGTERM{whom}: \S+/epoch-0\.step-(\d+) is written; to go on: torchrun --nproc-per-node=2 .*",
        said[0],
    )
    assert stopped is not None, said
    # the step that was logged last, one that may have ended after that, and one more
    assert int(stopped[1]) <= steps + 2
    assert len(re.findall("Traceback", job.said())) == len(re.findall(r"Traceback(?s:.*)SignalException: ", job.said()))
    for run in ranks(2, run_dir, *RANKS):
        assert run.end() == 0, run.said()
    assert differences(run_dir, whole) == []


def test_what_ends_a_rank_is_shown_as_the_cause(tmp_path):
    """The directory of checkpoints becomes a file under the first rank; the other one's connections then break."""
    run_dir = tmp_path / "run"
    (tmp_path / "file").touch()
    with Torchrun(2, tmp_path / "out", *SMALL, *RANKS, "--run-dir", str(run_dir), restarts=0) as job:
        job.wait_steps(2)
        for number in itertools.count():
            # a save may make it anew in between
            (run_dir / "checkpoints").rename(tmp_path / f"away-{number}")
            with contextlib.suppress(FileExistsError):
                (run_dir / "checkpoints").hardlink_to(tmp_path / "file")
                break
        assert job.end() == 1
        assert not job.all_ranks()
    _, _, cause = job.said().partition("Root Cause")
    assert re.search(r"rank +: 0 ", cause), job.said()
    assert re.search(
        rf"CheckpointError: {re.escape(str(run_dir))}/checkpoints\S*: .*(File exists|Not a directory)", cause
    ), cause


def test_a_signal_to_one_rank_stops_all_with_the_code_of_preemption(tmp_path):
    run_dir = tmp_path / "run"
    both = ranks(2, run_dir, *RANKS)
    while both[1].board.read()[-1] < 2:
        assert both[1].process.exitcode is None, both[1].said()
    os.kill(both[1].pid, signal.SIGUSR1)
    assert [run.end() for run in both] == [75, 75]
    assert "stopped by SIGUSR1 to rank 1: " in both[0].said()
    assert "train.py: error" not in both[1].said()


def hanging(tmp_path, timeout):
    """Two ranks, the second of which hangs in its third step, and the store, which else the first takes with it."""
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    flags = ["hang", "1", "3", str(TRAIN), *SMALL, "--distributed.timeout", timeout, "--run-dir", str(tmp_path / "run")]
    store, port = store_server()
    return ranks(2, tmp_path / "run", script=script, given=flags, port=port), store


def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path):
    both, store = hanging(tmp_path, "2")
    assert [run.end() for run in both] == [1, 1]
    store.kill()
    named = (
        r"error: no progress for 2 s because of rank 1 \(runs, process \d+ on .*\), last seen in .*; rank 0 waits in "
    )
    assert re.search(named, both[0].said())
    # on a busy machine it may not have come further than the backward pass, or the other one's end sends it home first
    waits = r"stacks of rank 0, in .*:(?s:.*) in (all_reduce|_pre_forward|_engine_run_backward|close)\n"
    assert re.search(waits, both[0].said()), both[0].said()
    assert "in fault_on_purpose" in both[1].said()
    assert "in fault_on_purpose" not in both[0].said()


def test_ranks_whose_torchrun_is_gone_leave_a_checkpoint_and_end(tmp_path):
    """A second start would write where ranks that outlived the first one do."""
    torchrun, port = store_server()
    both = ranks(2, tmp_path / "run", *RANKS, "--epochs", "500", port=port)
    while both[0].board.read()[-1] < 2:
        assert both[0].process.exitcode is None, both[0].said()
    torchrun.kill()
    assert [run.end() for run in both] == [75, 75]
    assert re.search(r"error: stopped by the end of torchrun: \S+ is written", both[0].said()), both[0].said()


def test_a_rank_that_hangs_ends_when_torchrun_is_gone_too(tmp_path):
    both, torchrun = hanging(tmp_path, "5")
    while both[0].board.read()[-1] < 2:
        assert both[0].process.exitcode is None, both[0].said()
    torchrun.kill()
    assert [run.end() for run in both] == [1, 1]
    # the first one to end may break the other's connections before that has waited as long
    own = r"error: no progress of rank {} for 5 s, last seen in \S.*, after the end of"
    assert any(re.search(own.format(rank), run.said()) for rank, run in enumerate(both)), both[0].said()
    assert "in fault_on_purpose" in both[1].said()


def _arrive(found, port, rank):
    found[rank] = _agree(TCPStore("127.0.0.1", port, is_master=False), rank, 3, 30)


def test_words_of_an_earlier_start_are_not_taken_for_those_of_this_one():
    """torchrun's store outlives its workers: the second rank reads what a first one that was killed has left there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = TCPStore("127.0.0.1", port, is_master=True)
    names = []
    for _ in range(3):
        found = {}
        threads = [threading.Thread(target=_arrive, args=(found, port, rank)) for rank in range(3)]
        # the first rank comes last
        for thread in reversed(threads):
            thread.start()
            thread.join(0.1)
        for thread in threads:
            thread.join(30)
        assert len(found) == 3
        names.append(set(found.values()))
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] did not come within 0.1 s"):
        _agree(server, 0, 3, 0.1)


@pytest.mark.parametrize(("flags", "code", "words"), [(["--help"], 0, "--presets"), (["--epochs", "0"], 2, "--epochs")])
def test_help_and_errors_are_said_once(flags, code, words):
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    both = [
        forked.run(TRAIN, *flags, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, timeout=60) for rank in "01"
    ]
    assert [result.returncode for result in both] == [code, code]
    assert words in both[0].stdout + both[0].stderr
    assert both[1].stdout + both[1].stderr == ""

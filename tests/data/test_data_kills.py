"""Runs that DALI feeds are killed in mid-epoch, and go on with exactly the images that were not seen."""

import os
import random
import signal
from pathlib import Path

import pytest
from data_kills import IMAGES, command, kill_once, start, undisturbed
from image_folders import write_images
from kill_runs import wait_until

pytest.importorskip("nvidia.dali", reason="the extra `dali` is for Linux")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("ranks", "kills"), [(1, 1), pytest.param(2, 1, marks=pytest.mark.long)])
def test_killed_in_mid_epoch(tmp_path: Path, ranks: int, kills: int) -> None:
    """A few moments; `python tests/soak/data_kills.py --kills 20` takes more, and its results are in bench/results."""
    write_images(tmp_path / "data", IMAGES, (10, 10))
    whole, generator = undisturbed(tmp_path / "whole", tmp_path / "data", ranks), random.Random(ranks)
    moments = [kill_once(tmp_path / str(number), tmp_path / "data", ranks, generator, whole) for number in range(kills)]
    assert all(moment["taken_before"] > 0 for moment in moments)


def test_a_signal_to_all_processes(tmp_path: Path) -> None:
    """As a terminal and Slurm send it: those that decode, and the servers they come from, are needed until the end."""
    write_images(tmp_path / "data", IMAGES, (10, 10))
    run_dir, log = tmp_path / "run", tmp_path / "log"
    process = start([*command(tmp_path / "data", run_dir, 1, "torch"), "--epochs", "500"], tmp_path / "ids", log)
    checkpoints = run_dir / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("epoch-1.step-*")) or process.poll() is not None, "the second epoch")
    for number in (signal.SIGHUP, signal.SIGTERM):
        os.killpg(process.pid, number)
    assert process.wait(60) == 75, log.read_text()
    said = [line for line in log.read_text().splitlines() if ": error: " in line]
    assert len(said) == 1, said
    assert " is written; to go on: python " in said[0]

"""examples/slurm/train.sbatch with Slurm's two commands replaced by what they do on one node."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from places import EXAMPLES
from torch.distributed.run import get_args_parser

from awp_engine.cli.command_line import parse_train

SCRIPT = EXAMPLES / "slurm" / "train.sbatch"
WORKER = """
import pathlib, signal, sys
run_dir = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])

def save(number, frame):
    (run_dir / "heard").write_text(signal.Signals(number).name)
    sys.exit(75)

signal.signal(signal.SIGUSR1, save)
pathlib.Path("ready").write_text("ready\\n")  # a pipe
while True:
    signal.pause()
"""


@pytest.fixture
def job(tmp_path):
    """Starts the script; `srun` is the shell code of a step, whose arguments are those of `srun torchrun`."""
    commands = tmp_path / "commands"
    commands.mkdir()
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "train.py").write_text(WORKER)

    def command(name: str, code: str) -> None:
        (commands / name).write_text(f"#!/bin/bash\n{code}\n")
        (commands / name).chmod(0o755)

    command("scontrol", '[[ $1 == show ]] && echo localhost || echo "$@" > requeued')
    (commands / "torchrun").symlink_to(Path(sys.executable).parent / "torchrun")

    def start(srun: str, **environment: str) -> subprocess.Popen:
        command("srun", srun)
        slurm = {"JOB_ID": "4711", "JOB_NAME": "awp", "JOB_NUM_NODES": "1", "JOB_NODELIST": "localhost"}
        variables = {f"SLURM_{key}": value for key, value in slurm.items()} | {"NPROC": "1"} | environment
        return subprocess.Popen(
            ["bash", str(SCRIPT), "digits", "--seed", "3"],
            cwd=tmp_path,
            env=os.environ | variables | {"PATH": f"{commands}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_a_preempted_job_is_queued_again(job, tmp_path):
    os.mkfifo(tmp_path / "ready")
    process = job('while [[ $1 == -* ]]; do shift; done; exec "$@"')
    # blocks until the worker is there
    assert (tmp_path / "ready").read_text() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate(timeout=120)
    assert (tmp_path / "runs" / "awp-4711" / "heard").read_text() == "SIGUSR1"
    assert process.returncode == 0, error
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"


@pytest.mark.parametrize(
    ("step", "restarts", "code", "queued"),
    [
        ('touch "$run/report.json"', "0", 0, False),
        ("exit 1", "0", 1, False),
        ('mkdir "$run/checkpoint"; touch -d tomorrow "$run/checkpoint/manifest.json"; exit 1', "0", 0, True),
        ('mkdir "$run/checkpoint"; touch -d tomorrow "$run/checkpoint/manifest.json"; exit 1', "20", 1, False),
        ('mkdir "$run/checkpoint"; touch -d yesterday "$run/checkpoint/manifest.json"; exit 1', "0", 1, False),
        ("kill -TERM $PPID; exit 1", "0", 0, True),
    ],
    ids=["finished", "failed at once", "failed later", "too often", "no new checkpoint", "terminated"],
)
def test_what_is_queued_again(job, tmp_path, step, restarts, code, queued):
    process = job(f'echo "$@" > arguments; run="${{@: -1}}"; {step}', SLURM_RESTART_COUNT=restarts)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert (tmp_path / "requeued").exists() == queued
    assert len(error.splitlines()) == (code == 1)
    # what torchrun and the trainer are given, they know
    words = (tmp_path / "arguments").read_text().split()
    told = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert (told.nnodes, told.nproc_per_node, told.max_restarts, told.rdzv_backend) == ("1", "1", 3, "c10d")
    assert told.rdzv_endpoint == "localhost:24711"
    assert "SIGUSR1" in told.signals_to_handle.split(",")
    config = parse_train(told.training_script_args)
    assert (config.seed, config.run_dir) == (3, Path("runs/awp-4711"))


def test_it_is_a_shell_script_for_slurm():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    lines = SCRIPT.read_text().splitlines()
    code = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    # sbatch reads no option after the first command
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert options == [line for line in lines[:code] if line.startswith("#SBATCH")]
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@120", "#SBATCH --ntasks-per-node=1"} <= set(options)

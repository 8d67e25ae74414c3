"""Metrics, progress, TensorBoard events, the report and the curves; none of the first three may stop a run."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import small_tmpfs
from rich.console import Console

import awp_engine
from awp_engine.observe import report, run_log, tensorboard
from awp_engine.observe.metrics import MetricsFile, read_metrics
from awp_engine.observe.report import plot_learning_curves, print_table, source_commit, versions, write_report
from awp_engine.observe.run_log import RunLog

EPOCHS = 4


def run(
    run_dir: Path,
    *,
    start_epoch: int = 0,
    stop: int = EPOCHS,
    interval: float = 1e-9,
    console: Console | None = None,
    metrics: Callable[[int], dict[str, Any]] = lambda epoch: {"loss": 1 / epoch, "held_out_pgd_accuracy": epoch / 10},
) -> str:
    console = console or Console(file=io.StringIO())
    with RunLog(run_dir, "{}", EPOCHS, interval, start_epoch=start_epoch, console=console) as log:
        for epoch in range(start_epoch + 1, stop + 1):
            log.begin_epoch(epoch, 3)
            for _ in range(3):
                log.step(torch.tensor(0.5), 0.1, 128)
            log.end_epoch(epoch, metrics(epoch))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def events(run_dir: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def test_metrics_and_events_are_written(tmp_path: Path) -> None:
    run(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_metrics(tmp_path / "run")
    assert [entry["epoch"] for entry in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert events(tmp_path / "run", "loss") == [(n, pytest.approx(1 / n)) for n in range(1, 5)]


def test_each_epoch_is_on_disk_when_it_ends(tmp_path: Path) -> None:
    with RunLog(tmp_path, "{}", 2, 1.0, console=Console(file=io.StringIO())) as log:
        log.begin_epoch(1, 1)
        log.end_epoch(1, {"loss": 1.0})
        assert read_metrics(tmp_path) == [{"epoch": 1, "loss": 1.0}]


def test_going_on_drops_later_epochs_and_torn_lines(tmp_path: Path) -> None:
    run(tmp_path, stop=3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "lo')
    run(tmp_path, start_epoch=1, metrics=lambda epoch: {"loss": -float(epoch)})
    assert [(entry["epoch"], entry["loss"]) for entry in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, -2),
        (3, -3),
        (4, -4),
    ]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [step for step, _ in events(tmp_path, "loss")] == [1, 2, 3, 4]


def test_metrics_that_are_not_finite_become_null(tmp_path: Path) -> None:
    run(tmp_path, stop=1, metrics=lambda epoch: {"loss": float("nan"), "lr": float("inf"), "clean": None})
    assert read_metrics(tmp_path) == [{"epoch": 1, "loss": None, "lr": None, "clean": None}]


def test_plain_lines_come_once_an_interval_and_for_every_evaluated_epoch(tmp_path: Path) -> None:
    evaluated = {2: {"held_out_pgd_accuracy": 0.25}}
    text = run(tmp_path, interval=3600, metrics=lambda epoch: {"loss": 1 / epoch, **evaluated.get(epoch, {})})
    caption, head, *rows = text.splitlines()
    assert "best held-out PGD" in caption
    assert head.split() == ["epoch", "loss", "lr", "train", "PGD", "held-out", "clean", "held-out", "PGD", "time"]
    # the second was evaluated, the fourth is the last one
    assert [row.split() for row in rows] == [
        ["2/4", "0.5000", "-", "-", "-", "25.00%", "-"],
        ["4/4", "0.2500", "-", "-", "-", "-", "-"],
    ]
    text = run(tmp_path, interval=1e-9)
    assert len(text.splitlines()) == EPOCHS * 4 + 2
    first = text.splitlines()[0]
    assert first.startswith("epoch 1/4 step 1/3  loss 0.5000  ")
    assert re.search(r" img/s  \d+:\d\d left$", first)
    assert "\x1b" not in text


def test_a_long_line_is_not_folded(tmp_path: Path) -> None:
    file = io.StringIO()
    with RunLog(tmp_path, "{}", 1, 3600, console=Console(file=file, width=80)) as log:
        log.message("/".join(["directory"] * 30))
    assert len(file.getvalue().splitlines()) == 1


def test_terminal_shows_a_bar_and_the_epochs(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    original = run_log._REDRAW_SECONDS
    try:
        run_log._REDRAW_SECONDS = 0.0
        text = run(tmp_path, console=console)
    finally:
        run_log._REDRAW_SECONDS = original
    for part in ("epoch 4/4", "step 3/3", "loss 0.5000", "img/s", "left", "40.00%"):
        assert part in text


class Loss:
    reads = 0

    def __float__(self) -> float:
        self.reads += 1
        return 1.0


def test_a_loss_is_read_only_when_it_is_shown(tmp_path: Path) -> None:
    loss = Loss()
    with RunLog(tmp_path, "{}", 1, 3600, console=Console(file=io.StringIO())) as log:
        log.begin_epoch(1, 50)
        for _ in range(50):
            log.step(loss, 0.1, 1)
    assert loss.reads == 0


def test_a_file_in_place_of_the_events_does_not_stop_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("mine")
    run(tmp_path)
    assert len(read_metrics(tmp_path)) == EPOCHS
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: TensorBoard events in {tmp_path / 'tensorboard'} stop here")


def test_missing_tensorboard_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    run(tmp_path)
    assert len(read_metrics(tmp_path)) == EPOCHS
    assert capsys.readouterr().err.startswith("warning: TensorBoard events in ")


def test_a_writer_that_raises_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("broken\nwriter")

    monkeypatch.setattr(tensorboard._Events, "write", broken)
    run(tmp_path)
    assert len(read_metrics(tmp_path)) == EPOCHS
    assert capsys.readouterr().err.count("\n") == 1


def test_a_writer_that_blocks_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    release = threading.Event()
    monkeypatch.setattr(tensorboard._Events, "write", lambda *args, **kwargs: release.wait(60))
    monkeypatch.setattr(run_log, "_CLOSE_SECONDS", 0.1)
    began = time.monotonic()
    try:
        with RunLog(tmp_path, "{}", 200, 3600, console=Console(file=io.StringIO())) as log:
            for epoch in range(1, 201):
                log.end_epoch(epoch, {"loss": 1.0})
        assert time.monotonic() - began < 20
    finally:
        release.set()
    assert len(read_metrics(tmp_path)) == 200
    directory = tmp_path / "tensorboard"
    expected = f"warning: TensorBoard events in {directory} are not written in time; the last ones are left out\n"
    assert capsys.readouterr().err == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_tmpfs(tmp_path, "64k") as mount:
        yield mount


def test_a_full_disk_does_not_stop_training(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(small_disk, "{}", 300, 3600, console=Console(file=io.StringIO())) as log:
        for epoch in range(1, 301):
            log.begin_epoch(epoch, 1)
            log.end_epoch(epoch, {f"metric_{n}": 1.0 for n in range(60)})
    kept = (small_disk / "metrics.jsonl").read_text()
    # Whole lines up to where the disk was full.
    assert kept.endswith("\n")
    assert 0 < len(read_metrics(small_disk)) == len(kept.splitlines()) < 300
    errors = capsys.readouterr().err
    assert "warning: metrics: cannot be written, training goes on: " in errors
    assert "warning: TensorBoard events in " in errors
    assert errors.count("\n") == 2


def test_a_full_standard_output_does_not_stop_training(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from awp_engine.observe.run_log import RunLog
with RunLog(Path(sys.argv[1]), "{}", 3, 1e-9) as log:
    for epoch in (1, 2, 3):
        log.begin_epoch(epoch, 1)
        log.step(1.0, 0.1, 1)
        log.end_epoch(epoch, {"loss": 1.0})
os._exit(0)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            timeout=120,
            check=False,
        )
    assert result.returncode == 0
    assert result.stderr.count("warning: console: cannot be written") == 1
    assert "Traceback" not in result.stderr
    assert len(read_metrics(tmp_path)) == 3


TRAIN = """
import sys
from pathlib import Path
import tensorboard.plugins.text.summary_v2, tensorboard.summary.writer.record_writer  # slow on a busy machine
from awp_engine.observe import run_log
run_log._CLOSE_SECONDS = 0.2
with run_log.RunLog(Path(sys.argv[1]), "{}", 800, 1e-9) as log:
    for epoch in range(1, 801):
        log.begin_epoch(epoch, 1)
        log.step(1.0, 0.1, 1)
        log.message("x" * 200)
        log.end_epoch(epoch, {"loss": 1.0})
print("the last word")
"""


def train(run_dir: Path, **streams: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TRAIN, str(run_dir)]
    return subprocess.run(command, text=True, env=environment, timeout=120, check=False, **streams)


def test_a_standard_output_that_nobody_reads_does_not_block_training(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    try:
        result = train(tmp_path, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
        os.close(reader)
    assert result.returncode == 0
    assert result.stderr.splitlines() == [
        "warning: console: is not written in time, training goes on; some of it is left out"
    ]
    assert len(read_metrics(tmp_path)) == 800


def test_standard_output_and_error_that_nobody_reads_do_not_block_training(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    (tmp_path / "tensorboard").write_text("in the way: a warning more")
    try:
        result = train(tmp_path, stdout=writer, stderr=writer)
    finally:
        os.close(writer)
        os.close(reader)
    assert result.returncode == 0
    assert len(read_metrics(tmp_path)) == 800


def test_a_standard_output_whose_reader_left_does_not_stop_training(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = train(tmp_path, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert result.returncode == 0
    assert result.stderr.splitlines() == [
        "warning: console: cannot be written, training goes on: [Errno 32] Broken pipe"
    ]
    assert len(read_metrics(tmp_path)) == 800


def test_a_console_that_raises_does_not_stop_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(io.StringIO):
        def write(self, text: str, /) -> int:
            raise RuntimeError("broken\nconsole")

    with RunLog(tmp_path, "{}", 2, 1e-9, console=Console(file=Broken())) as log:
        for epoch in (1, 2):
            log.begin_epoch(epoch, 1)
            log.step(1.0, 0.1, 1)
            log.end_epoch(epoch, {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 2
    assert capsys.readouterr().err == "warning: console: cannot be written, training goes on: broken console\n"


@pytest.mark.parametrize("read", [False, True])
def test_a_named_pipe_in_place_of_the_metrics(tmp_path: Path, read: bool, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    reader = os.open(tmp_path / "metrics.jsonl", os.O_RDONLY | os.O_NONBLOCK) if read else None
    run(tmp_path)
    if reader is not None:
        os.close(reader)
    assert read_metrics(tmp_path) == []
    error = capsys.readouterr().err
    assert error.startswith("warning: metrics: cannot be written, training goes on: ")
    assert error.count("\n") == 1


def test_metrics_that_are_never_written_delay_training_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A file system that hangs cannot be had: the call that would hang in it.
    release = threading.Event()
    monkeypatch.setattr(MetricsFile, "append", lambda *args: release.wait(60))
    monkeypatch.setattr(run_log, "_METRICS_SECONDS", 0.1)
    monkeypatch.setattr(run_log, "_CLOSE_SECONDS", 0.1)
    began = time.monotonic()
    try:
        with RunLog(tmp_path, "{}", 2000, 3600, console=Console(file=io.StringIO())) as log:
            for epoch in range(1, 2001):
                log.end_epoch(epoch, {"loss": 1.0})
        assert time.monotonic() - began < 20
    finally:
        release.set()
    warnings = capsys.readouterr().err.splitlines()
    assert "warning: metrics: is not written in time, training goes on; some of it is left out" in warnings


def test_a_terminal_that_is_not_read_does_not_block_training(tmp_path: Path) -> None:
    import pty

    master, slave = pty.openpty()
    code = TRAIN.replace('print("the last word")', "import os; os._exit(0)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
    try:
        command = [sys.executable, "-c", code, str(tmp_path)]
        result = subprocess.run(command, stdout=slave, stderr=slave, env=environment, timeout=120, check=False)
    finally:
        os.close(slave)
        os.close(master)
    assert result.returncode == 0
    assert len(read_metrics(tmp_path)) == 800


FIELDS = {
    "clean_accuracy": 0.97,
    "pgd20_accuracy": 0.7,
    "train_pgd_accuracy": float("nan"),
    "seconds": 3.5,
    "epochs": 30,
    "config_hash": "0" * 64,
}


def test_report(tmp_path: Path) -> None:
    path = write_report(tmp_path, {**FIELDS, "run_dir": tmp_path})
    found = json.loads(path.read_text())
    assert path == tmp_path / "report.json"
    assert found["clean_accuracy"] == 0.97
    assert found["train_pgd_accuracy"] is None
    assert found["run_dir"] == str(tmp_path)
    assert found["versions"] == versions()
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["commit"] == source_commit()
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_an_incomplete_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="missing pgd20_accuracy"):
        write_report(tmp_path, {key: value for key, value in FIELDS.items() if key != "pgd20_accuracy"})


def test_commit_is_that_of_the_source_tree_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tmp_path / "tree"
    module = Path(report.__file__).relative_to(Path(awp_engine.__file__).parent)
    file = tree / "engine" / "awp_engine" / module
    file.parent.mkdir(parents=True)
    file.write_text("x")
    monkeypatch.setattr(report, "__file__", str(file))
    assert source_commit() is None
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", str(tree), *command], check=True)
    head = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert source_commit() == head.stdout.strip()
    file.write_text("y")
    assert source_commit() == head.stdout.strip() + "-dirty"
    # Installed into an environment inside somebody's repository.
    monkeypatch.setattr(report, "__file__", str(tree / "venv" / "awp_engine" / module))
    assert source_commit() is None


def curve(epochs: int) -> list[dict[str, Any]]:
    return [
        {
            "epoch": n,
            "loss": 2 / n + 0.3,
            "lr": 0.1 if n < epochs / 2 else 0.01,
            "train_pgd_accuracy": 0.9 - 0.7 / n,
            "held_out_clean_accuracy": 0.97 - 0.5 / n if n % 2 else None,
            "held_out_pgd_accuracy": 0.8 - 0.6 / n if n % 2 else None,
        }
        for n in range(1, epochs + 1)
    ]


@pytest.mark.parametrize("epochs", [0, 1, 30, 200])
def test_learning_curves_are_drawn(tmp_path: Path, epochs: int) -> None:
    path = plot_learning_curves(tmp_path, curve(epochs), selected_epoch=epochs or None)
    assert path.name == "learning_curves.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 10_000
    assert [file.name for file in tmp_path.iterdir()] == ["learning_curves.png"]


ROWS = [{"model": "AT-AWP", "clean": "97.2%", "PGD-20": "70.1%"}, {"model": "AT", "clean": "7.0%", "PGD-20": "1%"}]


def test_table_is_plain_text_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO())
    print_table(ROWS, title="test split", console=console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "test split",
        "model   clean  PGD-20",
        "AT-AWP  97.2%   70.1%",
        "AT       7.0%      1%",
    ]


def test_table_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    print_table(ROWS, title="test split", console=console)
    assert isinstance(console.file, io.StringIO)
    assert all(cell in console.file.getvalue() for cell in ("test split", "97.2%", "PGD-20"))

"""--log: TensorBoard, wandb, mlflow and trackio get every number, go on with their run, and can stop nothing."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from awp_engine.cli.command_line import parse_train
from awp_engine.config import ConfigError, config_hash, to_json
from awp_engine.config.identity import ADDED, from_json
from awp_engine.observe import run_log, trackers
from awp_engine.observe.report import plot_learning_curves
from awp_engine.observe.run_log import RunLog
from awp_engine.observe.trackers import ServiceTracker, require_trackers

CONFIG = to_json(parse_train(["--awp.gamma", "0.00625"]))
REPORT = {"clean_accuracy": 0.5, "last": {"clean_accuracy": 0.25}, "method": "at", "whole": True}


def run(run_dir: Path, *names: str, epochs: tuple[int, ...] = (1, 2), done: bool = True) -> None:
    """A log of a few epochs, as the trainer has it."""
    console = Console(file=io.StringIO())
    with RunLog(run_dir, CONFIG, 4, 3600, start_epoch=epochs[0] - 1, console=console, trackers=names) as log:
        for epoch in epochs:
            log.begin_epoch(epoch, 1)
            log.end_epoch(epoch, {"loss": 1 / epoch, "held_out_pgd_accuracy": epoch / 10, "lr": float("nan")})
        if done:
            curves = plot_learning_curves(run_dir, [{"epoch": 1, "loss": 1.0, "lr": 0.1}])
            (run_dir / "report.json").write_text("{}")
            log.finish(REPORT, [curves, run_dir / "report.json", run_dir / "missing.png"])


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory, where every service stays on this machine."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    # a machine that others use too
    monkeypatch.setattr(run_log, "_CLOSE_SECONDS", 100.0)
    return tmp_path / "run"


def identity(run_dir: Path, name: str) -> str:
    return json.loads((run_dir / f"{name}.json").read_text())["run"]


def twice(run_dir: Path, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """A run that is stopped after two epochs and goes on; its name, which stays."""
    require_trackers([name])
    run(run_dir, name, done=False)
    first = identity(run_dir, name)
    run(run_dir, name, epochs=(3, 4))
    assert identity(run_dir, name) == first
    assert capsys.readouterr().err == ""
    return first


def test_wandb_offline(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    name = twice(offline, "wandb", capsys)
    files = sorted((offline / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2
    first, second = (file.read_bytes() for file in files)
    assert all(text in first for text in (b"held_out_pgd_accuracy", b"0.00625"))
    assert b"report/clean_accuracy" not in first
    assert b"report/last/clean_accuracy" in second
    assert list(files[1].parent.glob("files/media/images/learning_curves*.png"))


def test_wandb_without_an_account_is_refused_before_the_training(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(ConfigError, match=r"^--log wandb: not logged in: run `wandb login`, or set WANDB_MODE=offline"):
        require_trackers(["tensorboard", "wandb"])


def test_mlflow_in_the_run_directory(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mlflow = pytest.importorskip("mlflow")
    name = twice(offline, "mlflow", capsys)
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    try:
        client = mlflow.MlflowClient(json.loads((offline / "mlflow.json").read_text())["where"])
        found = client.get_run(name)
        assert [(m.step, m.value) for m in client.get_metric_history(name, "held_out_pgd_accuracy")] == [
            (1, 0.1),
            (2, 0.2),
            (3, pytest.approx(0.3)),
            (4, 0.4),
        ]
        assert {file.path for file in client.list_artifacts(name)} == {"learning_curves.png", "report.json"}
    finally:
        del os.environ["MLFLOW_ALLOW_FILE_STORE"]
    assert (found.info.status, found.data.params["awp.gamma"]) == ("FINISHED", "0.00625")
    assert found.data.metrics["report/last/clean_accuracy"] == 0.25


def test_trackio_on_this_machine(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trackio = pytest.importorskip("trackio.sqlite_storage")
    name = twice(offline, "trackio", capsys)
    trackio.TRACKIO_DIR = offline.parent / "trackio"
    logs = trackio.SQLiteStorage.get_logs("awp-engine", name)
    assert [entry["held_out_pgd_accuracy"] for entry in logs if "loss" in entry] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert logs[-1]["report/last/clean_accuracy"] == 0.25


def test_tensorboard_gets_the_report_and_the_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "tensorboard")
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (scalar,) = found.Scalars("report/last/clean_accuracy")
    assert (scalar.step, scalar.value) == (2, 0.25)
    (picture,) = found.Images("learning_curves")
    assert picture.encoded_image_string == (tmp_path / "learning_curves.png").read_bytes()


def test_none_logs_nowhere_else(tmp_path: Path) -> None:
    run(tmp_path, "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learning_curves.png", "metrics.jsonl", "report.json"]


# a service that fails as its name says: one that hangs or crashes cannot be had for real
FAULTY = """
import os, time
from types import SimpleNamespace
fault = os.environ["FAULT"]
if fault == "import":
    raise ImportError("libssl.so.9 is missing")
def setup():
    return SimpleNamespace(settings=SimpleNamespace(mode="offline"))
def Settings(**settings):
    print("chatter that is nobody's answer")
class Run:
    id, url, dir, summary = "abc", None, "/x/files", {}
    def log(self, values, step):
        if fault == "log":
            raise ValueError("two\\nlines")
        if fault == "crash":
            os._exit(7)
        if fault == "hang":
            time.sleep(60)
    def finish(self, exit_code):
        pass
def init(**settings):
    if fault == "start":
        raise RuntimeError("no such project")
    return Run()
def Image(path):
    return path
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("start", "wandb: cannot be written, training goes on: RuntimeError: no such project"),
        ("log", "wandb: cannot be written, training goes on: ValueError: two lines"),
        ("crash", "wandb: cannot be written, training goes on: its process ended with code 7"),
        ("hang", "wandb: takes longer than the training; its process ends alone, in minutes"),
    ],
)
def test_a_service_that_fails_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str, said: str
) -> None:
    (tmp_path / "wandb.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setattr(run_log, "_CLOSE_SECONDS", 0.5 if fault == "hang" else 10.0)
    started: list[Any] = []
    start = trackers._start_process
    monkeypatch.setattr(trackers, "_start_process", lambda name: started.append(start(name)) or started[-1])
    run(tmp_path / "run", "wandb")
    assert capsys.readouterr().err == f"warning: {said}\n"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    for process in started:
        process.kill()
        process.wait()


def test_what_cannot_be_used_is_refused_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"^--log mlflow trackio: not installed; pip install mlflow-skinny trackio, or"
    ):
        require_trackers(["mlflow", "tensorboard", "trackio"])
    monkeypatch.undo()
    (tmp_path / "wandb.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("FAULT", "import")
    with pytest.raises(ConfigError, match=r"^--log wandb: ImportError: libssl\.so\.9 is missing$"):
        require_trackers(["wandb"])


def test_a_damaged_name_of_the_run_begins_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wandb.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("FAULT", "none")
    (tmp_path / "wandb.json").write_text("[1")
    said: list[str] = []
    tracker = ServiceTracker("wandb", tmp_path, {}, said.append)
    tracker.close(20.0)
    assert said == []
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"run": "abc", "where": "/x"}


def test_where_a_run_logs_does_not_tell_two_runs_apart() -> None:
    base = parse_train([])
    assert base.log == tuple(ADDED["log"]) == ("tensorboard",)
    assert parse_train(["--log"]).log == ()
    other = parse_train(["--log", "wandb", "mlflow"])
    assert other.log == ("wandb", "mlflow")
    assert config_hash(other) == config_hash(base)
    # what runs of earlier versions say
    older = json.loads(to_json(base))
    del older["log"]
    assert from_json(json.dumps(older)) == base

"""What a run prints: two lines about itself, a row of 80 columns an epoch, what comes next; and runs that go on."""

import io
import json
import os
import pty
import re
import shlex
import sys
import threading
from pathlib import Path

import pytest
import torch
from commands import run_command
from rich.cells import cell_len

from awp_engine import checkpoint
from awp_engine.cli.command_line import command_again, parse_train
from awp_engine.config import ConfigError, load_config
from awp_engine.observe.report import REPORT
from awp_engine.observe.rows import caption, head, row
from awp_engine.observe.warnings import gradient_masking
from awp_engine.train.banner import banner
from awp_engine.train.run_dir import finished_report
from awp_engine.train.trainer import Trainer
from awp_kernels import _backend

# small, of one step an epoch
TINY = ["--model.width", "1", "--data.train-limit", "100", "--attack.steps", "1", "--evaluation.steps", "2"]
TINY += ["--device", "cpu", "--log", "none"]
STEPS = [*TINY, "--optimizer.schedule", "piecewise", "--evaluation.evaluate-every", "1"]
LONG = "a run directory with a name that is longer than what the second line of eighty columns has left"


def train(run_dir: Path, *flags: str) -> int:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_command("train", monkeypatch, *flags, "--run-dir", run_dir)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of four epochs that was then given six, and one of six from the start."""
    runs = tmp_path_factory.mktemp("runs")
    short, whole = runs / "short", runs / "whole"
    assert train(short, *STEPS, "--epochs", "4", "--optimizer.milestones", "0.5") == 0
    more = ["--config", str(short / "config.json"), "--epochs", "6", "--optimizer.milestones", "2"]
    assert train(short, *more) == 0
    assert train(whole, *STEPS, "--epochs", "6", "--optimizer.milestones", "2") == 0
    return short, whole


def test_a_run_that_is_given_more_epochs_has_the_bits_of_a_longer_one(grown: tuple[Path, Path]) -> None:
    found = [checkpoint.load_latest(run / "checkpoints") for run in grown]
    short, whole = [one for one in found if one is not None]
    assert short.state["epoch"] == 6
    assert {key: value for key, value in short.state.items() if key != "seconds"} == {
        key: value for key, value in whole.state.items() if key != "seconds"
    }
    for group, tensors in whole.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, short.tensors[group][name]), f"{group} {name}"
    # and says so of itself; what it was before is kept
    assert load_config(grown[0] / "config.json").epochs == 6
    assert load_config(grown[0] / "config-4-epochs.json").epochs == 4
    assert json.loads((grown[0] / REPORT).read_text())["epochs"] == 6


def test_a_longer_run_killed_before_its_first_checkpoint_goes_on(tmp_path: Path) -> None:
    flags = [*STEPS, "--optimizer.schedule", "constant", "--run-dir", str(tmp_path)]
    Trainer(parse_train([*flags, "--epochs", "1"])).run()
    # config.json has more epochs now than the checkpoint was written under
    longer = parse_train([*flags, "--epochs", "2"])
    Trainer(longer)
    assert load_config(tmp_path / "config.json").epochs == 2
    trainer = Trainer(longer)
    assert trainer.progress.epoch == 1
    assert finished_report(longer) is None
    trainer.run()
    assert finished_report(longer) is not None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "--optimizer.schedule cosine",
            r"1 epochs and cannot be given 3: its learning rate falls over all epochs .*; give --epochs 1 to go on",
        ),
        (
            "--optimizer.milestones 0.5",
            "the rate of .* fell at other epochs; .* --epochs 3 --optimizer.milestones 0.333",
        ),
        ("--optimizer.schedule constant --average.kind swa", "its average begins after a part of all epochs"),
        (
            "--optimizer.schedule constant --method adr --average.kind ema --average.statistics live",
            "its loss changes over all epochs",
        ),
        ("--optimizer.schedule constant --method liet", "its loss changes over all epochs"),
    ],
)
def test_more_epochs_are_refused_where_the_first_ones_would_have_been_others(
    tmp_path: Path, flags: str, said: str
) -> None:
    epochs = "2" if "milestones" in flags else "1"
    first = [*STEPS, *flags.split(), "--run-dir", str(tmp_path)]
    Trainer(parse_train([*first, "--epochs", epochs]))
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError, match=said):
        Trainer(parse_train([*first, "--epochs", "3"]))
    assert (tmp_path / "config.json").read_text() == before


def test_milestones_are_fractions_or_epochs() -> None:
    optimizer = parse_train(["--optimizer.milestones", "100", "150"]).optimizer
    assert optimizer.milestone_epochs(7) == [100, 150]
    assert parse_train(["--optimizer.milestones", "0.5", "0.7"]).optimizer.milestone_epochs(30) == [15, 21]
    for wrong in ("0.5 100", "100.5", "100 50", "1 2"):
        with pytest.raises(SystemExit):
            parse_train(["--optimizer.milestones", *wrong.split()])


def test_a_finished_run_shows_its_table_again_and_how_to_go_on(
    grown: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    report = (grown[0] / REPORT).stat()
    flags = [*STEPS, "--epochs", "6", "--optimizer.milestones", "2"]
    assert train(grown[0], *flags) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"finished: {grown[0]} has all its 6 epochs; for more: python train.py --config ")
    assert said[0].endswith("--epochs 12")
    assert said[1] == "digits test split, linf epsilon 0.2"
    assert "measuring" not in "".join(said)
    assert (grown[0] / REPORT).stat() == report
    # another part of the test split was not measured yet
    assert train(grown[0], *flags, "--evaluation.test-limit", "50") == 0
    assert "measuring on 50 test images" in capsys.readouterr().out
    # and what is no report of this run is none
    for text in ("{", "[]", '{"clean_accuracy": "1"}'):
        (grown[0] / REPORT).write_text(text)
        assert finished_report(load_config(grown[0] / "config.json")) is None


def test_what_is_piped_has_every_evaluated_epoch_and_no_zeros(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, "--epochs", "5", "--evaluation.evaluate-every", "2"]
    assert train(tmp_path / LONG, *flags) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"AT-AWP of preact-resnet-digits \([0-9,]+ parameters\) on digits, linf epsilon 0.2", said[0])
    assert re.fullmatch(r"CPU, \d+ threads?, fp32(, attack bf16)?, C\+\+ operations", said[1])
    assert said[2] == f"run directory {tmp_path / LONG}"
    assert said[3] == "100 training, 144 held-out and 360 test images of 10 classes"
    table = said.index(head(5))
    assert said[table - 1] == caption("PGD")
    assert [line.split()[0] for line in said[table + 1 : table + 4]] == ["2/5", "4/5", "5/5"]
    assert any(line.split()[-2] == "*" for line in said[table + 1 : table + 4])
    assert not any(word in "".join(said) for word in ("skipped", "zero", "finite"))
    run = shlex.quote(str(tmp_path / LONG))
    assert said[-3:] == [
        "next:",
        f"  python -m awp_engine evaluate {run} --attacks clean pgd100 autoattack",
        f"  python -m awp_engine compare {run} OTHER_RUN",
    ]
    # all but sentences fits
    told = ("AWP perturbs", "clean accuracy")
    assert all(len(line) <= 80 for line in said if LONG not in line and not line.startswith(told))


class Terminal(io.TextIOWrapper):
    """Standard output as a terminal has it, read by a thread."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        super().__init__(io.FileIO(slave, "w"), encoding="utf-8", write_through=True)
        self.seen = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._master, 1 << 16):
                self.seen += part
        except OSError:
            # how Linux says that the other side is closed
            return

    def text(self) -> str:
        self.close()
        self._reader.join(10)
        os.close(self._master)
        return self.seen.decode()


def test_a_terminal_of_80_columns_folds_nothing_and_the_bar_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("awp_engine.observe.run_log._REDRAW_SECONDS", 0.0)
    monkeypatch.setattr("awp_engine.observe.run_log._REDRAWS", 500)
    for name, value in {"COLUMNS": "80", "LINES": "24", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    flags = ["--evaluation.steps", "20", "--epochs", "3", "--run-dir", "run"]
    assert run_command("train", monkeypatch, *TINY, *flags) == 0
    text = terminal.text()
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))
    assert max(map(cell_len, lines)) <= 80
    assert any(line.startswith("3/3 ") for line in map(str.strip, lines))
    for kind, images in (("held-out", "144"), ("test", "360"), ("training", "100")):
        parts = set(re.findall(rf"measuring on {images} {kind} images .*? (\d+)%", "\n".join(lines)))
        assert len(parts) >= 2, f"{kind}: the bar stood still at {parts}"


def test_rows_are_aligned_and_fit_whatever_the_numbers_are() -> None:
    large = {"loss": 123456.7, "lr": 1.234e-10, "seconds": 359999.0}
    large |= {f"{name}_accuracy": 1.0 for name in ("train_pgd", "held_out_clean", "held_out_pgd")}
    for epochs in (1, 50, 200, 9999):
        lines = [
            head(epochs),
            row(epochs, epochs, large, best=True),
            row(1, epochs, {"loss": float("nan"), "seconds": 1.0}, best=False),
        ]
        assert max(map(len, lines)) <= 80 + 2 * (epochs > 999)
        assert {line.index(text) + len(text) for line, text in zip(lines, ("train PGD", "100.00%", " - "), strict=True)}
    assert row(7, 50, {"loss": 0.5, "lr": 0.1, "seconds": 75.0}, best=False).split()[-1] == "1:15"


def test_some_zero_gradients_are_said_and_few_are_not() -> None:
    assert gradient_masking({"epoch": 3, "zero_gradients": 0.001}) is None
    assert gradient_masking({"epoch": 3, "zero_gradients": 0.07}) == (
        "7% of the attack's input gradients are exactly zero in epoch 3"
    )
    assert "gradient masking" in (gradient_masking({"epoch": 3, "zero_gradients": 0.3}) or "")


def test_the_banner_says_that_the_library_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(parse_train([*TINY, "--run-dir", str(tmp_path), "--precision.attack", "bf16"]))
    monkeypatch.setattr(_backend, "_library_problem", "cmake was not found at installation: install cmake")
    monkeypatch.setattr(_backend, "problem", _backend.problem.__wrapped__)
    monkeypatch.setattr("awp_engine.train.banner.problem", _backend.problem)
    assert "plain PyTorch: the C++ library was not built" in banner(trainer)[1]
    assert banner(trainer)[-1] == "slower than it could be: cmake was not found at installation: install cmake"
    # names are whole, whatever their length
    for name in ("own_package.models.networks:" + "x" * 200, "a-model"):
        object.__setattr__(trainer.config.model, "name", name)
        model = next(line for line in banner(trainer) if name in line)
        assert model.endswith("parameters)") == (len(name) > 100)
    # but of a path the end is enough
    object.__setattr__(trainer.config.model, "name", "/home/somebody/projects/robust" * 3 + "/nets.py:make_network")
    assert "AT-AWP of …/" in banner(trainer)[0]
    assert "/nets.py:make_network (" in banner(trainer)[0]
    assert all(len(line) <= 80 for line in banner(trainer)[:2])
    assert banner(trainer)[1] == "on digits, linf epsilon 0.2"


def test_cpu_threads_are_no_part_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    for threads in (before + 1, before + 2):
        assert train(tmp_path, *TINY, "--epochs", "1", "--threads", str(threads)) == 0
        assert torch.get_num_threads() == before
    told = capsys.readouterr().out
    assert f"CPU, {before + 1} threads" in told
    assert "has all its 1 epochs" in told


def test_the_command_to_go_on_is_the_one_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["digits-at", "--data.root", "my data", "--seed", "3"]
    assert command_again("awp train", given) == "awp train digits-at --data.root 'my data' --seed 3"
    assert shlex.split(command_again("awp train", given))[2:] == given
    monkeypatch.setattr(sys, "argv", ["engine/train.py"])
    assert command_again("train.py", []) == "python engine/train.py"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_again("train.py", []) == "torchrun --nproc-per-node=2 engine/train.py"
    assert command_again("python -m awp_engine.cli.train", []) == "torchrun --nproc-per-node=2 -m awp_engine.cli.train"

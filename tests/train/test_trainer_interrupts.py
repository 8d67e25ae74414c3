"""A Trainer used as a library, in a notebook say: SIGINT between any two lines leaves nothing moved and a run to go on.

`AWP_INTERRUPTS=600 pytest -n 0 tests/train/test_trainer_interrupts.py` interrupts at every line.
"""

import collections
import hashlib
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from kill_runs import SMALL, differences, outcome

from awp_engine.checkpoint import background
from awp_engine.cli.command_line import parse_train
from awp_engine.observe.regions import listening
from awp_engine.optim import average, optimizer
from awp_engine.step import awp_step, passes, update
from awp_engine.train import selection, state, trainer
from awp_engine.train.trainer import Trainer, TrainingError

COUNT = int(os.environ.get("AWP_INTERRUPTS", "12"))
FILES = {
    module.__file__ for module in (average, optimizer, awp_step, passes, update, trainer, state, selection, background)
}

Line = tuple[str, int]


def make(run_dir: Path) -> Trainer:
    return Trainer(parse_train([*SMALL, "--epochs", "2", "--run-dir", str(run_dir)]))


def digest(of: Trainer) -> str:
    hashed = hashlib.sha256()
    for parameter in of.model.parameters():
        hashed.update(parameter.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def run(trainer: Trainer, at_line: Callable[[Line], None]) -> None:
    """`Trainer.run`, with `at_line` called before every line of this thread."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            at_line((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        trainer.run()
    finally:
        sys.settrace(before)


def test_an_interrupt_between_any_two_lines(tmp_path):
    undisturbed = make(tmp_path / "undisturbed")
    # weights between two steps, and those that were selected
    states = {digest(undisturbed)}
    lines: collections.Counter[Line] = collections.Counter()
    with listening(lambda part, begins: states.add(digest(undisturbed)) if part in ("update", "data") else None):
        run(undisturbed, lambda line: lines.update([line]))
    whole = outcome(tmp_path / "undisturbed")
    assert len(lines) > 300
    draw = random.Random(5)
    interrupted = finished = 0
    for line in draw.sample(sorted(lines), min(COUNT, len(lines))):
        left = draw.randint(1, min(lines[line], 5))

        def interrupt(here: Line, line: Line = line) -> None:
            nonlocal left
            left -= here == line
            if here == line and left == 0:
                signal.raise_signal(signal.SIGINT)

        again = make(tmp_path / f"run{finished}")
        try:
            run(again, interrupt)
            # that line is not for what is left of this run
            assert differences(tmp_path / f"run{finished}", whole) == []
            finished += 1
        except KeyboardInterrupt:
            interrupted += 1
            assert digest(again) in states, line
    make(tmp_path / f"run{finished}").run()
    assert differences(tmp_path / f"run{finished}", whole) == []
    assert interrupted >= COUNT // 3


def test_an_interrupted_trainer_says_that_another_one_goes_on(tmp_path):
    again = make(tmp_path)
    left = 300

    def interrupt(_: Line) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(again, interrupt)
    with pytest.raises(TrainingError, match="make another one, which goes on"):
        again.run()

"""`awp train [PRESET] [flags]`: trains a robust classifier; `torchrun -m awp_engine.cli.train` on several GPUs."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from typing import TYPE_CHECKING

from awp_engine.cli.command_line import command_again, fail, other_command, parse_train
from awp_engine.config import Config, ConfigError
from awp_engine.config.data_sets import is_own
from awp_engine.config.identity import longer_flags, why_not_longer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from awp_engine.distributed.ranks import Ranks
    from awp_engine.distributed.signals import StopRequest
    from awp_engine.train.run import Trained


def rows(config: Config, ranks: Ranks, stop: StopRequest) -> Iterator[Trained]:
    """Train, and train again without the weight perturbation if that was asked for."""
    # which imports torch
    from awp_engine.train.run import train

    yield train(config, ranks, stop)
    if config.compare_without_awp:
        without = dataclasses.replace(
            config,
            awp=dataclasses.replace(config.awp, gamma=0.0),
            compare_without_awp=False,
            run_dir=config.resolved_run_dir / "without-awp",
        )
        yield train(without, ranks, stop)
        if ranks.is_first:
            from awp_engine.compare.curves import draw_runs
            from awp_engine.observe.drawing import attempt
            from awp_engine.observe.report import CURVES

            run_dir = config.resolved_run_dir
            attempt(str(run_dir / CURVES), lambda: draw_runs([run_dir, without.resolved_run_dir], run_dir), print)


def finished(config: Config, epochs: int, prog: str) -> str:
    """That a run has ended, and how it could go on."""
    run_dir = config.resolved_run_dir
    if epochs < config.epochs:
        return f"finished: --evaluation.patience stopped {run_dir} after epoch {epochs}"
    if reason := why_not_longer(config):
        return f"finished: {run_dir} has all its {epochs} epochs; {reason}, so more epochs need a new --run-dir"
    same = ["--config", str(run_dir / "config.json"), "--run-dir", str(run_dir)]
    more = command_again(prog, [*same, *longer_flags(config, 2 * epochs)])
    return f"finished: {run_dir} has all its {epochs} epochs; for more: {more}"


def show(config: Config, trained: list[Trained], prog: str) -> None:
    """The results as a table, and what can be done next."""
    from awp_engine.files.text import printable
    from awp_engine.observe.report import print_table
    from awp_engine.train.results import result_row, result_title

    run_dir = config.resolved_run_dir
    if all(ended for _, _, ended in trained):
        print(printable(finished(config, trained[0][1]["epochs"], prog)))

    print_table([result_row(method, config, report) for method, report, _ in trained], title=result_title(config))
    print(f"results in {printable(str(run_dir))}")
    other = run_dir / "without-awp" if len(trained) > 1 else "OTHER_RUN"
    print("next:")
    # code that a run's file names is not run
    own = ("--data.name", config.data.name) if is_own(config.data.name) else ()
    package = importlib.util.find_spec("pyautoattack") is not None
    attacks = ("clean", "pgd100", "autoattack") if package else ("clean", "pgd100", "--no-gates")
    print("  " + printable(other_command(prog, "evaluate", run_dir, *own, "--attacks", *attacks)))
    print("  " + printable(other_command(prog, "compare", run_dir, other)))
    if not package:
        print("for AutoAttack, and evaluate's checks of itself: pip install pyautoattack")


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> None:
    """Parse, build, run, close."""
    config = parse_train(argv, prog)
    argv = sys.argv[1:] if argv is None else argv

    from awp_engine.checkpoint import CheckpointError
    from awp_engine.data import DataError
    from awp_engine.distributed.ranks import errors_told, joined
    from awp_engine.distributed.replicas import DivergenceError
    from awp_engine.distributed.signals import INTERRUPTED, StoppedError, stop_requests
    from awp_engine.step.cuda_graph import CaptureError
    from awp_engine.train.trainer import TrainingError

    resume = f"to go on: {command_again(prog, argv)}"
    try:
        # until all ranks are there a signal ends a rank at once: it has nothing to save
        with errors_told(), joined(config.device, config.distributed.timeout) as ranks, stop_requests() as stop:
            trained = []
            try:
                for row in rows(config, ranks, stop):
                    trained.append(row)
            finally:
                # the first one's results, where the second one diverged
                if ranks.is_first and trained:
                    show(config, trained, prog)
    except (ConfigError, DataError) as error:
        fail(str(error), prog=prog)
    except (CaptureError, CheckpointError, TrainingError, DivergenceError) as error:
        fail(str(error), code=1, prog=prog)
    except StoppedError as stopped:
        fail(f"{stopped}; {resume}", code=stopped.code, prog=prog, once=True)
    except KeyboardInterrupt:
        fail(f"interrupted; {resume}", code=INTERRUPTED, prog=prog, once=True)


if __name__ == "__main__":
    from awp_engine.cli import run

    run("train", "python -m awp_engine.cli.train")

"""Trains one model from a configuration, and goes on where a run directory left off."""

import contextlib
import time
from collections.abc import Generator
from typing import Any, NoReturn

import torch

from awp_engine.config import Config, to_json
from awp_engine.data import Batch
from awp_engine.distributed.ranks import Ranks
from awp_engine.distributed.signals import StoppedError, StopRequest, exit_code, reason_name
from awp_engine.distributed.watchdog import watching
from awp_engine.observe.metrics import read_metrics
from awp_engine.observe.profiler import StepProfiler
from awp_engine.observe.regions import region
from awp_engine.observe.report import CURVES, REPORT
from awp_engine.observe.run_log import RunLog
from awp_engine.step.values import StepResult
from awp_engine.train.banner import banner
from awp_engine.train.hooks import Every, StopOrDiverge, TrainingError, check_replicas
from awp_engine.train.progress import EpochSums, Progress, stacked
from awp_engine.train.results import throughput, write_results
from awp_engine.train.run_dir import record_settings
from awp_engine.train.selection import Selection
from awp_engine.train.setup import Setup
from awp_engine.train.state import RunState


class _AskedToStopError(Exception):
    """Leaves an evaluation."""


class Trainer(Setup):
    """One run: what `Setup` builds of the configuration, and the loop over epochs and batches.

    One process at a time may train in a run directory: the command makes and runs it inside of
    `awp_engine.files.locking.locked`.

    Args:
        config: what to do.
        ranks: that train together; by default this process alone.
        stop: asks for a checkpoint and an end, between two steps.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is written, naming what is wrong.
    """

    def __init__(self, config: Config, ranks: Ranks | None = None, stop: StopRequest | None = None) -> None:
        super().__init__(config, ranks or Ranks())
        self._stop, self._begun, self._log = stop or StopRequest(), False, None
        self.selection = Selection(self, self._check_stop, self._measuring)
        self._sums = EpochSums(self.device)
        self.state = RunState(self, self._sums, self.selection)
        self._watch = StopOrDiverge(self.device, self._stopped)
        self.after_step = [
            self._watch,
            Every(config.distributed.check_every, self.schedule, check_replicas),
            Every(config.checkpoint_steps, self.schedule, self._save_within_epoch),
        ]
        self._profiler = StepProfiler(config.profile if self.ranks.is_first else 0, self.run_dir / "trace.json")
        self.messages += self.state.resume()
        if self.ranks.is_first and (longer := record_settings(config)):
            self.messages.append(longer)

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        return self.state.progress

    def run(self) -> dict[str, Any]:
        """Train what is left, measure the selected weights on the test split, and write the results.

        Returns:
            The fields of report.json.

        Raises:
            TrainingError: ten steps in a row had a gradient that is not finite, or it was called before.
            CheckpointError: a checkpoint could not be written; the one before is intact.
            StoppedError: asked to stop, and a checkpoint is written.
            DivergenceError: the ranks' weights differ.
        """
        config, done = self.config, self.progress.epoch
        if self._begun:
            # it may have been interrupted in the middle of a step
            raise TrainingError("Trainer: has run before; make another one, which goes on from the newest checkpoint")
        self._begun = True
        if self.ranks.is_first:
            self._log = RunLog(
                self.run_dir,
                to_json(config),
                config.epochs,
                config.log_interval,
                start_epoch=done,
                trackers=config.log,
                kept_by="clean" if config.standard else "PGD",
            )
        with (
            self._log or contextlib.nullcontext(),
            self.state.writer,
            watching(self.ranks, config.distributed.timeout, self._stop),
        ):
            for message in banner(self) + self.messages:
                self._say(message)
            try:
                self.train()
                self._say(f"measuring on {len(self.selection.test):,} test images")
                best, last = self.selection.finish(self.progress)
                report = write_results(self, self.selection, self.progress, best, last, self._say)
                if self._log is not None:
                    self._log.finish(report, [self.run_dir / REPORT, self.run_dir / CURVES])
                return report
            except _AskedToStopError:
                self._stopped()

    def train(self) -> None:
        """The epochs that are left."""
        self._history = read_metrics(self.run_dir) if self.ranks.is_first else []
        self.state.start_clock()
        while self.progress.epoch < self.config.epochs and not self._out_of_patience():
            epoch = self.progress.epoch + 1
            self._begin_epoch(epoch)
            began, first = time.monotonic(), self.progress.step
            with contextlib.closing(self._batches(epoch)) as batches:
                for batch in batches:
                    result = self.step(batch, self.schedule(epoch, self.progress.step))
                    self._count(result, batch.whole_size, epoch)
                    for hook in self.after_step:
                        hook(self.state)
            updates = self.config.attack.replays if self.schedule(epoch, 0).free else 1
            self._end_epoch(epoch, updates * sum(self.batches.sizes[first:]), time.monotonic() - began)
        if self._out_of_patience():
            best = self.progress
            kind, accuracy = ("clean", best.best_clean) if self.config.standard else ("PGD", best.best_robust)
            self._say(
                f"stopped after epoch {best.epoch}: no better held-out {kind} accuracy than {accuracy:.2%} of epoch "
                f"{best.best_epoch}"
            )
        if message := self._profiler.close():
            self._say(message)

    def _begin_epoch(self, epoch: int) -> None:
        if self._log is not None:
            self._log.begin_epoch(epoch, self.schedule.steps, self.progress.step)
        if self.progress.step == 0:
            self._sums.reset_()
        # loading a checkpoint and measuring an average both write weights
        self.awp_step.models.refresh_()

    def _batches(self, epoch: int) -> Generator[Batch, None, None]:
        with contextlib.closing(self.batches.epoch(epoch, first=self.progress.step)) as batches:
            for _ in range(self.progress.step, self.schedule.steps):
                with region("data"):
                    batch = next(batches)
                yield batch

    def _count(self, result: StepResult, size: int, epoch: int) -> None:
        """Take a step's numbers in, added up over the ranks."""
        told = stacked(result, self._stop.reason != 0)
        self.ranks.sum_([told])
        lr = self.schedule.lr(epoch, self.progress.step)
        skips = result.skipped.reshape(-1)
        self._watch.count(told[-1], skips)
        for numbers, skipped in zip(told.unbind(1), skips, strict=True):
            self._sums.add_(numbers[:-1], skipped, size)
            if self._log is not None:
                self._log.step(numbers[0], lr, size)
        if message := self._profiler.step():
            self._say(message)
        self.progress.step += 1
        if self.progress.step == self.schedule.steps:
            if self.average is not None:
                self.average.after_epoch(epoch, self.awp_step.models.statistics)
            if self.free is not None:
                self.free.begin_epoch()

    def _end_epoch(self, epoch: int, images: int, seconds: float) -> None:
        """Measure, log, warn, write a checkpoint: each at its own cadence."""
        config, last = self.config, epoch == self.config.epochs
        metrics: dict[str, Any] = {**self._sums.metrics(), "lr": self.schedule.lr(epoch, self.schedule.steps - 1)}
        metrics |= self.awp_step.limited()
        if images:
            metrics |= throughput(self, images / seconds, epoch)
        if epoch % config.evaluation.evaluate_every == 0 or last:
            metrics |= self.selection.select(epoch, self.progress)
        self.progress.epoch, self.progress.step = epoch, 0
        self.state.tick()
        if self._log is not None:
            best = self.progress.best_epoch == epoch
            self._log.end_epoch(epoch, metrics | {"seconds": self.progress.seconds}, best=best)
        self._history.append({"epoch": epoch, **metrics})
        for warning in self.selection.warnings(self._history):
            self._say(f"warning: {warning}")
        if epoch % config.checkpoint_every == 0 or last or self._out_of_patience():
            self.state.save()

    def _save_within_epoch(self, state: RunState) -> None:
        # at its end `_end_epoch` does
        if state.progress.step < self.schedule.steps:
            state.save()

    def _out_of_patience(self) -> bool:
        patience = self.config.evaluation.patience
        return patience is not None and self.progress.since_best >= patience

    def _say(self, message: str) -> None:
        """On the first rank, which alone has a log."""
        if self._log is not None:
            self._log.message(message)

    def _measuring(self, what: str, part: float) -> None:
        if self._log is not None:
            self._log.measuring(what, part)

    def _check_stop(self) -> None:
        """Leave an evaluation if asked to stop: called on all ranks alike, between its batches."""
        if self.ranks.any(self._stop.reason != 0, self.device):
            raise _AskedToStopError

    def _stopped(self) -> NoReturn:
        """Leave a checkpoint, and end."""
        path = self.state.save(wait=True)
        # together: torchrun gives the others 30 seconds once one of them has ended
        reasons = self.ranks.gather(torch.tensor(self._stop.reason, device=self.device)).tolist()
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
        name = reason_name(reason) + (f" to rank {rank}" if rank and reason > 0 else "")
        raise StoppedError(
            f"stopped by {name}: {path or 'a checkpoint'} is written",
            exit_code(reason),
        )

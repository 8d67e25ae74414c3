"""Trains one model from a configuration, and goes on where a run directory left off."""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from awp_engine import checkpoint
from awp_engine.attack.checks import ball
from awp_engine.checkpoint import CheckpointError
from awp_engine.config import (
    Config,
    ConfigError,
    config_hash,
    learning_rate,
    load_config,
    require_same_run,
    to_json,
)
from awp_engine.data import (
    Augmentation,
    Batch,
    Batches,
    Dataset,
    Loading,
    Split,
    StreamedSplit,
    data_loading,
    load_dataset,
    load_extra,
    place_extra,
)
from awp_engine.device import Behind, choose_convolutions, choose_device, fast_memory_format
from awp_engine.distributed.ranks import Ranks
from awp_engine.distributed.replicas import check_replicas
from awp_engine.distributed.sharding import gather, gathered, is_sharded, scatter_
from awp_engine.distributed.signals import StoppedError, StopRequest, exit_code, reason_name
from awp_engine.distributed.watchdog import watching
from awp_engine.evaluation import PgdAttack, evaluate, evaluation_seed, spread
from awp_engine.files.atomic import TEMPORARY, atomic_write_text
from awp_engine.files.locking import LOCK
from awp_engine.models import load_pretrained
from awp_engine.models.batch_norm import synchronize
from awp_engine.models.class_names import difference
from awp_engine.models.trained import CHECKPOINTS, MODEL_FILE, ModelDescription, described
from awp_engine.observe import warnings as monitor
from awp_engine.observe.drawing import attempt
from awp_engine.observe.profiler import StepProfiler
from awp_engine.observe.regions import region
from awp_engine.observe.report import CURVES, plot_learning_curves, write_report
from awp_engine.observe.run_log import RunLog, read_metrics
from awp_engine.observe.throughput import forward_flops, forward_units, matmul_ceiling, peak_memory
from awp_engine.optim.average import WeightAverage
from awp_engine.optim.optimizer import allocate_optimizer_tensors, optimizer_tensors, set_learning_rate
from awp_engine.step.build import build_step, capture_step, shard_model
from awp_engine.step.precision import choose_precision
from awp_engine.step.training_step import StepResult
from awp_kernels.philox import mix_seed

# the hold-out is the same for every run, so that runs of different seeds can be compared
_HOLD_OUT_SEED = 0
_ATTACK_NOISE = 1
_AVERAGE_NOISE = 3
# a loss scale that starts too high is halved in each of them
_MOST_SKIPPED = 10


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line that says why and what to do."""


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Where a run stands: after `epoch` whole epochs and `step` steps of the next one."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_robust: float = -1.0
    best_clean: float = -1.0
    since_best: int = 0
    averaged: int = 0


class _AskedToStopError(Exception):
    """Leaves an evaluation."""


class EpochSums:
    """What an epoch's metrics are made of, added up on the device.

    Attributes:
        values: fp64 [8]; part of a checkpoint.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(8, dtype=torch.float64, device=device)

    def reset_(self) -> None:
        """Begin an epoch."""
        self.values.zero_()

    def add_(self, numbers: Tensor, skipped: Tensor, size: int) -> None:
        """Take a step over `size` images in: loss, part of right answers, of zero and nonfinite gradients, fp64 [4]."""
        loss, correct, zeros, nonfinite = numbers
        trained = torch.where(skipped, 0.0, float(size))
        learned = torch.where(skipped, 0.0, loss * size)
        ones = torch.ones_like(loss)
        counted = [learned, trained, correct * size, ones * size, zeros, skipped.double(), ones, nonfinite]
        self.values += torch.stack(counted)

    def load(self, values: Tensor) -> None:
        """What a checkpoint holds; those of earlier versions end before the gradients that are not finite."""
        self.reset_()
        self.values[: len(values)].copy_(values)

    def metrics(self) -> dict[str, float]:
        """Means over the images, or over the steps; the loss is NaN where no step was taken. Waits for the device."""
        loss, trained, correct, seen, zeros, skipped, steps, nonfinite = self.values.tolist()
        return {
            # not 0 where every step was left out
            "loss": loss / trained if trained else math.nan,
            "train_pgd_accuracy": correct / seen,
            "zero_gradients": zeros / steps,
            "nonfinite_gradients": nonfinite / steps,
            "skipped_steps": skipped,
        }


def load_data(config: Config, loading: Loading | None = None) -> Dataset:
    """The data set that the configuration names.

    Args:
        config: the run's.
        loading: how; None: as the configuration wants it, on the CPU.

    Raises:
        DataError: naming the file that is missing or damaged.
    """
    data = config.data
    return load_dataset(
        data.name,
        root=data.root,
        held_out_fraction=data.held_out_fraction,
        seed=_HOLD_OUT_SEED,
        train_limit=data.train_limit,
        loading=loading or data_loading(config.data, torch.device("cpu")),
    )


def evaluation_attack(config: Config, *, steps: int | None = None, seed: int | None = None) -> PgdAttack:
    """The attack that a run is measured by.

    Args:
        config: the run's.
        steps: another number of steps.
        seed: of other starting points.

    Raises:
        ConfigError: steps or seed out of range.
    """
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps: expected a whole number >= 1, got {steps}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"--seed: expected a whole number in [0, 2^63), got {seed}")
    return PgdAttack(
        epsilon=config.attack.epsilon_value,
        step_size=config.evaluation_step_size,
        steps=config.evaluation.steps if steps is None else steps,
        norm=config.attack.norm,
        seed=evaluation_seed(config.seed) if seed is None else seed,
    )


def _set_up_torch(config: Config, device: torch.device) -> None:
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    choose_convolutions(device, deterministic=config.deterministic)
    torch.manual_seed(mix_seed(config.seed))


def prepare_run_dir(config: Config) -> None:
    """Make the run directory, or make sure that the one there belongs to this configuration.

    Raises:
        ConfigError: the directory holds something else, or cannot be written.
    """
    run_dir = config.resolved_run_dir
    saved = run_dir / "config.json"
    try:
        if saved.exists():
            require_same_run(load_config(saved), config, run_dir)
            return
        if run_dir.exists() and not run_dir.is_dir():
            raise ConfigError(f"--run-dir: expected a directory, {run_dir} is a file; choose another")
        # a run that was killed while it wrote its first file has left nothing but that, and its lock
        if run_dir.exists() and any(not entry.name.startswith((TEMPORARY, LOCK)) for entry in run_dir.iterdir()):
            raise ConfigError(f"--run-dir: {run_dir} is not empty and holds no config.json of a run; choose another")
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write_text(saved, to_json(config))
    except OSError as error:
        raise ConfigError(f"--run-dir: {run_dir} cannot be used: {error.strerror or error}") from None


class Trainer:
    """One run: the data, the model, and everything that a checkpoint holds.

    One process at a time may train in a run directory: train.py makes and runs it inside of
    `awp_engine.files.locking.locked`.

    Args:
        config: what to do.
        ranks: that train together; by default this process alone.
        stop: asks for a checkpoint and an end, between two steps.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is written, naming what is wrong.
    """

    def __init__(self, config: Config, ranks: Ranks | None = None, stop: StopRequest | None = None) -> None:
        self.ranks, self._stop = ranks or Ranks(), stop or StopRequest()
        config.require_files()
        self.config = config
        self.run_dir = config.resolved_run_dir
        self.device = choose_device(config.device, self.ranks.local_rank)
        # before data are read and the run directory is made
        choose_precision(config, self.device)
        if config.cuda_graphs and self.device.type != "cuda":
            raise ConfigError("--cuda-graphs: expected a CUDA device to capture the step on, found none; leave it out")
        loading = data_loading(config.data, self.device)
        data = self.data = load_data(config, loading)
        self._check_ball()
        extra = None
        if config.data.extra is not None:
            extra = place_extra(load_extra(config.data.extra, like=data), loading)
        self.fingerprints = {
            "data_fingerprint": data.fingerprint,
            "extra_fingerprint": None if extra is None else extra.fingerprint,
        }
        loaders = [data.loader, "" if extra is None else extra.loader]
        given = [config_hash(config), *map(str, self.fingerprints.values()), *loaders]
        self.ranks.require_equal(given, "configuration and data", self.device)
        _set_up_torch(config, self.device)
        self.description = ModelDescription(
            name=config.model.name,
            num_classes=len(self.data.class_names),
            mean=self.data.mean,
            std=self.data.std,
            width=config.model.width,
            activation=config.model.activation,
            class_names=data.class_names if data.named else None,
        )
        model = self.description.build()
        self.memory_format = fast_memory_format(model, self.device)
        # torch's stub does not know the keyword
        model.to(device=self.device, memory_format=self.memory_format)  # pyright: ignore[reportCallIssue]
        self.model = model.train()
        self.messages = [f"{len(data.train):,} training images, loader {data.loader}"]
        if config.global_batch_size > len(data.train) and extra is None:
            self.messages.append(
                f"--global-batch-size {config.global_batch_size}: there are fewer training images; every step takes all"
            )
        if extra is not None:
            self.messages.append(f"{len(extra.split):,} extra images, loader {extra.loader}")
        if config.model.pretrained is not None:
            kept = load_pretrained(model, config.model.pretrained, self.description.class_names)
            new = f"; new, for {len(data.class_names)} classes: {', '.join(kept)}" if kept else ""
            self.messages.append(f"weights of {config.model.pretrained}{new}")
        if self.ranks.is_first:
            prepare_run_dir(config)
        augmentation = Augmentation(
            pad=config.data.pad,
            flip=config.data.flip,
            cutout=config.data.cutout,
            fill=data.mean,
            cutmix=config.data.cutmix,
            mixup=config.data.mixup,
            mixup_alpha=config.data.mixup_alpha,
            rand_augment=config.data.rand_augment,
            erase=config.data.erase,
            erase_std=data.std,
            num_classes=len(data.class_names),
        )
        self.batches = Batches(
            data.train,
            augmentation,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            rank=self.ranks.rank,
            ranks=self.ranks.world,
            extra=None if extra is None else extra.split,
            extra_fraction=config.data.extra_fraction,
            memory_format=self.memory_format,
        )
        self._sizes = self.batches.sizes
        self._flops, self._ceiling = forward_units(config) * forward_flops(model, data.train.shape), None
        # equal seeds give equal weights, but on processors of two kinds
        self.ranks.broadcast_(self.model.state_dict().values())
        self.step = build_step(config, self.model, self.ranks)
        self.optimizer = self.step.optimizer
        self._run_step = capture_step(config, self.step)
        self.average = None
        if config.average.kind != "none":
            self.average = WeightAverage(self.model, config.average, config.epochs, twin=self._twin())
            self.average.follow(self.optimizer)
        # free adversarial training carries its perturbation from batch to batch, but not into the next epoch
        self._delta: Tensor | None = None
        self._sums = EpochSums(self.device)
        self._saved: tuple[int, int] | None = None
        self._skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self._behind = Behind(self.device, 2)
        self._profiler = StepProfiler(config.profile if self.ranks.is_first else 0, self.run_dir / "trace.json")
        self.progress = Progress()
        self._begun = False
        self._clock = time.monotonic()
        self.best_weights = self._whole(self.model.state_dict(), every_rank=True)
        self._writer = checkpoint.Writer(self.run_dir / CHECKPOINTS)
        self._resume()

    def _check_ball(self) -> None:
        """An l2 ball is too large for images of a size that the configuration does not know."""
        attack = self.config.attack
        try:
            ball(math.prod(self.data.train.shape), epsilon=attack.epsilon_value, norm=attack.norm, clip=(0.0, 1.0))
        except ValueError as error:
            raise ConfigError(f"--attack.{error}") from None

    def _twin(self) -> nn.Module | None:
        """A second model of shards; they cannot be copied."""
        if not self.step.copies.sharded:
            return None
        twin = self.description.build().to(self.device)
        if self.config.distributed.sync_batch_norm:
            synchronize(twin)
        shard_model(self.config, twin, self.ranks)
        return twin

    def _whole(self, tensors: dict[str, Tensor], *, every_rank: bool = False) -> dict[str, Tensor]:
        """Tensors without shards, copies on the CPU where `every_rank`; all ranks have to call it."""
        if self.step.copies.sharded:
            return gather(tensors, every_rank=every_rank)
        return (
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()} if every_rank else tensors
        )

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
        config, first = self.config, self.ranks.is_first
        if self._begun:
            # it may have been interrupted in the middle of a step
            raise TrainingError("Trainer: has run before; make another one, which goes on from the newest checkpoint")
        self._begun = True
        log = self._open_log() if first else None
        with (
            log or contextlib.nullcontext(),
            self._writer,
            watching(self.ranks, config.distributed.timeout, self._stop),
        ):
            for message in self.messages:
                _say(log, message)
            history = read_metrics(self.run_dir) if first else []
            self._clock = time.monotonic()
            while self.progress.epoch < config.epochs and not self._out_of_patience():
                epoch = self.progress.epoch + 1
                metrics = self._train_epoch(epoch, log)
                if epoch % config.evaluation.evaluate_every == 0 or epoch == config.epochs:
                    metrics |= self._select(epoch)
                self.progress.epoch, self.progress.step = epoch, 0
                self._tick()
                if log is not None:
                    log.end_epoch(epoch, metrics | {"seconds": self.progress.seconds})
                history.append({"epoch": epoch, **metrics})
                for warning in monitor.warnings(history):
                    _say(log, f"warning: {warning}")
                if epoch % config.checkpoint_every == 0 or epoch == config.epochs or self._out_of_patience():
                    self._save()
            if self._out_of_patience():
                _say(
                    log,
                    f"stopped after epoch {self.progress.epoch}: no better held-out PGD accuracy than "
                    f"{self.progress.best_robust:.2%} of epoch {self.progress.best_epoch}",
                )
            if message := self._profiler.close():
                _say(log, message)
            _say(log, "measuring the selected and the last weights on the test split")
            return self._finish(log)

    def _open_log(self) -> RunLog:
        config = self.config
        return RunLog(self.run_dir, config, config.epochs, config.log_interval, start_epoch=self.progress.epoch)

    def _out_of_patience(self) -> bool:
        patience = self.config.evaluation.patience
        return patience is not None and self.progress.since_best >= patience

    def _tick(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self._clock
        self._clock = now

    def _train_epoch(self, epoch: int, log: RunLog | None) -> dict[str, float | int | None]:
        config, steps, done = self.config, len(self._sizes), self.progress.step
        if log is not None:
            log.begin_epoch(epoch, steps, done)
        if done == 0:
            self._delta = None
            self._sums.reset_()
        seen, began = 0, time.monotonic()
        # loading a checkpoint and measuring an average both write weights
        self.step.refresh_()
        with contextlib.closing(self.batches.epoch(epoch, first=done)) as batches:
            for index in range(done, steps):
                with region("data"):
                    batch = next(batches)
                lr = learning_rate(config.optimizer, config.epochs, epoch - 1 + index / steps)
                set_learning_rate(self.optimizer, lr)
                for result in self._steps(batch, epoch, index):
                    loss = self._count(result, self._sizes[index])
                    seen += self._sizes[index]
                    if log is not None:
                        log.step(loss, lr, self._sizes[index])
                    if message := self._profiler.step():
                        _say(log, message)
                self.progress.step = index + 1
                if index + 1 == steps and self.average is not None:
                    self.average.after_epoch(epoch)
                self._between_steps(epoch)
        lr = learning_rate(config.optimizer, config.epochs, epoch - 1 + (steps - 1) / steps)
        metrics: dict[str, float | int | None] = {**self._sums.metrics(), "lr": lr}
        if seen:
            metrics |= self._throughput(seen / (time.monotonic() - began))
        return metrics

    def _steps(self, batch: Batch, epoch: int, index: int) -> Iterator[StepResult]:
        """The updates that one batch serves for: one, or several with free adversarial training."""
        config = self.config
        x = batch.images.contiguous(memory_format=self.memory_format)
        size = self._sizes[index]
        if self._is_free(epoch):
            if self._delta is None or self._delta.shape[0] < len(x):
                self._delta = torch.zeros_like(x)
            for _ in range(config.attack.replays):
                self._before_step()
                yield self.step.free(x, batch.labels, self._delta[: len(x)], of=size)
            return
        self._before_step()
        yield self._run_step(
            x,
            batch.labels,
            sample_ids=batch.ids,
            seed=mix_seed(config.seed, epoch, _ATTACK_NOISE),
            perturb=epoch > config.awp.warmup and self._step_number(epoch, index) % config.awp.every == 0,
            fast=config.attack.is_fast(epoch),
            of=size,
        )

    def _step_number(self, epoch: int, index: int) -> int:
        return (epoch - 1) * len(self._sizes) + index

    def _count(self, result: StepResult, size: int) -> Tensor:
        """Take a step's numbers in, added up over the ranks; returns the loss of the whole batch."""
        stop = torch.full_like(result.loss, float(self._stop.reason != 0))
        told = [result.loss, result.correct, result.zero_gradients, result.nonfinite_gradients, stop]
        told = torch.stack(told).double()
        self.ranks.sum_([told])
        self._sums.add_(told[:4], result.skipped, size)
        self._skipped_in_a_row = torch.where(result.skipped, self._skipped_in_a_row + 1, 0)
        self._behind.push(torch.stack([told[4], self._skipped_in_a_row.double()]))
        return told[0]

    def _between_steps(self, epoch: int) -> None:
        """What is looked at after every batch: all ranks come to the same conclusion."""
        config, index = self.config, self.progress.step
        stop, skipped = self._behind.latest()
        if skipped >= _MOST_SKIPPED:
            raise TrainingError(
                f"epoch {epoch}, step {index}: the gradients of {skipped:.0f} steps in a row were not finite, and the "
                "weights stayed as they were before; start again elsewhere with a smaller --optimizer.lr"
            )
        if stop:
            self._stopped()
        number = self._step_number(epoch, index)
        if number % config.distributed.check_every == 0:
            check_replicas(self.ranks, self._replicated(), f"epoch {epoch}, step {index}")
        if config.checkpoint_steps is not None and number % config.checkpoint_steps == 0 and index < len(self._sizes):
            self._save()

    def _stopped(self) -> NoReturn:
        """Leave a checkpoint, and end."""
        path = self._save(wait=True)
        # together: torchrun gives the others 30 seconds once one of them has ended
        reasons = self.ranks.gather(torch.tensor(self._stop.reason, device=self.device)).tolist()
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
        name = reason_name(reason) + (f" to rank {rank}" if rank and reason > 0 else "")
        raise StoppedError(
            f"stopped by {name}: {path or 'a checkpoint'} is written; start again with --run-dir {self.run_dir} to go "
            "on",
            exit_code(reason),
        )

    def _heed(self) -> None:
        """Stop here if asked to: called on all ranks alike, between batches of an evaluation."""
        if self.ranks.any(self._stop.reason != 0, self.device):
            raise _AskedToStopError

    def _replicated(self) -> dict[str, Tensor]:
        """What has to be the same on all ranks, to the bit."""
        held = optimizer_tensors(self.model, self.optimizer).items()
        momentum = {f"momentum of {name}": buffer for name, buffer in held}
        average = {} if self.average is None else self.average.state()
        tensors = self.model.state_dict() | momentum | {f"average of {name}": t for name, t in average.items()}
        return {name: tensor for name, tensor in tensors.items() if not is_sharded(tensor)}

    def _throughput(self, images_per_second: float) -> dict[str, float]:
        """Of the operations that the method needs; what a run does beyond them does not count."""
        if self._ceiling is None:
            self._ceiling = matmul_ceiling(self.device, self.step.copies.precision.attack or torch.float32)
        flops = images_per_second * self._flops
        return {
            "images_per_second": images_per_second,
            "tflops": flops / 1e12,
            "share_of_matmul": flops / (self._ceiling * self.ranks.world),
            "memory_gb": peak_memory(self.device) / 1e9,
        }

    def _is_free(self, epoch: int) -> bool:
        return self.config.attack.fast == "free" and self.config.attack.is_fast(epoch)

    def _before_step(self) -> None:
        if self.average is not None:
            self.average.before_step()

    def _measured_model(self, epoch: int) -> nn.Module:
        """What is evaluated and kept: the average of the weights where there is one, with its own BN statistics."""
        if self.average is None or not self.average.started:
            return self.model
        self.average.refresh_statistics(self._average_passes(self.average.model, epoch))
        self.ranks.mean_([buffer for buffer in self.average.model.buffers() if buffer.is_floating_point()])
        return self.average.model

    def _average_passes(self, model: nn.Module, epoch: int) -> Iterator[None]:
        """Forward passes over attacked training images, the ones that training itself makes."""
        seen, batches = 0, self.batches.epoch(epoch)
        with contextlib.closing(batches):
            for batch, size in zip(batches, self._sizes, strict=True):
                with region("average"):
                    x = batch.images.contiguous(memory_format=self.memory_format)
                    seed = mix_seed(self.config.seed, epoch, _AVERAGE_NOISE)
                    # by the batch's statistics: the running ones are what is being computed
                    x_adv = self.step.attacked(model, x, batch.labels, batch.ids, seed, bn_mode="train")
                    self.step.objective.losses(model, x_adv, x, batch.labels)
                yield
                seen += size
                if seen >= self.config.average.bn_images:
                    return

    def _evaluate(self, model: nn.Module, split: Split | StreamedSplit) -> tuple[float, float]:
        attack, batch_size = evaluation_attack(self.config), self.config.evaluation.batch_size
        try:
            with gathered(model, now=True) if self.step.copies.sharded else contextlib.nullcontext():
                accuracy = evaluate(model, split, attack, batch_size=batch_size, ranks=self.ranks, between=self._heed)
        except _AskedToStopError:
            self._stopped()
        return accuracy.clean, accuracy.robust

    def _select(self, epoch: int) -> dict[str, float | int | None]:
        """Measure the epoch on held-out images, and keep its weights if none were better."""
        limit = self.config.evaluation.held_out_limit
        model = self._measured_model(epoch)
        clean, robust = self._evaluate(model, spread(self.data.held_out, limit))
        best = self.progress
        # the later of equals has trained longer; clean accuracy decides between equally robust ones
        if (robust, clean) >= (best.best_robust, best.best_clean):
            best.since_best = 0 if robust > best.best_robust else best.since_best + 1
            best.best_epoch, best.best_robust, best.best_clean = epoch, robust, clean
            self.best_weights = self._whole(model.state_dict(), every_rank=True)
        else:
            best.since_best += 1
        return {"held_out_clean_accuracy": clean, "held_out_pgd_accuracy": robust}

    def _finish(self, log: RunLog | None) -> dict[str, Any]:
        model = self._measured_model(self.progress.epoch)
        test = spread(self.data.test, self.config.evaluation.test_limit)
        # as many training images as test images: the gap between the two is the overfitting
        train = spread(self.data.train, len(test))
        last_clean, last_robust = self._evaluate(model, test)
        _, last_train_robust = self._evaluate(model, train)
        if self.progress.best_epoch == self.progress.epoch:
            test_clean, test_robust, train_robust = last_clean, last_robust, last_train_robust
        else:
            scatter_(model.state_dict(), self.best_weights)
            test_clean, test_robust = self._evaluate(model, test)
            _, train_robust = self._evaluate(model, train)
        config, progress = self.config, self.progress
        name = f"pgd{config.evaluation.steps}_accuracy"
        fields = {
            "clean_accuracy": test_clean,
            "pgd20_accuracy": test_robust if config.evaluation.steps == 20 else None,
            name: test_robust,
            "train_pgd_accuracy": train_robust,
            "held_out_pgd_accuracy": progress.best_robust,
            "last": {"clean_accuracy": last_clean, name: last_robust, "train_pgd_accuracy": last_train_robust},
            "test_images": len(test),
            "train_images": len(self.data.train),
            "selected_epoch": progress.best_epoch,
            "epochs": progress.epoch,
            "seconds": progress.seconds,
            "preset": config.preset,
            "seed": config.seed,
            "method": config.method,
            "gamma": config.awp.gamma,
            "attack": {
                "norm": config.attack.norm,
                "epsilon": config.attack.epsilon,
                "steps": config.evaluation.steps,
                "step_size": config.evaluation_step_size,
            },
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "ranks": self.ranks.world,
            "data": {"name": self.data.name, **self.fingerprints},
            "config_hash": config_hash(config),
        }
        if self.ranks.is_first:
            described = {"epoch": str(progress.best_epoch), "config_hash": config_hash(config)}
            metadata = self.description.to_metadata() | described
            checkpoint.export_model(self.run_dir / MODEL_FILE, self.best_weights, metadata)
            write_report(self.run_dir, fields)
            attempt(
                str(self.run_dir / CURVES),
                lambda: plot_learning_curves(self.run_dir, read_metrics(self.run_dir), progress.best_epoch),
                functools.partial(_say, log),
            )
        return fields

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds in tensors: the same for any number of ranks."""
        tensors = {
            "model": self._whole(self.model.state_dict()),
            "optimizer": self._whole(optimizer_tensors(self.model, self.optimizer)),
            "best_model": self.best_weights,
            "epoch": {"sums": self._sums.values},
        }
        if self.average is not None and self.average.started:
            tensors["average"] = self._whole(self.average.state())
        if self.step.loss_scale is not None:
            tensors["loss_scale"] = self.step.loss_scale.state()
        if self._delta is not None and self.progress.step:
            tensors["epoch"]["delta"] = self._whole_delta()
        return tensors

    def _whole_delta(self) -> Tensor:
        """The perturbation that free adversarial training carries, of all ranks."""
        assert self._delta is not None
        # no batch is larger than the first
        size = self._sizes[0]
        rows, share = self.ranks.share(size)
        whole = self._delta.new_zeros(size, *self._delta.shape[1:])
        whole[rows] = self._delta if size >= self.ranks.world else self._delta * share
        self.ranks.sum_([whole])
        return whole

    def _save(self, *, wait: bool = False) -> str | None:
        """Write a checkpoint of where the run stands, unless there is one, in the background unless `wait`.

        Returns:
            Where it is, on the first rank; None on others and in the background.
        """
        progress = self.progress
        if self._saved != (progress.epoch, progress.step):
            self._tick()
            check_replicas(self.ranks, self._replicated(), f"epoch {progress.epoch}, step {progress.step}")
            if self.average is not None:
                progress.averaged = self.average.count
            tensors = self._tensors()
            if self.ranks.is_first:
                state = dataclasses.asdict(progress) | {
                    "config_hash": config_hash(self.config),
                    "ranks": self.ranks.world,
                    **self.fingerprints,
                    **self.description.to_metadata(),
                }
                name = checkpoint.checkpoint_name(progress.epoch, progress.step)
                self._writer.save(name, tensors, state, self._retention())
            self._saved = (progress.epoch, progress.step)
        path = self._writer.wait() if wait else None
        return None if path is None else str(path)

    def _retention(self) -> checkpoint.Retention:
        config, best = self.config, self.progress.best_epoch
        name = checkpoint.checkpoint_name(best) if best else None
        return checkpoint.Retention(last=config.keep_checkpoints, every_epochs=config.keep_every, best=name)

    def _resume(self) -> None:
        """Go on from the newest sound checkpoint, if there is one; the first rank reads it and tells the others."""
        found = checkpoint.load_latest(self.run_dir / CHECKPOINTS) if self.ranks.is_first else None
        if found is not None:
            self.messages += [f"skipped a checkpoint: {line}" for line in found.skipped]
            if any(found.state.get(key) != value for key, value in self.fingerprints.items()):
                raise ConfigError(
                    f"--run-dir: {self.run_dir} was trained on other images{self._other_classes(found)}; restore the "
                    "data or choose another"
                )
            if found.state.get("config_hash") != config_hash(self.config):
                raise CheckpointError(
                    f"{found.path}: was not written by this run; remove it, or choose another --run-dir"
                )
        state = self.ranks.broadcast_json(None if found is None else found.state, self.device)
        if state is None:
            return
        tensors = self.ranks.broadcast_groups({} if found is None else found.tensors, self.device)
        try:
            self._load(state, tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            where = self.run_dir / CHECKPOINTS if found is None else found.path
            raise CheckpointError(f"{where}: lacks what this run needs, or has it in another shape: {error}") from error
        place = f"epoch {self.progress.epoch}" + (f" and {self.progress.step} steps" if self.progress.step else "")
        if found is not None:
            self.messages.append(f"going on after {place}, from {found.path}")
        if state["ranks"] != self.ranks.world:
            self.messages.append(
                f"{state['ranks']} ranks before, {self.ranks.world} now: images and noise are the same; sums differ by "
                "rounding, and without --distributed.sync-batch-norm every rank normalises by another part of the batch"
            )

    def _other_classes(self, found: checkpoint.Checkpoint) -> str:
        """What to add where the data's classes are not those that a checkpoint was trained on."""
        names = described(found.state, found.path).class_names
        other = difference(self.data.class_names, names) if names is not None and self.data.named else ""
        return f", of other classes: the data now have {other}" if other else ""

    def _load(self, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        """What `_save` wrote."""
        scatter_(self.model.state_dict(), tensors["model"])
        held = tensors["optimizer"]
        scatter_(allocate_optimizer_tensors(self.model, self.optimizer, held), held)
        self.best_weights = tensors["best_model"]
        self.progress = Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
        for name, start in dataclasses.asdict(Progress()).items():
            # NaN is not in it either
            if type(state[name]) not in (type(start), int) or not start <= state[name] < 2**63:
                raise ValueError(f"{name} {str(state[name])[:20]!r}; expected a finite number, {start} or more")
        self._saved = (self.progress.epoch, self.progress.step)
        if self.average is not None and self.progress.averaged:
            scatter_(self.average.state(), tensors["average"])
            self.average.count = self.progress.averaged
        if self.step.loss_scale is not None and "loss_scale" in tensors:
            self.step.loss_scale.load(tensors["loss_scale"])
        self._sums.load(tensors["epoch"]["sums"])
        if "delta" in tensors["epoch"]:
            rows, _ = self.ranks.share(self._sizes[0])
            delta = tensors["epoch"]["delta"][rows].to(self.device)
            self._delta = delta.contiguous(memory_format=self.memory_format)


def _say(log: RunLog | None, message: str) -> None:
    """On the first rank, which alone has a log."""
    if log is not None:
        log.message(message)

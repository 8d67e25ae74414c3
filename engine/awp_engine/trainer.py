"""Trains one model from a configuration, and goes on where a run directory left off."""

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine import checkpoint, monitor
from awp_engine.average import WeightAverage
from awp_engine.build_step import build_step, capture_step
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
    Batch,
    Dataset,
    Split,
    extra_fingerprint,
    load_dataset,
    load_extra,
    steps_per_epoch,
    train_batches,
)
from awp_engine.device import choose_device, fast_memory_format
from awp_engine.evaluation import PgdAttack, evaluate, evaluation_seed, spread
from awp_engine.loading import CHECKPOINTS, MODEL_FILE, ModelDescription
from awp_engine.optimizer import set_learning_rate
from awp_engine.perturbation import StepResult
from awp_engine.precision import choose_precision
from awp_engine.profile import StepProfiler
from awp_engine.regions import region
from awp_engine.report import plot_learning_curves, write_report
from awp_engine.run_log import RunLog, read_metrics
from awp_engine.throughput import forward_flops, forward_units, matmul_ceiling, peak_memory
from awp_kernels.philox import mix_seed

# the hold-out is the same for every run, so that runs of different seeds can be compared
_HOLD_OUT_SEED = 0
_ATTACK_NOISE = 1
_AVERAGE_NOISE = 3


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line that says why and what to do."""


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Where a run stands after an epoch."""

    epoch: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best_robust: float = -1.0
    best_clean: float = -1.0
    since_best: int = 0
    averaged: int = 0


def load_data(config: Config) -> Dataset:
    """The data set that the configuration names, on the CPU.

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
    torch.backends.cudnn.benchmark = device.type == "cuda" and not config.deterministic
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
        if run_dir.exists() and any(run_dir.iterdir()):
            raise ConfigError(f"--run-dir: {run_dir} is not empty and holds no config.json of a run; choose another")
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.atomic_write_text(saved, to_json(config))
    except OSError as error:
        raise ConfigError(f"--run-dir: {run_dir} cannot be used: {error.strerror or error}") from None


class Trainer:
    """One run: the data, the model, and everything that a checkpoint holds.

    Args:
        config: what to do.

    Raises:
        ConfigError, DataError, CheckpointError: before anything is written, naming what is wrong.
    """

    def __init__(self, config: Config) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("torchrun: training with several processes is not supported yet; use --nproc-per-node 1")
        config.require_files()
        self.config = config
        self.run_dir = config.resolved_run_dir
        self.device = choose_device(config.device)
        # before data are read and the run directory is made
        choose_precision(config, self.device)
        data = load_data(config)
        extra = None if config.data.extra is None else load_extra(config.data.extra, like=data)
        self.fingerprints = {
            "data_fingerprint": data.fingerprint,
            "extra_fingerprint": None if extra is None else extra_fingerprint(extra),
        }
        self.extra = None if extra is None else extra.to(self.device)
        self.data = dataclasses.replace(
            data,
            train=data.train.to(self.device),
            held_out=data.held_out.to(self.device),
            test=data.test.to(self.device),
        )
        prepare_run_dir(config)

        _set_up_torch(config, self.device)
        self.description = ModelDescription(
            name=config.model.name,
            num_classes=len(self.data.class_names),
            mean=self.data.mean,
            std=self.data.std,
            width=config.model.width,
            activation=config.model.activation,
        )
        model = self.description.build()
        self.memory_format = fast_memory_format(model, self.device)
        # torch's stub does not know the keyword
        model.to(device=self.device, memory_format=self.memory_format)  # pyright: ignore[reportCallIssue]
        self.model = model.train()
        self.step = build_step(config, self.model)
        self.optimizer = self.step.optimizer
        self._run_step = capture_step(config, self.step)
        averaged = config.average.kind != "none"
        self.average = WeightAverage(self.model, config.average, config.epochs) if averaged else None
        if self.average is not None:
            self.average.follow(self.optimizer)
        self._delta: Tensor | None = None
        self._flops, self._ceiling = 0.0, None
        self._profiler = StepProfiler(config.profile, self.run_dir / "trace.json")
        self.progress = Progress()
        self.best_weights = _copy(self.model.state_dict())
        self.messages: list[str] = []
        self._resume()

    def run(self) -> dict[str, Any]:
        """Train what is left, measure the selected weights on the test split, and write the results.

        Returns:
            The fields of report.json.

        Raises:
            TrainingError: most of an epoch's steps had a gradient that is not finite.
            CheckpointError: a checkpoint could not be written; the one before is intact.
        """
        config = self.config
        with RunLog(self.run_dir, config, config.epochs, config.log_interval, start_epoch=self.progress.epoch) as log:
            for message in self.messages:
                log.message(message)
            history = read_metrics(self.run_dir)
            while self.progress.epoch < config.epochs and not self._out_of_patience():
                epoch = self.progress.epoch + 1
                began = time.monotonic()
                metrics = self._train_epoch(epoch, log)
                if epoch % config.evaluation.evaluate_every == 0 or epoch == config.epochs:
                    metrics |= self._select(epoch)
                self.progress.epoch = epoch
                self.progress.seconds += time.monotonic() - began
                log.end_epoch(epoch, metrics | {"seconds": self.progress.seconds})
                history.append({"epoch": epoch, **metrics})
                for warning in monitor.warnings(history):
                    log.message(f"warning: {warning}")
                if epoch % config.checkpoint_every == 0 or epoch == config.epochs or self._out_of_patience():
                    self._save()
            if self._out_of_patience():
                log.message(
                    f"stopped after epoch {self.progress.epoch}: no better held-out PGD accuracy than "
                    f"{self.progress.best_robust:.2%} of epoch {self.progress.best_epoch}"
                )
            if message := self._profiler.close():
                log.message(message)
            log.message("measuring the selected and the last weights on the test split")
            return self._finish()

    def _out_of_patience(self) -> bool:
        patience = self.config.evaluation.patience
        return patience is not None and self.progress.since_best >= patience

    def _train_epoch(self, epoch: int, log: RunLog) -> dict[str, float | int | None]:
        config = self.config
        steps = steps_per_epoch(len(self.data.train), config.batch_size, self._extra_fraction())
        log.begin_epoch(epoch, steps)
        # free adversarial training carries its perturbation from batch to batch, but not into the next epoch: a
        # checkpoint need not hold it
        self._delta = None
        loss_sum, correct, skipped, zeros, trained = torch.zeros(5, dtype=torch.float64, device=self.device)
        lr, seen, began = 0.0, 0, time.monotonic()
        # loading a checkpoint and measuring an average both write weights
        self.step.refresh_()
        batches = self._batches(epoch)
        for index in range(steps):
            with region("data"):
                batch = next(batches)
            lr = learning_rate(config.optimizer, config.epochs, epoch - 1 + index / steps)
            set_learning_rate(self.optimizer, lr)
            for result in self._steps(batch, epoch, (epoch - 1) * steps + index):
                count = len(batch.labels)
                loss_sum += torch.where(result.skipped, 0.0, result.loss * count)
                trained += torch.where(result.skipped, 0, count)
                correct += result.correct
                skipped += result.skipped
                zeros += result.zero_gradients
                seen += count
                log.step(result.loss, lr, count)
                if message := self._profiler.step():
                    log.message(message)
        if self.average is not None:
            self.average.after_epoch(epoch)
        made = steps * (config.attack.replays if self._is_free(epoch) else 1)
        loss, accuracy, lost, masked = torch.stack(
            [loss_sum / trained.clamp_min(1), correct / seen, skipped, zeros / made]
        ).tolist()
        if lost > made / 2:
            raise TrainingError(
                f"epoch {epoch}: {lost:.0f} of {made} steps had a gradient that is not finite; the checkpoint before "
                "it is kept: start again elsewhere with a smaller --optimizer.lr"
            )
        return {
            "loss": loss,
            "lr": lr,
            "train_pgd_accuracy": accuracy,
            "zero_gradients": masked,
            "skipped_steps": lost,
            **self._throughput(seen / (time.monotonic() - began)),
        }

    def _throughput(self, images_per_second: float) -> dict[str, float]:
        """Of the operations that the method needs; what a run does beyond them does not count."""
        if self._ceiling is None:
            image: tuple[int, int, int] = tuple(self.data.train.images.shape[1:])  # pyright: ignore[reportAssignmentType]
            self._flops = forward_units(self.config) * forward_flops(self.model, image)
            self._ceiling = matmul_ceiling(self.device, self.step.copies.precision.attack or torch.float32)
        flops = images_per_second * self._flops
        return {
            "images_per_second": images_per_second,
            "tflops": flops / 1e12,
            "share_of_matmul": flops / self._ceiling,
            "memory_gb": peak_memory(self.device) / 1e9,
        }

    def _is_free(self, epoch: int) -> bool:
        return self.config.attack.fast == "free" and self.config.attack.is_fast(epoch)

    def _steps(self, batch: Batch, epoch: int, step_index: int) -> Iterator[StepResult]:
        """The updates that one batch serves for: one, or several with free adversarial training."""
        config = self.config
        x = batch.images.contiguous(memory_format=self.memory_format)
        if self._is_free(epoch):
            if self._delta is None or self._delta.shape[0] < len(x):
                self._delta = torch.zeros_like(x)
            for _ in range(config.attack.replays):
                self._before_step()
                yield self.step.free(x, batch.labels, self._delta[: len(x)])
            return
        self._before_step()
        yield self._run_step(
            x,
            batch.labels,
            sample_ids=batch.ids,
            seed=mix_seed(config.seed, epoch, _ATTACK_NOISE),
            perturb=epoch > config.awp.warmup and step_index % config.awp.every == 0,
            fast=config.attack.is_fast(epoch),
        )

    def _before_step(self) -> None:
        if self.average is not None:
            self.average.before_step()

    def _extra_fraction(self) -> float | None:
        return None if self.extra is None else self.config.data.extra_fraction

    def _batches(self, epoch: int) -> Iterator[Batch]:
        config = self.config
        return train_batches(
            self.data.train,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            pad=config.data.pad,
            flip=config.data.flip,
            cutout=config.data.cutout,
            cutmix=config.data.cutmix,
            num_classes=len(self.data.class_names),
            fill=self.data.mean,
            extra=self.extra,
            extra_fraction=config.data.extra_fraction,
        )

    def _measured_model(self, epoch: int) -> nn.Module:
        """What is evaluated and kept: the average of the weights where there is one, with its own BN statistics."""
        if self.average is None or not self.average.started:
            return self.model
        self.average.refresh_statistics(self._average_passes(self.average.model, epoch))
        return self.average.model

    def _average_passes(self, model: nn.Module, epoch: int) -> Iterator[None]:
        """Forward passes over attacked training images, the ones that training itself makes."""
        seen = 0
        for batch in self._batches(epoch):
            x = batch.images.contiguous(memory_format=self.memory_format)
            seed = mix_seed(self.config.seed, epoch, _AVERAGE_NOISE)
            # by the batch's statistics: the running ones are what is being computed
            x_adv = self.step.attacked(model, x, batch.labels, batch.ids, seed, bn_mode="train")
            self.step.objective.losses(model, x_adv, x, batch.labels)
            yield
            seen += len(x)
            if seen >= self.config.average.bn_images:
                return

    def _evaluate(self, model: nn.Module, split: Split) -> tuple[float, float]:
        batch_size = self.config.evaluation.batch_size
        accuracy = evaluate(model, split, evaluation_attack(self.config), batch_size=batch_size)
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
            self.best_weights = _copy(model.state_dict())
        else:
            best.since_best += 1
        return {"held_out_clean_accuracy": clean, "held_out_pgd_accuracy": robust}

    def _finish(self) -> dict[str, Any]:
        model = self._measured_model(self.progress.epoch)
        test = spread(self.data.test, self.config.evaluation.test_limit)
        # as many training images as test images: the gap between the two is the overfitting
        train = spread(self.data.train, len(test))
        last_clean, last_robust = self._evaluate(model, test)
        _, last_train_robust = self._evaluate(model, train)
        if self.progress.best_epoch == self.progress.epoch:
            test_clean, test_robust, train_robust = last_clean, last_robust, last_train_robust
        else:
            model.load_state_dict(self.best_weights)
            test_clean, test_robust = self._evaluate(model, test)
            _, train_robust = self._evaluate(model, train)
        config, progress = self.config, self.progress
        checkpoint.export_model(
            self.run_dir / MODEL_FILE,
            self.best_weights,
            self.description.to_metadata() | {"epoch": str(progress.best_epoch), "config_hash": config_hash(config)},
        )
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
            "data": {"name": self.data.name, **self.fingerprints},
            "config_hash": config_hash(config),
        }
        plot_learning_curves(self.run_dir, read_metrics(self.run_dir), progress.best_epoch)
        write_report(self.run_dir, fields)
        return fields

    def _momentum(self) -> dict[str, Tensor]:
        buffers = {
            name: self.optimizer.state[parameter].get("momentum_buffer")
            for name, parameter in self.model.named_parameters()
            if parameter in self.optimizer.state
        }
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}

    def _save(self) -> Path:
        if self.average is not None:
            self.progress.averaged = self.average.count
        state = dataclasses.asdict(self.progress) | {
            "config_hash": config_hash(self.config),
            **self.fingerprints,
            **self.description.to_metadata(),
        }
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": self._momentum(),
            "best_model": self.best_weights,
        }
        if self.average is not None and self.average.started:
            tensors["average"] = self.average.state()
        if self.step.loss_scale is not None:
            tensors["loss_scale"] = self.step.loss_scale.state()
        return checkpoint.save(
            self.run_dir / CHECKPOINTS,
            f"epoch-{self.progress.epoch}",
            tensors,
            state,
            self.config.keep_checkpoints,
        )

    def _resume(self) -> None:
        """Go on from the newest sound checkpoint, if there is one."""
        found = checkpoint.load_latest(self.run_dir / CHECKPOINTS)
        if found is None:
            return
        self.messages += [f"skipped a checkpoint: {line}" for line in found.skipped]
        if any(found.state.get(key) != value for key, value in self.fingerprints.items()):
            raise ConfigError(
                f"--run-dir: {self.run_dir} was trained on other images; restore the data or choose another"
            )
        self.model.load_state_dict(found.tensors["model"])
        for name, parameter in self.model.named_parameters():
            buffer = found.tensors["optimizer"].get(name)
            if buffer is not None:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
        self.best_weights = found.tensors["best_model"]
        self.progress = Progress(**{field.name: found.state[field.name] for field in dataclasses.fields(Progress)})
        if self.average is not None and self.progress.averaged:
            self.average.load(found.tensors["average"], self.progress.averaged)
        if self.step.loss_scale is not None and "loss_scale" in found.tensors:
            self.step.loss_scale.load(found.tensors["loss_scale"])
        self.messages.append(f"going on after epoch {self.progress.epoch}, from {found.path}")


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

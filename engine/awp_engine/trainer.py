"""Trains one model from a configuration, and goes on where a run directory left off."""

import dataclasses
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine import checkpoint
from awp_engine.config import Config, ConfigError, config_hash, learning_rate, load_config, require_same_run, to_json
from awp_engine.data import Dataset, Split, load_dataset, train_batches
from awp_engine.evaluation import PgdAttack, evaluate
from awp_engine.loading import CHECKPOINTS, MODEL_FILE, ModelDescription
from awp_engine.objectives import OBJECTIVES
from awp_engine.perturbation import TrainingStep
from awp_engine.report import plot_learning_curves, write_report
from awp_engine.run_log import RunLog, read_metrics
from awp_kernels import AdversarialWeightPerturbation
from awp_kernels.philox import mix_seed

# the hold-out is the same for every run, so that runs of different seeds can be compared
_HOLD_OUT_SEED = 0
_ATTACK_NOISE = 1
_EVALUATION_NOISE = 2


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


def choose_device(name: str) -> torch.device:
    """The device that `--device` asks for.

    Raises:
        ConfigError: cuda was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: expected a machine with a CUDA device for 'cuda', found none; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_data(config: Config) -> Dataset:
    """The data set that the configuration names, on the CPU.

    Raises:
        DataError: naming the file that is missing or damaged.
    """
    data = config.data
    return load_dataset(data.name, root=data.root, held_out_fraction=data.held_out_fraction, seed=_HOLD_OUT_SEED)


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
        seed=mix_seed(config.seed, _EVALUATION_NOISE) if seed is None else seed,
    )


def _set_up_torch(config: Config, device: torch.device) -> None:
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = device.type == "cuda" and not config.deterministic
    torch.manual_seed(mix_seed(config.seed))


def fast_memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """channels_last, which convolutions run fastest in, where it is safe."""
    # torch 2.13's oneDNN writes past the end in 1x1 convolutions with stride, channels_last, of fewer than 8 channels
    narrow = any(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.in_channels < 8 for m in model.modules())
    return torch.contiguous_format if device.type == "cpu" and narrow else torch.channels_last


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
        self.config = config
        self.run_dir = config.resolved_run_dir
        self.device = choose_device(config.device)
        data = load_data(config)
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
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.optimizer.lr,
            momentum=config.optimizer.momentum,
            weight_decay=config.optimizer.weight_decay,
            nesterov=config.optimizer.nesterov,
        )
        self.step = TrainingStep(
            model=self.model,
            optimizer=self.optimizer,
            objective=OBJECTIVES[config.method],
            attack=config.attack,
            awp=self._weight_perturbation(),
            public_code=config.awp.public_code,
        )
        self.progress = Progress()
        self.best_weights = _copy(self.model.state_dict())
        self.messages: list[str] = []
        self._resume()

    def _weight_perturbation(self) -> AdversarialWeightPerturbation | None:
        awp = self.config.awp
        return AdversarialWeightPerturbation(self.model, awp.gamma, scope=awp.scope) if awp.gamma > 0 else None

    def run(self) -> dict[str, Any]:
        """Train what is left, measure the selected weights on the test split, and write the results.

        Returns:
            The fields of report.json.

        Raises:
            TrainingError: the loss is not finite.
            CheckpointError: a checkpoint could not be written; the one before is intact.
        """
        config = self.config
        with RunLog(self.run_dir, config, config.epochs, config.log_interval, start_epoch=self.progress.epoch) as log:
            for message in self.messages:
                log.message(message)
            for epoch in range(self.progress.epoch + 1, config.epochs + 1):
                began = time.monotonic()
                metrics = self._train_epoch(epoch, log)
                if epoch % config.evaluation.evaluate_every == 0 or epoch == config.epochs:
                    metrics |= self._select(epoch)
                self.progress.epoch = epoch
                self.progress.seconds += time.monotonic() - began
                log.end_epoch(epoch, metrics | {"seconds": self.progress.seconds})
                if epoch % config.checkpoint_every == 0 or epoch == config.epochs:
                    self._save()
            log.message("measuring the selected weights on the test split")
            return self._finish()

    def _train_epoch(self, epoch: int, log: RunLog) -> dict[str, float | int | None]:
        config = self.config
        steps = math.ceil(len(self.data.train) / config.batch_size)
        log.begin_epoch(epoch, steps)
        loss_sum, correct = torch.zeros(2, dtype=torch.float64, device=self.device)
        perturb = epoch > config.awp.warmup
        seed = mix_seed(config.seed, epoch, _ATTACK_NOISE)
        lr, began = 0.0, time.monotonic()
        for index, (x, y, ids) in enumerate(self._batches(epoch)):
            x = x.contiguous(memory_format=self.memory_format)
            lr = learning_rate(config.optimizer, config.epochs, epoch - 1 + index / steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            result = self.step(x, y, sample_ids=ids, seed=seed, perturb=perturb)
            loss_sum += result.loss * len(x)
            correct += result.correct
            log.step(result.loss, lr, len(x))
        loss, accuracy = (torch.stack([loss_sum, correct]) / len(self.data.train)).tolist()
        if not math.isfinite(loss):
            raise TrainingError(
                f"epoch {epoch}: the training loss is {loss}; the checkpoint before it is kept: "
                "start again elsewhere with a smaller --optimizer.lr"
            )
        return {
            "loss": loss,
            "lr": lr,
            "train_pgd_accuracy": accuracy,
            "images_per_second": len(self.data.train) / (time.monotonic() - began),
        }

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        config = self.config
        return train_batches(
            self.data.train,
            batch_size=config.batch_size,
            seed=config.seed,
            epoch=epoch,
            pad=config.data.pad,
            flip=config.data.flip,
        )

    def _evaluate(self, model: nn.Module, split: Split) -> tuple[float, float]:
        batch_size = self.config.evaluation.batch_size
        accuracy = evaluate(model, split, evaluation_attack(self.config), batch_size=batch_size)
        return accuracy.clean, accuracy.robust

    def _select(self, epoch: int) -> dict[str, float | int | None]:
        """Measure the epoch on held-out images, and keep its weights if none were better."""
        limit = self.config.evaluation.held_out_limit
        clean, robust = self._evaluate(self.model, _sample(self.data.held_out, limit))
        best = self.progress
        # the later of equals has trained longer; clean accuracy decides between equally robust ones
        if (robust, clean) >= (best.best_robust, best.best_clean):
            best.best_epoch, best.best_robust, best.best_clean = epoch, robust, clean
            self.best_weights = _copy(self.model.state_dict())
        return {"held_out_clean_accuracy": clean, "held_out_pgd_accuracy": robust}

    def _finish(self) -> dict[str, Any]:
        self.model.load_state_dict(self.best_weights)
        test_clean, test_robust = self._evaluate(self.model, self.data.test)
        # as many training images as test images: the gap between the two is the overfitting
        _, train_robust = self._evaluate(self.model, _sample(self.data.train, len(self.data.test)))
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
            "selected_epoch": progress.best_epoch,
            "epochs": progress.epoch,
            "seconds": progress.seconds,
            "preset": config.preset,
            "seed": config.seed,
            "gamma": config.awp.gamma,
            "attack": {
                "norm": config.attack.norm,
                "epsilon": config.attack.epsilon,
                "steps": config.evaluation.steps,
                "step_size": config.evaluation_step_size,
            },
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "data": {"name": self.data.name, "fingerprint": self.data.fingerprint},
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
        state = dataclasses.asdict(self.progress) | {
            "config_hash": config_hash(self.config),
            "data_fingerprint": self.data.fingerprint,
            **self.description.to_metadata(),
        }
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": self._momentum(),
            "best_model": self.best_weights,
        }
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
        if found.state.get("data_fingerprint") != self.data.fingerprint:
            raise ConfigError(
                f"--run-dir: {self.run_dir} was trained on other images; restore the data or choose another"
            )
        self.model.load_state_dict(found.tensors["model"])
        for name, parameter in self.model.named_parameters():
            buffer = found.tensors["optimizer"].get(name)
            if buffer is not None:
                # in the parameter's memory format, as the optimizer keeps it
                self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
        self.best_weights = found.tensors["best_model"]
        self.progress = Progress(**{field.name: found.state[field.name] for field in dataclasses.fields(Progress)})
        self.messages.append(f"going on after epoch {self.progress.epoch}, from {found.path}")


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _sample(split: Split, limit: int | None) -> Split:
    if limit is None or limit >= len(split):
        return split
    # evenly spread: files are often sorted by class
    return split.select(torch.arange(limit, device=split.labels.device) * len(split) // limit)

"""The engine's own step, from the trainer's building blocks."""

import json

import torch
from torch import nn

from awp_engine.config import (
    AttackConfig,
    AwpConfig,
    Config,
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    from_json,
    to_json,
)
from awp_engine.data import Batch
from awp_engine.device import choose_convolutions, fast_memory_format
from awp_engine.step.values import Phase, StepResult
from awp_engine.train.setup import build_step, capture_step, training_attack

from .common import Settings


def engine_config(settings: Settings) -> Config:
    """The settings as the trainer takes them.

    Raises:
        ConfigError: naming the flag that is wrong.
    """
    config = Config(
        method="trades" if settings.trades else "at",
        beta=settings.beta,
        model=ModelConfig(name=settings.model),
        attack=AttackConfig(
            epsilon=settings.epsilon,
            step_size=settings.step_size,
            steps=settings.steps,
            bn_mode="eval" if settings.trades else "train",
            start="normal" if settings.trades else "uniform",
        ),
        awp=AwpConfig(gamma=settings.gamma if settings.perturbs_weights else 0.0),
        optimizer=OptimizerConfig(
            lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, schedule="constant"
        ),
        global_batch_size=settings.batch_size,
        device=settings.device,  # pyright: ignore[reportArgumentType]
    )
    values = json.loads(to_json(config))
    for name, value in settings.engine.items():
        group, *rest = [values, *name.split(".")]
        for key in rest[:-1]:
            group = group.get(key)
            if not isinstance(group, dict):
                raise ConfigError(f"--engine: awp_engine has no group of settings for {name!r}")
        group[rest[-1]] = value
    return from_json(json.dumps(values), "--engine")


class EngineArm:
    """awp_engine as its trainer runs it.

    Attributes:
        plain_step: what computes.
        taken_step: the same, or CUDA graphs of it.
    """

    def __init__(self, config: Config, model: nn.Module, device: torch.device) -> None:
        # as the trainer sets torch up
        choose_convolutions(device)
        self.memory_format = fast_memory_format(model, device)
        # torch's stub does not know the keyword
        self.model = model.to(device=device, memory_format=self.memory_format)  # pyright: ignore[reportCallIssue]
        self.plain_step = build_step(config, self.model)
        self.plain_step.models.refresh_()
        self.taken_step = capture_step(config, self.plain_step)
        self._attack = training_attack(config.attack)

    def step(self, batch: Batch, index: int) -> StepResult:
        """One training step, see `Arm`."""
        return self.taken_step(batch, Phase(attack=self._attack, seed=index))

    def plainly(self, batch: Batch, index: int) -> StepResult:
        """The same without graphs."""
        return self.plain_step(batch, Phase(attack=self._attack, seed=index))


def engine_arm(settings: Settings, model: nn.Module) -> EngineArm:
    """awp_engine as its trainer runs it."""
    return EngineArm(engine_config(settings), model, torch.device(settings.device))

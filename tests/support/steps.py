"""Steps, made of settings and called with tensors, as most tests have them."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awp_engine.attack import Attack
from awp_engine.config import AttackConfig, AwpConfig, Config, ConfigError
from awp_engine.data import Batch
from awp_engine.distributed.ranks import Ranks
from awp_engine.step.awp_step import Ascent, AwpStep
from awp_engine.step.free import FreeStep
from awp_engine.step.objectives import Objective
from awp_engine.step.precision import WorkingModels
from awp_engine.step.values import Phase, Step, StepResult
from awp_engine.train import setup


class TensorStep:
    """A step that is called with tensors.

    Attributes:
        step: what is called.
        taken: takes it: the step itself, or graphs of it.
    """

    def __init__(self, step: AwpStep, settings: AttackConfig, taken: Step | None = None) -> None:
        self.step, self.taken, self.settings = step, taken or step, settings
        self.models, self.passes, self.awp = step.models, step.passes, step.awp
        self.optimizer = step.update.optimizer

    def phase(self, seed: int, perturb: bool, fast: bool) -> Phase:
        make = setup.cheap_attack if fast else setup.training_attack
        return Phase(attack=make(self.settings), seed=seed, perturb=perturb)

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        sample_ids: Tensor,
        seed: int = 0,
        perturb: bool = True,
        fast: bool = False,
        of: int | None = None,
        **changes: Any,
    ) -> StepResult:
        phase = dataclasses.replace(self.phase(seed, perturb, fast), **changes)
        return self.taken(Batch(x, y, sample_ids, len(x) if of is None else of), phase)

    def free(self, x: Tensor, y: Tensor, delta: Tensor, of: int | None = None) -> StepResult:
        """One update of free training."""
        free = FreeStep(self.step, self.step, replays=1, memory_format=torch.contiguous_format)
        batch = Batch(x, y, torch.arange(len(x)), len(x) if of is None else of)
        return free.replay(batch, self.phase(0, False, False), delta)

    def attacked(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int, **changes: Any) -> Tensor:
        """The images that training attacks `model` with; `changes` are fields of the attack."""
        attack: Attack = dataclasses.replace(setup.training_attack(self.settings), **changes)
        return self.passes.attack_whole(attack, model, Batch(x, y, ids, len(x)), seed=seed)


def as_teacher(teacher: nn.Module) -> WorkingModels:
    """A network as a method's teacher."""
    return WorkingModels(teacher.eval().requires_grad_(False))


def make_step(
    model: nn.Module,
    *,
    attack: AttackConfig,
    options: AwpConfig | None = None,
    models: WorkingModels | None = None,
    **given: Any,
) -> TensorStep:
    """A step of parts, `given` as to `AwpStep`."""
    options = options or AwpConfig()
    shared = given.get("awp") is not None and options.ascent == "shared"
    ascent = Ascent(kind=options.ascent, steps=options.ascent_steps, c_min=options.c_min)
    models = models or WorkingModels(model, shared_ascent=shared)
    return TensorStep(AwpStep(models=models, ascent=ascent, **given), attack)


def build_step(
    config: Config,
    model: nn.Module,
    ranks: Ranks | None = None,
    class_weights: Tensor | None = None,
    objective: Objective | None = None,
) -> TensorStep:
    """The step that a configuration describes, for ten classes."""
    objective = objective or setup.objective_of(config, torch.device("cpu"), 10, (1, 8, 8))
    given = {"class_weights": class_weights, "objective": objective}
    return TensorStep(setup.build_step(config, model, ranks, **given), config.attack)


def require_refused(
    config: Config, wrong: dict[str, Any], message: str, method: str, name: str, reason: str, folder: Path
) -> None:
    """What does not go with a method is refused, and with a class of one's own that is the same; `name`: its class."""
    with pytest.raises(ConfigError, match=f"{message}.* with --method {method}, {reason}"):
        dataclasses.replace(config, **wrong)
    (folder / "own.py").write_text(f"from awp_engine.step.objectives import {name}\n")
    own = f"{folder / 'own.py'}:{name}"
    with pytest.raises(ConfigError, match=f"{message}.* with --method .*own.py:{name}, {reason}"):
        setup.objective_of(dataclasses.replace(config, method=own, **wrong), torch.device("cpu"))

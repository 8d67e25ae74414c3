"""A momentum of their own for running statistics, the first step's of 1, against plain formulas."""

import dataclasses
from pathlib import Path

import pytest
import torch
from samples import images
from steps import make_step
from torch import Tensor, nn

from awp_engine.config import AttackConfig, AwpConfig, Config, ConfigError, DataConfig, ModelConfig, OptimizerConfig
from awp_engine.distributed.ranks import Ranks
from awp_engine.models import build_model
from awp_engine.models.batch_norm import layers, set_momentum
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import build_objective
from awp_engine.step.precision import Precision, WorkingModels
from awp_engine.train.setup import Setup

MOMENTUM = 0.01


class OneNorm(nn.Module):
    """Its batch normalisation sees the images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(x).flatten(1))


@pytest.mark.parametrize("kind", ["own layers", "another's", "16-bit copies"])
def test_the_first_step_takes_its_statistics_whole(kind) -> None:
    """TRADES makes two passes a step, of x' and of x: after the first step there are those of x alone."""
    torch.manual_seed(0)
    half = kind == "16-bit copies"
    dtype = torch.float32 if half else torch.float64
    another = kind == "another's"
    model = OneNorm() if another else build_model("preact-resnet-digits", 10, (0.0,), (1.0,), width=4)
    model = model.to(dtype).train()
    set_momentum(model, MOMENTUM)
    models = WorkingModels(model, Precision(descent=torch.bfloat16) if half else None)
    step = make_step(
        model,
        models=models,
        attack=AttackConfig(epsilon="0"),
        optimizer=build_optimizer(model, OptimizerConfig(lr=1e-12), working=models.updated),
        objective=build_objective("trades"),
    )
    seen: list[tuple[Tensor, Tensor]] = []
    # the first normalisation of a pass: the weights before it stand still
    first = layers(step.models.descent)[0]
    first.register_forward_pre_hook(lambda _, given: seen.append(_statistics(given[0])))
    expected_mean, expected_var = first.running_mean.double(), first.running_var.double()
    for index in range(3):
        x = images((12, 1, 8, 8), dtype, seed=index)
        seen.clear()
        step(x, torch.arange(12) % 10, sample_ids=torch.arange(12), whole_statistics=index == 0)
        part = 1.0 if index == 0 else MOMENTUM
        assert len(seen) == 2
        for mean, var in seen:
            expected_mean = (1 - part) * expected_mean + part * mean
            expected_var = (1 - part) * expected_var + part * var
        tolerance = 1e-5 if half else 1e-9
        assert (first.running_mean - expected_mean).abs().max() <= tolerance
        assert (first.running_var - expected_var).abs().max() <= tolerance
        if another:
            # no step of an attack: both passes see the images
            assert index or (first.running_mean - x.mean((0, 2, 3))).abs().max() <= 1e-12
    assert {layer.momentum for module in (model, step.models.descent) for layer in layers(module)} == {MOMENTUM}


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    values = images.detach().double()
    return values.mean((0, 2, 3)), values.var((0, 2, 3), unbiased=True)


def _settings(directory: Path, **model) -> Config:
    return Config(
        device="cpu",
        run_dir=directory / "run",
        data=DataConfig(train_limit=20),
        model=ModelConfig(**model),
        awp=AwpConfig(gamma=0.0),
        global_batch_size=10,
    )


def test_the_first_step_of_a_run_alone_is_told_so(tmp_path) -> None:
    config = _settings(tmp_path, width=2, bn_momentum=0.25)
    setup = Setup(config, Ranks())
    told = [setup.schedule(epoch, step).whole_statistics for epoch in (1, 2) for step in range(len(setup.batches))]
    assert told == [True] + [False] * (len(told) - 1)
    assert len(told) == 4
    assert {layer.momentum for layer in layers(setup.model)} == {0.25}
    other = dataclasses.replace(config, model=ModelConfig(width=2), run_dir=tmp_path / "other")
    assert not Setup(other, Ranks()).schedule(1, 0).whole_statistics


def test_a_model_without_batch_normalisation_refuses_a_momentum(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = (
        "from torch import nn\n\ndef make(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    Path("net.py").write_text(source)
    with pytest.raises(
        ConfigError, match=r"^--model\.bn-momentum: expected none for a model without batch norm.*0\.5$"
    ):
        Setup(_settings(tmp_path, name="net.py:make", bn_momentum=0.5), Ranks())
    assert not (tmp_path / "run").exists()

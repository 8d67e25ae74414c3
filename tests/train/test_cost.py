"""What a step costs: the passes of every preset counted, layer by layer, against what the log and the docs say."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from places import ROOT
from samples import images
from steps import as_teacher
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from awp_engine.config import Config, DistributedConfig, OptimizerConfig, PrecisionConfig
from awp_engine.config.presets import PRESETS, build_preset
from awp_engine.data import Batch
from awp_engine.models.views import add_auxiliary_
from awp_engine.optim.average import WeightAverage
from awp_engine.step.free import FreeStep
from awp_engine.step.values import Phase
from awp_engine.train import setup
from awp_engine.train.cost import forward_units
from awp_engine.train.schedule import Schedule

_IMAGES, _IN, _OUT = 8, 5, 7
RECIPES = (ROOT / "docs" / "recipes.md").read_text()


class _Products(TorchDispatchMode):
    """Counts the images in the products of the layer from _IN to _OUT features: forward, and for both gradients."""

    images = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            *_, left, right = args
            sizes = (*left.shape, right.shape[1])
            if {_IN, _OUT} <= set(sizes):
                self.images += math.prod(sizes) / (_IN * _OUT)
        return function(*args, **(kwargs or {}))


class _Network(nn.Sequential):
    """Its features are those of the layers in the middle."""

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self[:-1](x)[..., None, None]]


def network(size: int = 1) -> nn.Module:
    """Its layers in the middle need the gradient of their input in every training pass; `size`: how many, odd."""
    torch.manual_seed(0)
    first = (nn.Conv2d(3, _IN, 3), nn.BatchNorm2d(_IN), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    sizes = ([_IN, _OUT] * size)[: size + 1]
    middle = (nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in itertools.pairwise(sizes))
    return _Network(*first, *middle, nn.Linear(_OUT, 10)).train()


def counted(config: Config, epoch: int = 1, number: int = 1, other: int = 1) -> float:
    """Passes of an update, in forward passes of an image; a backward pass has one part for each kind of gradient.

    It is step `number` of `epoch`; `other`: the size of the network that a method asks or trains along.
    """
    config = dataclasses.replace(
        config,
        precision=PrecisionConfig(attack="fp32", ascent="fp32", descent="fp32"),
        distributed=DistributedConfig(),
        optimizer=OptimizerConfig(),
        micro_batch_size=None,
        # not all of RWP's passes where no loss is small enough
        awp=dataclasses.replace(config.awp, c_min=None if config.awp.c_min is None else 1e9),
    )
    model, objective = network(), setup.objective_of(config, torch.device("cpu"), 10, (3, 8, 8))
    if objective.views > 1:
        model.register_buffer("mean", torch.zeros(1, 3, 1, 1))
    if objective.views > 1 and not objective.joint_views:
        add_auxiliary_(model)
    objective.partner = network(other) if objective.partner_name is not None else None
    step = setup.build_step(config, model, objective=objective)
    if config.average.kind == "ema":
        step.passes.objective.average = WeightAverage(model, config.average, config.epochs).model
    if objective.uses_teacher:
        objective.teacher = as_teacher(network(other))
    x = images((_IMAGES, 3 * objective.views, 8, 8))
    y = torch.arange(_IMAGES) % 10
    free = config.attack.fast == "free"
    attack, cheap = setup.training_attack(config.attack), setup.cheap_attack(config.attack)
    attack = Schedule(config=config, steps=1, attack=attack, cheap=cheap)(epoch, 0).attack
    taken = FreeStep(step, step, replays=1, memory_format=torch.contiguous_format) if free else step
    with _Products() as products:
        # not the first step, which makes LIET's table
        phase = Phase(attack=attack, free=free, epoch=epoch, step=number)
        taken(Batch(x, y, torch.arange(_IMAGES), _IMAGES), phase)
    return products.images / _IMAGES


@pytest.mark.parametrize("gamma", [0.0, 0.01])
@pytest.mark.parametrize("method", ["ard", "adaad"])
def test_a_step_of_a_method_without_a_preset_costs_what_is_said(method: str, gamma: float) -> None:
    base = build_preset("cifar10-preact-resnet18-rslad")
    config = dataclasses.replace(base, method=method, awp=dataclasses.replace(base.awp, gamma=gamma))
    assert counted(config) == forward_units(config)


@pytest.mark.parametrize("name", ["wrn-34-10-lbgat", "preact-resnet18-rslad", "preact-resnet18-hat"])
def test_a_larger_network_beside_the_model_costs_its_own_passes(name: str) -> None:
    config = build_preset(f"cifar10-{name}")
    config = dataclasses.replace(config, awp=dataclasses.replace(config.awp, gamma=0.01, every=1))
    assert counted(config, other=3) == forward_units(config, other=3.0) > forward_units(config)


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_of_a_preset_costs_what_is_said(name: str) -> None:
    """In the first and the last epoch of each cost; batches of OA-AT take turns."""
    config = build_preset(name)
    cheap = config.attack.fast != "none"
    said = [forward_units(config, cheap=cheap, epoch=epoch) for epoch in range(1, config.epochs + 1)]
    numbers = (1, 2) if config.method == "oaat" else (1,)
    for units in set(said):
        for epoch in {said.index(units) + 1, len(said) - said[::-1].index(units)}:
            assert sum(counted(config, epoch, number) for number in numbers) / len(numbers) == units
    assert forward_units(config, cheap=cheap) == pytest.approx(sum(said) / len(said), rel=1e-12)


ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in RECIPES.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("row", [row for row in ROWS if row[-1][:1].isdigit()], ids=lambda row: row[0])
def test_the_docs_table_of_recipes_is_true(row: list[str]) -> None:
    """Every preset that a row names exists and costs what its last column says."""
    names = re.findall(r"`([a-z0-9.-]+)`", row[2])
    assert names
    assert {round(forward_units(build_preset(name)), 1) for name in names} == {float(row[-1])}

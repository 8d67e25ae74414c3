"""Learning rates by layer against torch's optimizers with a group of their own for every parameter."""

import dataclasses
import importlib

import pytest
import torch
from torch import nn

from awp_engine.config import ConfigError, OptimizerConfig
from awp_engine.models import build_model
from awp_engine.models.depth import layer_numbers
from awp_engine.models.import_timm import import_timm
from awp_engine.optim.optimizer import build_optimizer, set_learning_rate

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SGD = OptimizerConfig(kind="sgd", lr=0.1, momentum=0.9, weight_decay=0.01, layer_decay=0.7)
ADAMW = OptimizerConfig(kind="adamw", lr=0.01, beta2=0.95, weight_decay=0.1, layer_decay=0.6, decay_all=False)

# what follows what in three networks, by the beginning of a parameter's name
LAYERS = {
    "preact-resnet-digits": ["conv1.", "layer1.0.", "layer2.0.", "layer3.0.", "bn. linear."],
    "wrn-10-1": ["conv1.", "block1.", "block2.", "block3.", "bn1. fc."],
    "timm:vit_tiny_patch16_224": [
        "network.cls_token network.pos_embed network.patch_embed.",
        *(f"network.blocks.{block}." for block in range(11)),
        "network.blocks.11. network.norm.",
        "network.head.",
    ],
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    size = (32, 32) if name.startswith("timm:") else None
    return build_model(name, 4, MEAN, STD, image_size=size).double()


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_has_the_layer_that_its_name_says(name):
    found = layer_numbers(model_of(name), name)
    assert found.keys() == dict(model_of(name).named_parameters()).keys()
    for key, layer in found.items():
        assert key.startswith(tuple(LAYERS[name][layer].split())), (key, layer)


def test_timm_cnns_have_timms_layers():
    import_timm()
    groups_of = importlib.import_module("timm.optim").param_groups_layer_decay
    for name in ("timm:resnet10t", "resnet-18"):
        model = model_of(name)
        groups = groups_of(model.network, layer_decay=0.5)
        scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        found = layer_numbers(model, name)
        top = max(found.values())
        assert top > 4
        for key, parameter in model.named_parameters():
            assert 0.5 ** (top - found[key]) == scales[id(parameter)]


@pytest.mark.parametrize("config", [SGD, ADAMW], ids=lambda config: config.kind)
def test_steps_are_those_of_torch_with_a_rate_a_parameter(config):
    name = "preact-resnet-digits"
    ours, theirs = model_of(name), model_of(name)
    layers = layer_numbers(ours, name)
    optimizer = build_optimizer(ours, config, layers=layers)

    def group(key: str, parameter: nn.Parameter) -> dict:
        decays = config.decay_all or parameter.ndim > 1
        return {
            "params": [parameter],
            "weight_decay": config.weight_decay if decays else 0.0,
            "scale": config.layer_decay ** (4 - layers[key]),
        }

    groups = [group(key, parameter) for key, parameter in theirs.named_parameters()]
    if config.kind == "sgd":
        plain = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum)
    else:
        plain = torch.optim.AdamW(groups, lr=1.0, betas=(config.momentum, config.beta2))
    for step, rate in enumerate((config.lr, config.lr, config.lr / 10)):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            b.grad = a.grad.clone()
        if step:
            set_learning_rate(optimizer, rate)
        for entry in plain.param_groups:
            entry["lr"] = rate * entry["scale"]
        optimizer.step()
        plain.step()
    # AdamW's kernel reads rates in fp32
    tolerance = 1e-12 if config.kind == "sgd" else 1e-8
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}")


def test_one_rate_stays_one_group_of_calls():
    optimizer = build_optimizer(model_of("wrn-10-1"), dataclasses.replace(SGD, layer_decay=1.0))
    assert len({id(group["lr"]) for group in optimizer.param_groups}) == 1


def test_a_model_without_known_layers_is_refused(tmp_path):
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\n"
        "def make(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))\n"
        "class Bad(nn.Sequential):\n"
        "    def group_matcher(self): return {'stem': 7}\n"
        "def bad(num_classes): return Bad(*make(num_classes))\n"
    )
    for factory, message in (
        ("make", r"^--optimizer\.layer-decay: expected 1 with --model\.name \S+, which does not say how its layers"),
        ("bad", r"^--model\.name: \S+: group_matcher raised TypeError: "),
    ):
        name = f"{file}:{factory}"
        model = build_model(name, 4, MEAN, STD, image_size=(2, 2))
        with pytest.raises(ConfigError, match=message):
            layer_numbers(model, name)

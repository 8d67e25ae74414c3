"""Gradient checkpointing: the same bits as without, and less memory."""

import copy
import dataclasses

import pytest
import torch
from own_models import Net
from samples import images
from steps import TensorStep, build_step
from torch import nn
from torch.nn import functional

from awp_engine.config import AttackConfig, AwpConfig, Config, ConfigError, ModelConfig, PrecisionConfig
from awp_engine.config.identity import from_flat, to_flat
from awp_engine.config.rules import choose_speed
from awp_engine.models import WrappedClassifier, build_model
from awp_engine.models.checkpointing import checkpoint_activations_
from awp_engine.models.wrapped import last_layers
from awp_engine.optim.optimizer import optimizer_tensors

SHAPE = (3, 32, 32)
X, Y = images((6, *SHAPE)), torch.tensor([0, 1, 2, 3, 0, 1])
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CONFIG = Config(
    attack=AttackConfig(steps=2),
    awp=AwpConfig(gamma=0.005),
    precision=PrecisionConfig(attack="fp32"),
    micro_batch_size=4,
)
BF16 = dataclasses.replace(CONFIG, method="trades", precision=PrecisionConfig(attack="bf16"), micro_batch_size=None)


class Blocks(Net):
    """Two blocks that are checkpointed when they are told to be, with a layer that is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(4, 3)
        self.layer, self.fc, self.on = layer, nn.LazyLinear(4), False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.on = enable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def block(x: torch.Tensor) -> torch.Tensor:
            return self.layer(functional.relu(self.norm1(self.conv1(x))))

        x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.on else block(x)
        return self.fc(x.flatten(1))


class OwnNoise(nn.Module):
    """Draws from a generator that nothing replays."""

    generator = torch.Generator().manual_seed(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand(x.shape, generator=self.generator)


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "dropout":
        network = Blocks(nn.Dropout(0.3))
        network(X)
        return WrappedClassifier(network, 4, MEAN, STD, name=name, heads=last_layers(network, 4))
    return build_model(name, 4, MEAN, STD, image_size=(32, 32))


def trained(model: nn.Module, config: Config) -> tuple[TensorStep, dict[str, torch.Tensor]]:
    """The step after three, and all that they left."""
    step = build_step(config, model.train())
    for number in range(3):
        torch.manual_seed(number)
        step(X, Y, sample_ids=torch.arange(6), seed=number)
        torch.rand(1)
    return step, {**model.state_dict(), **optimizer_tensors(model, step.optimizer), "next": torch.rand(1)}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("preact-resnet-18", CONFIG),
        ("wrn-10-2", BF16),
        ("resnet-18", CONFIG),
        ("dropout", CONFIG),
        ("timm:resnet10t", BF16),
        ("timm:vit_tiny_patch16_224", CONFIG),
    ],
)
def test_steps_end_in_the_same_bits(name, config):
    plain = model_of(name)
    frugal = copy.deepcopy(plain)
    checkpoint_activations_(frugal, SHAPE, name)
    (_, expected), (_, found) = trained(plain, config), trained(frugal, config)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", ["preact-resnet-digits", "wrn-16-1", "resnet-18", "timm:vit_tiny_patch16_224"])
def test_fewer_activations_are_kept(name):
    def kept(model: nn.Module) -> int:
        """Bytes that the graph of a pass holds, beside weights."""
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(X).sum()
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        return sum(size for place, size in held.items() if place not in own)

    model = model_of(name).train()
    before = kept(model)
    checkpoint_activations_(model, SHAPE, name)
    # the blocks' own inputs are kept by checkpoints, not by the graph
    assert kept(model) < 0.6 * before


def test_models_that_cannot_are_refused_in_one_line():
    def wrapped(network: nn.Module) -> WrappedClassifier:
        network(X)
        return WrappedClassifier(network, 4, MEAN, STD, name="net", heads=["fc"])

    twice = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
    for network, message in (
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), r"which has no set_grad_checkpointing"),
        (Blocks(OwnNoise()), r"its blocks compute something else the second time"),
        (Blocks(twice), r"its blocks compute something else the second time"),
    ):
        with pytest.raises(ConfigError, match=message) as told:
            checkpoint_activations_(wrapped(network), SHAPE, "net")
        assert str(told.value).startswith("--model.checkpoint-activations: expected false with --model.name net")
    with pytest.raises(ConfigError, match=r"^--model\.checkpoint-activations: net: set_grad_checkpointing\(True\)"):
        network = Blocks(nn.Identity())
        network.set_grad_checkpointing = lambda enable: 1 / 0
        checkpoint_activations_(wrapped(network), SHAPE, "net")


@pytest.mark.parametrize("changes", [{"compile": True}, {"distributed.strategy": "fsdp"}])
def test_what_it_does_not_go_with_is_refused(changes):
    model = ModelConfig(checkpoint_activations=True)
    with pytest.raises(ConfigError, match=r"with --model\.checkpoint-activations"):
        from_flat(to_flat(Config(model=model)) | changes)
    assert not choose_speed(Config(model=model), cuda=True, ranks=1).cuda_graphs

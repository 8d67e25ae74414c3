"""Layers of any kind under the whole step: what a plain loop computes, with buffers where they belong."""

import copy

import own_models
import pytest
import torch
from ranks import run_ranks
from steps import TensorStep, build_step
from torch import nn
from torch.nn import functional

from awp_engine.config import AttackConfig, AwpConfig, Config, OptimizerConfig, PrecisionConfig
from awp_engine.distributed.ranks import Ranks
from awp_engine.distributed.replicas import check_replicas
from awp_engine.models.factories import wrap
from awp_engine.models.wrapped import WrappedClassifier
from awp_engine.step.precision import working_copy
from awp_engine.train.selection import other_buffers

X = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y, IDS = torch.arange(8) % 3, torch.arange(8)
GAMMA, LR, EPSILON, STEP = 0.05, 0.1, 0.1, 0.05

KINDS = {
    "batch norm": own_models.Net,
    "hand-written norm": own_models.hand_normed,
    "instance norm": own_models.instance_normed,
    "group norm, tied, unused, frozen": own_models.Odd,
    "spectral norm": own_models.spectral,
    "weight norm by hooks": own_models.old_weight_norm,
    "attention": lambda num_classes: own_models.Attention(num_classes, dropout=0.0),
    "lazy": own_models.lazy,
}


def made(kind: str) -> WrappedClassifier:
    torch.manual_seed(0)
    return wrap(KINDS[kind](num_classes=3), kind, 3, [0.3], [0.4], (8, 8)).train()


def settings(**changes) -> Config:
    return Config(
        attack=AttackConfig(epsilon=str(EPSILON), step_size=str(STEP), steps=2, start="none", bn_mode="eval"),
        awp=AwpConfig(gamma=GAMMA),
        optimizer=OptimizerConfig(lr=LR, momentum=0.0, weight_decay=0.0),
        precision=PrecisionConfig(attack="fp32", ascent="fp32", descent="fp32"),
        **changes,
    )


def stepped(step: TensorStep) -> None:
    for _ in range(2):
        assert not step(X, Y, sample_ids=IDS).skipped


def settled(model: nn.Module) -> None:
    """So that hooks leave no graph in what is copied."""
    with torch.no_grad():
        model.eval()(X)
    model.train()


def plainly(model: nn.Module) -> None:
    """Algorithm 1 of the AWP paper, on copies; batch normalisation is in eval mode in the attack, other layers not."""
    for _ in range(2):
        settled(model)
        attacked = copy.deepcopy(model)
        for layer in attacked.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        x_adv = X.clone()
        for _ in range(2):
            x_adv.requires_grad_()
            attacked.load_state_dict(model.state_dict())
            (gradient,) = torch.autograd.grad(functional.cross_entropy(attacked(x_adv), Y), x_adv)
            x_adv = (x_adv.detach() + STEP * gradient.sign()).clamp(X - EPSILON, X + EPSILON).clamp(0, 1)
        climber = copy.deepcopy(model)
        functional.cross_entropy(climber(x_adv), Y).backward()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            for name, p in climber.named_parameters():
                if p.grad is not None and p.ndim > 1 and "weight" in name:
                    model.get_parameter(name).add_(GAMMA * weights[name].norm() * p.grad / p.grad.norm())
        model.zero_grad()
        functional.cross_entropy(model(x_adv), Y).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(weights[name] if p.grad is None else weights[name] - LR * p.grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_step_is_what_a_plain_loop_computes(kind: str) -> None:
    model = made(kind)
    settled(model)
    plain = copy.deepcopy(model)
    stepped(build_step(settings(), model))
    plainly(plain)
    for (name, ours), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_all_parts_see_the_statistics_that_a_layer_assigns_anew() -> None:
    model = made("hand-written norm")
    config = settings()
    step = build_step(config, model)
    assert other_buffers(model)
    stepped(step)
    for (_, name, ours), (_, _, attacked) in zip(other_buffers(model), other_buffers(step.models.attack), strict=True):
        assert ours is attacked, name
    assert not torch.equal(model.network.norm1.moving_mean, torch.zeros(8, 1, 1))


def test_a_step_that_is_left_out_leaves_all_buffers() -> None:
    model = made("hand-written norm")
    step = build_step(settings(), model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert step(torch.full_like(X, torch.nan), Y, sample_ids=IDS).skipped
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_copy_computes_in_16_bits_by_autocast(kind: str) -> None:
    model = made(kind).eval()
    with torch.no_grad():
        expected = model(X)
        copied = working_copy(model, torch.bfloat16)
        rounded = copied(X)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, expected)
    torch.testing.assert_close(rounded, expected, rtol=0.1, atol=0.1)
    assert {p.dtype for p in copied.parameters()} == {torch.float32}


@pytest.mark.parametrize("awp", [{"ascent": "shared"}, {"ascent_steps": 2}, {"scale": "absolute"}])
def test_layers_without_a_part_in_the_logits_are_left_where_they_are(awp: dict) -> None:
    model = made("group norm, tied, unused, frozen")
    config = settings()
    config = Config(attack=config.attack, awp=AwpConfig(gamma=GAMMA, **awp), precision=config.precision)
    step = build_step(config, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepped(step)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == ["network.unused.weight", "network.unused.bias", "network.frozen.weight", "network.frozen.bias"]


def on_two_ranks(rank: int, world: int) -> bool:
    ranks = Ranks(rank=rank, world=world, local_rank=rank)
    for kind in ("hand-written norm", "group norm, tied, unused, frozen"):
        model = made(kind)
        step = build_step(settings(), model, ranks)
        rows, _ = ranks.share(len(X))
        for _ in range(2):
            step(X[rows], Y[rows], sample_ids=IDS[rows], of=len(X))
        check_replicas(ranks, model.state_dict(), kind)
    return True


def test_ranks_stay_equal_whatever_the_layers() -> None:
    assert all(run_ranks(on_two_ranks, 2))


@pytest.mark.parametrize("kind", ["batch norm", "attention"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.trace")
def test_exports(kind: str) -> None:
    model = made(kind).eval()
    with torch.no_grad():
        expected = model(X)
        program = torch.export.export(model, (X[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(program.module()(X), expected)
        torch.testing.assert_close(torch.jit.trace(model, X[:2])(X), expected)

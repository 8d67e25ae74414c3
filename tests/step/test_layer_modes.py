"""Blocks and attacks leave every layer's mode and buffers as they were, whatever the layer and whatever comes."""

import contextlib
import functools
import inspect
import sys

import pytest
import torch
import torch._dynamo
from samples import images
from steps import make_step
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrizations, spectral_norm

from awp_engine.attack import apgd, pgd
from awp_engine.attack import common as attack
from awp_engine.config import AttackConfig, AwpConfig, OptimizerConfig
from awp_engine.models import batch_norm, build_model
from awp_engine.models.batch_norm import batch_norm_mode, layer_modes, recompute_statistics
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import build_objective
from awp_kernels import AdversarialWeightPerturbation, _block

X, Y = images((6, 4, 8, 8)), torch.arange(6) % 3


class HandWritten(nn.Module):
    """A batch normalisation that knows no flag: writes in place, past the version counter, and by assignment."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("square", torch.ones(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", None)

    def forward(self, x):
        self.mean.data.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        self.square = 0.9 * self.square + 0.1 * x.detach().square().mean((0, 2, 3))
        self.count += 1
        self.last = x.detach()
        return (x - self.mean.view(-1, 1, 1)) / (self.square.view(-1, 1, 1) + 1e-5).sqrt()


class Stubborn(nn.BatchNorm2d):
    """Moves its statistics in any mode, as some quantisers do."""

    def forward(self, input):
        self.running_mean.add_(0.1)
        return nn.functional.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias)


def volume(layer):
    return nn.Sequential(nn.Unflatten(1, (4, 1)), layer, nn.Flatten(1, 2))


def counted():
    """A batch normalisation with one more buffer, which a hook writes."""
    layer = nn.BatchNorm2d(4)
    layer.register_buffer("calls", torch.zeros(()))
    layer.register_forward_pre_hook(lambda module, inputs: module.calls.add_(1) and None)
    return layer


LAYERS = {
    "BatchNorm2d with a counter": counted,
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm3d": lambda: volume(nn.BatchNorm3d(4)),
    "BatchNorm1d": lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(4), nn.Unflatten(2, (8, 8))),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4).eval(),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    "spectral norm by hooks": lambda: spectral_norm(nn.Conv2d(4, 4, 1)),
    "hand-written": HandWritten,
    "stubborn": lambda: Stubborn(4),
    "dropout": lambda: nn.Dropout(0.5),
}


def network(name):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[name](), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    model[0].training = name != "SyncBatchNorm"
    model[3].eval()  # a mixture of modes
    return model


def state(model):
    buffers = [(path, name, b) for path, module in model.named_modules() for name, b in module._buffers.items()]
    return (
        {(path, name): None if b is None else (id(b), b.clone()) for path, name, b in buffers},
        [module.training for module in model.modules()],
        [getattr(module, "track_running_stats", None) for module in model.modules()],
        [(p.grad, p.requires_grad) for p in model.parameters()],
    )


def assert_same(now, before):
    assert now[1:] == before[1:]
    assert now[0].keys() == before[0].keys()
    for name, saved in before[0].items():
        if saved is None:
            assert now[0][name] is None, name
        else:
            assert now[0][name][0] == saved[0], name
            assert torch.equal(now[0][name][1], saved[1]), name


ATTACKS = {
    "pgd": functools.partial(pgd, epsilon=0.1, step_size=0.05, steps=2),
    "apgd": functools.partial(apgd, epsilon=0.1, steps=2),
}


@pytest.mark.parametrize("kind", list(ATTACKS))
@pytest.mark.parametrize("modes", [{}, {"bn_mode": "train"}, {"mode": "eval"}, {"mode": "train", "bn_mode": None}])
@pytest.mark.parametrize("name", list(LAYERS))
def test_an_attack_leaves_any_layer_as_it_was(name, modes, kind):
    if name == "SyncBatchNorm" and "train" in modes.values():
        modes = modes | {"mode": "eval", "bn_mode": "eval"}  # in train mode torch's works on GPUs alone
    model = network(name)
    before = state(model)
    ATTACKS[kind](model, X, Y, **modes)
    assert_same(state(model), before)


@pytest.mark.parametrize("kind", list(ATTACKS))
def test_graphs_made_before_an_attack_can_still_go_back(kind):
    """As in a method that needs clean logits and attacked images: what they kept was put back, not written anew."""
    for name in ("InstanceNorm2d", "BatchNorm2d", "dropout"):
        model = network(name).eval()
        clean = model(X.clone().requires_grad_()).sum()
        ATTACKS[kind](model, X, Y)
        clean.backward()


def test_whole_eval_mode_turns_off_what_is_random():
    model = network("dropout")
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0] != output).any()))
    options = {"epsilon": 0.1, "step_size": 0.05, "steps": 2, "seed": 1}
    found = pgd(model, X, Y, mode="eval", **options)
    assert not any(seen)
    assert torch.equal(found, pgd(model, X, Y, mode="eval", **options))
    assert torch.equal(found, pgd(model.eval(), X, Y, **options))
    seen.clear()
    pgd(model.train(), X, Y, **options)
    assert all(seen)


def test_statistics_move_only_where_that_is_asked_for():
    for name in ("InstanceNorm2d", "hand-written", "BatchNorm2d"):
        model = network(name).train()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        pgd(model, X, Y, epsilon=0.1, step_size=0.05, steps=1, bn_mode="train", update_statistics=True)
        after = model.state_dict()
        changed = {key for key, value in after.items() if key not in before or not value.equal(before[key])}
        assert any(key.startswith("0.") for key in changed), name
        assert any(key.startswith("2.running") for key in changed), name


def test_statistics_that_a_layer_does_not_track_stay_untracked():
    """A layer that was frozen by its flag, in a block in which the others may move."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False))
    model[0].track_running_stats = False
    before = model[0].running_mean.clone()
    with batch_norm_mode(model, "train", update_statistics=True):
        model(X + 1)
    assert torch.equal(model[0].running_mean, before)
    assert not torch.equal(model[1].running_mean, torch.zeros(4))
    assert [layer.track_running_stats for layer in model] == [False, True, False]


@pytest.mark.parametrize("kind", list(ATTACKS))
def test_no_attack_waits_for_other_ranks(kind):
    """Layers that are synchronised in training are not in an attack, and are again after it."""
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).train()
    batch_norm.synchronize(model)
    found, seen = batch_norm.layers(model), []
    model.register_forward_hook(lambda *_: seen.append([layer.synchronized for layer in found]))
    ATTACKS[kind](model, X[:, :1].contiguous(), Y, bn_mode="train")
    assert seen
    assert not any(any(flags) for flags in seen)
    assert all(layer.synchronized for layer in found)


def test_nothing_is_copied_for_the_packages_own_models():
    """Neither statistics nor normalisation constants: a training step has hundreds of such blocks."""
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).train()
    assert batch_norm._kept(model) == []
    assert len(batch_norm._kept(network("hand-written"))) == 4


def test_a_block_can_be_entered_again_and_in_another():
    model = network("hand-written").train()
    block = layer_modes(model, "eval")
    before = state(model)
    for _ in range(2):
        with block, layer_modes(model, "train"):
            assert model[4].training
            model(X)
        assert_same(state(model), before)
        with block:
            assert not any(module.training for module in model.modules())
            model(X)
        assert_same(state(model), before)
    with pytest.raises(ValueError, match="bn_mode: expected train or eval, got 'test'"):
        batch_norm_mode(model, "test", update_statistics=False)


@pytest.mark.parametrize("kind", [*ATTACKS, "block"])
def test_an_interrupt_between_any_two_lines_leaves_the_model_as_it_was(kind):
    """One at every line of the attack's and the block's code, in turn."""
    files = {attack.__file__, batch_norm.__file__, _block.__file__}
    left, where = 0, ""

    def tracer(frame, event, argument):
        nonlocal left, where
        if frame.f_code.co_filename not in files:
            return None
        # no signal is looked at where an exception is thrown into a generator
        thrown_into = event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR
        left -= event in ("call", "line") and not thrown_into
        if left == 0:
            where = f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
            raise KeyboardInterrupt
        return tracer

    def run(interrupt_at):
        nonlocal left
        model, left = network("hand-written"), interrupt_at
        before = state(model)
        previous = sys.gettrace()
        sys.settrace(tracer)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                if kind == "block":
                    with batch_norm_mode(model, "eval", update_statistics=False):
                        model(X)
                else:
                    ATTACKS[kind](model, X[:2], Y[:2], steps=1)
        finally:
            sys.settrace(previous)
            # torch's own blocks have such moments too
            torch.set_grad_enabled(True)
        return state(model), before

    run(0)
    lines, open_ones = -left, []
    assert lines > 50
    for number in range(1, lines + 1):
        now, before = run(number)
        try:
            assert_same(now, before)
        except AssertionError:
            open_ones.append(where)
    assert open_ones == []


def test_recomputed_statistics_leave_modes_alone_and_fail_whole():
    model = network("BatchNorm2d").train()
    model[2].momentum = 0.3
    model[3].eval()
    before = state(model)

    def passes(broken):
        assert all(module.training for module in model.modules())
        model(X)
        model(X + 1)
        yield
        if broken:
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        recompute_statistics(model, passes(True))
    assert_same(state(model), before)
    recompute_statistics(model, passes(False))
    assert state(model)[1:] == before[1:]
    assert (model[0].momentum, model[2].momentum) == (0.1, 0.3)
    torch.testing.assert_close(model[0].running_mean, X.mean((0, 2, 3)) + 0.5)


@pytest.mark.parametrize(("method", "graphs"), [("at", 3), ("trades", 4)])
def test_dynamo_makes_one_graph_for_each_kind_of_pass(monkeypatch, method, graphs):
    """Attack, ascent and descent, and TRADES' clean logits; without Inductor, whose code is not in question."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    x = images((6, 1, 8, 8))
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).train()
    step = make_step(
        model,
        optimizer=build_optimizer(model, OptimizerConfig()),
        objective=build_objective(method),
        attack=AttackConfig(steps=2),
        awp=AdversarialWeightPerturbation(model, 0.01),
        options=AwpConfig(gamma=0.01),
        compile=True,
    )
    for seed in range(2):
        step(x, Y, sample_ids=torch.arange(6), seed=seed)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    torch._dynamo.reset()

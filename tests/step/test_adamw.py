"""AdamW against its formula in fp64, and what a training step asks of it."""

import copy
import dataclasses
import math

import pytest
import torch
from ranks import run_ranks
from samples import images
from steps import build_step
from test_resume import AWP_EMA, resumed_everywhere
from torch import nn

from awp_engine.config import (
    AttackConfig,
    AverageConfig,
    AwpConfig,
    Config,
    ConfigError,
    DistributedConfig,
    OptimizerConfig,
    PrecisionConfig,
)
from awp_engine.distributed.ranks import Ranks
from awp_engine.distributed.sharding import gather
from awp_engine.models import build_model
from awp_engine.optim.adamw import AdamW
from awp_engine.optim.average import WeightAverage
from awp_engine.optim.optimizer import allocate_optimizer_tensors, build_optimizer, optimizer_tensors, set_learning_rate
from awp_kernels import total_norm

ADAMW = OptimizerConfig(kind="adamw", lr=0.01, momentum=0.8, beta2=0.95, weight_decay=0.1, decay_all=False)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 4))
    return net.to(dtype).to(memory_format=torch.channels_last)


def gradients(net: nn.Module, step: int) -> list[torch.Tensor]:
    """Contiguous, whatever the parameters' memory order."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in net.parameters()]


class Formula:
    """The update as the paper writes it, in fp64, one parameter after the other."""

    def __init__(self, net: nn.Module, config: OptimizerConfig) -> None:
        self.config, self.t = config, 0
        self.weights = [p.detach().double().clone() for p in net.parameters()]
        self.m = [torch.zeros_like(w) for w in self.weights]
        self.v = [torch.zeros_like(w) for w in self.weights]

    def step(self, grads: list[torch.Tensor], factor: float = 1.0) -> None:
        config, self.t = self.config, self.t + 1
        lr = torch.tensor(config.lr, dtype=torch.float32).item()
        for i, (w, grad) in enumerate(zip(self.weights, grads, strict=True)):
            g, decay = grad.double() * factor, config.weight_decay if w.ndim > 1 or config.decay_all else 0.0
            self.m[i] = config.momentum * self.m[i] + (1 - config.momentum) * g
            self.v[i] = config.beta2 * self.v[i] + (1 - config.beta2) * g**2
            m_hat, v_hat = self.m[i] / (1 - config.momentum**self.t), self.v[i] / (1 - config.beta2**self.t)
            self.weights[i] = w - lr * decay * w - lr * m_hat / (v_hat.sqrt() + 1e-8)


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_five_steps_follow_the_formula(dtype, tolerance, decay_all):
    config = dataclasses.replace(ADAMW, decay_all=decay_all)
    net = network(dtype)
    optimizer, formula = build_optimizer(net, config), Formula(net, config)
    for step in range(5):
        grads = gradients(net, step)
        for p, g in zip(net.parameters(), grads, strict=True):
            p.grad = g.clone()
        formula.step(grads)
        optimizer.step()
    state = [optimizer.state[p] for p in net.parameters()]
    for found, expected in (
        (list(net.parameters()), formula.weights),
        ([s["exp_avg"] for s in state], formula.m),
        ([s["exp_avg_sq"] for s in state], formula.v),
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    assert [s["step"].item() for s in state] == [5.0] * len(state)


@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_unscaled_and_clipped(max_norm, scaled):
    net = network()
    optimizer, formula = build_optimizer(net, ADAMW), Formula(net, ADAMW)
    assert isinstance(optimizer, AdamW)
    for step in range(3):
        grads = gradients(net, step)
        scale = 2.0 ** (9 + step) if scaled else 1.0
        for p, g in zip(net.parameters(), grads, strict=True):
            p.grad = g * scale
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        formula.step(grads, 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6)))
        optimizer.step(
            grad_norm=total_norm(optimizer.gradients()),
            max_norm=max_norm,
            grad_scale=torch.tensor(scale) if scaled else None,
        )
    for p, expected in zip(net.parameters(), formula.weights, strict=True):
        # the factor is rounded to fp32
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6)


def test_clipping_needs_the_norm():
    with pytest.raises(ValueError, match=r"^max_norm: expected grad_norm with it"):
        build_optimizer(network(), ADAMW).step(max_norm=1.0)


def test_working_copies_and_averages_follow():
    net = network(torch.float32)
    working = copy.deepcopy(net).to(torch.bfloat16)
    optimizer, formula = build_optimizer(net, ADAMW, working=working), Formula(net, ADAMW)
    averages = [p.detach().clone() for p in net.parameters()]
    optimizer.averages = dict(zip(net.parameters(), averages, strict=True))
    expected = [a.double() for a in averages]
    for step, weight in enumerate((1.0, 0.25, torch.tensor(0.5, dtype=torch.float64))):
        optimizer.average_weight = weight
        grads = [g.to(torch.bfloat16) for g in gradients(net, step)]
        for p, g in zip(working.parameters(), grads, strict=True):
            p.grad = g
        formula.step(grads)
        optimizer.step()
        expected = [a + float(weight) * (w - a) for a, w in zip(expected, formula.weights, strict=True)]
        if step == 0:
            assert all(torch.equal(a, p) for a, p in zip(averages, net.parameters(), strict=True))
    for p, copied, average, a in zip(net.parameters(), working.parameters(), averages, expected, strict=True):
        assert torch.equal(copied, p.to(torch.bfloat16))
        torch.testing.assert_close(average.double(), a, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("told_by", ["found_inf", "grad_norm"])
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_leaves_every_bit(told_by, first):
    nets = [network(torch.float32), network(torch.float32)]
    optimizers = [build_optimizer(net, ADAMW) for net in nets]
    for optimizer in optimizers:
        optimizer.averages = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
        optimizer.average_weight = 0.5
    for skip in [True, False, False] if first else [False, True, True, False]:
        for net, optimizer in zip(nets, optimizers, strict=True):
            if skip and net is nets[1]:
                continue
            for p, g in zip(net.parameters(), gradients(net, 3), strict=True):
                p.grad = torch.full_like(g, math.nan) if skip else g
            told = torch.tensor(float(skip)) if told_by == "found_inf" else total_norm(optimizer.gradients())
            optimizer.step(**{told_by: told})
    one, other = ({"w." + n: p for n, p in net.named_parameters()} for net in nets)
    for tensors, net, optimizer in zip((one, other), nets, optimizers, strict=True):
        tensors |= optimizer_tensors(net, optimizer)
        tensors |= {f"average.{n}": optimizer.averages[p] for n, p in net.named_parameters()}
    assert one.keys() == other.keys()
    assert len(one) == 5 * len(list(nets[0].parameters()))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert one["step.0.weight"] == 2.0


def test_the_rate_is_set_where_a_kernel_reads_it():
    optimizer = build_optimizer(network(), ADAMW)
    set_learning_rate(optimizer, 0.25)
    assert {(float(group["lr"]), group["lr"].dtype) for group in optimizer.param_groups} == {(0.25, torch.float32)}


def test_state_of_another_optimizer_is_refused():
    net = network()
    with pytest.raises(ValueError, match=r"0\.weight: expected the state of AdamW"):
        allocate_optimizer_tensors(net, build_optimizer(net, ADAMW), dict.fromkeys(("exp_avg.0.weight", "0.weight"), X))
    sgd = OptimizerConfig()
    with pytest.raises(ValueError, match=r"exp_avg\.0\.weight: expected the state of SGD"):
        allocate_optimizer_tensors(net, build_optimizer(net, sgd), dict.fromkeys(("exp_avg.0.weight", "0.weight"), X))


def test_what_is_refused():
    for wrong in ({"beta1": 1.0}, {"beta2": -0.1}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AdamW([nn.Parameter(torch.ones(2))], **wrong)
    with pytest.raises(ConfigError, match=r"--optimizer\.nesterov: expected false with --optimizer.kind adamw"):
        OptimizerConfig(kind="adamw", nesterov=True)
    with pytest.raises(ConfigError, match=r"--optimizer\.beta2"):
        OptimizerConfig(kind="adamw", beta2=1.0)
    with pytest.raises(ConfigError, match=r"--cuda-graphs: expected auto or false with --optimizer.kind adamw"):
        Config(optimizer=ADAMW, cuda_graphs=True)


# -- in a training step

CONFIG = Config(
    optimizer=dataclasses.replace(ADAMW, clip_norm=0.3),
    awp=AwpConfig(gamma=0.01),
    attack=AttackConfig(steps=2, bn_mode="eval"),
    average=AverageConfig(kind="ema"),
    precision=PrecisionConfig(attack="fp32", ascent="fp32", descent="fp32"),
    global_batch_size=6,
)
X, Y = images((6, 1, 8, 8)), torch.tensor([3, 1, 4, 1, 5, 9])


def trained(config: Config, ranks: Ranks, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """What four steps leave; batch normalisation by frozen statistics, so that ranks make no difference."""
    torch.manual_seed(0)
    model = build_model("preact-resnet-digits", 10, (0.3,), (0.4,), width=4).to(dtype).eval()
    step = build_step(config, model, ranks)
    average = None
    if config.distributed.strategy == "ddp":
        average = WeightAverage(model, config.average, 1)
        average.follow(step.optimizer)
    rows, _ = ranks.share(6)
    for number in range(4):
        if average is not None:
            average.before_step()
        step(X[rows].to(dtype), Y[rows], sample_ids=torch.arange(6)[rows], seed=number, of=6)
    found = {**model.state_dict(), **optimizer_tensors(model, step.optimizer)}
    if average is not None:
        found |= {f"average of {name}": value for name, value in average.state().items()}
    return gather(found, every_rank=True)


def on_rank(rank: int, world: int) -> list[dict[str, torch.Tensor]]:
    ranks = Ranks(rank=rank, world=world)
    sharded = dataclasses.replace(CONFIG, distributed=DistributedConfig(strategy="fsdp"))
    return [trained(CONFIG, ranks), trained(sharded, ranks)]


def test_ranks_and_shards_train_what_one_rank_trains():
    expected = trained(CONFIG, Ranks())
    for results in run_ranks(on_rank, 2):
        for found in results:
            assert any(name.startswith("exp_avg_sq.") for name in found)
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-9)


def test_a_step_writes_the_working_copy_anew_and_skips_whole():
    precision = PrecisionConfig(attack="bf16", ascent="fp32", descent="fp32")
    config = dataclasses.replace(CONFIG, precision=precision)
    torch.manual_seed(0)
    model = build_model("preact-resnet-digits", 10, (0.3,), (0.4,), width=8).train()
    step = build_step(config, model)
    copied = step.models.updated
    assert copied is not None
    for value in (0.0, math.nan, 0.0):
        before = {**model.state_dict(), **optimizer_tensors(model, step.optimizer)}
        before = {name: tensor.clone() for name, tensor in before.items()}
        handle = model.linear.weight.register_hook(lambda g, value=value: g + value)
        result = step(X, Y, sample_ids=torch.arange(6), seed=1)
        handle.remove()
        after = {**model.state_dict(), **optimizer_tensors(model, step.optimizer)}
        same = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
        assert bool(result.skipped) == (len(same) == len(before)) == math.isnan(value)
        for p, low in zip(model.parameters(), copied.parameters(), strict=True):
            assert torch.equal(low, p.to(low.dtype))


def test_resume_at_a_step_ends_bit_equal(tmp_path):
    optimizer = dataclasses.replace(ADAMW, lr=0.002, clip_norm=1.0, layer_decay=0.8)
    config = dataclasses.replace(AWP_EMA, optimizer=optimizer, global_batch_size=20)
    assert resumed_everywhere(0, 1, tmp_path, config, 3) == (2, [])

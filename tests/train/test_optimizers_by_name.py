"""Optimizers of torch, of timm and of somebody's own, `--optimizer.kind LIBRARY:NAME` or `file.py:Class`."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from ranks import run_ranks
from test_resume import AWP_EMA, resumed_everywhere
from torch import nn

from awp_engine.cli.command_line import parse_train
from awp_engine.config import Config, ConfigError, DistributedConfig, OptimizerConfig, choose_speed
from awp_engine.config.identity import config_hash
from awp_engine.config.schema import parse_value
from awp_engine.files.digest import sha256_of
from awp_engine.models.import_timm import import_timm
from awp_engine.optim.by_name import WrappedOptimizer, find_optimizer
from awp_engine.optim.optimizer import allocate_optimizer_tensors, build_optimizer, optimizer_tensors, set_learning_rate
from awp_kernels import total_norm

RMSPROP = OptimizerConfig(kind="torch:RMSprop", lr=0.01, args=("momentum=0.8", "alpha=0.9"), decay_all=False)
# a list, a tuple, numbers, text, an option that changes, and state of no parameter
CODE = '''
import random

import torch


class Nested(torch.optim.Optimizer):
    """SGD, which keeps the last two gradients, and counts in four ways."""

    def __init__(self, params, lr, weight_decay=0.0, keep=2):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "keep": keep, "seen": (0, "none")})

    def step(self, closure=None):
        total = self.state.setdefault("total", [torch.zeros(()), 0])
        total[1] += 1
        for group in self.param_groups:
            group["seen"] = (group["seen"][0] + 1, "some")
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["last"] = [*state.get("last", []), p.grad.clone()][-group["keep"]:]
                state["count"] = state.get("count", 0) + 0.1
                total[0] = (total[0] + p.grad.square().sum().cpu() / 1000).clamp(max=1)
                factor = total[0].item() + 1 / (state["count"] + total[1] + group["seen"][0])
                p.add_(sum(state["last"]) + group["weight_decay"] * p, alpha=-group["lr"] * factor)


class Plain(torch.optim.Optimizer):
    def __init__(self, params, lr, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.steps, self.first_lr = 0, lr

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-self.rate(group))

    def rate(self, group):
        return group["lr"]


class Counts(Plain):
    def rate(self, group):
        self.steps += 1
        return group["lr"] / self.steps


class Draws(Plain):
    def rate(self, group):
        return group["lr"] * random.random()


class Fixed(Plain):
    def rate(self, group):
        return self.first_lr


class Holds(Plain):
    def rate(self, group):
        self.state["held"] = {1, 2}
        return group["lr"]


class Switches(Plain):
    def eval(self):
        pass


class Closes(Plain):
    def step(self, closure):
        closure()


class Ignores(Plain):
    def __init__(self, params, lr, **more):
        super().__init__(params, lr, **more)


class NoDecay(Plain):
    def __init__(self, params, lr):
        super().__init__(params, lr)


def number(params, lr):
    return 7
'''


@pytest.fixture
def code(tmp_path):
    (tmp_path / "own.py").write_text(CODE)
    return tmp_path / "own.py"


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 4))
    return net.to(dtype).to(memory_format=torch.channels_last)


def gradients(net: nn.Module, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in net.parameters()]


def give(net: nn.Module, grads: list[torch.Tensor]) -> None:
    for p, g in zip(net.parameters(), grads, strict=True):
        p.grad = g.clone()


def step(optimizer: WrappedOptimizer, **given) -> None:
    optimizer.step(grad_norm=total_norm(optimizer.gradients()), **given)


def built(net: nn.Module, config: OptimizerConfig, working: nn.Module | None = None) -> WrappedOptimizer:
    optimizer = build_optimizer(net, config, working=working)
    assert isinstance(optimizer, WrappedOptimizer)
    return optimizer


# -- a step


def test_a_fused_step_takes_gradients_in_another_memory_order():
    config = OptimizerConfig(kind="torch:Adam", lr=0.1, args=("fused=true",))
    for_loop = dataclasses.replace(config, args=("foreach=false",))
    found = [network(), network()]
    for net, settings in zip(found, (config, for_loop), strict=True):
        optimizer = built(net, settings)
        for number in range(3):
            give(net, [gradient.contiguous() for gradient in gradients(net, number)])
            step(optimizer)
    first = next(found[0].parameters())
    assert first.grad is not None
    assert first.stride() != first.grad.stride()
    for fused, expected in zip(*(net.parameters() for net in found), strict=True):
        torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_is_that_of_the_library_on_unscaled_clipped_gradients(scaled):
    net, plain = network(), network()
    groups = [[p for p in plain.parameters() if p.ndim > 1], [p for p in plain.parameters() if p.ndim == 1]]
    expected = torch.optim.RMSprop(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (5e-4, 0.0), strict=True)],
        lr=1.0,
        momentum=0.8,
        alpha=0.9,
    )
    optimizer = built(net, RMSPROP)
    for number, (lr, max_norm) in enumerate([(0.01, None), (0.02, 0.7), (0.005, 1e3)]):
        grads, scale = gradients(net, number), 1024.0 if scaled else 1.0
        give(plain, grads)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        for group in expected.param_groups:
            group["lr"] = lr
        expected.step()
        give(net, [g * scale for g in grads])
        set_learning_rate(optimizer, lr)
        step(optimizer, max_norm=max_norm, grad_scale=torch.tensor(scale) if scaled else None)
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        # the factor is rounded to fp32
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


def test_adamw_of_torch_is_the_fused_one_but_for_rounding():
    shared = {"lr": 0.01, "weight_decay": 0.1, "decay_all": False, "layer_decay": 0.7}
    nets = network(torch.float32), network(torch.float32)
    layers = {name: int(name[0] == "3") for name, _ in nets[0].named_parameters()}
    kinds = OptimizerConfig(kind="adamw", **shared), OptimizerConfig(kind="torch:AdamW", **shared)
    optimizers = [build_optimizer(net, kind, layers=layers) for net, kind in zip(nets, kinds, strict=True)]
    for number in range(5):
        for net, optimizer in zip(nets, optimizers, strict=True):
            give(net, gradients(net, number))
            set_learning_rate(optimizer, 0.01 / (number + 1))
            optimizer.step(grad_norm=total_norm(optimizer.gradients()), max_norm=2.0)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


def test_working_copies_and_averages_follow():
    net, plain = network(torch.float32), network(torch.float32)
    working = copy.deepcopy(net).to(torch.bfloat16)
    optimizer = built(net, OptimizerConfig(kind="torch:Adam", lr=0.01), working)
    expected = torch.optim.Adam(plain.parameters(), lr=0.01, weight_decay=5e-4)
    averages = [p.detach().clone() for p in net.parameters()]
    optimizer.averages = dict(zip(net.parameters(), averages, strict=True))
    follows = [a.double() for a in averages]
    for number, weight in enumerate((1.0, 0.25, torch.tensor(0.5, dtype=torch.float64))):
        optimizer.average_weight = weight
        grads = [g.to(torch.bfloat16) for g in gradients(net, number)]
        give(working, grads)
        give(plain, [g.float() for g in grads])
        step(optimizer)
        expected.step()
        follows = [a + float(weight) * (p.double() - a) for a, p in zip(follows, plain.parameters(), strict=True)]
        assert all(p.grad is None for p in net.parameters())
    for p, low, q, a, f in zip(
        net.parameters(), working.parameters(), plain.parameters(), averages, follows, strict=True
    ):
        assert torch.equal(p, q)
        assert torch.equal(low, p.to(torch.bfloat16))
        torch.testing.assert_close(a.double(), f.detach(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["torch:NAdam", "timm:lion"])
@pytest.mark.parametrize("skips", [(0, 3), (1, 2)])
def test_a_skipped_step_leaves_every_bit(kind, skips):
    nets = network(torch.float32), network(torch.float32)
    optimizers = [built(net, OptimizerConfig(kind=kind, lr=0.01)) for net in nets]
    for optimizer in optimizers:
        optimizer.averages = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
        optimizer.average_weight = 0.5
    for number in range(4):
        for net, optimizer in zip(nets, optimizers, strict=True):
            if number not in skips or net is nets[0]:
                give(net, gradients(net, number))
                if number in skips:
                    next(net.parameters()).grad[0] = math.inf
                step(optimizer)
    found = []
    for net, optimizer in zip(nets, optimizers, strict=True):
        averages = {f"average {name}": optimizer.averages[p] for name, p in net.named_parameters()}
        found.append(dict(net.named_parameters()) | optimizer_tensors(net, optimizer) | averages)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


# -- its state


@pytest.mark.parametrize("kind", ["torch:SGD", "torch:ASGD", "timm:lamb", "timm:madgrad", "timm:adafactor", "own"])
def test_its_state_goes_through_a_checkpoint(kind, code):
    args = ("momentum=0.9",) if kind == "torch:SGD" else ()
    config = OptimizerConfig(kind=f"{code}:Nested" if kind == "own" else kind, lr=0.01, args=args)
    nets = network(torch.float32), network(torch.float32)
    optimizers = [built(net, config) for net in nets]
    for number in range(3):
        give(nets[0], gradients(nets[0], number))
        step(optimizers[0])
    nets[1].load_state_dict(nets[0].state_dict())
    # as safetensors gives them
    saved = {name: t.clone().contiguous() for name, t in optimizer_tensors(nets[0], optimizers[0]).items()}
    for name, tensor in allocate_optimizer_tensors(nets[1], optimizers[1], saved).items():
        tensor.copy_(saved[name])
    for number in range(3, 6):
        for net, optimizer in zip(nets, optimizers, strict=True):
            give(net, gradients(net, number))
            step(optimizer)
    found = [
        dict(net.named_parameters()) | optimizer_tensors(net, optimizer)
        for net, optimizer in zip(nets, optimizers, strict=True)
    ]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert all(tensor.stride() == found[1][name].stride() for name, tensor in found[0].items())


def test_a_state_of_another_optimizer_is_refused():
    net = network(torch.float32)
    optimizer = built(net, RMSPROP)
    with pytest.raises(KeyError, match="structure"):
        allocate_optimizer_tensors(net, optimizer, {"0.weight": torch.zeros(5, 3, 3, 3)})
    give(net, gradients(net, 0))
    step(optimizer)
    saved = optimizer_tensors(net, optimizer)
    with pytest.raises(KeyError, match=r"0\.weight"):
        allocate_optimizer_tensors(nn.Linear(2, 2), optimizer, saved)


def config_of(kind: str, *args: str, **changes) -> Config:
    optimizer = OptimizerConfig(kind=kind, args=args, lr=0.002, clip_norm=1.0, layer_decay=0.8)
    return dataclasses.replace(AWP_EMA, optimizer=optimizer, global_batch_size=20, **changes)


RESUMED = [
    ("torch:Adam",),
    ("torch:RMSprop", "momentum=0.9", "centered=True"),
    ("timm:lion",),
    ("timm:adopt", "decoupled=True"),
    ("timm:nadamw", "betas=0.8,0.99"),
    ("own",),
]


@pytest.mark.parametrize("named", RESUMED, ids=lambda named: named[0])
def test_resume_at_a_step_ends_bit_equal(named, tmp_path, code):
    kind, *args = named
    config = config_of(f"{code}:Nested" if kind == "own" else kind, *args)
    assert resumed_everywhere(0, 1, tmp_path, config, 3) == (2, [])


def test_two_ranks_are_equal_and_resume(tmp_path):
    # a run compares the ranks' weights and states by itself, here at every step
    often = DistributedConfig(check_every=1)
    results = run_ranks(resumed_everywhere, 2, tmp_path, config_of("torch:Adam", distributed=often), 3, timeout=200)
    assert results == [(2, [])] * 2


# -- what is named, and what is refused


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"kind": "adm"}, r"--optimizer.kind: expected sgd, adamw, torch:NAME .*\(did you mean adamw\?\), got 'adm'"),
        (
            {"kind": "torch:Adam", "momentum": 0.5},
            "--optimizer.momentum: expected 0.9 with .* torch:Adam",
        ),
        ({"kind": "torch:Adam", "beta2": 0.5}, "--optimizer.beta2: expected 0.999 with .*takes --optimizer.args"),
        ({"kind": "torch:SGD", "nesterov": True}, "--optimizer.nesterov: expected false with "),
        ({"args": ("eps=1",)}, "--optimizer.args: expected nothing with --optimizer.kind sgd"),
        ({"kind": "torch:Adam", "args": ("eps",)}, "--optimizer.args: expected NAME=VALUE, every name once"),
        ({"kind": "torch:Adam", "args": ("eps=1", "eps=2")}, "--optimizer.args: expected NAME=VALUE, every name once"),
    ],
)
def test_settings_that_do_not_fit_are_refused(told, message):
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**told)


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("torch:rmsprop", "", "torch.optim has no rmsprop; did you mean RMSprop?"),
        ("torch:Optimizer", "", "torch.optim has no Optimizer; expected one of ASGD, Adadelta, "),
        ("timm:lions", "", "timm.optim has no lions; did you mean lion?"),
        ("torch:LBFGS", "", "computes losses anew in its step"),
        ("torch:SparseAdam", "", "its step raised RuntimeError: SparseAdam does not support dense gradients"),
        ("torch:Rprop", "", "does not follow the learning rate"),
        ("torch:Muon", "", "its call raised ValueError: Muon only supports 2D parameters"),
        ("timm:adahessian", "", "its step raised RuntimeError: "),
        ("torch:Adam", "beta=1", "--optimizer.args: torch:Adam takes no beta; did you mean betas?"),
        ("torch:Adam", "lr=1", "--optimizer.args: expected no lr, which has a flag of its own"),
        ("torch:Adam", "betas=2,0.9", "its call raised ValueError: Invalid beta parameter at index 0: 2"),
        ("Counts", "", "would not go on from a checkpoint as it would have gone on"),
        ("Draws", "", "would not go on from a checkpoint as it would have gone on"),
        ("Fixed", "", "does not follow the learning rate"),
        ("Holds", "", "a checkpoint cannot hold the optimizer's more/held, set; expected tensors"),
        ("Switches", "", r"has other weights for evaluation \(train\(\) and eval\(\)\)"),
        ("Closes", "", "computes losses anew in its step"),
        ("NoDecay", "", "--optimizer.weight-decay: expected 0 with .*:NoDecay, which takes no weight_decay"),
        ("Ignores", "", "--optimizer.weight-decay: .*:Ignores does not follow that of its groups"),
        ("Netsed", "", "has no Netsed; did you mean Nested?"),
        ("number", "", "gives int; expected a torch.optim.Optimizer"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused_in_one_line(kind, args, message, code):
    name = kind if ":" in kind else f"{code}:{kind}"
    with pytest.raises(ConfigError, match=message) as caught:
        find_optimizer(OptimizerConfig(kind=name, args=tuple(args.split())), torch.device("cpu"))
    assert str(caught.value).startswith("--optimizer.")
    assert "\n" not in str(caught.value)


def test_all_of_timm_that_needs_no_gpu_fits_but_for_two_kinds():
    import_timm()
    from timm.optim import list_optimizers

    refused = []
    for name in list_optimizers(exclude_filters=["bnb*", "fused*", "kron?"]):
        try:
            find_optimizer(OptimizerConfig(kind=f"timm:{name}"), torch.device("cpu"))
        except ConfigError:
            refused.append(name)
    assert refused == ["adahessian", "kron"]


def test_shards_and_graphs_are_refused():
    adam = OptimizerConfig(kind="torch:Adam")
    with pytest.raises(ConfigError, match=r"--optimizer.kind: expected sgd or adamw with --distributed.strategy fsdp"):
        Config(optimizer=adam, distributed=DistributedConfig(strategy="fsdp"))
    with pytest.raises(ConfigError, match=r"--cuda-graphs: expected auto or false with --optimizer.kind torch:Adam"):
        Config(optimizer=adam, cuda_graphs=True)
    assert not choose_speed(Config(optimizer=adam), cuda=True, ranks=1).cuda_graphs


def test_arguments_are_values_of_python_and_make_another_run():
    config = OptimizerConfig(kind="torch:Adam", args=("betas=0.9,0.99", "eps=1e-6", "amsgrad=True"))
    assert config.arguments == {"betas": (0.9, 0.99), "eps": 1e-6, "amsgrad": True}
    texts = ("2/255", "None", "none", "'none'", "l2", "true", "false", "False")
    assert [parse_value(text) for text in texts] == [2 / 255, None, None, "none", "l2", True, False, False]
    group = built(network(), config).param_groups[0]
    assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.9, 0.99), 1e-6, True)
    other = dataclasses.replace(config, args=("betas=0.9,0.9",))
    assert config_hash(Config(optimizer=config)) != config_hash(Config(optimizer=other))


TINY = {"model.width": 4, "epochs": 1, "attack.steps": 1, "evaluation.steps": 1, "data.train-limit": 64, "log": "none"}
TINY = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]


def train(*arguments):
    from awp_engine.distributed.ranks import Ranks
    from awp_engine.distributed.signals import StopRequest
    from awp_engine.train.run import train as train_run

    return train_run(parse_train([*map(str, arguments), *TINY]), Ranks(), StopRequest())


def test_own_code_is_part_of_the_run(code, tmp_path):
    told = ("--optimizer.kind", f"{code}:Nested", "--optimizer.args", "keep=3", "--run-dir", tmp_path / "run")
    _, report, _ = train(*told)
    assert report["made_by"] == {"optimizer": sha256_of(code)}
    (tmp_path / "run" / "report.json").unlink()
    code.write_text(CODE + "\n# another\n")
    with pytest.raises(ConfigError, match=r"was trained by other code of --optimizer\.kind"):
        train(*told)


def test_nothing_is_written_where_the_optimizer_is_refused(code, tmp_path):
    with pytest.raises(ConfigError, match="does not follow the learning rate"):
        train("--optimizer.kind", f"{code}:Fixed", "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_that_names_one_runs_no_code(code, tmp_path, capsys):
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"optimizer": {"kind": f"{code}:Nested"}}))
    code.write_text("raise SystemExit('it was run')")
    with pytest.raises(SystemExit):
        parse_train(["--config", str(settings)])
    assert "which is not run because a file says so" in capsys.readouterr().err
    settings.write_text(json.dumps({"optimizer": {"kind": "torch:Adam"}}))
    assert parse_train(["--config", str(settings)]).optimizer.kind == "torch:Adam"

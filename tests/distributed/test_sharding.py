"""Sharded parameters against one process that has them whole, in fp64."""

import contextlib
import itertools
from collections import Counter

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from awp_engine.attack import pgd
from awp_engine.distributed.sharding import gather, gathered, scatter_, shard
from awp_engine.models import PreActResNet, WideResNet
from awp_engine.models.batch_norm import batch_norm_mode, share_memory, synchronize
from awp_kernels import SGD, AdversarialWeightPerturbation, every_parameter, total_norm

# uneven rows, fewer rows than ranks, one dimension
SHAPES = {"a.weight": (5, 3, 2, 2), "b.weight": (1, 7), "c.weight": (8, 4), "a.bias": (3,), "b.bias": (6,)}
# over scope, scale, bound, eps
CASES = [
    *itertools.product(("layer", "global", "filter"), ("relative", "absolute", "elementwise"), (None,), (1e-20,)),
    *itertools.product(("layer", "filter"), ("relative", "elementwise"), (0.05,), (1e-20,)),
    ("layer", "relative", None, 0.0),
    ("global", "absolute", None, 0.3),
]


class Holder(nn.Module):
    def __init__(self, parameters):
        super().__init__()
        for name, value in parameters.items():
            part, leaf = name.split(".")
            if not hasattr(self, part):
                self.add_module(part, nn.Module())
            self.get_submodule(part).register_parameter(leaf, nn.Parameter(value))


def values(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}
    if seed == 3:
        # nothing on the first ranks, but not on all
        made["c.weight"][:4] = 0
    return made


def set_gradients(model, seed, cut=lambda tensor: tensor, spoiled=""):
    """`spoiled`: the parameter whose last row's gradient is not finite."""
    for name, value in values(seed).items():
        if name == spoiled:
            value[-1:].view(-1)[0] = torch.inf if value.ndim > 1 else torch.nan
        model.get_parameter(name).grad = cut(value)


def three_steps(model, case, cut, rows_of):
    """Perturbs, perturbs further and restores, then steps with clipping, momentum, decay and an average; thrice.

    Then once more along directions of which one is not finite on one rank, and again.
    """
    scope, scale, bound, eps = case
    eta = 0.01 if scale == "elementwise" else 0.0
    adaptive = (lambda name, _: "weight" in name) if scale == "elementwise" else None
    awp = AdversarialWeightPerturbation(
        model, 0.1, scope=scope, scale=scale, bound=bound, eps=eps, eta=eta, adaptive=adaptive, select=every_parameter
    )
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    optimizer.averages = {p: p.detach().clone() for p in model.parameters()}
    seen = []
    for step in range(3):
        before = [rows_of(p).clone() for p in model.parameters()]
        set_gradients(model, 2 + 3 * step, cut)
        if step == 1:
            model.get_parameter("b.weight").grad = None
        with awp.perturbed():
            assert all(p.grad is None for p in model.parameters())
            seen += [rows_of(p).clone() for p in model.parameters()]
            seen += [rows_of(moved) for _, moved in sorted(awp.displacement().items())]
            set_gradients(model, 3 + 3 * step, cut)
            awp.perturb_(again=True)
            seen += [rows_of(p).clone() for p in model.parameters()]
            set_gradients(model, 4 + 3 * step, cut)
        assert all(torch.equal(rows_of(p), old) for p, old in zip(model.parameters(), before, strict=True))
        optimizer.average_weight = 0.25
        norm = total_norm(optimizer.gradients())
        optimizer.step(grad_norm=norm, max_norm=2.0)
        awp.take_weight_norms(optimizer.weight_norms)
        assert awp.weight_norms is not None
        seen += [norm, *(rows_of(p).clone() for p in model.parameters())]
        seen += [rows_of(state["momentum_buffer"]).clone() for state in optimizer.state.values()]
        seen += [rows_of(average).clone() for average in optimizer.averages.values()]
    for first, second in (("a.weight", ""), ("", "b.bias")):
        set_gradients(model, 11, cut, first)
        with awp.perturbed():
            seen += [awp.found_inf.clone(), *(rows_of(p).clone() for p in model.parameters())]
            set_gradients(model, 12, cut, second)
            awp.perturb_(again=True)
            seen += [awp.found_inf.clone(), *(rows_of(p).clone() for p in model.parameters())]
        told = [float(value) for value in seen if value.dtype == torch.float32]
    assert told[-4:] == [1, 1, 0, 1]
    assert all(value.isfinite().all() for value in seen)
    return seen


def _operations(rank, world, cases):
    mesh = init_device_mesh("cpu", (world,))

    def cut(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)])

    results = []
    for case in cases:
        model = Holder({name: cut(value) for name, value in values(1).items()})
        results.append(three_steps(model, case, cut, lambda tensor: tensor.to_local()))
    if world == 4:
        mesh = init_device_mesh("cpu", (2, 2))

        def cut_twice(tensor):
            return distribute_tensor(tensor, mesh, [Replicate(), Shard(0)])

        model, plain = Holder({name: cut_twice(value) for name, value in values(1).items()}), Holder(values(1))
        three_steps(model, cases[0], cut_twice, lambda tensor: tensor.to_local())
        three_steps(plain, cases[0], torch.clone, torch.clone)
        for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), expected.detach(), rtol=1e-12, atol=1e-13)
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_operations_on_shards_equal_those_on_whole_tensors(world):
    cases = CASES if world == 2 else CASES[::4]
    ranks = run_ranks(_operations, world, cases)
    for number, case in enumerate(cases):
        expected = three_steps(Holder(values(1)), case, torch.clone, torch.clone)
        for *parts, wanted in zip(*(result[number] for result in ranks), expected, strict=True):
            for actual in parts if wanted.ndim == 0 else [torch.cat(parts)]:
                torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13, msg=lambda m: f"{case}: {m}")  # noqa: B023


# samples a rank has of either micro-batch: unequal
PARTS = {2: [3, 1], 4: [1, 2, 0, 1]}
MICRO = 4
STEPS = {2: 3, 4: 2}


def network(dtype=torch.float64) -> PreActResNet:
    torch.manual_seed(0)
    # 3 channels and 3 classes: uneven on 2 ranks, and rank 3 of 4 has none
    model = PreActResNet(3, [0.5], [0.25], num_blocks=(1, 1), width=3, activation="silu").to(dtype)
    synchronize(model)
    return model


class count(TorchDispatchMode):  # noqa: N801
    """Collectives by name."""

    def __enter__(self):
        self.calls = Counter()
        super().__enter__()
        return self.calls

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "c10d":
            self.calls[function._opname] += 1
        return function(*arguments, **(options or {}))


def rows(model):
    return {name: p.to_local() if isinstance(p, DTensor) else p.detach() for name, p in model.named_parameters()}


class Run:
    """Three steps by hand: attack, ascent and TRADES's descent over two micro-batches, clipping, momentum."""

    def __init__(self, bn_mode, rank=0, world=1, like=1):
        self.bn_mode, self.rank, self.world = bn_mode, rank, world
        # each rank attacks by its own images' statistics, and so does one process in its place
        self.attacked = PARTS[like] if like > 1 and bn_mode == "train" else None
        self.model = network()
        if world > 1:
            self.model.to(memory_format=torch.channels_last)
            # replicated twice, two shards each; or four shards, of which some are empty
            shape, names = ((2, 2), ("replicate", "shard")) if (world, bn_mode) == (4, "eval") else ((world,), None)
            shard(self.model, init_device_mesh("cpu", shape, mesh_dim_names=names))
        self.awp = AdversarialWeightPerturbation(self.model, 0.05)
        self.optimizer = SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        self.statistics = share_memory(self.model)
        self.calls = []

    def part(self, tensor):
        return tensor if self.world == 1 else tensor.split(PARTS[self.world])[self.rank]

    def backward(self, batches, loss, update_statistics):
        for number, batch in enumerate(batches):
            if self.world > 1:
                self.model.set_requires_gradient_sync(number == len(batches) - 1)
            with batch_norm_mode(self.model, "train", update_statistics=update_statistics), count() as calls:
                (loss(*batch).sum() * self.world / (MICRO * len(batches))).backward()
            self.calls.append(calls)

    def step(self, number):
        generator = torch.Generator().manual_seed(number)
        batches = []
        for micro in range(2):
            x = torch.rand(MICRO, 1, 6, 6, generator=generator, dtype=torch.float64)
            y = torch.randint(3, (MICRO,), generator=generator)
            ids = torch.arange(MICRO) + MICRO * micro
            batches.append([self.part(x), self.part(y), self.part(ids)])
        before = {name: tensor.clone() for name, tensor in rows(self.model).items()}
        attacks = []
        with gathered(self.model) if self.world > 1 else contextlib.nullcontext():
            for x, y, ids in batches:
                with count() as calls:
                    pieces = zip(*(t.split(self.attacked or len(x)) for t in (x, y, ids)), strict=True)
                    attack = {"epsilon": 0.1, "step_size": 0.05, "steps": 2, "bn_mode": self.bn_mode}
                    x_adv = torch.cat([pgd(self.model, x, y, sample_ids=ids, **attack) for x, y, ids in pieces])
                self.calls.append(calls)
                attacks.append(x_adv)
                assert all(p.grad is None for p in self.model.parameters())
        batches = [[x, y, x_adv] for (x, y, _), x_adv in zip(batches, attacks, strict=True)]
        self.backward(
            batches, lambda x, y, moved: functional.cross_entropy(self.model(moved), y, reduction="none"), False
        )
        with self.awp.perturbed():
            self.backward(batches, self.trades, True)
        assert all(torch.equal(tensor, before[name]) for name, tensor in rows(self.model).items())
        self.optimizer.step(grad_norm=total_norm(self.optimizer.gradients()), max_norm=1.0)
        self.awp.take_weight_norms(self.optimizer.weight_norms)
        self.optimizer.zero_grad()

    def trades(self, x, y, moved):
        clean, attacked = self.model(x), self.model(moved)
        divergence = functional.kl_div(attacked.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
        return functional.cross_entropy(clean, y, reduction="none") + 6 * divergence

    def tensors(self):
        momentum = {
            f"momentum.{name}": self.optimizer.state[p].get("momentum_buffer")
            for name, p in self.model.named_parameters()
        }
        return {**dict(self.model.named_parameters()), **momentum, **dict(self.model.named_buffers())}


def _training(rank, world):
    results = {}
    for bn_mode in ("eval", "train"):
        run = Run(bn_mode, rank, world)
        for number in range(STEPS[world]):
            run.step(number)
        results[bn_mode] = gather(run.tensors(), every_rank=True), run.calls[:4]
        assert gather(run.tensors()) == {} or rank == 0
    # a checkpoint: the last run goes on in another one
    other = Run("train", rank, world)
    for p in other.model.parameters():
        other.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scatter_(other.tensors(), results["train"][0])
    for each in (run, other):
        each.step(3)
    pairs = zip(run.tensors().values(), other.tensors().values(), strict=True)
    assert all(torch.equal(*(t.to_local() if isinstance(t, DTensor) else t for t in pair)) for pair in pairs)
    with pytest.raises(ValueError, match=r"conv1.weight: expected a tensor of shape \(3, 1, 3, 3\), got none"):
        scatter_(other.tensors(), {})
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_training_on_shards_equals_one_process(world):
    ranks = run_ranks(_training, world, timeout=120)
    for bn_mode in ("eval", "train"):
        plain = Run(bn_mode, like=world)
        for number in range(STEPS[world]):
            plain.step(number)
        for results in ranks:
            tensors, calls = results[bn_mode]
            for name, expected in plain.tensors().items():
                torch.testing.assert_close(tensors[name], expected.detach(), rtol=1e-9, atol=1e-9, msg=name)
            # two blocks and the root
            gathers, reductions = (
                [call[name] for call in calls] for name in ("_allgather_base_", "_reduce_scatter_base_")
            )
            assert gathers[:2] == [3, 0], gathers
            assert reductions == [0, 0, 0, 3]
            if bn_mode == "eval":
                assert [call.total() for call in calls[:2]] == [3, 0]


def _mixed_precision(rank, world, dtype):
    mesh = init_device_mesh("cpu", (world,))
    model = network(torch.float32)
    shard(model, mesh, param_dtype=dtype, reduce_dtype=torch.float32)
    awp = AdversarialWeightPerturbation(model, 0.05)
    seen = {}

    def look(module, arguments):
        seen.update({"weight": module.weight.detach().clone(), "input": arguments[0].dtype})

    block = model.layer2[0]
    block.conv1.register_forward_pre_hook(look)
    block.bn1.register_forward_pre_hook(lambda module, arguments: seen.update(bn=module.weight.dtype))
    x = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    masters = gather(dict(model.named_parameters()), every_rank=True)
    logits = model(x)
    logits.logsumexp(1).mean().backward()
    assert torch.equal(seen["weight"], masters["layer2.0.conv1.weight"].to(dtype))
    gradients = gather({name: p.grad for name, p in model.named_parameters()}, every_rank=True)
    with awp.perturbed():
        moved = gather(dict(model.named_parameters()), every_rank=True)
        model(x).mean().backward()
        # the shards keep all digits of w + v; what is gathered is rounded
        assert torch.equal(seen["weight"], moved["layer2.0.conv1.weight"].to(dtype))
    dtypes = {t.dtype for t in (*gradients.values(), *moved.values(), *masters.values(), logits, x.grad)}
    assert dtypes == {torch.float32}
    assert (seen["weight"].dtype, seen["input"], seen["bn"]) == (dtype, dtype, torch.float32)
    for name in awp.parameters:
        w, g = masters[name].double(), gradients[name].double()
        torch.testing.assert_close(moved[name].double(), w + 0.05 * w.norm() / g.norm() * g, rtol=1e-6, atol=1e-7)
    assert all(
        torch.equal(t, masters[name]) for name, t in gather(dict(model.named_parameters()), every_rank=True).items()
    )


def _refusals(rank, world):
    _mixed_precision(rank, world, torch.bfloat16)
    _mixed_precision(rank, world, torch.float16)

    mesh = init_device_mesh("cpu", (world,))
    cut = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in values(1).items()}
    model = Holder(cut)
    # not finite on one rank: every rank has to see it
    gradient = distribute_tensor(values(2)["c.weight"], mesh, [Shard(0)])
    if rank == 0:
        gradient.to_local()[0, 0] = float("nan")
    assert total_norm([gradient]).isnan()

    def refused(message, function):
        with pytest.raises(ValueError, match=message):
            function()

    refused(
        "working: not for a sharded model", lambda: AdversarialWeightPerturbation(model, 0.1, working=Holder(values(1)))
    )
    mixed = Holder(cut | {"a.bias": values(1)["a.bias"]})
    refused("model: expected all sharded or none", lambda: AdversarialWeightPerturbation(mixed, 0.1))
    refused("params: expected all sharded or none", lambda: SGD(mixed.parameters(), lr=0.1))
    columns = Holder({"c.weight": distribute_tensor(values(1)["c.weight"], mesh, [Shard(1)])})
    refused("model: expected shards along dimension 0", lambda: AdversarialWeightPerturbation(columns, 0.1))
    halves = Holder({"c.weight": cut["c.weight"].half()})
    refused(
        "c.weight is sharded torch.float16", lambda: AdversarialWeightPerturbation(halves, 0.1, scale="elementwise")
    )
    awp = AdversarialWeightPerturbation(model, 0.1)
    refused(
        "gradient of c.weight: expected a DTensor", lambda: awp.perturb_(gradients={"c.weight": values(2)["c.weight"]})
    )
    wide = WideResNet(10, 1, 3, [0.5], [0.25])
    x = torch.rand(2, 1, 8, 8)
    expected = wide.eval()(x)
    shard(wide, mesh)
    assert torch.equal(wide(x), expected)
    awp = AdversarialWeightPerturbation(wide, 0.1)
    wide(x).sum().backward()
    # a pass after the block, or after one without gradients, sees what was written to the shards in between
    with gathered(wide), torch.no_grad():
        assert torch.equal(wide(x), expected)
        with pytest.raises(RuntimeError, match="its shards are gathered"):
            awp.perturb_()
    for number in (3.0, 4.0):
        with torch.no_grad():
            for p in wide.parameters():
                p.to_local().fill_(number / 100)
            plain = WideResNet(10, 1, 3, [0.5], [0.25]).eval()
            for p in plain.parameters():
                p.fill_(number / 100)
            assert torch.equal(wide(x), plain(x))
    small = network()
    shard(small, mesh)
    refused("model: is sharded already", lambda: shard(small, mesh))
    refused("mesh: expected one dimension", lambda: shard(network(), init_device_mesh("cpu", (2, 1))))
    refused("model: Linear has no block to shard", lambda: shard(nn.Linear(2, 2), mesh))


def test_mixed_precision_and_what_is_refused():
    run_ranks(_refusals, 2)

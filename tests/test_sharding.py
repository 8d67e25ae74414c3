"""Sharded parameters against one process that has them whole, in fp64."""

import itertools

import pytest
import torch
from ranks import run_ranks
from torch import nn

from awp_kernels import SGD, AdversarialWeightPerturbation, every_parameter, total_norm

# uneven rows, fewer rows than ranks, one dimension
SHAPES = {"a.weight": (5, 3, 2, 2), "b.weight": (1, 7), "c.weight": (8, 4), "a.bias": (3,), "b.bias": (6,)}
# over scope, scale, bound, eps
CASES = [
    *itertools.product(("layer", "global", "filter"), ("relative", "absolute", "elementwise"), (None, 0.05), (1e-20,)),
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


def set_gradients(model, seed, cut=lambda tensor: tensor):
    for name, value in values(seed).items():
        model.get_parameter(name).grad = cut(value)


def three_steps(model, case, cut, rows):
    """Perturbs, perturbs further and restores, then steps with clipping, momentum, decay and an average; thrice."""
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
        before = [rows(p).clone() for p in model.parameters()]
        set_gradients(model, 2 + 3 * step, cut)
        if step == 1:
            model.get_parameter("b.weight").grad = None
        with awp.perturbed():
            assert all(p.grad is None for p in model.parameters())
            seen += [rows(p).clone() for p in model.parameters()]
            seen += [rows(moved) for _, moved in sorted(awp.displacement().items())]
            set_gradients(model, 3 + 3 * step, cut)
            awp.perturb_(again=True)
            seen += [rows(p).clone() for p in model.parameters()]
            set_gradients(model, 4 + 3 * step, cut)
        assert all(torch.equal(rows(p), old) for p, old in zip(model.parameters(), before, strict=True))
        optimizer.average_weight = 0.25
        optimizer.grad_norm, optimizer.max_norm = total_norm(optimizer.gradients()), 2.0
        optimizer.step()
        awp.take_weight_norms(optimizer.weight_norms)
        assert awp.weight_norms is not None
        seen += [optimizer.grad_norm, *(rows(p).clone() for p in model.parameters())]
        seen += [rows(state["momentum_buffer"]).clone() for state in optimizer.state.values()]
        seen += [rows(average).clone() for average in optimizer.averages.values()]
    return seen


def _operations(rank, world, dtype):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))

    def cut(tensor):
        return distribute_tensor(tensor.to(dtype), mesh, [Shard(0)])

    results = []
    for case in CASES:
        model = Holder({name: cut(value) for name, value in values(1).items()})
        results.append(three_steps(model, case, cut, lambda tensor: tensor.to_local()))
    return results


@pytest.mark.parametrize("world", [2, 4])
def test_operations_on_shards_equal_those_on_whole_tensors(world):
    ranks = run_ranks(_operations, world, torch.float64)
    for number, case in enumerate(CASES):
        expected = three_steps(Holder(values(1)), case, torch.clone, torch.clone)
        for *parts, wanted in zip(*(result[number] for result in ranks), expected, strict=True):
            for actual in parts if wanted.ndim == 0 else [torch.cat(parts)]:
                torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13, msg=lambda m: f"{case}: {m}")  # noqa: B023

"""bn_act against torch's batch normalisation and ReLU in fp64."""

import functools
import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from awp_engine.models.layers import BatchNorm
from awp_kernels import Ranks, add_bn_act, bn_act, bn_act_available, use_backend
from awp_kernels._images import operations

pytestmark = [
    pytest.mark.skipif(operations() is None, reason="needs AVX2 with FMA"),
    pytest.mark.usefixtures("poisoned_memory"),
]

SHAPES = [(5, 1, 1, 1), (3, 5, 7, 3), (4, 16, 8, 8), (2, 37, 3, 1), (1, 130, 2, 2), (9, 24, 20, 21), (6, 16, 1, 1)]
MODES = {"train": True, "eval": False}


def randn(*shape: int, dtype=torch.float32, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def samples(*shape: int, dtype=torch.float32, mean=1.0) -> dict[str, Tensor]:
    channels = shape[1]
    return {
        "x": (randn(*shape) * 2 + mean).to(dtype).to(memory_format=torch.channels_last),
        "weight": randn(channels, seed=1) + 1,
        "bias": randn(channels, seed=2),
        "running_mean": randn(channels, seed=3) + mean,
        "running_var": randn(channels, seed=4).abs() + 0.5,
    }


def plain(x, weight, bias, running_mean, running_var, *, training, momentum=0.1, eps=1e-5) -> Tensor:
    return functional.relu(functional.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps))


def results(function, tensors: dict[str, Tensor], grad: Tensor, *, training: bool, dtype=None) -> dict[str, Tensor]:
    """Output, gradients and running statistics."""
    copies = {name: t.detach().clone().to(dtype or t.dtype) for name, t in tensors.items()}
    inputs = [copies[name].requires_grad_() for name in ("x", "weight", "bias")]
    y = function(**copies, training=training)
    gradients = torch.autograd.grad(y, inputs, grad.to(y.dtype))
    statistics = {name: copies[name] for name in ("running_mean", "running_var")}
    names = ("grad_x", "grad_weight", "grad_bias")
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True)), **statistics}


def away_from_the_kink(tensors: dict[str, Tensor], training: bool, margin: float) -> Tensor:
    """Where rounding cannot decide whether the output is 0."""
    exact = {name: t.double() for name, t in tensors.items()}
    normalized = functional.batch_norm(
        exact["x"], exact["running_mean"], exact["running_var"], exact["weight"], exact["bias"], training
    )
    return normalized.abs() > margin


def error(result: Tensor, reference: Tensor) -> float:
    scale = float(reference.detach().abs().max()) or 1.0
    return float((result.double() - reference).detach().abs().max()) / scale


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_gradients_and_statistics_against_fp64(shape, mode):
    tensors = samples(*shape)
    assert bn_act_available(*tensors.values())
    grad = randn(*shape, seed=5) * away_from_the_kink(tensors, MODES[mode], 1e-5)
    ours = results(bn_act, tensors, grad, training=MODES[mode])
    exact = results(plain, tensors, grad, training=MODES[mode], dtype=torch.float64)
    torchs = results(plain, tensors, grad, training=MODES[mode])
    for name, reference in exact.items():
        assert error(ours[name], reference) <= 2 * error(torchs[name], reference) + 2e-7, name


@given(
    st.tuples(st.integers(2, 4), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=25)
def test_any_shape(shape, training, channels_last):
    tensors = samples(*shape)
    grad = randn(*shape, seed=5) * away_from_the_kink(tensors, training, 1e-4)
    if channels_last:
        grad = grad.to(memory_format=torch.channels_last)
    else:
        tensors["x"] = tensors["x"].contiguous()
    ours = results(bn_act, tensors, grad, training=training)
    exact = results(plain, tensors, grad, training=training, dtype=torch.float64)
    torchs = results(plain, tensors, grad, training=training)
    for name, reference in exact.items():
        # of few values the gradient may be what is left of terms as large as `grad`
        cancelled = 2.0**-23 * float(grad.abs().max()) / (float(reference.detach().abs().max()) or 1.0)
        assert error(ours[name], reference) <= max(5e-6, 3 * error(torchs[name], reference), cancelled), name


def test_a_mean_far_from_zero_costs_no_digits():
    tensors = samples(8, 16, 16, 16, mean=1000.0)
    exact = plain(**{k: t.double() for k, t in tensors.items()}, training=True)
    # x itself has 2^-24 * 1000 of rounding at most
    assert error(bn_act(**tensors, training=True), exact) <= 1e-4


@pytest.mark.parametrize("mean", [0.0, 1.0, 30.0, 1000.0])
@pytest.mark.parametrize("far", [0.0, 50.0], ids=["", "first row far from the mean"])
def test_running_statistics_lose_no_digits(mean, far):
    tensors = samples(8, 48, 16, 16, mean=mean)
    tensors["x"][0, :, 0, 0] += far
    grad = torch.zeros(8, 48, 16, 16)
    exact = results(plain, tensors, grad, training=True, dtype=torch.float64)
    ours, torchs = (results(function, tensors, grad, training=True) for function in (bn_act, plain))
    for name in ("running_mean", "running_var"):
        # rounded once to fp32: 2^-24 of itself
        allowed = 2 * (torchs[name] - exact[name]).norm() + 2.0**-24 * exact[name].norm()
        assert (ours[name] - exact[name]).norm() <= allowed, name


@pytest.mark.parametrize("mode", list(MODES))
def test_bf16_is_the_fp32_result_rounded_once(mode):
    tensors = samples(4, 20, 6, 6, dtype=torch.bfloat16)
    grad = randn(4, 20, 6, 6, dtype=torch.bfloat16, seed=5)
    low = results(bn_act, tensors, grad, training=MODES[mode])
    high = results(bn_act, tensors | {"x": tensors["x"].float()}, grad.float(), training=MODES[mode])
    for name, value in low.items():
        assert torch.equal(value, high[name].to(value.dtype)), name
    assert low["y"].dtype == low["grad_x"].dtype == torch.bfloat16
    assert low["grad_weight"].dtype == torch.float32


@pytest.mark.parametrize("mode", list(MODES))
def test_threads_do_not_change_a_bit(mode):
    tensors, grad = samples(9, 24, 20, 21), randn(9, 24, 20, 21, seed=5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(bn_act, tensors, grad, training=MODES[mode]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_running_statistics_follow_the_module():
    module = nn.BatchNorm2d(6, momentum=0.3)
    mean, var = torch.zeros(6), torch.ones(6)
    for seed in range(3):
        x = randn(4, 6, 5, 5, seed=seed) + seed
        module(x)
        version = mean._version
        bn_act(x, None, None, mean, var, training=True, momentum=0.3)
        assert mean._version > version
    torch.testing.assert_close(mean, module.running_mean)
    torch.testing.assert_close(var, module.running_var)


def test_without_statistics_and_parameters():
    x = samples(4, 6, 5, 5)["x"]
    expected = plain(x.double(), None, None, None, None, training=True)
    assert error(bn_act(x, training=True), expected) <= 2e-6


@pytest.mark.parametrize("mode", list(MODES))
def test_what_is_kept_for_the_backward_pass(mode):
    tensors = samples(4, 20, 6, 6)
    x = tensors["x"].requires_grad_()
    # held, or torch 2.11 frees what it keeps
    y = bn_act(**tensors, training=MODES[mode])
    kept, _, bits = y.grad_fn.saved_tensors[:3]
    if MODES[mode]:
        assert kept.data_ptr() == x.data_ptr()
    else:
        assert kept is None
        assert bits.nbytes == 4 * 6 * 6 * 32 // 8
    tensors["bias"].requires_grad_()
    y = bn_act(**tensors, training=MODES[mode])
    assert y.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias"), ("weight", "bias")], ids=str)
def test_only_the_gradients_that_were_asked_for(mode, wanted):
    tensors, grad = samples(3, 5, 4, 4), randn(3, 5, 4, 4, seed=5)
    everything = results(bn_act, tensors, grad, training=MODES[mode])
    for name in wanted:
        tensors[name].requires_grad_()
    bn_act(**tensors, training=MODES[mode]).backward(grad)
    for name in ("x", "weight", "bias"):
        if name in wanted:
            torch.testing.assert_close(tensors[name].grad, everything[f"grad_{name}"], rtol=1e-5, atol=1e-6)
        else:
            assert tensors[name].grad is None

    for t in tensors.values():
        t.requires_grad_()
    y = bn_act(**(tensors | {n: tensors[n].detach() for n in ("running_mean", "running_var")}), training=MODES[mode])
    found = torch.autograd.grad(y, [tensors[name] for name in wanted], grad)
    for name, gradient in zip(wanted, found, strict=True):
        assert torch.equal(gradient, everything[f"grad_{name}"])


@pytest.mark.parametrize("mode", list(MODES))
def test_nan_goes_through(mode):
    tensors = samples(2, 4, 3, 3)
    tensors["x"][1, 2, 0, 0] = float("nan")
    y = bn_act(**tensors, training=MODES[mode])
    assert y[:, 2].isnan().all() if MODES[mode] else y[1, 2, 0, 0].isnan()
    assert y[:, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("mode", list(MODES))
def test_no_gradient_passes_an_output_of_exactly_zero(mode):
    """As torch has it: a channel whose weight and bias are 0 stays dead."""
    tensors, grad = samples(3, 20, 4, 4), randn(3, 20, 4, 4, seed=5)
    for name in ("weight", "bias"):
        tensors[name][[2, 7]] = 0.0
    ours, exact = (
        results(function, tensors, grad, training=MODES[mode], dtype=dtype)
        for function, dtype in ((bn_act, None), (plain, torch.float64))
    )
    for name in ("grad_x", "grad_weight", "grad_bias"):
        dead = ours[name][:, [2, 7]] if name == "grad_x" else ours[name][[2, 7]]
        assert (dead == 0).all(), name
        assert error(ours[name], exact[name]) <= 5e-6, name


def test_squares_that_vanish_leave_no_negative_variance():
    """Deviations whose squares fp32 rounds to 0, added up to a mean of their own in fp64."""
    x = samples(4, 16, 8, 8)["x"] * 1e-24
    x[0, :, 0, 0] += 1e-22
    mean, var = torch.zeros(16), torch.zeros(16)
    bn_act(x, None, None, mean, var, training=True, momentum=1.0)
    assert not var.signbit().any()


def test_every_lane_of_both_instruction_sets():
    """The bits kept for the backward pass, on whichever of them this processor would not choose by itself."""
    code = """
import torch
from awp_kernels import bn_act
x = torch.randn(3, 40, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
mean, var = torch.linspace(-1, 1, 40), torch.linspace(1, 2, 40)
y = bn_act(x, None, None, mean, var, training=False)
assert y.grad_fn.saved_tensors[2] is not None
(found,) = torch.autograd.grad(y.sum(), x)
expected = (y > 0) / (var + 1e-5).sqrt()[:, None, None]
torch.testing.assert_close(found, expected)
"""
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"AWP_CPU": "avx2"}, check=True, timeout=120)


def test_a_backend_forced_between_the_passes_does_not_tear_them_apart():
    tensors = samples(3, 16, 4, 4)
    x = tensors["x"].requires_grad_()
    y = bn_act(**tensors, training=False)
    (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with use_backend("reference"):
        (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, expected)


def test_only_the_bias_of_a_layer_without_weight():
    """Autograd counts the inputs that are tensors."""
    x, bias = samples(3, 5, 4, 4)["x"].requires_grad_(), randn(5).requires_grad_()
    y = bn_act(x, None, bias, training=True)
    (found,) = torch.autograd.grad(y.sum(), [bias])
    torch.testing.assert_close(found, (y > 0).sum((0, 2, 3)).float())


@pytest.mark.parametrize("mode", list(MODES))
def test_a_sum_that_only_the_shortcut_reads(mode):
    tensors = samples(3, 16, 4, 4)
    x, residual = tensors.pop("x").requires_grad_(), randn(3, 16, 4, 4, seed=6).requires_grad_()
    z, y = add_bn_act(x, residual, **tensors, training=MODES[mode])
    assert torch.equal(z, x + residual)
    grad = randn(3, 16, 4, 4, seed=7)
    alone = torch.autograd.grad(z, [x, residual], grad, retain_graph=True)
    assert all(torch.equal(found, grad) for found in alone)
    # what both read is the sum of the two
    (both,) = torch.autograd.grad([z, y], x, [grad, grad], retain_graph=True)
    (through,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(both, grad + through)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("shape", [(3, 4, 1, 5), (3, 4, 5, 1), (1, 4, 5, 6), (1, 4, 1, 5)], ids=str)
def test_gradients_whatever_the_strides_of_size_1(shape, mode):
    """torch's own, of the reference and of the models' layers; torch 2.13's take some images for another order."""
    tensors = {name: t.double() for name, t in samples(*shape).items()}
    x, grad = tensors.pop("x"), randn(*shape, seed=5).double()
    layer = BatchNorm(4).double().train(MODES[mode])
    layer.load_state_dict(tensors, strict=False)
    normalise = functools.partial(bn_act, **tensors, training=MODES[mode], activation="none")
    flat, rest = x.flatten(2).requires_grad_(), (tensors[f"running_{name}"].clone() for name in ("mean", "var"))
    y = functional.batch_norm(flat, *rest, tensors["weight"], tensors["bias"], MODES[mode])
    (exact,) = torch.autograd.grad(y, flat, grad.flatten(2))

    def laid(images: Tensor, order: tuple[int, ...]) -> Tensor:
        return images.permute(order).contiguous().permute([order.index(i) for i in range(4)])

    for order, of_grad in itertools.product(itertools.permutations(range(4)), repeat=2):
        image = laid(x, order).detach().requires_grad_()
        for function in (normalise, layer):
            (found,) = torch.autograd.grad(function(image), image, laid(grad, of_grad))
            torch.testing.assert_close(found, exact.view_as(x))


class Exchange:
    """Ranks that are threads."""

    def __init__(self, world: int) -> None:
        self.barrier, self.values = threading.Barrier(world, timeout=10), [torch.empty(0)] * world

    def of(self, rank: int) -> Ranks:
        def gather(values: Tensor) -> Tensor:
            self.values[rank] = values
            self.barrier.wait()
            gathered = torch.stack(self.values)
            self.barrier.wait()
            return gathered

        return Ranks(gather, lambda values: gather(values).sum(0))


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_ranks_that_hold_one_value_many_or_none(backend, activation):
    """Against one batch in fp64: results, running statistics, gradients of the sum of all losses."""
    channels, parts = 20, [(1, 1, 1), (5, 4, 3), (0, 4, 3), (2, 2, 6)]
    tensors = samples(1, channels, 1, 1)
    exchange, names = Exchange(len(parts)), ("x", "residual", "weight", "bias")

    def part(rank: int) -> dict[str, Tensor]:
        samples, height, width = parts[rank]
        shape = samples, channels, height, width
        images = {name: randn(*shape, seed=10 * rank + i) + 3 * rank for i, name in enumerate(("x", "residual"))}
        grads = {name: randn(*shape, seed=10 * rank + i) for i, name in ((2, "grad_z"), (3, "grad"))}
        return {**{k: t.clone() for k, t in tensors.items()}, **images, **grads}

    def run(rank: int) -> dict[str, Tensor]:
        given = part(rank)
        grads = given.pop("grad_z"), given.pop("grad")
        inputs = [given[name].requires_grad_() for name in names]
        z, y = add_bn_act(**given, training=True, momentum=0.3, activation=activation, ranks=exchange.of(rank))
        found = dict(zip(names, torch.autograd.grad([z, y], inputs, grads), strict=True))
        return {"y": y.detach(), **found, **{name: given[name] for name in ("running_mean", "running_var")}}

    with use_backend(backend), ThreadPoolExecutor(len(parts)) as pool:
        ours = list(pool.map(run, range(len(parts))))

    def rows(name: str, of: list[dict[str, Tensor]]) -> Tensor:
        return torch.cat([each[name].movedim(1, -1).reshape(-1, channels) for each in of]).double()

    whole = list(map(part, range(len(parts))))
    x, residual, weight, bias = (
        t.requires_grad_()
        for t in (rows("x", whole), rows("residual", whole), *(tensors[n].double() for n in names[2:]))
    )
    mean, var = tensors["running_mean"].double(), tensors["running_var"].double()
    z = x + residual
    u = functional.batch_norm(z, mean, var, weight, bias, True, 0.3)
    y = {"none": u, "relu": u.relu(), "silu": functional.silu(u)}[activation]
    grads = torch.autograd.grad([z, y], [x, residual, weight, bias], [rows("grad_z", whole), rows("grad", whole)])
    assert error(rows("y", ours), y) <= 1e-6
    for name, exact in zip(names, grads, strict=True):
        found = rows(name, ours) if name in names[:2] else sum(each[name] for each in ours)
        assert error(found, exact) <= 2e-6, name
    for name, exact in (("running_mean", mean), ("running_var", var)):
        assert error(ours[0][name], exact) <= 2e-7
        assert all(torch.equal(each[name], ours[0][name]) for each in ours)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_over_ranks_second_derivatives_are_refused(backend):
    x = samples(2, 16, 3, 3)["x"].requires_grad_()
    with use_backend(backend):
        y = bn_act(x, training=True, ranks=Exchange(1).of(0))
        with pytest.raises(RuntimeError, match="create_graph=True"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


MISUSE = {
    "ranks: expected with training=True": {"training": False, "ranks": Exchange(1).of(0)},
    "x: expected a batch": {"x": randn(3, 4)},
    "x: expected a floating-point tensor": {"x": torch.ones(2, 4, 3, 3, dtype=torch.int32)},
    "x: expected more than one value a channel": {"x": randn(1, 4, 1, 1)},
    "weight: expected 4 values": {"weight": randn(5)},
    "weight: expected 4 values, one a channel of x, got \\(4, 1\\)": {"weight": randn(4, 1)},
    "running_var: expected together": {"running_var": None},
    "running_mean: expected running statistics": {"running_mean": None, "running_var": None, "training": False},
    "running_mean: expected statistics without a gradient": {"running_mean": torch.ones(4, requires_grad=True)},
    "bias: expected device": {"bias": torch.empty(4, device="meta")},
}


@pytest.mark.parametrize("message", list(MISUSE))
def test_misuse_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        bn_act(**({**samples(2, 4, 3, 3), "training": True} | MISUSE[message]))


@pytest.mark.parametrize("residual", [randn(2, 4, 3, 2), randn(2, 4, 3, 3).double(), randn(2, 4, 3, 3).to("meta")])
def test_a_residual_that_does_not_fit(residual):
    with pytest.raises(ValueError, match="residual: expected"):
        add_bn_act(samples(2, 4, 3, 3)["x"], residual, training=True)


def test_an_unknown_activation():
    with pytest.raises(ValueError, match="activation: expected one of none, relu, silu, got 'gelu'"):
        bn_act(samples(2, 4, 3, 3)["x"], training=True, activation="gelu")


def test_what_the_kernel_does_not_serve_goes_to_torch():
    tensors = samples(2, 4, 3, 3)
    doubles = {name: t.double() for name, t in tensors.items()}
    assert not bn_act_available(*doubles.values())
    assert torch.equal(bn_act(**doubles, training=False), plain(**doubles, training=False))
    with use_backend("reference"):
        assert torch.equal(bn_act(**tensors, training=False), plain(**tensors, training=False))
    with use_backend("cpp"), pytest.raises(ValueError, match="'cpp' was forced"):
        bn_act(**doubles, training=False)


def test_under_torch_compile():
    tensors = samples(2, 4, 3, 3)
    compiled = torch.compile(bn_act, backend="aot_eager", fullgraph=True)
    expected = plain(**{k: t.clone() for k, t in tensors.items()}, training=True)
    torch.testing.assert_close(compiled(**tensors, training=True), expected)

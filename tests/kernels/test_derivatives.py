"""Derivatives of conv3x3, bn_act and the models beyond one backward pass, against plain PyTorch in fp64.

gradgradcheck in fp64 would check torch's own operations, which serve there.
"""

import copy
import functools
import warnings

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from awp_engine.models import build_model
from awp_engine.models.layers import ActivatedBatchNorm, Conv3x3
from awp_kernels import add_bn_act, bn_act, conv3x3, stem3x3, use_backend
from awp_kernels._images import operations

pytestmark = [
    pytest.mark.skipif(operations() is None, reason="needs AVX2 with FMA"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@pytest.fixture(scope="module", autouse=True)
def _decompositions_of_torchs_own():
    with warnings.catch_warnings():  # torch 2.14 loads them at the first tangent, by torch.jit.script
        warnings.simplefilter("ignore", FutureWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.ones(1), torch.ones(1))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written_out(x, weight, bias, mean, var, *, training, activation=functional.relu):
    """By its definition: torch's batch normalisation holds the batch's statistics still from the third order on."""
    if training:
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
    scale = weight * (var + 1e-5).rsqrt()
    return activation((x - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None])


_STATISTICS = randn(5, seed=3), randn(5, seed=4).abs() + 0.5


def _normalise(training):
    def both(x, weight, bias):
        kept = [t.to(x.dtype) for t in _STATISTICS]
        if x.dtype == torch.float64:
            return written_out(x, weight, bias, *kept, training=training)
        # vmap lets no batch into statistics that are not one themselves, as for torch's own layer
        return bn_act(x, weight, bias, *([] if training else kept), training=training)

    return both


def _add_and_normalise(training):
    def both(x, weight, bias, residual):
        kept = [t.to(x.dtype) for t in _STATISTICS]
        if x.dtype == torch.float64:
            z = x + residual
            return 0.1 * z + 0.5 * written_out(z, weight, bias, *kept, training=training, activation=functional.silu)
        kept = [] if training else kept
        z, y = add_bn_act(x, residual, weight, bias, *kept, training=training, activation="silu")
        return 0.1 * z + 0.5 * y

    return both


def _convolve(x, weight):
    return conv3x3(x, weight) if x.dtype == torch.float32 else functional.conv2d(x, weight, padding=1)


def _stem(x, weight):
    return stem3x3(x, weight) if x.dtype == torch.float32 else functional.conv2d(x, weight, padding=1)


_NORMALISED = randn(3, 5, 4, 4) * 2 + 1, randn(5, seed=1) + 1, randn(5, seed=2)
# the operation in fp32, plain PyTorch in fp64, and its inputs
CASES = {
    "conv3x3": (_convolve, (randn(2, 3, 6, 5), randn(4, 3, 3, 3, seed=1))),
    "stem3x3": (_stem, (randn(2, 3, 6, 5), randn(16, 3, 3, 3, seed=1))),
    "bn_act train": (_normalise(True), _NORMALISED),
    "bn_act eval": (_normalise(False), _NORMALISED),
    "add_bn_act train": (_add_and_normalise(True), (*_NORMALISED, randn(3, 5, 4, 4, seed=6))),
    "add_bn_act eval": (_add_and_normalise(False), (*_NORMALISED, randn(3, 5, 4, 4, seed=6))),
}


def smooth(y: Tensor) -> Tensor:
    """A number of the output whose first three derivatives do not jump where a ReLU does."""
    return (y.pow(4) * torch.arange(y.numel(), dtype=y.dtype).cos().view(y.shape)).mean()


def inputs_of(name: str, wanted: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    tensors = [
        t.to(dtype).to(memory_format=torch.channels_last) if t.ndim == 4 else t.to(dtype) for t in CASES[name][1]
    ]
    return [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]


def close(ours: Tensor, exact: Tensor, bound: float = 1e-4) -> None:
    """Within so much of the largest value."""
    assert ours.shape == exact.shape
    assert float((ours.double() - exact).abs().max()) <= bound * float(exact.abs().max())


def derivatives(name: str, wanted: tuple[int, ...], dtype: torch.dtype, orders: int) -> list[Tensor]:
    inputs = inputs_of(name, wanted, dtype)
    asked = [inputs[i] for i in wanted]
    value, found = smooth(CASES[name][0](*inputs)), []
    for order in range(orders):
        gradients = torch.autograd.grad(value, asked, create_graph=True)
        found += gradients
        value = sum((g * randn(*g.shape, seed=10 + order).to(dtype)).sum() for g in gradients)
    return [t.detach() for t in found]


WANTED = [
    (name, wanted)
    for name, sets in (
        ("conv3x3", [(0,), (1,), (0, 1)]),
        ("stem3x3", [(0,), (1,), (0, 1)]),
        ("bn_act train", [(0,), (1,), (0, 1, 2)]),
        ("bn_act eval", [(0,), (1,), (0, 2), (0, 1, 2)]),
        ("add_bn_act train", [(0,), (3,), (0, 1, 2, 3)]),
        ("add_bn_act eval", [(0,), (2, 3), (0, 1, 2, 3)]),
    )
    for wanted in sets
]


@pytest.mark.parametrize(("name", "wanted"), WANTED)
def test_derivatives_of_three_orders(name, wanted):
    ours, exact = (derivatives(name, wanted, dtype, 3) for dtype in (torch.float32, torch.float64))
    for mine, theirs in zip(ours, exact, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("name", list(CASES))
def test_backward_with_create_graph_and_twice_over_one_graph(name):
    wanted = tuple(range(len(CASES[name][1])))
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = inputs_of(name, wanted, dtype)
        seen = []
        inputs[0].register_hook(lambda g, seen=seen: seen.append(g.detach()))
        value = smooth(CASES[name][0](*inputs))
        first = torch.autograd.grad(value, inputs, retain_graph=True)
        first[0].square().sum()  # no graph was asked for
        assert not first[0].requires_grad
        second = torch.autograd.grad(value, inputs, create_graph=True)
        sum(g.square().sum() for g in second).backward()
        found.append([*first, *(g.detach() for g in second), *(t.grad for t in inputs), *seen])
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs)


def plainly(name, *tensors):
    """torch's own layer."""
    if name in ("conv3x3", "stem3x3"):
        return functional.conv2d(*tensors, padding=1)
    x, weight, bias, *residual = tensors
    training, kept = name.endswith("train"), [t.to(x.dtype) for t in _STATISTICS]
    z = sum(residual, x)
    u = functional.batch_norm(z, *([None, None] if training else kept), weight, bias, training)
    return 0.1 * z + 0.5 * u * u.sigmoid() if residual else functional.relu(u)


@pytest.mark.parametrize("name", ["conv3x3", "stem3x3", "bn_act train", "bn_act eval"])
def test_a_weight_that_asks_for_its_gradient_after_the_pass(name):
    """torch's saved tensor is the parameter itself, whatever it asks for by then."""
    found = []
    for function in (CASES[name][0], functools.partial(plainly, name)):
        inputs = inputs_of(name, (0,), torch.float32)
        y = function(*inputs)
        inputs[1].requires_grad_()
        (first,) = torch.autograd.grad(smooth(y), inputs[0], create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), inputs[1])[0])
    close(found[0], found[1].double())


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_a_weight_written_between_the_passes_is_refused_as_torch_does(name, create_graph):
    inputs = inputs_of(name, (0,), torch.float32)
    y = CASES[name][0](*inputs)
    inputs[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(smooth(y), inputs[0], create_graph=create_graph)


def test_statistics_move_once_however_often_is_differentiated():
    x = _NORMALISED[0].clone().requires_grad_()
    mean, var = torch.zeros(5), torch.ones(5)
    (first,) = torch.autograd.grad(smooth(bn_act(x, None, None, mean, var, training=True)), x, create_graph=True)
    moved = mean.clone(), var.clone()
    first.square().sum().backward()
    assert torch.equal(mean, moved[0])
    assert torch.equal(var, moved[1])
    close(mean, 0.1 * _NORMALISED[0].double().mean((0, 2, 3)))


@pytest.mark.parametrize("name", list(CASES))
def test_checkpointing(name):
    wanted = tuple(range(len(CASES[name][1])))
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = inputs_of(name, wanted, dtype)
        value = smooth(checkpoint(CASES[name][0], *inputs, use_reentrant=False))
        first = torch.autograd.grad(value, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        found.append([*(g.detach() for g in first), *second])
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs)


def _in(argument: int, function, tensors):
    return lambda t: smooth(function(*tensors[:argument], t, *tensors[argument + 1 :]))


TRANSFORMS = {
    "grad": lambda f, t: grad(f)(t),
    "vjp": lambda f, t: vjp(f, t)[1](torch.ones((), dtype=t.dtype))[0],
    "jvp": lambda f, t: jvp(f, (t,), (t.cos(),))[1],
    "grad of jvp": lambda f, t: grad(lambda u: jvp(f, (u,), (t.cos(),))[1])(t),
    "jvp of grad": lambda f, t: jvp(grad(f), (t,), (t.cos(),))[1],
    "jacrev": lambda f, t: jacrev(f)(t),
    "jacfwd": lambda f, t: jacfwd(f)(t),
    "hessian": lambda f, t: hessian(f)(t),
    "vmap": lambda f, t: vmap(f)(torch.stack([t, t.cos()])),
    "vmap of grad": lambda f, t: vmap(grad(f))(torch.stack([t, t.cos()])),
    "batched gradients": lambda f, t: torch.autograd.functional.hessian(f, t, vectorize=True),
    "forward over reverse": lambda f, t: _dual_gradient(f, t),
}


def _dual_gradient(f, t):
    """Of a graph made outside, as only its backward pass meets the tangents."""
    t = t.clone().requires_grad_()
    value = f(t)
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(torch.ones_like(value), value.detach().cos())
        return forward_ad.unpack_dual(torch.autograd.grad(value, t, seed)[0]).tangent


@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("name", list(CASES))
def test_transforms(name, transform):
    """As torch's own layer, whose gradient of a directional derivative holds the batch's statistics still."""
    for argument in range(len(CASES[name][1])):
        found = []
        for function, dtype in ((CASES[name][0], torch.float32), (functools.partial(plainly, name), torch.float64)):
            tensors = inputs_of(name, (), dtype)
            found.append(TRANSFORMS[transform](_in(argument, function, tensors), tensors[argument]))
        close(found[0], found[1])


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("no_grad", [False, True], ids=["", "no_grad"])
@pytest.mark.parametrize("name", list(CASES))
def test_forward_mode(name, no_grad, frozen):
    for argument in range(len(CASES[name][1])):
        found = []
        for dtype in (torch.float32, torch.float64):
            tensors = inputs_of(name, () if frozen else (0, 1), dtype)
            with torch.set_grad_enabled(not no_grad), forward_ad.dual_level():
                tensors[argument] = forward_ad.make_dual(tensors[argument], tensors[argument].detach().cos())
                found.append(forward_ad.unpack_dual(CASES[name][0](*tensors)).tangent.detach())
        assert found[1].abs().max() > 0
        close(found[0], found[1])


class Watching(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called.append(getattr(func, "__name__", ""))
        return func(*args, **kwargs or {})


def test_modes_see_torchs_own_operations():
    x, weight = CASES["conv3x3"][1]
    with FlopCounterMode(display=False) as counter:
        conv3x3(x, weight)
    assert counter.get_total_flops() == 2 * 2 * 4 * 30 * 27
    with Watching() as watching:
        conv3x3(x, weight)
        bn_act(*_NORMALISED, training=True)
    assert {"conv2d", "batch_norm"} <= set(watching.called)


def test_a_default_device_does_not_move_the_results():
    x, weight = (t.clone().requires_grad_() for t in CASES["conv3x3"][1])
    y = conv3x3(x, weight)
    with torch.device("meta"):
        assert conv3x3(x, weight).device.type == "cpu"
        found = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
        again = torch.autograd.grad(y.sum(), (x, weight), create_graph=True)
    for ours, theirs in zip(found, again, strict=True):
        close(ours, theirs.detach().double())


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert conv3x3(torch.empty(2, 3, 6, 5), torch.empty(4, 3, 3, 3)).shape == (2, 4, 6, 5)
        # real tensors under the mode are its own to follow
        assert conv3x3(*CASES["conv3x3"][1]).shape == (2, 4, 6, 5)


def test_transforms_under_torch_compile():
    x, weight = CASES["conv3x3"][1]
    found = []
    for convolve in (conv3x3, functools.partial(functional.conv2d, padding=1)):
        torch.compiler.reset()

        def loss(x, weight, convolve=convolve):
            return smooth(convolve(x, weight))

        def both(x, weight, loss=loss):
            first = grad(lambda t, w: grad(loss)(t, w).square().sum(), (0, 1))(x, weight)
            return *first, jvp(lambda t: loss(t, weight), (x,), (x,))[1], vmap(lambda t: loss(t, weight))(x[:, None])

        found.append(torch.compile(both, backend="aot_eager", fullgraph=True)(x, weight))
        with forward_ad.dual_level():
            # not fullgraph: torch 2.14 compiles nothing that tangents go through
            dual = torch.compile(loss, backend="aot_eager")(forward_ad.make_dual(x, x), weight)
            found[-1] += (forward_ad.unpack_dual(dual).tangent,)
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs.double())


def test_the_traced_operation_drops_no_tangent():
    x, weight = CASES["conv3x3"][1]
    refused = pytest.raises(RuntimeError, match=r"no forward-mode derivatives; call awp_kernels\.conv3x3")
    with torch.no_grad(), refused:
        jvp(functools.partial(torch.ops.awp.conv3x3, bf16=False), (x, weight), (x, weight))
    with torch.no_grad(), forward_ad.dual_level(), refused:
        torch.ops.awp.conv3x3(forward_ad.make_dual(x, x), weight, False)


def test_torch_compile_keeps_the_fused_convolution():
    called = []

    def backend(graph, inputs):
        def compiler(graph, inputs):
            targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
            called.extend(target for target in targets if "conv" in target)
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=compiler)(graph, inputs)

    x, weight = inputs_of("conv3x3", (0, 1), torch.float32)
    torch.compiler.reset()
    torch.compile(lambda x, weight: smooth(conv3x3(x, weight)), backend=backend, fullgraph=True)(x, weight).backward()
    names = "conv3x3", "conv3x3_grad_x", "conv3x3_grad_weight"
    assert sorted(called) == sorted(f"awp.{name}.default" for name in names)


# ---- whole models


def model_of(name: str, width: int | None, mode: bool) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(name, 10, [0.5] * 3, [0.25] * 3, width=width)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, 3, 16, 16))  # statistics of their own
    return model.train(mode)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(model(x), y)


def hessian_vector(model, x, y, vector):
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss_of(model, x, y), parameters, create_graph=True)
    return torch.autograd.grad(sum((g * v).sum() for g, v in zip(first, vector, strict=True)), parameters)


def moved(x):
    return x + 0.03 * torch.sign(x - 0.5)


def grad_align(model, x, y):
    """Andriushchenko and Flammarion, "Understanding and Improving Fast Adversarial Training", 2020: its gradients."""
    near, far = x.clone().requires_grad_(), moved(x).requires_grad_()
    first, other = (torch.autograd.grad(loss_of(model, t, y), t, create_graph=True)[0].flatten(1) for t in (near, far))
    (1 - functional.cosine_similarity(first, other.detach())).mean().backward()
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    model.zero_grad()
    return found


def largest_eigenvalue(model, x, y, vector):
    for _ in range(3):
        norm = torch.stack([v.norm() for v in vector]).norm()
        vector = hessian_vector(model, x, y, [v / norm for v in vector])
    return [torch.stack([v.norm() for v in vector]).norm()]


def difference(ours, exact) -> float:
    ours, exact = (torch.cat([t.flatten().double() for t in tensors]) for tensors in (ours, exact))
    return float((ours - exact).norm() / exact.norm())


def active(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Which outputs of every ReLU are not 0."""
    found, model = [], copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, ActivatedBatchNorm):
            # of a sum and what becomes of it, the latter
            layer.register_forward_hook(lambda _, __, y: found.append((y[1] if isinstance(y, tuple) else y) > 0))
    with torch.no_grad():
        model(x)
    return found


def batch_that_rounding_leaves_on_its_side(model: nn.Module, size: int) -> Tensor:
    """Two images. Where one value of a million moves over a ReLU's kink, derivatives jump by a thousandth or more."""
    for seed in range(40):
        x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
        ours = active(model, x) + active(model, moved(x))
        with use_backend("reference"):
            plain = active(model, x) + active(model, moved(x))
        if all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True)):
            return x
    pytest.fail("rounding moves some value over a kink in 40 of 40 batches")


MODELS = [
    ("preact-resnet-18", 16, 16),
    ("wrn-10-2", None, 8),
    pytest.param("preact-resnet-18", 64, 32, marks=pytest.mark.long),
    pytest.param("wrn-10-4", None, 32, marks=pytest.mark.long),
]


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "width", "size"), MODELS)
def test_second_order_quantities_of_models(name, width, size, mode):
    model = model_of(name, width, mode)
    x, y = batch_that_rounding_leaves_on_its_side(model, size), torch.arange(2)
    vector = [randn(*p.shape, seed=1) for p in model.parameters()]
    for quantity in (hessian_vector, grad_align, largest_eigenvalue):
        rest = () if quantity is grad_align else (vector,)
        ours = quantity(copy.deepcopy(model), x, y, *rest)
        with use_backend("reference"):
            plain = quantity(copy.deepcopy(model), x, y, *rest)
        apart = difference(ours, plain)
        print(f"{name} {width} {mode} {quantity.__name__}: {apart:.1e}")
        assert apart <= 1e-4, quantity.__name__


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_transforms_of_a_model(mode):
    """A gradient a sample, and a directional derivative of the frozen model."""
    model = model_of("wrn-10-2", None, False)
    x, y = torch.rand(3, 3, 8, 8), torch.arange(3)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image, label):
        return functional.cross_entropy(functional_call(model, parameters, image[None]), label[None])

    each = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(3):
        one = torch.autograd.grad(loss_of(model, x[i : i + 1], y[i : i + 1]), list(model.parameters()))
        assert difference([g[i] for g in each.values()], one) <= 1e-4

    model.train(mode).requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and mode:
            layer.track_running_stats = False
    direction = torch.randn_like(x)
    _, tangent = jvp(model, (x,), (direction,))
    exact = copy.deepcopy(model).double()
    (gradient,) = torch.autograd.grad(exact(t := x.double().requires_grad_()).sum(), t)
    close(tangent.sum(), (gradient * direction).sum(), 1e-3)


def test_layers_are_the_fused_ones():
    """What the tests above rest on."""
    model = model_of("wrn-10-2", None, False).requires_grad_(False)
    x = torch.rand(2, 3, 8, 8).requires_grad_()
    y = model(x)  # torch 2.11 frees the nodes without it
    names, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [n for n, _ in node.next_functions if n is not None]
    assert {"_Conv3x3Backward", "_BnActBackward"} <= names
    assert any(isinstance(m, Conv3x3) for m in model.modules())
    assert any(isinstance(m, ActivatedBatchNorm) for m in model.modules())

"""The fused SGD step, the norm that clips, and the optimizer on top of them, against fp64 and torch.optim.SGD."""

import copy
import io
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import DTYPES, LAYOUTS, SGD_VARIANTS, SHAPES, perturbed_fp64, randn, sgd_fp64, weights_and_grads
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from awp_kernels import SGD, perturb_, perturb_into_, restore_, sgd_step_, total_norm, use_backend

LR = 0.1
# network-like and odd sizes; the largest has several chunks
SIZES = ["scalar", "one", "warp_edges", "primes", "empty_tensors", "network", "chunk_edges"]


def bits(tensor: Tensor) -> Tensor:
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.cpu().contiguous().reshape(-1).view(width)


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def on(device: str, tensors: list[Tensor]) -> list[Tensor]:
    return [t.clone().to(device) for t in tensors]


def error(result: list[Tensor], exact: list[Tensor]) -> float:
    return math.sqrt(sum(float(((r.double().cpu() - e) ** 2).sum()) for r, e in zip(result, exact, strict=True)))


def norms_of(weights: list[Tensor]) -> Tensor:
    return torch.stack([w.double().norm() for w in weights]).cpu()


class Lists:
    """Everything that a step reads and writes, on the CPU; `copies` puts it on a device."""

    def __init__(
        self, shapes: str, grad: torch.dtype = torch.float32, out: torch.dtype = torch.bfloat16, seed: int = 0
    ) -> None:
        self.weights, _ = weights_and_grads(shapes, torch.float32, seed)
        self.grads = weights_and_grads(shapes, grad, seed)[1]
        self.buffers = [randn(tuple(w.shape), seed=seed + 200 + i) for i, w in enumerate(self.weights)]
        self.averages = [w + randn(tuple(w.shape), seed=seed + 300 + i) for i, w in enumerate(self.weights)]
        self.out = [(w + randn(tuple(w.shape), seed=seed + 400)).to(out) for w in self.weights]

    def arguments(self, device: str, options: dict[str, Any]) -> dict[str, Any]:
        """What `sgd_step_` takes; numbers that live on the device become tensors, what is only written NaN."""
        result: dict[str, Any] = {"weights": on(device, self.weights), "grads": on(device, self.grads), "lr": LR}
        if options.get("momentum"):
            result["momentum_buffers"] = on(device, self.buffers)
        if "average_weight" in options:
            result["averages"] = on(device, self.averages)
        result["out"] = on(device, [torch.full_like(o, float("nan")) for o in self.out])
        for name, dtype in (("grad_scale", torch.float32), ("grad_norm", torch.float64)):
            if name in options:
                result[name] = torch.tensor(options[name], dtype=dtype, device=device)
        return options | result

    def exact(self, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        return sgd_fp64(self.weights, self.grads, self.buffers, self.averages, lr=LR, **options)


def assert_close(result: list[Tensor], exact: list[Tensor]) -> None:
    """A few roundings of fp32."""
    for r, e in zip(result, exact, strict=True):
        torch.testing.assert_close(r.double().cpu(), e, rtol=4e-7, atol=4e-7)


# ---- one step


@pytest.mark.parametrize("variant", list(SGD_VARIANTS))
@pytest.mark.parametrize("shapes", SIZES)
@pytest.mark.parametrize("grad", DTYPES, ids=str)
def test_one_step_against_fp64(target, shapes, grad, variant):
    device, _ = target
    options = SGD_VARIANTS[variant]
    lists = Lists(shapes, grad)
    arguments = lists.arguments(device, options)
    norms = sgd_step_(**arguments)

    weights, buffers, averages = lists.exact(options)
    assert_close(arguments["weights"], weights)
    assert_close(arguments.get("momentum_buffers", []), buffers if options.get("momentum") else [])
    assert_close(arguments.get("averages", []), averages if "averages" in arguments else [])
    assert same_bits(arguments["out"], [w.to(torch.bfloat16) for w in arguments["weights"]])
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms.cpu(), norms_of(arguments["weights"]), rtol=1e-12, atol=0)
    assert same_bits(arguments["grads"], lists.grads)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}], ids=["momentum", "nesterov"])
def test_error_over_100_steps_at_most_twice_torchs(target, options):
    device, _ = target
    weights, _ = weights_and_grads("network", torch.float32)
    options = {"momentum": 0.9, "weight_decay": 5e-4} | options
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = torch.optim.SGD(parameters, lr=LR, foreach=False, **options)
    stepped, buffers = on(device, weights), on(device, [torch.zeros_like(w) for w in weights])
    exact, exact_buffers = [w.double() for w in weights], [torch.zeros_like(w).double() for w in weights]
    for step in range(100):
        grads = [randn(tuple(w.shape), seed=1000 * step + i, scale=1e-2) for i, w in enumerate(weights)]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        sgd_step_(stepped, on(device, grads), buffers, lr=LR, **options)
        exact, exact_buffers, _ = sgd_fp64(exact, grads, exact_buffers, exact, lr=LR, **options)
    torchs = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    assert error(stepped, exact) <= 2 * error([p.detach() for p in parameters], exact)
    assert error(buffers, exact_buffers) <= 2 * error(torchs, exact_buffers)


def test_first_step_from_zeros_is_torchs_own():
    """Momentum times zero adds nothing: in plain PyTorch the two agree to the last bit."""
    weights, grads = weights_and_grads("network", torch.float32)
    parameters = [nn.Parameter(w.clone()) for w in weights]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=0.01, foreach=False).step()
    with use_backend("reference"):
        sgd_step_(weights, grads, [torch.zeros_like(w) for w in weights], lr=LR, momentum=0.9, weight_decay=0.01)
    for w, p in zip(weights, parameters, strict=True):
        torch.testing.assert_close(w, p.detach(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("out", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("variant", ["momentum", "everything"])
def test_any_layout_gives_the_same_bits(target, layout, out, variant):
    device, _ = target
    lists, options = Lists("network", torch.float16, out), SGD_VARIANTS[variant]
    plain = lists.arguments(device, options)
    sgd_step_(**plain)
    laid_out = lists.arguments(device, options)
    written = [name for name in ("weights", "momentum_buffers", "averages", "out") if name in laid_out]
    for name in written:
        # a tensor whose memory nothing shares, laid out on the device
        laid_out[name] = [layout.lay(t.cpu()) if device == "cpu" else layout.lay(t).to(device) for t in laid_out[name]]
    # gradients in a layout of their own are followed all the same
    sgd_step_(**laid_out)
    for name in written:
        assert same_bits(laid_out[name], plain[name]), name
    assert same_bits(laid_out["out"], [w.to(out) for w in laid_out["weights"]])


@pytest.mark.parametrize(
    "flags",
    [
        {"found_inf": torch.tensor(1.0)},
        {"found_inf": torch.tensor([True])},
        {"found_inf": torch.tensor(float("nan"))},
        {"grad_norm": torch.tensor(float("nan"), dtype=torch.float64), "max_norm": 1.0},
        {"grad_norm": torch.tensor(float("inf")), "max_norm": 1.0},
        {"grad_norm": torch.tensor(float("-inf"))},
    ],
    ids=["found", "found bool", "found nan", "norm nan", "norm inf", "norm -inf"],
)
@pytest.mark.parametrize("grad", DTYPES, ids=str)
def test_a_step_that_is_left_out_changes_no_bit(target, flags, grad):
    device, _ = target
    lists = Lists("network", grad)
    lists.grads[0].fill_(float("nan"))
    lists.grads[2].fill_(float("inf"))
    # payloads and denormals are kept
    special = torch.tensor([0x7FC00001, 1, -0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    for tensors in (lists.buffers, lists.averages):
        tensors[1][:3] = special
    arguments = lists.arguments(device, {"momentum": 0.9, "average_weight": 0.1, "weight_decay": 0.1})
    arguments |= {name: value.to(device) if isinstance(value, Tensor) else value for name, value in flags.items()}
    norms = sgd_step_(**arguments)
    assert same_bits(arguments["weights"], lists.weights)
    assert same_bits(arguments["momentum_buffers"], lists.buffers)
    assert same_bits(arguments["averages"], lists.averages)
    assert same_bits(arguments["out"], [w.bfloat16() for w in lists.weights])
    torch.testing.assert_close(norms.cpu(), norms_of(lists.weights), rtol=1e-12, atol=0)


@pytest.mark.parametrize("flag", [torch.tensor(0.0), torch.tensor(False)], ids=["fp32", "bool"])
def test_a_step_that_is_not_left_out(target, flag):
    device, _ = target
    lists = Lists("network")
    arguments = lists.arguments(device, SGD_VARIANTS["everything"])
    sgd_step_(**arguments, found_inf=flag.to(device))
    assert_close(arguments["weights"], lists.exact(SGD_VARIANTS["everything"])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_numbers_on_the_device(target, dtype):
    """The same bits as from numbers that the host knows, and read anew at every call."""
    device, _ = target
    lists, options = Lists("network"), SGD_VARIANTS["everything"]
    for lr, share in ((0.5, 0.25), (0.125, 0.5)):
        expected, arguments = lists.arguments(device, options), lists.arguments(device, options)
        sgd_step_(**expected | {"lr": lr, "average_weight": share})
        numbers = {
            "lr": torch.tensor(lr, dtype=dtype, device=device),
            "average_weight": torch.tensor([share], dtype=dtype, device=device),
            "grad_norm": arguments["grad_norm"].to(dtype),
        }
        sgd_step_(**arguments | numbers)
        for name in ("weights", "momentum_buffers", "averages", "out"):
            assert same_bits(arguments[name], expected[name])


def test_decay_a_tensor(target):
    device, _ = target
    lists = Lists("network")
    options = {"weight_decay": [0.0, 0.1, 0.0, 0.01, 0.5]}
    arguments = lists.arguments(device, options)
    sgd_step_(**arguments)
    assert_close(arguments["weights"], lists.exact(options)[0])


def test_decay_of_zero_reads_no_infinity(target):
    """A weight that has left the range does not reach the momentum without decay."""
    device, _ = target
    w, buffer = torch.tensor([float("inf"), 1.0], device=device), torch.zeros(2, device=device)
    sgd_step_([w], [torch.ones(2, device=device)], [buffer], lr=0.5, momentum=0.9)
    assert w.tolist() == [float("inf"), 0.5]
    assert buffer.tolist() == [1.0, 1.0]


def test_more_tensors_than_a_launch_names(target):
    device, _ = target
    weights = [randn((1 + i % 5, 3), seed=i) for i in range(500)]
    grads = [randn((1 + i % 5, 3), torch.float16, seed=1000 + i) for i in range(500)]
    stepped, out = on(device, weights), on(device, [w.half() for w in weights])
    norms = sgd_step_(stepped, on(device, grads), lr=LR, out=out)
    assert_close(stepped, [w.double() - LR * g.double() for w, g in zip(weights, grads, strict=True)])
    assert same_bits(out, [w.half() for w in stepped])
    torch.testing.assert_close(norms.cpu(), norms_of(stepped), rtol=1e-12, atol=0)


def test_the_same_bits_every_time_and_from_any_number_of_threads():
    lists, options = Lists("large"), SGD_VARIANTS["everything"]
    first: tuple[list[Tensor], Tensor, Tensor] | None = None
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            arguments = lists.arguments("cpu", options)
            norms, total = sgd_step_(**arguments), total_norm(arguments["grads"])
            first = first or (arguments["weights"], norms, total)
            assert same_bits([*arguments["weights"], norms, total], [*first[0], *first[1:]])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 31, 1023, 1025])
@pytest.mark.parametrize("offset", [0, 1])
def test_nothing_is_written_outside(target, size, offset):
    device, _ = target
    memory = [torch.full((size + 64,), float("nan"), dtype=t) for t in (*[torch.float32] * 3, torch.float16)]
    lists = [row.to(device) for row in memory]
    inside = slice(32 + offset, 32 + offset + size)
    for row in lists:
        row[inside] = 1.0
    weight, buffer, average, out = (row[inside] for row in lists)
    grad = torch.ones(size, device=device)
    sgd_step_([weight], [grad], [buffer], lr=LR, momentum=0.5, averages=[average], average_weight=0.5, out=[out])
    for row in lists:
        assert row[: inside.start].isnan().all()
        assert row[inside.stop :].isnan().all()
        assert not row[inside].isnan().any()


@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=4).map(tuple), min_size=1, max_size=5),
    grad=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    nesterov=st.booleans(),
    decay=st.sampled_from([0.0, 0.01]),
    average_weight=st.sampled_from([None, 0.0, 0.01, 1.0]),
    scale=st.sampled_from([1.0, 0.3, 65536.0]),
    max_norm=st.sampled_from([None, 0.0, 0.1, 1e6]),
    transposed=st.booleans(),
    backend=st.sampled_from(["reference", "cpp"]),
    seed=st.integers(0, 1000),
)
def test_any_step(
    shapes,
    grad,
    out,
    momentum,
    nesterov,
    decay,
    average_weight,
    scale,
    max_norm,
    transposed,
    backend,
    seed,
):
    def lay(tensor: Tensor) -> Tensor:
        return LAYOUTS[1].lay(tensor) if transposed else tensor.clone()

    weights, buffers, averages = ([randn(s, seed=seed + i) for s in shapes] for i in range(3))
    grads = [randn(s, grad, seed + 3) for s in shapes]
    copies = [randn(s, out, seed + 4) for s in shapes]
    norm = total_norm(grads)
    options: dict[str, Any] = {"lr": LR, "momentum": momentum, "nesterov": nesterov and momentum > 0}
    options |= {"weight_decay": decay, "max_norm": max_norm}
    exact = sgd_fp64(
        weights,
        grads,
        buffers,
        averages,
        **options,
        grad_scale=scale,
        grad_norm=float(norm),
        average_weight=average_weight or 0.0,
    )
    w, b, a, o = ([lay(t) for t in tensors] for tensors in (weights, buffers, averages, copies))
    averaged = {} if average_weight is None else {"averages": a, "average_weight": average_weight}
    with use_backend(backend):
        norms = sgd_step_(
            w,
            grads,
            b if momentum else None,
            out=o,
            grad_scale=torch.tensor(scale),
            grad_norm=norm,
            **options,
            **averaged,
        )
    for result, expected, used in ((w, exact[0], True), (b, exact[1], momentum), (a, exact[2], averaged)):
        if used:
            for r, e in zip(result, expected, strict=True):
                torch.testing.assert_close(r.double(), e, rtol=1e-6, atol=1e-6)
    assert same_bits(o, [t.to(out) for t in w])
    torch.testing.assert_close(norms, norms_of(w), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", list(SGD_VARIANTS))
def test_weights_of_other_dtypes_by_the_reference(dtype, variant):
    lists, options = Lists("primes"), SGD_VARIANTS[variant]
    for name in ("weights", "buffers", "averages"):
        setattr(lists, name, [t.to(dtype) for t in getattr(lists, name)])
    lists.out = [t.double() for t in lists.out]
    arguments = lists.arguments("cpu", options)
    norms = sgd_step_(**arguments)
    weights, _, averages = lists.exact(options)
    tolerance = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    for result, exact in ((arguments["weights"], weights), (arguments.get("averages", []), averages)):
        for r, e in zip(result, exact, strict=bool(result) and result is arguments["weights"]):
            torch.testing.assert_close(r.double(), e, rtol=tolerance, atol=tolerance)
    # the copy and the norms are those of the weights as they are stored
    assert same_bits(arguments["out"], [w.double() for w in arguments["weights"]])
    torch.testing.assert_close(norms, norms_of(arguments["weights"]), rtol=1e-12, atol=0)
    with use_backend("cpp"), pytest.raises(ValueError, match="is served by the reference alone"):
        sgd_step_(**lists.arguments("cpu", options))


# ---- the norm over all tensors


@pytest.mark.parametrize("shapes", list(SHAPES))
def test_total_norm_of_mixed_dtypes(target, shapes):
    device, _ = target
    tensors = [randn(shape, DTYPES[i % 3], seed=i) for i, shape in enumerate(SHAPES[shapes] * 3)]
    norm = total_norm(on(device, tensors))
    assert norm.dtype == torch.float64
    assert norm.shape == ()
    torch.testing.assert_close(norm.cpu(), norms_of(tensors).norm(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_total_norm_is_not_finite_where_an_element_is_not(target, bad, dtype):
    device, _ = target
    tensors = on(device, [randn((33,)), randn((70000,), dtype), torch.zeros(3)])
    tensors[1][69_999] = bad
    assert not total_norm(tensors).isfinite()
    tensors[1][69_999] = 0
    assert total_norm(tensors).isfinite()


def test_total_norm_of_any_tensor(target):
    """The ends of fp32's range, gaps in memory, repeated elements, fp64."""
    device, backend = target
    wide = torch.tensor([3e38, -3e38, 1e-45], device=device)
    torch.testing.assert_close(total_norm([wide]).cpu(), wide.double().norm().cpu(), rtol=1e-12, atol=0)
    views = [randn((6, 8)).to(device)[:, ::2], randn((1,)).to(device).expand(5)]
    torch.testing.assert_close(total_norm(views).cpu(), norms_of(views).norm(), rtol=1e-12, atol=0)
    with use_backend(None):
        mixed = [wide, torch.full((2,), 1e100, dtype=torch.float64, device=device)]
        assert float(total_norm(mixed)) == pytest.approx(math.sqrt(2) * 1e100)
    assert backend


# ---- norms that the step hands to the perturbation


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("shapes", list(SHAPES))
@pytest.mark.parametrize("bound", [None, 0.01], ids=["free", "bounded"])
def test_perturbation_by_known_norms(target, scope, shapes, bound):
    device, _ = target
    weights, grads = weights_and_grads(shapes, torch.float32)
    exact, exact_scales = perturbed_fp64(weights, grads, 0.01, scope, bound=bound)
    options = {"scope": scope, "bound": bound, "weight_norms": norms_of(weights).to(device)}
    moved, saved = on(device, weights), [torch.full_like(w, float("nan")) for w in on(device, weights)]
    scales = perturb_(moved, on(device, grads), 0.01, saved=saved, **options)
    torch.testing.assert_close(scales.cpu().double(), exact_scales, rtol=1e-7, atol=0)
    for m, e in zip(moved, exact, strict=True):
        torch.testing.assert_close(m.double().cpu(), e, rtol=4e-7, atol=1e-8)
    out = [torch.full_like(w, float("nan"), dtype=torch.float16) for w in saved]
    perturb_into_(out, saved, on(device, grads), 0.01, **options)
    assert same_bits(out, [m.half() for m in moved])
    restore_(moved, saved)
    assert same_bits(moved, weights)


def test_known_norms_are_used(target):
    device, _ = target
    w, g = torch.tensor([3.0, 4.0], device=device), torch.tensor([0.0, 2.0], device=device)
    norms = torch.tensor([50.0], dtype=torch.float64, device=device)
    for scope in ("layer", "global"):
        out = torch.empty_like(w)
        assert float(perturb_into_([out], [w], [g], 0.1, scope=scope, weight_norms=norms)) == 2.5
        assert out.tolist() == [3.0, 9.0]


def test_more_known_norms_than_a_launch_names(target):
    device, _ = target
    weights = [randn((1 + i % 5, 3), seed=i) for i in range(400)]
    grads = [randn((1 + i % 5, 3), seed=1000 + i) for i in range(400)]
    for scope in ("layer", "global"):
        exact, _ = perturbed_fp64(weights, grads, 0.01, scope)
        moved = on(device, weights)
        perturb_(moved, on(device, grads), 0.01, scope=scope, weight_norms=norms_of(weights).to(device))
        for m, e in zip(moved, exact, strict=True):
            torch.testing.assert_close(m.double().cpu(), e, rtol=1e-6, atol=1e-7)


def test_a_working_copy_takes_the_perturbation_and_costs_no_restore(target):
    """AWP on a quadratic loss: perturb the copy, step the weights, against weights that are moved and restored."""
    device, _ = target
    weights = on(device, [randn((16, 8), seed=1), randn((8,), seed=2)])
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    plain, copies = [nn.Parameter(w.clone()) for w in weights], [w.clone() for w in weights]
    optimizer = torch.optim.SGD(plain, **options)
    buffers, norms = [torch.zeros_like(w) for w in weights], norms_of(weights).to(device)
    for _ in range(5):
        # the loss is |w|^2: its gradient at any w is 2 w
        perturb_into_(copies, weights, [2 * w for w in weights], 0.1, weight_norms=norms)
        norms = sgd_step_(weights, [2 * c for c in copies], buffers, out=copies, **options)
        start = [p.detach().clone() for p in plain]
        perturb_([p.data for p in plain], [2 * s for s in start], 0.1)
        for p, s in zip(plain, start, strict=True):
            p.grad = 2 * p.detach()
            p.data.copy_(s)
        optimizer.step()
    for w, p, c in zip(weights, plain, copies, strict=True):
        torch.testing.assert_close(w, p.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(c, w)


# ---- what is refused


def w(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(shape, dtype)


SHARED = torch.zeros(10)
FP64 = torch.float64
BAD_CALLS = {
    "empty": (lambda: sgd_step_([], [], lr=0.1), "weights: expected at least one tensor, got an empty list"),
    "grads": (lambda: sgd_step_([w(3), w(4)], [w(3)], lr=0.1), "grads: expected 2 tensors like weights, got 1"),
    "grad shape": (
        lambda: sgd_step_([w(3)], [w(4)], lr=0.1),
        "grads[0]: expected shape (3,) like weights[0], got (4,)",
    ),
    "grad device": (
        lambda: sgd_step_([w(3)], [torch.zeros(3, device="meta")], lr=0.1),
        "grads[0]: expected device cpu like weights[0], got meta",
    ),
    "grad sparse": (
        lambda: sgd_step_([w(3)], [w(3).to_sparse()], lr=0.1),
        "grads[0]: expected a strided tensor, got layout torch.sparse_coo",
    ),
    "grad dtypes": (
        lambda: sgd_step_([w(3), w(3)], [w(3), w(3).half()], lr=0.1),
        "grads[1]: expected torch.float32 like grads[0], got torch.float16",
    ),
    "weight dtype": (
        lambda: sgd_step_([torch.ones(3, dtype=torch.int64)], [w(3)], lr=0.1),
        "weights[0]: expected float64, float32, float16 or bfloat16, got torch.int64",
    ),
    "weight strides": (
        lambda: sgd_step_([w(4, 6)[:, ::2]], [w(4, 3)], lr=0.1),
        "weights[0]: expected elements that fill one block of memory",
    ),
    "buffers": (
        lambda: sgd_step_([w(3), w(4)], [w(3), w(4)], [w(3)], lr=0.1, momentum=0.9),
        "momentum_buffers: expected 2 tensors like weights, got 1",
    ),
    "no buffers": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, momentum=0.9),
        "momentum_buffers: expected 1 tensors like weights for momentum 0.9",
    ),
    "buffers without momentum": (
        lambda: sgd_step_([w(3)], [w(3)], [w(3)], lr=0.1),
        "momentum: expected a number > 0 with momentum_buffers, got 0",
    ),
    "buffer dtype": (
        lambda: sgd_step_([w(3)], [w(3)], [w(3).half()], lr=0.1, momentum=0.9),
        "momentum_buffers[0]: expected torch.float32 like weights, got torch.float16",
    ),
    "buffer strides": (
        lambda: sgd_step_([w(3, 4)], [w(3, 4)], [w(4, 3).t()], lr=0.1, momentum=0.9),
        "momentum_buffers[0]: expected strides (4, 1) like weights[0], got (1, 3)",
    ),
    "momentum": (
        lambda: sgd_step_([w(3)], [w(3)], [w(3)], lr=0.1, momentum=-0.9),
        "momentum: expected a finite number >= 0, got -0.9",
    ),
    "nesterov": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, nesterov=True),
        "nesterov: expected momentum > 0, got momentum 0",
    ),
    "lr": (lambda: sgd_step_([w(3)], [w(3)], lr=float("nan")), "lr: expected a finite number >= 0, got nan"),
    "lr negative": (lambda: sgd_step_([w(3)], [w(3)], lr=-0.1), "lr: expected a finite number >= 0, got -0.1"),
    "lr shape": (
        lambda: sgd_step_([w(3)], [w(3)], lr=w(2)),
        "lr: expected a tensor of one element, got shape (2,)",
    ),
    "lr dtype": (
        lambda: sgd_step_([w(3)], [w(3)], lr=torch.tensor(1)),
        "lr: expected float32 or float64, got torch.int64",
    ),
    "lr device": (
        lambda: sgd_step_([w(3)], [w(3)], lr=torch.zeros((), device="meta")),
        "lr: expected device cpu like weights[0], got meta",
    ),
    "decay": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, weight_decay=-1),
        "weight_decay[0]: expected a finite number >= 0, got -1.0",
    ),
    "decays": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, weight_decay=[0.1, 0.1]),
        "weight_decay: expected a number, or 1 numbers like weights, got 2",
    ),
    "scale dtype": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, grad_scale=torch.tensor(1.0, dtype=FP64)),
        "grad_scale: expected float32, got torch.float64",
    ),
    "found dtype": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, found_inf=torch.tensor(1)),
        "found_inf: expected float32 or bool, got torch.int64",
    ),
    "norm shape": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, grad_norm=w(3)),
        "grad_norm: expected a tensor of one element, got shape (3,)",
    ),
    "clip without norm": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, max_norm=1.0),
        "max_norm: expected grad_norm with it",
    ),
    "clip": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, max_norm=-1.0, grad_norm=torch.tensor(1.0)),
        "max_norm: expected a finite number >= 0, got -1.0",
    ),
    "averages alone": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, averages=[w(3)]),
        "averages: expected average_weight with them",
    ),
    "average weight alone": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, average_weight=0.1),
        "average_weight: expected averages with it, 1 tensors like weights",
    ),
    "average weight": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, averages=[w(3)], average_weight=1.5),
        "average_weight: expected a number in [0, 1], got 1.5",
    ),
    "average dtype": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, averages=[w(3, dtype=FP64)], average_weight=0.5),
        "averages[0]: expected torch.float32 like weights, got torch.float64",
    ),
    "out length": (
        lambda: sgd_step_([w(3)], [w(3)], lr=0.1, out=[w(3), w(3)]),
        "out: expected 1 tensors like weights, got 2",
    ),
    "out is the weight": (lambda: sgd_step_([SHARED], [w(10)], lr=0.1, out=[SHARED]), "shares memory with"),
    "buffer is the gradient": (
        lambda: sgd_step_([w(10)], [SHARED], [SHARED], lr=0.1, momentum=0.9),
        "shares memory with",
    ),
    "lr is a weight": (lambda: sgd_step_([SHARED], [w(10)], lr=SHARED[3]), "shares memory with"),
    "the same weight twice": (
        lambda: sgd_step_([SHARED, SHARED], [w(10), w(10)], lr=0.1),
        "weights[1]: shares memory with weights[0]",
    ),
    "norm of nothing": (lambda: total_norm([]), "tensors: expected at least one tensor, got an empty list"),
    "norm of integers": (
        lambda: total_norm([w(3), torch.ones(3, dtype=torch.int32)]),
        "tensors[1]: expected float64, float32, float16 or bfloat16, got torch.int32",
    ),
    "norm over devices": (
        lambda: total_norm([w(3), torch.zeros(3, device="meta")]),
        "tensors[1]: expected device cpu like tensors[0], got meta",
    ),
    "known norms, filters": (
        lambda: perturb_([w(3)], [w(3)], 0.1, scope="filter", weight_norms=w(1, dtype=FP64)),
        "weight_norms: scale 'relative' with scope 'layer' or 'global' alone takes them, "
        "got scale 'relative' with scope 'filter'",
    ),
    "known norms, absolute": (
        lambda: perturb_into_([w(3)], [w(3)], [w(3)], 0.1, scale="absolute", weight_norms=w(1, dtype=FP64)),
        "weight_norms: scale 'relative' with scope 'layer' or 'global' alone takes them, "
        "got scale 'absolute' with scope 'layer'",
    ),
    "known norms, dtype": (
        lambda: perturb_([w(3)], [w(3)], 0.1, weight_norms=w(1)),
        "weight_norms: expected contiguous float64 of shape (1,) like weights, got torch.float32 of shape (1,)",
    ),
    "known norms, shape": (
        lambda: perturb_([w(3)], [w(3)], 0.1, weight_norms=w(2, dtype=FP64)),
        "weight_norms: expected contiguous float64 of shape (1,) like weights, got torch.float64 of shape (2,)",
    ),
    "known norms, device": (
        lambda: perturb_([w(3)], [w(3)], 0.1, weight_norms=torch.zeros(1, dtype=FP64, device="meta")),
        "weight_norms: expected device cpu like weights[0], got meta",
    ),
    "optimizer lr": (lambda: SGD([nn.Parameter(w(3))], lr=-1.0), "lr: expected a finite number >= 0, got -1.0"),
    "optimizer lr shape": (
        lambda: SGD([nn.Parameter(w(3))], lr=w(2)),
        "lr: expected a tensor of one element, got shape (2,)",
    ),
    "optimizer dampening": (
        lambda: SGD([nn.Parameter(w(3))], lr=0.1, momentum=0.9, dampening=0.1),
        "dampening: 0 alone is served, got 0.1; use torch.optim.SGD",
    ),
    "optimizer maximize": (
        lambda: SGD([nn.Parameter(w(3))], lr=0.1, maximize=True),
        "maximize: False alone is served, got True",
    ),
    "optimizer group": (
        lambda: SGD([{"params": [nn.Parameter(w(3))], "nesterov": True}], lr=0.1),
        "nesterov: expected momentum > 0, got momentum 0",
    ),
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_bad_arguments_are_named_in_one_line(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not SHARED.any()


def test_compiles_without_graph_breaks():
    def step(weight, grad, buffer, average, lr):
        stepped = weight * 1.0
        norm = total_norm([grad])
        out = torch.empty_like(stepped, dtype=torch.bfloat16)
        norms = sgd_step_(
            [stepped],
            [grad],
            [buffer],
            lr=lr,
            momentum=0.9,
            weight_decay=[0.1],
            grad_norm=norm,
            max_norm=0.5,
            averages=[average],
            average_weight=0.1,
            out=[out],
        )
        moved = torch.empty_like(stepped)
        perturb_into_([moved], [stepped], [grad], 0.1, weight_norms=norms)
        return stepped, out, norms, moved

    inputs = [w(5, 4), w(5, 4), torch.zeros(5, 4), w(5, 4), torch.tensor(0.1)]
    others = [t.clone() for t in inputs]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*inputs), step(*others), strict=True):
        assert torch.equal(a, b)
    # what the step writes is seen outside of it
    assert same_bits(inputs, others)
    assert inputs[2].any()


# ---- the optimizer


def model(seed: int = 0) -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))
    with torch.no_grad():
        for i, parameter in enumerate(layers.parameters()):
            parameter.copy_(randn(tuple(parameter.shape), seed=seed + i, scale=0.3))
    return layers


def loss(network: nn.Module, step: int) -> Tensor:
    x, y = randn((8, 3, 6, 6), seed=1000 + step), torch.arange(8) % 5
    return nn.functional.cross_entropy(network(x), y)


def groups(network: nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in network.parameters() if p.ndim > 1]
    return [
        {"params": decayed, "weight_decay": 0.01},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(network, step).backward()
        optimizer.step()


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-5, atol=2e-6, msg=name)


OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "tensor lr": {"momentum": 0.9, "lr": torch.tensor(LR)},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_optimizer_follows_torchs(name):
    options = {"lr": LR} | OPTIONS[name]
    ours, torchs = model(), model()
    a, b = SGD(groups(ours), **options), torch.optim.SGD(groups(torchs), foreach=False, **options)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5) for optimizer in (a, b)]
    for step in range(10):
        train(ours, a, range(step, step + 1))
        train(torchs, b, range(step, step + 1))
        for schedule in schedules:
            schedule.step()
    assert_same_model(ours, torchs)


@pytest.mark.parametrize("name", ["plain", "nesterov"])
@pytest.mark.parametrize("to_torch", [True, False], ids=["to torch", "from torch"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "loop"])
def test_state_dictionaries_go_both_ways(name, to_torch, fused):
    options = {"lr": LR} | OPTIONS[name]

    def build(network: nn.Module, own: bool) -> torch.optim.Optimizer:
        return SGD(groups(network), **options) if own else torch.optim.SGD(groups(network), fused=fused, **options)

    whole, first = model(), model()
    train(whole, build(whole, False), range(6))
    start = build(first, to_torch)
    train(first, start, range(3))
    stored = io.BytesIO()
    torch.save([start.state_dict(), first.state_dict()], stored)
    stored.seek(0)
    optimizer_state, model_state = torch.load(stored, weights_only=True)
    second = model(50)
    second.load_state_dict(model_state)
    goes_on = build(second, not to_torch)
    goes_on.load_state_dict(optimizer_state)
    other = build(model(), not to_torch).state_dict()
    assert goes_on.state_dict()["param_groups"][0].keys() == other["param_groups"][0].keys()
    train(second, goes_on, range(3, 6))
    assert_same_model(second, whole)
    if options.get("momentum"):
        assert {frozenset(state) for state in goes_on.state_dict()["state"].values()} == {
            frozenset({"momentum_buffer"})
        }


def test_state_of_what_is_not_served_is_refused():
    torchs, ours = model(), SGD(model().parameters(), lr=LR)
    state = torch.optim.SGD(torchs.parameters(), lr=LR, momentum=0.9, dampening=0.5).state_dict()
    with pytest.raises(ValueError, match="dampening: 0 alone is served"):
        ours.load_state_dict(state)
    assert ours.param_groups[0]["dampening"] == 0


def test_copies_go_on_alike():
    network = model()
    optimizer = SGD(network.parameters(), lr=LR, momentum=0.9)
    train(network, optimizer, range(3))
    twin, twin_optimizer = copy.deepcopy((network, optimizer))
    train(network, optimizer, range(3, 5))
    train(twin, twin_optimizer, range(3, 5))
    assert same_bits(list(network.parameters()), list(twin.parameters()))
    stored = io.BytesIO()
    torch.save(optimizer, stored)
    stored.seek(0)
    # written by this test a line above
    loaded = torch.load(stored, weights_only=False)
    assert type(loaded) is SGD
    assert same_bits([p.detach() for p in loaded.param_groups[0]["params"]], [p.detach() for p in network.parameters()])
    assert repr(loaded) == repr(optimizer)


def test_buffers_in_another_memory_order_are_followed():
    """torch's momentum has the order of the first gradient."""
    ours, torchs = (model().to(memory_format=torch.channels_last) for _ in range(2))
    theirs = torch.optim.SGD(torchs.parameters(), lr=LR, momentum=0.9, foreach=False)
    train(torchs, theirs, range(2))
    state = copy.deepcopy(theirs.state_dict())
    state["state"][0]["momentum_buffer"] = state["state"][0]["momentum_buffer"].contiguous()
    ours.load_state_dict(torchs.state_dict())
    optimizer = SGD(ours.parameters(), lr=LR, momentum=0.9)
    optimizer.load_state_dict(state)
    train(ours, optimizer, range(2, 4))
    train(torchs, theirs, range(2, 4))
    assert_same_model(ours, torchs)


def test_parameters_without_gradients_are_left_alone():
    first, unused, last = nn.Parameter(w(3)), nn.Parameter(w(4)), nn.Parameter(w(5))
    before = unused.detach().clone()
    optimizer = SGD([first, unused, last], lr=LR, momentum=0.9, weight_decay=0.1)
    assert optimizer.step() is None
    first.grad, last.grad = torch.ones(3), torch.ones(5)
    optimizer.step()
    assert torch.equal(unused, before)
    assert list(optimizer.state) == [first, last]


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="params: sparse gradients are not served"):
        SGD(table.parameters(), lr=LR).step()


def test_closure():
    parameter = nn.Parameter(torch.tensor([2.0]))
    optimizer = SGD([parameter], lr=0.25)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = parameter.square().sum()
        value.backward()
        return value

    assert optimizer.step(closure) == 4.0
    assert parameter.tolist() == [1.0]


class Calls(TorchDispatchMode):
    """Counts the fused steps, and whatever reads a number back to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.reads = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.steps += func is torch.ops.awp.sgd_step_.default
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_groups_that_differ_in_decay_share_a_call():
    network = model()
    optimizer = SGD(groups(network), lr=torch.tensor(LR), momentum=0.9)
    loss(network, 0).backward()
    with Calls() as calls:
        optimizer.step()
    assert (calls.steps, calls.reads) == (1, 0)
    optimizer.param_groups[0]["momentum"] = 0.5
    with Calls() as calls:
        optimizer.step()
    assert (calls.steps, calls.reads) == (2, 0)


@pytest.mark.parametrize("unscale", [False, True], ids=["fused", "unscaled before"])
def test_grad_scaler(unscale):
    """The first step is infinite, and one in between."""
    ours, torchs = model(), model()
    pairs = [
        (ours, SGD(ours.parameters(), lr=LR, momentum=0.9)),
        (torchs, torch.optim.SGD(torchs.parameters(), lr=LR, momentum=0.9, foreach=False)),
    ]
    for network, optimizer in pairs:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for step in range(7):
            optimizer.zero_grad()
            scaler.scale(loss(network, step)).backward()
            if step in (0, 4):
                next(network.parameters()).grad[0, 0] = float("inf")
            before = [p.detach().clone() for p in network.parameters()]
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            assert same_bits([p.detach() for p in network.parameters()], before) == (step in (0, 4))
        assert scaler.get_scale() < 2.0**11
    assert not hasattr(pairs[0][1], "grad_scale")
    assert_same_model(ours, torchs)
    buffers = [state["momentum_buffer"] for state in pairs[0][1].state.values()]
    assert all(buffer.isfinite().all() for buffer in buffers)


def test_grad_scaler_is_refused_where_it_cannot_see_the_gradients():
    """Those of working copies; where a copy only takes the weights, an overflow is seen as ever."""
    masters, copied = model(), copy.deepcopy(model()).half()
    working = dict(zip(masters.parameters(), copied.parameters(), strict=True))
    optimizer, scaler = SGD(masters.parameters(), lr=LR, working=working), torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in masters.parameters()]
    for overflow in (True, False):
        optimizer.zero_grad()
        scaler.scale(loss(masters, 0)).backward()
        if overflow:
            next(masters.parameters()).grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert same_bits([p.detach() for p in masters.parameters()], before) == overflow
    assert same_bits([p.detach() for p in copied.parameters()], [p.detach().half() for p in masters.parameters()])
    next(copied.parameters()).grad = torch.full_like(next(copied.parameters()), float("inf"))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"^working: GradScaler looks at the parameters' own gradients"):
        scaler.step(optimizer)


def test_what_a_step_is_told_holds_for_that_step():
    """Nothing of it stays with the optimizer; beside GradScaler, clipping is told and the rest refused."""
    network = model()
    optimizer, scaler = SGD(network.parameters(), lr=LR), torch.amp.GradScaler("cpu", init_scale=4.0)
    weights = [p.detach() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.full_like(p, 4.0)
    arguments = {"grad_scale": torch.tensor(4.0), "found_inf": torch.tensor(0.0), "grad_norm": torch.tensor(8.0)}
    for options, moved in (
        (arguments | {"max_norm": 1.0}, 0.5),
        ({}, 4.0),
        ({"grad_norm": torch.tensor(float("inf"))}, 0.0),
        ({"found_inf": torch.tensor(True)}, 0.0),
    ):
        before = [w.clone() for w in weights]
        optimizer.step(**options)
        for w, old in zip(weights, before, strict=True):
            torch.testing.assert_close(w, old - LR * moved)
    scaler.scale(torch.zeros(()))
    before = [w.clone() for w in weights]
    scaler.step(optimizer, grad_norm=torch.tensor(8.0), max_norm=1.0)
    scaler.update()
    for w, old in zip(weights, before, strict=True):
        torch.testing.assert_close(w, old - LR * 0.5)
    for name in ("grad_scale", "found_inf"):
        with pytest.raises(ValueError, match=rf"^{name}: expected none beside GradScaler"):
            scaler.step(optimizer, **{name: torch.tensor(1.0)})
        del optimizer.grad_scale, optimizer.found_inf
        scaler.update()


@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", [1e39, 10**400, "0.1"])
def test_numbers_that_float32_does_not_hold_are_named(option, value):
    with pytest.raises(ValueError, match=rf"^{option}: expected (a finite number >= 0|at most 3\.40282e\+38), got"):
        SGD([nn.Parameter(torch.zeros(3))], **{option: value})


def test_groups_follow_their_own_rate_tensors():
    """Rates on the device, as captured graphs read them: what is alike in all else is still not one call."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    rates = [torch.tensor(0.1), torch.tensor(0.01)]
    optimizer = SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, rates, strict=True)], lr=1.0)
    for p in parameters:
        p.grad = torch.ones(3)
    optimizer.step()
    for p, lr in zip(parameters, rates, strict=True):
        torch.testing.assert_close(p.detach(), 1 - lr.expand(3))


def test_momentum_goes_along_when_a_model_changes_precision():
    """As under torch.optim.SGD, whose buffers stay what they were."""
    ours, torchs = nn.Linear(4, 3), nn.Linear(4, 3)
    torchs.load_state_dict(ours.state_dict())
    pairs = [
        (ours, SGD(ours.parameters(), lr=LR, momentum=0.9)),
        (torchs, torch.optim.SGD(torchs.parameters(), lr=LR, momentum=0.9)),
    ]
    for model, optimizer in pairs:
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            optimizer.zero_grad()
            model(randn((5, 4), dtype)).square().sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert p.dtype == torch.float64
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)

"""conv3x3 against torch's convolution in fp64."""

import functools
import gc
import itertools
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from awp_kernels import (
    conv3x3,
    conv3x3_available,
    conv3x3_forget,
    conv3x3_held_bytes,
    perturb_,
    restore_,
    use_backend,
)
from awp_kernels._images import operations
from awp_kernels.conv import _weights

pytestmark = [
    pytest.mark.skipif(operations() is None, reason="needs AVX2 with FMA"),
    pytest.mark.usefixtures("poisoned_memory"),
]

NEEDS_BF16 = pytest.mark.skipif(
    operations() is None or not _weights.multiplies_bf16(operations()), reason="needs AVX-512 with bf16"
)

# of the largest value of the result; torch's own direct convolution stays below 2e-6 on the same samples
FP32_BOUND = 2e-5

# (N, C, K, H, W): tiles cut at every edge, tails of vectors and panels, few and many tiles, weights read once
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 3, 5, 1, 7),
    (2, 16, 32, 8, 8),
    (3, 17, 3, 5, 6),
    (2, 5, 17, 9, 4),
    (1, 33, 40, 3, 2),
    (4, 64, 64, 16, 16),
    (70, 24, 16, 4, 4),
    (9, 20, 21, 32, 30),
    (2, 272, 320, 5, 4),
]


def randn(*shape: int, dtype=torch.float32, seed=0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def samples(n, c, k, h, w, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, and the gradient with respect to the output."""
    x = randn(n, c, h, w, dtype=dtype).to(memory_format=torch.channels_last)
    return x, randn(k, c, 3, 3, dtype=dtype, seed=1), randn(n, k, h, w, dtype=dtype, seed=2)


def results(function, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and both gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return functional.conv2d(x, weight, padding=1)


def exact(x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    return results(plain, x.double(), weight.double(), grad.double())


def error(result: Tensor, reference: Tensor) -> float:
    """Largest difference, over the largest value."""
    return float((result.double() - reference).detach().abs().max() / reference.detach().abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradients_against_fp64(shape):
    x, weight, grad = samples(*shape)
    assert conv3x3_available(x, weight)
    for name, ours, reference in zip(
        ("y", "x", "weight"), results(conv3x3, x, weight, grad), exact(x, weight, grad), strict=True
    ):
        assert ours.shape == reference.shape
        assert error(ours, reference) <= FP32_BOUND, name


def test_error_is_within_four_times_torchs_own():
    """Root mean square over a layer of PreActResNet-18; the measured factor is 2.4."""
    x, weight, grad = samples(8, 64, 64, 16, 16)
    x = x.relu()
    reference = exact(x, weight, grad)
    for ours, torchs, fp64 in zip(
        results(conv3x3, x, weight, grad), results(plain, x, weight, grad), reference, strict=True
    ):
        assert (ours.double() - fp64).norm() <= 4 * (torchs.double() - fp64).norm() + 2e-7 * fp64.norm()


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(1, 13), st.integers(1, 13)),
    st.booleans(),
)
@settings(max_examples=25)
def test_any_shape(shape, channels_last):
    x, weight, grad = samples(*shape)
    if channels_last:
        weight, grad = (t.to(memory_format=torch.channels_last) for t in (weight, grad))
    else:
        x = x.contiguous()
    for ours, reference in zip(results(conv3x3, x, weight, grad), exact(x, weight, grad), strict=True):
        assert error(ours, reference) <= FP32_BOUND


@pytest.mark.parametrize("shape", [(2, 16, 32, 8, 8), (3, 17, 3, 5, 6)], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bf16_is_the_fp32_result_rounded_once(shape, weight_dtype):
    x, weight, grad = samples(*shape, dtype=torch.bfloat16)
    weight = weight.to(weight_dtype)
    ours = results(conv3x3, x, weight, grad)
    fp32 = results(conv3x3, x.float(), weight.float(), grad.float())
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.bfloat16, weight_dtype]
    for low, high in zip(ours, fp32, strict=True):
        assert torch.equal(low, high.to(low.dtype))


def _by_points(matrix: list[list[float]], t: Tensor) -> Tensor:
    """A transform of both of the last two dimensions."""
    rows = torch.tensor(matrix, dtype=torch.float64)
    return rows @ t @ rows.T


def rounded_winograd(x: Tensor, weight: Tensor) -> Tensor:
    """F(4x4, 3x3) of the points 0, +-3/4, +-3/2 in fp64, but for what is multiplied, which is rounded to bf16."""
    a, b = 0.75, 1.5
    powers = [[p**i for i in range(5)] for p in (a, -a, b, -b)]
    of_output = [[1, *(row[i] for row in powers), float(i == 3)] for i in range(4)]
    of_output[1][0] = of_output[2][0] = of_output[3][0] = 0
    others = [(b, a), (b, -a), (a, b), (a, -b)]  # t (t + p) (t^2 - q^2), what vanishes at all points but p
    of_input = [[a**2 * b**2, 0, -(a**2 + b**2), 0, 1, 0]]
    of_input += [[0, -p * q**2, -(q**2), p, 1, 0] for q, p in others]
    of_input += [[0, a**2 * b**2, 0, -(a**2 + b**2), 0, 1]]
    norms = [2 * p**2 * (p**2 - q**2) for q, p in others]
    of_weight = [[1 / (a * b) ** 2, 0, 0]]
    of_weight += [[p**i / norm for i in range(3)] for (_, p), norm in zip(others, norms, strict=True)]
    of_weight += [[0, 0, 1]]

    samples, _, height, width = x.shape
    high, wide = -(-height // 4), -(-width // 4)
    padded = functional.pad(x.double(), (1, 1 + 4 * wide - width, 1, 1 + 4 * high - height))
    tiles = padded.unfold(2, 6, 4).unfold(3, 6, 4)
    v = _by_points(of_input, tiles).bfloat16().double()
    u = _by_points(of_weight, weight.double()).bfloat16().double()
    y = _by_points(of_output, torch.einsum("kcij,nchwij->nkhwij", u, v))
    return y.transpose(3, 4).reshape(samples, len(weight), 4 * high, 4 * wide)[:, :, :height, :width]


@NEEDS_BF16
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_products_are_those_of_rounded_transforms(shape, dtype):
    x, weight, grad = samples(*shape, dtype=dtype)
    y, grad_x, grad_weight = results(functools.partial(conv3x3, products="bf16"), x, weight, grad)
    turned = weight.flip(2, 3).transpose(0, 1)
    storage = 0 if dtype == torch.float32 else 2**-8
    for found, defined in ((y, rounded_winograd(x, weight)), (grad_x, rounded_winograd(grad, turned))):
        # one in some thousand transforms, computed in fp32, is rounded to the other side
        assert (found - defined).norm() <= (1e-3 + storage) * defined.norm()
    assert torch.equal(grad_weight, results(conv3x3, x, weight, grad)[2])


@NEEDS_BF16
def test_bf16_products_cost_one_per_cent():
    x, weight, grad = samples(8, 64, 64, 16, 16)
    reference = exact(x.relu(), weight, grad)
    for found, fp64 in zip(
        results(functools.partial(conv3x3, products="bf16"), x.relu(), weight, grad)[:2], reference, strict=False
    ):
        assert 5e-3 < (found - fp64).norm() / fp64.norm() < 1.5e-2


@NEEDS_BF16
def test_frozen_weights_serve_both_kinds_of_products():
    x, weight, _ = samples(2, 20, 20, 8, 8)
    reference = plain(x.double(), weight.double())
    for _ in range(2):
        assert error(conv3x3(x, weight), reference) <= FP32_BOUND
        assert 1e-3 < error(conv3x3(x, weight, products="bf16"), reference) < 3e-2


def test_without_bf16_instructions_products_are_fp32(tmp_path):
    code = """if True:
        import torch
        from awp_kernels import conv3x3
        x, weight = torch.randn(2, 20, 8, 8), torch.randn(20, 20, 3, 3)
        assert torch.equal(conv3x3(x, weight, products="bf16"), conv3x3(x, weight))
    """
    for limit in ("avx512", "avx2"):
        environment = os.environ | {"AWP_CPU": limit, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


@pytest.mark.parametrize("products", ["fp32", pytest.param("bf16", marks=NEEDS_BF16)])
@pytest.mark.parametrize("shape", [(4, 64, 64, 16, 16), (9, 20, 21, 32, 30), (2, 272, 320, 5, 4)], ids=str)
def test_threads_do_not_change_a_bit(shape, products):
    arguments = samples(*shape)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            conv3x3_forget()
            found.append(results(functools.partial(conv3x3, products=products), *arguments))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_sample_does_not_depend_on_its_neighbours():
    x, weight, _ = samples(7, 20, 20, 6, 6)
    assert torch.equal(conv3x3(x, weight)[2:3], conv3x3(x[2:3], weight))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    x, weight, grad = samples(2, 8, 8, 12, 12)
    x[1, 3, 6, 6] = value
    y, _, grad_weight = results(conv3x3, x, weight, grad)
    assert not y[1, :, 5:8, 5:8].isfinite().any()
    assert y[0].isfinite().all()
    assert not grad_weight[:, 3].isfinite().any()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
def test_only_the_gradients_that_were_asked_for(wanted, monkeypatch):
    import awp_kernels.conv as module

    made = []
    for name in ("_grad_x", "_grad_weight"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name: (made.append(n), f(*a))[1])
    expected = [name for name, want in zip(("_grad_x", "_grad_weight"), wanted, strict=True) if want]
    x, weight, grad = samples(2, 5, 6, 7, 7)
    reference = exact(x, weight, grad)[1:]

    # by what requires a gradient
    inputs = [x.detach().requires_grad_(wanted[0]), weight.detach().requires_grad_(wanted[1])]
    conv3x3(*inputs).backward(grad)
    assert made == expected
    assert [t.grad is not None for t in inputs] == list(wanted)

    # and by what torch.autograd.grad is asked for, as an attack does
    made.clear()
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    asked = [(t, r) for t, r, want in zip((x, weight), reference, wanted, strict=True) if want]
    found = torch.autograd.grad(conv3x3(x * 1, weight), [t for t, _ in asked], grad)
    assert made == expected
    assert all(error(f, r) <= FP32_BOUND for f, (_, r) in zip(found, asked, strict=True))


def test_without_gradients_nothing_is_saved():
    x, weight, _ = samples(1, 4, 4, 4, 4)
    weight.requires_grad_()
    with torch.no_grad():
        assert conv3x3(x, weight).grad_fn is None
    with torch.inference_mode():
        assert error(conv3x3(x, weight), plain(x.double(), weight.double())) <= FP32_BOUND
    # the gradient for x alone does not keep x
    y = conv3x3(x.detach().requires_grad_(), weight.detach())
    assert y.grad_fn.saved_tensors[0] is None


def test_weights_changed_between_the_passes_are_refused_as_torch_does():
    x, weight, grad = samples(1, 4, 4, 4, 4)
    weight.requires_grad_()
    y = conv3x3(x.requires_grad_(), weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


def _by_optimizer(weight: Tensor, **options) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5, **options).step()


def _by_perturb(weight: Tensor) -> None:
    perturb_([weight], [torch.ones_like(weight)], 0.5)


def _by_restore(weight: Tensor) -> None:
    restore_([weight], [torch.ones_like(weight)])


def _by_another_process(weight: Tensor) -> None:
    """Through shared memory."""
    weight.data.share_memory_()
    process = multiprocessing.get_context("fork").Process(target=weight.data.mul_, args=(2,))
    process.start()
    process.join()
    assert process.exitcode == 0


# none of these moves the version counter
UNCOUNTED = {
    "one element by .data": lambda w: w.data[3, 4, 1, 1].fill_(10),
    "two signs": lambda w: w.data.view(torch.int32)[2:4, 2, 0, 1].bitwise_xor_(-(2**31)),
    "two filters swapped": lambda w: w.data.copy_(w.data[[1, 0, *range(2, len(w))]]),
    "axes swapped": lambda w: setattr(w, "data", w.data.transpose(0, 1)),
    "order in memory": lambda w: setattr(w, "data", w.data.as_strided((8, 8, 3, 3), (72, 1, 24, 8))),
    "shape": lambda w: setattr(w, "data", w.data.flatten()[: 8 * 4 * 9].view(8, 4, 3, 3)),
    "kernel transposed": lambda w: setattr(w, "data", w.data.transpose(2, 3)),
    "another process": _by_another_process,
}
CHANGES = UNCOUNTED | {
    "in place": lambda w: w.mul_(2),
    "one element": lambda w: w[0, 0].fill_(3.0),
    "copy_": lambda w: w.copy_(torch.ones_like(w)),
    "sgd": _by_optimizer,
    "foreach sgd": lambda w: _by_optimizer(w, foreach=True),
    "fused sgd": lambda w: _by_optimizer(w, fused=True),
    "perturb_": _by_perturb,
    "restore_": _by_restore,
    ".data in place": lambda w: w.data.mul_(2),
    ".data assigned": lambda w: setattr(w, "data", w.data * 2),
    "numpy": lambda w: w.detach().numpy().fill(2),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_changed_weights_are_transformed_anew(change, frozen):
    weight = nn.Parameter(randn(8, 8, 3, 3, seed=1), requires_grad=not frozen)
    for _ in range(3):
        outputs, inputs = weight.shape[:2]
        x, grad = randn(2, inputs, 6, 6).requires_grad_(), randn(2, outputs, 6, 6, seed=2)
        y = conv3x3(x, weight)
        (found,) = torch.autograd.grad(y, x, grad)
        reference = plain(x.double(), weight.double())
        assert error(y, reference) <= FP32_BOUND
        assert error(found, torch.autograd.grad(reference, x, grad.double())[0].double()) <= FP32_BOUND
        with torch.no_grad():
            CHANGES[change](weight)


@given(st.sampled_from([torch.float32, torch.bfloat16]), st.tuples(st.integers(1, 70), st.integers(1, 40)), st.data())
@settings(max_examples=100)
def test_the_hash_of_weights_sees_every_bit(dtype, shape, data):
    """In all lanes, parts and tails: one bit, one sign beside another, an exchange of two elements."""
    weight = randn(*shape, 3, 3).to(dtype)
    fingerprint = operations().conv3x3_fingerprint.default
    before, bits = fingerprint(weight), weight.view(torch.int32 if dtype == torch.float32 else torch.int16).flatten()
    where = data.draw(st.lists(st.integers(0, len(bits) - 1), min_size=2, max_size=2))
    bit = data.draw(st.integers(0, bits.element_size() * 8 - 1))
    bits[where[0]] ^= torch.tensor(1, dtype=bits.dtype) << bit
    assert fingerprint(weight) != before
    if where[0] != where[1]:
        bits[where[1]] ^= torch.tensor(1, dtype=bits.dtype) << bit
        assert fingerprint(weight) != before
        bits[where] ^= torch.tensor(1, dtype=bits.dtype) << bit
        assert fingerprint(weight) == before
        bits[where] = bits[where[::-1]]
        assert (fingerprint(weight) == before) == (bits[where[0]] == bits[where[1]]).item()


def test_weights_in_inference_mode_and_views():
    x, weight, _ = samples(2, 8, 12, 6, 6)
    whole = randn(24, 8, 3, 3)
    with torch.inference_mode():
        made = weight.clone()
        conv3x3(x, weight)
    for _ in range(2):
        for w in (made, weight, whole[::2], whole[:, :, :, 0:1].expand(-1, -1, -1, 3)):
            assert error(conv3x3(x, w), plain(x.double(), w.double())) <= FP32_BOUND
            with torch.inference_mode():
                # past the first elements of a view's memory alone
                (whole[-2:] if w.stride(3) == 0 else w.data[-1]).mul_(2)
                assert error(conv3x3(x, w), plain(x.double(), w.double())) <= FP32_BOUND


def test_threads_that_share_weights_see_them_as_they_are():
    x, weight, _ = samples(2, 16, 16, 8, 8)
    with ThreadPoolExecutor(4) as pool:
        for step in range(20):
            weight.data[step % 16, 3, 1, 1] = step
            reference = plain(x.double(), weight.double())
            assert all(error(y, reference) <= FP32_BOUND for y in pool.map(lambda _: conv3x3(x, weight), range(8)))


def test_unchanged_weights_are_not_transformed_again(monkeypatch):
    from awp_kernels.conv import _weights

    count, transform = [], _weights.transform
    monkeypatch.setattr(_weights, "transform", lambda *a: (count.append(1), transform(*a))[1])
    x, weight, grad = samples(1, 8, 8, 4, 4)
    x.requires_grad_()
    for _ in range(3):
        conv3x3(x, weight).backward(grad)
    assert len(count) == 2


def test_memory_of_freed_weights_is_given_back():
    conv3x3_forget()
    x, weight, _ = samples(1, 32, 32, 4, 4)
    conv3x3(x, weight)
    assert conv3x3_held_bytes() == 36 * 32 * 32 * 4
    other = weight.clone()
    conv3x3(x, other)
    assert conv3x3_held_bytes() == 2 * 36 * 32 * 32 * 4
    del weight
    gc.collect()
    assert conv3x3_held_bytes() == 36 * 32 * 32 * 4
    conv3x3_forget()
    assert conv3x3_held_bytes() == 0
    conv3x3(x, other)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=NEEDS_BF16)])
def test_transforms_have_the_memory_they_need(transposed, frozen, bf16):
    """Of layers with more inputs than outputs, and fewer: the kernel writes as much as it says, and checks nothing."""
    conv3x3_forget()
    compiled, made = operations(), []
    weights = [randn(*sizes, 3, 3).requires_grad_(not frozen) for sizes in ((40, 3), (3, 40), (72, 8))]
    for weight in weights:
        found, _ = _weights.transformed(compiled, weight, transposed, bf16)
        outputs, inputs = weight.shape[:2][::-1] if transposed else weight.shape[:2]
        assert found.numel() == compiled.conv3x3_transformed_size.default(outputs, inputs, bf16)
        made.append(found)
    # what passes shares a buffer
    assert not frozen or len({found.data_ptr() for found in made}) == 3


@given(sizes=st.lists(st.integers(1, 2_000_000), min_size=2, max_size=12))
@settings(max_examples=20)
def test_transforms_lie_side_by_side_in_few_blocks(sizes):
    arena = _weights._Arena()
    slices = [arena.empty(size) for size in sizes]
    assert [len(one) for one in slices] == sizes
    spans = sorted((one.data_ptr(), one.data_ptr() + one.nbytes) for one in slices)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(begin % 64 == 0 for begin, _ in spans)
    padded = sum(-(-size // 16) * 16 for size in sizes)
    # a block is left where the next one does not fit
    assert len({one.untyped_storage().data_ptr() for one in slices}) <= 1 + padded // (arena._BLOCK - 2_000_000)


MISUSE = {
    "x: expected a batch": (randn(3, 4, 4), randn(2, 3, 3, 3)),
    r"weight: expected shape \[K, C, 3, 3\]": (randn(1, 3, 4, 4), randn(2, 3, 1, 1)),
    "weight: expected 3 input channels": (randn(1, 3, 4, 4), randn(2, 4, 3, 3)),
    "x: expected a floating-point tensor": (torch.ones(1, 3, 4, 4, dtype=torch.int32), randn(2, 3, 3, 3)),
    "weight: expected device": (randn(1, 3, 4, 4), torch.empty(2, 3, 3, 3, device="meta")),
}


@pytest.mark.parametrize("message", list(MISUSE))
def test_misuse_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        conv3x3(*MISUSE[message])


def test_products_are_one_of_two():
    with pytest.raises(ValueError, match="products: expected one of fp32, bf16"):
        conv3x3(*samples(1, 3, 4, 4, 4)[:2], products="fp16")


def test_what_the_kernel_does_not_serve_goes_to_torch():
    x, weight, _ = samples(1, 3, 4, 4, 4)
    cases = [(x.double(), weight.double()), (x[:0], weight), (x.to("meta"), weight.to("meta"))]
    for case in cases:
        assert not conv3x3_available(*case)
        assert conv3x3(*case).shape == (case[0].shape[0], 4, 4, 4)
    with use_backend("reference"):
        assert not conv3x3_available(x, weight)
        assert torch.equal(conv3x3(x, weight), plain(x, weight))
    with use_backend("cpp"), pytest.raises(ValueError, match="'cpp' was forced"):
        conv3x3(x.double(), weight.double())


def test_autocast_casts_as_for_conv2d():
    x, weight, _ = samples(2, 8, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv3x3(x, weight)
    assert y.dtype == torch.bfloat16
    assert error(y, plain(x.double(), weight.double())) <= 2e-2


@pytest.mark.parametrize("products", ["fp32", "bf16"])
def test_under_torch_compile(products):
    def loss(x, weight):
        return (conv3x3(x.relu(), weight, products=products) ** 2).sum()

    x, weight, _ = samples(2, 6, 5, 7, 6)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    for ours, eager in zip(torch.autograd.grad(compiled(x, weight), (x, weight)), expected, strict=True):
        torch.testing.assert_close(ours, eager)

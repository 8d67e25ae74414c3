"""Every implementation of every operation against the fp64 definition, on one table of samples."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import (
    DTYPES,
    LAYOUTS,
    SCOPES,
    SHAPES,
    VARIANTS,
    images,
    perturbed_fp64,
    randn,
    spoil,
    stepped_fp64,
    weights_and_grads,
)
from torch import Tensor

from awp_kernels import (
    perturb_,
    perturb_into_,
    pgd_init_,
    pgd_init_normal_,
    pgd_step_,
    restore_,
    use_backend,
)
from awp_kernels.philox import normals, philox4x32, uniform_integers

NORMS = {"linf": 8 / 255, "l2": 0.5}
LENGTHS = {"relative": {"gamma": 0.01}} | VARIANTS


def on(device: str, tensors: list[Tensor]) -> list[Tensor]:
    """Copies: what an operation writes must not be what it is compared with."""
    return [t.clone().to(device) for t in tensors]


def poisoned(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.full_like(t, float("nan")) for t in tensors]


def bits(tensor: Tensor) -> Tensor:
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return tensor.contiguous().reshape(-1).view(width)


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def error(result: list[Tensor], exact: list[Tensor]) -> float:
    """Norm of the difference, over all tensors."""
    total = sum(((r.double().cpu() - e) ** 2).sum() for r, e in zip(result, exact, strict=True))
    return math.sqrt(float(total))


# ---- perturb_, perturb_into_, restore_


@pytest.mark.parametrize("shapes", list(SHAPES))
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_restore_leaves_no_differing_bit(target, shapes, dtype, layout):
    device, backend = target
    if dtype == torch.float64 and backend != "reference":
        with pytest.raises(ValueError, match="float64 is served by the reference alone"):
            perturb_([torch.ones(3, dtype=dtype, device=device)], [torch.ones(3, dtype=dtype, device=device)], 0.1)
        return
    before, grads = weights_and_grads(shapes, dtype)
    weights = on(device, [layout.lay(w) for w in before])
    saved = poisoned(weights)
    perturb_(weights, on(device, grads), 0.01, saved=saved)
    if any(w.numel() > 1 for w in before):
        assert not same_bits(weights, on(device, before))
    restore_(weights, saved)
    assert same_bits(weights, on(device, before))


def test_restore_keeps_nan_payloads_and_denormals(target):
    device, _ = target
    patterns = torch.tensor([0x7FC00001, 0x7F800001, -0x3FFFFF, 1, -0x7FFFFFFF, 0x7F800000], dtype=torch.int32)
    source = patterns.view(torch.float32).to(device)
    destination = torch.zeros_like(source)
    restore_([destination], [source])
    assert torch.equal(bits(destination), bits(source))


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e19, 1e30])
def test_perturb_range_of_fp32(target, scale):
    """Squares of these gradients leave fp32's range; their norms do not."""
    device, _ = target
    weights, _ = weights_and_grads("network", torch.float32)
    grads = [randn(tuple(w.shape), torch.float32, i, scale) for i, w in enumerate(weights)]
    exact, _ = perturbed_fp64(weights, grads, 0.01, "layer")
    moved = on(device, weights)
    perturb_(moved, on(device, grads), 0.01)
    for m, e in zip(moved, exact, strict=True):
        torch.testing.assert_close(m.cpu().double(), e, rtol=3e-7, atol=1e-9)


# ---- every length: relative, absolute, elementwise, bounded


def flags(weights: list[Tensor], options: dict) -> list[bool] | None:
    """T = 1 for every third tensor of an elementwise perturbation."""
    return [i % 3 != 1 for i in range(len(weights))] if options.get("scale") == "elementwise" else None


def assert_rounded(moved: list[Tensor], exact: list[Tensor], weights: list[Tensor]) -> None:
    """Half an ulp of the dtype, and an fp32 ulp of w for the inward rounding and a few of v for its factors."""
    for m, e, w in zip(moved, exact, weights, strict=True):
        info, fp32 = torch.finfo(m.dtype), torch.finfo(torch.float32).eps
        start = w.double()
        allowed = info.eps / 2 * e.abs() + fp32 * (1.5 * start.abs() + 4 * (e - start).abs())
        allowed += info.tiny * info.eps
        assert ((m.double().cpu() - e).abs() <= allowed).all()


@pytest.mark.parametrize("variant", list(LENGTHS))
@pytest.mark.parametrize("shapes", list(SHAPES))
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_against_fp64(target, shapes, scope, dtype, variant):
    device, _ = target
    weights, grads = weights_and_grads(shapes, dtype)
    options = LENGTHS[variant] | {"scope": scope, "adaptive": flags(weights, LENGTHS[variant])}
    exact, exact_scales = perturbed_fp64(weights, grads, **options)
    moved, saved = on(device, weights), poisoned(on(device, weights))
    scales = perturb_(moved, on(device, grads), saved=saved, **options)
    torch.testing.assert_close(scales.cpu().double(), exact_scales, rtol=1e-6, atol=0)
    assert_rounded(moved, exact, weights)
    assert same_bits(saved, on(device, weights))
    restore_(moved, saved)
    assert same_bits(moved, on(device, weights))


@pytest.mark.parametrize("variant", list(LENGTHS))
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_length_in_any_layout(target, variant, scope, layout):
    device, _ = target
    weights, grads = weights_and_grads("network", torch.float32)
    options = LENGTHS[variant] | {"scope": scope, "adaptive": flags(weights, LENGTHS[variant])}
    exact, _ = perturbed_fp64(weights, grads, **options)
    moved = [layout.lay(w.to(device)) for w in weights]
    perturb_(moved, on(device, grads), **options)
    assert_rounded(moved, exact, weights)


@pytest.mark.parametrize("variant", list(LENGTHS))
@pytest.mark.parametrize(("out", "weight", "grad"), list(itertools.product(DTYPES, repeat=3)), ids=str)
def test_every_length_into_other_dtypes(target, out, weight, grad, variant):
    device, _ = target
    weights, _ = weights_and_grads("network", weight)
    _, grads = weights_and_grads("network", grad)
    options = LENGTHS[variant] | {"adaptive": flags(weights, LENGTHS[variant])}
    exact, _ = perturbed_fp64(weights, grads, scope="layer", **options)
    sources = on(device, weights)
    result = poisoned([t.to(out) for t in sources])
    perturb_into_(result, sources, on(device, grads), **options)
    assert_rounded(result, exact, weights)
    assert same_bits(sources, on(device, weights))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_variants_are_what_they_say(variant):
    """About half of the weights reach a bound, so that both sides of it are tested."""
    weights, grads = weights_and_grads("network", torch.float64)
    options = VARIANTS[variant]
    moved, _ = perturbed_fp64(weights, grads, scope="layer", **options)
    if "bound" in options:
        at_bound = [
            ((m - w).abs() >= 0.999 * options["bound"] * w.abs()).double().mean()
            for m, w in zip(moved, weights, strict=True)
        ]
        assert 0.2 < float(torch.stack(at_bound).mean()) < 0.8
    else:
        plain, _ = perturbed_fp64(weights, grads, options["gamma"], "layer")
        assert all(not torch.allclose(m, p, rtol=1e-4) for m, p in zip(moved, plain, strict=True))


@pytest.mark.parametrize("variant", list(LENGTHS))
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_at_zero_norms(target, dtype, scope, variant):
    device, _ = target
    shapes = [(4, 5), (3, 2), (2, 2)]
    weights = [randn(shapes[0], dtype, 1), torch.zeros(shapes[1], dtype=dtype), randn(shapes[2], dtype, 2)]
    grads = [torch.zeros(shapes[0], dtype=dtype), randn(shapes[1], dtype, 3), torch.zeros(shapes[2], dtype=dtype)]
    moved = on(device, weights)
    scales = perturb_(moved, on(device, grads), scope=scope, **LENGTHS[variant])
    assert torch.isfinite(scales).all()
    assert all(torch.isfinite(m).all() for m in moved)
    assert torch.equal(moved[0].cpu(), weights[0])
    assert torch.equal(moved[2].cpu(), weights[2])
    if "bound" in LENGTHS[variant]:
        assert not moved[1].any()


@pytest.mark.parametrize("variant", list(LENGTHS))
@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e19, 1e30])
def test_every_length_over_the_range_of_fp32(target, scale, variant):
    device, _ = target
    weights, _ = weights_and_grads("network", torch.float32)
    grads = [randn(tuple(w.shape), torch.float32, i, scale) for i, w in enumerate(weights)]
    exact, _ = perturbed_fp64(weights, grads, scope="layer", **LENGTHS[variant])
    moved = on(device, weights)
    perturb_(moved, on(device, grads), **LENGTHS[variant])
    assert_rounded(moved, exact, weights)


# ---- directions that are not finite: not followed, whatever shares their norm


SPOILED = {
    # name: shapes, the tensor whose gradient is spoiled, and the element
    "first": ("network", 2, 0),
    "middle": ("network", 0, 217),
    "last of a vector": ("primes", 1, -1),
    "scalar": ("scalar", 0, 0),
    "far block": ("large", 0, 650_000),
    "behind a chunk": ("chunk_edges", 1, 16384),
}


def stopped(weights: list[Tensor], scope: str, spoiled: int, place: int) -> list[Tensor]:
    """For every element, whether it shares a norm with the spoiled one."""
    result = [torch.full_like(w, scope == "global", dtype=torch.bool) for w in weights]
    flat = result[spoiled].view(weights[spoiled].shape[0] if weights[spoiled].ndim > 1 else 1, -1)
    flat[place % weights[spoiled].numel() // flat.shape[1] if scope == "filter" else slice(None)] = True
    return result


@pytest.mark.parametrize("variant", list(LENGTHS))
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("case", list(SPOILED))
def test_a_direction_that_is_not_finite_is_not_followed(target, case, scope, variant):
    """To the bit, -0.0 included; everything else moves as ever, and `found_inf` tells."""
    device, _ = target
    shapes, spoiled, place = SPOILED[case]
    number = list(LENGTHS).index(variant) + SCOPES.index(scope)
    dtype, bad = DTYPES[number % 3], (math.nan, math.inf, -math.inf)[number % 2 + place % 2]
    weights, grads = weights_and_grads(shapes, dtype)
    for w in weights:
        w.view(-1)[w.numel() // 2] = -0.0
    spoil(grads[spoiled], place, bad)
    options = LENGTHS[variant] | {"scope": scope, "adaptive": flags(weights, LENGTHS[variant])}
    exact, exact_scales = perturbed_fp64(weights, grads, **options)
    held = stopped(weights, scope, spoiled, place)
    moved, saved = on(device, weights), poisoned(on(device, weights))
    found_inf = torch.zeros((), device=device)
    scales = perturb_(moved, on(device, grads), saved=saved, found_inf=found_inf, **options)
    torch.testing.assert_close(scales.cpu().double(), exact_scales, rtol=1e-6, atol=0)
    assert found_inf == 1
    assert_rounded(moved, exact, weights)
    for m, w, h in zip(moved, weights, held, strict=True):
        assert torch.equal(bits(m.cpu()[h]), bits(w[h]))
        assert h.all() or not torch.equal(m.cpu()[~h], w[~h])
    assert same_bits(saved, on(device, weights))
    perturb_(on(device, weights), on(device, [torch.ones_like(g) for g in grads]), found_inf=found_inf, **options)
    assert found_inf == 1  # kept: it is the caller's to clear


@pytest.mark.parametrize("variant", ["relative", "absolute", "elementwise-bounded"])
@pytest.mark.parametrize(("out", "weight"), list(itertools.product(DTYPES, repeat=2)), ids=str)
def test_copies_get_the_weights_where_nothing_is_followed(target, out, weight, variant):
    """The rounded weights; in their own dtype every bit, NaN's too."""
    device, _ = target
    weights, _ = weights_and_grads("network", weight)
    _, grads = weights_and_grads("network", DTYPES[(DTYPES.index(out) + DTYPES.index(weight)) % 3])
    spoil(grads[0], 3, math.inf)
    weights[0].view(-1)[:3] = torch.tensor([-0.0, torch.finfo(weight).tiny / 4, torch.finfo(weight).max])
    if LENGTHS[variant].get("scale") == "absolute":
        word = {4: torch.int32, 2: torch.int16}[weights[0].element_size()]
        weights[0].view(-1).view(word)[5] = {torch.float32: 0x7F8000F1, torch.float16: 0x7C11}.get(weight, 0x7F81)
    exact, _ = perturbed_fp64(weights[1:], grads[1:], scope="layer", **LENGTHS[variant])
    sources, found_inf = on(device, weights), torch.zeros(1, device=device)
    result = poisoned([t.to(out) for t in sources])
    scales = perturb_into_(result, sources, on(device, grads), found_inf=found_inf, **LENGTHS[variant])
    assert scales[0] == 0
    assert scales[1:].all()
    assert found_inf == 1
    if out == weight:
        assert torch.equal(bits(result[0].cpu()), bits(weights[0]))
    else:
        torch.testing.assert_close(result[0].cpu(), weights[0].to(out), rtol=0, atol=0, equal_nan=True)
    assert_rounded(result[1:], exact, weights[1:])
    assert same_bits(sources, on(device, weights))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("spoiled", ["norms", "grads"])
def test_weight_norms_that_are_not_finite_stop_too(target, spoiled, scope):
    device, _ = target
    weights, grads = weights_and_grads("network", torch.float32)
    norms = torch.stack([w.double().norm() for w in weights])
    (norms if spoiled == "norms" else grads[1])[1] = math.inf
    moved = on(device, weights)
    scales = perturb_(moved, on(device, grads), 0.01, scope=scope, weight_norms=norms.to(device))
    held = [scope == "global" or index == 1 for index in range(len(weights))]
    assert [bool(scale == 0) for scale in scales] == (held if scope == "layer" else [True])
    assert [torch.equal(m.cpu(), w) for m, w in zip(moved, weights, strict=True)] == held


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("gamma", "spoil_weight"), [(1e30, False), (0.0, False), (0.5, True)])
def test_scales_beyond_fp32_of_zero_and_of_bad_weights(target, gamma, spoil_weight, scope):
    """1e30 / 1e-10 is not in fp32; a gamma of 0 is followed, and moves nothing, not even a sign."""
    device, _ = target
    weights, grads = [randn((3, 5)), torch.full((2,), -0.0)], [randn(s, seed=1, scale=1e-10) for s in ((3, 5), (2,))]
    if spoil_weight:
        weights[0][1, 1] = math.nan
    moved, found_inf = on(device, weights), torch.zeros((), device=device)
    scales = perturb_(moved, on(device, grads), gamma, scope=scope, found_inf=found_inf)
    assert found_inf == (gamma != 0)
    first = scales[1] if scope == "filter" else scales[0]
    assert first == 0
    rows = [1] if spoil_weight and scope == "filter" else [0, 1, 2]
    assert same_bits([moved[0][rows].cpu(), moved[1].cpu()], [weights[0][rows], weights[1]])


@pytest.mark.parametrize("variant", list(LENGTHS))
def test_every_length_of_many_small_tensors(target, variant):
    """More tensors than one launch can name."""
    device, _ = target
    weights = [randn((1 + i % 5, 3), torch.float32, i) for i in range(700)]
    grads = [randn((1 + i % 5, 3), torch.float32, 1000 + i) for i in range(700)]
    for scope in SCOPES:
        options = LENGTHS[variant] | {"scope": scope, "adaptive": flags(weights, LENGTHS[variant])}
        exact, exact_scales = perturbed_fp64(weights, grads, **options)
        moved = on(device, weights)
        scales = perturb_(moved, on(device, grads), **options)
        torch.testing.assert_close(scales.cpu().double(), exact_scales, rtol=1e-6, atol=0)
        assert_rounded(moved, exact, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bound", [0.01, 0.7, 1.9])
def test_no_weight_of_many_leaves_its_bound(target, bound, dtype):
    """Where w - r is exact, as for bounds about 1, a product bound * |w| that was rounded up would show."""
    device, backend = target
    if dtype == torch.float64 and backend != "reference":
        return
    bound = torch.tensor(bound, dtype=torch.float32).item()
    weights, grads = [randn((500,), dtype, 1)], [randn((500,), dtype, 2)]
    moved = on(device, weights)
    perturb_(moved, on(device, grads), 1e3, bound=bound)
    reached = 0
    for m, start in zip(moved[0].tolist(), weights[0].tolist(), strict=True):
        room = Fraction(bound) * abs(Fraction(start)) - abs(Fraction(m) - Fraction(start))
        assert room >= 0
        reached += room < Fraction(bound) * abs(Fraction(start)) / 1000
    assert reached == 500


FP32 = st.floats(-(2.0**60), 2.0**60, width=32)


@given(
    pairs=st.lists(st.tuples(FP32, st.floats(-(2.0**20), 2.0**20, width=32)), min_size=1, max_size=12),
    bound=st.floats(0, 2),
    gamma=st.floats(-3, 3),
    scale=st.sampled_from(["relative", "absolute", "elementwise"]),
    dtype=st.sampled_from([torch.float64, *DTYPES]),
    backend=st.sampled_from(["reference", "cpp"]),
)
def test_no_weight_leaves_its_bound(pairs, bound, gamma, scale, dtype, backend):
    """|v| <= bound * |w| without any tolerance: in rational numbers; 16-bit storage rounds both sides of it."""
    w, g = (torch.tensor(column, dtype=torch.float32).to(dtype) for column in zip(*pairs, strict=True))
    w, saved = torch.where(w.isfinite(), w, 1), torch.empty_like(w)
    before = w.clone()
    with use_backend("reference" if dtype == torch.float64 else backend):
        perturb_([w], [g], gamma, saved=[saved], scale=scale, bound=bound)
    for moved, start in zip(w.tolist(), before.tolist(), strict=True):
        if math.isnan(moved):
            continue
        if dtype in (torch.float32, torch.float64):
            assert abs(Fraction(moved) - Fraction(start)) <= Fraction(bound) * abs(Fraction(start))
        else:
            ends = torch.tensor([start - bound * abs(start), start + bound * abs(start)], dtype=torch.float64).to(dtype)
            assert ends[0] <= moved <= ends[1]
    assert not w.isnan().any() or not g.isfinite().all()
    restore_([w], [saved])
    assert same_bits([w], [before])


@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=4).map(tuple), min_size=1, max_size=5),
    gamma=st.floats(-1, 1),
    scope=st.sampled_from(SCOPES),
    scale=st.sampled_from(["relative", "absolute", "elementwise"]),
    eta=st.sampled_from([0.0, 0.01, 1.0]),
    bound=st.sampled_from([None, 0.0, 0.01, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_every_length_of_any_shapes(shapes, gamma, scope, scale, eta, bound, dtype, seed):
    weights = [randn(shape, dtype, seed + i) for i, shape in enumerate(shapes)]
    grads = [randn(shape, dtype, seed + 50 + i) for i, shape in enumerate(shapes)]
    options = {"scope": scope, "scale": scale, "bound": bound} | ({"eta": eta} if scale == "elementwise" else {})
    exact, exact_scales = perturbed_fp64(weights, grads, gamma, **options)
    moved, saved = [w.clone() for w in weights], poisoned(weights)
    scales = perturb_(moved, grads, gamma, saved=saved, **options)
    torch.testing.assert_close(scales.double(), exact_scales, rtol=1e-6, atol=1e-37)
    assert_rounded(moved, exact, weights)
    restore_(moved, saved)
    assert same_bits(moved, weights)


@pytest.mark.parametrize("variant", list(LENGTHS))
def test_every_length_in_fp64(variant):
    weights, grads = weights_and_grads("network", torch.float64)
    options = LENGTHS[variant] | {"adaptive": flags(weights, LENGTHS[variant])}
    exact, _ = perturbed_fp64(weights, grads, scope="layer", **options)
    assert perturb_(weights, grads, **options).dtype == torch.float64
    for w, e in zip(weights, exact, strict=True):
        torch.testing.assert_close(w, e, rtol=1e-15, atol=0)


# ---- pgd_init_


def started(x: Tensor, ids: Tensor, epsilon: float, norm: str, seed: int = 11) -> Tensor:
    x_adv = torch.full_like(x, float("nan"))
    pgd_init_(x_adv, x, epsilon=epsilon, norm=norm, sample_ids=ids, seed=seed)
    return x_adv


def test_philox_known_answers():
    """Random123's published vectors for philox4x32-10."""

    def words(value: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        word = torch.tensor([value])
        return word, word, word, word

    zeros = philox4x32(words(0), (0, 0))
    ones = philox4x32(words(0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF))
    assert [int(w) for w in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (3, 3, 5, 7), (2, 1, 1, 1), (5, 13), (7,)], ids=str)
def test_initial_noise_equal_to_the_last_bit(target, norm, dtype, layout, shape):
    device, _ = target
    x = images(shape, dtype)
    ids = torch.tensor([0, 1, 2**31, 2**40 + 7, 2**62, 5, 6])[: shape[0]]
    with use_backend("reference"):
        expected = started(x, ids, NORMS[norm], norm, seed=2**62 + 12345)
    result = started(layout.lay(x).to(device), ids.to(device), NORMS[norm], norm, seed=2**62 + 12345)
    assert same_bits([result.cpu()], [expected])


@pytest.mark.parametrize("norm", list(NORMS))
def test_initial_noise_belongs_to_the_sample(target, norm):
    device, _ = target
    x, ids = images((6, 3, 4, 4)).to(device), torch.tensor([9, 4, 7, 1, 0, 3], device=device)
    whole = started(x, ids, NORMS[norm], norm)
    order = torch.tensor([5, 0, 3], device=device)
    assert torch.equal(started(x[order], ids[order], NORMS[norm], norm), whole[order])
    assert not torch.equal(started(x, ids, NORMS[norm], norm, seed=12), whole)


@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("epsilon", [0.0, 1 / 255, 8 / 255, 0.1, 0.5, 1.0])
def test_initial_noise_lies_in_the_ball_exactly(target, norm, epsilon):
    device, _ = target
    x = images((16, 3, 16, 16)).to(device)
    x_adv = started(x, torch.arange(16, device=device), epsilon, norm)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert ball_norm(x_adv, x, norm) <= epsilon


def ball_norm(x_adv: Tensor, x: Tensor, norm: str) -> float:
    delta = (x_adv.cpu().double() - x.cpu().double()).flatten(1)
    return float(delta.abs().max() if norm == "linf" else delta.norm(dim=1).max())


def test_initial_noise_is_uniform(target):
    device, _ = target
    x = torch.full((2000, 3, 4, 4), 0.5, device=device)
    ids = torch.arange(2000, device=device)
    linf = (started(x, ids, 0.25, "linf") - x).double().cpu() / 0.25
    # a uniform variable's moments, within five standard errors
    assert abs(linf.mean()) < 5 * math.sqrt(1 / 3 / linf.numel())
    assert abs((linf**2).mean() - 1 / 3) < 5 * math.sqrt(4 / 45 / linf.numel())
    l2 = (started(x, ids, 0.25, "l2") - x).double().cpu().flatten(1) / 0.25
    # in d dimensions radius^d is uniform in [0, 1]
    radius = l2.norm(dim=1) ** 48
    assert abs(radius.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 2000)
    assert abs(l2.mean()) < 5 * math.sqrt(1 / 50 / l2.numel())
    # no direction is preferred: the coordinates are uncorrelated
    assert (torch.corrcoef(l2.T) - torch.eye(48)).abs().max() < 0.15


def normal_start(x: Tensor, ids: Tensor, std: float, seed: int = 11) -> Tensor:
    x_adv = torch.full_like(x, float("nan"))
    pgd_init_normal_(x_adv, x, std=std, sample_ids=ids, seed=seed)
    return x_adv


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("std", [0.001, 0.3, 0.0])
@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (3, 3, 5, 7), (2, 1, 1, 1), (5, 13), (7,)], ids=str)
def test_normal_start_equal_to_the_last_bit(target, dtype, layout, std, shape):
    """x + std * z with both roundings in fp32, against the definition written out."""
    device, _ = target
    x = images(shape, dtype)
    ids = torch.tensor([0, 1, 2**31, 2**40 + 7, 2**62, 5, 6])[: shape[0]]
    z = normals(ids, x[0].numel(), seed=2**62 + 12345).reshape(shape)
    expected = (x.float() + z * torch.tensor(std, dtype=torch.float32)).to(dtype)
    result = normal_start(layout.lay(x).to(device), ids.to(device), std, seed=2**62 + 12345)
    assert same_bits([result.cpu()], [expected])


def test_normal_start_belongs_to_the_sample(target):
    device, _ = target
    x, ids = images((6, 3, 4, 4)).to(device), torch.tensor([9, 4, 7, 1, 0, 3], device=device)
    whole = normal_start(x, ids, 0.1)
    order = torch.tensor([5, 0, 3], device=device)
    assert torch.equal(normal_start(x[order], ids[order], 0.1), whole[order])
    assert not torch.equal(normal_start(x, ids, 0.1, seed=12), whole)


def test_normal_start_is_normal_and_leaves_the_range(target):
    device, _ = target
    x = torch.ones(2000, 3, 4, 4, device=device)
    noise = (normal_start(x, torch.arange(2000, device=device), 0.25) - x).double().cpu() / 0.25
    assert abs(noise.mean()) < 5 / math.sqrt(noise.numel())
    assert abs((noise**2).mean() - 1) < 5 * math.sqrt(2 / noise.numel())
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / noise.numel())
    # not clipped: half of it lies above 1
    assert abs((noise > 0).double().mean() - 0.5) < 5 * math.sqrt(0.25 / noise.numel())


def test_normal_start_in_fp64():
    x, ids = images((3, 8), torch.float64), torch.arange(3)
    expected = x + 0.001 * normals(ids, 8, seed=11).double()
    assert torch.equal(normal_start(x, ids, 0.001), expected)


def test_normals_and_uniforms_have_their_moments():
    z = normals(torch.arange(500), 400, seed=3).double()
    assert abs(z.mean()) < 5 / math.sqrt(z.numel())
    assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / z.numel())
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / z.numel())
    m = uniform_integers(torch.arange(500), 400, seed=3)
    assert (m % 2 == 1).all()
    assert m.abs().max() < 2**24


# ---- pgd_step_


@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("masked", [False, True], ids=["everywhere", "masked"])
def test_pgd_step_against_fp64(target, norm, dtype, grad_dtype, layout, masked):
    device, _ = target
    epsilon = NORMS[norm]
    x = images((5, 3, 9, 7), dtype)
    start = started(x, torch.arange(5), epsilon, norm)
    grad = randn((5, 3, 9, 7), grad_dtype, 4, 1e-3)
    grad[1] = 0
    mask = torch.rand((9, 7), generator=torch.Generator().manual_seed(5)) < 0.5 if masked else None
    step = {"step_size": epsilon / 3, "epsilon": epsilon, "norm": norm}
    exact = stepped_fp64(start, grad, x, mask=mask, **step)
    x_adv = layout.lay(start).to(device)
    pgd_step_(x_adv, grad.to(device), layout.lay(x).to(device), mask=None if mask is None else mask.to(device), **step)
    # half an ulp of the result, and in fp32 the inward rounding of the ball on top
    half_ulp = torch.finfo(dtype).eps / 2
    inward = 2e-6 if norm == "l2" else 1.5e-7
    assert (x_adv.cpu().double() - exact).abs().max() <= half_ulp + inward


@pytest.mark.parametrize("norm", list(NORMS))
@pytest.mark.parametrize("epsilon", [0.0, 1 / 255, 8 / 255, 0.1, 0.5, 1.0])
def test_pgd_step_stays_in_the_ball_exactly(target, norm, epsilon):
    device, _ = target
    x = images((16, 3, 16, 16), seed=1).to(device)
    x_adv = started(x, torch.arange(16, device=device), epsilon, norm)
    for i in range(4):
        grad = randn((16, 3, 16, 16), torch.float32, i).to(device)
        pgd_step_(x_adv, grad, x, step_size=epsilon * 0.7 + 0.01, epsilon=epsilon, norm=norm)
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        assert ball_norm(x_adv, x, norm) <= epsilon
    if epsilon == 0:
        assert torch.equal(x_adv, x)


def test_pgd_step_reaches_the_boundary(target):
    device, _ = target
    x = torch.full((1, 1, 2, 2), 0.5, device=device)
    x_adv = x.clone()
    grad = torch.tensor([[[[1.0, -1.0], [0.0, float("nan")]]]], device=device)
    for _ in range(3):
        pgd_step_(x_adv, grad, x, step_size=0.1, epsilon=0.25, norm="linf")
    assert x_adv.cpu().flatten().tolist() == [0.75, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1.0, 1e30])
def test_l2_step_ignores_the_gradients_scale(target, scale):
    device, _ = target
    direction = torch.tensor([[3.0, 4.0]])
    grad = (direction.double() * scale).to(torch.float32)
    x = torch.full((1, 2), 0.5, device=device)
    x_adv = x.clone()
    pgd_step_(x_adv, grad.to(device), x, step_size=0.1, epsilon=1.0, norm="l2")
    unit = grad.double() / grad.double().norm()
    torch.testing.assert_close(x_adv.cpu().double(), 0.5 + 0.1 * unit, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_l2_step_without_a_usable_gradient_does_not_move(target, bad):
    device, _ = target
    x = images((2, 12)).to(device)
    start = started(x, torch.arange(2, device=device), 0.3, "l2")
    grad = randn((2, 12), torch.float32, 1).to(device)
    grad[0] = bad
    x_adv = start.clone()
    pgd_step_(x_adv, grad, x, step_size=0.1, epsilon=0.3, norm="l2")
    assert torch.equal(x_adv[0], start[0])
    assert not torch.equal(x_adv[1], start[1])


@pytest.mark.parametrize("step_size", [1e-6, 3e-6, 1e-4])
def test_small_l2_steps_along_the_boundary_stay_in_the_ball(target, step_size):
    """A step that ends a millionth outside is projected as one that ends far outside is."""
    device, _ = target
    x = torch.full((4, 3, 8, 8), 0.5, device=device)
    x_adv, grad = x.clone(), randn(tuple(x.shape), seed=1).to(device)
    pgd_step_(x_adv, grad, x, step_size=1.0, epsilon=0.5, norm="l2")
    assert ball_norm(x_adv, x, "l2") > 0.49999
    for _ in range(20):
        pgd_step_(x_adv, grad, x, step_size=step_size, epsilon=0.5, norm="l2")
        assert ball_norm(x_adv, x, "l2") <= 0.5


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    epsilon=st.floats(0, 1),
    ratio=st.floats(0, 3),
    norm=st.sampled_from(["linf", "l2"]),
    seed=st.integers(0, 1000),
)
def test_pgd_step_any_shape(shape, epsilon, ratio, norm, seed):
    x, grad = images(shape, seed=seed), randn(shape, torch.float32, seed)
    start = started(x, torch.arange(shape[0]), epsilon, norm)
    x_adv = start.clone()
    step_size = epsilon * ratio
    pgd_step_(x_adv, grad, x, step_size=step_size, epsilon=epsilon, norm=norm)
    exact = stepped_fp64(start, grad, x, step_size=step_size, epsilon=epsilon, norm=norm)
    assert (x_adv.double() - exact).abs().max() <= 1e-6
    assert ball_norm(x_adv.reshape(shape[0], -1), x.reshape(shape[0], -1), norm) <= epsilon


def test_fp64_runs_the_definition_in_fp64():
    x = images((3, 8), torch.float64)
    x_adv = started(x, torch.arange(3), 0.2, "linf")
    grad = randn((3, 8), torch.float64)
    exact = stepped_fp64(x_adv, grad, x, step_size=0.05, epsilon=0.2, norm="linf")
    pgd_step_(x_adv, grad, x, step_size=0.05, epsilon=0.2, norm="linf")
    torch.testing.assert_close(x_adv, exact, rtol=0, atol=1e-15)
    weights, grads = weights_and_grads("network", torch.float64)
    exact_weights, _ = perturbed_fp64(weights, grads, 0.01, "layer")
    assert perturb_(weights, grads, 0.01).dtype == torch.float64
    for w, e in zip(weights, exact_weights, strict=True):
        torch.testing.assert_close(w, e, rtol=1e-15, atol=0)


@pytest.mark.parametrize("name", ["gamma", "filter", "elementwise"])
def test_threads_change_no_bit(name):
    """In C++: of several chunks, whose sums are added up in an order of their own."""
    weights, grads = ([randn(shape, seed=i + k) for i, shape in enumerate(((300, 700), (99,)))] for k in (0, 9))
    options = {"gamma": {"gamma": 0.01}, "filter": {"gamma": 0.01, "scope": "filter"}}
    options["elementwise"] = {"gamma": 0.01, "scale": "elementwise"}
    before, found = torch.get_num_threads(), []
    try:
        with use_backend("cpp"):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                moved = on("cpu", weights)
                found.append([*moved, perturb_(moved, grads, **options[name])])
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(other, found[0]) for other in found[1:])

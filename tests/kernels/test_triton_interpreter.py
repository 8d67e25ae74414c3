"""The Triton kernels on CPU tensors, in Triton's interpreter, against the reference.

The interpreter has to be chosen before triton is imported, so one test runs the rest of this file in a process of its
own. Its cast from float32 to bfloat16 truncates, so bfloat16 results may differ by one unit in the last place there.
"""

import itertools
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from operations import CHANNELS, NORMALISATIONS, OPERATIONS, STEPS, arguments_of, excess, mapped, run
from samples import DTYPES, LAYOUTS, SCOPES, SGD_VARIANTS, VARIANTS, images, randn, weights_and_grads
from torch import Tensor

from awp_engine.models.layers import Head
from awp_kernels import (
    augment,
    bn_act_available,
    perturb_,
    perturb_into_,
    pgd_init_,
    pgd_init_normal_,
    pgd_step_,
    pooled_linear,
    pooled_linear_available,
    restore_,
    sgd_step_,
    total_norm,
    use_backend,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NORMS = {"linf": 8 / 255, "l2": 0.5}
# an interpreted program takes some 10 ms, and a filter is a program
SMALL = ["scalar", "one", "warp_edges", "primes", "empty_tensors"]
LEAST_TESTS = 700


@pytest.mark.compile
@pytest.mark.timeout(900)
def test_kernels_in_the_interpreter(tmp_path):
    triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    numpy = pytest.importorskip("numpy")
    if triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("triton 3.6's interpreter cannot run loops with numpy >= 2.4: pip install 'numpy<2.4'")
    report = tmp_path / "report.xml"
    # numpy warns of the branch of tl.where that is not taken, and of how triton 3.6 reads loop bounds
    ignored = ["-W", "ignore::RuntimeWarning", "-W", "ignore:Conversion of an array:DeprecationWarning"]
    options = ["-q", "-p", "no:cacheprovider", *ignored, f"--junit-xml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"{Path(__file__)}::TestInterpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = next(ElementTree.parse(report).iter("testsuite")).attrib
    assert int(counts["tests"]) >= LEAST_TESTS, counts
    assert int(counts["skipped"]) == 0, counts


def nans(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.full_like(t, float("nan")) for t in tensors]


def same_bits(a: Tensor, b: Tensor) -> bool:
    word = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(word), b.view(word))


def assert_close(result: Tensor, expected: Tensor) -> None:
    """Equal up to one unit in the last place."""
    torch.testing.assert_close(result, expected, rtol=torch.finfo(result.dtype).eps, atol=1e-9, equal_nan=True)


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def _backend(self):
        with use_backend("triton"):
            yield

    @staticmethod
    def reference(operation, *arguments, **options):
        with use_backend("reference"):
            return operation(*arguments, **options)

    @pytest.mark.parametrize("variant", list(NORMALISATIONS))
    @pytest.mark.parametrize("sample", ["one", "edges", "primes"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_normalisation(self, variant, sample, dtype):
        """With its gradients, against fp64."""
        operation = OPERATIONS["bn_act"]
        arguments = arguments_of("bn_act", variant, sample, dtype)
        assert bn_act_available(arguments["x"], arguments["weight"])
        ratio, where = excess(operation, run(operation, mapped(arguments, lambda t: t.clone())), arguments)
        assert ratio <= 1, where

    # of several tiles of channels, of pixels, and with the most classes
    @pytest.mark.parametrize("shapes", [*CHANNELS.values(), [(2, 300, 7, 9), (10,)], [(2, 40, 9, 9), (256,)]], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_pooled_linear(self, shapes, dtype):
        """With its gradients, against fp64; what is empty is torch's."""
        operation = OPERATIONS["pooled_linear"]
        arguments = operation.build(shapes, dtype)
        served = pooled_linear_available(*(arguments[name] for name in ("x", "weight", "bias")))
        assert served == (arguments["x"].numel() > 0)
        ratio, where = excess(operation, run(operation, arguments), arguments)
        assert ratio <= 1, where

    @staticmethod
    def head(dtype: torch.dtype = torch.float32, shape=(3, 20, 4, 5), classes: int = 7) -> list[Tensor]:
        arguments = OPERATIONS["pooled_linear"].build([shape, (classes,)], dtype)
        return [arguments[name].requires_grad_() for name in ("x", "weight", "bias")]

    @pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1, 2)], ids=str)
    def test_derivatives_of_three_orders_of_pooled_linear(self, wanted):
        found = []
        for dtype in (torch.float32, torch.float64):
            inputs = [t.detach().to(dtype).requires_grad_(i in wanted) for i, t in enumerate(self.head())]
            with use_backend("triton" if dtype == torch.float32 else "reference"):
                value = pooled_linear(*inputs).pow(4).mean()
                assert ("_PooledLinear" in type(value.grad_fn.next_functions[0][0].next_functions[0][0]).__name__) == (
                    dtype == torch.float32
                )
                for order in range(3):
                    gradients = torch.autograd.grad(value, [inputs[i] for i in wanted], create_graph=True)
                    found += [g.detach().double() for g in gradients]
                    value = sum((g * randn(tuple(g.shape), dtype, 10 + order)).sum() for g in gradients)
        half = len(found) // 2
        for ours, exact in zip(found[:half], found[half:], strict=True):
            torch.testing.assert_close(ours, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_pooled_linear_keeps_and_computes_what_was_asked_for(self, dtype):
        inputs = self.head(dtype)
        logits = pooled_linear(*inputs)
        assert logits.dtype == torch.float32
        grad = randn(tuple(logits.shape), seed=4)
        everything = torch.autograd.grad(logits, inputs, grad)
        for index, (one, tensor) in enumerate(zip(everything, inputs, strict=True)):
            assert (one.dtype, one.shape) == (tensor.dtype, tensor.shape)
            (alone,) = torch.autograd.grad(pooled_linear(*inputs), [tensor], grad)
            assert torch.equal(alone, one), index
        x, weight, bias = inputs[0], inputs[1].detach(), inputs[2].detach()
        logits = pooled_linear(x, weight, bias)
        assert logits.grad_fn.saved_tensors[0] is None
        # by the kernel, whatever is forced by then, and once a graph is asked for by torch
        with use_backend("reference"):
            (found,) = torch.autograd.grad(logits, x, grad, retain_graph=True)
        assert torch.equal(found, everything[0])
        weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(logits, x, grad)

    def test_no_pixel_is_read_again_for_a_gradient_that_nobody_asked_for(self):
        inputs = self.head()
        for wanted, read in ((inputs[:1], False), (inputs[1:], True)):
            logits = pooled_linear(*inputs).sum()
            with torch.profiler.profile() as recorded:
                torch.autograd.grad(logits, wanted)
            assert any(event.key == "aten::mean" for event in recorded.key_averages()) == read

    def test_a_gradient_of_one_number_for_all_logits(self):
        """Its memory is not that of a matrix."""
        inputs = self.head()
        found = torch.autograd.grad(pooled_linear(*inputs).sum(), inputs)
        expected = self.reference(lambda: torch.autograd.grad(pooled_linear(*inputs).sum(), inputs))
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_pooled_linear_loses_no_nan_and_spreads_none(self, value):
        for index in range(3):
            inputs = [t.detach() for t in self.head()]
            inputs[index][(-1,) * inputs[index].ndim] = value
            ours, plain = pooled_linear(*inputs), self.reference(pooled_linear, *inputs)
            torch.testing.assert_close(ours, plain, equal_nan=True)
            assert not ours.isfinite().all()

    def test_what_pooled_linear_leaves_to_torch(self):
        """Limits and other dtypes; forced, it says so."""
        x, weight, bias = (t.detach() for t in self.head(shape=(2, 256, 2, 2), classes=256))
        assert pooled_linear_available(x, weight, bias)
        wide = torch.zeros(2, 512, 2, 2).to(memory_format=torch.channels_last)
        others = {
            "257 classes": (x[:, :1], torch.zeros(257, 1), torch.zeros(257)),
            "more than 65,536 weights": (wide, torch.zeros(129, 512), torch.zeros(129)),
            "fp64": (x.double(), weight.double(), bias.double()),
            "bias in 16 bits": (x, weight, bias.half()),
        }
        assert pooled_linear_available(wide, torch.zeros(128, 512), torch.zeros(128))
        for name, tensors in others.items():
            assert not pooled_linear_available(*tensors), name
            with pytest.raises(ValueError, match=r"^backend 'triton' was forced but does not pool"):
                pooled_linear(*tensors)
        with torch.autocast("cpu", torch.bfloat16):
            assert not pooled_linear_available(x, weight, bias)
        with use_backend(None):
            assert not pooled_linear_available(x, weight, bias)

    def test_pooled_linear_under_transforms_is_torchs(self):
        x, weight, bias = (t.detach() for t in self.head())
        with use_backend(None):
            expected = torch.func.vmap(lambda image: pooled_linear(image[None], weight, bias))(x)
        with pytest.raises(ValueError, match="was forced"):
            torch.func.vmap(lambda image: pooled_linear(image[None], weight, bias))(x)
        head = Head(20, 7)
        head.load_state_dict({"weight": weight, "bias": bias})
        found = torch.func.vmap(lambda image: head(image[None]))(x)
        torch.testing.assert_close(found, expected)
        # gradients of many at once, through the graph of the fused forward pass
        logits = head(x.requires_grad_())
        assert type(logits.grad_fn).__name__ == "_PooledLinearBackward"
        many = torch.eye(7)[:, None].expand(7, 3, 7)
        (batched,) = torch.autograd.grad(logits, x, many, is_grads_batched=True, retain_graph=True)
        for one, rows in zip(batched, many, strict=True):
            torch.testing.assert_close(one, torch.autograd.grad(logits, x, rows, retain_graph=True)[0])

    @pytest.mark.parametrize(
        ("shapes", "scope"),
        [*itertools.product(SMALL, SCOPES), *itertools.product(["network", "chunk_edges"], ["layer", "global"])],
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_perturb_and_restore(self, shapes, scope, dtype):
        weights, grads = weights_and_grads(shapes, dtype)
        expected, moved, saved = [w.clone() for w in weights], [w.clone() for w in weights], nans(weights)
        expected_scales = self.reference(perturb_, expected, grads, 0.01, scope=scope)
        scales = perturb_(moved, grads, 0.01, saved=saved, scope=scope)
        assert_close(scales, expected_scales)
        for m, e in zip(moved, expected, strict=True):
            assert_close(m, e)
        assert all(same_bits(s, w) for s, w in zip(saved, weights, strict=True))
        restore_(moved, saved)
        assert all(same_bits(m, w) for m, w in zip(moved, weights, strict=True))

    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
    def test_perturb_in_any_layout(self, layout, scope):
        weights = [randn((4, 3, 5, 2)), randn((33,), seed=1), randn((8, 4, 3, 3), seed=2)]
        grads = [randn(tuple(w.shape), seed=3) for w in weights]
        expected = [w.clone() for w in weights]
        self.reference(perturb_, expected, grads, 0.01, scope=scope)
        # one aligned tensor among misaligned ones: every tensor chooses its own path
        moved = [layout.lay(w) for w in weights[:2]] + weights[2:]
        perturb_(moved, [layout.lay(g) for g in grads[:2]] + grads[2:], 0.01, scope=scope)
        for m, e in zip(moved, expected, strict=True):
            assert_close(m, e)

    @pytest.mark.parametrize("out", DTYPES, ids=str)
    @pytest.mark.parametrize("grad", DTYPES, ids=str)
    @pytest.mark.parametrize("scope", SCOPES)
    def test_perturb_into_other_dtypes(self, out, grad, scope):
        weights, _ = weights_and_grads("primes", torch.float32)
        _, grads = weights_and_grads("primes", grad)
        result, expected = nans([w.to(out) for w in weights]), nans([w.to(out) for w in weights])
        self.reference(perturb_into_, expected, weights, grads, 0.01, scope=scope)
        perturb_into_(result, weights, grads, 0.01, scope=scope)
        for r, e in zip(result, expected, strict=True):
            assert_close(r, e)

    @pytest.mark.parametrize("variant", list(VARIANTS))
    @pytest.mark.parametrize("shapes", ["scalar", "primes", "empty_tensors"])
    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_every_length(self, variant, shapes, scope, dtype):
        weights, grads = weights_and_grads(shapes, dtype)
        options = VARIANTS[variant] | {"scope": scope}
        if options.get("scale") == "elementwise":
            options["adaptive"] = [i % 3 != 1 for i in range(len(weights))]
        expected, moved, saved = [w.clone() for w in weights], [w.clone() for w in weights], nans(weights)
        expected_scales = self.reference(perturb_, expected, grads, **options)
        assert_close(perturb_(moved, grads, saved=saved, **options), expected_scales)
        for m, e, w in zip(moved, expected, weights, strict=True):
            assert_close(m, e)
            if "bound" in options and dtype == torch.float32:
                assert ((m.double() - w.double()).abs() <= options["bound"] * w.double().abs()).all()
        restore_(moved, saved)
        assert all(same_bits(m, w) for m, w in zip(moved, weights, strict=True))

    @pytest.mark.parametrize("variant", list(VARIANTS))
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
    def test_every_length_in_any_layout_and_of_several_chunks(self, layout, variant):
        weights = [randn((4, 3, 5, 2)), randn((16385,), seed=1), randn((8, 4, 3, 3), seed=2)]
        grads = [randn(tuple(w.shape), seed=3) for w in weights]
        expected = [w.clone() for w in weights]
        self.reference(perturb_, expected, grads, **VARIANTS[variant])
        moved = [layout.lay(w) for w in weights[:2]] + weights[2:]
        perturb_(moved, [layout.lay(g) for g in grads[:2]] + grads[2:], **VARIANTS[variant])
        for m, e in zip(moved, expected, strict=True):
            assert_close(m, e)

    @pytest.mark.parametrize("variant", list(VARIANTS))
    @pytest.mark.parametrize("out", DTYPES, ids=str)
    @pytest.mark.parametrize("grad", DTYPES, ids=str)
    def test_every_length_into_other_dtypes(self, out, grad, variant):
        weights, _ = weights_and_grads("primes", torch.float32)
        _, grads = weights_and_grads("primes", grad)
        result, expected = nans([w.to(out) for w in weights]), nans([w.to(out) for w in weights])
        self.reference(perturb_into_, expected, weights, grads, **VARIANTS[variant])
        perturb_into_(result, weights, grads, **VARIANTS[variant])
        for r, e in zip(result, expected, strict=True):
            assert_close(r, e)

    @pytest.mark.parametrize("variant", ["relative", *VARIANTS])
    @pytest.mark.parametrize("scope", SCOPES)
    def test_a_direction_that_is_not_finite_is_not_followed(self, scope, variant):
        """To the bit; -0.0 and NaN's bits included, in weights' own dtype and, rounded, in another."""
        options = VARIANTS.get(variant, {"gamma": 0.01}) | {"scope": scope}
        fp32, fp16 = torch.float32, torch.float16
        for dtype, out in ((fp32, fp32), (fp16, fp16), (fp32, fp16)):
            weights = [randn(s, dtype, 5) for s in ((3, 9), (17,), (2, 4), (3000,))]
            grads = [randn(tuple(w.shape), dtype, 6 + i) for i, w in enumerate(weights)]
            grads[0][1, 8], grads[3][2900] = float("inf"), float("nan")
            weights[0][1, 2], weights[3][0] = -0.0, -0.0
            if options.get("scale") == "absolute":
                word, odd = (torch.int32, 0x7FC00123) if dtype == fp32 else (torch.int16, 0x7E11)
                weights[3].view(word)[1] = odd
            moved, expected = nans([w.to(out) for w in weights]), nans([w.to(out) for w in weights])
            found_inf = torch.zeros(1)
            scales = perturb_into_(moved, weights, grads, found_inf=found_inf, **options)
            assert_close(scales, self.reference(perturb_into_, expected, weights, grads, **options))
            assert found_inf == 1
            for m, e in zip(moved, expected, strict=True):
                assert_close(m, e)
            held = [(moved[0][1], weights[0][1]), (moved[3], weights[3])]
            for m, w in held + ([(moved[1], weights[1])] if scope == "global" else []):
                assert torch.equal(m.nan_to_num(), w.to(out).nan_to_num())
                assert out != dtype or same_bits(m, w)

    @pytest.mark.parametrize("variant", list(VARIANTS))
    @pytest.mark.parametrize("scope", SCOPES)
    def test_every_length_at_zero_norms_and_bad_gradients(self, scope, variant):
        weights = [randn((4, 5), seed=1), torch.zeros(3, 2), randn((2, 2), seed=2)]
        for last in (torch.zeros(2, 2), torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]])):
            grads = [torch.zeros(4, 5), randn((3, 2), seed=3), last]
            moved, expected = [w.clone() for w in weights], [w.clone() for w in weights]
            scales = perturb_(moved, grads, scope=scope, **VARIANTS[variant])
            assert_close(scales, self.reference(perturb_, expected, grads, scope=scope, **VARIANTS[variant]))
            for m, e in zip(moved, expected, strict=True):
                assert_close(m, e)

    def test_flags_are_part_of_the_kept_table(self):
        """The same memory with other flags is another table."""
        weights, grads = [randn((4, 5)), randn((3,), seed=1)], [randn((4, 5), seed=2), randn((3,), seed=3)]
        for flags in ([True, False], [False, True], None):
            out, expected = nans(weights), nans(weights)
            options = {"scale": "elementwise", "eta": 0.01, "adaptive": flags}
            self.reference(perturb_into_, expected, weights, grads, 0.5, **options)
            perturb_into_(out, weights, grads, 0.5, **options)
            for r, e in zip(out, expected, strict=True):
                assert_close(r, e)

    @pytest.mark.parametrize("scope", SCOPES)
    @pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 31, 32, 33, 1023, 2049])
    @pytest.mark.parametrize("offset", [0, 1])
    def test_nothing_is_written_outside(self, size, offset, scope):
        weights, grads = [randn((2, size))], [randn((2, size), seed=1)]
        memory = torch.full((2, 2 * size + 64), float("nan"))
        out, saved = (row[32 + offset : 32 + offset + 2 * size].view(2, size) for row in memory)
        saved.copy_(weights[0])
        perturb_into_([out], weights, grads, 0.01, scope=scope)
        perturb_([saved], grads, 0.01, saved=[weights[0]], scope=scope)
        assert_close(saved, out)
        restore_([saved], weights)
        assert torch.equal(saved, weights[0])
        assert memory[:, : 32 + offset].isnan().all()
        assert memory[:, 32 + offset + 2 * size :].isnan().all()

    @pytest.mark.parametrize("scope", SCOPES)
    def test_zero_norms_and_bad_gradients(self, scope):
        weights = [randn((4, 5), seed=1), torch.zeros(3, 2), randn((2, 2), seed=2)]
        for last in (torch.zeros(2, 2), torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]])):
            grads = [torch.zeros(4, 5), randn((3, 2), seed=3), last]
            moved, expected = [w.clone() for w in weights], [w.clone() for w in weights]
            scales = perturb_(moved, grads, 0.01, scope=scope)
            assert_close(scales, self.reference(perturb_, expected, grads, 0.01, scope=scope))
            for m, e in zip(moved, expected, strict=True):
                assert_close(m, e)

    @pytest.mark.parametrize("scope", SCOPES)
    def test_many_tensors(self, scope):
        weights = [randn((1 + i % 3, 3), seed=i) for i in range(40)]
        grads = [randn((1 + i % 3, 3), seed=1000 + i) for i in range(40)]
        moved, expected, saved = [w.clone() for w in weights], [w.clone() for w in weights], nans(weights)
        perturb_(moved, grads, 0.01, saved=saved, scope=scope)
        self.reference(perturb_, expected, grads, 0.01, scope=scope)
        for m, e in zip(moved, expected, strict=True):
            assert_close(m, e)
        restore_(moved, saved)
        assert all(same_bits(m, w) for m, w in zip(moved, weights, strict=True))

    def test_table_is_built_once_for_the_same_memory(self):
        from awp_kernels import _triton_common

        built = _triton_common._build_once.cache_info
        weights, grads = weights_and_grads("network", torch.float32)
        perturb_(weights, grads, 0.01)
        before = built()
        for w in weights:
            w.mul_(3)
        expected = [w.clone() for w in weights]
        perturb_(weights, grads, 0.02)
        assert (built().misses, built().hits) == (before.misses, before.hits + 1)
        self.reference(perturb_, expected, grads, 0.02)
        for w, e in zip(weights, expected, strict=True):
            assert_close(w, e)
        perturb_(weights, [g.clone() for g in grads], 0.01)
        assert built().misses == before.misses + 1

    def stepped(self, weights, grads, out, options, *, backend="triton", lay=None):
        """Lists after a step and their norms; what is only written starts as NaN."""
        lay = lay or (lambda t: t.clone())
        arguments = {"weights": [lay(w) for w in weights], "grads": [lay(g) for g in grads], "lr": 0.1} | options
        arguments["out"] = [lay(c) for c in nans([w.to(out) for w in weights])]
        if options.get("momentum"):
            arguments["momentum_buffers"] = [lay(w + 1) for w in weights]
        if "average_weight" in options:
            arguments["averages"] = [lay(w - 1) for w in weights]
        for name in ("grad_scale", "grad_norm"):
            if name in options:
                arguments[name] = torch.as_tensor(options[name], dtype=torch.float32)
        with use_backend(backend):
            norms = sgd_step_(**arguments)
        lists = ("weights", "momentum_buffers", "averages", "out")
        return {name: arguments[name] for name in lists if name in arguments} | {"norms": [norms]}

    def assert_stepped_alike(self, *arguments, lay=None):
        result = self.stepped(*arguments, lay=lay)
        for name, expected in self.stepped(*arguments, backend="reference").items():
            for r, e in zip(result[name], expected, strict=True):
                # the sums' orders differ; a step is a few roundings
                tolerance = 1e-12 if name == "norms" else 2 * torch.finfo(r.dtype).eps
                torch.testing.assert_close(r, e, rtol=tolerance, atol=2e-7 if name != "norms" else 0)

    @pytest.mark.parametrize("variant", list(SGD_VARIANTS))
    @pytest.mark.parametrize("shapes", SMALL)
    @pytest.mark.parametrize("grad", DTYPES, ids=str)
    def test_sgd_step(self, variant, shapes, grad):
        weights, _ = weights_and_grads(shapes, torch.float32)
        _, grads = weights_and_grads(shapes, grad)
        self.assert_stepped_alike(weights, grads, torch.float16, SGD_VARIANTS[variant])

    @pytest.mark.parametrize("out", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
    def test_sgd_step_in_any_layout_and_of_several_chunks(self, layout, out):
        weights = [randn((4, 3, 5, 2)), randn((16385,), seed=1), randn((8, 4, 3, 3), seed=2)]
        grads = [randn(tuple(w.shape), seed=3) for w in weights]
        self.assert_stepped_alike(weights, grads, out, SGD_VARIANTS["everything"], lay=layout.lay)

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_sgd_step_by_numbers_in_memory(self, number):
        weights, grads = weights_and_grads("primes", torch.float32)
        dtype = [torch.float32, torch.float64][number % 2]
        options = SGD_VARIANTS["everything"] | {
            "lr": torch.tensor(0.3, dtype=dtype),
            "average_weight": torch.tensor([0.2], dtype=dtype),
            "found_inf": [None, torch.tensor(False), torch.tensor(0.0)][number],
            "weight_decay": [0.0, 0.1, 0.01],
        }
        self.assert_stepped_alike(weights, grads, torch.float16, options)

    @pytest.mark.parametrize(
        "flags",
        [
            {"found_inf": torch.tensor(True)},
            {"found_inf": torch.tensor(2.0)},
            {"grad_norm": torch.tensor(float("nan"))},
            {"grad_norm": torch.tensor(float("inf")), "max_norm": 1.0},
        ],
        ids=["bool", "fp32", "nan", "inf"],
    )
    def test_sgd_step_that_is_left_out(self, flags):
        weights, grads = weights_and_grads("primes", torch.float32)
        options = {"momentum": 0.9, "average_weight": 0.1} | flags
        result = self.stepped(weights, [g * float("nan") for g in grads], torch.float16, options)
        expected = {
            "weights": weights,
            "momentum_buffers": [w + 1 for w in weights],
            "averages": [w - 1 for w in weights],
            "out": [w.half() for w in weights],
        }
        for name, tensors in expected.items():
            assert all(same_bits(r, e) for r, e in zip(result[name], tensors, strict=True)), name
        torch.testing.assert_close(result["norms"][0], torch.stack([w.double().norm() for w in weights]))

    def test_sgd_step_of_many_tensors(self):
        weights = [randn((1 + i % 3, 3), seed=i) for i in range(40)]
        grads = [randn((1 + i % 3, 3), seed=1000 + i) for i in range(40)]
        self.assert_stepped_alike(weights, grads, torch.float16, SGD_VARIANTS["momentum"])

    @pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1023, 2049])
    @pytest.mark.parametrize("offset", [0, 1])
    def test_sgd_step_writes_nothing_outside(self, size, offset):
        memory = torch.full((4, size + 64), float("nan"))
        weight, buffer, average, out = (row[32 + offset : 32 + offset + size].fill_(1) for row in memory)
        grads = [torch.ones(size)]
        options = {"lr": 0.1, "momentum": 0.5, "averages": [average], "average_weight": 0.5, "out": [out]}
        sgd_step_([weight], grads, [buffer], **options)
        assert torch.equal(weight, out)
        assert memory[:, : 32 + offset].isnan().all()
        assert memory[:, 32 + offset + size :].isnan().all()
        assert not memory[:, 32 + offset : 32 + offset + size].isnan().any()

    @pytest.mark.parametrize("shapes", [*SMALL, "chunk_edges"])
    def test_total_norm(self, shapes):
        weights = [w.to(DTYPES[i % 2]) for i, w in enumerate(weights_and_grads(shapes, torch.float32)[0] * 3)]
        expected = torch.stack([w.double().norm() for w in weights]).norm()
        torch.testing.assert_close(total_norm(weights), expected, rtol=1e-12, atol=0)
        weights[-1].fill_(float("nan"))
        assert total_norm(weights).isfinite() == (not weights[-1].numel())

    @pytest.mark.parametrize("shapes", ["primes", "empty_tensors", "chunk_edges"])
    @pytest.mark.parametrize("scope", ["layer", "global"])
    @pytest.mark.parametrize("bound", [None, 0.01], ids=["free", "bounded"])
    def test_perturb_by_known_norms(self, shapes, scope, bound):
        weights, grads = weights_and_grads(shapes, torch.float32)
        expected, moved = [w.clone() for w in weights], [w.clone() for w in weights]
        norms = torch.stack([w.double().norm() for w in weights])
        options = {"scope": scope, "bound": bound, "weight_norms": norms}
        assert_close(
            perturb_(moved, grads, 0.01, **options), self.reference(perturb_, expected, grads, 0.01, **options)
        )
        for m, e in zip(moved, expected, strict=True):
            assert_close(m, e)
        # the given norms count
        assert not perturb_(moved, grads, 0.01, scope=scope, weight_norms=norms * 0).any()

    @pytest.mark.parametrize("word", [torch.int16, torch.int32], ids=str)
    def test_restore_keeps_every_pattern(self, word):
        patterns = randn((777,), torch.float64).view(torch.int64).to(word)
        special = [0x7FC00001, 0x7F800001, -0x3FFFFF, 1, -0x7FFFFFFF] if word == torch.int32 else [0x7C01, 1, -1]
        patterns[: len(special)] = torch.tensor(special, dtype=word)
        source = patterns.view(torch.float32 if word == torch.int32 else torch.float16)
        target = torch.zeros_like(source)
        restore_([target], [source])
        assert same_bits(target, source)

    @pytest.mark.parametrize("norm", list(NORMS))
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
    @pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 5, 1, 4), (3,)], ids=str)
    def test_initial_noise_equal_to_the_last_bit(self, norm, dtype, layout, shape):
        x = images(shape, dtype)
        ids = torch.tensor([2**40 + 7, -1, 2**31])[: shape[0]]
        options = {"epsilon": NORMS[norm], "norm": norm, "sample_ids": ids, "seed": 2**62 + 12345}
        clean = layout.lay(x)
        # `layout.lay` keeps the memory order, full_like would not in every layout
        result, expected = layout.lay(torch.full_like(x, float("nan"))), torch.full_like(x, float("nan"))
        pgd_init_(result, clean, **options)
        self.reference(pgd_init_, expected, x, **options)
        if dtype == torch.bfloat16:
            assert_close(result, expected)
        else:
            assert torch.equal(result, expected)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
    @pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 5, 1, 4), (3,), (2, 3, 19, 23)], ids=str)
    def test_normal_start_equal_to_the_last_bit(self, dtype, layout, shape):
        x = images(shape, dtype)
        ids = torch.tensor([2**40 + 7, -1, 2**31])[: shape[0]]
        options = {"std": 0.1, "sample_ids": ids, "seed": 2**62 + 12345}
        result, expected = layout.lay(torch.full_like(x, float("nan"))), torch.full_like(x, float("nan"))
        pgd_init_normal_(result, layout.lay(x), **options)
        self.reference(pgd_init_normal_, expected, x, **options)
        if dtype == torch.bfloat16:
            assert_close(result, expected)
        else:
            assert torch.equal(result, expected)

    @pytest.mark.parametrize("norm", list(NORMS))
    @pytest.mark.parametrize(
        ("layout", "seed"),
        list(zip(LAYOUTS, [0, 1, 2**32 - 1, 2**63 - 1], strict=True)),
        ids=lambda value: getattr(value, "name", str(value)),
    )
    def test_initial_noise_of_samples_larger_than_a_block(self, norm, layout, seed):
        x = images((2, 3, 19, 23))
        options = {"epsilon": NORMS[norm], "norm": norm, "sample_ids": torch.tensor([3, 2**33]), "seed": seed}
        result, expected = layout.lay(torch.full_like(x, float("nan"))), torch.empty_like(x)
        pgd_init_(result, layout.lay(x), **options)
        self.reference(pgd_init_, expected, x, **options)
        assert torch.equal(result, expected)

    @pytest.mark.parametrize("norm", list(NORMS))
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
    @pytest.mark.parametrize("masked", [False, True], ids=["everywhere", "masked"])
    def test_pgd_step(self, norm, dtype, layout, masked):
        x, grad = images((3, 3, 9, 7), dtype), randn((3, 3, 9, 7), torch.float16 if masked else dtype, 4, 1e-3)
        grad[1] = 0
        grad[2, 0] = float("nan") if norm == "linf" else 0
        # many values at the edge of the ball
        start = (x + randn(x.shape, dtype, 6, NORMS[norm] / (1 if norm == "linf" else 8))).clamp(0, 1)
        mask = torch.rand((9, 7), generator=torch.Generator().manual_seed(5)) < 0.5 if masked else None
        options = {"step_size": NORMS[norm] / 3, "epsilon": NORMS[norm], "norm": norm, "mask": mask}
        result, expected = layout.lay(start), start.clone()
        pgd_step_(result, layout.lay(grad), layout.lay(x), **options)
        self.reference(pgd_step_, expected, grad, x, **options)
        if norm == "linf" and dtype != torch.bfloat16:
            assert torch.equal(result, expected)
        else:
            assert_close(result, expected)

    @pytest.mark.parametrize("norm", list(NORMS))
    @pytest.mark.parametrize("shape", [(2, 3, 27, 31), (3, 1), (1, 2049), (0, 3)], ids=str)
    @pytest.mark.parametrize("clip", [(0.0, 1.0), (-1.5, 0.75)], ids=str)
    def test_pgd_step_of_any_size(self, norm, shape, clip):
        x, grad = images(shape), randn(shape, seed=1)
        result, expected = x.clone(), x.clone()
        for step_size in (0.3, 0.3, -0.2):
            options = {"step_size": step_size, "epsilon": 0.5, "norm": norm, "clip": clip}
            pgd_step_(result, grad, x, **options)
            self.reference(pgd_step_, expected, grad, x, **options)
        if norm == "linf":
            assert torch.equal(result, expected)
        else:
            assert_close(result, expected)

    @pytest.mark.parametrize("variant", list(STEPS))
    @pytest.mark.parametrize("sample", ["empty", "no pixels", "one", "grey", "more", "primes"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
    def test_step_to_a_normalised_input(self, variant, sample, dtype, layout):
        """Against fp64 and, but for the order of sums, the reference's bits."""
        operation = OPERATIONS["pgd_step_normalize_"]
        arguments = arguments_of("pgd_step_normalize_", variant, sample, dtype)
        laid = mapped(arguments, lambda t: t.clone()) | {name: layout.lay(arguments[name]) for name in ("x_adv", "x")}
        results = run(operation, laid)
        ratio, where = excess(operation, results, arguments)
        assert ratio <= 1, where
        expected = self.reference(run, operation, mapped(arguments, lambda t: t.clone()))
        for name in ("x_adv", "out"):
            if variant.startswith("linf"):
                assert torch.equal(results[name][0], expected[name][0])
            assert_close(results[name][0].float(), expected[name][0].float())

    @pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), 1e-44])
    def test_l2_step_of_extreme_gradients(self, bad):
        x, grad = images((2, 12)), randn((2, 12), seed=1)
        grad[0] = bad
        result, expected = x.clone(), x.clone()
        options = {"step_size": 0.1, "epsilon": 0.3, "norm": "l2"}
        pgd_step_(result, grad, x, **options)
        self.reference(pgd_step_, expected, grad, x, **options)
        assert_close(result, expected)
        assert torch.equal(result[0], x[0]) == (bad != 1e-44)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
    @pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
    def test_augment_equal_to_the_last_bit(self, layout, memory_format):
        for shape, pad, flip, cutout in (
            ((2, 3, 18, 20), 4, True, 8),
            ((2, 1, 1, 1), 0, True, 0),
            ((2, 4, 7, 11), 2**30 - 1, False, 2**30 - 1),
        ):
            pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(pad % 99))
            rows, ids = torch.tensor([1, 0, 1]), torch.tensor([2**40 + 7, -1, -(2**63)])
            fill = [0.1, 0.2, 1.0, 0.0, 0.3][: shape[1]]
            options = {"pad": pad, "flip": flip, "cutout": cutout, "fill": fill, "memory_format": memory_format}
            for seed, chosen in ((2**63 - 1, {"rows": rows}), (3, {})):
                arguments = {"sample_ids": ids if chosen else ids[:2], "seed": seed, **chosen, **options}
                result = augment(layout.lay(pixels), **arguments)
                assert same_bits(result, self.reference(augment, pixels, **arguments))
                assert result.is_contiguous(memory_format=memory_format)

    def test_augment_divides_every_byte(self):
        pixels = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
        arguments = {"sample_ids": torch.arange(4), "seed": 0}
        assert same_bits(augment(pixels, **arguments), self.reference(augment, pixels, **arguments))
        assert not augment(pixels, sample_ids=torch.arange(0), rows=torch.arange(0), seed=0).numel()

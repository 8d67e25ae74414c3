"""Every Triton kernel compiled ahead of time, as its launcher specialises it, and read back as SASS.

No GPU is needed: the launchers run on CPU tensors while a stand-in driver names the architecture and launching stops
after compilation.
"""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import sass
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 leaves nothing to compile"
    ),
    pytest.mark.skipif(bool(sass.missing_tools()), reason=sass.missing_tools()),
]

ARCHITECTURES = [80, 90, 100]
OPERATIONS = ["perturb", "restore", "sgd_step", "total_norm", "pgd_init", "pgd_step", "pgd_step_normalize"]
OPERATIONS += ["augment", "bn_act", "pooled_linear"]
# float16 compiles to the same accesses as bfloat16
DTYPES = [torch.float32, torch.bfloat16]

# arrays that a kernel reads and writes with 16-byte accesses when all is aligned
WIDE = {
    "partial_sums_kernel": (2, 0),
    "apply_kernel": (2, 2),
    "filter_kernel": (4, 2),
    "restore_kernel": (1, 1),
    # weights and gradients; a left-out step's weights
    "sgd_kernel": (3, 1),
    "sgd_norms_kernel": (0, 0),
    "norm_sums_kernel": (1, 0),
    "norm_kernel": (0, 0),
    "init_linf_kernel": (1, 1),
    "init_l2_kernel": (1, 1),
    "init_normal_kernel": (1, 1),
    "step_linf_kernel": (3, 1),
    "step_l2_kernel": (3, 1),
    # rows of eight are written whole, and read as far as they count; the images' three channels are gathered
    "normalized_linf_kernel": (0, 1),
    "normalized_l2_kernel": (0, 1),
    # x; the table is read by other threads
    "bn_statistics_kernel": (1, 0),
    "bn_normalize_kernel": (1, 1),
    "bn_gradient_sums_kernel": (2, 0),
    "bn_gradient_kernel": (2, 1),
    "bn_finish_statistics_kernel": (0, 0),
    "bn_finish_sums_kernel": (0, 0),
    # images and weights
    "pooled_linear_kernel": (2, 0),
    "pooled_linear_gradient_kernel": (1, 1),
    # bytes are gathered one by one
    "augment_kernel": (0, 1),
}
LISTS = {"partial_sums_kernel", "apply_kernel", "filter_kernel", "restore_kernel"}


@dataclass(frozen=True)
class Driver:
    """What triton asks of a driver before it launches."""

    capability: int

    def get_current_device(self) -> int:
        # compiled kernels are cached by device: one for each architecture
        return -self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return import_module("triton.backends.compiler").GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def compiled(monkeypatch, tmp_path, request):
    """A function that calls a launcher and returns the kernels that it would have launched."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    jit = import_module("triton.runtime.jit")
    monkeypatch.setattr(import_module("triton.runtime").driver, "_active", Driver(request.param))
    launch, launched = jit.JITFunction.run, {}

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        launched[kernel.hash] = (self.__name__, kernel)
        return kernel

    monkeypatch.setattr(jit.JITFunction, "run", compile_only)

    def compiled(launcher: Callable[[], Any]) -> list[sass.Kernel]:
        launched.clear()
        launcher()
        found = []
        for name, kernel in launched.values():
            path = tmp_path / f"{name}.cubin"
            path.write_bytes(kernel.asm["cubin"])
            found += sass.kernels(path)
        assert [kernel.name for kernel in found] == [name for name, _ in launched.values()]
        for kernel in found:
            assert not kernel.spills, str(kernel)
        return found

    return compiled


def operation(name: str) -> Callable[..., Any]:
    return getattr(import_module(f"awp_kernels.{name}.triton"), name)


def rule(name: str, *fields: Any) -> Any:
    """What an operation is told beside its tensors."""
    return import_module(f"awp_kernels.{name}").Rule(*fields)


def normal_start(x: Tensor) -> None:
    operation("pgd_init")(x, x, torch.arange(len(x)), 0.001, "normal", 5)


def image_steps(x: Tensor, mask: Tensor | None, norm: str) -> None:
    operation("pgd_init")(x, x, torch.arange(len(x)), 8 / 255, norm, 5)
    operation("pgd_step")(x, x, x, mask, 0.1, 8 / 255, norm, 0.0, 1.0)


def weight_steps(out: list[Tensor], weights: list[Tensor], grads: list[Tensor], saved: list[Tensor]) -> None:
    for scope in ("layer", "global", "filter"):
        told = rule("perturb", 0.01, scope, 1e-20, "relative", 0.0, None, [], None)
        operation("perturb")(out, weights, grads, saved, told)
    operation("restore")(weights, weights)


def every_length(weights: list[Tensor], scope: str) -> None:
    for scale, bound in (("absolute", None), ("elementwise", None), ("relative", 0.01), ("elementwise", 0.01)):
        told = rule("perturb", 0.01, scope, 1e-20, scale, 0.0, bound, [], None)
        operation("perturb")(weights, weights, weights, weights, told)


def optimizer_step(
    weights: list[Tensor], grads: list[Tensor], lists: dict[str, list[Tensor]], *, clip: bool, numbers: bool
) -> None:
    """A step with the lists of `lists`, and with numbers in memory or known to the host."""
    fp32, fp64 = torch.zeros((), dtype=torch.float32), torch.zeros((), dtype=torch.float64)
    operation("sgd_step")(
        weights,
        grads,
        *(lists.get(name, []) for name in ("momentum_buffers", "averages", "out")),
        rule(
            "sgd_step",
            [0.1] * len(weights),
            0.0 if numbers else 0.1,
            fp64 if numbers else None,
            0.9,
            clip,
            fp32 if numbers else None,
            torch.zeros((), dtype=torch.bool) if clip else fp32 if numbers else None,
            fp64 if clip else fp32 if numbers else None,
            1.0 if clip else None,
            0.0 if numbers else 0.1,
            fp32 if numbers else None,
        ),
    )


def assert_wide(kernels: list[sass.Kernel], *, saved: bool = True, relative: bool = True) -> None:
    for kernel in kernels:
        loads, stores = WIDE[kernel.name]
        # SAM's first pass reads the gradients alone
        loads -= kernel.name == "partial_sums_kernel" and not relative
        stores -= kernel.name in ("apply_kernel", "filter_kernel") and not saved
        assert kernel.wide_loads >= loads, str(kernel)
        assert kernel.wide_stores >= stores, str(kernel)


def test_every_kernel_is_known():
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    modules = [import_module(f"awp_kernels.{name}.triton") for name in OPERATIONS]
    assert {name for module in modules for name in vars(module) if name.endswith("_kernel")} == set(WIDE)


@pytest.mark.parametrize("compiled", ARCHITECTURES, ids="sm_{}".format, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(compiled, dtype):
    weights = [torch.zeros(64, 16, 3, 3, dtype=dtype)]
    kernels = compiled(lambda: weight_steps(weights, weights, weights, weights))
    assert {kernel.name for kernel in kernels} == LISTS
    assert_wide(kernels)


@pytest.mark.parametrize("compiled", ARCHITECTURES, ids="sm_{}".format, indirect=True)
def test_weights_into_another_dtype(compiled):
    weights = [torch.zeros(64, 16, 3, 3)]
    into = [torch.zeros(64, 16, 3, 3, dtype=torch.bfloat16)]
    kernels = compiled(lambda: weight_steps(into, weights, weights, []))
    assert {kernel.name for kernel in kernels} == LISTS
    assert_wide(kernels, saved=False)


@pytest.mark.parametrize(
    ("compiled", "dtype", "scope"),
    [(80, torch.float32, "filter"), (90, torch.bfloat16, "layer"), (100, torch.float32, "layer")],
    indirect=["compiled"],
    ids=str,
)
def test_every_length(compiled, dtype, scope):
    weights = [torch.zeros(64, 16, 3, 3, dtype=dtype)]
    kernels = compiled(lambda: every_length(weights, scope))
    # the sums are those of three scales
    assert len(kernels) == (4 if scope == "filter" else 3 + 4)
    assert_wide(kernels, relative=False)


@pytest.mark.parametrize("compiled", ARCHITECTURES, ids="sm_{}".format, indirect=True)
@pytest.mark.parametrize("grad", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("names", "clip", "numbers"),
    [
        ((), False, False),
        (("momentum_buffers", "averages", "out"), True, True),
        (("momentum_buffers", "out"), False, True),
        (("averages",), True, False),
    ],
    ids=["plain", "all", "numbers", "clip"],
)
def test_optimizer_step(compiled, grad, names, clip, numbers):
    """Two kernels, whose reads and writes of every list take 16 bytes where a dtype's 8 elements hold as many."""
    weights = [torch.zeros(64, 16, 3, 3)]
    lists = {name: [torch.zeros(64, 16, 3, 3, dtype=torch.bfloat16 if name == "out" else None)] for name in names}
    step, norms = compiled(
        lambda: optimizer_step(weights, [w.to(grad) for w in weights], lists, clip=clip, numbers=numbers)
    )
    assert (step.name, norms.name) == ("sgd_kernel", "sgd_norms_kernel")
    assert_wide([step, norms])
    fp32 = [name for name in names if name != "out"]
    # a weight's 8 elements are two accesses, and the copy is written by both branches
    assert step.wide_loads >= WIDE["sgd_kernel"][0] + len(fp32), str(step)
    assert step.wide_stores >= WIDE["sgd_kernel"][1] + len(names) + ("out" in names), str(step)


@pytest.mark.parametrize("compiled", ARCHITECTURES, ids="sm_{}".format, indirect=True)
def test_total_norm(compiled):
    kernels = compiled(lambda: operation("total_norm")([torch.zeros(4096, dtype=dtype) for dtype in DTYPES]))
    # one a dtype, and the one that adds up
    assert [kernel.name for kernel in kernels] == ["norm_sums_kernel", "norm_sums_kernel", "norm_kernel"]
    assert_wide(kernels)


@pytest.mark.parametrize("compiled", ARCHITECTURES, ids="sm_{}".format, indirect=True)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_weights_whose_norms_are_known(compiled, scope):
    weights, grads = [torch.zeros(64, 16, 3, 3)], [torch.zeros(64, 16, 3, 3)]
    norms = torch.zeros(1, dtype=torch.float64)
    told = rule("perturb", 0.01, scope, 1e-20, "relative", 0.0, None, [], norms)
    kernels = compiled(lambda: operation("perturb")(grads, weights, grads, [], told))
    assert [kernel.name for kernel in kernels] == ["partial_sums_kernel", "apply_kernel"]
    assert_wide(kernels, saved=False, relative=False)


@pytest.mark.parametrize("compiled", ARCHITECTURES, ids="sm_{}".format, indirect=True)
def test_normal_start(compiled):
    for x in (torch.zeros(16, 3, 32, 32), torch.zeros(16, 3, 32, 32).to(memory_format=torch.channels_last)):
        (kernel,) = compiled(lambda x=x: normal_start(x))
        assert kernel.name == "init_normal_kernel"
        assert_wide([kernel])


@pytest.mark.parametrize("compiled", ARCHITECTURES, ids="sm_{}".format, indirect=True)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("dtype", "masked"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=["float32", "float32-masked-channels_last", "bfloat16"],
)
def test_images(compiled, dtype, norm, masked):
    x = torch.zeros(16, 3, 32, 32, dtype=dtype)
    if masked:
        x = x.contiguous(memory_format=torch.channels_last)
    mask = torch.empty_like(x, dtype=torch.uint8) if masked else None
    kernels = compiled(lambda: image_steps(x, mask, norm))
    assert {kernel.name for kernel in kernels} == {f"init_{norm}_kernel", f"step_{norm}_kernel"}
    assert_wide(kernels)


@pytest.mark.parametrize("compiled", [90], ids="sm_{}".format, indirect=True)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(3, 3, 7, 5), (1, 1)], ids=str)
def test_images_of_odd_sizes(compiled, shape, norm):
    """Other specialisations: sizes that 16 does not divide, sizes of 1, misaligned memory."""
    x = torch.zeros(torch.Size(shape).numel() + 1)[1:].view(shape)
    mask = torch.ones_like(x, dtype=torch.uint8)
    assert len(compiled(lambda: image_steps(x, mask, norm))) == 2


@pytest.mark.parametrize("compiled", ARCHITECTURES, ids="sm_{}".format, indirect=True)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_to_a_normalised_input(compiled, dtype, masked, norm):
    """In rows of eight, and of a number that is no power of two, for images in another order."""
    vector = torch.zeros(3)
    for shape, filled, order in (
        ((16, 3, 32, 32), 8, torch.channels_last),
        ((2, 3, 7, 5), 5, torch.contiguous_format),
    ):
        x = torch.zeros(shape).contiguous(memory_format=order)
        rows = torch.zeros((shape[0], filled, *shape[2:]), dtype=dtype).contiguous(memory_format=torch.channels_last)
        mask = torch.empty_like(x, dtype=torch.uint8) if masked else None
        given = (x, rows, x, mask, rows, vector, vector, 0.1, 8 / 255, norm, 0.0, 1.0)
        (kernel,) = compiled(lambda given=given: operation("pgd_step_normalize")(*given))
        assert kernel.name == f"normalized_{norm}_kernel"
        if filled == 8:
            assert_wide([kernel])


@pytest.mark.parametrize("compiled", ARCHITECTURES, ids="sm_{}".format, indirect=True)
@pytest.mark.parametrize("chosen", [True, False], ids=["rows", "all"])
@pytest.mark.parametrize("orders", list(itertools.product([False, True], repeat=2)), ids=str)
def test_augment(compiled, orders, chosen):
    """Shared by all epochs: numbers that change compile nothing anew. Stores take 16 bytes."""
    images, out = torch.zeros(16, 3, 32, 32, dtype=torch.uint8), torch.zeros(16, 3, 32, 32)
    images, out = (
        t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        for t, last in zip((images, out), orders, strict=True)
    )
    ids = torch.arange(16)
    rows = ids if chosen else None

    def launch() -> None:
        for seed, pad, cutout, value in ((5, 4, 8, 0.5), (16, 1, 16, 1.0), (2**62, 0, 1, 0.25)):
            operation("augment")(images, rows, ids, rule("augment", seed, pad, True, cutout, [value] * 3), out)

    (kernel,) = compiled(launch)
    assert_wide([kernel])
    # two stores of 16 bytes a thread, and none narrower
    assert kernel.wide_stores == 2, str(kernel)


@pytest.mark.parametrize("compiled", [80, 90], ids="sm_{}".format, indirect=True)
@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (2, 5, 7, 11), (2, 16, 9, 9)], ids=str)
def test_augment_of_odd_sizes(compiled, shape):
    images, out, ids = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape), torch.arange(shape[0])
    for flip, cutout in ((False, 0), (True, 4)):
        told = rule("augment", 5, 4, flip, cutout, [0.5] * shape[1] if cutout else [])
        assert len(compiled(lambda told=told: operation("augment")(images, None, ids, told, out))) == 1


@pytest.mark.parametrize("compiled", ARCHITECTURES, ids="sm_{}".format, indirect=True)
@pytest.mark.parametrize("activation", [1, 2], ids=["relu", "silu"])
@pytest.mark.parametrize("summed", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalisation(compiled, dtype, summed, activation):
    """Forward and backward, by the batch, whole or in halves, and by running statistics."""
    x = torch.zeros(16, 64, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    channels, table = torch.zeros(64), torch.zeros(4, 64)
    residual, z = (x, x) if summed else (None, None)
    module = import_module("awp_kernels.bn_act.triton")

    def launch() -> None:
        for y, statistics in ((x, None), (None, torch.zeros(2, 64, dtype=torch.float64))):
            module.bn_act_train(x, residual, *[channels] * 4, 0.1, 1e-5, activation, z, y, table, statistics)
        module.bn_act_eval(x, residual, channels, channels, channels, channels, 1e-5, activation, z, x, table, None)
        for train, coefficients in ((True, None), (True, table), (False, None)):
            module.bn_act_backward(x, residual, x, table, None, activation, train, coefficients, x, channels, channels)

    kernels = compiled(launch)
    assert {kernel.name for kernel in kernels} == {name for name in WIDE if name.startswith("bn_")}
    assert_wide(kernels)


@pytest.mark.parametrize("compiled", [90], ids="sm_{}".format, indirect=True)
def test_normalisation_of_one_value_a_channel(compiled):
    """As a rank of several may have: Triton takes the number for a constant."""
    x, own = torch.zeros(1, 16, 1, 1), torch.zeros(2, 16, dtype=torch.float64)
    module, table, none = import_module("awp_kernels.bn_act.triton"), torch.zeros(4, 16), [None] * 4
    assert len(compiled(lambda: module.bn_act_train(x, None, *none, 0.1, 1e-5, 1, None, None, table, own))) == 2
    vectors = torch.zeros(16), torch.zeros(16)
    assert len(compiled(lambda: module.bn_act_backward(x, None, x, table, None, 1, True, None, None, *vectors))) == 2


@pytest.mark.parametrize("compiled", [90], ids="sm_{}".format, indirect=True)
def test_normalisation_of_odd_channels(compiled):
    x = torch.zeros(2, 5, 3, 3).contiguous(memory_format=torch.channels_last)
    module, table = import_module("awp_kernels.bn_act.triton"), torch.zeros(4, 16)
    none = [None] * 4
    assert len(compiled(lambda: module.bn_act_train(x, None, *none, 0.1, 1e-5, 0, None, x, table, None))) == 3
    assert len(compiled(lambda: module.bn_act_backward(x, None, x, table, None, 0, False, None, x, None, None))) == 1


def pooled(x: Tensor, weight: Tensor) -> None:
    module = import_module("awp_kernels.pooled_linear.triton")
    logits = module.pooled_linear(x, weight, torch.zeros(len(weight)))
    module.pooled_linear_gradient(logits, weight, x.shape, x.dtype)


@pytest.mark.parametrize("compiled", ARCHITECTURES, ids="sm_{}".format, indirect=True)
@pytest.mark.parametrize("classes", [10, 100, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_head(compiled, dtype, classes):
    """One launch forward and one backward; up to the most weights that are served."""
    x = torch.zeros(16, 640 if classes < 256 else 256, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernels = compiled(lambda: pooled(x, torch.zeros(classes, x.shape[1], dtype=dtype)))
    assert [kernel.name for kernel in kernels] == ["pooled_linear_kernel", "pooled_linear_gradient_kernel"]
    assert_wide(kernels)


@pytest.mark.parametrize("compiled", [90], ids="sm_{}".format, indirect=True)
@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (2, 5, 7, 3)], ids=str)
def test_heads_of_odd_sizes(compiled, shape):
    x = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    assert len(compiled(lambda: pooled(x, torch.zeros(1, shape[1])))) == 2

"""What holds for every operation, on one table of samples: `operations.py` has the operations, `fuzz.py` the rest."""

import fcntl
import functools
import itertools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz
import numpy
import pytest
import torch
from conftest import device_backends
from large_tensors import ELEMENTS, LARGE
from operations import (
    CHANNELS,
    FEW_CHANNELS,
    FILLED,
    OPERATIONS,
    WEIGHTS,
    arguments_of,
    cases,
    excess,
    mapped,
    run,
    same_bits,
)
from torch.utils._python_dispatch import TorchDispatchMode

from awp_kernels import _backend, add_bn_act, bn_act, conv3x3, pooled_linear, stem3x3, total_norm, use_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")

VARIANTS = [(name, variant) for name, operation in OPERATIONS.items() for variant in operation.variants]
# of several chunks or blocks
LARGEST = {name: list(operation.samples)[-1] for name, operation in OPERATIONS.items()}


def without(backend, name):
    """Whether the implementation lacks this operation."""
    return name.removesuffix("_") in _backend._WITHOUT.get(backend, {})


def forced(name, backend):
    """The implementation to force: those on images have no GPU's, and leave what is empty to torch."""
    return None if backend == "cpp" and (name in fuzz.IMAGE_OPERATIONS or without(backend, name)) else backend


def serving(name, target):
    """The target's backend for this operation."""
    device, backend = target
    if device != "cpu" and without(backend, name):
        pytest.skip("has no CUDA C++ kernel")
    if device != "cpu" and name in fuzz.CPU_OPERATIONS:
        pytest.skip("serves CPU tensors")
    return use_backend(forced(name, backend))


# without the reference, which is plain PyTorch
of_the_kernels = pytest.mark.parametrize(
    "target", [pair for pair in device_backends() if pair.values[0][1] != "reference"], indirect=True
)


def arguments_on(device, *case):
    return mapped(arguments_of(*case), lambda t: t.to(device))


def results(name, arguments):
    """Everything that it gives, in one list, from copies of the arguments."""
    found = run(OPERATIONS[name], mapped(arguments, lambda t: t.clone()))
    return list(itertools.chain(*found.values()))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_error_is_at_most_twice_plain_pytorchs(target, name, variant):
    """On all samples and dtypes; outputs are NaN before, and nothing of it is left."""
    device, _ = target
    operation = OPERATIONS[name]
    for case in cases():
        if case[:2] == (name, variant):
            arguments = arguments_of(*case)
            with serving(name, target):
                found = run(operation, mapped(arguments, lambda t: t.clone().to(device)))
            ratio, where = excess(operation, found, arguments)
            assert ratio <= 1, (case, where, ratio)


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("layout", fuzz.LAYOUTS)
@pytest.mark.parametrize("offset", [0, 1])
@of_the_kernels
def test_any_memory_layout_is_right_or_refused(target, name, layout, offset):
    """In all arguments, in those that are only read, and in each alone; nothing is written between the elements."""
    device, backend = target
    operation = OPERATIONS[name]
    if layout == "expanded" and name == "bn_act":
        return  # repeated values lie on either side of the kink
    serving(name, target)
    variant, sample = next(iter(operation.variants)), list(operation.samples)[-2]
    tensors = [k for k, v in arguments_of(name, variant, sample, torch.float32).items() if fuzz.listed(v)]
    outcomes = []
    for chosen in (tensors, [k for k in tensors if k not in operation.written], *([k] for k in tensors)):
        case = fuzz.Case(name, variant, torch.float32, device=device, backend=forced(name, backend))
        for key, value in arguments_of(name, variant, sample, torch.float32).items():
            own = layout if key in chosen else case.taken_layout(key)
            hold = functools.partial(case.held.hold, layout=own, offset=offset)
            case.arguments |= mapped({key: value}, hold)
        outcomes.append(case.check())
    assert outcomes[1] == "equal"


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
@of_the_kernels
def test_250_repeats_give_the_same_bits(target, name, variant):
    device, _ = target
    arguments = arguments_on(device, name, variant, "primes", torch.float32)
    with serving(name, target):
        first = results(name, arguments)
        assert all(same_bits(results(name, arguments), first) for _ in range(249))


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
@of_the_kernels
def test_8_threads_at_once(target, name, variant):
    """Each with arguments of its own, and with all that is only read in common."""
    device, _ = target
    arguments = arguments_on(device, name, variant, LARGEST[name], torch.float32)

    def repeat(_):
        return all(same_bits(results(name, arguments), first) for _ in range(5))

    with serving(name, target), ThreadPoolExecutor(8) as pool:
        first = results(name, arguments)
        assert all(pool.map(repeat, range(8)))


class Recorded(TorchDispatchMode):
    """Calls of this package's operations that torch sees."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "awp":
            copied = torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, args)
            self.calls.append((func, copied, dict(kwargs or {})))
        return func(*args, **kwargs or {})


def opchecks():
    """Every operation with every sample; variants and dtypes take turns."""
    for name, operation in OPERATIONS.items():
        if name in fuzz.IMAGE_OPERATIONS:
            continue
        # traced results are compared as numbers, of which NaN, the operator's word for "not followed", is none
        variants = [variant for variant in operation.variants if not variant.startswith("spoiled")]
        dtypes = operation.dtypes
        for i, sample in enumerate(operation.samples):
            yield name, variants[-1 - i % len(variants)], sample, dtypes[i % len(dtypes)]


@pytest.mark.parametrize("case", list(opchecks()), ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(device, case):
    """torch.library.opcheck with all its utilities: schema, autograd, fake tensors, traced with dynamic shapes."""
    with Recorded() as recorded:
        run(OPERATIONS[case[0]], arguments_on(device, *case))
    ((operation, arguments, options),) = recorded.calls
    assert set(torch.library.opcheck(operation, arguments, options).values()) == {"SUCCESS"}


@pytest.mark.parametrize("sample", ["one", "edges"])
def test_opcheck_of_the_convolution_and_its_gradients(sample):
    arguments = arguments_of("conv3x3", "", sample, torch.float32)
    x, weight, grad = arguments["x"], arguments["weight"], arguments["grad"]
    for operation, inputs in (
        (torch.ops.awp.conv3x3.default, (x, weight, False)),
        (torch.ops.awp.conv3x3_grad_x.default, (grad, weight, False)),
        (torch.ops.awp.conv3x3_grad_weight.default, (grad, x)),
    ):
        assert set(torch.library.opcheck(operation, inputs).values()) == {"SUCCESS"}
    # With gradients torch 2.14's opcheck traces copies of the inputs, and warns of its own reading their `.grad`: what
    # it does with them is done below by leaves.
    inputs, checks = (x.requires_grad_(), weight.requires_grad_(), False), ("test_schema", "test_autograd_registration")
    operation = torch.ops.awp.conv3x3.default
    assert set(torch.library.opcheck(operation, inputs, test_utils=checks).values()) == {"SUCCESS"}
    torch.compiler.reset()
    traced = torch.compile(operation, fullgraph=True, dynamic=True, backend="aot_eager")
    outputs = [function(*inputs) for function in (operation, traced)]
    assert torch.equal(*outputs)
    for one, other in zip(*(torch.autograd.grad(y, inputs[:2], grad) for y in outputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradcheck(training):
    """In fp64, where a gradient is; the compiled kernels' gradients are compared with those in the tests above."""
    arguments = arguments_of("conv3x3", "", "one", torch.float64)
    inputs = [torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 3, 3, dtype=torch.float64)]
    for x, weight in (inputs, [arguments["x"], arguments["weight"]]):
        assert torch.autograd.gradcheck(conv3x3, (x.requires_grad_(), weight.requires_grad_()))
    arguments = OPERATIONS["bn_act"].build([(3, 4, 3, 2), (1,)], torch.float64, training=training, activation="relu")
    inputs = [arguments[key].requires_grad_() for key in ("x", "weight", "bias")]
    statistics = arguments["running_mean"], arguments["running_var"]

    def normalised(x, weight, bias):
        return bn_act(x, weight, bias, *(t.clone() for t in statistics), training=training)

    assert normalised(*inputs).abs()[normalised(*inputs) > 0].min() > 1e-4
    assert torch.autograd.gradcheck(normalised, inputs)


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_whole_and_with_dynamic_shapes(device, name):
    """The same bits as eagerly, with the most options, at three sizes, the first of which is what was traced."""
    operation = OPERATIONS[name]
    variant = list(operation.variants)[-1]
    if name in fuzz.CPU_OPERATIONS and device != "cpu":
        pytest.skip("serves CPU tensors")
    torch.compiler.reset()
    # "aot_eager" traces and functionalises as every backend does, and needs no C++ compilation of its own
    compiled = torch.compile(lambda a: run(operation, a), fullgraph=True, dynamic=True, backend="aot_eager")
    sizes = {"weights": ([(4, 3, 3), (5,)], [(6, 2, 5), (7,)], [(9, 4, 2), (33,)])}
    sizes["images"] = ([(4, 3, 6, 5)], [(5, 3, 8, 8)], [(3, 3, 7, 9)])
    sizes["channels"] = tuple([*shape, (4,)] for shape in sizes["images"])
    sizes["filled"] = tuple([*shape, (8,)] for shape in sizes["images"])
    kinds = ((WEIGHTS, "weights"), (CHANNELS, "channels"), (FEW_CHANNELS, "channels"), (FILLED, "filled"))
    kind = next((kind for samples, kind in kinds if operation.samples is samples), "images")
    for shapes in sizes[kind]:
        arguments = mapped(
            operation.build(shapes, torch.float32, **operation.variants[variant]), lambda t: t.to(device)
        )
        # gradients are autograd's to trace
        if kind == "channels":
            _compiled_images_agree(name, arguments)
            continue
        eager = run(operation, mapped(arguments, lambda t: t.clone()))
        for key, found in compiled(mapped(arguments, lambda t: t.clone())).items():
            assert same_bits(found, eager[key]), key


def _compiled_images_agree(name, arguments):
    function = {"conv3x3": conv3x3, "stem3x3": stem3x3, "bn_act": add_bn_act, "pooled_linear": pooled_linear}[name]
    grads = [arguments.pop(key) for key in ("grad_z", "grad") if key in arguments]
    inputs = [key for key in ("x", "residual", "weight", "bias") if key in arguments]
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    found = []
    for call in (function, compiled):
        own = mapped(arguments, lambda t: t.clone())
        leaves = [own[key].requires_grad_() for key in inputs]
        outputs = fuzz.listed(call(**own))
        found.append([*map(torch.clone, outputs), *torch.autograd.grad(outputs, leaves, grads)])
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_autocast_changes_no_bit_of_what_is_not_on_images(target, name, variant):
    device, _ = target
    if name in fuzz.IMAGE_OPERATIONS:
        return  # cast as torch's own: test_conv.py
    arguments = arguments_on(device, name, variant, "primes", torch.float32)
    with serving(name, target):
        expected = results(name, arguments)
        with torch.autocast(device, torch.bfloat16):
            assert same_bits(results(name, arguments), expected)


@pytest.mark.parametrize("target", [("cpu", "cpp")], indirect=True)
def test_the_norm_of_more_than_2_to_31_elements(target):
    """Zeros that the system has not handed out yet take no memory; `large_tensors.py` has the other operations."""
    wide = torch.from_numpy(numpy.zeros(2**31 + 11, dtype=numpy.float16))
    wide[0], wide[2**31], wide[-1] = 2.0, 4.0, 4.0
    assert total_norm([wide]) == 6.0
    # and strides beyond 2^31
    assert total_norm([wide.as_strided((2,), (2**31 + 10,))]) == 20**0.5


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(LARGE))
def test_more_than_2_to_31_elements(target, name):
    device, backend = target
    if device != "cuda" or backend == "reference":
        pytest.skip("for the kernels; on the CPU by python tests/soak/large_tensors.py")
    serving(name, target)
    # one process at a time: several would all find the memory free, and then share it
    with (Path(tempfile.gettempdir()) / "awp-large-tensors.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 40 * 2**30:
            pytest.skip("needs 40 GiB of device memory")
        LARGE[name](ELEMENTS, device)
        # the cache of this process is no one else's
        torch.cuda.empty_cache()


ON_GPU = pytest.mark.parametrize(
    ("backend", "name", "variant"),
    [
        (backend, name, variant)
        for backend in ("cuda", "triton")
        for name, variant in VARIANTS
        if name not in fuzz.CPU_OPERATIONS and not without(backend, name)
    ],
)


@pytest.mark.gpu
@ON_GPU
def test_4_streams_at_once(backend, name, variant):
    arguments = arguments_on("cuda", name, variant, LARGEST[name], torch.float32)
    with use_backend(backend):
        first = results(name, arguments)
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream() for _ in range(4)], []
        for stream in streams * 5:
            with torch.cuda.stream(stream):
                found.append(results(name, arguments))
        torch.cuda.synchronize()
    assert all(same_bits(other, first) for other in found)


@pytest.mark.gpu
@ON_GPU
def test_another_device_than_the_current_one(backend, name, variant):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    arguments = arguments_of(name, variant, "primes", torch.float32)
    with use_backend(backend), torch.cuda.device(0):
        first = results(name, mapped(arguments, lambda t: t.to("cuda:0")))
        assert same_bits(results(name, mapped(arguments, lambda t: t.to("cuda:1"))), first)
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@ON_GPU
def test_replay_of_a_captured_graph(backend, name, variant):
    """With the arguments that lie in the captured memory at the replay."""
    operation = OPERATIONS[name]
    first, second = (arguments_on("cuda", name, variant, LARGEST[name], torch.float32, seed) for seed in (0, 1))
    # what the host reads belongs to the capture
    second |= {key: value for key, value in first.items() if not fuzz.listed(value)}
    with use_backend(backend):
        expected = run(operation, mapped(second, lambda t: t.clone()))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(operation, mapped(first, lambda t: t.clone()))
        torch.cuda.current_stream().wait_stream(stream)
        captured, graph = mapped(first, lambda t: t.clone()), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(operation, captured)
        for _ in range(2):
            for key, value in captured.items():
                for held, new in zip(fuzz.listed(value), fuzz.listed(second[key]), strict=True):
                    held.copy_(new)
            graph.replay()
            torch.cuda.synchronize()
            assert all(same_bits(found[key], expected[key]) for key in expected)

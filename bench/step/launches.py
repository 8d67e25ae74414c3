"""Counts the launches of a training step on a GPU, without one.

    python -m bench.step.launches

A step of AT-AWP with PGD-10 is made on the CPU as CUDA would make it, in fp16 with torch's convolutions, under
torch.profiler. Every operation of ATen that computes counts as the launches that it makes on CUDA, and every one of
this package as those that the emulator of tests/kernels/cuda_host counts. Once with this package's layers
(normalisation, residual sum and activation in one operation, the end of the network in another), and once with torch's.
Widths do not matter, so the models are narrow.
"""

import argparse
import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from awp_engine.attack import Attack
from awp_engine.cli.command_line import OneLineParser, fail
from awp_engine.config import OptimizerConfig
from awp_engine.data import Batch
from awp_engine.models import build_model, layers
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.awp_step import AwpStep
from awp_engine.step.objectives import build_objective
from awp_engine.step.precision import Precision, WorkingModels
from awp_engine.step.values import Phase
from awp_kernels import AdversarialWeightPerturbation
from awp_kernels._images import operations
from awp_kernels.pooled_linear import reference as pooled_linear_reference
from bench.tables import markdown

_PROG = "launches.py"
# what is counted, and the narrow model that launches as much
MODELS = {"PreActResNet-18": ("preact-resnet-18", 16), "WRN-34-10": ("wrn-34-1", None)}

_CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")
_NORMALISATIONS = ("bn_act_train", "bn_act_backward", "aten::native_batch_norm", "aten::native_batch_norm_backward")
_ACTIVATIONS = ("aten::relu_", "aten::threshold_backward")

# of this package, in train mode, for lists of tensors that one table holds
_OWN = {"bn_act_train": 3, "bn_act_backward": 3, "perturb": 2, "total_norm": 2, "sgd_step": 2}
_OWN |= {"pgd_init": 1, "pgd_step": 1, "pooled_linear": 1, "pooled_linear_gradient": 1}

# of ATen, where the CPU takes another number of operations for one launch: also where it converts a number first
_ONE = "native_batch_norm native_batch_norm_backward relu_ convolution addmm mm avg_pool2d avg_pool2d_backward "
_ONE += "mean sum all any aminmax nan_to_num_ _amp_update_scale_ add add_ sub mul div div_ eq ne lt le gt ge"
_WHOLE = {f"aten::{operation}": 1 for operation in _ONE.split()}
# zeros, then one gradient a sample
_WHOLE |= {"aten::nll_loss_backward": 2}
# a check of values that the host reads here: on CUDA it is negated, and asserted on the device
_WHOLE |= {"aten::_local_scalar_dense": 2}

# memory, shapes and types
_NOTHING = "empty empty_strided empty_like new_empty as_strided as_strided_ resize_ resize_as_ view reshape flatten "
_NOTHING += "transpose t expand select slice unsqueeze unsqueeze_ squeeze_ detach to contiguous promote_types "
_NOTHING += "resolve_conj"
_NO_LAUNCH = {f"aten::{operation}" for operation in _NOTHING.split()}


class _HalfKernels:
    """The CPU's kernels of `bn_act` for fp16 images, which CUDA's take: by way of fp32."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            with record_function(f"awp_cuda::{name}"):
                wide = [a.float() if isinstance(a, Tensor) and a.dtype == torch.float16 else a for a in arguments]
                getattr(operations(), name)(*wide)
                for given, computed in zip(arguments, wide, strict=True):
                    if given is not computed:
                        # .data: for autograd a kernel's images have not changed
                        given.data.copy_(computed)

        return call


class _PooledLinear:
    """The definition of `pooled_linear` and of its gradient, where Triton's kernels would run."""

    def __getattr__(self, name: str) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            with record_function(f"awp_cuda::{name}"):
                found = getattr(pooled_linear_reference, name)(*arguments)
                # a gradient of images is written out
                return found.contiguous(memory_format=torch.channels_last) if found.ndim == 4 else found

        return call


@contextlib.contextmanager
def _replaced(module: Any, **given: object) -> Iterator[None]:
    before = {name: getattr(module, name) for name in given}
    try:
        for name, value in given.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextlib.contextmanager
def _as_on_cuda(*, fused: bool) -> Iterator[None]:
    """A block in which fp16 images on the CPU take the way of images on CUDA: this package's layers, or torch's."""
    kernels, head = _HalfKernels(), _PooledLinear()
    norm, pool = (importlib.import_module(f"awp_kernels.{name}") for name in ("bn_act", "pooled_linear"))

    def never(*_: object) -> bool:
        return False

    def always(*_: object) -> bool:
        return True

    with (
        _replaced(layers, conv3x3_available=never, stem3x3_available=never, pooled_linear_available=always),
        _replaced(norm, serving=lambda x: "cuda", _implementation=lambda backend: kernels),
        _replaced(pool, pooled_linear_available=always, _kernels=lambda: head),
        contextlib.nullcontext() if fused else _replaced(layers, bn_act_available=never, pooled_linear_available=never),
    ):
        yield


def count(events: Iterable[FunctionEvent]) -> Counter[str]:
    """The launches of each operation among a profiler's events.

    Raises:
        ValueError: an operation of this package whose launches are not known.
    """
    found: Counter[str] = Counter()

    def visit(event: FunctionEvent) -> bool:
        """Whether the event is an operation, or holds one."""
        name = event.name
        library, _, operation = name.rpartition("::")
        if library in ("awp_cuda", "awp_cpp"):
            if operation not in _OWN:
                raise ValueError(f"{name}: expected one of {', '.join(_OWN)}; add its launches to {__name__}")
            found[operation] += _OWN[operation]
        elif name == "aten::convolution_backward":
            # a launch for the images, one for the weight
            found[name] += sum(event.concrete_inputs[-1][:2])
        elif name in _WHOLE:
            found[name] += _WHOLE[name]
        # all of them are visited
        elif not sum(visit(child) for child in event.cpu_children):
            if library != "aten":
                return False
            found[name] += name not in _NO_LAUNCH
        return True

    for event in events:
        if event.cpu_parent is None:
            visit(event)
    return found


def step_launches(name: str, *, fused: bool, steps: int = 10) -> Counter[str]:
    """The launches of each operation in a step of AT-AWP with the model of a name in `MODELS`, by PGD of `steps`.

    Raises:
        RuntimeError: the library is missing whose kernels stand in for CUDA's.
    """
    if operations() is None:
        raise RuntimeError("the CPU library is missing, which stands in for CUDA's; see python -m awp_kernels")
    torch.manual_seed(0)
    built, width = MODELS[name]
    model = build_model(built, 10, (0.5,) * 3, (0.25,) * 3, width=width).train()
    # torch's stub does not know the keyword
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    models = WorkingModels(model, Precision(attack=torch.float16, ascent=torch.float16, descent=torch.float16))
    models.refresh_()
    step = AwpStep(
        models=models,
        optimizer=build_optimizer(model, OptimizerConfig(), working=models.updated),
        objective=build_objective("at"),
        awp=AdversarialWeightPerturbation(model, 0.005, working=models.working),
    )
    images = torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.tensor([0, 1]), torch.arange(2), len(images))
    phase = Phase(attack=Attack(epsilon=8 / 255, step_size=2 / 255, steps=steps, bn_mode="train"), lr=0.1)
    with _as_on_cuda(fused=fused):
        # momentum is made in the first
        step(batch, phase)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            step(batch, phase)
    return count(recorded.events() or ())


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print."""
    form = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog=_PROG, description=__doc__, formatter_class=form)
    parser.add_argument("--all", action="store_true", help="every operation by name as well")
    arguments = parser.parse_args(argv)
    rows, named = [], []
    for name in MODELS:
        for fused in (False, True):
            try:
                found = step_launches(name, fused=fused)
            except (RuntimeError, ValueError) as error:
                fail(str(error), code=1, prog=_PROG)
            kinds = [sum(found[each] for each in kind) for kind in (_CONVOLUTIONS, _NORMALISATIONS, _ACTIVATIONS)]
            cells = [found.total(), *kinds, found.total() - sum(kinds)]
            served = "`bn_act`, `pooled_linear`" if fused else "torch"
            rows.append([f"{name}, {served}", *(f"{cell:,}" for cell in cells)])
            told = ", ".join(f"{each} {number}" for each, number in found.most_common() if number)
            named.append(f"{rows[-1][0]}: {told}")
    print(markdown(["launches of a step", "all", "convolutions", "normalisation", "activation", "rest"], rows))
    if arguments.all:
        print("", *named, sep="\n")


if __name__ == "__main__":
    main()

"""Seeded fuzzing of every operation: shapes, dtypes, memory layouts, values, options, and arguments that are wrong.

    python tests/soak/fuzz.py                        2,000 cases on the CPU
    python tests/soak/fuzz.py --seed 7 --case 42     one of them again
    python tests/soak/fuzz.py --device cuda --backend triton

Every tensor lies between guards in memory of its own. A case passes if the call equals the definition in fp64 to at
most twice plain PyTorch's error (values at the ends of a dtype's range, NaN and infinity: if it equals the reference),
or if it raises ValueError naming an argument, where the case is one to be refused; and if no byte outside what it may
write has changed. A failure prints the command that repeats it. The exit code is 1 if any case failed.
"""

import argparse
import math
import random
import re
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from operations import (
    BYTES,
    CHANNELS,
    FEW_CHANNELS,
    FILLED,
    IMAGES,
    OPERATIONS,
    WEIGHTS,
    Arguments,
    Operation,
    Results,
    Shape,
    clear_of_the_kink,
    excess,
    listed,
    mapped,
    run,
    same_bits,
)
from torch import Tensor

from awp_kernels import (
    bn_act_available,
    conv3x3_available,
    pooled_linear_available,
    stem3x3_available,
    use_backend,
)

CASES = 2000
GUARD = 64  # elements; a multiple of every alignment
FP64 = torch.float64
IMAGE_OPERATIONS = ("conv3x3", "stem3x3", "bn_act", "pooled_linear")
CPU_OPERATIONS = ("conv3x3", "stem3x3")
SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 32, 33)


# ---- shapes, options, values


def _shape(rng: random.Random, dimensions: int, limit: int) -> Shape:
    """Sizes drawn one by one, none that makes the tensor larger than `limit`."""
    shape: list[int] = []
    for _ in range(dimensions):
        room = limit // max(1, math.prod(shape))
        shape.append(rng.choice([size for size in SIZES if size <= room]))
    return tuple(shape)


def shapes_for(rng: random.Random, operation: Operation) -> list[Shape]:
    if operation.samples is IMAGES:
        return [_shape(rng, rng.randint(1, 5), 5000)]
    if operation.samples is CHANNELS:
        samples, height, width = rng.choice((0, 1, 2, 3, 5)), rng.randint(0, 13), rng.randint(1, 13)
        return [(samples, rng.choice((1, 2, 3, 15, 16, 17, 33)), height, width), (rng.choice((1, 7, 16, 33)),)]
    if operation.samples is FEW_CHANNELS:
        samples, height, width = rng.choice((0, 1, 2, 3)), rng.randint(1, 13), rng.randint(1, 20)
        return [(samples, rng.randint(1, 5), height, width), (rng.choice((1, 16, 32, 48)),)]
    if operation.samples is FILLED:
        channels = rng.choice((1, 2, 3, 3, 3, 5))
        sizes = (rng.choice((0, 1, 2, 3)), channels, rng.choice((0, 1, 2, 4, 7, 8)), rng.choice((1, 2, 4, 5, 16)))
        return [sizes, (rng.choice((channels, channels + 1, 8, 8, 8)),)]
    if operation.samples is BYTES:
        size = rng.choice((3, 8, 33, 70))
        sizes = (
            rng.choice((0, 1, 2, 3, 5)),
            rng.choice((1, 1, 2, 3, 3, 3, 4, 9)),
            rng.randint(0, size),
            rng.randint(1, size),
        )
        return [sizes]
    assert operation.samples is WEIGHTS
    kind = rng.random()
    if kind < 0.04:  # more tensors than a launch takes
        return [_shape(rng, 2, 20) for _ in range(rng.randint(225, 400))]
    if kind < 0.08:  # several chunks
        return [(rng.randint(16_000, 70_000),), (3, rng.randint(5000, 20_000))]
    return [_shape(rng, rng.randint(0, 5), 3000) for _ in range(rng.randint(1, 6))]


def options_for(rng: random.Random, name: str, shapes: Sequence[Shape]) -> Arguments:
    """Numbers within their range, on top of a variant's."""
    if name in ("perturb_", "perturb_into_"):
        options: Arguments = {"gamma": rng.choice((0.0, 1e-3, 0.01, -0.5, 2.0)), "eps": rng.choice((0.0, 1e-20, 1e-3))}
        if name == "perturb_into_":
            options["grad"] = rng.choice((None, torch.float16, torch.bfloat16))
        return options
    if name == "sgd_step_":
        options = {"lr": rng.choice((0.0, 0.1, 1.5)), "out": rng.choice((None, torch.float32, torch.float16))}
        if rng.random() < 0.3:
            options["weight_decay"] = [rng.choice((0.0, 0.01, 0.5)) for _ in shapes]
        return options
    return {
        "pgd_init_": {"epsilon": rng.choice((0.0, 1 / 255, 0.1, 0.5, 1.0))},
        "pgd_init_normal_": {"std": rng.choice((0.0, 0.001, 0.3))},
        "pgd_step_": {"epsilon": rng.choice((0.0, 0.1, 1.0)), "step_size": rng.choice((0.0, 0.02, -0.3, 2.0))},
        "pgd_step_normalize_": {
            "epsilon": rng.choice((0.0, 0.1, 1.0)),
            "step_size": rng.choice((0.0, 0.02, -0.3, 2.0)),
        },
        "augment": {"pad": rng.choice((0, 1, 4, 100)), "flip": rng.random() < 0.5, "cutout": rng.choice((0, 1, 8, 99))},
        "bn_act": {"eps": rng.choice((1e-5, 1e-2)), "momentum": rng.choice((0.0, 0.1, 1.0))},
    }.get(name, {})


def _some(rng: random.Random, tensor: Tensor, value: float) -> Tensor:
    """The tensor with one to three of its values replaced."""
    flat = tensor.reshape(-1)
    for _ in range(rng.randint(1, 3)):
        if len(flat):
            flat[rng.randrange(len(flat))] = value
    return tensor


# what is done to the values of an argument; all but the first are compared with the reference
VALUES: dict[str, Callable[[random.Random, Tensor], Tensor]] = {
    "as drawn": lambda rng, t: t,
    "zeros": lambda rng, t: t.zero_(),
    "denormal": lambda rng, t: t.mul_(torch.finfo(t.dtype).tiny / 4),
    "tiny": lambda rng, t: t.mul_(torch.finfo(t.dtype).tiny * 8),
    "huge": lambda rng, t: t.mul_(math.sqrt(torch.finfo(t.dtype).max)),
    "nan": lambda rng, t: _some(rng, t, math.nan),
    "inf": lambda rng, t: _some(rng, _some(rng, t, math.inf), -math.inf),
}


# ---- memory


def strides_of(layout: str, shape: Shape) -> tuple[int, ...]:
    """Strides of a layout; "rows" and "sliced" leave gaps, "expanded" repeats elements."""
    order = list(range(len(shape)))  # from the outermost dimension to the innermost
    if layout == "transposed":
        order[1:] = order[:0:-1]
    if layout == "reversed":
        order.reverse()
    if layout == "channels_last" and len(shape) > 2:
        order = [0, *order[2:], 1]
    strides, step = [0] * len(shape), 2 if layout == "sliced" else 1
    for place, dimension in enumerate(reversed(order)):
        strides[dimension] = step
        step *= max(1, shape[dimension]) + (3 if layout == "rows" and place == 0 else 0)
    if layout == "expanded" and shape:
        strides[shape.index(max(shape))] = 0
    return tuple(strides)


DENSE = ("contiguous", "transposed", "channels_last", "reversed")
LAYOUTS = (*DENSE, "sliced", "rows", "expanded")


def _offsets(tensor: Tensor) -> Tensor:
    """Where a tensor's elements lie, in elements from its first."""
    result = torch.zeros(tensor.shape, dtype=torch.int64)
    for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        result += (torch.arange(size) * stride).reshape(-1, *[1] * (tensor.ndim - dimension - 1))
    return result


class Held:
    """Tensors between guards, each in memory of its own; knows what lay around them."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.memory: list[tuple[Tensor, Tensor, Tensor]] = []

    def hold(self, tensor: Tensor, layout: str = "contiguous", offset: int = 0) -> Tensor:
        strides = strides_of(layout, tuple(tensor.shape))
        extent = 1 + sum(max(0, n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) if tensor.numel() else 0
        memory = torch.empty(extent + 2 * GUARD + offset, dtype=tensor.dtype, device=self.device)
        memory.view(torch.uint8).fill_(0xA5)
        view = memory.as_strided(tensor.shape, strides, GUARD + offset)
        if layout == "expanded" and tensor.ndim and tensor.numel():
            dimension = tensor.shape.index(max(tensor.shape))
            view.narrow(dimension, 0, 1).copy_(tensor.narrow(dimension, 0, 1))
        else:
            view.copy_(tensor)
        self.memory.append((view, memory, memory.clone()))
        return view

    def changed(self, written: Sequence[Tensor]) -> str | None:
        """What was changed that must not be: anything but the elements of `written`."""
        for view, memory, before in self.memory:
            free = torch.zeros(len(memory), dtype=torch.bool)
            if any(view is t for t in written):
                free[(_offsets(view) + view.storage_offset()).reshape(-1)] = True
            now, then = (m.cpu()[~free].view(torch.uint8) for m in (memory, before))
            if not torch.equal(now, then):
                return f"memory of shape {tuple(view.shape)}, strides {view.stride()} was changed outside of it"
        return None


# ---- what must be refused


def _outermost(tensor: Tensor) -> bool:
    """Whether every entry of dimension 0 is a run of memory of its own, in order."""
    if tensor.ndim < 2 or not tensor.numel():
        return True
    runs = _offsets(tensor).flatten(1)
    size = runs.shape[1]
    return bool((runs.sort(dim=1).values == torch.arange(runs.numel()).reshape(-1, size)).all())


def _dense(tensor: Tensor) -> bool:
    places = _offsets(tensor).reshape(-1).sort().values
    return torch.equal(places, torch.arange(tensor.numel()))


def _same_order(a: Tensor, b: Tensor) -> bool:
    return torch.equal(_offsets(a), _offsets(b))


def to_be_refused(name: str, operation: Operation, arguments: Arguments) -> bool | None:
    """Whether the layouts of what it writes are none that it serves, told from where every element lies.

    None: it may be refused or not, as for strides of tensors without elements.
    """
    if name == "augment":
        return False
    if name in IMAGE_OPERATIONS:
        if name != "bn_act":
            return not all(arguments["x"].shape[2:])
        return not (_dense(arguments["running_mean"]) and _dense(arguments["running_var"]))
    written = {key: listed(arguments.get(key)) for key in operation.written if listed(arguments.get(key))}
    if name == "pgd_step_normalize_":
        (rows,) = written.pop("out")
        if rows.numel() and not _same_order(rows, torch.empty_like(rows, memory_format=torch.channels_last)):
            return True
    model = next(iter(written.values()), [])
    for tensors in written.values():
        for tensor, first in zip(tensors, model, strict=True):
            if tensor.numel() and not (_dense(tensor) and _same_order(tensor, first)):
                return True
    if (name.startswith("pgd_") or arguments.get("scope") == "filter") and not all(map(_outermost, model)):
        return True
    return None if any(not t.numel() for tensors in written.values() for t in tensors) else False


class Faults:
    """Ways to make a call wrong; each returns the arguments, or None where it does not fit the call."""

    def __init__(self, rng: random.Random, name: str, operation: Operation) -> None:
        self.rng, self.name, self.operation = rng, name, operation

    def _swap(self, arguments: Arguments, key: str, change: Callable[[Tensor], Tensor]) -> Arguments:
        value = arguments[key]
        if isinstance(value, Tensor):
            return arguments | {key: change(value)}
        index = self.rng.randrange(len(value))
        return arguments | {key: [change(t) if i == index else t for i, t in enumerate(value)]}

    def _tensors(self, arguments: Arguments) -> list[str]:
        scalars = ("mask", "grad_scale", "grad_norm", "weight_norms")
        # the gradient that autograd brings is torch's to check
        autograd = ("grad", "grad_z") if self.name in IMAGE_OPERATIONS else ()
        return [key for key, value in arguments.items() if listed(value) and key not in (*scalars, *autograd)]

    def length(self, arguments: Arguments) -> Arguments | None:
        lists = [key for key, value in arguments.items() if isinstance(value, list) and listed(value)]
        if len(lists) < 2:
            return None
        key = self.rng.choice(lists)
        return arguments | {key: [*arguments[key], arguments[key][0].clone()]}

    def shape(self, arguments: Arguments) -> Arguments | None:
        keys = [key for key in self._tensors(arguments) if self.name != "total_norm"]
        if self.name in CPU_OPERATIONS:
            keys = ["weight"]
        if self.name == "bn_act":
            keys.remove("x")
        if not keys:
            return None
        return self._swap(
            arguments, self.rng.choice(keys), lambda t: t.new_zeros((2, *t.shape[:-1], (t.shape or (2,))[-1] + 1))
        )

    def dtype(self, arguments: Arguments) -> Arguments | None:
        """Another dtype within a list, or of x."""
        if self.name in ("total_norm", *IMAGE_OPERATIONS):
            return None
        keys = [k for k, v in arguments.items() if isinstance(v, list) and len(listed(v)) > 1]
        if self.name.startswith("pgd_"):
            keys = ["x", "x_adv"]
        if not keys:
            return None
        other = {torch.bfloat16: torch.float16}
        return self._swap(arguments, self.rng.choice(keys), lambda t: t.to(other.get(t.dtype, torch.bfloat16)))

    def kind(self, arguments: Arguments) -> Arguments | None:
        """Integers, complex numbers, booleans, float8."""
        kinds = (torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.uint8)
        keys = [key for key in self._tensors(arguments) if key not in ("sample_ids", "rows", "found_inf")]
        if self.name in IMAGE_OPERATIONS:
            keys, kinds = ["x"], kinds[:3]
        if self.name == "augment":
            kinds = kinds[:4]
        kind = self.rng.choice(kinds)
        return self._swap(arguments, self.rng.choice(keys), lambda t: torch.ones_like(t, dtype=torch.float32).to(kind))

    def device(self, arguments: Arguments) -> Arguments | None:
        keys = self._tensors(arguments)
        if sum(len(listed(value)) for value in arguments.values()) < 2:
            return None
        return self._swap(arguments, self.rng.choice(keys), lambda t: t.to("meta"))

    def sparse(self, arguments: Arguments) -> Arguments | None:
        keys = [key for key in self._tensors(arguments) if key != "sample_ids"]
        return self._swap(arguments, self.rng.choice(keys), lambda t: t.to_sparse())

    def overlap(self, arguments: Arguments) -> Arguments | None:
        """One written tensor given twice, or read where it is written."""
        if self.name in ("total_norm", "augment", *IMAGE_OPERATIONS):
            return None
        written = [k for k in self.operation.written if listed(arguments.get(k))]
        key = self.rng.choice(written)
        index = next((i for i, t in enumerate(listed(arguments[key])) if t.numel()), None)
        if index is None:
            return None
        tensor = listed(arguments[key])[index]
        others = [
            k
            for k, v in arguments.items()
            if k != key
            and k not in ("sample_ids", "found_inf")
            and len(listed(v)) > index
            and listed(v)[index].dtype == tensor.dtype
            and listed(v)[index].shape == tensor.shape
        ]
        if not others:
            return None
        other = self.rng.choice(others)
        value = arguments[other]
        shared = tensor if isinstance(value, Tensor) else [tensor if i == index else t for i, t in enumerate(value)]
        return arguments | {other: shared}

    def number(self, arguments: Arguments) -> Arguments | None:
        wrong = {
            "gamma": (math.nan, math.inf),
            "eps": (math.nan, -1.0) if self.name != "bn_act" else (),
            "eta": (-1.0, math.nan),
            "bound": (-0.5, math.inf, math.nan),
            "scope": ("tensor", ""),
            "scale": ("sam",),
            "lr": (-0.1, math.nan, math.inf),
            "weight_decay": (-0.1, math.nan),
            "max_norm": (-1.0, math.nan),
            "average_weight": (1.5, -0.1, math.nan),
            "epsilon": (-0.1, math.nan, math.inf),
            "std": (-0.1, math.nan) if self.name == "pgd_init_normal_" else (),
            "step_size": (math.nan, math.inf),
            "norm": ("l1", "normal"),
            "seed": (-1, 2**63),
            "pad": (-1, 2**30),
            "cutout": (-1, 2**30),
            "fill": (None, [0.5] * 11, [math.nan]),
        }
        if self.name == "augment" and arguments.get("rows", torch.empty(0)).numel():
            wrong["rows"] = tuple(arguments["rows"].clone().fill_(row) for row in (-1, len(arguments["images"])))
        keys = [key for key in arguments if wrong.get(key)]
        if not keys:
            return None
        key = self.rng.choice(keys)
        return arguments | {key: self.rng.choice(wrong[key])}


FAULTS = ("length", "shape", "dtype", "kind", "device", "sparse", "overlap", "number")
NAMED = re.compile(r"^([a-z_]+)(\[\d+\])?: \S[^\n]*$")


# ---- a case


class Case:
    """A call of an operation, and what must come of it."""

    def __init__(
        self, name: str, variant: str, dtype: torch.dtype, *, device: str = "cpu", backend: str | None = None
    ) -> None:
        self.name, self.operation, self.variant, self.dtype = name, OPERATIONS[name], variant, dtype
        self.device, self.backend, self.held = device, None if dtype == FP64 else backend, Held(device)
        self.values, self.fault = "as drawn", None
        self.arguments: Arguments = {}

    @classmethod
    def drawn(cls, seed: int, index: int, *, device: str = "cpu", backend: str | None = None) -> "Case":
        """Case `index` of a seed: of these two alone."""
        rng = random.Random(f"{seed}/{index}")
        others = ("augment", "pgd_step_normalize_")
        name = rng.choice([n for n in OPERATIONS if n not in others and (device == "cpu" or n not in CPU_OPERATIONS)])
        # drawn apart, so that a seed's cases of the other operations stay what they were
        for other in others:
            if random.Random(f"{seed}/{index}/{other}").random() < 0.1:
                name = other
        operation = OPERATIONS[name]
        variant, dtype = rng.choice(list(operation.variants)), rng.choice((*operation.dtypes * 4, FP64))
        chosen = backend or (None if rng.random() < 0.9 else "reference")
        case = cls(name, variant, dtype, device=device, backend=chosen)
        shapes = shapes_for(rng, operation)
        options = operation.variants[variant] | options_for(rng, name, shapes)
        if name == "bn_act" and math.prod(shapes[0]) == shapes[0][1]:
            options |= {"training": False, "ranks": None}
        case.arguments = operation.build(shapes, dtype, rng.randrange(2**31), **options)
        case._give_numbers(rng)
        case._spoil(rng)
        case._lay_out(rng)
        if rng.random() < 0.25:
            fault = rng.choice(FAULTS)
            wrong = getattr(Faults(rng, name, operation), fault)(case.arguments)
            if wrong is not None:
                case.arguments, case.fault = wrong, fault
        return case

    def __str__(self) -> str:
        def laid(tensor: Tensor) -> str:
            return f"{tuple(tensor.shape)}/{tensor.stride() if tensor.layout == torch.strided else tensor.layout}"

        shown = {key: [laid(t) for t in listed(value)][:4] or value for key, value in self.arguments.items()}
        words = (self.name, self.variant, self.dtype, "on", self.device, "by", self.backend or "default")
        return f"{' '.join(map(str, words))}, values {self.values}, fault {self.fault}, {shown}"

    def _give_numbers(self, rng: random.Random) -> None:
        """Numbers that may lie on the device do so at times; norms that may be known are known at times."""
        arguments = self.arguments
        if self.name == "sgd_step_":
            for key in ("lr", "average_weight"):
                if key in arguments and rng.random() < 0.3:
                    arguments[key] = torch.tensor(arguments[key], dtype=rng.choice((torch.float32, FP64)))
            if rng.random() < 0.2:
                arguments["found_inf"] = rng.choice((torch.tensor(False), torch.tensor(0.0)))
        known = arguments.get("scale", "relative") == "relative" and arguments.get("scope") != "filter"
        if self.name.startswith("perturb") and known and rng.random() < 0.3:
            arguments["weight_norms"] = torch.stack([w.double().norm() for w in arguments["weights"]])
        # drawn apart, as above
        if self.name.startswith("perturb") and random.Random(rng.getstate()[1][0]).random() < 0.5:
            arguments["found_inf"] = torch.zeros(())

    def _spoil(self, rng: random.Random) -> None:
        """Other values in one of the arguments."""
        keys = [
            key
            for key, value in self.arguments.items()
            if any(t.numel() > 1 and t.is_floating_point() for t in listed(value))
            and key not in (*self.operation.poisoned, "weight_norms", "running_var")
        ]
        if not keys or rng.random() < 0.5:
            return
        self.values = rng.choice(list(VALUES))
        # squares of what is huge leave fp32 within a convolution, in an order that is each one's own
        if self.name in IMAGE_OPERATIONS and self.values == "huge":
            self.values = "tiny"
        key = rng.choice(keys)
        for tensor in listed(self.arguments[key]):
            VALUES[self.values](rng, tensor)
        if self.name == "bn_act":
            self.arguments = clear_of_the_kink(self.arguments)

    def taken_layout(self, name: str) -> str:
        """Of a tensor; most are taken in any that is dense."""
        return "channels_last" if (self.name, name) == ("pgd_step_normalize_", "out") else "contiguous"

    def _lay_out(self, rng: random.Random) -> None:
        """Guards around every tensor, and another memory layout in half of the cases."""
        model = self.operation.written[:1]
        plain, same, offset = rng.random() < 0.5, rng.random() < 0.8, rng.choice((0, 0, 1, 3))
        pool = DENSE if rng.random() < 0.7 else LAYOUTS
        if self.name == "bn_act":  # repeated values would be on either side of the kink
            pool = [layout for layout in pool if layout != "expanded"]
        chosen: dict[int, str] = {}
        names = sorted(self.arguments, key=lambda name: name not in model)
        for name in names:
            value = self.arguments[name]
            written = name in self.operation.written

            def hold(index: int, tensor: Tensor, *, name: str = name, written: bool = written) -> Tensor:
                if self.taken_layout(name) == "channels_last" and rng.random() < 0.9:
                    return self.held.hold(tensor, "channels_last", 8 * offset)
                if plain or (not tensor.ndim) or tensor.dtype in (torch.int64, torch.bool):
                    return self.held.hold(tensor, "contiguous", offset)
                layout = rng.choice(pool)
                if written and same:
                    layout = chosen.setdefault(index, layout)
                return self.held.hold(tensor, layout, offset)

            if name in ("weight_norms", "found_inf"):
                continue
            if isinstance(value, Tensor):
                self.arguments[name] = hold(0, value)
            elif listed(value):
                self.arguments[name] = [hold(i, t) for i, t in enumerate(value)]
        if "found_inf" in self.arguments:
            self.arguments["found_inf"] = self.arguments["found_inf"].to(self.device)
        if "weight_norms" in self.arguments:
            self.arguments["weight_norms"] = self.held.hold(
                torch.stack([w.double().norm() for w in self.arguments["weights"]])
            )

    def check(self) -> str:
        """Run it; what came out ("equal", "refused"). Raises AssertionError if it is not what must be."""
        operation, arguments = self.operation, self.arguments
        tensors = [t for value in arguments.values() for t in listed(value)]
        whole = all(t.layout == torch.strided and t.device.type != "meta" for t in tensors)
        before = mapped(arguments, lambda t: t.clone().cpu()) if whole else {}
        refusal = True if self.fault else to_be_refused(self.name, operation, arguments)
        results, refused = None, ""
        try:
            with use_backend(self.backend):
                results = run(operation, arguments)
        except ValueError as error:
            refused = str(error)
        if results is None:
            assert refusal is not False, f"refused: {refused}"
            named = NAMED.match(refused)
            assert named, f"not one line that begins with an argument: {refused}"
            known = {*arguments, "clip", "adaptive", *operation.written}
            assert named[1] in known, f"names no argument: {refused}"
            changed = self.held.changed([])
            assert changed is None, f"refused, but {changed}"
            return "refused"
        assert not refusal, "was not refused"
        written = [t for key in operation.written for t in listed(arguments.get(key))]
        changed = self.held.changed(written)
        assert changed is None, changed
        self._compare({name: [t.detach().cpu() for t in tensors] for name, tensors in results.items()}, before)
        return "equal"

    def _compiled(self) -> bool:
        arguments = self.arguments
        with use_backend(self.backend):
            if self.name in CPU_OPERATIONS:
                available = {"conv3x3": conv3x3_available, "stem3x3": stem3x3_available}[self.name]
                return available(arguments["x"], arguments["weight"])
            if self.name == "pooled_linear":
                return pooled_linear_available(arguments["x"], arguments["weight"], arguments["bias"])
            vectors = [arguments[name] for name in ("weight", "bias", "running_mean", "running_var")]
            return bn_act_available(arguments["x"], *vectors)

    def _compare(self, results: Results, before: Arguments) -> None:
        if self.name == "restore_":
            assert same_bits(results["weights"], before["saved"]), "differing bits"
        if self.name == "augment":
            defined = self.operation.define(before, torch.float32)
            assert same_bits(results["returned"], defined["returned"]), "differing bits"
        # where torch serves, its own error depends on the memory layout
        image = self.name in IMAGE_OPERATIONS and self._compiled()
        if (self.values == "as drawn" and self.name != "bn_act") or (image and self.values not in ("nan", "inf")):
            ratio, where = excess(self.operation, results, before)
            assert ratio <= 1, f"{where}: {ratio:.3g} times the error that is allowed"
            return
        operands = [t for value in before.values() for t in listed(value) if t.is_floating_point()]
        weights = [t.clone() for t in before.get("weights", [])]
        largest = max((float(t[t.isfinite()].abs().max()) for t in operands if t.isfinite().any()), default=0.0)
        with use_backend(None if self.dtype == FP64 else "reference"):
            expected = run(self.operation, before)
        if "found_inf" in before:
            assert torch.equal(self.arguments["found_inf"].cpu(), before["found_inf"]), "found_inf is another"
        if self.name.startswith("perturb"):
            # what is not finite moves nothing: only weights that were not finite themselves give NaN
            moved = results["out" if "out" in results else "weights"]
            for found, weight in zip(moved, weights, strict=True):
                assert not (found.isnan() & weight.isfinite()).any(), "NaN where a weight was finite"
        if self.name in CPU_OPERATIONS:
            # torch's own carry NaN to their neighbours too, or multiply it by the zeros of a border, each its own way
            exact = self.operation.define(before, FP64)
            for name, tensors in expected.items():
                expected[name] = [
                    torch.where(fp64.isfinite().view(plain.shape), 0.0, plain)
                    for fp64, plain in zip(exact[name], tensors, strict=True)
                ]
        for name, tensors in results.items():
            for found, wanted in zip(tensors, expected[name], strict=True):
                self._alike(name, found, wanted, largest)

    def _alike(self, name: str, found: Tensor, wanted: Tensor, largest: float) -> None:
        """As the reference, to rounding; a convolution's transforms carry NaN and infinity over a tile."""
        if self.name in CPU_OPERATIONS:
            assert not (found.isfinite() & ~wanted.isfinite()).any(), f"{name}: NaN or infinity was lost"
            return
        if self.name == "bn_act":  # torch folds mean and bias into one number, which is NaN for more infinities
            assert not (found.isnan() & ~wanted.isnan()).any(), f"{name}: NaN where the reference has none"
            found = torch.where(wanted.isnan(), wanted, found)
        assert torch.equal(found.isnan(), wanted.isnan()), f"{name}: NaN elsewhere than in the reference"
        finite = wanted.isfinite()
        if finite.any():
            largest = max(largest, float(wanted[finite].abs().max()))
        # sums and products are in fp32, whatever the dtype of the result
        step = 4 * max(torch.finfo(found.dtype).eps, torch.finfo(self.dtype).eps, 2.0**-23 * (self.dtype != FP64))
        if self.name == "bn_act":  # gradients of parameters are sums over a channel
            step *= 16
        close = torch.isclose(found, wanted, rtol=step, atol=step * largest, equal_nan=True)
        assert close.all(), f"{name}: differs from the reference"


def command(seed: int, index: int, device: str, backend: str | None) -> str:
    """The one line that repeats a case."""
    words = ["python", "tests/soak/fuzz.py", "--seed", str(seed), "--case", str(index)]
    words += ["--device", device] if device != "cpu" else []
    words += ["--backend", backend] if backend else []
    return shlex.join(words)


def _crash(error: Exception) -> str:
    """Its first line, and where it came from."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''} ({where})"


def fuzz(
    seed: int, cases: Sequence[int], *, device: str = "cpu", backend: str | None = None
) -> tuple[list[str], Counter[str]]:
    """Run cases; the reports of those that failed, each with its command, and how often what came out."""
    failures: list[str] = []
    outcomes: Counter[str] = Counter()
    for index in cases:
        case = None
        try:
            case = Case.drawn(seed, index, device=device, backend=backend)
            outcomes[f"{case.name} {case.check()}"] += 1
        except Exception as error:
            reason = str(error) if isinstance(error, AssertionError) else _crash(error)
            failures.append(f"{reason}\n  {case}\n  repeat: {command(seed, index, device, backend)}")
    return failures, outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=CASES, help="how many, from case 0 on")
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", help="reference, cpp, cuda or triton; by default each case chooses")
    options: Any = parser.parse_args(arguments)
    cases = range(options.cases) if options.case is None else [options.case]
    failures, outcomes = fuzz(options.seed, cases, device=options.device, backend=options.backend)
    print(*failures, sep="\n\n")
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6} {outcome}")
    print(f"{len(cases) - len(failures)} of {len(cases)} cases passed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())

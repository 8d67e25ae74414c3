"""Every operation as the tests of all operations call it: its arguments, its variants, and its definition.

A call takes keyword arguments (tensors, lists of tensors, numbers), writes some of them and returns tensors; `run`
gathers all of it by name. The definition computes the same in any precision: in fp64 it is what results are compared
with, in the arguments' own dtype it is plain PyTorch, whose error is the yardstick.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from samples import SGD_VARIANTS, VARIANTS, generator, images, perturbed, randn, sgd, spoil, stepped
from torch import Tensor
from torch.nn import functional

from awp_kernels import (
    Ranks,
    add_bn_act,
    augment,
    bn_act,
    conv3x3,
    perturb_,
    perturb_into_,
    pgd_init_,
    pgd_init_normal_,
    pgd_step_,
    pgd_step_normalize_,
    pooled_linear,
    restore_,
    sgd_step_,
    stem3x3,
    total_norm,
)
from awp_kernels.bn_act.reference import in_one_order
from awp_kernels.philox import STREAM_AUGMENT, STREAM_CUTOUT, normals, sample_words, uniform_integers

Shape = tuple[int, ...]
Arguments = dict[str, Any]
Results = dict[str, list[Tensor]]

WEIGHTS: dict[str, list[Shape]] = {
    "scalar": [()],
    "warp_edges": [(31,), (32,), (33,), (1,)],
    "primes": [(7, 11, 13), (101,), (2, 3)],
    "empty_tensors": [(0,), (3, 0), (4, 4), (0, 5)],
    "network": [(16, 3, 3, 3), (16,), (32, 16, 3, 3), (10, 64), (10,)],
    "chunk_edges": [(16384,), (16385,), (16383, 2)],
}
IMAGES: dict[str, list[Shape]] = {
    "empty": [(0, 3, 4, 4)],
    "no pixels": [(2, 3, 0, 4)],
    "one": [(1, 1, 1, 1)],
    "flat": [(33,)],
    "rows": [(5, 31)],
    "primes": [(3, 5, 7, 11)],
    "batch": [(4, 3, 32, 32)],
}
# [N, C, H, W] of images and the number of output channels
CHANNELS: dict[str, list[Shape]] = {
    "empty": [(0, 3, 4, 4), (2,)],
    "one": [(2, 1, 1, 1), (1,)],
    "edges": [(2, 31, 5, 6), (33,)],
    "primes": [(3, 17, 7, 11), (13,)],
    "batch": [(4, 16, 16, 16), (32,)],
}
# of images of few channels
FEW_CHANNELS: dict[str, list[Shape]] = {
    "empty": [(0, 3, 4, 4), (16,)],
    "one": [(2, 1, 1, 1), (16,)],
    "other outputs": [(2, 3, 4, 5), (7,)],
    "primes": [(3, 4, 7, 11), (48,)],
    "batch": [(4, 3, 16, 16), (32,)],
}
# [N, C, H, W] of images and the number of channels that they are filled up to
FILLED: dict[str, list[Shape]] = {
    "empty": [(0, 3, 4, 4), (8,)],
    "no pixels": [(2, 3, 0, 4), (8,)],
    "one": [(1, 1, 1, 1), (1,)],
    "grey": [(2, 1, 5, 7), (8,)],
    "more": [(2, 5, 3, 7), (11,)],
    "primes": [(3, 3, 7, 11), (8,)],
    "batch": [(4, 3, 32, 32), (8,)],
}
# [N, C, H, W] of images of bytes
BYTES: dict[str, list[Shape]] = {
    "empty": [(0, 3, 4, 4)],
    "no pixels": [(2, 3, 0, 4)],
    "one": [(1, 1, 1, 1)],
    "edges": [(3, 4, 2, 33)],
    "primes": [(3, 5, 7, 11)],
    "batch": [(6, 3, 32, 32)],
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """How to call an operation, and what it must give.

    Attributes:
        call: takes `build`'s arguments by name.
        build: arguments for shapes, a dtype, a seed and options.
        define: the results by the definition, computed in a precision.
        samples: shapes by name.
        written: names of the arguments that it writes.
        poisoned: those of them that it does not read, which `build` fills with NaN.
        dtypes: that more than the reference serves.
        variants: options by name.
        slack: what more than plain PyTorch's error is allowed an element, relative to the largest result or to 1:
            roundings towards the inside of a ball, Winograd's transforms.
    """

    call: Callable[..., Any]
    build: Callable[..., Arguments]
    define: Callable[[Arguments, torch.dtype], Results]
    samples: dict[str, list[Shape]]
    written: tuple[str, ...] = ()
    poisoned: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    slack: Callable[[Arguments], float] = lambda arguments: 0.0


def listed(value: Any) -> list[Tensor]:
    """Tensors of an argument or a result: a list, one, or none."""
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, list | tuple) else []


def mapped(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """The arguments with every tensor changed."""
    return {
        name: change(value) if isinstance(value, Tensor) else [change(t) for t in value] if listed(value) else value
        for name, value in arguments.items()
    }


def run(operation: Operation, arguments: Arguments) -> Results:
    """Call it; what it wrote, by name, and what it returned."""
    returned = operation.call(**arguments)
    written = {name: listed(arguments.get(name)) for name in operation.written}
    return written | (returned if isinstance(returned, dict) else {"returned": listed(returned)})


def bits(tensor: Tensor) -> Tensor:
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[tensor.element_size()]
    return tensor.detach().cpu().contiguous().reshape(-1).view(word)


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().cpu().square().sum()) for t in tensors))


def excess(operation: Operation, results: Results, arguments: Arguments) -> tuple[float, str]:
    """The largest error over what is allowed, and where: at most 1 is right.

    Allowed is twice the error of plain PyTorch in the same dtype, or of rounding the exact result to it, and the
    operation's slack. A few numbers may be exact by luck: they get one ulp of fp32, and all a little of the smallest
    normal number, below which digits end.
    """
    exact, slack = operation.define(arguments, torch.float64), operation.slack(arguments)
    worst, where = 0.0, ""
    for name, tensors in results.items():
        expected = exact[name]
        assert [t.shape for t in tensors] == [e.shape for e in expected], (name, tensors, expected)
        if not sum(t.numel() for t in tensors):
            continue
        if not all(torch.equal(t.cpu().isnan(), e.to(t.dtype).isnan()) for t, e in zip(tensors, expected, strict=True)):
            return math.inf, name
        expected = [e.nan_to_num() for e in expected]
        tensors = [t.detach().double().cpu().nan_to_num().to(t.dtype) for t in tensors]
        rounded = [e.to(t.dtype) for t, e in zip(tensors, expected, strict=True)]
        own = tensors[0].dtype
        if "x" in arguments or name == "returned":
            first = arguments.get("x", listed(next(iter(arguments.values())))[0])
            own = first.dtype if "x" in arguments else torch.promote_types(first.dtype, torch.float32)
        plain = operation.define(arguments, own)[name]
        found, rounding, plains = (
            length([r.detach().double().cpu() - e for r, e in zip(values, expected, strict=True)])
            for values in (tensors, rounded, plain)
        )
        numbers = sum(t.numel() for t in tensors)
        allowed = 2 * max(rounding, plains if math.isfinite(plains) else 0.0)
        allowed += slack * math.sqrt(numbers) * max(1.0, float(max(e.abs().max() for e in expected if e.numel())))
        operand = listed(arguments.get("weights" if name == "returned" else name))
        operands = max(length(expected), length(operand) if name not in operation.poisoned else 0.0)
        allowed += operands * (2.0**-23 if numbers < 64 and own != torch.float64 else 2.0**-44)
        allowed += torch.finfo(tensors[0].dtype).smallest_normal * 2.0**-7 * math.sqrt(numbers)
        ratio = math.inf if math.isnan(found) else found / allowed if found else 0.0
        if ratio > worst:
            worst, where = ratio, name
    return worst, where


# ---- perturb_, perturb_into_, restore_


def _nans(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.full_like(t, math.nan, dtype=dtype) for t in tensors]


def _weights(shapes: Sequence[Shape], dtype: torch.dtype, seed: int) -> list[Tensor]:
    return [randn(shape, dtype, seed + i, 0.3 + i % 5) for i, shape in enumerate(shapes)]


def _grads(shapes: Sequence[Shape], dtype: torch.dtype, seed: int) -> list[Tensor]:
    return [randn(shape, dtype, seed + 1000 + i, 1e-2) for i, shape in enumerate(shapes)]


def _perturb(
    shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0, spoiled: bool = False, **options: Any
) -> Arguments:
    """`spoiled`: one element of every third gradient is not finite."""
    weights, grads = _weights(shapes, dtype, seed), _grads(shapes, dtype, seed)
    for index, grad in enumerate(grads[::3] if spoiled else []):
        spoil(grad, seed + 7 * index, (math.inf, math.nan)[index % 2])
    if options.get("scale") == "elementwise":
        options = {"adaptive": [i % 3 != 1 for i in range(len(shapes))]} | options
    return {"weights": weights, "grads": grads, "saved": _nans(weights), "gamma": 0.01} | options


def _perturb_into(
    shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0, grad: torch.dtype | None = None, **options: Any
) -> Arguments:
    """`dtype` is that of the copy that is written; fp64 is that of all."""
    arguments = _perturb(shapes, dtype if dtype == torch.float64 else torch.float32, seed, **options)
    del arguments["saved"]
    if grad is not None:
        arguments["grads"] = [g.to(grad) for g in arguments["grads"]]
    return arguments | {"out": _nans(arguments["weights"], dtype)}


def _perturbed(arguments: Arguments, dtype: torch.dtype) -> Results:
    others = ("weights", "grads", "saved", "out", "weight_norms", "found_inf")
    options = {k: v for k, v in arguments.items() if k not in others}
    weights = arguments["weights"]
    moved, scales = perturbed(
        weights, arguments["grads"], options.pop("gamma"), options.pop("scope", "layer"), dtype=dtype, **options
    )
    if "out" in arguments:
        return {"out": moved, "returned": [scales]}
    return {"weights": moved, "saved": [w.to(dtype) for w in weights], "returned": [scales]}


def _restore(shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0) -> Arguments:
    saved = _weights(shapes, dtype, seed)
    return {"weights": _nans(saved), "saved": saved}


PERTURBATIONS: dict[str, dict[str, Any]] = {
    "layer": {},
    "global": {"scope": "global"},
    "filter": {"scope": "filter"},
    **VARIANTS,
    "elementwise-filter": {**VARIANTS["elementwise-bounded"], "scope": "filter"},
    "spoiled": {"spoiled": True},
    "spoiled-elementwise-filter": {**VARIANTS["elementwise-bounded"], "scope": "filter", "spoiled": True},
}

# ---- sgd_step_, total_norm


def _sgd_step(
    shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0, out: torch.dtype | None = torch.bfloat16, **options: Any
) -> Arguments:
    """`dtype` is that of the gradients; fp64 is that of all."""
    weights = _weights(shapes, dtype if dtype == torch.float64 else torch.float32, seed)
    arguments: Arguments = {"weights": weights, "grads": _grads(shapes, dtype, seed), "lr": 0.1} | options
    if options.get("momentum"):
        arguments["momentum_buffers"] = [randn(tuple(w.shape), w.dtype, seed + 200) for w in weights]
    if "average_weight" in options:
        arguments["averages"] = [w + randn(tuple(w.shape), w.dtype, seed + 300) for w in weights]
    if out is not None:
        arguments["out"] = _nans([w.to(out) for w in weights])
    for name, kind in (("grad_scale", torch.float32), ("grad_norm", torch.float64)):
        if name in options:
            arguments[name] = torch.tensor(options[name], dtype=kind)
    return arguments


def _sgd_stepped(arguments: Arguments, dtype: torch.dtype) -> Results:
    weights, out = arguments["weights"], arguments.get("out", [])
    buffers, averages = arguments.get("momentum_buffers", []), arguments.get("averages", [])
    lists = ("weights", "grads", "momentum_buffers", "averages", "out", "found_inf")
    numbers = {
        name: value.item() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
        if name not in lists
    }
    # the update is in the weights' precision at least; what is stored in 16 bits is rounded after it
    working = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    moved, momentum, averaged = sgd(
        weights,
        arguments["grads"],
        buffers or weights,
        averages or weights,
        dtype=working,
        **numbers,
    )
    return {
        "weights": moved,
        "momentum_buffers": momentum if buffers else [],
        "averages": averaged if averages else [],
        "out": [w.to(dtype) for w in moved] if out else [],
        "returned": [torch.stack([w.norm() for w in moved])],
    }


def _norm(shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0, mixed: bool = True) -> Arguments:
    kinds = (dtype, torch.float32, torch.float16) if mixed else (dtype,)
    return {"tensors": [randn(shape, kinds[i % len(kinds)], seed + i) for i, shape in enumerate(shapes)]}


def _normed(arguments: Arguments, dtype: torch.dtype) -> Results:
    return {"returned": [torch.cat([t.to(dtype).flatten() for t in arguments["tensors"]]).norm()]}


# ---- pgd_init_, pgd_init_normal_, pgd_step_


def _pgd_init(shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0, **options: Any) -> Arguments:
    x = images(shapes[0], dtype, seed)
    ids = torch.randint(-(2**62), 2**62, x.shape[:1], generator=generator(seed))
    return {"x_adv": torch.full_like(x, math.nan), "x": x, "sample_ids": ids, "seed": 2**62 + seed} | options


def _pgd_started(arguments: Arguments, dtype: torch.dtype) -> Results:
    x, ids, seed = arguments["x"].to(dtype), arguments["sample_ids"], arguments["seed"]
    count = x[0].numel() if len(x) else 0
    if not x.numel():
        return {"x_adv": [x], "returned": []}
    if "std" in arguments:
        z = normals(ids, count, seed=seed).to(dtype).reshape(x.shape)
        return {"x_adv": [x + z * arguments["std"]], "returned": []}
    if arguments["norm"] == "linf":
        delta = uniform_integers(ids, count, seed=seed).to(dtype) * (arguments["epsilon"] * 2.0**-24)
    else:
        z = normals(ids, count + 2, seed=seed).to(dtype)
        delta = z[:, :count] * (arguments["epsilon"] / z.norm(dim=1, keepdim=True))
    return {"x_adv": [(x + delta.reshape(x.shape)).clamp(0, 1)], "returned": []}


def _pgd_step(
    shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0, masked: bool = False, **options: Any
) -> Arguments:
    x = images(shapes[0], dtype, seed)
    start = (x + randn(x.shape, dtype, seed + 1, options["epsilon"] / 4)).clamp(0, 1)
    grad = randn(x.shape, dtype, seed + 2, 1e-3 if dtype != torch.float16 else 0.1)
    arguments = {"x_adv": start, "grad": grad, "x": x} | options
    if masked:
        arguments["mask"] = torch.rand(x.shape[1:], generator=generator(seed)) < 0.5
    return arguments


def _pgd_stepped(arguments: Arguments, dtype: torch.dtype) -> Results:
    return {"x_adv": [stepped(**arguments, dtype=dtype)], "returned": []}


BALLS: dict[str, dict[str, Any]] = {"linf": {"norm": "linf", "epsilon": 8 / 255}, "l2": {"norm": "l2", "epsilon": 0.5}}
STEPS: dict[str, dict[str, Any]] = {
    name + mask: {**ball, "step_size": ball["epsilon"] / 3, **option}
    for name, ball in BALLS.items()
    for mask, option in (("", {}), ("-masked", {"masked": True}))
}


def _pgd_normalize(shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0, **options: Any) -> Arguments:
    """`dtype` is that of what the network reads; fp64 is that of all."""
    shape, (filled,) = shapes
    kind = dtype if dtype == torch.float64 else torch.float32
    arguments = _pgd_step(shapes, kind, seed, **options)
    rows = randn((shape[0], filled, *shape[2:]), dtype, seed + 2, 0.1).contiguous(memory_format=torch.channels_last)
    mean = torch.linspace(0.3, 0.6, shape[1], dtype=torch.float64).to(kind)
    return arguments | {"grad": rows, "out": torch.full_like(rows, math.nan), "mean": mean, "std": 0.2 + mean / 4}


def _pgd_normalized(arguments: Arguments, dtype: torch.dtype) -> Results:
    step = {name: value for name, value in arguments.items() if name not in ("out", "mean", "std")}
    mean, std = (arguments[name].to(dtype).view(-1, 1, 1) for name in ("mean", "std"))
    moved = stepped(**step | {"grad": step["grad"][:, : len(mean)].to(dtype) / std}, dtype=dtype)
    rest = arguments["out"].shape[1] - len(mean)
    return {"x_adv": [moved], "out": [functional.pad((moved - mean) / std, (0, 0, 0, 0, 0, rest))], "returned": []}


# ---- augment


def _augment(
    shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0, chosen: bool = False, **options: Any
) -> Arguments:
    """The dtypes are its own. `chosen`: twice as many rows as there are images."""
    own = generator(seed)
    count, channels, *_ = shapes[0]
    images = torch.randint(0, 256, shapes[0], dtype=torch.uint8, generator=own)
    rows = torch.randint(0, count, (2 * count,), generator=own) if chosen and count else torch.arange(count)
    ids = torch.randint(-(2**62), 2**62, rows.shape, generator=own)
    arguments: Arguments = {"images": images, "sample_ids": ids, "seed": 2**62 + seed} | options
    if options.get("cutout"):
        arguments["fill"] = torch.rand(channels, generator=own, dtype=torch.float64).tolist()
    return arguments | ({"rows": rows} if chosen else {})


def _augmented(arguments: Arguments, dtype: torch.dtype) -> Results:
    """Image by image, from a padded one."""
    images, ids, seed = arguments["images"], arguments["sample_ids"], arguments["seed"]
    rows = arguments["rows"].tolist() if "rows" in arguments else range(len(images))
    pad, cutout = arguments.get("pad", 0), arguments.get("cutout", 0)
    _, _, height, width = images.shape
    result = images.new_empty((len(rows), *images.shape[1:]), dtype=dtype)
    for row, words, centres, out in zip(
        rows,
        sample_words(ids, 3, seed=seed, stream=STREAM_AUGMENT).tolist(),
        sample_words(ids, 2, seed=seed, stream=STREAM_CUTOUT).tolist(),
        result,
        strict=True,
    ):
        padded = functional.pad(images[row].to(dtype), (pad,) * 4)
        top, left = (word * (2 * pad + 1) // 2**32 for word in words[:2])
        cropped = padded[:, top : top + height, left : left + width]
        out[:] = (cropped.flip(-1) if arguments.get("flip") and words[2] % 2 else cropped) / images.new_full(
            (), 255, dtype=dtype
        )
        for channel in range(len(out) if cutout else 0):
            top, left = (w * n // 2**32 - cutout // 2 for w, n in zip(centres, (height, width), strict=True))
            square = out[channel, max(top, 0) : max(top + cutout, 0), max(left, 0) : max(left + cutout, 0)]
            # a number of fp32 in any precision
            square.fill_(torch.tensor(arguments["fill"][channel], dtype=torch.float32).item())
    return {"returned": [result]}


AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chosen": {"chosen": True, "memory_format": torch.contiguous_format},
    "cropped": {"pad": 4, "flip": True},
    "cut": {"chosen": True, "pad": 2, "flip": True, "cutout": 8},
}

# ---- conv3x3, bn_act: with their gradients


def _with_gradients(outputs: dict[str, Tensor], inputs: dict[str, Tensor], grads: Sequence[Tensor]) -> Results:
    gradients = torch.autograd.grad(list(outputs.values()), list(inputs.values()), grads)
    found = {name: [output.detach()] for name, output in outputs.items()}
    return found | {f"grad_{name}": [g] for name, g in zip(inputs, gradients, strict=True)}


def _leaves(**tensors: Tensor) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}


def _convolved(
    x: Tensor, weight: Tensor, grad: Tensor, convolve: Callable[..., Tensor] = conv3x3, **options: Any
) -> Results:
    inputs = _leaves(x=x, weight=weight)
    return _with_gradients({"y": convolve(**inputs, **options)}, inputs, [grad])


def _conv(shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0, **options: Any) -> Arguments:
    (samples, channels, height, width), (outputs,) = shapes
    x = randn((samples, channels, height, width), dtype, seed).contiguous(memory_format=torch.channels_last)
    weight = randn((outputs, channels, 3, 3), dtype, seed + 1, 1 / (3 * math.sqrt(channels)))
    return {"x": x, "weight": weight, "grad": randn((samples, outputs, height, width), dtype, seed + 2)} | options


def _conv_defined(arguments: Arguments, dtype: torch.dtype) -> Results:
    tensors = {name: arguments[name].to(dtype) for name in ("x", "weight", "grad")}
    return _convolved(**tensors, convolve=lambda x, weight: functional.conv2d(x, weight, padding=1))


def _stem(shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0) -> Arguments:
    """`dtype` is that of the weights."""
    arguments = _conv(shapes, dtype if dtype == torch.float64 else torch.float32, seed)
    return arguments | {name: arguments[name].to(dtype) for name in ("weight", "grad")}


def _stem_defined(arguments: Arguments, dtype: torch.dtype) -> Results:
    """Images stay in fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    tensors = {name: t.to(wide if name == "x" else dtype) for name, t in arguments.items()}
    return _convolved(**tensors, convolve=lambda x, weight: functional.conv2d(x, weight.to(x), padding=1).to(weight))


def _bn_act(*, residual: Tensor | None = None, **rest: Any) -> dict[str, Tensor]:
    if residual is None:
        return {"y": bn_act(**rest)}
    return dict(zip("zy", add_bn_act(residual=residual, **rest), strict=True))


def _plain_bn_act(
    *, x: Tensor, training: bool, activation: str, residual: Tensor | None = None, ranks: Any = None, **rest: Any
) -> dict[str, Tensor]:
    z = x if residual is None else x + residual
    if residual is not None and rest.get("stored"):
        z = z + (z.to(rest["stored"]).to(z.dtype) - z).detach()
    rest.pop("stored", None)
    u = in_one_order(functools.partial(functional.batch_norm, training=training, **rest), z)
    y = {"relu": functional.relu, "silu": functional.silu, "none": torch.clone}[activation](u)
    return {"y": y} if residual is None else {"z": z, "y": y}


def _normalised(
    grad: Tensor,
    grad_z: Tensor | None = None,
    normalise: Callable[..., dict[str, Tensor]] = _bn_act,
    **rest: Any,
) -> Results:
    inputs = _leaves(**{name: rest.pop(name) for name in ("x", "residual", "weight", "bias") if name in rest})
    return _with_gradients(normalise(**inputs, **rest), inputs, [grad] if grad_z is None else [grad_z, grad])


def _bn(
    shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0, residual: bool = False, **options: Any
) -> Arguments:
    shape, kind = shapes[0], dtype if dtype == torch.float64 else torch.float32
    x = (randn(shape, torch.float64, seed) * 2 + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    vectors = {name: randn(shape[1:2], kind, seed + i) for i, name in enumerate(("weight", "bias", "running_mean"))}
    vectors["weight"] += 1
    vectors["running_var"] = randn(shape[1:2], kind, seed + 4).abs() + 0.5
    arguments = {"x": x, **vectors, "grad": randn(shape, dtype, seed + 5)} | options
    if residual:
        images = [randn(shape, dtype, seed + i).contiguous(memory_format=torch.channels_last) for i in (6, 7)]
        arguments |= dict(zip(("residual", "grad_z"), images, strict=True))
    return clear_of_the_kink(arguments)


def clear_of_the_kink(arguments: Arguments) -> Arguments:
    """bn_act's arguments without gradients where rounding decides whether the output is 0."""
    if arguments["activation"] != "relu":
        return arguments
    wide = mapped({k: v for k, v in arguments.items() if not k.startswith("grad")}, lambda t: t.double())
    normalised = _plain_bn_act(**wide | {"activation": "none", "stored": arguments["x"].dtype})["y"]
    clear = normalised.abs() > {torch.bfloat16: 0.05, torch.float16: 0.01}.get(arguments["x"].dtype, 1e-4)
    return arguments | {"grad": torch.where(clear, arguments["grad"], 0)}


def _bn_defined(arguments: Arguments, dtype: torch.dtype) -> Results:
    vectors = torch.promote_types(dtype, torch.float32)  # parameters and statistics stay in fp32
    tensors = mapped(arguments, lambda t: t.detach().clone().to(dtype if t.ndim == 4 else vectors))
    # torch's gradient of silu is wrong for gradients with odd strides of dimensions of size 1
    tensors |= {name: tensors[name].contiguous() for name in ("grad", "grad_z") if name in tensors}
    # what is normalised is the sum as it is stored
    results = _normalised(**tensors, normalise=_plain_bn_act, stored=arguments["x"].dtype)
    return results | {"running_mean": [tensors["running_mean"]], "running_var": [tensors["running_var"]]}


ALONE = Ranks(gather=lambda values: values.unsqueeze(0), add=lambda values: values)
NORMALISATIONS: dict[str, dict[str, Any]] = {
    "train": {"training": True, "activation": "relu"},
    "eval": {"training": False, "activation": "relu"},
    "train-silu": {"training": True, "activation": "silu"},
    "eval-none": {"training": False, "activation": "none"},
    "train-none-residual": {"training": True, "activation": "none", "residual": True},
    "eval-silu-residual": {"training": False, "activation": "silu", "residual": True},
    "shared": {"training": True, "activation": "relu", "ranks": ALONE},
    "shared-silu-residual": {"training": True, "activation": "silu", "residual": True, "ranks": ALONE},
    "train-residual": {"training": True, "activation": "relu", "residual": True},
    "eval-residual": {"training": False, "activation": "relu", "residual": True},
}


# ---- pooled_linear: with its gradients


def _pooled(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, pool: Callable[..., Tensor] = pooled_linear
) -> Results:
    inputs = _leaves(x=x, weight=weight, bias=bias)
    return _with_gradients({"y": pool(**inputs)}, inputs, [grad])


def _pool(shapes: Sequence[Shape], dtype: torch.dtype, seed: int = 0) -> Arguments:
    shape, (classes,) = shapes
    kind = dtype if dtype == torch.float64 else torch.float32
    return {
        "x": (randn(shape, torch.float64, seed) + 1).to(dtype).contiguous(memory_format=torch.channels_last),
        "weight": randn((classes, shape[1]), dtype, seed + 1, 1 / math.sqrt(shape[1])),
        "bias": randn((classes,), kind, seed + 2),
        "grad": randn((shape[0], classes), kind, seed + 3),
    }


def _pool_defined(arguments: Arguments, dtype: torch.dtype) -> Results:
    wide = torch.promote_types(dtype, torch.float32)  # bias and logits stay in fp32
    tensors = {name: t.to(dtype if name in ("x", "weight") else wide) for name, t in arguments.items()}

    def pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(functional.avg_pool2d(x.to(bias), x.shape[2:]).flatten(1), weight.to(bias), bias)

    return _pooled(**tensors, pool=pool)


def _inward(arguments: Arguments) -> float:
    """One ulp towards the inside of a ball or a bound."""
    bounded = "epsilon" in arguments or arguments.get("bound") is not None
    return torch.finfo(torch.float32).eps if bounded else 0.0


CPU = (torch.float32, torch.bfloat16)
OPERATIONS: dict[str, Operation] = {
    "perturb_": Operation(
        call=perturb_,
        build=_perturb,
        define=_perturbed,
        samples=WEIGHTS,
        written=("weights", "saved"),
        poisoned=("saved",),
        variants=PERTURBATIONS,
        slack=_inward,
    ),
    "perturb_into_": Operation(
        call=perturb_into_,
        build=_perturb_into,
        define=_perturbed,
        samples=WEIGHTS,
        written=("out",),
        poisoned=("out",),
        variants=PERTURBATIONS,
        slack=_inward,
    ),
    "restore_": Operation(
        call=restore_,
        build=_restore,
        define=lambda arguments, dtype: {"weights": [t.to(dtype) for t in arguments["saved"]], "returned": []},
        samples=WEIGHTS,
        written=("weights",),
        poisoned=("weights",),
    ),
    "sgd_step_": Operation(
        call=sgd_step_,
        build=_sgd_step,
        define=_sgd_stepped,
        samples=WEIGHTS,
        written=("weights", "momentum_buffers", "averages", "out"),
        poisoned=("out",),
        variants=SGD_VARIANTS,
    ),
    "total_norm": Operation(call=total_norm, build=_norm, define=_normed, samples=WEIGHTS),
    "pgd_init_": Operation(
        call=pgd_init_,
        build=_pgd_init,
        define=_pgd_started,
        samples=IMAGES,
        written=("x_adv",),
        poisoned=("x_adv",),
        variants=BALLS,
        slack=_inward,
    ),
    "pgd_init_normal_": Operation(
        call=pgd_init_normal_,
        build=_pgd_init,
        define=_pgd_started,
        samples=IMAGES,
        written=("x_adv",),
        poisoned=("x_adv",),
        variants={"": {"std": 0.1}},
    ),
    "pgd_step_": Operation(
        call=pgd_step_,
        build=_pgd_step,
        define=_pgd_stepped,
        samples=IMAGES,
        written=("x_adv",),
        variants=STEPS,
        slack=_inward,
    ),
    "pgd_step_normalize_": Operation(
        call=pgd_step_normalize_,
        build=_pgd_normalize,
        define=_pgd_normalized,
        samples=FILLED,
        written=("x_adv", "out"),
        poisoned=("out",),
        variants=STEPS,
        slack=lambda arguments: _inward(arguments) / float(arguments["std"].min()),
    ),
    "augment": Operation(
        call=augment,
        build=_augment,
        define=_augmented,
        samples=BYTES,
        dtypes=(torch.float32,),
        variants=AUGMENTATIONS,
    ),
    "conv3x3": Operation(
        call=_convolved,
        build=_conv,
        define=_conv_defined,
        samples=CHANNELS,
        dtypes=CPU,
        variants={"": {}, "bf16 products": {"products": "bf16"}},
        slack=lambda arguments: 1.5e-2 if "products" in arguments else 1e-6,
    ),
    "stem3x3": Operation(
        call=lambda **arguments: _convolved(**arguments, convolve=stem3x3),
        build=_stem,
        define=_stem_defined,
        samples=FEW_CHANNELS,
        dtypes=CPU,
        slack=lambda arguments: 1e-6,
    ),
    "bn_act": Operation(
        call=_normalised,
        build=_bn,
        define=_bn_defined,
        samples=CHANNELS,
        written=("running_mean", "running_var"),
        variants=NORMALISATIONS,
        slack=lambda arguments: 1e-6,
    ),
    "pooled_linear": Operation(
        call=_pooled,
        build=_pool,
        define=_pool_defined,
        samples=CHANNELS,
        # all pixels of a channel have one gradient, which torch may have exact by luck
        slack=lambda arguments: 1e-7,
    ),
}


def cases() -> Iterator[tuple[str, str, str, torch.dtype]]:
    """Operation, variant, sample and dtype, all of them."""
    for name, operation in OPERATIONS.items():
        for variant in operation.variants:
            for sample in operation.samples:
                for dtype in operation.dtypes:
                    yield name, variant, sample, dtype


def arguments_of(name: str, variant: str, sample: str, dtype: torch.dtype, seed: int = 0) -> Arguments:
    """The arguments of one of the cases."""
    operation = OPERATIONS[name]
    return operation.build(operation.samples[sample], dtype, seed, **operation.variants[variant])

"""The inputs that every operation is tested on, and the fp64 definitions that it is compared with."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCOPES = ["layer", "global", "filter"]
# what perturb_ takes beside the paper's defaults; gammas at which about half of a network's weights reach the bound
VARIANTS: dict[str, dict[str, Any]] = {
    "absolute": {"gamma": 0.05, "scale": "absolute"},
    "elementwise": {"gamma": 0.5, "scale": "elementwise", "eta": 0.01},
    "relative-bounded": {"gamma": 0.01, "bound": 0.01},
    "elementwise-bounded": {"gamma": 0.5, "scale": "elementwise", "bound": 0.02},
}
SHAPES = {
    "scalar": [()],
    "one": [(1,)],
    "warp_edges": [(31,), (32,), (33,)],
    "primes": [(7, 11, 13), (101,), (2, 3)],
    "empty_tensors": [(0,), (3, 0), (0, 5), (4, 4)],
    "network": [(16, 3, 3, 3), (16,), (32, 16, 3, 3), (10, 64), (10,)],
    "chunk_edges": [(16384,), (16385,), (16383, 2)],
    "large": [(700_001,), (512, 1030)],
}


def generator(seed: int) -> torch.Generator:
    """A generator of its own, so that tests do not depend on their order."""
    return torch.Generator().manual_seed(seed)


def randn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, rounded to the dtype."""
    return (torch.randn(shape, generator=generator(seed), dtype=torch.float64) * scale).to(dtype)


def images(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Uniform numbers in [0, 1] with many at the ends, as images have."""
    values = torch.rand(shape, generator=generator(seed), dtype=torch.float64)
    return ((values * 1.4 - 0.2).clamp(0, 1)).to(dtype)


def weights_and_grads(name: str, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of unlike sizes with small gradients."""
    weights = [randn(shape, dtype, seed + i, 0.3 + i) for i, shape in enumerate(SHAPES[name])]
    grads = [randn(shape, dtype, seed + 100 + i, 1e-2) for i, shape in enumerate(SHAPES[name])]
    return weights, grads


@dataclass(frozen=True)
class Layout:
    """A way of laying the same values out in memory."""

    name: str
    lay: Callable[[Tensor], Tensor]


def _misaligned(tensor: Tensor) -> Tensor:
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return storage[1:].view(tensor.shape).copy_(tensor)


def _transposed(tensor: Tensor) -> Tensor:
    if tensor.ndim < 2:
        return tensor.clone()
    order = [0, *range(tensor.ndim - 1, 0, -1)]
    inverse = [order.index(d) for d in range(tensor.ndim)]
    return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)


LAYOUTS = [
    Layout("contiguous", lambda t: t.clone()),
    Layout("transposed", _transposed),
    Layout("channels_last", lambda t: t.clone(memory_format=torch.channels_last) if t.ndim == 4 else t.clone()),
    Layout("misaligned", _misaligned),
]


def perturbed(
    weights: list[Tensor],
    grads: list[Tensor],
    gamma: float,
    scope: str,
    eps: float = 1e-20,
    *,
    dtype: torch.dtype,
    scale: str = "relative",
    eta: float = 0.0,
    adaptive: Sequence[bool] | None = None,
    bound: float | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The definitions, written from the papers, in plain PyTorch and the precision `dtype`: new weights and scales.

    A direction is followed where its norms are finite, and its scale is in the precision that it is rounded to.
    """
    largest = torch.finfo(torch.promote_types(weights[0].dtype, torch.float32)).max
    weights, grads = [w.to(dtype) for w in weights], [g.to(dtype) for g in grads]
    chosen = adaptive or [True] * len(weights)
    factors = [
        w.abs() + eta if scale == "elementwise" and flag else torch.ones_like(w)
        for w, flag in zip(weights, chosen, strict=True)
    ]
    scaled = [t * g for t, g in zip(factors, grads, strict=True)]
    w_norms, g_norms = norms_of(weights, scope), norms_of(scaled, scope)
    lengths = w_norms if scale == "relative" else [torch.ones_like(norm) for norm in g_norms]
    scales = [
        torch.where(length.isfinite() & g_norm.isfinite() & (scale.abs() <= largest), scale, 0)
        for length, g_norm in zip(lengths, g_norms, strict=True)
        for scale in [gamma * length / (g_norm + eps)]
    ]
    moved = []
    for w, g, factor, multiplier in zip(weights, grads, factors, scales, strict=True):
        v = multiplier * factor**2 * g
        if bound is not None:
            v = torch.maximum(torch.minimum(v, bound * w.abs()), -bound * w.abs())
        moved.append(torch.where(multiplier == 0, w, w + v))
    if scope == "global":
        return moved, scales[0].reshape(1)
    return moved, torch.cat([value.flatten() for value in scales])


perturbed_fp64 = functools.partial(perturbed, dtype=torch.float64)


def spoil(tensor: Tensor, place: int, value: float) -> Tensor:
    """The tensor with one element, counted from either end, made NaN or infinity; empty ones are left alone."""
    if tensor.numel():
        tensor.view(-1)[place % tensor.numel()] = value
    return tensor


def norms_of(tensors: list[Tensor], scope: str) -> list[Tensor]:
    """Norms that broadcast over their tensors."""
    if scope == "global":
        return [torch.cat([t.flatten() for t in tensors]).norm()] * len(tensors)
    if scope == "layer":
        return [t.flatten().norm() for t in tensors]
    return [
        t.square().flatten(1).sum(1).sqrt().reshape(-1, *[1] * (t.ndim - 1)) if t.ndim > 1 else t.flatten().norm()
        for t in tensors
    ]


def stepped(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    dtype: torch.dtype,
    step_size: float,
    epsilon: float,
    norm: str,
    mask: Tensor | None = None,
    clip: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """The attack's step as the papers define it, in the precision `dtype`, without the inward roundings."""
    current, ascent, clean = x_adv.to(dtype), grad.to(dtype), x.to(dtype)
    if mask is not None:
        ascent = torch.where(mask, ascent, 0)
    if norm == "linf":
        delta = (current + step_size * ascent.sign() - clean).clamp(-epsilon, epsilon)
        return (clean + delta).clamp(*clip)
    result = []
    for sample, direction, origin in zip(current, ascent, clean, strict=True):
        length = direction.norm()
        moved = sample + step_size * direction / length if 0 < length < torch.inf else sample
        delta = moved - origin
        distance = delta.norm()
        result.append((origin + delta * (epsilon / distance if distance > epsilon else 1.0)).clamp(*clip))
    return torch.stack(result) if result else current


stepped_fp64 = functools.partial(stepped, dtype=torch.float64)


# what sgd_step_ takes beside its lists: names of lists, and numbers
SGD_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 5e-4},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "clipped": {"momentum": 0.9, "grad_scale": 1024.0, "grad_norm": 800.0, "max_norm": 0.5},
    "not clipped": {"grad_scale": 1000.0, "grad_norm": 800.0, "max_norm": 0.9, "weight_decay": 0.01},
    "averaged": {"average_weight": 0.01, "weight_decay": 0.01},
    "everything": {
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.05,
        "average_weight": 0.1,
        "grad_scale": 3.0,
        "grad_norm": 10.0,
        "max_norm": 1.0,
    },
}


def sgd(
    weights: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    averages: list[Tensor],
    *,
    dtype: torch.dtype,
    lr: float,
    weight_decay: float | Sequence[float] = 0.0,
    momentum: float = 0.0,
    nesterov: bool = False,
    grad_scale: float = 1.0,
    grad_norm: float = 0.0,
    max_norm: float | None = None,
    average_weight: float = 0.0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """torch.optim.SGD's formulas in the precision `dtype`: new weights, momentum buffers and averages."""
    norm = grad_norm / grad_scale
    clip = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
    decays = [weight_decay] * len(weights) if isinstance(weight_decay, float) else weight_decay
    moved, new_buffers, new_averages = [], [], []
    for w, g, b, a, decay in zip(weights, grads, buffers, averages, decays, strict=True):
        w, average = w.to(dtype), a.to(dtype)
        d = g.to(dtype) / grad_scale * clip + decay * w
        new_buffers.append(momentum * b.to(dtype) + d)
        if momentum:
            d = d + momentum * new_buffers[-1] if nesterov else new_buffers[-1]
        moved.append(w - lr * d)
        new_averages.append(average + average_weight * (moved[-1] - average))
    return moved, new_buffers, new_averages


sgd_fp64 = functools.partial(sgd, dtype=torch.float64)

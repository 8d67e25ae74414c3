"""The inputs that every operation is tested on, and the fp64 definitions that it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCOPES = ["layer", "global", "filter"]
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
    return tensor.permute(order).contiguous().permute(inverse)


LAYOUTS = [
    Layout("contiguous", lambda t: t.clone()),
    Layout("transposed", _transposed),
    Layout("channels_last", lambda t: t.clone(memory_format=torch.channels_last) if t.ndim == 4 else t.clone()),
    Layout("misaligned", _misaligned),
]


def perturbed_fp64(
    weights: list[Tensor], grads: list[Tensor], gamma: float, scope: str, eps: float = 1e-20
) -> tuple[list[Tensor], Tensor]:
    """The definition, written from the paper: new weights and scales, in fp64."""
    w64, g64 = [w.double() for w in weights], [g.double() for g in grads]
    if scope == "global":
        w_norm = torch.cat([w.flatten() for w in w64]).norm()
        g_norm = torch.cat([g.flatten() for g in g64]).norm()
        scale = gamma * w_norm / (g_norm + eps)
        return [w + scale * g for w, g in zip(w64, g64, strict=True)], scale.reshape(1)
    moved, scales = [], []
    for w, g in zip(w64, g64, strict=True):
        if scope == "layer" or w.ndim < 2:
            scale = gamma * w.norm() / (g.norm() + eps)
            scales.append(scale.reshape(1))
            moved.append(w + scale * g)
        else:
            rows = [gamma * w[k].norm() / (g[k].norm() + eps) for k in range(len(w))]
            scales += [row.reshape(1) for row in rows]
            moved.append(torch.stack([w[k] + rows[k] * g[k] for k in range(len(w))]) if rows else w.clone())
    return moved, torch.cat(scales) if scales else torch.empty(0, dtype=torch.float64)


def plain_perturbed(weights: list[Tensor], grads: list[Tensor], gamma: float) -> list[Tensor]:
    """What plain PyTorch gives in the tensors' own dtype, scope "layer": the yardstick for errors."""
    return [w + gamma * w.norm() / (g.norm() + 1e-20) * g for w, g in zip(weights, grads, strict=True)]


def stepped_fp64(
    x_adv: Tensor, grad: Tensor, x: Tensor, *, step_size: float, epsilon: float, norm: str, mask: Tensor | None = None
) -> Tensor:
    """The attack's step as the papers define it, in fp64, without the inward roundings."""
    current, ascent, clean = x_adv.double(), grad.double(), x.double()
    if mask is not None:
        ascent = ascent * mask
    if norm == "linf":
        delta = (current + step_size * ascent.sign() - clean).clamp(-epsilon, epsilon)
        return (clean + delta).clamp(0, 1)
    result = []
    for sample, direction, origin in zip(current, ascent, clean, strict=True):
        length = direction.norm()
        moved = sample + step_size * direction / length if length > 0 else sample
        delta = moved - origin
        distance = delta.norm()
        result.append((origin + delta * (epsilon / distance if distance > epsilon else 1.0)).clamp(0, 1))
    return torch.stack(result)

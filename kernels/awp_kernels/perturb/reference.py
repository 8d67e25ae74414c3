"""The definition of the norm-scaled perturbations, in plain PyTorch.

Sources: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020, equation 10
("relative"). Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving Generalization,
ICLR 2021 ("absolute"). Kwon, Kim, Park, Choi: ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning
of Deep Neural Networks, ICML 2021 ("elementwise").
"""

import torch
from torch import Tensor

from awp_kernels._ball import round_toward_zero, within, working_dtype
from awp_kernels.perturb.rule import Rule


def _norms(tensors: list[Tensor], scope: str) -> list[Tensor]:
    """fp64 norms, each of a shape that broadcasts over its tensor."""
    if scope == "filter":
        return [
            torch.linalg.vector_norm(t.double(), dim=tuple(range(1, t.ndim)), keepdim=True)
            if t.ndim > 1
            else t.double().norm()
            for t in tensors
        ]
    norms = [t.double().norm() for t in tensors]
    if scope == "global":
        total = torch.stack(norms).norm()
        return [total for _ in tensors]
    return norms


def _scale(gamma: float, length: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """What a direction is multiplied by, rounded to `dtype`; NaN: a norm or the scale is not finite."""
    scale = (gamma * length / divisor).to(dtype)
    # an infinite length makes the scale infinite, an infinite divisor makes it 0
    return torch.where(divisor.isfinite() & scale.isfinite(), scale, torch.nan)


def perturb(out: list[Tensor], weights: list[Tensor], grads: list[Tensor], saved: list[Tensor], rule: Rule) -> Tensor:
    """Write w + v to `out`, and w to `saved`; return the scales, NaN where a direction is not followed."""
    dtype = working_dtype(weights[0].dtype)
    # T of every tensor; None where it is 1
    factors: list[Tensor | None] = [None] * len(weights)
    if rule.scale == "elementwise":
        offset = torch.tensor(rule.eta, dtype=dtype).item()
        factors = [
            w.to(dtype).abs() + offset if chosen else None
            for w, chosen in zip(weights, rule.adaptive or [True] * len(weights), strict=True)
        ]
    scaled = [g if t is None else t.double() * g.double() for g, t in zip(grads, factors, strict=True)]
    grad_norms = _norms(scaled, rule.scope)
    if rule.weight_norms is not None:
        norms = rule.weight_norms
        lengths = [norms.norm()] * len(weights) if rule.scope == "global" else list(norms)
    elif rule.scale == "relative":
        lengths = _norms(weights, rule.scope)
    else:
        lengths = [torch.ones_like(norm) for norm in grad_norms]
    scales = [
        _scale(rule.gamma, length, norm + rule.eps, dtype) for length, norm in zip(lengths, grad_norms, strict=True)
    ]
    for copy, weight in zip(saved, weights, strict=bool(saved)):
        copy.copy_(weight)
    for target, weight, grad, factor, multiplier in zip(out, weights, grads, factors, scales, strict=True):
        start, step = weight.to(dtype), multiplier * grad.to(dtype)
        # T twice, not T^2, which leaves fp32's range for small weights
        moved = start + (step if factor is None else step * factor * factor)
        if rule.bound is not None:
            moved = within(moved, start, round_toward_zero(rule.bound, dtype))
        # where nothing is followed, w to the bit: NaN * 0 is NaN, and -0.0 + 0.0 is 0.0
        target.copy_(torch.where(multiplier.abs() > 0, moved.to(target.dtype), weight.to(target.dtype)))
    if rule.scope == "filter":
        return torch.cat([value.reshape(-1) for value in scales])
    return scales[0].reshape(1) if rule.scope == "global" else torch.stack(scales)

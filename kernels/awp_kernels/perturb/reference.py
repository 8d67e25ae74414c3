"""The definition of the norm-scaled perturbation, in plain PyTorch.

Source: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020, equation 10.
"""

import torch
from torch import Tensor

from awp_kernels._ball import working_dtype


def filters(tensor: Tensor) -> int:
    """Filters of a tensor: entries of dimension 0, or 1 below two dimensions."""
    return tensor.shape[0] if tensor.ndim > 1 else 1


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


def perturb(
    out: list[Tensor],
    weights: list[Tensor],
    grads: list[Tensor],
    saved: list[Tensor],
    gamma: float,
    scope: str,
    eps: float,
) -> Tensor:
    """Write w + gamma * ||w|| / (||g|| + eps) * g to `out`, and w to `saved`; return the scales."""
    dtype = working_dtype(weights[0].dtype) if weights else torch.float32
    scales = [
        (gamma * weight_norm / (grad_norm + eps)).to(dtype)
        for weight_norm, grad_norm in zip(_norms(weights, scope), _norms(grads, scope), strict=True)
    ]
    for copy, weight in zip(saved, weights, strict=bool(saved)):
        copy.copy_(weight)
    for target, weight, grad, scale in zip(out, weights, grads, scales, strict=True):
        target.copy_(weight.to(dtype) + scale * grad.to(dtype))
    if not scales:
        return torch.empty(0, dtype=dtype)
    if scope == "filter":
        return torch.cat([scale.reshape(-1) for scale in scales])
    return scales[0].reshape(1) if scope == "global" else torch.stack(scales)

"""The internal signatures of docs/areas/kernels.md around the compiled operations, those of `awp_cpp` or `awp_cuda`.

Operations that have them already are not named here.
"""

import functools
from typing import Any

from torch import Tensor

from awp_kernels import _checks
from awp_kernels._ball import l2_radius, round_toward_zero
from awp_kernels.augment.reference import Rule as AugmentRule
from awp_kernels.perturb.rule import Rule as PerturbRule

_SCOPES = {"layer": 0, "global": 1, "filter": 2}
_SCALES = {"relative": 0, "absolute": 1, "elementwise": 2}
_NORMS = {"linf": 0, "l2": 1, "normal": 2}


def perturb(
    operation: Any,
    out: list[Tensor],
    weights: list[Tensor],
    grads: list[Tensor],
    saved: list[Tensor],
    rule: PerturbRule,
) -> Tensor:
    """Calls `perturb` with codes for names, and the bound as a number of the weights' precision."""
    gamma, scope, eps, scale, eta, bound, adaptive, weight_norms = rule
    radius = None if bound is None else round_toward_zero(bound, weights[0].dtype)
    flags = [int(flag) for flag in adaptive]
    kind = _SCALES[scale]
    return operation(out, weights, grads, saved, gamma, _SCOPES[scope], eps, kind, eta, radius, flags, weight_norms)


def sgd_step(operation: Any, *lists_and_rule: Any) -> Tensor:
    """Calls `sgd_step` with the rule's numbers one by one."""
    *lists, rule = lists_and_rule
    return operation(*lists, *rule)


def pgd_init(
    operation: Any, x_adv: Tensor, x: Tensor, sample_ids: Tensor, epsilon: float, norm: str, seed: int
) -> None:
    """Calls `pgd_init` with both radii."""
    # a standard deviation is rounded to nearest, which the operation does
    bound = epsilon if norm == "normal" else round_toward_zero(epsilon, x.dtype)
    radius = l2_radius(epsilon, x[0].numel(), x.dtype)
    operation(x_adv, x, sample_ids, bound, radius, _NORMS[norm], seed)


def pgd_step(
    operation: Any,
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    step_size: float,
    epsilon: float,
    norm: str,
    low: float,
    high: float,
) -> None:
    """Calls `pgd_step` with both radii."""
    if x.numel():
        bound, radius = round_toward_zero(epsilon, x.dtype), l2_radius(epsilon, x[0].numel(), x.dtype)
        operation(x_adv, grad, x, mask, step_size, bound, radius, _NORMS[norm], low, high)


def pgd_step_normalize(
    operation: Any,
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    mask: Tensor | None,
    out: Tensor,
    mean: Tensor,
    std: Tensor,
    *step: Any,
) -> None:
    """Calls `pgd_step_normalize` as `pgd_step` is called."""
    pgd_step(functools.partial(operation, mean, std, out), x_adv, grad, x, mask, *step)


def augment(
    operation: Any, images: Tensor, rows: Tensor | None, sample_ids: Tensor, rule: AugmentRule, out: Tensor
) -> None:
    """Calls `augment` with the memory orders."""
    packed, out_packed = not _checks.planar(images), not _checks.planar(out)
    operation(images, rows, sample_ids, *rule, out, packed, out_packed)

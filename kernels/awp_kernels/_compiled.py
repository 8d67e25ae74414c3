"""The compiled operations behind the internal signatures of docs/areas/kernels.md."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from awp_kernels import _checks
from awp_kernels._ball import l2_radius, round_toward_zero
from awp_kernels.augment.reference import Rule as AugmentRule
from awp_kernels.perturb.rule import Rule as PerturbRule

_SCOPES = {"layer": 0, "global": 1, "filter": 2}
_SCALES = {"relative": 0, "absolute": 1, "elementwise": 2}
_NORMS = {"linf": 0, "l2": 1, "normal": 2}


def perturb(namespace: Any) -> Callable[..., Tensor]:
    """Bind `perturb` to `torch.ops.awp_cpp` or `torch.ops.awp_cuda`."""
    operation = namespace.perturb.default

    def call(
        out: list[Tensor], weights: list[Tensor], grads: list[Tensor], saved: list[Tensor], rule: PerturbRule
    ) -> Tensor:
        gamma, scope, eps, scale, eta, bound, adaptive, weight_norms = rule
        radius = None if bound is None else round_toward_zero(bound, weights[0].dtype)
        flags = [int(flag) for flag in adaptive]
        kind = _SCALES[scale]
        return operation(out, weights, grads, saved, gamma, _SCOPES[scope], eps, kind, eta, radius, flags, weight_norms)

    return call


def restore(namespace: Any) -> Callable[..., None]:
    """Bind `restore`."""
    return namespace.restore.default


def sgd_step(namespace: Any) -> Callable[..., Tensor]:
    """Bind `sgd_step`."""
    operation = namespace.sgd_step.default

    def call(*lists_and_rule: Any) -> Tensor:
        *lists, rule = lists_and_rule
        return operation(*lists, *rule)

    return call


def total_norm(namespace: Any) -> Callable[..., Tensor]:
    """Bind `total_norm`."""
    return namespace.total_norm.default


def pgd_init(namespace: Any) -> Callable[..., None]:
    """Bind `pgd_init`."""
    operation = namespace.pgd_init.default

    def call(x_adv: Tensor, x: Tensor, sample_ids: Tensor, epsilon: float, norm: str, seed: int) -> None:
        # a standard deviation is rounded to nearest, which the operation does
        bound = epsilon if norm == "normal" else round_toward_zero(epsilon, x.dtype)
        radius = l2_radius(epsilon, x[0].numel(), x.dtype)
        operation(x_adv, x, sample_ids, bound, radius, _NORMS[norm], seed)

    return call


def pgd_step(namespace: Any) -> Callable[..., None]:
    """Bind `pgd_step`."""
    operation = namespace.pgd_step.default

    def call(
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
        if x.numel():
            bound, radius = round_toward_zero(epsilon, x.dtype), l2_radius(epsilon, x[0].numel(), x.dtype)
            operation(x_adv, grad, x, mask, step_size, bound, radius, _NORMS[norm], low, high)

    return call


def augment(namespace: Any) -> Callable[..., None]:
    """Bind `augment`."""
    operation = namespace.augment.default

    def call(images: Tensor, rows: Tensor | None, sample_ids: Tensor, rule: AugmentRule, out: Tensor) -> None:
        packed, out_packed = not _checks.planar(images), not _checks.planar(out)
        operation(images, rows, sample_ids, *rule, out, packed, out_packed)

    return call

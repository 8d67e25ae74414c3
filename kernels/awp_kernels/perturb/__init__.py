"""`perturb_` and `perturb_into_`: move weights along their gradient by a fraction of their norm."""

from collections.abc import Sequence

import torch
from torch import Tensor

from awp_kernels import _backend, _checks
from awp_kernels._ball import working_dtype
from awp_kernels.perturb.reference import filters


def _checked(weights: list[Tensor], gamma: float, scope: str, eps: float) -> None:
    if not weights:
        raise ValueError("weights: expected at least one tensor, got an empty list")
    _checks.one_of("scope", scope, _checks.SCOPES)
    _checks.finite("gamma", gamma)
    _checks.finite("eps", eps, minimum=0)


@torch.library.custom_op("awp::perturb_", mutates_args=("weights", "saved"))
def _perturb_(
    weights: list[Tensor], grads: list[Tensor], gamma: float, saved: list[Tensor], scope: str, eps: float
) -> Tensor:
    _checked(weights, gamma, scope, eps)
    grads = list(grads)
    written = {"weights": weights, "saved": saved} if saved else {"weights": weights}
    _checks.tensor_lists(written, {"grads": grads}, filters=scope == "filter")
    _checks.same_dtype("grads", grads, "weights", weights)
    _checks.same_dtype("saved", saved, "weights", weights)
    run = _backend.select("perturb", weights[0].device, {weights[0].dtype})
    return run(weights, weights, grads, saved, gamma, scope, eps)


@torch.library.custom_op("awp::perturb_into_", mutates_args=("out",))
def _perturb_into_(
    out: list[Tensor], weights: list[Tensor], grads: list[Tensor], gamma: float, scope: str, eps: float
) -> Tensor:
    _checked(weights, gamma, scope, eps)
    weights, grads = list(weights), list(grads)
    _checks.tensor_lists({"out": out}, {"weights": weights, "grads": grads}, filters=scope == "filter")
    run = _backend.select("perturb", weights[0].device, {out[0].dtype, weights[0].dtype, grads[0].dtype})
    return run(out, weights, grads, [], gamma, scope, eps)


def _scales_like(weights: list[Tensor], scope: str) -> Tensor:
    counts = {"layer": len(weights), "global": 1, "filter": sum(filters(weight) for weight in weights)}
    return weights[0].new_empty(counts[scope], dtype=working_dtype(weights[0].dtype))


@_perturb_.register_fake
def _(weights: list[Tensor], grads: list[Tensor], gamma: float, saved: list[Tensor], scope: str, eps: float) -> Tensor:
    _checks.alike("weights", weights, {"grads": grads} | ({"saved": saved} if saved else {}))
    return _scales_like(weights, scope)


@_perturb_into_.register_fake
def _(out: list[Tensor], weights: list[Tensor], grads: list[Tensor], gamma: float, scope: str, eps: float) -> Tensor:
    _checks.alike("out", out, {"weights": weights, "grads": grads})
    return _scales_like(weights, scope)


@torch.no_grad()
def perturb_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    gamma: float,
    *,
    saved: Sequence[Tensor] | None = None,
    scope: str = "layer",
    eps: float = 1e-20,
) -> Tensor:
    """Add gamma * ||w|| / (||g|| + eps) * g to every weight, in place.

    Norms are accumulated in fp64 and the sum is formed in fp32 (all in fp64 for fp64 weights).

    Args:
        weights: tensors of any shapes, one dtype (float64, float32, float16 or bfloat16), one device.
        grads: as many tensors, of the same shapes and dtype.
        gamma: length of the perturbation as a fraction of ||w||; negative moves downhill.
        saved: tensors of the same shapes, strides and dtype that take the weights' bits, for `restore_`.
        scope: what a norm is taken over: each tensor ("layer", the paper's), all of them ("global"), or each entry
            of dimension 0 ("filter"; tensors below two dimensions count as one filter).
        eps: added to ||g||, so that a zero gradient moves nothing.

    Returns:
        The scales gamma * ||w|| / (||g|| + eps): float32 (float64 for float64 weights), [len(weights)], [1] or
        [sum of filters].

    Raises:
        ValueError: lengths, shapes, dtypes, devices, layouts or memory that do not fit, named by argument.

    Source: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020.

    Example:
        >>> import torch
        >>> from awp_kernels import perturb_, restore_
        >>> w, g = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
        >>> saved = torch.empty_like(w)
        >>> perturb_([w], [g], gamma=0.1, saved=[saved])
        tensor([0.2500])
        >>> w
        tensor([3.0000, 4.5000])
        >>> restore_([w], [saved])
        >>> w
        tensor([3., 4.])
    """
    return _perturb_(list(weights), list(grads), float(gamma), list(saved or ()), scope, float(eps))


@torch.no_grad()
def perturb_into_(
    out: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    gamma: float,
    *,
    scope: str = "layer",
    eps: float = 1e-20,
) -> Tensor:
    """Write w + gamma * ||w|| / (||g|| + eps) * g to other tensors; the weights stay as they are.

    A 16-bit working copy beside fp32 weights takes the perturbation this way, and restoring costs nothing. Mind
    that bfloat16 keeps too few digits for it: at gamma 0.01 the perturbation in it is wrong by 23%, in float16 by 3%.

    Args:
        out: tensors of the weights' shapes and strides, of any one floating dtype.
        weights: as for `perturb_`.
        grads: as for `perturb_`, of any one floating dtype.
        gamma: as for `perturb_`.
        scope: as for `perturb_`.
        eps: as for `perturb_`.

    Returns:
        The scales, as `perturb_` does.

    Raises:
        ValueError: as `perturb_` does.
    """
    return _perturb_into_(list(out), list(weights), list(grads), float(gamma), scope, float(eps))

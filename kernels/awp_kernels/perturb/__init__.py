"""`perturb_` and `perturb_into_`: move weights along their gradient by a length that is measured in norms."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from awp_kernels import _backend, _checks
from awp_kernels.perturb.rule import SCHEMA, Rule


@torch.library.custom_op(
    "awp::perturb_",
    mutates_args=("weights", "saved"),
    schema=f"(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] saved, {SCHEMA}) -> Tensor",
)
def _perturb_(weights: list[Tensor], grads: list[Tensor], saved: list[Tensor], *arguments: Any) -> Tensor:
    rule = Rule(*arguments)
    numbers = rule.check(weights)
    written = {"weights": weights, "saved": saved} if saved else {"weights": weights}
    _checks.tensor_lists(written, {"grads": grads}, filters=rule.scope == "filter", numbers=numbers)
    _checks.same_dtype("grads", grads, "weights", weights)
    _checks.same_dtype("saved", saved, "weights", weights)
    run = _backend.select("perturb", weights[0].device, {weights[0].dtype})
    return run(weights, weights, grads, saved, rule)


@torch.library.custom_op(
    "awp::perturb_into_",
    mutates_args=("out",),
    schema=f"(Tensor(a!)[] out, Tensor[] weights, Tensor[] grads, {SCHEMA}) -> Tensor",
)
def _perturb_into_(out: list[Tensor], weights: list[Tensor], grads: list[Tensor], *arguments: Any) -> Tensor:
    rule = Rule(*arguments)
    numbers = rule.check(weights)
    read = {"weights": weights, "grads": grads}
    _checks.tensor_lists({"out": out}, read, filters=rule.scope == "filter", numbers=numbers)
    run = _backend.select("perturb", weights[0].device, {out[0].dtype, weights[0].dtype, grads[0].dtype})
    return run(out, weights, grads, [], rule)


@_perturb_.register_fake
def _(weights: list[Tensor], grads: list[Tensor], saved: list[Tensor], *arguments: Any) -> Tensor:
    _checks.alike("weights", weights, {"grads": grads} | ({"saved": saved} if saved else {}))
    return Rule(*arguments).scales_like(weights)


@_perturb_into_.register_fake
def _(out: list[Tensor], weights: list[Tensor], grads: list[Tensor], *arguments: Any) -> Tensor:
    _checks.alike("out", out, {"weights": weights, "grads": grads})
    return Rule(*arguments).scales_like(weights)


def _call(
    operation: Callable[..., Tensor],
    lists: tuple[list[Tensor], ...],
    weights: Sequence[Tensor],
    found_inf: Tensor | None,
    rule: Rule,
) -> Tensor:
    """Returns the scales, 0 where the operation says NaN: nothing was followed there."""
    if found_inf is not None and weights:
        _checks.scalar("found_inf", found_inf, (torch.float32,), "weights[0]", weights[0])
    gamma, scope, eps, scale, eta, bound, adaptive, weight_norms = rule
    limit = None if bound is None else float(bound)
    flags = list(adaptive)
    scales = operation(*lists, float(gamma), scope, float(eps), scale, float(eta), limit, flags, weight_norms)
    if found_inf is not None:
        found_inf.masked_fill_(scales.isnan().any(), 1.0)
    return scales.nan_to_num_(nan=0.0)


@torch.no_grad()
def perturb_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    gamma: float,
    *,
    saved: Sequence[Tensor] | None = None,
    scope: str = "layer",
    scale: str = "relative",
    eta: float = 0.0,
    adaptive: Sequence[bool] | None = None,
    bound: float | None = None,
    eps: float = 1e-20,
    weight_norms: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Add a perturbation v along the gradient to every weight, in place.

        scale "relative"      v = gamma * ||w|| / (||g|| + eps) * g             AWP
        scale "absolute"      v = gamma / (||g|| + eps) * g                     SAM, with scope "global"
        scale "elementwise"   v = gamma / (||T g|| + eps) * T^2 g, T = |w| + eta    ASAM, with scope "global"

    Norms are accumulated in fp64, the scale is rounded to fp32, and the sum is formed in fp32 (all in fp64 for fp64
    weights).

    A direction that is not finite is not followed, which is decided where the tensors are, without waiting: if a norm
    in the formula or the scale is not finite (one gradient of NaN or infinity, say), the scale is 0, and w keeps its
    bits, for all that the norm is taken over. A sum w + v beyond the range of 16-bit storage is infinity there.

    Args:
        weights: tensors of any shapes, one dtype (float64, float32, float16 or bfloat16), one device.
        grads: as many tensors, of the same shapes and dtype.
        gamma: length of the perturbation: as a fraction of ||w|| ("relative"), in the units of w ("absolute"), or in
            multiples of T ("elementwise"); negative moves downhill.
        saved: tensors of the same shapes, strides and dtype that take the weights' bits, for `restore_`.
        scope: what a norm is taken over: each tensor ("layer"), all of them ("global"), or each entry of dimension 0
            ("filter"; tensors below two dimensions count as one filter).
        scale: "relative", "absolute" or "elementwise", as above.
        eta: added to |w| in T, >= 0, in the units of w; for "elementwise" alone.
        adaptive: a flag a tensor, for "elementwise" alone: where it is false, T is 1. By default true for all.
        bound: if given, every weight stays within bound * |w| of where it was: |v| <= bound * |w| holds exactly in
            float32 and float64; 16-bit storage rounds once more, to nearest.
        eps: added to the gradient's norm, so that a zero gradient moves nothing.
        weight_norms: if given, ||w|| of every weight as it is, float64 [len(weights)], which `sgd_step_` returned: the
            weights are then read once, not twice. For scale "relative" with scope "layer" or "global".
        found_inf: if given, float32, one element on the weights' device: set to 1 where a direction was not followed,
            else left as it is. A scale of 0 does not tell: it is 0 as well for gamma 0 or weights that are 0.

    Returns:
        The scales that g, or T^2 g, was multiplied by, before the bound, 0 where a direction was not followed: float32
        (float64 for float64 weights), [len(weights)], [1] or [sum of filters].

    Raises:
        ValueError: lengths, shapes, dtypes, devices, layouts or memory that do not fit, and numbers out of range,
            named by argument.

    Sources: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020. Foret, Kleiner,
    Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving Generalization, ICLR 2021. Kwon, Kim,
    Park, Choi: ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks,
    ICML 2021.

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
        >>> perturb_([w], [g], gamma=0.1, scale="absolute")
        tensor([0.0500])
        >>> w
        tensor([3.0000, 4.1000])
    """
    rule = Rule(gamma, scope, eps, scale, eta, bound, adaptive or (), weight_norms)
    return _call(_perturb_, (list(weights), list(grads), list(saved or ())), weights, found_inf, rule)


@torch.no_grad()
def perturb_into_(
    out: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    gamma: float,
    *,
    scope: str = "layer",
    scale: str = "relative",
    eta: float = 0.0,
    adaptive: Sequence[bool] | None = None,
    bound: float | None = None,
    eps: float = 1e-20,
    weight_norms: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Write w + v, with the perturbation v of `perturb_`, to other tensors; the weights stay as they are.

    A 16-bit working copy beside fp32 weights takes the perturbation this way, and restoring costs nothing. Mind
    that bfloat16 keeps too few digits for it: at gamma 0.01 the perturbation in it is wrong by 23%, in float16 by 3%.

    Args:
        out: tensors of the weights' shapes and strides, of any one floating dtype.
        weights: as for `perturb_`.
        grads: as for `perturb_`, of any one floating dtype.
        gamma: as for `perturb_`.
        scope: as for `perturb_`.
        scale: as for `perturb_`.
        eta: as for `perturb_`.
        adaptive: as for `perturb_`.
        bound: as for `perturb_`.
        eps: as for `perturb_`.
        weight_norms: as for `perturb_`.
        found_inf: as for `perturb_`.

    Returns:
        The scales, as `perturb_` does.

    Raises:
        ValueError: as `perturb_` does.
    """
    rule = Rule(gamma, scope, eps, scale, eta, bound, adaptive or (), weight_norms)
    return _call(_perturb_into_, (list(out), list(weights), list(grads)), weights, found_inf, rule)

"""`pgd_step_`: one projected ascent step on the images."""

import torch
from torch import Tensor

from awp_kernels import _backend, _checks


def checked(
    x_adv: Tensor, x: Tensor, step_size: float, epsilon: float, norm: str, low: float, high: float, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What both attack steps check alike; returns `x` and the mask as kernels take them.

    Raises:
        ValueError: arguments that do not fit, named.
    """
    _checks.one_of("norm", norm, _checks.NORMS)
    _checks.finite("epsilon", epsilon, minimum=0)
    _checks.finite("step_size", step_size)
    if not low <= high:
        raise ValueError(f"clip: expected (low, high) with low <= high, got ({low}, {high})")
    _checks.image_batch(x_adv, x)
    clean = _checks.like("x", x, "x_adv", x_adv)
    if mask is None:
        return clean, None
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected torch.bool, got {mask.dtype}")
    _checks.same_device("mask", mask, "x_adv", x_adv)
    if mask.ndim > x_adv.ndim or any(
        m not in (1, size) for m, size in zip(reversed(mask.shape), reversed(x_adv.shape), strict=False)
    ):
        raise ValueError(
            f"mask: expected a shape that broadcasts to {tuple(x_adv.shape)} like x_adv, got {tuple(mask.shape)}"
        )
    return clean, torch.empty_like(x_adv, dtype=torch.uint8).copy_(mask.expand(x_adv.shape))


@torch.library.custom_op("awp::pgd_step_", mutates_args=("x_adv",))
def _pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    epsilon: float,
    norm: str,
    low: float,
    high: float,
    mask: Tensor | None,
) -> None:
    clean, region = checked(x_adv, x, step_size, epsilon, norm, low, high, mask)
    ascent = _checks.like("grad", grad, "x_adv", x_adv)
    _checks.no_overlap({"x_adv": [x_adv]}, {"x": [clean], "grad": [ascent]})
    run = _backend.select("pgd_step", x_adv.device, {x_adv.dtype, ascent.dtype})
    run(x_adv, ascent, clean, region, step_size, epsilon, norm, low, high)


@_pgd_step_.register_fake
def _(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    epsilon: float,
    norm: str,
    low: float,
    high: float,
    mask: Tensor | None,
) -> None:
    _checks.traced_batch(x_adv, {"x": x, "grad": grad}, {"mask": mask})


@torch.no_grad()
def pgd_step_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    step_size: float,
    epsilon: float,
    norm: str,
    clip: tuple[float, float] = (0.0, 1.0),
    mask: Tensor | None = None,
) -> None:
    """Move `x_adv` uphill, project it onto the epsilon ball around `x`, and clip it, in place and in one pass.

    `linf` moves by step_size * sign(grad), which is 0 for NaN, `l2` by step_size * grad / ||grad|| a sample (not at all
    where the norm is zero or not finite). In float32 and float64 the result lies in the ball exactly, not to rounding
    error.

    Args:
        x_adv: [N, ...], read and written.
        grad: [N, ...], gradient of the attack's loss with respect to x_adv, of any floating dtype and any scale.
        x: [N, ...], the clean images, same dtype as x_adv.
        step_size: length of the step, in the units of x; negative moves downhill.
        epsilon: radius of the ball, in the units of x.
        norm: "linf" or "l2".
        clip: the range of valid values.
        mask: bool, broadcastable to x_adv; gradient entries where it is false count as zero.

    Raises:
        ValueError: arguments that do not fit, named.

    Source: Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
    """
    low, high = clip
    _pgd_step_(x_adv, grad, x, float(step_size), float(epsilon), norm, float(low), float(high), mask)

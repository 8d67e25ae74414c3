"""`pgd_step_normalize_`: one projected ascent step on the images, and the network's next input made of them."""

import torch
from torch import Tensor

from awp_kernels import _backend, _checks
from awp_kernels.pgd_step import checked


def _network_input(out: Tensor, grad: Tensor, x_adv: Tensor) -> Tensor:
    """Check what the network is given, and what it gives back; returns the gradient in the memory order of `out`."""
    if x_adv.ndim != 4 or x_adv.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"x_adv: expected float32 or float64 images [N, C, H, W], got {x_adv.dtype} of shape {tuple(x_adv.shape)}"
        )
    _checks.floating_strided("out", out)
    samples, channels, height, width = x_adv.shape
    if out.ndim != 4 or out.shape[1] < channels or out.shape != (samples, out.shape[1], height, width):
        raise ValueError(
            f"out: expected shape ({samples}, at least {channels}, {height}, {width}) as x_adv has, "
            f"got {tuple(out.shape)}"
        )
    if out.shape[1] * height * width >= 1 << 31:
        raise ValueError(f"out: expected less than 2^31 values a sample, got {out.shape[1] * height * width}")
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"out: expected channels_last order without gaps, got strides {out.stride()}")
    if grad.dtype != out.dtype:
        raise ValueError(f"grad: expected {out.dtype} like out, whose gradient it is, got {grad.dtype}")
    return _checks.like("grad", grad, "out", out)


def _vector(name: str, vector: Tensor, x_adv: Tensor) -> Tensor:
    _checks.floating_strided(name, vector)
    if vector.dtype != x_adv.dtype or vector.shape != x_adv.shape[1:2]:
        raise ValueError(
            f"{name}: expected {x_adv.dtype} of shape ({x_adv.shape[1]},), one value a channel of x_adv, "
            f"got {vector.dtype} of shape {tuple(vector.shape)}"
        )
    _checks.same_device(name, vector, "x_adv", x_adv)
    return vector.contiguous()


@torch.library.custom_op("awp::pgd_step_normalize_", mutates_args=("x_adv", "out"))
def _pgd_step_normalize_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    mean: Tensor,
    std: Tensor,
    step_size: float,
    epsilon: float,
    norm: str,
    low: float,
    high: float,
    mask: Tensor | None,
) -> None:
    clean, region = checked(x_adv, x, step_size, epsilon, norm, low, high, mask)
    ascent = _network_input(out, grad, x_adv)
    _checks.same_device("out", out, "x_adv", x_adv)
    center, scale = _vector("mean", mean, x_adv), _vector("std", std, x_adv)
    read = {"x": [clean], "grad": [ascent], "mean": [center], "std": [scale]}
    _checks.no_overlap({"x_adv": [x_adv], "out": [out]}, read)
    run = _backend.select("pgd_step_normalize", x_adv.device, {x_adv.dtype, out.dtype})
    run(x_adv, ascent, clean, region, out, center, scale, step_size, epsilon, norm, low, high)


@_pgd_step_normalize_.register_fake
def _(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    mean: Tensor,
    std: Tensor,
    step_size: float,
    epsilon: float,
    norm: str,
    low: float,
    high: float,
    mask: Tensor | None,
) -> None:
    _checks.traced_batch(x_adv, {"x": x}, {"grad": grad, "out": out, "mean": mean, "std": std, "mask": mask})


@torch.no_grad()
def pgd_step_normalize_(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    step_size: float,
    epsilon: float,
    norm: str,
    clip: tuple[float, float] = (0.0, 1.0),
    mask: Tensor | None = None,
) -> None:
    """`pgd_step_`, and with it what the network reads next, in one pass.

    `x_adv` is moved, projected and clipped as `pgd_step_` does it along the gradient for the images, grad[:, :C] / std,
    of which "linf" takes the sign. Then out[:, :C] = (x_adv - mean) / std, computed in the precision of x_adv and
    rounded once, and out[:, C:] = 0.

    Args:
        x_adv: [N, C, H, W], fp32 (or fp64), read and written.
        grad: [N, K, H, W], gradient of the attack's loss with respect to `out`, of its dtype and any scale. Channels
            from C on are not looked at.
        x: [N, C, H, W], the clean images, same dtype as x_adv.
        out: [N, K, H, W], K >= C, in channels_last order, fp32, fp16 or bf16; written.
        mean: [C], same dtype as x_adv.
        std: [C], same dtype as x_adv; not 0.
        step_size: see `pgd_step_`.
        epsilon: see `pgd_step_`.
        norm: "linf" or "l2".
        clip: the range of valid values.
        mask: bool, broadcastable to x_adv; gradient entries where it is false count as zero.

    Raises:
        ValueError: arguments that do not fit, named.

    Source: Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
    """
    low, high = clip
    _pgd_step_normalize_(
        x_adv, grad, x, out, mean, std, float(step_size), float(epsilon), norm, float(low), float(high), mask
    )

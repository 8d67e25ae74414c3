"""`pgd_init_` and `pgd_init_normal_`: the attack's random starting point, keyed by sample id."""

import torch
from torch import Tensor

from awp_kernels import _backend, _checks


def _start(x_adv: Tensor, x: Tensor, size: float, norm: str, sample_ids: Tensor, seed: int) -> None:
    """Check what both operations share, and run; `size` is epsilon, or the standard deviation."""
    _checks.image_batch(x_adv, x)
    clean = _checks.like("x", x, "x_adv", x_adv)
    if sample_ids.dtype != torch.int64 or sample_ids.shape != x_adv.shape[:1]:
        raise ValueError(
            f"sample_ids: expected int64 of shape ({x_adv.shape[0]},), "
            f"got {sample_ids.dtype} of shape {tuple(sample_ids.shape)}"
        )
    _checks.same_device("sample_ids", sample_ids, "x_adv", x_adv)
    _checks.no_overlap({"x_adv": [x_adv]}, {"x": [clean]})
    run = _backend.select("pgd_init", x_adv.device, {x_adv.dtype})
    if x_adv.numel():
        run(x_adv, clean, sample_ids.contiguous(), size, norm, seed)


@torch.library.custom_op("awp::pgd_init_", mutates_args=("x_adv",))
def _pgd_init_(x_adv: Tensor, x: Tensor, epsilon: float, norm: str, sample_ids: Tensor, seed: int) -> None:
    _checks.one_of("norm", norm, _checks.NORMS)
    _checks.finite("epsilon", epsilon, minimum=0)
    _start(x_adv, x, epsilon, norm, sample_ids, seed)


@_pgd_init_.register_fake
def _(x_adv: Tensor, x: Tensor, epsilon: float, norm: str, sample_ids: Tensor, seed: int) -> None:
    _checks.traced_batch(x_adv, {"x": x}, {"sample_ids": sample_ids})


@torch.library.custom_op("awp::pgd_init_normal_", mutates_args=("x_adv",))
def _pgd_init_normal_(x_adv: Tensor, x: Tensor, std: float, sample_ids: Tensor, seed: int) -> None:
    _checks.finite("std", std, minimum=0)
    _start(x_adv, x, std, "normal", sample_ids, seed)


@_pgd_init_normal_.register_fake
def _(x_adv: Tensor, x: Tensor, std: float, sample_ids: Tensor, seed: int) -> None:
    _checks.traced_batch(x_adv, {"x": x}, {"sample_ids": sample_ids})


@torch.no_grad()
def pgd_init_(x_adv: Tensor, x: Tensor, *, epsilon: float, norm: str, sample_ids: Tensor, seed: int) -> None:
    """Write x plus noise uniform in the epsilon ball, clipped to [0, 1], to `x_adv`.

    The noise of a sample depends on `seed` and its id alone: neither on its place in the batch, nor on the number of
    ranks, nor on memory format, device or implementation (equal to the last bit).

    Args:
        x_adv: [N, ...], written; float32 keeps the ball exact, 16-bit storage rounds once more.
        x: [N, ...], values in [0, 1], same dtype.
        epsilon: radius of the ball, in the units of x.
        norm: "linf" or "l2".
        sample_ids: int64 [N].
        seed: in [0, 2^63); vary it from step to step, for example by `awp_kernels.philox.mix_seed`.

    Raises:
        ValueError: arguments that do not fit, named.
    """
    _checks.seed(seed)
    _pgd_init_(x_adv, x, float(epsilon), norm, sample_ids, seed)


@torch.no_grad()
def pgd_init_normal_(x_adv: Tensor, x: Tensor, *, std: float, sample_ids: Tensor, seed: int) -> None:
    """Write x plus std * N(0, 1) to `x_adv`: the start of TRADES and MART, whose public code has std 0.001.

    Neither clipped nor projected, as there: the attack's first step does both. The noise of a sample depends on
    `seed` and its id alone, as that of `pgd_init_` does.

    Args:
        x_adv: [N, ...], written.
        x: [N, ...], same dtype.
        std: standard deviation of the noise, in the units of x, >= 0.
        sample_ids: int64 [N].
        seed: in [0, 2^63), as for `pgd_init_`.

    Raises:
        ValueError: arguments that do not fit, named.

    Source: Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan: Theoretically Principled Trade-off between Robustness and
    Accuracy, ICML 2019.
    """
    _checks.seed(seed)
    _pgd_init_normal_(x_adv, x, float(std), sample_ids, seed)

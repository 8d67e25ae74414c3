"""`pgd_init_`: the attack's random starting point, keyed by sample id."""

import torch
from torch import Tensor

from awp_kernels import _backend, _checks


@torch.library.custom_op("awp::pgd_init_", mutates_args=("x_adv",))
def _pgd_init_(x_adv: Tensor, x: Tensor, epsilon: float, norm: str, sample_ids: Tensor, seed: int) -> None:
    _checks.one_of("norm", norm, _checks.NORMS)
    _checks.finite("epsilon", epsilon, minimum=0)
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed: expected a number in [0, 2^63), got {seed}")
    _checks.image_batch(x_adv, x)
    clean = _checks.like("x", x, "x_adv", x_adv)
    if sample_ids.dtype != torch.int64 or sample_ids.shape != x_adv.shape[:1]:
        raise ValueError(
            f"sample_ids: expected int64 of shape ({x_adv.shape[0]},), "
            f"got {sample_ids.dtype} of shape {tuple(sample_ids.shape)}"
        )
    if sample_ids.device != x_adv.device:
        raise ValueError(f"sample_ids: expected device {x_adv.device} like x_adv, got {sample_ids.device}")
    _checks.no_overlap({"x_adv": [x_adv]}, {"x": [clean]})
    run = _backend.select("pgd_init", x_adv.device, {x_adv.dtype})
    run(x_adv, clean, sample_ids.contiguous(), epsilon, norm, seed)


@_pgd_init_.register_fake
def _(x_adv: Tensor, x: Tensor, epsilon: float, norm: str, sample_ids: Tensor, seed: int) -> None:
    return None


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
    _pgd_init_(x_adv, x, float(epsilon), norm, sample_ids, seed)

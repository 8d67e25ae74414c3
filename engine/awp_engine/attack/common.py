"""What PGD and Auto-PGD check and do alike: arguments, the first iterate, projection."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from awp_engine.attack import checks
from awp_kernels import pgd_init_, pgd_init_normal_, pgd_step_

Start = Literal["uniform", "normal", "none"]
Norm = Literal["linf", "l2", "l1"]

# what TRADES and MART start from: at the image itself the divergence has no gradient
NORMAL_START = 0.001
# lifts gradients of a model in fp16 out of underflow
HALF_SCALE = 1024.0


class Ball(NamedTuple):
    """Where attacked images may lie."""

    epsilon: float
    norm: Norm
    clip: checks.Clip

    def project_(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """`x_adv`, in place, in the ball around x and in `clip`: the attack's step of length 0, along anything."""
        pgd_step_(x_adv, x, x, step_size=0.0, epsilon=self.epsilon, norm=self.norm, clip=self.clip)
        return x_adv


class Beginning(NamedTuple):
    """Where an attack begins, as a call of `pgd` says it."""

    start: Start | Tensor
    start_epsilon: float | None
    sample_ids: Tensor | None
    seed: int | None


def starting_point(
    x: Tensor,
    start: Start | Tensor,
    *,
    epsilon: float,
    norm: Norm,
    sample_ids: Tensor,
    seed: int,
    clip: checks.Clip = (0.0, 1.0),
    allow_nan: bool = False,
) -> Tensor:
    """Where an attack begins: see `pgd`; a new tensor of x's shape and memory format.

    Raises:
        ValueError: start is neither a known name nor a tensor of such images.
    """
    # the operations that write it take whole samples one after the other
    x_adv = x.clone()
    if len(x) > 1 and x_adv.stride(0) * len(x) != x.numel():
        x_adv = x.contiguous()
    if isinstance(start, Tensor):
        checks.starting_images(start, x, clip, allow_nan=allow_nan)
        return x_adv.copy_(start.detach())
    low, width = clip[0], clip[1] - clip[0]
    if start == "normal":
        pgd_init_normal_(x_adv, x, std=NORMAL_START * width, sample_ids=sample_ids, seed=seed)
    elif start == "uniform" and tuple(clip) == (0, 1):
        pgd_init_(x_adv, x, epsilon=epsilon, norm=norm, sample_ids=sample_ids, seed=seed)
    elif start == "uniform":
        pgd_init_(x_adv, (x - low) / width, epsilon=epsilon / width, norm=norm, sample_ids=sample_ids, seed=seed)
        Ball(epsilon, norm, clip).project_(x_adv.mul_(width).add_(low), x)
    elif start != "none":
        raise ValueError(f"start: expected uniform, normal, none or a tensor, got {start!r}")
    return x_adv


def _fresh_seed(start: Start | Tensor, sample_ids: Tensor | None, seed: int | None) -> int:
    """The seed of a call's noise: see `pgd`.

    Raises:
        ValueError: it is no whole number, or there is none while a CUDA graph is captured, which would replay one noise
            for ever.
    """
    if seed is not None and not hasattr(seed, "__index__"):  # numpy's whole numbers have it
        raise ValueError(f"seed: expected a whole number in [0, 2^63), got {seed!r}")
    if seed is not None or sample_ids is not None or isinstance(start, Tensor) or start == "none":
        return seed or 0
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "seed: expected one, or start= a tensor filled outside, while a CUDA graph is captured: it would replay "
            "the same noise"
        )
    return int(torch.randint(2**63 - 1, ()))


def prepared(
    model: nn.Module,
    x: Tensor,
    ball: Ball,
    begin: Beginning,
    *,
    step_size: float | None = None,
    steps: int,
    least_steps: int,
    nonfinite: str,
) -> tuple[nn.Module, Tensor, Tensor]:
    """What PGD and Auto-PGD check and do alike; returns the module to call, clean images, and the first iterate."""
    if not isinstance(steps, int) or steps < least_steps:
        raise ValueError(f"steps: expected a whole number >= {least_steps}, got {steps}")
    if nonfinite not in ("raise", "ignore"):
        raise ValueError(f"nonfinite: expected raise or ignore, got {nonfinite!r}")
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode: expected torch.no_grad at most, as an attack needs gradients")
    checks.ball(math.prod(x.shape[1:]), step_size=step_size, **ball._asdict())
    ignored = nonfinite == "ignore"
    checks.images("x", x, ball.clip, allow_nan=ignored)
    # 16-bit images would lose steps: bfloat16 spaces the numbers below 1 by 1/256
    clean = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    start, start_epsilon, sample_ids, seed = begin
    ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
    radius = ball.epsilon if start_epsilon is None else start_epsilon
    checks.number("start_epsilon", radius, minimum=0)
    seed = _fresh_seed(start, sample_ids, seed)
    begun = starting_point(
        clean, start, epsilon=radius, norm=ball.norm, sample_ids=ids, seed=seed, clip=ball.clip, allow_nan=ignored
    )
    # the wrapper would wait for gradients of its parameters
    return model.module if isinstance(model, DistributedDataParallel) else model, clean, begun

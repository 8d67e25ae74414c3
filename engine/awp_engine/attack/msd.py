"""Multi steepest descent (MSD): one attack on the union of several balls.

Source: Maini, Wong, Kolter: Adversarial Robustness Against the Union of Multiple Perturbation Models, ICML 2020, and
its public code, locuslab/robust_union.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from awp_engine.attack import checks
from awp_engine.attack.common import HALF_SCALE, Norm
from awp_engine.attack.l1 import project_l1
from awp_engine.attack.losses import cross_entropy_losses
from awp_engine.models.batch_norm import layer_modes
from awp_kernels import pgd_step_
from awp_kernels.philox import mix_seed

# how many values a step in L1 changes, drawn anew for every step
_FEWEST, _MOST = 5, 20


def changed_values(seed: int, step: int) -> int:
    """How many values of an image the L1 step `step` of an attack changes, 5 to 20."""
    return _FEWEST + mix_seed(seed, step) % (_MOST - _FEWEST + 1)


def l1_step(x_adv: Tensor, gradient: Tensor, x: Tensor, *, step_size: float, epsilon: float, count: int) -> Tensor:
    """A step of L1 length `step_size`: each of `count` values of the largest gradients by as much, and the projection.

    Values that it would take to the end of [0, 1] or beyond are left out. A gradient that is not finite moves nothing.

    Args:
        x_adv: [N, ...].
        gradient: likewise.
        x: likewise, in [0, 1].
        step_size: of all values together.
        epsilon: radius of the L1 ball.
        count: at most the values of an image.
    """
    length = step_size / count
    usable = gradient.nan_to_num(0, 0, 0)
    reached = x_adv + length * usable.sign()
    usable = usable.masked_fill((reached <= 0) | (reached >= 1), 0.0)
    least = usable.abs().flatten(1).topk(count).values[:, -1].view(-1, *[1] * (x.ndim - 1))
    return project_l1(x_adv + length * usable.sign() * (usable.abs() >= least), x, epsilon)


def msd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    balls: Sequence[tuple[Norm, float, float]],
    steps: int,
    seed: int,
    start: Tensor | None = None,
    bn_mode: Literal["train", "eval"] = "eval",
    loss_scale: float = 1.0,
    observe: Callable[[int, Tensor], None] | None = None,
    observe_from: int = 0,
) -> Tensor:
    """Attack a batch in a union of balls: every step tries one in each norm, and each image takes that of highest loss.

    A pass forward and backward, and one forward for each ball, a step. A gradient that is not finite moves nothing.

    Args:
        model: maps images to logits.
        x: [N, C, H, W], in [0, 1].
        y: int64 [N], or fp32 [N, classes] of a mixture; cross-entropy is climbed.
        balls: norm, epsilon and length of a step of each; at least one.
        steps: >= 1.
        seed: of how many values each L1 step changes, the same for all images.
        start: first iterate, in [0, 1]; None is x.
        bn_mode: how batch normalisation behaves.
        loss_scale: lifts 16-bit gradients out of underflow; the steps ignore it.
        observe: called with every step's number and gradient, [N, C, H, W].
        observe_from: the first step that it is called for.

    Returns:
        The point of the highest loss that any step has found, for each image; the start is none.
    """
    checks.images("x", x, (0.0, 1.0), allow_nan=True)
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    taken = checks.images_dtype(model, x.dtype)
    scale = loss_scale * (HALF_SCALE if taken == torch.float16 else 1.0)

    def tried(ball: tuple[Norm, float, float], x_adv: Tensor, gradient: Tensor, step: int) -> Tensor:
        norm, epsilon, step_size = ball
        if norm == "l1":
            count = min(changed_values(seed, step), x[0].numel())
            return l1_step(x_adv, gradient, x, step_size=step_size, epsilon=epsilon, count=count)
        moved = x_adv.clone()
        pgd_step_(moved, gradient, x, step_size=step_size, epsilon=epsilon, norm=norm)
        return moved

    x_adv = x.clone() if start is None else start.to(x.dtype)
    best, best_loss = x_adv, torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    with layer_modes(model, None, bn_mode=bn_mode, synchronized=False), torch.no_grad():
        for step in range(steps):
            with torch.enable_grad():
                x_adv = x_adv.detach().requires_grad_()
                loss = cross_entropy_losses(model(x_adv.to(taken)), y).sum()
                (gradient,) = torch.autograd.grad(loss * scale, x_adv)
            x_adv = x_adv.detach()
            if observe is not None and step >= observe_from:
                observe(step, gradient)
            highest, chosen = torch.full_like(best_loss, -torch.inf), x_adv
            for ball in balls:
                moved = tried(ball, x_adv, gradient, step)
                reached = cross_entropy_losses(model(moved.to(taken)), y).to(x.dtype)
                higher = reached >= highest
                highest = torch.where(higher, reached, highest)
                chosen = torch.where(higher.view(-1, *[1] * (x.ndim - 1)), moved, chosen)
            x_adv, better = chosen, highest > best_loss
            best_loss = torch.where(better, highest, best_loss)
            best = torch.where(better.view(-1, *[1] * (x.ndim - 1)), x_adv, best)
    return best

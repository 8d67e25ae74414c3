"""Auto-PGD in the L1 ball.

Source: Croce, Hein: Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers, ICML 2021.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from awp_engine.attack import checks
from awp_engine.attack.common import HALF_SCALE
from awp_engine.attack.losses import Loss, cross_entropy_losses
from awp_engine.models.batch_norm import layer_modes
from awp_kernels import pgd_init_normal_

# a stage's radius in epsilons, and its share of the steps
_STAGES = ((3, 0.3), (2, 0.3), (1, 0.4))
# shares of the values that the first steps of an evaluation and of training change; by what a step shrinks
_TOP, _TOP_IN_TRAINING = 0.2, 0.05
_SPARSER = 1.5
# losses [N] and, if wanted, their gradients in images [N, C, H, W]
_Pass = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


def project_l1(x_adv: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """The nearest point, in the Euclidean distance, that lies in the L1 ball around x and in [0, 1].

    Exact: with u = |x_adv - x|, and v the part of u that the box cuts off, the change keeps its sign and has the length
    u - clip(a, v, u), where a >= 0 is the least threshold whose lengths sum to at most epsilon. That sum is piecewise
    linear in a, with its corners at all v and u.

    Args:
        x_adv: [N, ...].
        x: the same shape, values in [0, 1].
        epsilon: radius of the ball, >= 0.

    Returns:
        A new tensor like x_adv.
    """
    change = (x_adv - x).double().flatten(1)  # [N, n]
    clean = x.double().flatten(1)
    moved = clean + change
    u = change.abs()
    v = torch.maximum(moved - 1, -moved).clamp_min(0).minimum(u)
    corners, order = torch.cat([v, u], 1).sort(1)  # [N, 2n]
    # at a corner v a value begins to shrink, at its u it is gone
    slope = torch.where(order < u.shape[1], 1.0, -1.0).cumsum(1)
    lengths = corners.diff(dim=1)
    removed = torch.cat([torch.zeros_like(u[:, :1]), (slope[:, :-1] * lengths).cumsum(1)], 1)  # at every corner
    wanted = ((u - v).sum(1, keepdim=True) - epsilon).clamp_min(0)
    right = torch.searchsorted(removed, wanted).clamp(1, removed.shape[1] - 1)
    left = right - 1
    rest = wanted - removed.gather(1, left)
    threshold = corners.gather(1, left) + rest / slope.gather(1, left).clamp_min(1)
    kept = change.sign() * (u - threshold.clamp(v, u))
    # in the memory format of x_adv
    return torch.empty_like(x_adv).copy_((clean + kept).clamp(0, 1).view_as(x_adv))


def apgd_l1(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int,
    sample_ids: Tensor | None = None,
    seed: int = 0,
    start: Tensor | None = None,
    bn_mode: Literal["train", "eval"] = "eval",
    losses: Loss = cross_entropy_losses,
    loss_scale: float = 1.0,
    observe: Callable[[int, Tensor], None] | None = None,
    observe_from: int = 0,
) -> Tensor:
    """Attack a batch in the L1 ball and [0, 1] by Auto-PGD for L1.

    Without a start, as to measure, in three stages of 3, 2 and 1 epsilon; from a start, as to train by, in one.

    A step moves the values of the largest gradients alone; how many adapts to how sparse the best point is. Where that
    grows sparser, the step is set back to epsilon and the image to its best point; else the step shrinks by a third, to
    a tenth of epsilon at least. A gradient that is not finite moves nothing.

    Args:
        model: maps images to logits.
        x: [N, C, H, W], in [0, 1].
        y: what `losses` compares the logits with.
        epsilon: radius of the L1 ball: the sum of all changes.
        steps: of all stages together, >= 1; of fewer than 3 the last stage has them all.
        sample_ids: int64 [N], what Gaussian noise, which is projected, is keyed by where no start is given.
        seed: of the noise.
        start: first iterate, [N, C, H, W], which is projected: one stage, whose first steps change 5% of the values (as
            in training there), or two thirds of those that it changes already.
        bn_mode: how batch normalisation behaves.
        losses: maps (logits, y) to the losses to climb, [N].
        loss_scale: lifts 16-bit gradients out of underflow; the steps ignore it.
        observe: called with every step's number and gradient, [N, C, H, W].
        observe_from: the first step that it is called for.

    Returns:
        The points of the highest loss in the last stage.

    Source of training by it: Croce, Hein: Adversarial Robustness against Multiple and Single l_p-Threat Models via
    Quick Fine-Tuning of Robust Classifiers, ICML 2022.
    """
    checks.images("x", x, (0.0, 1.0), allow_nan=True)
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    taken = checks.images_dtype(model, x.dtype)
    scale = loss_scale * (HALF_SCALE if taken == torch.float16 else 1.0)

    def passed(images: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(backward):
            images = images.detach().requires_grad_(backward)
            loss = losses(model(images.to(taken)), y)
            gradient = torch.autograd.grad(loss.sum() * scale, images)[0] if backward else images
        return loss.detach(), gradient

    def look(step: int, gradient: Tensor) -> None:
        if observe is not None and step >= observe_from:
            observe(step, gradient)

    if start is None:
        ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
        x_adv = torch.empty_like(x)
        pgd_init_normal_(x_adv, x, std=1.0, sample_ids=ids, seed=seed)
        counts = [round(steps * share) for _, share in _STAGES[:-1]] if steps >= len(_STAGES) else [0, 0]
        stages, top = [*zip((radius for radius, _ in _STAGES), (*counts, steps - sum(counts)), strict=True)], _TOP
    else:
        x_adv, stages, top = start.to(x.dtype), [(1, steps)], _TOP_IN_TRAINING
    done = 0
    with layer_modes(model, None, bn_mode=bn_mode, synchronized=False):
        for radius, count in stages:
            x_adv = project_l1(x_adv, x, radius * epsilon)
            if count:
                x_adv = _stage(passed, x, x_adv, radius * epsilon, count, top, look, done)
                done += count
    return x_adv


def _stage(
    passed: _Pass,
    x: Tensor,
    x_adv: Tensor,
    epsilon: float,
    steps: int,
    first_top: float,
    look: Callable[[int, Tensor], None],
    done: int,
) -> Tensor:
    """One ball: the best point of `steps` steps from `x_adv`."""
    values = x[0].numel()
    every = max(int(0.04 * steps), 1)

    def each(numbers: Tensor) -> Tensor:
        return numbers.view(-1, *[1] * (x.ndim - 1))

    def changed(images: Tensor) -> Tensor:
        return (images != x).flatten(1).sum(1).double()

    with torch.no_grad():
        loss, gradient = passed(x_adv, True)
        best, best_loss, best_gradient = x_adv, loss, gradient
        size = torch.full((len(x),), float(epsilon), dtype=torch.float64, device=x.device)
        begun = changed(x_adv)
        # an image that begins at itself
        top = torch.where(begun > 0, begun / values / _SPARSER, first_top)
        sparse_before = torch.where(begun > 0, begun, values)
        for step in range(steps):
            look(done + step, gradient)
            # what is not finite is no direction
            usable = gradient.nan_to_num(0, 0, 0).flatten(1)
            rank = ((1 - top) * values).clamp(0, values - 1).long().unsqueeze(1)
            least = usable.abs().sort(1).values.gather(1, rank)
            direction = usable.sign() * (usable.abs() >= least)
            direction = direction / direction.abs().sum(1, keepdim=True).clamp_min(1e-10)
            x_adv = project_l1(x_adv + each(size.to(x.dtype)) * direction.view_as(x), x, epsilon)
            # after the last step nobody asks for a gradient
            loss, gradient = passed(x_adv, step < steps - 1)
            better = loss > best_loss
            best, best_loss = torch.where(each(better), x_adv, best), torch.where(better, loss, best_loss)
            best_gradient = torch.where(each(better), gradient, best_gradient)
            if (step + 1) % every == 0:
                sparse = changed(best)
                sparser = sparse < 0.95 * sparse_before
                top = sparse / values / _SPARSER
                size = torch.where(sparser, epsilon, (size / _SPARSER).clamp_min(epsilon / 10))
                sparse_before = sparse
                x_adv = torch.where(each(sparser), best, x_adv)
                gradient = torch.where(each(sparser), best_gradient, gradient)
    return best

"""Auto-PGD in the L1 ball.

Source: Croce, Hein: Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers, ICML 2021.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from awp_engine.attack import checks
from awp_engine.attack.losses import Loss, cross_entropy_losses
from awp_engine.models.batch_norm import layer_modes
from awp_kernels import pgd_init_normal_

# a stage's radius in epsilons, and its share of the steps
_STAGES = ((3, 0.3), (2, 0.3), (1, 0.4))
# shares of the values: that the first steps change, and by which a step shrinks
_TOP = 0.2
_SPARSER = 1.5


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
    return (clean + kept).clamp(0, 1).to(x_adv.dtype).view_as(x_adv)


def apgd_l1(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int,
    sample_ids: Tensor,
    seed: int,
    losses: Loss = cross_entropy_losses,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Attack a batch in the L1 ball and [0, 1] by Auto-PGD for L1, in three stages of 3, 2 and 1 epsilon.

    A step moves the values of the largest gradients alone; how many adapts to how sparse the best point is. Where that
    grows sparser, the step is set back to epsilon and the image to its best point; else the step shrinks by a third, to
    a tenth of epsilon at least. A gradient that is not finite moves nothing.

    Args:
        model: maps images to logits; BN is in eval mode.
        x: [N, C, H, W], in [0, 1].
        y: what `losses` compares the logits with.
        epsilon: radius of the L1 ball: the sum of all changes.
        steps: of all stages together, >= 1; of fewer than 3 the last stage has them all.
        sample_ids: int64 [N], what the start, Gaussian noise that is projected, is keyed by.
        seed: of the noise.
        losses: maps (logits, y) to the losses to climb, [N].
        observe: called with every step's number and gradient, [N, C, H, W].

    Returns:
        The points of the highest loss in the last stage.
    """
    checks.images("x", x, (0.0, 1.0), allow_nan=True)
    noise = torch.empty_like(x)
    pgd_init_normal_(noise, x, std=1.0, sample_ids=sample_ids, seed=seed)
    counts = [round(steps * share) for _, share in _STAGES[:-1]] if steps >= len(_STAGES) else [0, 0]
    counts.append(steps - sum(counts))
    x_adv, done = noise, 0
    with layer_modes(model, None, bn_mode="eval", synchronized=False):
        for (radius, _), count in zip(_STAGES, counts, strict=True):
            x_adv = project_l1(x_adv, x, radius * epsilon)
            if count:
                x_adv = _stage(model, x, y, x_adv, radius * epsilon, count, losses, observe, done)
                done += count
    return x_adv


def _stage(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    x_adv: Tensor,
    epsilon: float,
    steps: int,
    losses: Loss,
    observe: Callable[[int, Tensor], None] | None,
    done: int,
) -> Tensor:
    """One ball: the best point of `steps` steps from `x_adv`."""
    values = x[0].numel()
    every = max(int(0.04 * steps), 1)

    def each(numbers: Tensor) -> Tensor:
        return numbers.view(-1, *[1] * (x.ndim - 1))

    def passed(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            loss = losses(model(images), y)
            (gradient,) = torch.autograd.grad(loss.sum(), images)
        return loss.detach(), gradient

    def changed(images: Tensor) -> Tensor:
        return (images != x).flatten(1).sum(1).double()

    with torch.no_grad():
        loss, gradient = passed(x_adv)
        best, best_loss, best_gradient = x_adv, loss, gradient
        size = torch.full((len(x),), float(epsilon), dtype=torch.float64, device=x.device)
        sparse_before = changed(x_adv)
        top = sparse_before / values / _SPARSER if bool(sparse_before.any()) else torch.full_like(size, _TOP)
        for step in range(steps):
            if observe is not None:
                observe(done + step, gradient)
            # what is not finite is no direction
            usable = gradient.nan_to_num(0, 0, 0).flatten(1)
            rank = ((1 - top) * values).clamp(0, values - 1).long().unsqueeze(1)
            least = usable.abs().sort(1).values.gather(1, rank)
            direction = usable.sign() * (usable.abs() >= least)
            direction = direction / direction.abs().sum(1, keepdim=True).clamp_min(1e-10)
            x_adv = project_l1(x_adv + each(size.to(x.dtype)) * direction.view_as(x), x, epsilon)
            loss, gradient = passed(x_adv)
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

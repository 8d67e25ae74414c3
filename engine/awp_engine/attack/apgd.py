"""Auto-PGD, which chooses its own steps.

Source: Croce, Hein: Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks,
ICML 2020.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from awp_engine.attack import checks
from awp_engine.attack.common import HALF_SCALE, Ball, Beginning, Start, prepared
from awp_engine.attack.losses import OF_LOGITS, Loss, cross_entropy_losses
from awp_engine.models.batch_norm import layer_modes


def halving_points(steps: int) -> list[int]:
    """After how many of `steps` steps Auto-PGD looks whether to halve the step: after 22%, then ever sooner."""
    found, length = [], max(int(0.22 * steps), 1)
    while sum(found) + length <= steps:
        found.append(length)
        length = max(length - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return [sum(found[: index + 1]) for index in range(len(found))]


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int,
    norm: Literal["linf", "l2"] = "linf",
    clip: tuple[float, float] = (0.0, 1.0),
    start: Start | Tensor = "none",
    sample_ids: Tensor | None = None,
    seed: int | None = None,
    mode: Literal["train", "eval"] | None = None,
    bn_mode: Literal["train", "eval"] | None = "eval",
    losses: Loss = cross_entropy_losses,
    loss_scale: float = 1.0,
    nonfinite: Literal["raise", "ignore"] = "raise",
    observe: Callable[[int, Tensor], None] | None = None,
    observe_from: int = 0,
) -> Tensor:
    """Attack a batch by Auto-PGD: momentum 0.75, steps of 2 epsilon that are halved where they no longer pay.

    Each sample for itself: at every one of `halving_points`, its step is halved and it goes back to its best point if
    less than 75% of the steps since the last raised its loss (the very first step counts as having raised it, as in the
    authors' code), or if the step was not halved there and no better point was found since. One pass forward more than
    `steps`, and as many backward.

    Args:
        model: any module that maps images to logits, as for `pgd`.
        x: [N, C, H, W], values in `clip`.
        y: what `losses` compares the logits with: int64 [N] labels, or fp32 [N, classes] of a mixture.
        epsilon: radius of the ball, in the units of x: on pixels in [0, 1].
        steps: number of steps, >= 1.
        norm: "linf" or "l2".
        clip: the range of valid values.
        start: where to begin, as for `pgd`.
        sample_ids: int64 [N], what a sample's noise is keyed by, as for `pgd`.
        seed: of the noise, as for `pgd`; nothing is drawn without a random start.
        mode: of all layers during the attack, as for `pgd`.
        bn_mode: how batch normalisation behaves during the attack. In "train" the samples of a batch are coupled by its
            statistics.
        losses: maps (logits, y) to the losses to climb, [N].
        loss_scale: lifts 16-bit gradients out of underflow; the steps ignore it.
        nonfinite: what a loss or gradient that is not finite does, as for `pgd`.
        observe: called with every step's number (from 0) and gradient, [N, C, H, W], before the step is taken.
        observe_from: the first step that it is called for.

    Returns:
        The point of the highest loss of each sample, detached, in x's dtype (at least fp32) and memory format.

    Raises:
        ValueError, FloatingPointError: as `pgd`.

    Source: Croce, Hein, ICML 2020; for training, in two steps: Singh, Croce, Hein: Revisiting Adversarial Training for
    ImageNet, NeurIPS 2023.
    """
    ball, begin = Ball(epsilon, norm, clip), Beginning(start, None, sample_ids, seed)
    model, clean, begun = prepared(model, x, ball, begin, steps=steps, least_steps=1, nonfinite=nonfinite)
    taken = checks.images_dtype(model, clean.dtype)
    scale = loss_scale * (HALF_SCALE if taken == torch.float16 else 1.0)
    # a start may lie outside, and may be the best point
    x_adv = ball.project_(begun, clean)
    passes = 0

    def passed(x_adv: Tensor, *, backward: bool) -> tuple[Tensor, Tensor | None]:
        """Losses [N] and their gradients."""
        nonlocal passes
        with torch.set_grad_enabled(backward):
            logits = model(x_adv.requires_grad_(backward).to(taken))
            if passes == 0 and losses in OF_LOGITS:
                checks.outputs(logits, y, len(x))
            loss = losses(logits, y)
            gradient = torch.autograd.grad(loss.sum() * scale, x_adv)[0] if backward else None
        x_adv.requires_grad_(False)
        if nonfinite == "raise":
            checks.finite(loss.detach(), gradient, passes)
        passes += 1
        return loss.detach(), gradient

    def each(values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (x.ndim - 1))

    modes = layer_modes(model, mode, bn_mode=bn_mode, synchronized=False)
    with modes, torch.no_grad():
        loss, gradient = passed(x_adv, backward=True)
        best, best_loss, best_gradient = x_adv, loss, gradient
        before, step_size = x_adv, torch.full_like(loss, 2 * epsilon, dtype=clean.dtype)
        # at the last checkpoint
        checked, halved = loss, torch.ones_like(loss, dtype=torch.bool)
        rises, last_check, points = torch.ones_like(loss), 0, halving_points(steps)
        for step in range(steps):
            assert gradient is not None
            assert best_gradient is not None
            if observe is not None and step >= observe_from:
                observe(step, gradient)
            direction = gradient.to(clean.dtype)
            if norm == "linf":
                direction = direction.sign()
            else:
                length = torch.linalg.vector_norm(direction.double().flatten(1), dim=1)
                usable = (length > 0) & length.isfinite()
                direction = torch.where(each(usable), direction.double() * each(1 / length), 0.0).to(clean.dtype)
            moved = ball.project_(torch.addcmul(x_adv, each(step_size), direction), clean)
            if step:
                moved = ball.project_(x_adv + 0.75 * (moved - x_adv) + 0.25 * (x_adv - before), clean)
            before, x_adv, loss_before = x_adv, moved, loss
            loss, new_gradient = passed(x_adv, backward=step < steps - 1)
            if step:
                rises = rises + (loss > loss_before)
            better = loss > best_loss
            best, best_loss = torch.where(each(better), x_adv, best), torch.where(better, loss, best_loss)
            if new_gradient is None:
                break
            gradient = new_gradient
            best_gradient = torch.where(each(better), gradient, best_gradient)
            if step + 1 in points:
                stuck = ~halved & (checked >= best_loss)
                halved = (rises <= 0.75 * (step + 1 - last_check)) | stuck
                step_size = torch.where(halved, step_size / 2, step_size)
                x_adv = torch.where(each(halved), best, x_adv)
                gradient = torch.where(each(halved), best_gradient, gradient)
                checked, rises, last_check = best_loss, torch.zeros_like(rises), step + 1
    return best

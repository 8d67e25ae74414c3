"""Projected gradient descent on the images, with steps of one length or with Auto-PGD's.

Sources: Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018; Croce, Hein: Reliable
Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, ICML 2020.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.batch_norm import batch_norm_mode
from awp_kernels import pgd_init_, pgd_init_normal_, pgd_step_

Loss = Callable[[Tensor, Tensor], Tensor]
Start = Literal["uniform", "normal", "none"]

# what TRADES and MART start from: at the image itself the divergence has no gradient
NORMAL_START = 0.001


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the batch: a mean would underflow in 16 bits, and the step ignores the scale."""
    return F.cross_entropy(logits, labels, reduction="sum")


def cross_entropy_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every sample, [N], at least fp32."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


def summed_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit less the right one, summed over the batch.

    Source: Carlini, Wagner: Towards Evaluating the Robustness of Neural Networks, S&P 2017, without its confidence.
    """
    right = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    wrong = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
    return (wrong - right).sum()


def starting_point(
    x: Tensor, start: Start | Tensor, *, epsilon: float, norm: Literal["linf", "l2"], sample_ids: Tensor, seed: int
) -> Tensor:
    """Where an attack begins: see `pgd`; a new tensor of x's shape and memory format.

    Raises:
        ValueError: start is neither a known name nor a tensor of x's shape.
    """
    if isinstance(start, Tensor):
        if start.shape != x.shape:
            raise ValueError(f"start: expected shape {tuple(x.shape)} like x, got {tuple(start.shape)}")
        return torch.empty_like(x).copy_(start.detach())
    x_adv = x.clone()
    if start == "uniform":
        pgd_init_(x_adv, x, epsilon=epsilon, norm=norm, sample_ids=sample_ids, seed=seed)
    elif start == "normal":
        pgd_init_normal_(x_adv, x, std=NORMAL_START, sample_ids=sample_ids, seed=seed)
    elif start != "none":
        raise ValueError(f"start: expected uniform, normal, none or a tensor, got {start!r}")
    return x_adv


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: Literal["linf", "l2"] = "linf",
    start: Start | Tensor = "uniform",
    start_epsilon: float | None = None,
    sample_ids: Tensor | None = None,
    seed: int = 0,
    bn_mode: Literal["train", "eval"] = "eval",
    update_statistics: bool = False,
    loss: Loss = summed_cross_entropy,
    mask: Tensor | None = None,
    shared: Sequence[nn.Parameter] = (),
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Attack a batch: `steps` normalised ascent steps on the loss, each projected onto the ball and clipped to [0, 1].

    Only gradients with respect to the images are computed; parameters and their gradients are left alone, but for
    those named in `shared`.

    Args:
        model: any module that maps images in [0, 1] to logits; the bare module, not a DistributedDataParallel wrapper.
        x: [N, C, H, W], values in [0, 1].
        y: what `loss` compares the logits with: int64 [N] labels, or fp32 [N, classes] of a mixture.
        epsilon: radius of the ball, on pixels in [0, 1].
        step_size: length of a step, in the same units.
        steps: number of steps, >= 0.
        norm: "linf" or "l2".
        start: "uniform" in the ball, "normal" (x + 0.001 N(0, 1), as TRADES and MART do), "none" (x itself), or the
            first iterate, [N, C, H, W].
        start_epsilon: radius of the ball that a uniform start is drawn from; None means epsilon.
        sample_ids: int64 [N], what a sample's noise is keyed by; its place in the batch if not given.
        seed: of the noise, in [0, 2^63).
        bn_mode: how batch normalisation behaves during the attack; put back afterwards.
        update_statistics: whether the attack's forward passes in train mode move the running statistics.
        loss: maps (logits, y) to a scalar to climb, summed rather than averaged.
        mask: bool, broadcastable to x: the region that may change.
        shared: parameters whose `.grad` the last pass sets, besides moving the images: the gradient of `loss` there.
        observe: called with every step's number (from 0) and gradient, [N, C, H, W], before the step is taken.

    Returns:
        The attacked images, detached, in x's dtype (at least fp32) and memory format.

    Raises:
        ValueError: arguments out of range, named.
    """
    if steps < 0:
        raise ValueError(f"steps: expected a whole number >= 0, got {steps}")
    if bn_mode not in ("train", "eval"):
        raise ValueError(f"bn_mode: expected train or eval, got {bn_mode!r}")
    if shared and steps == 0:
        raise ValueError("shared: needs at least one step, whose pass the gradients come from; got steps 0")
    if not x.is_floating_point():
        raise ValueError(f"x: expected floating-point images in [0, 1], got {x.dtype}; divide uint8 images by 255")
    # 16-bit images would lose steps: bfloat16 spaces the numbers below 1 by 1/256
    clean = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
    radius = epsilon if start_epsilon is None else start_epsilon
    x_adv = starting_point(clean, start, epsilon=radius, norm=norm, sample_ids=ids, seed=seed)
    if mask is not None:
        x_adv = torch.where(mask, x_adv, clean)
    # several ranks attack each their own images, without a word to each other
    modes = batch_norm_mode(model, bn_mode, update_statistics=update_statistics, synchronized=False)
    with modes, torch.enable_grad():
        for step in range(steps):
            parameters = shared if step == steps - 1 else ()
            x_adv.requires_grad_()
            gradient, *weight_gradients = torch.autograd.grad(loss(model(x_adv), y), [x_adv, *parameters])
            for parameter, weight_gradient in zip(parameters, weight_gradients, strict=True):
                parameter.grad = weight_gradient
            if observe is not None:
                observe(step, gradient)
            x_adv = x_adv.detach()
            pgd_step_(x_adv, gradient, clean, step_size=step_size, epsilon=epsilon, norm=norm, mask=mask)
    return x_adv


def _projected_(x_adv: Tensor, x: Tensor, epsilon: float, norm: Literal["linf", "l2"]) -> Tensor:
    """`x_adv`, in place, in the ball and in [0, 1]: the attack's step of length 0, along anything."""
    pgd_step_(x_adv, x, x, step_size=0.0, epsilon=epsilon, norm=norm)
    return x_adv


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
    start: Start | Tensor = "none",
    sample_ids: Tensor | None = None,
    seed: int = 0,
    bn_mode: Literal["train", "eval"] = "eval",
    losses: Loss = cross_entropy_losses,
    loss_scale: float = 1.0,
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Attack a batch by Auto-PGD: momentum 0.75, steps of 2 epsilon that are halved where they no longer pay.

    Each sample for itself: at every one of `halving_points`, its step is halved and it goes back to its best point if
    less than 75% of the steps since the last raised its loss (the very first step counts as having raised it, as in the
    authors' code), or if the step was not halved there and no better point was found since. One pass forward more than
    `steps`, and as many backward.

    Args:
        model: any module that maps images in [0, 1] to logits; the bare module, not a DistributedDataParallel wrapper.
        x: [N, C, H, W], values in [0, 1].
        y: what `losses` compares the logits with: int64 [N] labels, or fp32 [N, classes] of a mixture.
        epsilon: radius of the ball, on pixels in [0, 1].
        steps: number of steps, >= 1.
        norm: "linf" or "l2".
        start: where to begin, as for `pgd`.
        sample_ids: int64 [N], what a sample's noise is keyed by; its place in the batch if not given.
        seed: of the noise, in [0, 2^63).
        bn_mode: how batch normalisation behaves during the attack; put back afterwards. In "train" the samples of a
            batch are coupled by its statistics.
        losses: maps (logits, y) to the losses to climb, [N].
        loss_scale: lifts 16-bit gradients out of underflow; the steps ignore it.
        observe: called with every step's number (from 0) and gradient, [N, C, H, W], before the step is taken.

    Returns:
        The point of the highest loss of each sample, detached, in x's dtype (at least fp32) and memory format.

    Raises:
        ValueError: arguments out of range, named.

    Source: Croce, Hein, ICML 2020; for training, in two steps: Singh, Croce, Hein: Revisiting Adversarial Training for
    ImageNet, NeurIPS 2023.
    """
    if steps < 1:
        raise ValueError(f"steps: expected a whole number >= 1, got {steps}")
    if bn_mode not in ("train", "eval"):
        raise ValueError(f"bn_mode: expected train or eval, got {bn_mode!r}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected floating-point images in [0, 1], got {x.dtype}; divide uint8 images by 255")
    clean = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
    # a start may lie outside, and may be the best point
    begun = starting_point(clean, start, epsilon=epsilon, norm=norm, sample_ids=ids, seed=seed)
    x_adv = _projected_(begun, clean, epsilon, norm)

    def passed(x_adv: Tensor, *, backward: bool) -> tuple[Tensor, Tensor | None]:
        """Losses [N] and their gradients."""
        with torch.set_grad_enabled(backward):
            loss = losses(model(x_adv.requires_grad_(backward)), y)
            gradient = torch.autograd.grad(loss.sum() * loss_scale, x_adv)[0] if backward else None
        x_adv.requires_grad_(False)
        return loss.detach(), gradient

    def each(values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (x.ndim - 1))

    modes = batch_norm_mode(model, bn_mode, update_statistics=False, synchronized=False)
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
            if observe is not None:
                observe(step, gradient)
            direction = gradient.to(clean.dtype)
            if norm == "linf":
                direction = direction.sign()
            else:
                length = torch.linalg.vector_norm(direction.double().flatten(1), dim=1)
                unit = torch.where((length > 0) & length.isfinite(), 1 / length, 0.0)
                direction = (direction.double() * each(unit)).to(clean.dtype)
            moved = _projected_(torch.addcmul(x_adv, each(step_size), direction), clean, epsilon, norm)
            if step:
                moved = _projected_(x_adv + 0.75 * (moved - x_adv) + 0.25 * (x_adv - before), clean, epsilon, norm)
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


def fast_attack(kind: str, epsilon: float) -> dict[str, Any]:
    """What `pgd` is to be told for a one-step attack.

    Args:
        kind: "fgsm-rs": uniform start, one step of 1.25 epsilon, projected; "n-fgsm": uniform noise of twice epsilon,
            one step of epsilon, clipped to [0, 1] but not projected.
        epsilon: radius of the Linf ball, on pixels in [0, 1].

    Raises:
        ValueError: unknown kind.

    Source: Wong, Rice, Kolter: Fast is better than free, ICLR 2020; de Jorge et al.: Make Some Noise, NeurIPS 2022.
    """
    if kind == "fgsm-rs":
        return {"steps": 1, "step_size": 1.25 * epsilon, "start": "uniform"}
    if kind == "n-fgsm":
        # noise and step reach no farther than three epsilons, so that this ball projects nothing
        return {
            "steps": 1,
            "step_size": epsilon,
            "start": "uniform",
            "start_epsilon": 2 * epsilon,
            "epsilon": 3 * epsilon,
        }
    raise ValueError(f"fast: expected fgsm-rs or n-fgsm, got {kind!r}")

"""Projected gradient descent on the images, with steps of one length or with Auto-PGD's.

Sources: Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018; Croce, Hein: Reliable
Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, ICML 2020.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from awp_engine.attack import checks as checks
from awp_engine.models.batch_norm import batch_norm_mode as batch_norm_mode
from awp_engine.models.batch_norm import layer_modes
from awp_kernels import pgd_init_, pgd_init_normal_, pgd_step_

Loss = Callable[[Tensor, Tensor], Tensor]
Start = Literal["uniform", "normal", "none"]

# what TRADES and MART start from: at the image itself the divergence has no gradient
NORMAL_START = 0.001
# lifts gradients of a model in fp16 out of underflow
_HALF_SCALE = 1024.0


def cross_entropy_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every sample, [N], at least fp32."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the batch: a mean would underflow in 16 bits, and the step ignores the scale."""
    return cross_entropy_losses(logits, labels).sum()


def summed_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit less the right one, summed over the batch.

    Source: Carlini, Wagner: Towards Evaluating the Robustness of Neural Networks, S&P 2017, without its confidence.
    """
    right = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    wrong = logits.scatter(1, labels.unsqueeze(1), -torch.inf).amax(1)
    return (wrong - right).sum()


# what is checked to be given logits and labels that fit
_OF_LOGITS: tuple[Loss, ...] = (summed_cross_entropy, summed_margin, cross_entropy_losses)


def starting_point(
    x: Tensor,
    start: Start | Tensor,
    *,
    epsilon: float,
    norm: Literal["linf", "l2"],
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
        _projected_(x_adv.mul_(width).add_(low), x, epsilon, norm, clip)
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


def _prepared(
    model: nn.Module,
    x: Tensor,
    start: Start | Tensor,
    *,
    epsilon: float,
    start_epsilon: float | None,
    step_size: float | None,
    steps: int,
    least_steps: int,
    norm: Literal["linf", "l2"],
    clip: checks.Clip,
    sample_ids: Tensor | None,
    seed: int | None,
    nonfinite: str,
) -> tuple[nn.Module, Tensor, Tensor]:
    """What PGD and Auto-PGD check and do alike; returns the module to call, clean images, and the first iterate."""
    if not isinstance(steps, int) or steps < least_steps:
        raise ValueError(f"steps: expected a whole number >= {least_steps}, got {steps}")
    if nonfinite not in ("raise", "ignore"):
        raise ValueError(f"nonfinite: expected raise or ignore, got {nonfinite!r}")
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode: expected torch.no_grad at most, as an attack needs gradients")
    checks.ball(math.prod(x.shape[1:]), epsilon=epsilon, norm=norm, clip=clip, step_size=step_size)
    ignored = nonfinite == "ignore"
    checks.images("x", x, clip, allow_nan=ignored)
    # 16-bit images would lose steps: bfloat16 spaces the numbers below 1 by 1/256
    clean = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
    radius = epsilon if start_epsilon is None else start_epsilon
    checks.number("start_epsilon", radius, minimum=0)
    seed = _fresh_seed(start, sample_ids, seed)
    begun = starting_point(
        clean, start, epsilon=radius, norm=norm, sample_ids=ids, seed=seed, clip=clip, allow_nan=ignored
    )
    # the wrapper would wait for gradients of its parameters
    return model.module if isinstance(model, DistributedDataParallel) else model, clean, begun


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: Literal["linf", "l2"] = "linf",
    clip: tuple[float, float] = (0.0, 1.0),
    start: Start | Tensor = "uniform",
    start_epsilon: float | None = None,
    sample_ids: Tensor | None = None,
    seed: int | None = None,
    mode: Literal["train", "eval"] | None = None,
    bn_mode: Literal["train", "eval"] | None = "eval",
    update_statistics: bool = False,
    loss: Loss = summed_cross_entropy,
    mask: Tensor | None = None,
    shared: Sequence[nn.Parameter] = (),
    nonfinite: Literal["raise", "ignore"] = "raise",
    observe: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Attack a batch: `steps` normalised ascent steps on the loss, each projected onto the ball and clipped to `clip`.

    Only gradients with respect to the images are computed; parameters and their gradients are left alone, but for
    those named in `shared`. Modes and buffers of all layers are put back, also after an exception or an interrupt.

    Args:
        model: any module that maps images to logits, not probabilities, in any precision: a model all of whose
            parameters are in 16 bits is given 16-bit images, while the attack itself stays in fp32. It has to
            normalise by itself. Of a DistributedDataParallel wrapper the bare module is called.
        x: [N, C, H, W], values in `clip`.
        y: what `loss` compares the logits with: int64 [N] labels, or fp32 [N, classes] of a mixture.
        epsilon: radius of the ball, in the units of x: on pixels in [0, 1].
        step_size: length of a step, in the same units, at most 2 epsilon; negative moves downhill.
        steps: number of steps, >= 0.
        norm: "linf" or "l2".
        clip: the range of valid values, which x lies in and the attacked images stay in.
        start: "uniform" in the ball, "normal" (x + 0.001 N(0, 1) of the range, as TRADES and MART do), "none" (x
            itself), or the first iterate, [N, C, H, W], which the first step projects.
        start_epsilon: radius of the ball that a uniform start is drawn from; None means epsilon.
        sample_ids: int64 [N], what a sample's noise is keyed by; its place in the batch if not given.
        seed: of the noise, in [0, 2^63). If not given it is 0 where `sample_ids` are, and else drawn anew for every
            call by torch's global generator, so that `torch.manual_seed` repeats a script.
        mode: of all layers during the attack: "eval" turns off dropout and keeps every kind of normalisation to its
            running statistics; None leaves each layer as it is.
        bn_mode: how batch normalisation behaves during the attack, whatever `mode` says; None: as `mode` has it.
        update_statistics: whether the attack's forward passes in train mode move running statistics; without, every
            buffer of the model is put back.
        loss: maps (logits, y) to a scalar to climb, summed rather than averaged.
        mask: bool, broadcastable to x: the region that may change.
        shared: parameters whose `.grad` the last pass sets, besides moving the images: the gradient of `loss` there.
        nonfinite: what a gradient that is not finite does: "raise", or "ignore", which leaves such pixels (l2: images)
            where they are in that step, and takes a batch with NaN in x.
        observe: called with every step's number (from 0) and gradient, [N, C, H, W], before the step is taken.

    Returns:
        The attacked images, detached, in x's dtype (at least fp32) and memory format.

    Raises:
        ValueError: arguments out of range, images outside `clip`, probabilities for logits, labels that do not fit,
            each named; on a GPU, where values cannot be looked at without waiting, an assertion on the device.
        FloatingPointError: a gradient is not finite; on a GPU likewise.
    """
    model, clean, x_adv = _prepared(
        model,
        x,
        start,
        epsilon=epsilon,
        start_epsilon=start_epsilon,
        step_size=step_size,
        steps=steps,
        least_steps=0,
        norm=norm,
        clip=clip,
        sample_ids=sample_ids,
        seed=seed,
        nonfinite=nonfinite,
    )
    if shared and steps == 0:
        raise ValueError("shared: needs at least one step, whose pass the gradients come from; got steps 0")
    if mask is not None:
        checks.region(mask, clean)
        x_adv = torch.where(mask, x_adv, clean)
    if steps == 0:
        return _projected_(x_adv, clean, epsilon, norm, clip)
    taken = checks.images_dtype(model, clean.dtype)
    scale = _HALF_SCALE if taken == torch.float16 else 1.0
    # several ranks attack each their own images, without a word to each other
    modes = layer_modes(model, mode, bn_mode=bn_mode, update_statistics=update_statistics, synchronized=False)
    with modes, torch.enable_grad():
        for step in range(steps):
            parameters = shared if step == steps - 1 else ()
            x_adv.requires_grad_()
            logits = model(x_adv.to(taken))
            if step == 0 and loss in _OF_LOGITS:
                checks.outputs(logits, y, len(x))
            climbed = loss(logits, y)
            gradient, *weight_gradients = torch.autograd.grad(
                climbed if scale == 1 else climbed * scale, [x_adv, *parameters]
            )
            if scale != 1:
                gradient = gradient / scale
            for parameter, weight_gradient in zip(parameters, weight_gradients, strict=True):
                parameter.grad = weight_gradient if scale == 1 else weight_gradient / scale
            if observe is not None:
                observe(step, gradient)
            if nonfinite == "raise":
                checks.finite(climbed.detach(), gradient if mask is None else gradient.where(mask, 0), step)
            x_adv = x_adv.detach()
            pgd_step_(x_adv, gradient, clean, step_size=step_size, epsilon=epsilon, norm=norm, clip=clip, mask=mask)
    return x_adv


def _projected_(x_adv: Tensor, x: Tensor, epsilon: float, norm: Literal["linf", "l2"], clip: checks.Clip) -> Tensor:
    """`x_adv`, in place, in the ball and in `clip`: the attack's step of length 0, along anything."""
    pgd_step_(x_adv, x, x, step_size=0.0, epsilon=epsilon, norm=norm, clip=clip)
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

    Returns:
        The point of the highest loss of each sample, detached, in x's dtype (at least fp32) and memory format.

    Raises:
        ValueError, FloatingPointError: as `pgd`.

    Source: Croce, Hein, ICML 2020; for training, in two steps: Singh, Croce, Hein: Revisiting Adversarial Training for
    ImageNet, NeurIPS 2023.
    """
    model, clean, begun = _prepared(
        model,
        x,
        start,
        epsilon=epsilon,
        start_epsilon=None,
        step_size=None,
        steps=steps,
        least_steps=1,
        norm=norm,
        clip=clip,
        sample_ids=sample_ids,
        seed=seed,
        nonfinite=nonfinite,
    )
    taken = checks.images_dtype(model, clean.dtype)
    scale = loss_scale * (_HALF_SCALE if taken == torch.float16 else 1.0)
    # a start may lie outside, and may be the best point
    x_adv = _projected_(begun, clean, epsilon, norm, clip)
    passes = 0

    def passed(x_adv: Tensor, *, backward: bool) -> tuple[Tensor, Tensor | None]:
        """Losses [N] and their gradients."""
        nonlocal passes
        with torch.set_grad_enabled(backward):
            logits = model(x_adv.requires_grad_(backward).to(taken))
            if passes == 0 and losses in _OF_LOGITS:
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
            if observe is not None:
                observe(step, gradient)
            direction = gradient.to(clean.dtype)
            if norm == "linf":
                direction = direction.sign()
            else:
                length = torch.linalg.vector_norm(direction.double().flatten(1), dim=1)
                usable = (length > 0) & length.isfinite()
                direction = torch.where(each(usable), direction.double() * each(1 / length), 0.0).to(clean.dtype)
            moved = _projected_(torch.addcmul(x_adv, each(step_size), direction), clean, epsilon, norm, clip)
            if step:
                moved = x_adv + 0.75 * (moved - x_adv) + 0.25 * (x_adv - before)
                moved = _projected_(moved, clean, epsilon, norm, clip)
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
        # noise and step reach no farther than three epsilons, or across [0, 1], so that this ball projects nothing
        return {
            "steps": 1,
            "step_size": epsilon,
            "start": "uniform",
            "start_epsilon": 2 * epsilon,
            "epsilon": min(3 * epsilon, 1.0),
        }
    raise ValueError(f"fast: expected fgsm-rs or n-fgsm, got {kind!r}")

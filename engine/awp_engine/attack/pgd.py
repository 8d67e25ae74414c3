"""Projected gradient descent on the images.

Source: Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from awp_engine.attack import checks
from awp_engine.attack.common import HALF_SCALE, Ball, Beginning, Start, prepared
from awp_engine.attack.losses import OF_LOGITS, Loss, log_probabilities, summed_cross_entropy, target_of
from awp_engine.models import NormalizedClassifier, NormalizedImages
from awp_engine.models.batch_norm import layer_modes
from awp_kernels import pgd_step_, pgd_step_normalize_


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
    loss_scale: float = 1.0,
    mask: Tensor | None = None,
    shared: Sequence[nn.Parameter] = (),
    nonfinite: Literal["raise", "ignore"] = "raise",
    observe: Callable[[int, Tensor], None] | None = None,
    observe_from: int = 0,
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
        loss_scale: lifts 16-bit gradients out of underflow; the steps ignore it, `shared` gradients keep it.
        mask: bool, broadcastable to x: the region that may change.
        shared: parameters whose `.grad` the last pass sets, besides moving the images: the gradient of `loss` there.
        nonfinite: what a gradient that is not finite does: "raise", or "ignore", which leaves such pixels (l2: images)
            where they are in that step, and takes a batch with NaN in x.
        observe: called with every step's number (from 0) and gradient, [N, C, H, W], before the step is taken.
        observe_from: the first step that it is called for.

    Returns:
        The attacked images, detached, in x's dtype (at least fp32) and memory format.

    Raises:
        ValueError: arguments out of range, images outside `clip`, probabilities for logits, labels that do not fit,
            each named; on a GPU, where values cannot be looked at without waiting, an assertion on the device.
        FloatingPointError: a gradient is not finite; on a GPU likewise.
    """
    ball, begin = Ball(epsilon, norm, clip), Beginning(start, start_epsilon, sample_ids, seed)
    model, clean, x_adv = prepared(
        model, x, ball, begin, step_size=step_size, steps=steps, least_steps=0, nonfinite=nonfinite
    )
    if shared and steps == 0:
        raise ValueError("shared: needs at least one step, whose pass the gradients come from; got steps 0")
    if mask is not None:
        checks.region(mask, clean)
        x_adv = torch.where(mask, x_adv, clean)
    if steps == 0:
        return ball.project_(x_adv, clean)
    taken = checks.images_dtype(model, clean.dtype)
    scale = HALF_SCALE if taken == torch.float16 else 1.0
    narrow = _with_narrow_input(model, clean)
    inputs = x_adv.detach() if narrow is None else narrow.normalize(x_adv)
    lifted = scale * loss_scale
    begun: Tensor | None = None
    # several ranks attack each their own images, without a word to each other
    modes = layer_modes(model, mode, bn_mode=bn_mode, update_statistics=update_statistics, synchronized=False)
    with modes, torch.enable_grad():
        for step in range(steps):
            parameters = shared if step == steps - 1 else ()
            inputs.requires_grad_()
            logits = model(inputs.to(taken) if narrow is None else NormalizedImages(inputs))
            if step == 0:
                if loss in OF_LOGITS:
                    checks.outputs(logits, y, len(x))
                # where nobody looks at the loss, the gradient begins at the log-probabilities, where it stays the same
                target = target_of(loss, logits.detach(), y) if nonfinite == "ignore" else None
                begun = None if target is None else -lifted * target
            climbed = loss(logits, y) if begun is None else log_probabilities(logits)
            outputs = climbed if lifted == 1 or begun is not None else climbed * lifted
            # a parameter that has no part in the logits gets no gradient
            unused = None if not parameters else True
            of_inputs, *weight_gradients = torch.autograd.grad(
                outputs, [inputs, *parameters], begun, allow_unused=unused
            )
            for parameter, gradient in zip(parameters, weight_gradients, strict=True):
                parameter.grad = gradient if scale == 1 or gradient is None else gradient / scale
            watcher = observe if step >= observe_from else None
            if watcher is not None or nonfinite == "raise":
                # that for the images, in their precision
                gradient = of_inputs if narrow is None else of_inputs[:, : clean.shape[1]] / narrow.std
                gradient = gradient if scale == 1 else gradient / scale
                if watcher is not None:
                    watcher(step, gradient)
                if nonfinite == "raise":
                    checks.finite(climbed.detach(), gradient if mask is None else gradient.where(mask, 0), step)
            inputs = inputs.detach()
            if narrow is None:
                pgd_step_(
                    x_adv, of_inputs, clean, step_size=step_size, epsilon=epsilon, norm=norm, clip=clip, mask=mask
                )
            else:
                pgd_step_normalize_(
                    x_adv,
                    of_inputs,
                    clean,
                    inputs,
                    narrow.mean.flatten(),
                    narrow.std.flatten(),
                    step_size=step_size,
                    epsilon=epsilon,
                    norm=norm,
                    clip=clip,
                    mask=mask,
                )
    return x_adv


def _with_narrow_input(model: nn.Module, x: Tensor) -> NormalizedClassifier | None:
    """The model if its passes read normalised images in a precision of their own, which a step then makes for them."""
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    if not isinstance(inner, NormalizedClassifier) or inner.input_dtype is None:
        return None
    # a model all of whose numbers are in 16 bits normalises in them
    return inner if inner.mean.dtype == x.dtype and x.ndim == 4 else None

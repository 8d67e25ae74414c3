"""What an attack refuses, because it would give a wrong result without an error.

What depends on values is looked at on the host where images lie on the CPU. On a GPU it is an assertion on the device,
which nobody waits for and which a CUDA graph can hold; it prints the same line, and ends the process's use of the GPU.

A refusal is a `ValueError` that names the argument; of `finite`, a `FloatingPointError` that names the step.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Clip = tuple[float, float]


def _refuse_where(
    wrong: Tensor, message: str, found: Callable[[], str] = lambda: "", error: type[Exception] = ValueError
) -> None:
    """Refuse if `wrong`, a bool scalar, is true; `found` is what a host that may look can say besides."""
    if wrong.device.type in ("cuda", "meta"):
        torch._assert_async(~wrong, message)  # pyright: ignore[reportPrivateImportUsage]
    elif wrong:
        raise error(message + found())


def number(name: str, value: float, *, minimum: float = -math.inf) -> None:
    """Refuse a number that is not finite or lies below the minimum."""
    try:
        fits = math.isfinite(value) and value >= minimum
    except (TypeError, OverflowError):  # a text such as 8/255, or more digits than a float holds
        fits = False
    if not fits:
        least = "" if minimum == -math.inf else f" >= {minimum:g}"
        raise ValueError(f"{name}: expected a finite number{least}, got {repr(value)[:80]}")


def ball(
    values: int, *, epsilon: float, norm: str, clip: Clip, step_size: float | None = None, l1: bool = False
) -> None:
    """Refuse a ball, a range or a step that an image of so many values cannot be meant to have; `l1`: that is known."""
    low, high = clip
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"clip: expected (low, high), finite, with low < high, got ({low}, {high})")
    number("epsilon", epsilon, minimum=0)
    reaches = {"linf": 1.0, "l2": math.sqrt(values) + 1} | ({"l1": float(values)} if l1 else {})
    if norm not in reaches:
        raise ValueError(f"norm: expected one of {', '.join(reaches)}, got {norm!r}")
    # beyond this radius every image can be made into every other
    reach = (high - low) * reaches[norm]
    if epsilon > reach:
        raise ValueError(
            f"epsilon: expected at most {reach:g} for {norm}, as values lie in [{low:g}, {high:g}], got {epsilon:g}; "
            "8 of 255 levels are 8 / 255"
        )
    if step_size is None:
        return
    number("step_size", step_size)
    if abs(step_size) > 2 * epsilon * (1 + 1e-9) and epsilon > 0:
        raise ValueError(
            f"step_size: expected at most {2 * epsilon:g}, twice epsilon, got {step_size:g}; a longer step throws "
            "every iterate from one side of the ball to the other"
        )


def images(name: str, x: Tensor, clip: Clip, *, slack: float = 0.0, allow_nan: bool = False) -> None:
    """Refuse what is no batch of floating-point images with values in `clip`.

    Args:
        name: of the argument.
        x: [N, ...].
        clip: the range of values.
        slack: how far outside they may lie, as a part of the range.
        allow_nan: whether a batch with NaN is taken: training leaves its step out, on all ranks alike.
    """
    low, high = clip
    if not x.is_floating_point():
        raise ValueError(
            f"{name}: expected floating-point images in [{low:g}, {high:g}], got {x.dtype}; divide uint8 images by 255"
        )
    if x.ndim < 2:
        raise ValueError(f"{name}: expected a batch [N, ...], got shape {tuple(x.shape)}")
    if not x.numel():
        return
    smallest, largest = torch.aminmax(x.detach())
    room = slack * (high - low)
    # NaN is neither inside nor outside
    inside = (smallest >= low - room) & (largest <= high + room)
    outside = (smallest < low - room) | (largest > high + room)
    _refuse_where(
        outside if allow_nan else ~inside,
        f"{name}: expected images with values in [{low:g}, {high:g}]; normalise inside the model, divide bytes by 255, "
        "clamp what was interpolated, or give clip=(low, high)",
        lambda: f"; got values from {smallest.item():.9g} to {largest.item():.9g}",
    )


def starting_images(start: Tensor, x: Tensor, clip: Clip, *, allow_nan: bool) -> None:
    """Refuse a first iterate that does not belong to x; noise beyond the range is for the first step to clip."""
    if start.shape != x.shape:
        raise ValueError(f"start: expected shape {tuple(x.shape)} like x, got {tuple(start.shape)}")
    if start.device != x.device:
        raise ValueError(f"start: expected device {x.device} like x, got {start.device}")
    images("start", start, clip, slack=0.1, allow_nan=allow_nan)


def region(mask: Tensor, x: Tensor) -> None:
    """Refuse a mask that is not bool, does not broadcast to x, or is on another device."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: expected torch.bool, got {mask.dtype}")
    sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.ndim > x.ndim or any(m not in (1, size) for m, size in sizes):
        raise ValueError(f"mask: expected a shape that broadcasts to {tuple(x.shape)} like x, got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask: expected device {x.device} like x, got {mask.device}")


def outputs(logits: Any, y: Any, count: int) -> None:
    """Refuse what cross-entropy and margin would take without climbing anything: probabilities, one logit, wrong y.

    Args:
        logits: what the model gave for `count` images.
        y: int64 [N], or floating-point [N, classes].
        count: N.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"model: expected logits [N, classes], got {type(logits).__name__}; wrap it so that forward returns logits"
        )
    if logits.ndim != 2 or len(logits) != count:
        raise ValueError(
            f"model: expected logits [{count}, classes], got shape {tuple(logits.shape)}; give a loss that fits them"
        )
    if not isinstance(y, Tensor):
        raise ValueError(f"y: expected a tensor of labels, got {type(y).__name__}")
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(
            "model: expected logits of at least 2 classes, got 1, whose cross-entropy is 0 whatever the image; give a "
            "loss of one logit, such as binary_cross_entropy_with_logits, summed"
        )
    if y.device != logits.device:
        raise ValueError(f"y: expected device {logits.device} like the logits, got {y.device}")
    if y.is_floating_point():
        if y.shape != logits.shape:
            raise ValueError(f"y: expected shape {tuple(logits.shape)} like the logits, got {tuple(y.shape)}")
    elif y.dtype != torch.int64 or y.shape != (count,):
        raise ValueError(
            f"y: expected int64 of shape ({count},), or floating-point {tuple(logits.shape)}, "
            f"got {y.dtype} of shape {tuple(y.shape)}"
        )
    if not count:
        return
    if not y.is_floating_point():
        smallest, largest = torch.aminmax(y)
        _refuse_where(
            (smallest < 0) | (largest >= classes),
            f"y: expected labels from 0 to {classes - 1}, as there are {classes} logits",
            lambda: f", got {smallest.item()} to {largest.item()}",
        )
    logits = logits.detach()
    sums = logits.sum(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    close = (sums - 1).abs().amax() <= 4 * torch.finfo(logits.dtype).eps
    _refuse_where(
        close & (logits.amin() >= 0),
        "model: expected logits, got rows of probabilities, whose cross-entropy has next to no gradient where the "
        "model is certain; leave out the softmax at its end",
    )


def finite(loss: Tensor, gradient: Tensor | None, step: int) -> None:
    """Refuse what is not finite: such images would be left where they are, and count as robust.

    Args:
        loss: scalar or [N].
        gradient: [N, ...], or None.
        step: that they are of.
    """
    fine = loss.isfinite().all() if gradient is None else loss.isfinite().all() & gradient.isfinite().all()
    _refuse_where(
        ~fine,
        "model: the attack's loss or gradient is not finite, which would leave images where they are; look for NaN in "
        "weights and logits, or for an overflow in 16 bits; nonfinite='ignore' goes on",
        lambda: f"; in step {step}",
        FloatingPointError,
    )


def images_dtype(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """What a model is to be given: its parameters' precision if they have but one, else `dtype`, the images' own."""
    found = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    return found.pop() if len(found) == 1 else dtype

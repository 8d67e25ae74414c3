"""Arguments are checked once, here, so that implementations see flat arrays; every error names the argument."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SCOPES = ("layer", "global", "filter")
SCALES = ("relative", "absolute", "elementwise")
NORMS = ("linf", "l2")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def finite(name: str, value: float, *, minimum: float | None = None, maximum: float | None = None) -> None:
    """Refuse what is not a finite number or lies outside of a range."""
    try:
        good = math.isfinite(value)
    except (TypeError, OverflowError):
        # not a number, or an integer that no float holds
        good = False
    if not good or (minimum is not None and value < minimum):
        least = "" if minimum is None else f" >= {minimum:g}"
        raise ValueError(f"{name}: expected a finite number{least}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name}: expected at most {maximum:g}, got {value}")


def seed(value: int) -> None:
    """Refuse what is no seed, before an operation is called: torch has no words for what 64 bits do not hold."""
    if not 0 <= value < 1 << 63:
        raise ValueError(f"seed: expected a number in [0, 2^63), got {value}")


def scaling(scale: str, eta: float, bound: float | None, *, maximum: float | None = None) -> None:
    """Refuse what does not say how long a perturbation is.

    Raises:
        ValueError: scale, eta or bound.
    """
    one_of("scale", scale, SCALES)
    finite("eta", eta, minimum=0, maximum=maximum)
    if eta and scale != "elementwise":
        raise ValueError(f"eta: scale 'elementwise' alone takes it, got {eta} with scale {scale!r}")
    if bound is not None:
        finite("bound", bound, minimum=0, maximum=maximum)


def adaptive_flags(adaptive: Sequence[bool], weights: Sequence[Tensor], scale: str) -> None:
    """Refuse flags that do not belong to the weights.

    Raises:
        ValueError: flags without scale "elementwise", or not one a tensor.
    """
    if adaptive and scale != "elementwise":
        raise ValueError(f"adaptive: scale 'elementwise' alone takes it, got scale {scale!r}")
    if adaptive and len(adaptive) != len(weights):
        raise ValueError(f"adaptive: expected {len(weights)} flags like weights, got {len(adaptive)}")


def weight_norms(norms: Tensor, weights: Sequence[Tensor], scope: str, scale: str) -> None:
    """Refuse norms that do not belong to the weights, or that no scale is made of.

    Raises:
        ValueError: dtype, shape, device, scope or scale.
    """
    if scale != "relative" or scope == "filter":
        raise ValueError(
            "weight_norms: scale 'relative' with scope 'layer' or 'global' alone takes them, "
            f"got scale {scale!r} with scope {scope!r}"
        )
    if norms.dtype != torch.float64 or norms.shape != (len(weights),) or not norms.is_contiguous():
        raise ValueError(
            f"weight_norms: expected contiguous float64 of shape ({len(weights)},) like weights, "
            f"got {norms.dtype} of shape {tuple(norms.shape)}"
        )
    same_device("weight_norms", norms, "weights[0]", weights[0])


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def _same_strides(a: Tensor, b: Tensor) -> bool:
    """Equal strides, where they matter: a dimension of size 1 may have any."""
    if a.stride() == b.stride():
        return True
    return all(s == t or size == 1 for s, t, size in zip(a.stride(), b.stride(), a.shape, strict=True))


def _outermost_first(tensor: Tensor) -> bool:
    return (
        tensor.ndim < 2
        or tensor.shape[0] == 1
        or not tensor.numel()
        or tensor.stride(0) * tensor.shape[0] == tensor.numel()
    )


def floating_strided(name: str, tensor: Tensor) -> None:
    """Refuse what no operation computes with."""
    if tensor.dtype not in FLOATING:
        raise ValueError(f"{name}: expected float64, float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided tensor, got layout {tensor.layout}")


def _same_shape_and_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)} like {like_name}, got {tuple(tensor.shape)}")
    same_device(name, tensor, like_name, like)


def _writable(name: str, tensor: Tensor) -> None:
    if not dense(tensor):
        raise ValueError(
            f"{name}: expected elements that fill one block of memory (contiguous, channels_last, ...), "
            f"got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
        )


def like(name: str, tensor: Tensor, like_name: str, model: Tensor) -> Tensor:
    """`tensor` in the memory order of `model`, copied if it has another."""
    floating_strided(name, tensor)
    _same_shape_and_device(name, tensor, like_name, model)
    return tensor if _same_strides(tensor, model) else torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def same_device(name: str, tensor: Tensor, like_name: str, model: Tensor) -> None:
    """Refuse a tensor on another device than the model's."""
    if tensor.device != model.device:
        raise ValueError(f"{name}: expected device {model.device} like {like_name}, got {tensor.device}")


def traced_batch(x_adv: Tensor, like: Mapping[str, Tensor], others: Mapping[str, Tensor | None]) -> None:
    """What a traced call of an attack operation is checked for, and one that mixes "meta" tensors with others.

    Args:
        x_adv: what is written.
        like: tensors of its shape, on its device.
        others: tensors of other shapes, on its device.

    Raises:
        ValueError: shapes or devices.
    """
    for name, tensor in like.items():
        _same_shape_and_device(name, tensor, "x_adv", x_adv)
    for name, tensor in others.items():
        if tensor is not None:
            same_device(name, tensor, "x_adv", x_adv)


def alike(model_name: str, model: Sequence[Tensor], others: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse lists that differ in length, shapes or devices; also what a traced call is checked for."""
    for name, tensors in {model_name: model, **others}.items():
        if len(tensors) != len(model):
            raise ValueError(f"{name}: expected {len(model)} tensors like {model_name}, got {len(tensors)}")
        for index, (tensor, first) in enumerate(zip(tensors, model, strict=True)):
            _same_shape_and_device(f"{name}[{index}]", tensor, f"{model_name}[{index}]", first)
            same_device(f"{name}[{index}]", tensor, f"{model_name}[0]", model[0])


def scalar(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], like_name: str, model: Tensor) -> None:
    """Refuse what is not one number of these dtypes on the model's device."""
    if tensor.numel() != 1 or tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a tensor of one element, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected {names}, got {tensor.dtype}")
    same_device(name, tensor, like_name, model)


def flat(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a list that has no model, each in one block of memory: copied if it has gaps.

    Raises:
        ValueError: an empty list, dtypes, layouts or devices.
    """
    if not tensors:
        raise ValueError(f"{name}: expected at least one tensor, got an empty list")
    for index, tensor in enumerate(tensors):
        floating_strided(f"{name}[{index}]", tensor)
        same_device(f"{name}[{index}]", tensor, f"{name}[0]", tensors[0])
    return [tensor if dense(tensor) else tensor.contiguous() for tensor in tensors]


def _fit(lists: Mapping[str, Sequence[Tensor]], model: Sequence[Tensor], *, filters: bool) -> bool:
    """Whether nothing needs a closer look: the usual case, told in one cheap pass."""
    for tensors in lists.values():
        kinds = {(tensor.dtype, tensor.layout, tensor.device) for tensor in tensors}
        if len(tensors) != len(model) or len(kinds) != 1:
            return False
        dtype, layout, device = kinds.pop()
        if dtype not in FLOATING or layout != torch.strided or device != model[0].device:
            return False
    # lists of shapes and of strides are compared faster than tensor by tensor
    shapes, strides = [tensor.shape for tensor in model], [tensor.stride() for tensor in model]
    for tensors in lists.values():
        if [tensor.shape for tensor in tensors] != shapes or [tensor.stride() for tensor in tensors] != strides:
            return False
    return all(dense(tensor) and (not filters or _outermost_first(tensor)) for tensor in model)


def tensor_lists(
    written: dict[str, list[Tensor]],
    read: dict[str, list[Tensor]],
    *,
    filters: bool = False,
    numbers: dict[str, list[Tensor]] | None = None,
) -> None:
    """Check a multi-tensor operation's lists against the first of `written`; copy what `read` has in another order.

    Args:
        written: lists that the operation writes, the first one the model for all shapes and strides.
        read: lists that it reads; an entry whose strides differ is replaced by a copy.
        filters: whether dimension 0 must be outermost in memory.
        numbers: further tensors that it reads, of any shapes, which must not be written either.

    Raises:
        ValueError: lengths, shapes, devices, dtypes, layouts or memory overlap.
    """
    (model_name, model), *_ = written.items()
    lists = written | read
    if not _fit(lists, model, filters=filters):
        _look_closely(model_name, written, read, filters=filters)
    no_overlap(written, read | numbers if numbers else read)


def _look_closely(
    model_name: str, written: dict[str, list[Tensor]], read: dict[str, list[Tensor]], *, filters: bool
) -> None:
    model = written[model_name]
    alike(model_name, model, written | read)
    for name, tensors in (written | read).items():
        for index, (tensor, first) in enumerate(zip(tensors, model, strict=True)):
            label, model_label = f"{name}[{index}]", f"{model_name}[{index}]"
            floating_strided(label, tensor)
            if tensor.dtype != tensors[0].dtype:
                raise ValueError(f"{label}: expected {tensors[0].dtype} like {name}[0], got {tensor.dtype}")
            if name in written:
                _writable(label, tensor)
                if not _same_strides(tensor, first):
                    raise ValueError(
                        f"{label}: expected strides {first.stride()} like {model_label}, got {tensor.stride()}"
                    )
            elif not _same_strides(tensor, first):
                tensors[index] = torch.empty_like(first, dtype=tensor.dtype).copy_(tensor)
            if filters and not _outermost_first(first):
                raise ValueError(
                    f"{model_label}: scope 'filter' needs dimension 0 outermost, got strides {first.stride()}"
                )


def no_overlap(written: dict[str, list[Tensor]], read: dict[str, list[Tensor]]) -> None:
    """Refuse written memory that another argument shares."""
    spans = []
    for name, tensors in (written | read).items():
        is_written = name in written
        for index, tensor in enumerate(tensors):
            start = tensor.data_ptr()
            if bytes_ := tensor.nbytes:
                spans.append((start, start + bytes_, is_written, name, index))
    spans.sort()
    # the furthest end so far, of any span and of written spans alone
    last = last_written = None
    for span in spans:
        start, end, is_written, name, index = span
        other = last if is_written else last_written
        if other is not None and other[1] > start:
            raise ValueError(
                f"{name}[{index}]: shares memory with {other[3]}[{other[4]}]; "
                "pass each tensor once, and separate buffers"
            )
        if last is None or end > last[1]:
            last = span
        if is_written and (last_written is None or end > last_written[1]):
            last_written = span


def same_dtype(name: str, tensors: list[Tensor], like_name: str, model: list[Tensor]) -> None:
    """Refuse a list whose dtype differs from another's."""
    if tensors and model and tensors[0].dtype != model[0].dtype:
        raise ValueError(f"{name}[0]: expected {model[0].dtype} like {like_name}, got {tensors[0].dtype}")


def image_operand(name: str, tensor: Tensor) -> None:
    """Refuse what neither the compiled image operations nor torch's own take."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided tensor, got layout {tensor.layout}")


def byte_images(name: str, images: Tensor) -> None:
    """Refuse what is no batch of images of bytes."""
    if images.dtype != torch.uint8:
        raise ValueError(f"{name}: expected uint8, got {images.dtype}")
    if images.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided tensor, got layout {images.layout}")
    if images.ndim != 4:
        raise ValueError(f"{name}: expected a batch [N, C, H, W], got shape {tuple(images.shape)}")


def indices(name: str, tensor: Tensor, like_name: str, model: Tensor) -> None:
    """Refuse what is no vector of int64 on the model's device."""
    if tensor.dtype != torch.int64 or tensor.ndim != 1:
        raise ValueError(f"{name}: expected int64 [B], got {tensor.dtype} of shape {tuple(tensor.shape)}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a strided tensor, got layout {tensor.layout}")
    same_device(name, tensor, like_name, model)


def planar(images: Tensor) -> bool:
    """Whether every image of a batch is contiguous: [C, H, W] without gaps, whatever lies between images."""
    _, _, height, width = images.shape
    return images.is_contiguous() or _inner_strides(images, (height * width, width, 1))


def packed(images: Tensor) -> bool:
    """Whether every image of a batch is channels_last: [H, W, C] without gaps, whatever lies between images."""
    _, channels, _, width = images.shape
    return _inner_strides(images, (1, width * channels, channels))


def _inner_strides(images: Tensor, expected: tuple[int, ...]) -> bool:
    strides = images.stride()[1:]
    if strides == expected:
        return True
    return all(size == 1 or a == b for size, a, b in zip(images.shape[1:], strides, expected, strict=True))


def image_batch(x_adv: Tensor, x: Tensor) -> None:
    """Check the pair that every attack operation takes.

    Raises:
        ValueError: dtype, shape, device, memory order or overlap.
    """
    floating_strided("x_adv", x_adv)
    if x_adv.ndim < 1:
        raise ValueError("x_adv: expected a batch [N, ...], got a tensor without dimensions")
    if x_adv.ndim > 9:
        raise ValueError(f"x_adv: expected at most 9 dimensions, got {x_adv.ndim}")
    _writable("x_adv", x_adv)
    if x_adv.numel() and not _outermost_first(x_adv):
        raise ValueError(f"x_adv: expected dimension 0 outermost in memory, got strides {x_adv.stride()}")
    if x.dtype != x_adv.dtype:
        raise ValueError(f"x: expected {x_adv.dtype} like x_adv, got {x.dtype}")

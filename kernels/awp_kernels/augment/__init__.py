"""`augment`: random crops, mirroring and Cutout of chosen images, keyed by sample id, and fp32 in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from awp_kernels import _backend, _checks
from awp_kernels.augment.reference import Rule

__all__ = ["augment"]

_FORMATS = {torch.channels_last: True, torch.contiguous_format: False}
_MOST_PIXELS = 1 << 30
_MOST_VALUES = 1 << 30


def _check(images: Tensor, sample_ids: Tensor, rows: Tensor | None, cutout: int, fill: list[float] | None) -> None:
    """What a traced call is checked for too."""
    _checks.byte_images("images", images)
    if rows is not None:
        _checks.indices("rows", rows, "images", images)
    _checks.indices("sample_ids", sample_ids, "images", images)
    count = images.shape[0] if rows is None else rows.shape[0]
    if sample_ids.shape[0] != count:
        raise ValueError(
            f"sample_ids: expected {count} like {'images' if rows is None else 'rows'}, got {sample_ids.shape[0]}"
        )
    channels = images.shape[1]
    if fill is None:
        if cutout:
            raise ValueError(
                f"fill: expected {channels} values in [0, 1], one a channel, with cutout {cutout}, got None"
            )
    elif len(fill) != channels or not all(0 <= value <= 1 for value in fill):
        raise ValueError(f"fill: expected {channels} values in [0, 1], one a channel of images, got {fill}")


def _check_rows(rows: Tensor, count: int) -> None:
    """Where looking does not wait for a device."""
    if rows.device.type != "cpu" or not rows.numel():
        return
    least, most = (value.item() for value in torch.aminmax(rows))
    if least < 0 or most >= count:
        raise ValueError(f"rows: expected rows of {count} images, got {least if least < 0 else most}")


def _empty(images: Tensor, sample_ids: Tensor, channels_last: bool) -> Tensor:
    order = torch.channels_last if channels_last else torch.contiguous_format
    shape = (sample_ids.shape[0], *images.shape[1:])
    return torch.empty(shape, dtype=torch.float32, device=images.device, memory_format=order)


# by schema: torch.library.custom_op takes 10 us more a call, for gradients and writes that this has none of
torch.library.define(
    "awp::augment",
    "(Tensor images, Tensor sample_ids, int seed, int pad, bool flip, int cutout, float[]? fill, Tensor? rows, "
    "bool channels_last) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("awp::augment", "default")
def _augment(
    images: Tensor,
    sample_ids: Tensor,
    seed: int,
    pad: int,
    flip: bool,
    cutout: int,
    fill: list[float] | None,
    rows: Tensor | None,
    channels_last: bool,
) -> Tensor:
    _check(images, sample_ids, rows, cutout, fill)
    values = images.shape[1] * images.shape[2] * images.shape[3]
    if values >= _MOST_VALUES:
        raise ValueError(f"images: expected fewer than 2^30 values an image, got {values}")
    if rows is not None:
        _check_rows(rows, images.shape[0])
    run = _backend.select("augment", images.device, {torch.float32})
    out = _empty(images, sample_ids, channels_last)
    if not out.numel():
        return out
    if not (_checks.planar(images) or _checks.packed(images)):
        # in an order that no kernel reads: of what is wanted alone
        images, rows = images.contiguous() if rows is None else images[rows].contiguous(), None
    chosen = None if rows is None else rows.contiguous()
    rule = Rule(seed, pad, flip, cutout, fill if cutout and fill else [])
    run(images, chosen, sample_ids.contiguous(), rule, out)
    return out


@torch.library.register_fake("awp::augment")
def _(
    images: Tensor,
    sample_ids: Tensor,
    seed: int,
    pad: int,
    flip: bool,
    cutout: int,
    fill: list[float] | None,
    rows: Tensor | None,
    channels_last: bool,
) -> Tensor:
    _check(images, sample_ids, rows, cutout, fill)
    return _empty(images, sample_ids, channels_last)


def augment(
    images: Tensor,
    *,
    sample_ids: Tensor,
    seed: int,
    pad: int = 0,
    flip: bool = False,
    cutout: int = 0,
    fill: Sequence[float] | None = None,
    rows: Tensor | None = None,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Gather images, crop them at random from zero padding, mirror half of them, cut out a square, and convert to fp32.

    In this order, each sample by itself, in one pass over the pixels. What becomes of a sample depends on `seed` and
    its id alone: neither on its place in the batch, nor on the number of ranks, nor on memory format, device or
    implementation (equal to the last bit). With Philox words w of (seed, id), stream 2, the crop starts at row
    w0 * (2 pad + 1) // 2^32 and column w1 * (2 pad + 1) // 2^32 of the padded image, and is mirrored where w2 is odd.
    With words of stream 6 the square lies around row w0 * height // 2^32 and column w1 * width // 2^32 of the result,
    begins cutout // 2 before it, and is clipped at the border.

    Args:
        images: uint8 [N, C, H, W], contiguous or channels_last, with any distance between images; in another order what
            is wanted of them is copied first. May be a memory-mapped file of any size: other rows are not touched.
        sample_ids: int64 [B].
        seed: in [0, 2^63); vary it from epoch to epoch, for example by `awp_kernels.philox.mix_seed`.
        pad: zero padding on all sides, in pixels, below 2^30; 0 for no crop.
        flip: mirror half of the images.
        cutout: side of the square in pixels, below 2^30; 0 for none.
        fill: what the square is filled with, in [0, 1], a value a channel; needed with cutout.
        rows: int64 [B], which of the images, in any order, repeats allowed; None: all N. On a GPU they must be rows
            there are: looking would wait for the device.
        memory_format: of the result: torch.channels_last or torch.contiguous_format.

    Returns:
        fp32 [B, C, H, W] in [0, 1]: a byte's value over 255, rounded to nearest.

    Raises:
        ValueError: arguments that do not fit, named; rows that there are not, on the CPU.

    Example:
        >>> import torch
        >>> from awp_kernels import augment
        >>> images = torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2) * 20
        >>> augment(images, sample_ids=torch.tensor([7, 7]), rows=torch.tensor([2, 2]), seed=1, flip=True)[1] * 255
        tensor([[[180., 160.],
                 [220., 200.]]])

    Source of Cutout: DeVries, Taylor: Improved Regularization of Convolutional Neural Networks with Cutout, 2017.
    """
    _checks.seed(seed)
    for name, pixels in (("pad", pad), ("cutout", cutout)):
        if not 0 <= pixels < _MOST_PIXELS:
            raise ValueError(f"{name}: expected a number of pixels in [0, 2^30), got {pixels}")
    if memory_format not in _FORMATS:
        raise ValueError(f"memory_format: expected torch.channels_last or torch.contiguous_format, got {memory_format}")
    values = None if fill is None else list(map(float, fill))
    return torch.ops.awp.augment.default(
        images, sample_ids, seed, pad, flip, cutout, values, rows, _FORMATS[memory_format]
    )

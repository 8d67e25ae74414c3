"""The attack's operations on one batch of images, and what else can do the same."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from awp_kernels import _backend, augment, pgd_init_, pgd_step_, pgd_step_normalize_, use_backend
from awp_kernels.philox import STREAM_AUGMENT, STREAM_CUTOUT, sample_words
from bench.ops import alternatives
from bench.ops.workload import Workload

BATCH = (128, 3, 32, 32)
ALTERNATIVES = {
    "pgd_init_ linf": ["plain"],
    "pgd_init_ l2": ["plain"],
    "pgd_step_ linf": ["plain", "inplace", "compile"],
    "pgd_step_ l2": ["plain", "inplace", "compile"],
    "pgd_step_normalize_ linf": ["plain", "inplace", "compile"],
    "pgd_step_normalize_ l2": ["plain", "inplace", "compile"],
    "augment 128": ["plain", "loop"],
    "augment 1024": ["plain", "loop"],
}
_EPSILON = {"linf": 8 / 255, "l2": 128 / 255}
_STEP_SIZE = {"linf": 2 / 255, "l2": 15 / 255}
_PLAIN_STEPS = {
    "linf": (alternatives.step_linf, alternatives.step_linf_inplace),
    "l2": (alternatives.step_l2, alternatives.step_l2_renorm),
}
# CIFAR's training images, and what is usually done to them
_RESIDENT = (50_000, 3, 32, 32)
_PAD, _CUTOUT, _FILL = 4, 8, (0.4914, 0.4822, 0.4465)


def inputs(operation: str) -> str:
    """The shape of an operation's batch, in words."""
    name, size = operation.split()
    return f"{size if name == 'augment' else BATCH[0]}x3x32x32"


@torch.no_grad()
def image_workload(operation: str, device: str) -> Workload:
    """The workload of one operation on fp32 images, or from bytes to them."""
    name, norm = operation.split()
    if name == "augment":
        return _augment_workload(int(norm), device)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(BATCH, generator=generator).to(device)
    grad = torch.randn(BATCH, generator=generator).to(device)
    start, x_adv = torch.empty_like(x), torch.empty_like(x)
    noise: dict[str, Any] = {"epsilon": _EPSILON[norm], "norm": norm, "seed": 1}
    ids = torch.arange(BATCH[0], device=device)
    with use_backend("reference"):
        pgd_init_(start, x, sample_ids=ids, **noise)
    calls: dict[str, Callable[[], object]]
    if name == "pgd_step_normalize_":
        return _normalize_workload(x, grad, norm)

    if name == "pgd_init_":

        def init_wrong() -> float:
            # this package's noise is the same to the last bit; torch's own only has the ball, range and size in common
            if torch.equal(x_adv, start):
                return 0.0
            delta = (x_adv - x).double()
            radius = delta.abs().amax() if norm == "linf" else delta.flatten(1).norm(dim=1).amax()
            size = float(delta.abs().mean() / (start - x).double().abs().mean())
            outside = max(float(radius) / _EPSILON[norm] - 1, -float(x_adv.amin()), float(x_adv.amax()) - 1)
            return outside + (0.0 if abs(size - 1) < 1e-2 else torch.inf)

        calls = dict.fromkeys(_backend.BACKENDS, functools.partial(pgd_init_, x_adv, x, sample_ids=ids, **noise))
        plain = alternatives.init_linf if norm == "linf" else alternatives.init_l2
        calls["plain"] = functools.partial(plain, x_adv, x, _EPSILON[norm])

        def poison() -> None:
            x_adv.fill_(torch.nan)

        return Workload(8 * x.numel(), poison, calls, init_wrong, {"": 0.0, "plain": 1e-5})

    step: dict[str, Any] = {"step_size": _STEP_SIZE[norm], "epsilon": _EPSILON[norm]}
    exact = start.double()
    with use_backend("reference"):
        pgd_step_(exact, grad, x.double(), norm=norm, **step)
    plain, inplace = _PLAIN_STEPS[norm]
    calls = dict.fromkeys(_backend.BACKENDS, functools.partial(pgd_step_, x_adv, grad, x, norm=norm, **step))
    calls["plain"] = functools.partial(plain, x_adv, grad, x, **step)
    calls["inplace"] = functools.partial(inplace, x_adv, grad, x, **step)
    calls["compile"] = functools.partial(torch.compile(plain, dynamic=False), x_adv, grad, x, **step)

    def reset() -> None:
        x_adv.copy_(start)

    return Workload(16 * x.numel(), reset, calls, lambda: float((x_adv.double() - exact).abs().max()), {"": 1e-6})


def _normalize_workload(x: Tensor, ascent: Tensor, norm: str) -> Workload:
    """fp32 images in channels_last order, and rows of eight channels in fp16."""
    x, rows = x.contiguous(memory_format=torch.channels_last), (len(x), 8, *x.shape[2:])
    start = (x + 0.01 * torch.sign(ascent)).clamp(0, 1)
    grad, out = (x.new_zeros(rows, dtype=torch.float16).to(memory_format=torch.channels_last) for _ in range(2))
    grad[:, :3] = ascent
    x_adv, vectors = x.clone(), [x.new_tensor(values) for values in ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))]
    mean, std = (vector.view(-1, 1, 1) for vector in vectors)
    step: dict[str, Any] = {"step_size": _STEP_SIZE[norm], "epsilon": _EPSILON[norm]}
    images, exact = start.double(), out.double()
    with use_backend("reference"):
        center, scale = (vector.double() for vector in vectors)
        pgd_step_normalize_(images, grad.double(), x.double(), exact, center, scale, norm=norm, **step)

    def plainly(stepped: Callable[..., None]) -> None:
        stepped(x_adv, grad[:, :3] / std, x, **step)
        # zeros behind them stay
        out[:, :3] = (x_adv - mean) / std

    plain, inplace = _PLAIN_STEPS[norm]
    own = functools.partial(pgd_step_normalize_, x_adv, grad, x, out, *vectors, norm=norm, **step)
    calls: dict[str, Callable[[], object]] = dict.fromkeys(_backend.BACKENDS, own)
    calls["plain"], calls["inplace"] = functools.partial(plainly, plain), functools.partial(plainly, inplace)
    calls["compile"] = functools.partial(torch.compile(plainly, dynamic=False), plain)

    def reset() -> None:
        x_adv.copy_(start)
        out[:, :3] = torch.nan

    def wrong() -> float:
        # half an ulp of fp16 is 1e-3 at most
        rounded = float((out.double() - exact).abs().max()) / 2000
        return max(float((x_adv.double() - images).abs().max()), rounded)

    # of the gradient's rows a few bytes count, whole sectors are read
    return Workload(12 * x.numel() + 4 * out.numel(), reset, calls, wrong, {"": 1e-6})


class _Draws:
    """What is drawn for the samples of a batch: ahead of time, as for a whole epoch at once, and so not timed."""

    def __init__(self, ids: Tensor, seed: int) -> None:
        _, _, height, width = _RESIDENT
        words = sample_words(ids, 3, seed=seed, stream=STREAM_AUGMENT)
        self.offsets = ((words[:, :2] * (2 * _PAD + 1)) >> 32) - _PAD
        self.mirrored = (words[:, 2] & 1).bool()
        centres = sample_words(ids, 2, seed=seed, stream=STREAM_CUTOUT)
        self.corners = ((centres * torch.tensor([height, width], device=ids.device)) >> 32) - _CUTOUT // 2
        self.fill = torch.tensor(_FILL, device=ids.device).view(-1, 1, 1)
        self.numbers = torch.cat([self.offsets, self.corners, words[:, 2:] & 1], dim=1).tolist()


def _plain_augment(images: Tensor, rows: Tensor, draws: _Draws) -> Tensor:
    """All images of the batch at once: index_select, then gather from computed places, as PyTorch allows."""
    chosen = images.index_select(0, rows)
    _, channels, height, width = chosen.shape
    columns = torch.arange(width, device=rows.device).expand(len(rows), width)
    i = torch.arange(height, device=rows.device)
    y = i + draws.offsets[:, :1]
    x = torch.where(draws.mirrored.unsqueeze(1), width - 1 - columns, columns) + draws.offsets[:, 1:]
    inside = ((y >= 0) & (y < height)).unsqueeze(2) & ((x >= 0) & (x < width)).unsqueeze(1)
    places = y.clamp(0, height - 1).unsqueeze(2) * width + x.clamp(0, width - 1).unsqueeze(1)
    places = places.flatten(1).unsqueeze(1).expand(-1, channels, -1)
    cropped = chosen.flatten(2).gather(2, places).view(chosen.shape) * inside.unsqueeze(1)
    values = cropped.to(torch.float32) / torch.full((), 255.0, device=rows.device)
    top, left = draws.corners.unsqueeze(2).unbind(1)
    in_rows, in_columns = (i >= top) & (i < top + _CUTOUT), (columns >= left) & (columns < left + _CUTOUT)
    square = in_rows.unsqueeze(2) & in_columns.unsqueeze(1)
    return torch.where(square.unsqueeze(1), draws.fill, values).contiguous(memory_format=torch.channels_last)


def _loop_augment(images: Tensor, rows: Tensor, draws: _Draws) -> Tensor:
    """Image by image by slicing, as a data set's transforms do it, without a process or a PIL image between."""
    _, _, height, width = images.shape
    padded = functional.pad(images.index_select(0, rows), (_PAD,) * 4)
    cropped = []
    for image, (down, right, _, _, mirrored) in zip(padded, draws.numbers, strict=True):
        window = image[:, _PAD + down : _PAD + down + height, _PAD + right : _PAD + right + width]
        cropped.append(window.flip(-1) if mirrored else window)
    values = torch.stack(cropped).to(torch.float32).div_(torch.full((), 255.0, device=rows.device))
    for image, (_, _, top, left, _) in zip(values, draws.numbers, strict=True):
        image[:, max(top, 0) : top + _CUTOUT, max(left, 0) : left + _CUTOUT] = draws.fill
    return values.contiguous(memory_format=torch.channels_last)


def _augment_workload(batch: int, device: str) -> Workload:
    """Random images of the resident ones, which caches do not hold, in training's memory format."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, _RESIDENT, dtype=torch.uint8, generator=generator).to(device)
    rows = torch.randperm(len(images), generator=generator)[:batch].to(device)
    options: dict[str, Any] = {"seed": 1, "pad": _PAD, "flip": True, "cutout": _CUTOUT, "fill": _FILL}
    draws, result = _Draws(rows, 1), [torch.zeros(0)]
    with use_backend("reference"):
        exact = augment(images, sample_ids=rows, rows=rows, **options)

    def kept(call: Callable[..., Tensor], *arguments: Any, **more: Any) -> None:
        result[0] = call(*arguments, **more)

    own = functools.partial(kept, augment, images, sample_ids=rows, rows=rows, **options)
    calls: dict[str, Callable[[], object]] = dict.fromkeys(_backend.BACKENDS, own)
    calls["plain"] = functools.partial(kept, _plain_augment, images, rows, draws)
    calls["loop"] = functools.partial(kept, _loop_augment, images, rows, draws)

    def reset() -> None:
        result[0] = torch.zeros(0)

    def wrong() -> float:
        return 0.0 if torch.equal(result[0], exact) else torch.inf

    return Workload(5 * exact.numel(), reset, calls, wrong, {"": 0.0})

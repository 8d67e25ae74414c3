"""How long the convolutions of a step take by themselves: the least that a step takes with them."""

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awp_kernels import conv3x3_forget
from bench.clocks import seconds

_REPEATS = {"cpu": 5, "cuda": 10}
# about a millisecond, while the host queues one call
_HEAD_START_CYCLES = 2_000_000


class Call(NamedTuple):
    """What the time of a convolution depends on.

    Attributes:
        kind: class and geometry of the layer.
        weight, image: shape, strides, dtype, and whether it gets a gradient.
        graph: whether a graph is made for the backward pass.
    """

    kind: tuple[Any, ...]
    weight: tuple[Any, ...]
    image: tuple[Any, ...]
    graph: bool


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad


def calls_of(step: Callable[[], object]) -> tuple[Counter[Call], dict[Call, nn.Conv2d]]:
    """How often `step` calls each kind of convolution, and a layer of each kind."""
    counted: Counter[Call] = Counter()
    layers: dict[Call, nn.Conv2d] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Conv2d):
            kind = type(module), module.kernel_size, module.stride, module.padding, module.dilation, module.groups
            call = Call(kind, _form(module.weight), _form(inputs[0]), torch.is_grad_enabled())
            counted[call] += 1
            layers[call] = module

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        step()
    finally:
        handle.remove()
    return counted, layers


def convolution_seconds(step: Callable[[], object], device: str) -> dict[str, float]:
    """Seconds of a step that its convolutions take, each timed alone on random images and by the layer itself.

    Args:
        step: one whole step, neither compiled nor replayed, so that its layers are called.
        device: "cpu" or "cuda".

    Returns:
        forward, and backward: the gradients that the step asks for, of the images, of the weight or of both.
    """
    counted, layers = calls_of(step)
    found = {"forward": 0.0, "backward": 0.0}
    for call, number in counted.items():
        times = [_one(call, layers[call], device) for _ in range(1 + _REPEATS[device])][1:]
        for part, values in zip(found, zip(*times, strict=True), strict=True):
            found[part] += number * statistics.median(values)
    return found


def _one(call: Call, layer: nn.Conv2d, device: str) -> tuple[float, float]:
    """Seconds forward and backward."""
    shape, stride, dtype, asks = call.image
    x = torch.empty_strided(shape, stride, dtype=dtype, device=device).normal_().requires_grad_(asks)
    if layer.weight.requires_grad:
        # it has changed since the pass before, as those of the attack have not
        conv3x3_forget()
    out: list[Tensor] = []
    with torch.set_grad_enabled(call.graph):
        forward = seconds(lambda: out.append(layer(x)), device, _HEAD_START_CYCLES)
    if not out[0].requires_grad:
        return forward, 0.0
    given = [tensor for tensor in (x, layer.weight) if tensor.requires_grad]
    gradient = torch.randn_like(out[0])
    return forward, seconds(lambda: torch.autograd.grad(out[0], given, gradient), device, _HEAD_START_CYCLES)

"""How fast cuDNN and torch compute the layers of which a step is made: what a training step can reach at most.

    python -m bench.ops.rates --device cuda --json rates.json

3x3 convolutions of the models' widths in channels_last fp16 (on the CPU fp32): forward, gradient for the images,
gradient for the weight, in TFLOP/s; a residual sum, batch normalisation by the batch and ReLU, forward and backward, by
torch's operations and by `add_bn_act`, in GB/s of what each has to move.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from awp_engine.cli.command_line import OneLineParser
from awp_engine.device import choose_convolutions
from awp_engine.files.text import json_text
from awp_kernels import add_bn_act
from bench.clocks import seconds
from bench.machine import describe_machine

# channels @ height and width; the last one is the CPU's rehearsal
_LAYERS = {"cuda": ((160, 32), (320, 16), (640, 8), (64, 32), (512, 4)), "cpu": ((8, 8),)}
_BATCH, _REPEATS = {"cuda": 128, "cpu": 4}, {"cuda": 20, "cpu": 3}
# tensors moved: sum r2 w, statistics r, normalise r w, ReLU r w; ReLU r2 w, sums r2, gradient r2 w, sum r2 w; and as
# docs/areas/operations.md counts them
_MOVES = {"torch": (8, 11), "add_bn_act": (5, 6)}


def median_seconds(call: Callable[[], object], device: str) -> float:
    """Of some calls, after those in which cuDNN chooses."""
    times = [seconds(call, device) for _ in range(3 + _REPEATS[device])]
    return statistics.median(times[3:])


def convolution(channels: int, size: int, device: str) -> dict[str, float]:
    """TFLOP/s of the three convolutions of a layer."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    shape, batch = (channels, channels, 3, 3), _BATCH[device]
    layout: Any = {"dtype": dtype, "memory_format": torch.channels_last}
    x, grad = (torch.randn(batch, channels, size, size, device=device).to(**layout) for _ in range(2))
    weight = (torch.randn(shape, device=device) / (9 * channels) ** 0.5).to(**layout)

    def backward(for_images: bool) -> Callable[[], object]:
        mask = [for_images, not for_images, False]
        call = torch.ops.aten.convolution_backward.default
        return lambda: call(grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)

    calls = {
        "fprop": lambda: functional.conv2d(x, weight, padding=1),
        "dgrad": backward(True),
        "wgrad": backward(False),
    }
    work = 2 * 9 * channels**2 * size**2 * batch / 1e12
    return {name: work / median_seconds(call, device) for name, call in calls.items()}


def normalisation(channels: int, size: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds and GB/s of the sum, batch normalisation and ReLU, forward and backward, by each program."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    x, residual = (
        torch.randn(_BATCH[device], channels, size, size, device=device)
        .to(dtype=dtype, memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(2)
    )
    weight, bias = (torch.ones(channels, device=device, requires_grad=True) for _ in range(2))
    mean, variance = torch.zeros(channels, device=device), torch.ones(channels, device=device)

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        z = x + residual
        return z, functional.relu(functional.batch_norm(z, mean, variance, weight, bias, training=True), inplace=True)

    def fused() -> tuple[torch.Tensor, torch.Tensor]:
        return add_bn_act(x, residual, weight, bias, mean, variance, training=True)

    found = {}
    for name, forward in (("torch", plain), ("add_bn_act", fused)):
        outputs = forward()
        grads = [torch.randn_like(output) for output in outputs]
        inputs = [x, residual, weight, bias]

        def backward(
            outputs: tuple[torch.Tensor, ...] = outputs, grads: list[torch.Tensor] = grads, inputs: Any = inputs
        ) -> object:
            return torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

        taken = median_seconds(forward, device), median_seconds(backward, device)
        moved = [moves * x.nbytes / 1e9 for moves in _MOVES[name]]
        found[name] = {
            "forward": moved[0] / taken[0],
            "backward": moved[1] / taken[1],
            "forward_seconds": taken[0],
            "backward_seconds": taken[1],
        }
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = OneLineParser(prog="rates.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args(argv)
    choose_convolutions(torch.device(arguments.device))
    result: dict[str, Any] = {"kind": "rates", "machine": describe_machine(arguments.device), "layers": []}
    print("| layer | fprop, TFLOP/s | dgrad | wgrad | torch's sum, BN, ReLU: GB/s | backward | add_bn_act | backward |")
    print("|---|---|---|---|---|---|---|---|")
    for channels, size in _LAYERS[arguments.device]:
        layer = {"channels": channels, "size": size, "batch": _BATCH[arguments.device]}
        layer["tflops"] = convolution(channels, size, arguments.device)
        layer["gb_per_s"] = normalisation(channels, size, arguments.device)
        rates = [found[way] for found in layer["gb_per_s"].values() for way in ("forward", "backward")]
        numbers = [f"{value:.3g}" for value in (*layer["tflops"].values(), *rates)]
        print(f"| {channels}@{size} | {' | '.join(numbers)} |", flush=True)
        result["layers"].append(layer)
        if arguments.json:
            arguments.json.write_text(json_text(result, indent=1))


if __name__ == "__main__":
    main()

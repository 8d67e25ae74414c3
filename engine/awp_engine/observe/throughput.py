"""What a model costs, and what the machine could do: for the log and for the benchmarks."""

import resource
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from awp_kernels import use_backend


def forward_flops(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Floating-point operations of one image's forward pass; a multiplication and an addition count as two.

    Args:
        model: any classifier, on any device.
        image_shape: [C, H, W].
    """
    parameter = next(model.parameters())
    training = [module.training for module in model.modules()]
    try:
        # the counter does not know this package's own operations
        with torch.no_grad(), use_backend("reference"), FlopCounterMode(display=False) as counter:
            model.eval()(torch.zeros(1, *image_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        for module, mode in zip(model.modules(), training, strict=True):
            module.training = mode
    return counter.get_total_flops()


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product, the best of a few; takes about 0.2 s."""
    on_cpu = device.type == "cpu"
    size = 1024 if on_cpu else 8192
    a = torch.rand(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    best, began = 0.0, time.perf_counter()
    while time.perf_counter() - began < 0.2 or best == 0.0:
        if not on_cpu:
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        if not on_cpu:
            torch.accelerator.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the device's memory by tensors, or of the process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    # kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

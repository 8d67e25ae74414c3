"""A network and batches so small that steps in fp64 take milliseconds, and how often the host waits in one."""

import torch
from samples import images
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from awp_engine.distributed.batch import Batch


def small_model(classes: int = 4, seed: int = 0) -> nn.Sequential:
    """For images of 1 x 4 x 4, in train mode, whose running statistics have seen some."""
    torch.manual_seed(seed)
    # a bias before batch normalisation has a gradient of rounding errors, whose direction AWP would follow
    layers = nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, classes)
    model = nn.Sequential(*layers).double().train()
    model(images((16, 1, 4, 4), torch.float64, seed=50 + seed))
    return model


@torch.no_grad()
def sure_model(seed: int = 0) -> nn.Sequential:
    """The same, whose answers differ more."""
    model = small_model(seed=seed)
    model[-1].weight.mul_(3)
    return model


def small_batch(index: int, n: int = 7, classes: int = 4) -> Batch:
    y = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(index))
    return Batch(images((n, 1, 4, 4), torch.float64, seed=index), y, torch.arange(n) + 100 * index, n)


class HostReads(TorchDispatchMode):
    """Counts how often the host waits for a value."""

    reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))

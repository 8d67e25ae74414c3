"""AWP, SAM, ASAM or bounded AWP in a plain loop, with gradient accumulation and mixed precision.

    python examples/plain_loop.py --method sam

A step accumulates the ascent gradient over all micro-batches, moves the weights once, and accumulates the descent
gradient over the same micro-batches: the step of the whole batch, whatever fits into memory at a time.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from methods import METHODS, perturbation_of
from torch import Tensor, nn

from awp_kernels import AdversarialWeightPerturbation

MicroBatch = tuple[Tensor, Tensor]


def accumulate(
    model: nn.Module, batches: Sequence[MicroBatch], scaler: torch.amp.GradScaler, dtype: torch.dtype | None
) -> float:
    """Add up the gradient of the mean loss over all micro-batches; return that loss.

    Args:
        model: what is trained.
        batches: inputs [N, ...] and classes [N].
        scaler: keeps float16 gradients in range; disabled where there are none.
        dtype: of autocast; None: no autocast.
    """
    total = 0.0
    for x, y in batches:
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y) / len(batches)
        scaler.scale(loss).backward()
        total += loss.item()
    return total


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    perturbation: AdversarialWeightPerturbation,
    batches: Sequence[MicroBatch],
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype | None,
) -> float:
    """One update of the weights; returns the loss before it."""
    loss = accumulate(model, batches, scaler, dtype)  # ascent gradient, at w
    with perturbation.perturbed():  # to w + v; its direction ignores the loss scale
        accumulate(model, batches, scaler, dtype)  # descent gradient, at w + v
    scaler.step(optimizer)  # at w; skipped where a gradient overflowed
    scaler.update()
    optimizer.zero_grad()
    return loss


def train(method: str, steps: int = 20) -> tuple[nn.Module, list[float]]:
    """Fit random points; returns the model and the loss before every step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 5)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # float16 has tensor cores on every GPU and needs a scaler; bfloat16 has float32's range and needs none
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    perturbation = perturbation_of(method, model)
    x, y = torch.randn(64, 20, device=device), torch.randint(0, 5, (64,), device=device)
    batches = list(zip(x.chunk(4), y.chunk(4), strict=True))
    return model, [train_step(model, optimizer, perturbation, batches, scaler, dtype) for _ in range(steps)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="awp")
    _, losses = train(parser.parse_args().method)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

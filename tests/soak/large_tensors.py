"""Every operation on more than 2^31 elements, exactly: by hand, as it takes some 20 GB and minutes.

    python tests/soak/large_tensors.py [--device cuda] [--elements 2147483659] [operation ...]

The tensors hold one pattern over and over, whose results are known from a few elements: what is computed with 32-bit
indices is wrong in the part beyond 2^31. 16-bit storage where the operation takes it.
"""

import argparse
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from awp_kernels import (
    augment,
    perturb_,
    perturb_into_,
    pgd_init_,
    pgd_init_normal_,
    pgd_step_,
    pgd_step_normalize_,
    restore_,
    sgd_step_,
    total_norm,
)

ELEMENTS = 2**31 + 11
FP16 = torch.float16
PIECE = 2**28


def filled(count: int, value: float, last: float, device: str, dtype: torch.dtype = FP16) -> Tensor:
    """One value everywhere, and another in the last element."""
    tensor = torch.full((count,), value, dtype=dtype, device=device)
    tensor[-1] = last
    return tensor


def holds(tensor: Tensor, value: float, last: float) -> None:
    """Refuse anything but that."""
    flat = tensor.view(-1)
    for begin in range(0, len(flat) - 1, PIECE):
        piece = flat[begin : min(begin + PIECE, len(flat) - 1)]
        low, high = piece.min().item(), piece.max().item()
        if not low == high == torch.tensor(value, dtype=tensor.dtype).item():
            raise AssertionError(f"elements from {begin} on: expected {value}, got {low} to {high}")
    if flat[-1].item() != torch.tensor(last, dtype=tensor.dtype).item():
        raise AssertionError(f"last element: expected {last}, got {flat[-1].item()}")


def norm(count: int, device: str) -> None:
    found = total_norm([filled(count, 0.5, 64.0, device)]).item()
    expected = math.sqrt((count - 1) * 0.25 + 64.0**2)
    if not math.isclose(found, expected, rel_tol=1e-12):
        raise AssertionError(f"expected {expected}, got {found}")


def perturb(count: int, device: str) -> None:
    weights, grads = filled(count, 0.5, 64.0, device), filled(count, 0.25, -0.25, device)
    saved = torch.full_like(weights, math.nan)
    ratio = math.sqrt((count - 1) * 0.25 + 64.0**2) / math.sqrt(count * 0.0625)
    perturb_([weights], [grads], 0.5, saved=[saved])
    holds(weights, 0.5 + 0.5 * ratio * 0.25, 64.0 - 0.5 * ratio * 0.25)
    holds(saved, 0.5, 64.0)
    restore_([weights], [saved])
    holds(weights, 0.5, 64.0)


def perturb_into(count: int, device: str) -> None:
    weights = filled(count, 0.5, 64.0, device)
    out = torch.full_like(weights, math.nan)
    perturb_into_([out], [weights], [weights], 0.5)
    holds(out, 0.75, 96.0)


def step(count: int, device: str) -> None:
    weights = filled(count, 0.5, 64.0, device, torch.float32)
    grads = filled(count, 1.0, -1.0, device)
    out = torch.full_like(grads, math.nan)
    sgd_step_([weights], [grads], lr=0.25, out=[out])
    holds(weights, 0.25, 64.25)
    holds(out, 0.25, 64.25)


def start(count: int, device: str) -> None:
    x = torch.full((count // 2, 2), 0.5, dtype=FP16, device=device)
    ids = torch.zeros(len(x), dtype=torch.int64, device=device)
    for function, options in (
        (pgd_init_, {"epsilon": 0.25, "norm": "linf"}),
        (pgd_init_, {"epsilon": 0.25, "norm": "l2"}),
        (pgd_init_normal_, {"std": 0.125}),
    ):
        x_adv = torch.full_like(x, math.nan)
        function(x_adv, x, sample_ids=ids, seed=3, **options)
        few = torch.empty_like(x[:1])
        function(few, x[:1], sample_ids=ids[:1], seed=3, **options)
        for column in range(2):
            for begin in range(0, len(x), PIECE):
                if not (x_adv[begin : begin + PIECE, column] == few[0, column]).all():
                    raise AssertionError(f"samples from {begin} on differ from the first")


def attack(count: int, device: str) -> None:
    x, x_adv = (torch.full((3, count // 3), 0.5, dtype=FP16, device=device) for _ in range(2))
    grad = torch.ones_like(x)
    grad[-1, -1] = -1
    pgd_step_(x_adv, grad, x, step_size=0.125, epsilon=0.25, norm="linf")
    holds(x_adv, 0.625, 0.375)


def normalized(count: int, device: str) -> None:
    """Of many images, and with rows as long as they may be."""
    for shape, filled in (((count // 24, 1, 1, 3), 8), ((2, 3, 1, count // 24), 12)):
        x_adv, x = (torch.full(shape, 0.5, device=device) for _ in range(2))
        out = torch.full((shape[0], filled, *shape[2:]), math.nan, dtype=FP16, device=device)
        out = out.to(memory_format=torch.channels_last)
        grad = torch.ones_like(out)
        grad[-1, shape[1] - 1, -1, -1] = -1
        vectors = [torch.full((shape[1],), value, device=device) for value in (0.25, 0.5)]
        pgd_step_normalize_(x_adv, grad, x, out, *vectors, step_size=0.125, epsilon=0.25, norm="linf")
        last = x_adv[-1, -1, -1, -1].item(), out[-1, shape[1] - 1, -1, -1].item()
        x_adv[-1, -1, -1, -1], out[-1, shape[1] - 1, -1, -1] = 0.625, 0.75
        images, rest = out[:, : shape[1]], out[:, shape[1] :]
        if last != (0.375, 0.25) or (x_adv != 0.625).any() or (images != 0.75).any() or rest.any():
            raise AssertionError(f"images of {shape} in {filled} channels")


def gathered(count: int, device: str) -> None:
    """From far behind, and to there."""
    images = torch.zeros((count // 12 + 1, 3, 2, 2), dtype=torch.uint8, device=device)
    images[-1] = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    rows = torch.tensor([0, len(images) - 1], device=device)
    few = augment(images, sample_ids=rows, rows=rows, seed=3)
    if few[0].any() or not torch.equal((few[1] * 255).round().to(torch.uint8), images[-1]):
        raise AssertionError("the last image is not itself")
    many = augment(images, sample_ids=torch.zeros_like(images[:, 0, 0, 0], dtype=torch.int64), seed=3)
    if many[:-1].any() or not torch.equal(many[-1], few[1]):
        raise AssertionError("the last image is not itself among all")


LARGE: dict[str, Callable[[int, str], None]] = {
    "total_norm": norm,
    "perturb_, restore_": perturb,
    "perturb_into_": perturb_into,
    "sgd_step_": step,
    "pgd_init_": start,
    "pgd_step_": attack,
    "pgd_step_normalize_": normalized,
    "augment": gathered,
}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", help=f"some of: {'; '.join(LARGE)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    options = parser.parse_args()
    wrong = 0
    for name, check in LARGE.items():
        if options.operations and name not in options.operations:
            continue
        try:
            check(options.elements, options.device)
            print(f"{name}: exact", flush=True)
        except AssertionError as error:
            wrong += 1
            print(f"{name}: {error}", flush=True)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

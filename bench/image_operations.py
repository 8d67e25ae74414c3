"""The attack's operations on one batch of images, and what else can do the same."""

import functools
from collections.abc import Callable
from typing import Any

import alternatives
import torch
from workload import Workload

from awp_kernels import _backend, pgd_init_, pgd_step_, use_backend

BATCH = (128, 3, 32, 32)
ALTERNATIVES = {
    "pgd_init_ linf": ["plain"],
    "pgd_init_ l2": ["plain"],
    "pgd_step_ linf": ["plain", "inplace", "compile"],
    "pgd_step_ l2": ["plain", "inplace", "compile"],
}
_EPSILON = {"linf": 8 / 255, "l2": 128 / 255}
_STEP_SIZE = {"linf": 2 / 255, "l2": 15 / 255}


@torch.no_grad()
def image_workload(operation: str, device: str) -> Workload:
    """The workload of one operation on fp32 images."""
    name, norm = operation.split()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(BATCH, generator=generator).to(device)
    grad = torch.randn(BATCH, generator=generator).to(device)
    start, x_adv = torch.empty_like(x), torch.empty_like(x)
    noise: dict[str, Any] = {"epsilon": _EPSILON[norm], "norm": norm, "seed": 1}
    ids = torch.arange(BATCH[0], device=device)
    with use_backend("reference"):
        pgd_init_(start, x, sample_ids=ids, **noise)
    calls: dict[str, Callable[[], object]]

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
    plain, inplace = {
        "linf": (alternatives.step_linf, alternatives.step_linf_inplace),
        "l2": (alternatives.step_l2, alternatives.step_l2_renorm),
    }[norm]
    calls = dict.fromkeys(_backend.BACKENDS, functools.partial(pgd_step_, x_adv, grad, x, norm=norm, **step))
    calls["plain"] = functools.partial(plain, x_adv, grad, x, **step)
    calls["inplace"] = functools.partial(inplace, x_adv, grad, x, **step)
    calls["compile"] = functools.partial(torch.compile(plain, dynamic=False), x_adv, grad, x, **step)

    def reset() -> None:
        x_adv.copy_(start)

    return Workload(16 * x.numel(), reset, calls, lambda: float((x_adv.double() - exact).abs().max()), {"": 1e-6})

"""The optimizer's step and the norm of a gradient over all parameters of a list, and what else can do the same."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from awp_kernels import _backend, sgd_step_, total_norm
from bench.ops import alternatives
from bench.ops.weight_lists import TENSORS, require_memory, weights_of
from bench.ops.workload import Workload

LR, MOMENTUM, WEIGHT_DECAY, AVERAGE_WEIGHT = 0.1, 0.9, 5e-4, 0.005
ALTERNATIVES = {
    "sgd_step_": ["fused", "foreach", "loop", "fused_function", "apex", "apex_optimizer"],
    "sgd_step_ clipped": ["fused", "foreach", "loop"],
    "sgd_step_ average out": ["fused", "foreach", "loop"],
    "total_norm": ["foreach", "loop", "apex"],
}
# with everything that its checks and its alternatives need at once
_BYTES_AN_ELEMENT = 56

multi = alternatives.multi


class Parameters:
    """A list of parameters, their gradients, momentum and averages, and the result that all must reach."""

    @torch.no_grad()
    def __init__(self, inputs: str, device: str) -> None:
        module = weights_of(inputs, device)
        # optimizers step these, which share the memory of `weights`
        self.parameters = list(module.parameters())
        self.weights = [parameter.detach() for parameter in self.parameters]
        self.grads = [torch.randn_like(weight) * 1e-2 for weight in self.weights]
        self.buffers = [torch.randn_like(weight) * 1e-2 for weight in self.weights]
        self.averages = [weight + 1e-3 * torch.randn_like(weight) for weight in self.weights]
        self.half = [torch.empty_like(weight, dtype=torch.float16) for weight in self.weights]
        self.lists = (self.weights, self.grads, self.buffers, self.averages)
        self.originals = tuple([tensor.clone() for tensor in tensors] for tensors in self.lists)
        self.elements = sum(weight.numel() for weight in self.weights)
        self.grad_norm = float(torch.stack([grad.double().norm() for grad in self.grads]).norm())
        self.max_norm = self.grad_norm / 2
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        self.apex, self.missing = alternatives.apex(device)
        if self.apex is None:
            self.missing["apex_optimizer"] = self.missing["apex"]

    def reset(self) -> None:
        """Everything as it was, NaN in what is written."""
        for tensors, originals in zip(self.lists, self.originals, strict=True):
            multi._foreach_copy_(tensors, originals)
        for tensor in self.half:
            tensor.fill_(torch.nan)

    @torch.no_grad()
    def wrong(self, *, clipped: bool = False, averaged: bool = False) -> float:
        """The largest error of what a step writes, relative to the length by which the step moves it."""
        weights, grads, buffers, averages = self.originals
        factor = min(1.0, self.max_norm / (self.grad_norm + 1e-6)) if clipped else 1.0
        squares: dict[str, tuple[float, float]] = {}

        def add(name: str, found: Tensor, exact: Tensor, before: Tensor) -> None:
            error, length = squares.get(name, (0.0, 0.0))
            squares[name] = (
                error + float(((found.double() - exact) ** 2).sum()),
                length + float(((exact - before.double()) ** 2).sum()),
            )

        # tensor by tensor: fp64 copies of all would not fit
        for index, weight in enumerate(weights):
            direction = factor * grads[index].double() + WEIGHT_DECAY * weight.double()
            buffer = MOMENTUM * buffers[index].double() + direction
            exact = weight.double() - LR * buffer
            add("weights", self.weights[index], exact, weight)
            add("buffers", self.buffers[index], buffer, buffers[index])
            if averaged:
                average = averages[index].double()
                add("averages", self.averages[index], average + AVERAGE_WEIGHT * (exact - average), averages[index])
                # of a number that rounds the other way, fp16 is off by more than its step is long
                add("out", self.half[index], exact.half().double(), torch.zeros_like(weight))
        ratios = [error / length for error, length in squares.values()]
        # max() would drop a NaN
        return float(torch.tensor(ratios).sqrt().amax())

    def optimizer(self, **kind: bool) -> torch.optim.SGD:
        """Torch's SGD over the parameters, with their momentum in place."""
        optimizer = torch.optim.SGD(self.parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **kind)
        self.give_momentum(optimizer)
        return optimizer

    def give_momentum(self, optimizer: torch.optim.Optimizer) -> None:
        """As if some steps had been taken."""
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            optimizer.state[parameter]["momentum_buffer"] = buffer

    def optimizers(self) -> dict[str, torch.optim.SGD]:
        """Torch's three implementations."""
        return {
            "fused": self.optimizer(fused=True),
            "foreach": self.optimizer(foreach=True),
            "loop": self.optimizer(foreach=False, fused=False),
        }


Calls = dict[str, Callable[[], object]]


def _own(t: Parameters, **more: Any) -> Callable[[], object]:
    return functools.partial(
        sgd_step_, t.weights, t.grads, t.buffers, lr=LR, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM, **more
    )


def sgd_workload(t: Parameters) -> Workload:
    """`sgd_step_`: reads w, g and m, writes w and m."""
    calls: Calls = {name: optimizer.step for name, optimizer in t.optimizers().items()}
    calls["fused_function"] = functools.partial(
        multi._fused_sgd_,
        t.weights,
        t.grads,
        t.buffers,
        weight_decay=WEIGHT_DECAY,
        momentum=MOMENTUM,
        lr=LR,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
    calls |= dict.fromkeys(_backend.BACKENDS, _own(t))
    if t.apex is not None:
        calls["apex"] = functools.partial(
            t.apex.sgd, t.weights, t.grads, t.buffers, LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        optimizer = t.apex.optimizer(t.parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        t.give_momentum(optimizer)
        calls["apex_optimizer"] = optimizer.step
    return Workload(20 * t.elements, t.reset, calls, t.wrong, {"": 1e-4}, t.missing)


def clipped_workload(t: Parameters) -> Workload:
    """Clip to a norm and step: reads g once for its norm, and all that the step does."""

    def clipped(optimizer: torch.optim.SGD) -> None:
        nn.utils.clip_grad_norm_(t.parameters, t.max_norm)
        optimizer.step()

    calls: Calls = {name: functools.partial(clipped, optimizer) for name, optimizer in t.optimizers().items()}
    calls |= dict.fromkeys(_backend.BACKENDS, lambda: _own(t, grad_norm=total_norm(t.grads), max_norm=t.max_norm)())
    return Workload(24 * t.elements, t.reset, calls, lambda: t.wrong(clipped=True), {"": 1e-4}, t.missing)


def averaged_workload(t: Parameters) -> Workload:
    """Step, move an average of the weights, and write them in fp16: reads w, g, m, a, writes w, m, a and the copy."""

    def averaged(optimizer: torch.optim.SGD) -> None:
        optimizer.step()
        multi._foreach_lerp_(t.averages, t.weights, AVERAGE_WEIGHT)
        multi._foreach_copy_(t.half, t.weights)

    calls: Calls = {name: functools.partial(averaged, optimizer) for name, optimizer in t.optimizers().items()}
    own = _own(t, averages=t.averages, average_weight=AVERAGE_WEIGHT, out=t.half)
    calls |= dict.fromkeys(_backend.BACKENDS, own)
    # an fp32 rounding of an average that moves by a two-hundredth of its distance
    tolerance = {"": 1e-2}
    return Workload(30 * t.elements, t.reset, calls, lambda: t.wrong(averaged=True), tolerance, t.missing)


def norm_workload(t: Parameters) -> Workload:
    """`total_norm`: reads g."""
    result: list[Tensor] = []

    def keeping(call: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: result.__setitem__(slice(None), [call()])

    calls: Calls = {
        "foreach": keeping(lambda: nn.utils.get_total_norm(t.grads, foreach=True)),
        "loop": keeping(lambda: nn.utils.get_total_norm(t.grads, foreach=False)),
    }
    calls |= dict.fromkeys(_backend.BACKENDS, keeping(lambda: total_norm(t.grads)))
    if t.apex is not None:
        calls["apex"] = keeping(functools.partial(t.apex.norm, t.grads))

    def wrong() -> float:
        return abs(float(result[0]) / t.grad_norm - 1)

    # sums in fp32, in whatever order
    return Workload(4 * t.elements, result.clear, calls, wrong, {"": 1e-4}, t.missing)


_MAKERS = {
    "sgd_step_": sgd_workload,
    "sgd_step_ clipped": clipped_workload,
    "sgd_step_ average out": averaged_workload,
    "total_norm": norm_workload,
}


def update_workload(operation: str, inputs: str, device: str) -> Workload:
    """The workload of one operation over all parameters of a model, or a synthetic list.

    Raises:
        TooLargeError: the list does not fit in memory.
    """
    require_memory(inputs, device, _BYTES_AN_ELEMENT)
    return _MAKERS[operation](TENSORS.get(Parameters, inputs, device))

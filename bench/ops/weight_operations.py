"""The multi-tensor operations over the tensors that AWP moves in a real model, and what else can do the same."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from awp_kernels import _backend, perturb_, perturb_into_, restore_, use_backend
from awp_kernels.awp import is_perturbed
from bench.ops import alternatives
from bench.ops.weight_lists import TENSORS, require_memory, weights_of
from bench.ops.workload import Workload, distance
from bench.step.arms.public import ProxyPerturbation

GAMMA, EPS = 0.01, 1e-20
ALTERNATIVES = {
    "perturb_": ["foreach", "foreach_sync", "loop", "loop_alpha", "public", "apex", "compile"],
    "perturb_ saved": ["foreach", "foreach_sync", "loop", "loop_alpha", "public", "apex"],
    "perturb_into_": ["foreach", "foreach_sync", "loop", "loop_alpha"],
    "perturb_into_ norms": ["foreach", "foreach_sync", "loop", "loop_alpha"],
    "restore_": ["foreach", "loop", "public", "apex"],
}
# relative to the perturbation; the public way's direction is a difference of rounded weights
_ROUNDED = {"": 1e-4, "public": 3e-2}
# with everything that its checks and its alternatives need at once
_BYTES_AN_ELEMENT = 56
_MOVES = ("foreach", "foreach_sync", "loop", "loop_alpha")

Move = Callable[[list[Tensor], list[Tensor], float, float], None]
Calls = dict[str, Callable[[], object]]


class Tensors:
    """The weights that AWP moves, their gradients, and the result that all implementations must reach."""

    @torch.no_grad()
    def __init__(self, inputs: str, device: str) -> None:
        model = weights_of(inputs, device)
        all_grads = {name: torch.randn_like(p) * 1e-2 for name, p in model.named_parameters()}
        chosen = {name: p.detach() for name, p in model.named_parameters() if is_perturbed(name, p)}
        self.weights, self.grads = list(chosen.values()), [all_grads[name] for name in chosen]
        self.original = [weight.clone() for weight in self.weights]
        self.saved = [torch.empty_like(weight) for weight in self.weights]
        self.half = [torch.empty_like(weight, dtype=torch.float16) for weight in self.weights]
        self.elements = sum(weight.numel() for weight in self.weights)
        self.norms = torch.stack([weight.double().norm() for weight in self.weights])
        # the definition, tensor by tensor: a list's fp64 gradients would not fit
        self.exact = [weight.double() for weight in self.weights]
        with use_backend("reference"):
            for exact, grad in zip(self.exact, self.grads, strict=True):
                perturb_([exact], [grad.double()], GAMMA, eps=EPS)
        self.moved = [value.float() for value in self.exact]
        self.length = distance(self.original, self.exact)
        proxy = copy.deepcopy(model)
        # as ascent has them: the proxy descends
        for name, parameter in proxy.named_parameters():
            parameter.grad = all_grads[name].neg()
        self.public = ProxyPerturbation(model, proxy)
        self.apex, self.missing = alternatives.apex(device)
        self.moves: dict[str, Move] = {name: getattr(alternatives, name) for name in _MOVES}
        if self.apex is not None:
            self.moves["apex"] = self.apex.perturb

    def reset(self) -> None:
        """Weights as they were, NaN in what is written."""
        alternatives.multi._foreach_copy_(self.weights, self.original)
        for tensor in (*self.saved, *self.half):
            tensor.fill_(torch.nan)

    def error(self, results: list[Tensor]) -> float:
        """Relative to the length of the perturbation."""
        return distance(results, self.exact) / self.length


def perturb_workload(t: Tensors) -> Workload:
    """`perturb_`: reads w and g, writes w."""
    calls: Calls = {name: functools.partial(move, t.weights, t.grads, GAMMA, EPS) for name, move in t.moves.items()}
    calls |= dict.fromkeys(_backend.BACKENDS, functools.partial(perturb_, t.weights, t.grads, GAMMA, eps=EPS))
    calls["public"] = functools.partial(t.public.perturb, GAMMA, EPS)
    compiled = torch.compile(alternatives.foreach, dynamic=False)
    calls["compile"] = functools.partial(compiled, t.weights, t.grads, GAMMA, EPS)
    return Workload(12 * t.elements, t.reset, calls, lambda: t.error(t.weights), _ROUNDED, t.missing)


def perturb_saved_workload(t: Tensors) -> Workload:
    """`perturb_` with `saved`: reads w and g, writes w and the copy."""

    def saving(name: str) -> None:
        if name.startswith("loop"):
            for kept, weight in zip(t.saved, t.weights, strict=True):
                kept.copy_(weight)
        elif name == "apex" and t.apex is not None:
            t.apex.copy(t.saved, t.weights)
        else:
            alternatives.multi._foreach_copy_(t.saved, t.weights)
        t.moves[name](t.weights, t.grads, GAMMA, EPS)

    def wrong() -> float:
        # the public way saves nothing: it keeps differences, and subtracts them
        kept = t.original if t.public.differences else t.saved
        return t.error(t.weights) if all(map(torch.equal, kept, t.original)) else torch.inf

    def reset() -> None:
        t.reset()
        t.public.differences.clear()

    calls: Calls = {name: functools.partial(saving, name) for name in t.moves}
    own = functools.partial(perturb_, t.weights, t.grads, GAMMA, saved=t.saved, eps=EPS)
    calls |= dict.fromkeys(_backend.BACKENDS, own)
    calls["public"] = functools.partial(t.public.perturb, GAMMA, EPS)
    return Workload(16 * t.elements, reset, calls, wrong, _ROUNDED, t.missing)


def perturb_into_workload(t: Tensors, *, with_norms: bool = False) -> Workload:
    """`perturb_into_` from fp32 to fp16, as a working copy beside a master: reads w and g, writes half as wide.

    With `with_norms` the weights' norms are at hand, as the optimizer's step leaves them.
    """

    def scales() -> Tensor:
        if not with_norms:
            return alternatives.device_scales(t.weights, t.grads, GAMMA, EPS)
        return GAMMA * t.norms.float() / (torch.stack(alternatives.multi._foreach_norm(t.grads)) + EPS)

    def by_lists(name: str) -> None:
        found = scales()
        moved = alternatives.multi._foreach_mul(
            t.grads, found.tolist() if name == "foreach_sync" else list(found.unbind())
        )
        alternatives.multi._foreach_add_(moved, t.weights)
        alternatives.multi._foreach_copy_(t.half, moved)

    def by_tensor(name: str) -> None:
        for index, (target, weight, grad) in enumerate(zip(t.half, t.weights, t.grads, strict=True)):
            scale = GAMMA * (t.norms[index].float() if with_norms else weight.norm()) / (grad.norm() + EPS)
            target.copy_(weight.add(grad, alpha=scale.item()) if name == "loop_alpha" else weight + scale * grad)

    def wrong() -> float:
        # tensor by tensor, as the fp64 numbers of a long list are many
        pairs = zip(t.half, t.exact, strict=True)
        return float(torch.tensor([distance([half], [exact.half()]) for half, exact in pairs]).norm()) / t.length

    calls: Calls = {n: functools.partial(by_tensor if n.startswith("loop") else by_lists, n) for n in _MOVES}
    given = {"weight_norms": t.norms} if with_norms else {}
    own = functools.partial(perturb_into_, t.half, t.weights, t.grads, GAMMA, eps=EPS, **given)
    calls |= dict.fromkeys(_backend.BACKENDS, own)
    # one fp16 number in some thousands rounds the other way
    return Workload(10 * t.elements, t.reset, calls, wrong, {"": 1e-2})


def restore_workload(t: Tensors) -> Workload:
    """`restore_`: reads the copy, writes w; exact but for the public way, which subtracts."""

    def reset() -> None:
        alternatives.multi._foreach_copy_(t.weights, t.moved)

    def by_tensor() -> None:
        for weight, kept in zip(t.weights, t.saved, strict=True):
            weight.copy_(kept)

    t.reset()
    t.public.perturb(GAMMA, EPS)
    alternatives.multi._foreach_copy_(t.saved, t.original)
    calls: Calls = dict.fromkeys(_backend.BACKENDS, functools.partial(restore_, t.weights, t.saved))
    calls |= {
        "foreach": lambda: alternatives.multi._foreach_copy_(t.weights, t.saved),
        "loop": by_tensor,
        "public": lambda: t.public.add(-GAMMA),
    }
    if t.apex is not None:
        calls["apex"] = functools.partial(t.apex.copy, t.weights, t.saved)
    tolerance = {"": 0.0, "public": 3e-2}
    return Workload(
        8 * t.elements, reset, calls, lambda: distance(t.weights, t.original) / t.length, tolerance, t.missing
    )


_MAKERS: dict[str, Callable[[Tensors], Workload]] = {
    "perturb_": perturb_workload,
    "perturb_ saved": perturb_saved_workload,
    "perturb_into_": perturb_into_workload,
    "perturb_into_ norms": functools.partial(perturb_into_workload, with_norms=True),
    "restore_": restore_workload,
}


@torch.no_grad()
def weight_workload(operation: str, inputs: str, device: str) -> Workload:
    """The workload of one operation over a model's tensors, or a synthetic list.

    Raises:
        TooLargeError: the list does not fit in memory.
    """
    require_memory(inputs, device, _BYTES_AN_ELEMENT)
    return _MAKERS[operation](TENSORS.get(Tensors, inputs, device))

"""The multi-tensor operations over the tensors that AWP moves in a real model, and what else can do the same."""

import copy
import functools
from collections.abc import Callable
from importlib.util import find_spec

import alternatives
import torch
from torch import Tensor
from workload import Workload, distance

from awp_engine.models import build_model
from awp_kernels import _backend, perturb_, perturb_into_, restore_, use_backend
from awp_kernels.awp import is_perturbed

GAMMA, EPS = 0.01, 1e-20
ALTERNATIVES = {
    "perturb_": ["foreach", "foreach_sync", "loop", "loop_alpha", "public", "apex", "compile"],
    "perturb_ saved": ["foreach", "foreach_sync", "loop", "loop_alpha", "public", "apex"],
    "perturb_into_": ["foreach", "foreach_sync", "loop", "loop_alpha"],
    "restore_": ["foreach", "loop", "public", "apex"],
}
# relative to the perturbation; the public way's direction is a difference of rounded weights
_ROUNDED = {"": 1e-4, "public": 3e-2}
_MOVES = ("foreach", "foreach_sync", "loop", "loop_alpha")

Move = Callable[[list[Tensor], list[Tensor], float, float], None]
Calls = dict[str, Callable[[], object]]


class Tensors:
    """A model's tensors, their gradients, and the result that all implementations must reach."""

    @torch.no_grad()
    def __init__(self, model_name: str, device: str) -> None:
        torch.manual_seed(0)
        model = build_model(model_name, 10, (0.5,) * 3, (0.25,) * 3).to(device)
        all_grads = {name: torch.randn_like(p) * 1e-2 for name, p in model.named_parameters()}
        chosen = {name: p.detach() for name, p in model.named_parameters() if is_perturbed(name, p)}
        self.weights, self.grads = list(chosen.values()), [all_grads[name] for name in chosen]
        self.original = [weight.clone() for weight in self.weights]
        self.saved = [torch.empty_like(weight) for weight in self.weights]
        self.half = [torch.empty_like(weight, dtype=torch.float16) for weight in self.weights]
        self.elements = sum(weight.numel() for weight in self.weights)
        self.exact = [weight.double() for weight in self.weights]
        with use_backend("reference"):
            perturb_(self.exact, [grad.double() for grad in self.grads], GAMMA, eps=EPS)
        self.moved = [value.float() for value in self.exact]
        self.length = distance(self.original, self.exact)
        self.public = alternatives.PublicWay(model, copy.deepcopy(model), all_grads)
        self.apex, self.missing = self._apex(device)
        self.moves: dict[str, Move] = {name: getattr(alternatives, name) for name in _MOVES}
        if self.apex is not None:
            self.moves["apex"] = self.apex.perturb

    @staticmethod
    def _apex(device: str) -> tuple[alternatives.Apex | None, dict[str, str]]:
        if device != "cuda":
            return None, {"apex": "apex serves CUDA tensors"}
        if find_spec("amp_C") is None:
            return None, {"apex": "amp_C (NVIDIA apex) is not installed"}
        return alternatives.Apex(torch.device(device)), {}

    def reset(self) -> None:
        """Weights as they were, NaN in what is written."""
        alternatives.multi._foreach_copy_(self.weights, self.original)
        for tensor in (*self.saved, *self.half):
            tensor.fill_(torch.nan)

    def error(self, results: list[Tensor]) -> float:
        """Relative to the length of the perturbation."""
        return distance(results, self.exact) / self.length


@functools.lru_cache(maxsize=1)
def tensors(model_name: str, device: str) -> Tensors:
    """Built once a model: the benchmarks of one model follow each other."""
    return Tensors(model_name, device)


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


def perturb_into_workload(t: Tensors) -> Workload:
    """`perturb_into_` from fp32 to fp16, as a working copy beside a master: reads w and g, writes half as wide."""

    def by_lists(name: str) -> None:
        scales = alternatives.device_scales(t.weights, t.grads, GAMMA, EPS)
        moved = alternatives.multi._foreach_mul(
            t.grads, scales.tolist() if name == "foreach_sync" else list(scales.unbind())
        )
        alternatives.multi._foreach_add_(moved, t.weights)
        alternatives.multi._foreach_copy_(t.half, moved)

    def by_tensor(name: str) -> None:
        for target, weight, grad in zip(t.half, t.weights, t.grads, strict=True):
            scale = GAMMA * weight.norm() / (grad.norm() + EPS)
            target.copy_(weight.add(grad, alpha=scale.item()) if name == "loop_alpha" else weight + scale * grad)

    rounded = [value.half() for value in t.exact]
    calls: Calls = {n: functools.partial(by_tensor if n.startswith("loop") else by_lists, n) for n in _MOVES}
    own = functools.partial(perturb_into_, t.half, t.weights, t.grads, GAMMA, eps=EPS)
    calls |= dict.fromkeys(_backend.BACKENDS, own)
    # one fp16 number in some thousands rounds the other way
    return Workload(10 * t.elements, t.reset, calls, lambda: distance(t.half, rounded) / t.length, {"": 1e-2})


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


_MAKERS = {
    "perturb_": perturb_workload,
    "perturb_ saved": perturb_saved_workload,
    "perturb_into_": perturb_into_workload,
    "restore_": restore_workload,
}


@functools.lru_cache(maxsize=1)
@torch.no_grad()
def weight_workload(operation: str, model_name: str, device: str) -> Workload:
    """The workload of one operation over one model's tensors."""
    return _MAKERS[operation](tensors(model_name, device))

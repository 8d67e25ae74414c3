"""Parts of a model that hide its gradient, and the same model with a backward pass that looks through them (BPDA).

Source: Athalye, Carlini, Wagner: Obfuscated Gradients Give a False Sense of Security, ICML 2018.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from awp_engine.attack import summed_margin

# operations whose result is constant almost everywhere
_STEPS = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "heaviside", "argmax", "argmin"}
_STEPS |= {"bucketize", "searchsorted", "quantize_per_tensor"}
# those with a result like their input, where the identity can stand for the derivative
_IDENTITY = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "detach"}
_GET_DATA = torch.Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]
# of the gradients that reach a module's output, how many end there
_DEAD = 0.95


class _Identity(torch.autograd.Function):
    """The value of the second argument, with the derivative of the first."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def _identity(source: Tensor, value: Tensor) -> Tensor:
    found: Any = _Identity.apply(source, value)
    return found


class _LookThrough(TorchFunctionMode):
    """Has rounding, signs, comparisons, casts to integers, `detach` and `no_grad` pass gradients as the identity would.

    Values stay what they are, to the bit.

    Attributes:
        used: what was looked through.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()
        # what became integers or booleans, and from which images or features
        self._sources = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = "data" if func == _GET_DATA else getattr(func, "__name__", "")
        if name in ("_set_grad_enabled", "set_grad_enabled"):
            self.used.add("no_grad")
            return None
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None:
            return func(*args, **kwargs)
        if name in ("numpy", "__array__", "tolist", "item"):
            return func(first.detach(), *args[1:], **kwargs)
        if name.endswith("_") and name[:-1] in _IDENTITY and first.requires_grad:
            before = first.clone()
            func(*args, **kwargs)
            self.used.add(name[:-1])
            return first.add_(_identity(before, torch.zeros_like(before)))
        result = func(*args, **kwargs)
        return self._linked(name, first, args, result) if isinstance(result, Tensor) else result

    def _linked(self, name: str, first: Tensor, args: Sequence[Any], result: Tensor) -> Tensor:
        """The result, through which gradients find back to what it was made of."""
        if not torch.is_grad_enabled():
            return result
        like = result.shape == first.shape
        if (name in _IDENTITY or name == "data") and first.requires_grad and like and result.is_floating_point():
            self.used.add("detach" if name == "data" else name)
            return _identity(first, result)
        known = [self._sources[a] for a in args if isinstance(a, Tensor) and a in self._sources]
        source = next((s for s in known if s.shape == result.shape), None)
        if not result.is_floating_point():
            if source is None and like and first.is_floating_point() and first.requires_grad:
                source = first
            if source is not None:
                self._sources[result] = source
        elif source is not None and not result.requires_grad:
            self.used.add("a cast or comparison")
            return _identity(source, result)
        return result


class _Names(TorchDispatchMode):
    """Notes operations that have no useful derivative, and in which module they run."""

    def __init__(self, place: list[str]) -> None:
        super().__init__()
        self.found: dict[str, None] = {}
        self._place = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name == "_to_copy" and args[0].is_floating_point() and not result.is_floating_point():
            name = f"cast to {str(result.dtype).removeprefix('torch.')}"
        elif name.rstrip("_") not in _STEPS:
            return result
        where = self._place[-1] if self._place else ""
        self.found[f"{name.rstrip('_')} in {where}" if where else name.rstrip("_")] = None
        return result


@contextlib.contextmanager
def _hooks(model: nn.Module, before: Callable[..., Any] | None, after: Callable[..., Any]) -> Iterator[None]:
    """Calls with (name, module, inputs[, output]) around every module but the model itself."""
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if not name or isinstance(module, torch.jit.ScriptModule):
                continue
            if before is not None:

                def pre(module: nn.Module, inputs: Any, name: str = name) -> Any:
                    return before(name, module, inputs)

                stack.callback(module.register_forward_pre_hook(pre).remove)

            def post(module: nn.Module, inputs: Any, output: Any, name: str = name) -> Any:
                return after(name, module, inputs, output)

            stack.callback(module.register_forward_hook(post, always_call=before is not None).remove)
        yield


def step_operations(model: nn.Module, x: Tensor) -> list[str]:
    """Operations of a pass forward that are constant almost everywhere, such as "round in 0", in order."""
    place: list[str] = []

    def enter(name: str, module: nn.Module, inputs: Any) -> None:
        place.append(name)

    def leave(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        place.pop()

    names = _Names(place)
    with _hooks(model, enter, leave), torch.no_grad(), names:
        model(x)
    return list(names.found)


def _alike(inputs: Any, output: Any) -> Tensor | None:
    """The input of a module that gives something of the same shape, and could be the identity."""
    given = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
    fits = given is not None and isinstance(output, Tensor) and given.shape == output.shape
    return given if fits and given is not None and given.is_floating_point() and output.is_floating_point() else None


def dead_modules(model: nn.Module, x: Tensor, y: Tensor) -> list[str]:
    """Modules with an output like their input, at which gradients arrive and end; the innermost ones."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    dead: list[str] = []

    def isolate(name: str, module: nn.Module, inputs: Any) -> Any:
        first = inputs[0] if inputs else None
        if isinstance(first, Tensor) and first.is_floating_point() and first.requires_grad:
            # a tensor of its own, so that the gradient is of this use alone
            return (first.view_as(first), *inputs[1:])
        return None

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        given = _alike(inputs, output)
        if given is None or not given.requires_grad:
            return None
        if not output.requires_grad:
            dead.append(name)
            # so that what follows still has a gradient
            return output.detach().requires_grad_()
        pairs[name] = given, output
        return None

    with torch.enable_grad(), _hooks(model, isolate, keep):
        logits = model(x.clone().requires_grad_())
    if not logits.requires_grad:
        return dead
    tensors = [tensor for pair in pairs.values() for tensor in pair]
    gradients = torch.autograd.grad(summed_margin(logits, y), tensors, allow_unused=True) if tensors else ()
    for name, of_input, of_output in zip(pairs, gradients[::2], gradients[1::2], strict=True):
        arrived = None if of_output is None else of_output != 0
        if arrived is None or not bool(arrived.any()):
            continue
        ended = arrived if of_input is None else arrived & (of_input == 0)
        if float(ended.sum() / arrived.sum()) > _DEAD:
            dead.append(name)
    return [name for name in dead if not any(other.startswith(f"{name}.") for other in dead)]


@dataclass(frozen=True)
class Findings:
    """What hides gradients.

    Attributes:
        operations: those that are constant almost everywhere, with the module they run in.
        used: kinds of operation that the surrogate looks through.
        modules: those that it takes for the identity, as gradients end there.
    """

    operations: tuple[str, ...]
    used: tuple[str, ...]
    modules: tuple[str, ...]


class Surrogate(nn.Module):
    """A model with the same answers, whose gradient is that of the identity wherever something hides it.

    Attributes:
        modules_through: names of the modules that are taken for the identity.
        used: kinds of operation that were looked through so far.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.modules_through: list[str] = []
        self.used: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        """Logits, as the model gives them."""
        through = _LookThrough()

        def identity(name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
            given = _alike(inputs, output)
            if name in self.modules_through and given is not None and given.requires_grad:
                return _identity(given, output)
            return None

        hooks = _hooks(self.model, None, identity) if self.modules_through else contextlib.nullcontext()
        with hooks, through:
            logits = self.model(x)
        self.used |= through.used
        return logits


def surrogate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Surrogate, Findings]:
    """A surrogate, and what it looks through on these images [N, C, H, W]; nothing on a model that hides nothing."""
    found = Surrogate(model)
    operations = step_operations(model, x)
    with torch.enable_grad():
        found(x.clone().requires_grad_())
    # with the operations looked through, what is left are functions with a backward pass of their own
    found.modules_through = dead_modules(found, x, y)
    # the surrogate's own name for its model
    found.modules_through = [name.removeprefix("model.") for name in found.modules_through if name != "model"]
    return found, Findings(tuple(operations), tuple(sorted(found.used)), tuple(found.modules_through))

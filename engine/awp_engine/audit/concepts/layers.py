"""The layers of any network, and a network cut at one of them: what is below runs once, what is above many times."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine.config.schema import did_you_mean
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.files.text import first_line

# of logits, as a part of the largest: by how much those of several copies of an image may differ from those of one
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3}
_OTHER_ROUNDING = 5e-2


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A module of a network, as one image runs through it.

    Attributes:
        name: as `named_modules` has it.
        kind: its class.
        shape: of its output, without the images' dimension; None where that is no single tensor with a row an image.
        calls: times that it is called.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    calls: int

    @property
    def problem(self) -> str:
        """Why it cannot be audited, or empty."""
        if self.calls != 1:
            return "is never called" if self.calls == 0 else f"is called {self.calls} times for an image"
        return "gives no single tensor of features" if self.shape is None else ""


@torch.no_grad()
def list_layers(model: nn.Module, image: Tensor) -> list[Layer]:
    """All modules below the model, in the order in which they first end; those that are not called come last.

    Args:
        model: in eval mode.
        image: [1, C, H, W].
    """
    calls: dict[str, list[tuple[int, ...] | None]] = {}
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if name:
                hooks.enter_context(
                    _hook(module, lambda _, out, name=name: calls.setdefault(name, []).append(_shape(out)))
                )
        model(image)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if name}
    calls |= {name: [] for name in kinds if name not in calls}
    return [
        Layer(name=name, kind=kinds[name], shape=shapes[0] if shapes else None, calls=len(shapes))
        for name, shapes in calls.items()
    ]


def require_layer(layers: list[Layer], name: str) -> Layer:
    """The layer of that name.

    Raises:
        EvaluationError: there is none, or it cannot be audited.
    """
    # a module of others stands inside of one that normalises; its own names are known to whoever made it
    found = next((layer for end in (f"network.{name}", name) for layer in layers if layer.name == end), None)
    if found is None:
        names = [layer.name for layer in layers if not layer.problem]
        hint = did_you_mean(name, names, "--list-layers prints the layers")
        raise EvaluationError(f"--layers: the model has no layer {name[:80]!r}; {hint}")
    if found.problem:
        raise EvaluationError(
            f"--layers: {found.name} {found.problem}; take another layer, as --list-layers prints them"
        )
    return found


@contextlib.contextmanager
def _hook(module: nn.Module, hook: Callable[[nn.Module, Any], Any]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda module, _, output: hook(module, output))
    try:
        yield
    finally:
        handle.remove()


def _shape(output: Any) -> tuple[int, ...] | None:
    whole = isinstance(output, Tensor) and output.dim() > 1 and output.shape[0] == 1 and output.is_floating_point()
    return tuple(output.shape[1:]) if whole else None


@dataclass(frozen=True, kw_only=True)
class Below:
    """One image's way up to the layer.

    Attributes:
        image: [1, C, H, W].
        activation: the layer's output, [1, ...].
        parts: modules that ended before the layer's output was there, in order, and their outputs, [1, ...] or several
            of such in a tuple.
    """

    image: Tensor
    activation: Tensor
    parts: tuple[tuple[nn.Module, Any], ...]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        tensors = [self.image, self.activation]
        for _, output in self.parts:
            tensors += output if isinstance(output, tuple) else [output]
        return sum(tensor.nbytes for tensor in tensors)


class Cut:
    """A network cut at a layer. It is changed while `above` runs, and as before after that, whatever ends it.

    `below` runs the network once, and keeps the outputs of the outermost modules that end before the layer does.
    `above` runs it again on copies of the image, where those modules, and the layer, give what they are told; so what
    bypasses the layer, such as a shortcut, is there too, whatever the code of the network is.

    Args:
        model: in eval mode; its logits for an image depend on that image alone.
        name: of the layer.
        image: [1, C, H, W], to try it with.

    Raises:
        EvaluationError: no such layer, or the network cannot be cut there.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, name: str, image: Tensor) -> None:
        self.layer = require_layer(list_layers(model, image), name)
        self._model, self._module = model, model.get_submodule(name)
        inside = set(self._module.modules())
        around = {model, *(model.get_submodule(name[:end]) for end, sign in enumerate(name) if sign == ".")}
        self._others = [module for module in model.modules() if module not in inside | around]
        # what writes in place must not write into what is kept
        self._copies = False
        reason = self._try(image)
        if reason:
            self._copies = True
            reason = self._try(image)
        if reason:
            raise EvaluationError(
                f"--layers: the network cannot be run from {name} on with several copies of an image ({reason}); take "
                "another layer"
            )

    def _try(self, image: Tensor) -> str:
        """What is wrong with several copies of an image as it is, or empty."""
        below, expected = self.below(image), self._model(image)
        try:
            found = self.above(below, below.activation.expand(3, *below.activation.shape[1:]).contiguous())
        except RuntimeError as error:
            return first_line(error)
        bound = _ROUNDING.get(expected.dtype, _OTHER_ROUNDING) * float(expected.abs().max())
        same = len(found) == 3 and bool(((found - expected).abs() <= bound).all())
        return "" if same else "its answers are others then"

    @torch.no_grad()
    def activations(self, images: Tensor) -> Tensor:
        """The layer's output for images [N, C, H, W], flattened: [N, features]."""
        found: list[Tensor] = []
        with _hook(self._module, lambda _, out: found.append(out.flatten(1).clone())):
            self._model(images)
        if found[0].shape[0] != len(images):
            raise EvaluationError(f"--layers: {self.layer.name} does not give a row for each image; take another layer")
        return found[0]

    @torch.no_grad()
    def below(self, image: Tensor) -> Below:
        """What one image [1, C, H, W] is up to the layer."""
        parts: list[tuple[nn.Module, Any]] = []
        starts: list[int] = []
        reached: list[Tensor] = []

        def start(*_: Any) -> None:
            starts.append(len(parts))

        def end(module: nn.Module, output: Any) -> None:
            first = starts.pop()
            several = type(output) is tuple
            if not reached and all(_shape(part) is not None for part in (output if several else [output])):
                # what it is made of is not asked for again
                del parts[first:]
                parts.append((module, tuple(part.clone() for part in output) if several else output.clone()))

        with contextlib.ExitStack() as hooks:
            for module in self._others:
                hooks.callback(module.register_forward_pre_hook(start).remove)
                hooks.enter_context(_hook(module, end))
            hooks.enter_context(_hook(self._module, lambda _, out: reached.append(out.clone())))
            self._model(image)
        return Below(image=image, activation=reached[0], parts=tuple(parts))

    @torch.no_grad()
    def above(self, below: Below, activations: Tensor) -> Tensor:
        """The logits of an image, if the layer's output were another.

        Args:
            below: as `below` gives it.
            activations: [D, ...], any number of them.

        Returns:
            [D, classes].
        """
        count = len(activations)
        given: dict[nn.Module, deque[Any]] = {self._module: deque([activations])}
        for module, output in below.parts:
            several = isinstance(output, tuple)
            copies = tuple(self._expanded(part, count) for part in output) if several else self._expanded(output, count)
            given.setdefault(module, deque()).append(copies)
        own = {module: module.__dict__.get("forward") for module in given}
        try:
            for module, outputs in given.items():
                module.forward = _Told(module.forward, outputs)
            return self._model(self._expanded(below.image, count))
        finally:
            for module, forward in own.items():
                if forward is not None:
                    module.forward = forward
                elif "forward" in module.__dict__:
                    del module.forward

    def _expanded(self, tensor: Tensor, count: int) -> Tensor:
        expanded = tensor.expand(count, *tensor.shape[1:])
        return expanded.clone() if self._copies or count == 1 else expanded


class _Told:
    """A module's forward that gives what it is told, as often as it was called below the layer, and then its own."""

    def __init__(self, forward: Callable[..., Any], outputs: deque[Any]) -> None:
        self._forward, self._outputs = forward, outputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._outputs.popleft() if self._outputs else self._forward(*args, **kwargs)

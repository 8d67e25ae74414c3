"""Optimizers by name: torch's, timm's, or a class of the user's own, as the step needs them."""

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine.config import ConfigError, OptimizerConfig
from awp_engine.config.model_names import optimizer_source
from awp_engine.config.schema import did_you_mean
from awp_engine.models.import_timm import import_timm
from awp_engine.models.user_code import load_factory, told_in_one_line
from awp_engine.optim.adamw import kept_and_scale, laid_out_like, write_along
from awp_kernels._working import WorkingGradients

_FLAG = "--optimizer.kind"
# the name, in a checkpoint, of all of a state that is no tensor
_STRUCTURE = "structure"
_PLAIN = (type(None), bool, int, float, str)
_TRIAL_STEPS = 6


class WrappedOptimizer(WorkingGradients):
    """A torch.optim.Optimizer over masters, with working copies, averages, and steps that are left out.

    It is given gradients that are unscaled and clipped, in the masters' precision. A step whose gradients are not
    finite is left out whole. The host has to know that, so every step waits once for the device, and no CUDA graph can
    hold it.

    Args:
        optimizer: of all parameters, on one device and in one precision.
        working: by parameter, its working copy, whose gradient is followed where it has one, and which gets the new
            weights, rounded.

    Attributes:
        averages: by parameter, a tensor that follows it.
        average_weight: what a step counts in the averages, in [0, 1], a number or a one-element tensor.
        weight_norms: empty, as in `AdamW`.
    """

    average_weight: float | Tensor = 0.0

    def __init__(self, optimizer: torch.optim.Optimizer, working: Mapping[Any, Tensor] | None = None) -> None:
        self.optimizer = optimizer
        self._given = [{**group} for group in optimizer.param_groups]
        self.working = {} if working is None else {**working}
        self.averages: dict[Tensor, Tensor] = {}
        self.weight_norms: list[tuple[list[Tensor], Tensor]] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The optimizer's own."""
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(
        self,
        *,
        grad_norm: Tensor,
        max_norm: float | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Step all parameters that have a gradient; arguments are those of `awp_kernels.SGD.step`."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        device = parameters[0].device
        kept, scale = kept_and_scale(device, grad_scale, found_inf, grad_norm, max_norm)
        # what another's step does cannot be left out on the device
        if not kept.item():
            return
        own = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            if (gradient := self.gradient(parameter)) is not None:
                # fused ones step in the order of memory
                gradient = laid_out_like(parameter, gradient)
                parameter.grad = gradient if scale is None else gradient / scale
        self.optimizer.step()
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad = gradient
        write_along(parameters, self.working, self.averages, torch.as_tensor(self.average_weight, device=device))

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole state, for a checkpoint, on the parameters' device.

        Args:
            parameters: all of the optimizer's, by name.

        Returns:
            Tensors by where they are, such as "state/PARAMETER/exp_avg", and "structure", which says as JSON what else
            there is and how it is nested.

        Raises:
            ConfigError: a checkpoint cannot hold it.
        """
        names = {parameter: name for name, parameter in parameters.items()}
        state = self.optimizer.state
        tree = {
            "state": {names[key]: entry for key, entry in state.items() if isinstance(key, Tensor)},
            "more": {key: entry for key, entry in state.items() if not isinstance(key, Tensor)},
            "groups": [_changed(*groups) for groups in zip(self._given, self.param_groups, strict=True)],
        }
        device = self.param_groups[0]["params"][0].device
        found: dict[str, Tensor] = {}
        text = json.dumps(_packed(tree, "", device, found)).encode()
        found[_STRUCTURE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {name: tensor.to(device) for name, tensor in found.items()}

    def allocate(self, parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes on what `tensors` gave as `saved`, with new tensors in place of the saved ones, to be written into.

        Raises:
            ValueError, KeyError: it is not of an optimizer over these parameters.
        """
        device = self.param_groups[0]["params"][0].device
        found: dict[str, Tensor] = {}
        text = saved[_STRUCTURE].cpu().numpy().tobytes()
        tree = _unpacked(json.loads(text), saved, device, found)
        self.optimizer.state.clear()
        self.optimizer.state.update({parameters[name]: entry for name, entry in tree["state"].items()} | tree["more"])
        for group, options in zip(self.param_groups, tree["groups"], strict=True):
            group.update(options)
        return found


def _changed(given: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that are not those it was given, as far as one can see: some change in place."""
    options = {key: value for key, value in group.items() if key != "params"}
    return {k: v for k, v in options.items() if v is not given.get(k, _changed) or isinstance(v, Tensor | list | dict)}


def _packed(value: Any, name: str, device: torch.device, found: dict[str, Tensor]) -> Any:
    """A value as JSON holds it; tensors in it are `found`, with a name each."""
    if isinstance(value, Tensor):
        found[name] = value.detach()
        # counts may be kept on the host; buffers in channels_last are added up in another order than contiguous ones
        return ["tensor", name, value.device != device, list(value.dim_order())]
    if type(value) in (list, tuple):
        return [type(value).__name__, *(_packed(part, f"{name}/{i}", device, found) for i, part in enumerate(value))]
    if type(value) is dict:
        return ["dict", *([key, _packed(part, f"{name}/{key}", device, found)] for key, part in value.items())]
    if type(value) in _PLAIN:
        return value
    raise ConfigError(
        f"{_FLAG}: a checkpoint cannot hold the optimizer's {name[1:]}, {type(value).__name__}; expected tensors, "
        "numbers, text, and lists and dictionaries of them"
    )


def _unpacked(value: Any, saved: Mapping[str, Tensor], device: torch.device, found: dict[str, Tensor]) -> Any:
    """What `_packed` was given; tensors in it are new, and `found`."""
    if not isinstance(value, list):
        return value
    kind, *parts = value
    if kind == "tensor":
        name, on_host, order = parts
        like, place = saved[name], torch.device("cpu") if on_host else device
        found[name] = torch.empty_permuted(like.shape, order, dtype=like.dtype, device=place)
        return found[name]
    if kind == "dict":
        return {key: _unpacked(part, saved, device, found) for key, part in parts}
    entries = [_unpacked(part, saved, device, found) for part in parts]
    return tuple(entries) if kind == "tuple" else entries


Make = Callable[[Iterable[Any], Mapping[Any, Tensor] | None], WrappedOptimizer]


def find_optimizer(config: OptimizerConfig, device: torch.device) -> Make:
    """What makes the optimizer of a name, of parameters or groups of them, and working copies.

    It is tried first on three small parameters: it has to take steps without a closure, to follow the learning rate and
    weight decay of its groups, and to go on from its saved state as it would have gone on.

    Args:
        config: whose `kind` is "torch:NAME", "timm:NAME", "file.py:Class" or "package.module:Class".
        device: of the parameters.

    Raises:
        ConfigError: there is no such optimizer or argument, or it does not pass.
    """
    factory, arguments = _factory(config.kind), config.arguments
    taken = inspect.signature(factory).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    for name in arguments:
        if name in ("params", "lr", "weight_decay"):
            raise ConfigError(f"--optimizer.args: expected no {name}, which has a flag of its own: see --help-all")
        if name not in taken and not takes_all:
            others = [other for other in taken if other not in ("params", "lr", "weight_decay")]
            hint = did_you_mean(name, others, f"expected some of {', '.join(others)}")
            raise ConfigError(f"--optimizer.args: {config.kind} takes no {name}; {hint}")
    decays = "weight_decay" in taken or takes_all
    if decays:
        arguments["weight_decay"] = config.weight_decay

    def make(params: Iterable[Any], working: Mapping[Any, Tensor] | None = None) -> WrappedOptimizer:
        with told_in_one_line(config.kind, "its call", _FLAG):
            made = factory(params, lr=config.lr, **arguments)
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(f"{_FLAG}: {config.kind} gives {type(made).__name__}; expected a torch.optim.Optimizer")
        return WrappedOptimizer(made, working)

    _require_fit(make, config, device, decays=decays)
    if config.weight_decay and not decays:
        raise ConfigError(f"--optimizer.weight-decay: expected 0 with {config.kind}, which takes no weight_decay")
    return make


def _factory(kind: str) -> Callable[..., Any]:
    source, (library, _, name) = optimizer_source(kind), kind.partition(":")
    if source == "code":
        return load_factory(kind, _FLAG)[0]
    if source == "torch":
        base = torch.optim.Optimizer
        known = [key for key, value in vars(torch.optim).items() if inspect.isclass(value) and issubclass(value, base)]
        known.remove("Optimizer")
        if name in known:
            return getattr(torch.optim, name)
        hint = f"expected one of {', '.join(sorted(known))}"
    else:
        import_timm(f"{_FLAG}: {kind}")
        registry = importlib.import_module("timm.optim")
        known = registry.list_optimizers()
        if name in known:
            with told_in_one_line(kind, "its import", _FLAG):
                made_by = registry.get_optimizer_class(name)
            # timm's own scripts give it, and some of its classes need it
            momentum = registry.get_optimizer_info(name).has_momentum
            return functools.partial(made_by, momentum=0.9) if momentum else made_by
        hint = "timm.optim.list_optimizers() has the names"
    same = [key for key in known if key.lower() == name.lower()]
    hint = f"did you mean {same[0]}?" if same else did_you_mean(name, known, hint)
    raise ConfigError(f"{_FLAG}: {library}.optim has no {name}; {hint}")


@torch.no_grad()
def _require_fit(make: Make, config: OptimizerConfig, device: torch.device, *, decays: bool) -> None:
    """Refuse an optimizer that a run cannot be trained by, or cannot go on with."""
    kind = config.kind

    def begin() -> tuple[dict[str, Tensor], WrappedOptimizer]:
        drawn = torch.Generator().manual_seed(0)
        shapes = ((4, 3, 3, 3), (5, 4), (4,))
        weights = [nn.Parameter(torch.randn(shape, generator=drawn).to(device)) for shape in shapes]
        group = {"params": weights, "lr": config.lr, "weight_decay": config.weight_decay}
        return {str(number): weight for number, weight in enumerate(weights)}, make([group], None)

    def stepped(weights: dict[str, Tensor], optimizer: WrappedOptimizer, numbers: range) -> dict[str, Tensor]:
        for number in numbers:
            drawn = torch.Generator().manual_seed(number)
            for weight in weights.values():
                weight.grad = torch.randn(weight.shape, generator=drawn).to(device)
            # compiling would take minutes
            with told_in_one_line(kind, "its step", _FLAG), torch.compiler.set_stance("force_eager"):
                optimizer.optimizer.step()
        return {name: tensor.clone() for name, tensor in (weights | optimizer.tensors(weights)).items()}

    first, rest = range(_TRIAL_STEPS // 2), range(_TRIAL_STEPS // 2, _TRIAL_STEPS)
    weights, optimizer = begin()
    inner = optimizer.optimizer
    if any(given.default is given.empty for given in inspect.signature(inner.step).parameters.values()):
        raise ConfigError(f"{_FLAG}: {kind} computes losses anew in its step (a closure), and a step has only one")
    if any(callable(getattr(inner, mode, None)) for mode in ("train", "eval")):
        raise ConfigError(f"{_FLAG}: {kind} has other weights for evaluation (train() and eval()); take another")
    middle = stepped(weights, optimizer, first)
    whole = stepped(weights, optimizer, rest)

    def same(*, in_all: bool, **options: float) -> bool:
        """Whether a resumed optimizer with other options ends with the same weights, `in_all`: and the same state."""
        weights, optimizer = begin()
        for name, tensor in {**weights, **optimizer.allocate(weights, middle)}.items():
            tensor.copy_(middle[name])
        for group in optimizer.param_groups:
            group.update(options)
        again = stepped(weights, optimizer, rest)
        return all(torch.equal(again[name], whole[name]) for name in (whole if in_all else weights))

    if not same(in_all=True):
        raise ConfigError(
            f"{_FLAG}: {kind} would not go on from a checkpoint as it would have gone on: it draws random numbers, "
            "or keeps something beside `state` and `param_groups`; take another"
        )
    if same(in_all=False, lr=config.lr / 1024):
        raise ConfigError(f"{_FLAG}: {kind} does not follow the learning rate, which the schedule changes")
    # a decay that halves weights at once where it is times the rate
    if decays and config.weight_decay and same(in_all=False, weight_decay=0.5 / config.lr):
        raise ConfigError(
            f"--optimizer.weight-decay: {kind} does not follow that of its groups, which differs between weights and "
            "biases; give 0, or take another"
        )

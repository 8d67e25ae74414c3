"""SGD on the fused step, in place of torch.optim.SGD."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from awp_kernels import _checks
from awp_kernels._sharded import Shards, is_sharded, local
from awp_kernels._working import WorkingGradients
from awp_kernels.sgd_step import sgd_step_

# the step computes in float32
_LARGEST = torch.finfo(torch.float32).max


class _Call(NamedTuple):
    """What all tensors of one call have in common."""

    device: torch.device
    dtype: torch.dtype
    grad_dtype: torch.dtype
    out_dtype: torch.dtype | None
    averaged: bool
    lr: float | tuple[str, int]
    momentum: float
    nesterov: bool


class _Lists(NamedTuple):
    lr: float | Tensor
    weights: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor]
    weight_decay: list[float]
    averages: list[Tensor]
    out: list[Tensor]

    def local(self) -> "_Lists":
        """This rank's rows of sharded tensors."""
        names = ("weights", "grads", "momentum_buffers", "averages", "out")
        return self._replace(**{name: local(getattr(self, name)) for name in names})


class SGD(WorkingGradients, Optimizer):
    """Stochastic gradient descent, as torch.optim.SGD with dampening 0 computes it, by `sgd_step_`.

        optimizer = awp_kernels.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        loss_fn(model(x), y).backward()
        optimizer.step()

    A step makes one call a kind of parameter (device, dtypes, learning rate, momentum), whatever their number and
    weight decays. Parameters without a gradient are left alone. State dictionaries are those of torch.optim.SGD and go
    both ways. With torch.amp.GradScaler the gradients are unscaled, and a step with infinite ones is left out, inside
    the same call and without waiting for the device; momentum buffers start as zeros, so that this may be the first.

    With `working` the parameters are masters: where one has a working copy, the copy's gradient is followed if it has
    one, and the copy gets the new weights, rounded. GradScaler does not see such gradients, and is refused.

    Parameters may be sharded by FSDP2's `fully_shard`: each rank steps its own rows, and momentum buffers are sharded
    likewise. `total_norm` of their gradients is over all ranks.

    Args:
        params: parameters or groups of them, as torch.optim.Optimizer takes them.
        lr: learning rate >= 0; a one-element tensor on the parameters' device is read there, at every step and at every
            replay of a captured CUDA graph.
        momentum: >= 0.
        dampening: 0; nothing else is served.
        weight_decay: >= 0.
        nesterov: Nesterov's momentum; needs momentum > 0.
        maximize: False; nothing else is served.
        working: by parameter, its working copy: of the same shape and memory order, of any floating dtype.

    What a step is told of its gradients are arguments of `step`; what parameters are wired to are attributes.

    Attributes:
        working: by parameter, its working copy, as given.
        averages: by parameter, a tensor that follows it.
        average_weight: what a step counts in the averages, in [0, 1], a number or a one-element tensor.
        grad_scale, found_inf: there during a step of GradScaler alone, which sets and removes them.
        weight_norms: after a step, for every call the parameters and their new norms, fp64 [n]; of sharded ones, the
            norms of this rank's rows.

    Raises:
        ValueError: a number out of range, or what is not served: dampening, maximize, and, in `step`, sparse gradients.

    Example:
        >>> import torch
        >>> from awp_kernels import SGD
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = SGD([w], lr=0.5, momentum=0.9)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     w.square().sum().backward()
        ...     optimizer.step()
        >>> w.data
        tensor([-0.9000])
    """

    _sharded = False
    # without values: GradScaler looks whether they are there, and `step` whether GradScaler calls it
    grad_scale: Tensor | None
    found_inf: Tensor | None
    average_weight: float | Tensor = 0.0

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        working: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        self.working: dict[Tensor, Tensor] = {} if working is None else {**working}
        self.averages: dict[Tensor, Tensor] = {}
        self.weight_norms: list[tuple[list[Tensor], Tensor]] = []
        # foreach, differentiable and fused stand in torch's state dictionaries; None and False leave torch the choice
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": None,
            "differentiable": False,
            "fused": None,
        }
        _check(defaults)
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by torch.amp.GradScaler's step: it then sets grad_scale and found_inf for a step, and unscales nothing.

        Raises:
            RuntimeError: it would not see an overflow in the gradients of working copies.
        """
        if any(copied.grad is not None for copied in self.working.values()):
            raise RuntimeError(
                "working: GradScaler looks at the parameters' own gradients, not at those of working copies; leave it "
                "out, and give step() its grad_scale and grad_norm (total_norm of gradients())"
            )
        return True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own, as torch.optim.Optimizer does.

        Args:
            param_group: "params", and options that differ from the defaults.

        Raises:
            ValueError: as the class does.
        """
        _check(self.defaults | {name: value for name, value in param_group.items() if name in self.defaults})
        super().add_param_group(param_group)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self._sharded = any(map(is_sharded, parameters))
        if self._sharded:
            Shards("params", parameters)

    def __getstate__(self) -> dict[str, Any]:
        # torch's keeps three attributes; a copy has to go on with working copies and averages too
        return super().__getstate__() | {
            "working": self.working,
            "averages": self.averages,
            "weight_norms": [],
            "_sharded": self._sharded,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = state.get("defaults") or self.defaults
        for group in state["param_groups"]:
            for name, value in defaults.items():
                group.setdefault(name, value)
            _check(group)
        super().__setstate__(state)

    def _buffer(self, parameter: Tensor) -> Tensor:
        """The parameter's momentum, in its memory order; zeros at first."""
        state = self.state[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        elif buffer.stride() != parameter.stride() or buffer.dtype != parameter.dtype:
            # torch's buffers have the gradient's order
            buffer = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(buffer)
        else:
            return buffer
        state["momentum_buffer"] = buffer
        return buffer

    def _calls(self) -> dict[_Call, _Lists]:
        calls: dict[_Call, _Lists] = {}
        for group in self.param_groups:
            _check(group)
            lr, momentum, nesterov = group["lr"], float(group["momentum"]), bool(group["nesterov"])
            decay = float(group["weight_decay"])
            rate = ("tensor", id(lr)) if isinstance(lr, Tensor) else float(lr)
            for parameter in group["params"]:
                grad = self.gradient(parameter)
                if grad is None:
                    continue
                copied, average = self.working.get(parameter), self.averages.get(parameter)
                if grad.is_sparse:
                    raise ValueError("params: sparse gradients are not served, use torch.optim.SGD for them")
                call = _Call(
                    parameter.device,
                    parameter.dtype,
                    grad.dtype,
                    None if copied is None else copied.dtype,
                    average is not None,
                    rate,
                    momentum,
                    nesterov,
                )
                lists = calls.get(call)
                if lists is None:
                    lists = calls[call] = _Lists(lr, [], [], [], [], [], [])
                lists.weights.append(parameter)
                lists.grads.append(grad)
                lists.weight_decay.append(decay)
                if momentum:
                    lists.momentum_buffers.append(self._buffer(parameter))
                if copied is not None:
                    lists.out.append(copied)
                if average is not None:
                    lists.averages.append(average)
        return calls

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        grad_norm: Tensor | None = None,
        max_norm: float | None = None,
    ) -> Any:
        """Step all parameters that have a gradient.

        Args:
            closure: computes the loss anew, and its gradients.
            grad_scale: what the gradients were multiplied by, as `sgd_step_` takes it; on any device, as the next two.
            found_inf: not 0 where the step is to be left out.
            grad_norm: the norm of all gradients as they are, `total_norm(optimizer.gradients())`; not finite: the step
                is left out.
            max_norm: longest norm of the unscaled gradients, to which longer ones are shortened; needs `grad_norm`.

        Returns:
            What the closure returned, else None.

        Raises:
            ValueError: as `sgd_step_` and the class do; grad_scale or found_inf in a step of GradScaler.
        """
        if hasattr(self, "grad_scale") or hasattr(self, "found_inf"):
            for name, given in (("grad_scale", grad_scale), ("found_inf", found_inf)):
                if given is not None:
                    raise ValueError(f"{name}: expected none beside GradScaler, which sets its own; leave it out")
            grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.weight_norms = []
        for call, whole in self._calls().items():
            lists = whole.local() if self._sharded else whole
            norms = sgd_step_(
                lists.weights,
                lists.grads,
                lists.momentum_buffers,
                lr=_on(call.device, lists.lr),
                weight_decay=lists.weight_decay,
                momentum=call.momentum,
                nesterov=call.nesterov,
                grad_scale=_on(call.device, grad_scale),
                found_inf=_on(call.device, found_inf),
                grad_norm=_on(call.device, grad_norm),
                max_norm=max_norm,
                averages=lists.averages,
                average_weight=self.average_weight if lists.averages else None,
                out=lists.out,
            )
            self.weight_norms.append((whole.weights, norms))
        return loss


def _on(device: torch.device, value: Any) -> Any:
    """Tensors on the device; nothing is copied where they are there already."""
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _check(options: dict[str, Any]) -> None:
    """Refuse what the step does not serve.

    Raises:
        ValueError: named by option.
    """
    lr = options["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr: expected a tensor of one element, got shape {tuple(lr.shape)}")
    else:
        _checks.finite("lr", lr, minimum=0, maximum=_LARGEST)
    for name in ("momentum", "weight_decay"):
        _checks.finite(name, options[name], minimum=0, maximum=_LARGEST)
    if options["dampening"]:
        raise ValueError(f"dampening: 0 alone is served, got {options['dampening']}; use torch.optim.SGD")
    if options["maximize"]:
        raise ValueError("maximize: False alone is served, got True; use torch.optim.SGD, or negate the loss")
    if options["nesterov"] and not options["momentum"]:
        raise ValueError("nesterov: expected momentum > 0, got momentum 0")

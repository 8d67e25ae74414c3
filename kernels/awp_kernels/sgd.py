"""`SGD`: torch.optim.SGD on top of `sgd_step_`."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from awp_kernels import _checks
from awp_kernels.sgd_step import sgd_step_


class SGD(Optimizer):
    """Stochastic gradient descent, one launch for all tensors that agree in dtypes and settings.

    A drop-in for torch.optim.SGD: same arguments, same steps to rounding, and state dictionaries that load either way.
    torch.amp.GradScaler leaves unscaling and skipping to it, so that no step waits for the device. With `working`, the
    parameters are masters: where one has a working copy, the copy's gradient is taken, and the copy gets the new
    weights, rounded.

    Args:
        params: parameters, or groups of them.
        lr: learning rate >= 0, a number or a one-element tensor on the parameters' device.
        momentum: >= 0.
        dampening: 0; other values are refused.
        weight_decay: >= 0.
        nesterov: Nesterov's momentum; needs momentum > 0.
        maximize: False; True is refused.
        working: by master, its working copy: of the same shape and strides, of any floating dtype.

    Attributes:
        grad_scale: what gradients were multiplied by, a one-element fp32 tensor, or None; set by GradScaler.
        found_inf: whether to leave the step out, a one-element fp32 tensor, or None; set by GradScaler.
        grad_norm, max_norm: norm of all gradients as they are (see `total_norm`), and what they are shortened to.
        averages: by parameter, a tensor that follows it, moved by `average_weight` in every step.
        average_weight: in [0, 1], a number or a one-element tensor.
        decay_at_out: decay from what the working copies hold, w + v, instead of from w.
        weight_norms: after a step, the norms of tensors that were stepped together: lists of parameters, and fp64 [n].

    Raises:
        ValueError: a number out of range, dampening, maximize, or Nesterov's momentum without momentum.
    """

    # GradScaler then hands over its scale instead of unscaling, and removes the two attributes after the step
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

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
        self.working: dict[Tensor, Tensor] = dict(working or {})
        self.grad_norm: Tensor | None = None
        self.max_norm: float | None = None
        self.averages: dict[nn.Parameter, nn.Parameter] = {}
        self.average_weight: float | Tensor = 0.0
        self.decay_at_out = False
        self.weight_norms: list[tuple[list[Tensor], Tensor]] = []
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            # torch's own keys, so that its SGD takes this one's state
            "foreach": None,
            "differentiable": False,
            "fused": None,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with settings of its own or the defaults."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this class or of torch.optim.SGD."""
        for group in state_dict["param_groups"]:
            self._check(group)
        super().load_state_dict(state_dict)

    @staticmethod
    def _check(group: dict[str, Any]) -> None:
        if not isinstance(group["lr"], Tensor):
            _checks.finite("lr", group["lr"], minimum=0)
        elif group["lr"].numel() != 1:
            raise ValueError(f"lr: expected a number or a tensor of one element, got shape {tuple(group['lr'].shape)}")
        _checks.finite("momentum", group["momentum"], minimum=0)
        _checks.finite("weight_decay", group["weight_decay"], minimum=0)
        if group.get("dampening"):
            raise ValueError(f"dampening: expected 0, got {group['dampening']}; use torch.optim.SGD for another")
        if group.get("maximize"):
            raise ValueError("maximize: expected False; negate the loss, or use torch.optim.SGD")
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov: expected momentum > 0, got momentum 0")

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """What a parameter is stepped by: its working copy's gradient where it has one, else its own."""
        copied = self.working.get(parameter)
        return parameter.grad if copied is None or copied.grad is None else copied.grad

    def gradients(self) -> list[Tensor]:
        """All gradients that there are, as they are (still scaled)."""
        found = (self.gradient(p) for group in self.param_groups for p in group["params"])
        return [gradient for gradient in found if gradient is not None]

    def _batches(self) -> list[tuple[list[Tensor], dict[str, Any], list[float]]]:
        """Parameters that can be stepped together, the settings that they share, and the decay of each."""
        batches: dict[tuple[Any, ...], tuple[list[Tensor], dict[str, Any], list[float]]] = {}
        for group in self.param_groups:
            lr = group["lr"]
            for parameter in group["params"]:
                gradient = self.gradient(parameter)
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    raise ValueError("grad: expected dense gradients, got a sparse one; use torch.optim.SGD")
                copied = self.working.get(parameter)
                key = (
                    parameter.device,
                    parameter.dtype,
                    gradient.dtype,
                    None if copied is None else copied.dtype,
                    id(lr) if isinstance(lr, Tensor) else lr,
                    group["momentum"],
                    group["nesterov"],
                    parameter in self.averages,
                )
                tensors, _, decays = batches.setdefault(key, ([], group, []))
                tensors.append(parameter)
                decays.append(float(group["weight_decay"]))
        return list(batches.values())

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if state.get("momentum_buffer") is None:
            # zeros, so that a first step that is left out leaves what torch's first step amounts to
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state["momentum_buffer"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; parameters without a gradient stay.

        Args:
            closure: evaluates the model anew and returns the loss.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.weight_norms = []
        for parameters, group, decays in self._batches():
            copies = [self.working[p] for p in parameters if p in self.working]
            averages = [self.averages[p] for p in parameters if p in self.averages]  # pyright: ignore[reportArgumentType]
            norms = sgd_step_(
                parameters,
                [g for p in parameters if (g := self.gradient(p)) is not None],
                [self._buffer(p) for p in parameters] if group["momentum"] else None,
                lr=group["lr"],
                weight_decay=decays,
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                grad_scale=self.grad_scale,
                found_inf=self.found_inf,
                grad_norm=self.grad_norm,
                max_norm=self.max_norm,
                averages=averages or None,
                average_weight=self.average_weight if averages else None,
                out=copies or None,
                decay_at_out=self.decay_at_out and bool(copies),
            )
            self.weight_norms.append((parameters, norms))
        return loss

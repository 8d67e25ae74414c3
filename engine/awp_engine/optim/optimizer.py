"""The optimizer that a configuration describes, and its state in a checkpoint."""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from awp_engine.config import ConfigError, OptimizerConfig
from awp_engine.models.chosen import chosen
from awp_engine.optim.adamw import AdamW
from awp_engine.optim.by_name import WrappedOptimizer, find_optimizer
from awp_kernels import SGD

Optimizer: TypeAlias = SGD | AdamW | WrappedOptimizer

# batch and instance normalisation, with and without running statistics, have one base
_NORMALISATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_MOMENTUM, _ADAMW = "momentum_buffer", ("exp_avg", "exp_avg_sq", "step")


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    working: nn.Module | None = None,
    layers: Mapping[str, int] | None = None,
) -> Optimizer:
    """SGD or AdamW over all parameters of `model`, in one or two launches a step for every learning rate; or another.

    Args:
        model: its parameters are stepped.
        config: kind, rate, momentum and decay.
        working: a working copy of `model`, whose gradients are taken where it has any, and which gets the new weights.
        layers: the layer of every parameter, see `layer_numbers`, for rates by layer; None: all learn at one rate.

    Raises:
        ConfigError: as `find_optimizer`; nothing to leave out of weight decay where the settings leave it out.

    Source: the rates by layer are those of Bao et al.: BEiT: BERT Pre-Training of Image Transformers, ICLR 2022.
    """
    parameters = dict(model.named_parameters())
    # on the device, where a captured step reads it; the fused kernel of AdamW reads fp32 alone there
    dtype = torch.float64 if config.kind == "sgd" else torch.float32
    device = next(iter(parameters.values())).device
    numbers = dict.fromkeys(parameters, 0) if layers is None else layers
    exempt = set() if config.decay_norms else set(normalisation_parameters(model))
    if not (config.decay_norms or exempt):
        raise ConfigError("--optimizer.decay-norms: expected true for a model without weights of normalisation layers")
    exempt |= {parameters[name] for name in chosen(model, config.no_decay, "--optimizer.no-decay")}
    parts = []
    for layer in sorted(set(numbers.values())):
        scale = config.layer_decay ** (max(numbers.values()) - layer)
        lr = config.lr * scale if config.by_name else torch.tensor(config.lr * scale, dtype=dtype, device=device)
        own = [p for name, p in parameters.items() if numbers[name] == layer]
        # biases and normalisation weights are the parameters of one dimension
        others = [p for p in own if p not in exempt]
        groups = [[p for p in others if p.ndim > 1], [p for p in others if p.ndim <= 1]]
        groups.append([p for p in own if p in exempt])
        decays = [config.weight_decay, config.weight_decay if config.decay_all else 0.0, 0.0]
        parts += [
            {"params": group, "weight_decay": decay, "lr": lr, "lr_scale": scale}
            for group, decay in zip(groups, decays, strict=True)
            if group
        ]
    copies = {} if working is None else dict(working.named_parameters())
    copied = {p: copies[name] for name, p in parameters.items() if name in copies and copies[name] is not p}
    if config.by_name:
        return find_optimizer(config, device)(parts, copied)
    if config.kind == "adamw":
        return AdamW(parts, lr=config.lr, beta1=config.momentum, beta2=config.beta2, working=copied)
    return SGD(parts, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, working=copied)


def normalisation_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the layers that normalise, by the layers' types; those of a module's own class are not."""
    found = (module for module in model.modules() if isinstance(module, _NORMALISATIONS))
    return [parameter for module in found for parameter in module.parameters(recurse=False)]


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by name, for a checkpoint.

    SGD's momentum by parameter, AdamW's as `exp_avg.PARAMETER` and so on, others' as `WrappedOptimizer.tensors` gives.
    """
    if isinstance(optimizer, WrappedOptimizer):
        return optimizer.tensors(dict(model.named_parameters()))
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[name if key == _MOMENTUM else f"{key}.{name}"] = value
    return tensors


def allocate_optimizer_tensors(
    model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Makes the state that `optimizer_tensors` has `saved`, to be written into.

    Raises:
        ValueError: a name that is not this optimizer's.
    """
    parameters, wanted = dict(model.named_parameters()), set(saved)
    if isinstance(optimizer, WrappedOptimizer):
        return optimizer.allocate(parameters, saved)
    for name, parameter in parameters.items():
        if isinstance(optimizer, AdamW):
            if any(f"{key}.{name}" in wanted for key in _ADAMW):
                optimizer.allocate(parameter)
        elif name in wanted:
            optimizer.state[parameter][_MOMENTUM] = torch.zeros_like(parameter)
    tensors = optimizer_tensors(model, optimizer)
    if strange := sorted(wanted - tensors.keys()):
        raise ValueError(f"{strange[0]}: expected the state of {type(optimizer).__name__}")
    return tensors


def set_momentum(optimizer: Optimizer, momentum: float) -> None:
    """Set SGD's momentum of all groups."""
    for group in optimizer.param_groups:
        group["momentum"] = momentum


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the rate of all groups, times their `lr_scale` where they have one; in place where it is a tensor."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

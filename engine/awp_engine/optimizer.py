"""Stochastic gradient descent as the step needs it."""

import torch
from torch import Tensor, nn

from awp_engine.config import OptimizerConfig
from awp_kernels import SGD


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, working: nn.Module | None = None) -> SGD:
    """SGD over all parameters of `model`, in one or two launches a step.

    Args:
        model: its parameters are stepped.
        config: rate, momentum and decay.
        working: a working copy of `model`, whose gradients are taken where it has any, and which gets the new weights.
    """
    parameters = dict(model.named_parameters())
    # biases and normalisation weights are the parameters of one dimension
    groups = [[p for p in parameters.values() if p.ndim > 1], [p for p in parameters.values() if p.ndim <= 1]]
    decays = [config.weight_decay, config.weight_decay if config.decay_all else 0.0]
    # on the device, where a captured step reads it
    lr = torch.tensor(config.lr, dtype=torch.float64, device=next(iter(parameters.values())).device)
    copies = {} if working is None else dict(working.named_parameters())
    return SGD(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True) if group],
        lr=lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        working={p: copies[name] for name, p in parameters.items() if name in copies and copies[name] is not p},
    )


def set_learning_rate(optimizer: SGD, lr: float) -> None:
    """Set the rate of all groups, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr

"""Stochastic gradient descent as the step needs it."""

import torch
from torch import nn

from awp_engine.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
    """SGD over all parameters, fused, which can leave a step out without asking the host."""
    # biases and normalisation weights are the parameters of one dimension
    groups = [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]]
    decays = [config.weight_decay, config.weight_decay if config.decay_all else 0.0]
    optimizer = torch.optim.SGD(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, decays, strict=True) if group],
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=True,
    )
    if config.momentum > 0:
        # a first step that is left out would leave torch's own buffers uninitialised
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer

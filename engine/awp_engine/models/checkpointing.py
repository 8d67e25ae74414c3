"""Gradient checkpointing: activations inside a block are dropped, and computed anew in the backward pass.

Source: Chen et al.: Training Deep Nets with Sublinear Memory Cost, 2016.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from awp_engine.config import ConfigError
from awp_engine.models.batch_norm import layer_modes
from awp_engine.models.layers import NormalizedClassifier
from awp_engine.models.wrapped import told_in_one_line

_FLAG = "--model.checkpoint-activations"


def checkpoint_activations_(model: NormalizedClassifier, shape: Sequence[int], name: str) -> None:
    """Have a model keep the inputs of its blocks alone; what a network of timm's takes as a block, timm says.

    Args:
        model: on its device; it makes passes on two images of noise, which change nothing.
        shape: of an image.
        name: of the model, for messages.

    Raises:
        ConfigError: a model that cannot, or whose gradients come out otherwise.
    """
    network: Any = getattr(model, "network", None)
    if network is None:
        model.checkpointed = True
        return
    if not callable(turn_on := getattr(network, "set_grad_checkpointing", None)):
        raise ConfigError(
            f"{_FLAG}: expected false with --model.name {name}, which has no set_grad_checkpointing: built-in models "
            "can, and those with that method, as timm's"
        )
    device = next(model.parameters()).device
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    before = _gradients(model, images)
    with told_in_one_line(name, "set_grad_checkpointing(True), or a pass after it,", _FLAG):
        turn_on(True)
        after = _gradients(model, images)
    model.checkpointed = True
    # exact on a CPU; some operations of a GPU round by chance
    if any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(after, before, strict=True)):
        raise ConfigError(
            f"{_FLAG}: expected false with --model.name {name}: its blocks compute something else the second time, as "
            "spectral normalisation does, and layers with random generators of their own"
        )


def _gradients(model: NormalizedClassifier, images: Tensor) -> list[Tensor]:
    """Of the summed squares of the logits, in train mode, for the images and all parameters that have one."""
    devices = [] if images.device.type == "cpu" else [images.device]
    wanted = [images.clone().requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
    drawn = torch.random.fork_rng(devices, device_type=images.device.type)
    with drawn, layer_modes(model, "train"), torch.enable_grad():
        torch.manual_seed(0)
        found = torch.autograd.grad(model(wanted[0]).square().sum(), wanted, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]

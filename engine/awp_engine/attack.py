"""Projected gradient descent on the images.

Source: Madry et al.: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from awp_kernels import pgd_init_, pgd_step_

Loss = Callable[[Tensor, Tensor], Tensor]


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the batch: a mean would underflow in 16 bits, and the step ignores the scale."""
    return F.cross_entropy(logits, labels, reduction="sum")


@contextlib.contextmanager
def batch_norm_mode(
    model: nn.Module, mode: Literal["train", "eval"] | None = None, *, update_statistics: bool
) -> Iterator[None]:
    """Sets how the model's batch normalisation behaves inside the block, and puts everything back after it.

    Args:
        model: any module.
        mode: "train" normalises by the batch, "eval" by the running statistics; None leaves it as it is.
        update_statistics: whether forward passes in train mode move the running statistics.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    try:
        for layer in layers:
            layer.training = layer.training if mode is None else mode == "train"
            # without tracking, train mode leaves the buffers alone, and eval mode still reads them
            layer.track_running_stats &= update_statistics
        yield
    finally:
        for layer, (training, tracking) in zip(layers, before, strict=True):
            layer.training, layer.track_running_stats = training, tracking


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: Literal["linf", "l2"] = "linf",
    random_start: bool = True,
    sample_ids: Tensor | None = None,
    seed: int = 0,
    bn_mode: Literal["train", "eval"] = "eval",
    update_statistics: bool = False,
    loss: Loss = summed_cross_entropy,
    mask: Tensor | None = None,
) -> Tensor:
    """Attack a batch: `steps` normalised ascent steps on the loss, each projected onto the ball and clipped to [0, 1].

    Only gradients with respect to the images are computed; parameters and their gradients are left alone.

    Args:
        model: any module that maps images in [0, 1] to logits; the bare module, not a DistributedDataParallel wrapper.
        x: [N, C, H, W], values in [0, 1].
        y: int64 [N], the labels.
        epsilon: radius of the ball, on pixels in [0, 1].
        step_size: length of a step, in the same units.
        steps: number of steps, >= 0.
        norm: "linf" or "l2".
        random_start: start from a uniform random point of the ball instead of x.
        sample_ids: int64 [N], what a sample's noise is keyed by; its place in the batch if not given.
        seed: of the noise, in [0, 2^63).
        bn_mode: how batch normalisation behaves during the attack; put back afterwards.
        update_statistics: whether the attack's forward passes in train mode move the running statistics.
        loss: maps (logits, y) to a scalar to climb, summed rather than averaged.
        mask: bool, broadcastable to x: the region that may change.

    Returns:
        The attacked images, detached, in x's dtype (at least fp32) and memory format.

    Raises:
        ValueError: arguments out of range, named.
    """
    if steps < 0:
        raise ValueError(f"steps: expected a whole number >= 0, got {steps}")
    if bn_mode not in ("train", "eval"):
        raise ValueError(f"bn_mode: expected train or eval, got {bn_mode!r}")
    if not x.is_floating_point():
        raise ValueError(f"x: expected floating-point images in [0, 1], got {x.dtype}; divide uint8 images by 255")
    # 16-bit images would lose steps: bfloat16 spaces the numbers below 1 by 1/256
    clean = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    x_adv = clean.clone()
    if random_start:
        ids = torch.arange(len(x), device=x.device) if sample_ids is None else sample_ids
        pgd_init_(x_adv, clean, epsilon=epsilon, norm=norm, sample_ids=ids, seed=seed)
        if mask is not None:
            x_adv = torch.where(mask, x_adv, clean)
    with batch_norm_mode(model, bn_mode, update_statistics=update_statistics), torch.enable_grad():
        for _ in range(steps):
            x_adv.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(model(x_adv), y), x_adv)
            x_adv = x_adv.detach()
            pgd_step_(x_adv, gradient, clean, step_size=step_size, epsilon=epsilon, norm=norm, mask=mask)
    return x_adv

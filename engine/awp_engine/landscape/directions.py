"""Directions to move weights in: random ones, and the one in which the robust loss rises most."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from awp_engine.attack import Attack, summed_cross_entropy
from awp_engine.data import Batch
from awp_engine.models.batch_norm import batch_norm_mode
from awp_kernels.awp import is_perturbed
from awp_kernels.philox import mix_seed, normals

Scope = Literal["filter", "layer"]


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A direction for some of a model's parameters; its length does not matter.

    Attributes:
        tensors: parameter's name to tensor of its shape.
        scope: what is scaled to the weight's norm when it is followed: each entry of dimension 0 ("filter"; a tensor
            below two dimensions is one filter), or each tensor ("layer").
    """

    tensors: dict[str, Tensor]
    scope: Scope


def perturbed_weights(model: nn.Module) -> list[str]:
    """Names of what AWP perturbs: weights of two or more dimensions, neither biases nor normalisation.

    Li et al. leave the same out of their random directions.
    """
    return [name for name, parameter in model.named_parameters() if is_perturbed(name, parameter)]


def weights_and_biases(model: nn.Module) -> list[str]:
    """Names of all parameters but those of normalisation layers, as Stutz et al. choose them."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm)
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if not isinstance(module, kinds)
        for name, _ in module.named_parameters(recurse=False)
    ]


def name_key(name: str) -> int:
    """64 bits that stand for a parameter's name in a seed."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def gaussian_like(weight: Tensor, name: str, *, seed: int, index: int) -> Tensor:
    """Normal numbers of the weight's shape, strides and dtype, keyed by (seed, index, name, filter) alone.

    Two models draw the same for a parameter of the same name and shape, on any device.
    """
    filters = weight.shape[0] if weight.ndim > 1 else 1
    noise = normals(
        torch.arange(filters, device=weight.device),
        weight.numel() // filters,
        seed=mix_seed(seed, index, name_key(name)),
    )
    return torch.empty_like(weight).copy_(noise.view(weight.shape))


@torch.no_grad()
def random_direction(
    model: nn.Module,
    *,
    seed: int,
    index: int = 0,
    scope: Scope = "filter",
    select: Callable[[nn.Module], Sequence[str]] = perturbed_weights,
) -> Direction:
    """A Gaussian direction; followed with scope "filter", it is filter-normalised.

    Args:
        model: whose parameters' shapes and names it is made for.
        seed: in [0, 2^63).
        index: which of the seed's directions.
        scope: see `Direction`.
        select: gives the names of the parameters that move.

    Raises:
        ValueError: no parameter to move.

    Source: Li et al.: Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018.
    """
    parameters = dict(model.named_parameters())
    names = [name for name in select(model) if parameters[name].numel()]
    if not names:
        raise ValueError("model: has no parameter to move; pass select=")
    tensors = {name: gaussian_like(parameters[name].detach(), name, seed=seed, index=index) for name in names}
    return Direction(tensors=tensors, scope=scope)


def adversarial_direction(
    model: nn.Module,
    batches: Sequence[Batch],
    attack: Attack,
    *,
    scope: Scope = "layer",
    select: Callable[[nn.Module], Sequence[str]] = perturbed_weights,
) -> Direction:
    """The gradient of the robust loss, summed over the images, with respect to the weights; BN in eval mode.

    Followed with scope "layer", it is AWP's perturbation: w + gamma ||w_l|| g_l / ||g_l||.

    Args:
        model: left as it is.
        batches: the images, attacked at w.
        attack: how.
        scope: see `Direction`.
        select: gives the names of the parameters that move.

    Source: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020, equation 10.
    """
    parameters = dict(model.named_parameters())
    names = list(select(model))
    chosen = [parameters[name] for name in names]
    sums = [torch.zeros_like(parameter) for parameter in chosen]
    for x, y, ids, _ in batches:
        x_adv = attack(model, x, y, sample_ids=ids)
        with batch_norm_mode(model, "eval", update_statistics=False), torch.enable_grad():
            gradients = torch.autograd.grad(summed_cross_entropy(model(x_adv), y), chosen)
        for total, gradient in zip(sums, gradients, strict=True):
            total += gradient
    return Direction(tensors=dict(zip(names, sums, strict=True)), scope=scope)

"""Adversarial weight perturbation for any trainer."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from awp_kernels import _checks
from awp_kernels.perturb import perturb_
from awp_kernels.restore import restore_


def is_perturbed(name: str, parameter: Tensor) -> bool:
    """The paper's choice: tensors with two or more dimensions whose name contains "weight"."""
    return parameter.ndim > 1 and "weight" in name


class AdversarialWeightPerturbation:
    """Moves a model's weights to w + gamma * ||w|| * g / ||g|| for one forward and backward pass, and back.

    Between the ascent's backward pass and the optimizer's step:

        loss_fn(model(x_adv), y).backward()          # ascent gradient
        with awp.perturbed():                        # gradients cleared on entry
            loss_fn(model(x_adv), y).backward()      # descent gradient
        optimizer.step()                             # weights are back, bit for bit

    Works with loss scaling (the direction does not depend on the scale), with gradient accumulation (accumulate the
    ascent, then the descent inside the block) and under autocast (its cache of casts is cleared).

    Args:
        model: any module; its parameters may be on any one device.
        gamma: length of the perturbation as a fraction of ||w||, >= 0.
        scope: "layer" (the paper's), "global" or "filter", as for `perturb_`.
        eps: added to ||g||.
        select: which parameters move, by name and tensor; by default `is_perturbed`.

    Raises:
        ValueError: gamma, scope or eps out of range, or a model without a parameter to perturb.

    Source: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020.
    """

    def __init__(
        self,
        model: nn.Module,
        gamma: float,
        *,
        scope: str = "layer",
        eps: float = 1e-20,
        select: Callable[[str, Tensor], bool] = is_perturbed,
    ) -> None:
        _checks.finite("gamma", gamma, minimum=0)
        _checks.finite("eps", eps, minimum=0)
        _checks.one_of("scope", scope, _checks.SCOPES)
        self.model, self.gamma, self.scope, self.eps = model, gamma, scope, eps
        # named_parameters lists a tied weight once
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and select(name, p)}
        if not self.parameters:
            raise ValueError("model: no trainable parameter with ndim > 1 whose name contains 'weight'; pass select=")
        self._saved: dict[str, Tensor] = {}
        self._active: list[str] = []

    def _groups(self) -> list[list[str]]:
        """Names of parameters that have a gradient, by dtype: an operation takes one dtype."""
        groups: dict[torch.dtype, list[str]] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                groups.setdefault(parameter.dtype, []).append(name)
        return list(groups.values())

    @torch.no_grad()
    def perturb_(self) -> None:
        """Save the weights, move them along their gradients, and clear all gradients.

        Raises:
            RuntimeError: already perturbed, or no gradient to follow.
        """
        if self._active:
            raise RuntimeError("weights are perturbed already: leave the perturbed() block first")
        groups = self._groups()
        if not groups:
            raise RuntimeError("no gradients to perturb along: call backward() on the ascent loss first")
        if self.scope == "global" and len(groups) > 1:
            raise RuntimeError("scope 'global' needs all perturbed parameters to be of one dtype")
        try:
            for names in groups:
                self._move(names)
        except BaseException:
            self.restore_()
            raise
        for parameter in self.model.parameters():
            parameter.grad = None
        # casts made before the move would hide it inside an autocast block
        torch.clear_autocast_cache()

    def _move(self, names: list[str]) -> None:
        weights = [self.parameters[name] for name in names]
        grads = [weight.grad for weight in weights if weight.grad is not None]
        for name, weight in zip(names, weights, strict=True):
            saved = self._saved.get(name)
            layout = (weight.dtype, weight.device, weight.stride())
            if saved is None or (saved.dtype, saved.device, saved.stride()) != layout:
                self._saved[name] = torch.empty_like(weight)
        perturb_(
            weights,
            grads,
            self.gamma,
            saved=[self._saved[name] for name in names],
            scope=self.scope,
            eps=self.eps,
        )
        self._active += names

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the weights back, bit for bit; nothing happens if they are not perturbed."""
        groups: dict[torch.dtype, list[str]] = {}
        for name in self._active:
            groups.setdefault(self.parameters[name].dtype, []).append(name)
        for names in groups.values():
            restore_([self.parameters[name] for name in names], [self._saved[name] for name in names])
        self._active = []
        torch.clear_autocast_cache()

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """A block with w + v in place of w; on leaving it, also by an exception, w is back bit for bit.

        Raises:
            RuntimeError: no gradient to follow, or the blocks are nested.
        """
        self.perturb_()
        try:
            yield
        finally:
            self.restore_()

    @torch.no_grad()
    def displacement(self) -> dict[str, Tensor]:
        """What the weights were moved by, inside `perturbed()`: name to tensor of the weight's shape."""
        return {name: self.parameters[name] - self._saved[name] for name in self._active}

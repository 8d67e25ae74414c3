"""A model whose weights move, beside the one it was copied from, which stays as it is."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from awp_engine.landscape.directions import Direction
from awp_kernels import perturb_into_, restore_

# perturb_into_ scales a direction by gamma ||w|| / (||g|| + eps). With gamma and eps this power of two, that is exactly
# ||w||, as ||g|| is lost in the sum: displacements that are normalised already are taken as they are.
_SWAMPING = 2.0**100


class WorkingCopy:
    """A copy of a model in eval mode whose weights `move_` sets to w + v; w itself, the master, is only read.

    Args:
        model: any module on one device; neither it nor its buffers are changed.

    Attributes:
        model: the copy.
        weights: the master's parameters by name, detached.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.model = copy.deepcopy(model).eval()
        self._moving = dict(self.model.named_parameters())
        self._moved: list[str] = []

    def parameters(self, names: Mapping[str, object]) -> list[nn.Parameter]:
        """The copy's parameters of these names, in their order.

        Raises:
            ValueError: a name that the model does not have.
        """
        for name in names:
            if name not in self._moving:
                raise ValueError(f"direction: the model has no parameter {name!r}; make the direction from this model")
        return [self._moving[name] for name in names]

    @torch.no_grad()
    def reset_(self) -> None:
        """Set the copy's weights to the master's bits."""
        if self._moved:
            restore_([self._moving[name] for name in self._moved], [self.weights[name] for name in self._moved])
        self._moved = []

    @torch.no_grad()
    def _take(self, tensors: Mapping[str, Tensor], gamma: float, scope: str, eps: float) -> None:
        out = self.parameters(tensors)
        if self._moved != list(tensors):
            self.reset_()
        found_inf = torch.zeros((), device=next(self.model.parameters()).device)
        weights = [self.weights[name] for name in tensors]
        # before they are: an interrupt may come in between
        self._moved = list(tensors)
        perturb_into_(out, weights, list(tensors.values()), gamma, scope=scope, eps=eps, found_inf=found_inf)
        if found_inf:
            # it leads nowhere: what is measured there is NaN, not as flat as w itself
            for tensor in out:
                tensor.detach().fill_(torch.nan)

    def move_(self, direction: Direction, amount: float) -> None:
        """Set the copy to w + amount ||w|| d / ||d||, norms by filter or by layer as the direction says.

        As all moves, to NaN where that is not finite.

        Raises:
            ValueError: names, shapes or devices that are not the model's.
        """
        self._take(direction.tensors, amount, direction.scope, 1e-20)

    def move_in_plane_(self, first: Direction, a: float, second: Direction, b: float) -> None:
        """Set the copy to w + a ||w|| d1 / ||d1|| + b ||w|| d2 / ||d2||, all norms being those of w, d1 and d2.

        The directions may differ in scope. They are not made orthogonal.

        Raises:
            ValueError: the directions are of different parameters.
        """
        if first.tensors.keys() != second.tensors.keys():
            raise ValueError("second: expected a direction of the same parameters as the first")
        x, y = self.relative(first), self.relative(second)
        self.move_relative_({name: a * x[name] + b * y[name] for name in x})

    def move_relative_(self, displacement: Mapping[str, Tensor]) -> None:
        """Set the copy to w + ||w_l|| r_l for every tensor l of `displacement`.

        Args:
            displacement: name to r_l, of the weight's shape.
        """
        self._take(displacement, _SWAMPING, "layer", _SWAMPING)

    @torch.no_grad()
    def largest_move(self) -> float:
        """The largest ||w'_l - w_l|| / ||w_l|| of the copy's tensors w'_l as they are, in fp64."""
        moves = [0.0]
        for name in self._moved:
            weight = self.weights[name].double()
            moves.append(((self._moving[name].double() - weight).norm() / weight.norm().clamp_min(1e-300)).item())
        return max(moves)

    @torch.no_grad()
    def relative(self, direction: Direction) -> dict[str, Tensor]:
        """A direction's displacement for the amount 1 in units of ||w_l||: what `move_relative_` takes.

        Computed in fp64 and rounded once to the weight's dtype.
        """
        shares = {}
        for name, tensor in direction.tensors.items():
            weight, given = self.weights[name], tensor.double()
            length = weight.double().norm().clamp_min(1e-300)
            dims = tuple(range(1, weight.ndim)) if direction.scope == "filter" and weight.ndim > 1 else None
            share = torch.linalg.vector_norm(weight.double(), dim=dims, keepdim=True) / length
            norm = torch.linalg.vector_norm(given, dim=dims, keepdim=True)
            shares[name] = torch.empty_like(weight).copy_(given * (share / (norm + 1e-20)))
        return shares

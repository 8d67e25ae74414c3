"""How far an edit may move weights: three measures, the projection onto each, and the check that nothing passed it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.models.batch_norm import layers
from awp_kernels import perturb_into_, pgd_step_

Kind = Literal["absolute", "relative", "layer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RULES: dict[Kind, str] = {
    "absolute": "no weight moves by more than the budget",
    "relative": "no weight moves by more than the budget times its own size",
    "layer": "no tensor moves by more, in L2, than the budget times its own norm, as AWP measures",
}
BatchNorm = Literal["frozen", "counted"]
_STATISTICS = ("running_mean", "running_var")
# so that sums of squares in any order agree that a layer is inside
_SUMMED = 1e-9
_ROUNDED = 2.0**-24


def budgeted(model: nn.Module, batch_norm: BatchNorm) -> dict[str, Tensor]:
    """What an edit may move, by name: all parameters, and batch normalisation's statistics where they are counted.

    The tensors share the model's memory.

    Raises:
        EvaluationError: weights that the bound would not hold exactly for, or none at all.
    """
    found = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.numel()}
    if batch_norm == "counted":
        names = {module: name for name, module in model.named_modules()}
        for layer in layers(model):
            for name in _STATISTICS:
                if isinstance(value := getattr(layer, name), Tensor):
                    found[f"{names[layer]}.{name}"] = value
    kinds = {tensor.dtype for tensor in found.values()}
    if len(kinds) != 1 or not kinds <= {torch.float32, torch.float64}:
        told = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)) or "none"
        raise EvaluationError(f"model: expected weights of float32 alone or float64 alone, got {told}: convert it")
    return found


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A bound on an edit.

    Attributes:
        kind: "absolute": |dw_i| <= size; "relative": |dw_i| <= size |w_i|; "layer": ||dw_l||_2 <= size ||w_l||_2 for
            every tensor l, biases and normalisation included.
        size: more than 0; in the units of the weights for "absolute", else a fraction.
    """

    kind: Kind
    size: float

    @torch.no_grad()
    def project_(self, weights: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> None:
        """Moves weights back inside, in place; the bound holds for the stored numbers, rounding included.

        Args:
            weights: finite, float32 or float64.
            originals: of the same names, shapes, strides and dtype.
        """
        edited, start = list(weights.values()), list(originals.values())
        if self.kind == "absolute":
            # a step of length 0: what is left is the projection
            ends = (-torch.inf, torch.inf)
            for weight, original in zip(edited, start, strict=True):
                nowhere = torch.zeros_like(weight)[None]
                pgd_step_(
                    weight[None], nowhere, original[None], step_size=0.0, epsilon=self.size, norm="linf", clip=ends
                )
            return
        moves = [weight - original for weight, original in zip(edited, start, strict=True)]
        if self.kind == "relative":
            # by its own length, a move is itself
            length = torch.stack([move.double().norm() for move in moves]).norm().item()
            whole = {"scope": "global", "scale": "absolute", "eps": 0.0}
            perturb_into_(edited, start, moves, length, bound=self.size, **whole)
            return
        shrunk = 0.0
        while outside := [n for n, pair in enumerate(zip(edited, start, strict=True)) if self._beyond(*pair, _SUMMED)]:
            far, of, along = ([tensors[n] for n in outside] for tensors in (edited, start, moves))
            perturb_into_(far, of, along, self.size * (1 - min(shrunk, 1.0)), eps=0.0)
            # the sums are rounded to the weights' precision, mostly by less than that
            shrunk = max(4 * shrunk, _ROUNDED)

    def _beyond(self, weight: Tensor, original: Tensor, margin: float = 0.0) -> bool:
        """Whether a tensor is outside, as fp64 finds it; of what is not finite it is true."""
        move, start = weight.double() - original.double(), original.double()
        if self.kind == "absolute":
            inside = move.abs() <= self.size
        elif self.kind == "relative":
            inside = move.abs() <= self.size * start.abs()
        else:
            inside = move.norm() <= self.size * (1 - margin) * start.norm()
        return not bool(inside.all())

    def require(self, original: nn.Module, edited: nn.Module, batch_norm: BatchNorm) -> None:
        """Makes sure that an edit is inside, and that nothing moved that the budget does not count.

        Args:
            original: the model.
            edited: its copy, edited.
            batch_norm: whether its statistics are counted; all other buffers never are.

        Raises:
            EvaluationError: naming what moved.
        """
        before, after = budgeted(original, batch_norm), budgeted(edited, batch_norm)
        for name, weight in after.items():
            if self._beyond(weight, before[name]):
                raise EvaluationError(f"{name}: the edit left its {self.kind} budget of {self.size:g}: report this")
        buffers = dict(edited.named_buffers())
        for name, buffer in original.named_buffers():
            if name not in before and not torch.equal(buffers[name], buffer):
                raise EvaluationError(f"{name}: a buffer that no budget counts was moved by the edit: report this")

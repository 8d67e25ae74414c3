"""What a perturbation is told beside its tensors."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from awp_kernels import _checks
from awp_kernels._ball import working_dtype

SCHEMA = "float gamma, str scope, float eps, str scale, float eta, float? bound, bool[] adaptive, Tensor? weight_norms"


def filters(tensor: Tensor) -> int:
    """Filters of a tensor: entries of dimension 0, or 1 below two dimensions."""
    return tensor.shape[0] if tensor.ndim > 1 else 1


class Rule(NamedTuple):
    """Where weights move to: what follows the tensors in schemas, and what every backend takes."""

    gamma: float
    scope: str
    eps: float
    scale: str
    eta: float
    bound: float | None
    adaptive: Sequence[bool]
    weight_norms: Tensor | None

    def check(self, weights: list[Tensor]) -> dict[str, list[Tensor]]:
        """Refuse what does not fit; returns the numbers that lie on the device."""
        if not weights:
            raise ValueError("weights: expected at least one tensor, got an empty list")
        _checks.one_of("scope", self.scope, _checks.SCOPES)
        _checks.finite("gamma", self.gamma)
        _checks.finite("eps", self.eps, minimum=0)
        _checks.scaling(self.scale, self.eta, self.bound)
        _checks.adaptive_flags(self.adaptive, weights, self.scale)
        return self.numbers(weights)

    def numbers(self, weights: list[Tensor]) -> dict[str, list[Tensor]]:
        """The numbers that lie on the device, checked."""
        if self.weight_norms is None:
            return {}
        _checks.weight_norms(self.weight_norms, weights, self.scope, self.scale)
        return {"weight_norms": [self.weight_norms]}

    def scales_like(self, weights: list[Tensor]) -> Tensor:
        """What a traced call returns, where the weights are fake."""
        self.numbers(weights)
        counts = {"layer": len(weights), "global": 1, "filter": sum(filters(weight) for weight in weights)}
        return weights[0].new_empty(counts[self.scope], dtype=working_dtype(weights[0].dtype))

"""Optimizers over masters, which follow the gradients of working copies."""

from typing import Any

from torch import Tensor


class WorkingGradients:
    """The gradients that an optimizer follows.

    Attributes:
        working: by parameter, its working copy.
    """

    working: dict[Tensor, Tensor]
    param_groups: list[dict[str, Any]]

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """What a parameter follows: its working copy's gradient where there is one, else its own."""
        copied = self.working.get(parameter)
        return parameter.grad if copied is None or copied.grad is None else copied.grad

    def gradients(self) -> list[Tensor]:
        """All gradients that there are, as they are (still scaled): for `total_norm`."""
        found = (self.gradient(parameter) for group in self.param_groups for parameter in group["params"])
        return [gradient for gradient in found if gradient is not None]

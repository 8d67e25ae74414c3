"""What a benchmark times, and how its result is checked first."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from awp_kernels import _backend


@dataclass(frozen=True)
class Workload:
    """One operation on one set of inputs.

    Attributes:
        bytes_moved: the least: every input read once, every output written once.
        reset: puts the inputs back and poisons what is only written.
        calls: by implementation, what is timed.
        wrong: by how much the last call missed the definition, in the unit of `tolerance`.
        tolerance: by implementation, how much is right; "" stands for all others.
        missing: by implementation, why it cannot run here.
    """

    bytes_moved: int
    reset: Callable[[], None]
    calls: dict[str, Callable[[], object]]
    wrong: Callable[[], float]
    tolerance: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)

    def check(self, implementation: str) -> None:
        """Run once and refuse a wrong result: a fast wrong answer is not worth a number.

        Raises:
            AssertionError: the result differs from the definition by more than the tolerance.
        """
        self.reset()
        self.calls[implementation]()
        wrong, allowed = self.wrong(), self.tolerance.get(implementation, self.tolerance[""])
        # the comparison this way round, so that NaN fails
        if not wrong <= allowed:
            raise AssertionError(
                f"{implementation}: the result is wrong by {wrong:.3g}, allowed {allowed:g}; not timed"
            )


def own_implementations(device: str) -> list[str]:
    """This package's that can run here, the plain one last; Triton's interpreter for CPU tensors is none to time."""
    names = [name for name in _backend.BACKENDS if _backend.problem(name, device) is None]
    return sorted((n for n in names if (n, device) != ("triton", "cpu")), key=lambda name: name == "reference")


def distance(results: list[Tensor], exact: list[Tensor]) -> float:
    """Norm of the difference over all tensors, in fp64; NaN stays NaN."""
    pairs = zip(results, exact, strict=True)
    return float(torch.stack([((r.double() - e.double()) ** 2).sum() for r, e in pairs]).sum().sqrt())

"""Annealing self-distillation rectification (ADR)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine.config import ConfigError
from awp_engine.step.objectives.adversarial_training import AdversarialTraining
from awp_engine.step.objectives.objective import Objective, at_least_fp32
from awp_engine.step.objectives.trades import Trades


def _ends(name: str, value: Any, most: float) -> tuple[float, float]:
    """Where a scalar starts and ends: two finite numbers > 0, at most `most`."""
    numbers = isinstance(value, tuple | list) and all(type(number) in (int, float) for number in value)
    if not numbers or len(value) != 2 or not all(0 < number <= most for number in value):
        bounds = "> 0" if most > 1 else "> 0, at most 1"
        raise ConfigError(f"--method-args: {name}: expected two numbers {bounds}, start and end, got {value!r}")
    return value[0], value[1]


class _Rectified(Objective):
    """Labels mixed with what the average of the weights says of the clean images, less where that is wrong.

    P_t = softmax(f_ema(x) / tau); lambda_i = clip(lambda - (max P_t - P_t[y]), 0, 1); the target of image i is
    lambda_i P_t + (1 - lambda_i) onehot(y). tau and lambda go from start to end by half a cosine over the run.
    """

    uses_average = True

    def _anneal(self, tau: Any, lam: Any, device: torch.device | None) -> None:
        self._tau_ends, self._lam_ends = _ends("tau", tau, 1e6), _ends("lam", lam, 1.0)
        # read by captured steps
        self.tau, self.lam = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))

    def begin_step(self, done: float, epoch: int, step: int) -> None:
        """Write tau and lambda of this step."""
        for scalar, (start, end) in ((self.tau, self._tau_ends), (self.lam, self._lam_ends)):
            scalar.fill_(end + (start - end) * (1 + math.cos(math.pi * done)) / 2)

    def targets(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Rectified labels, [N, classes], for y int64 [N]."""
        assert self.average is not None
        told = (at_least_fp32(self.average(x)) / self.tau).softmax(1)
        right = y.unsqueeze(1)
        share = (self.lam - (told.amax(1, keepdim=True) - told.gather(1, right))).clamp(0, 1)
        return (share * told).scatter_add_(1, right, 1 - share)


class Adr(_Rectified, AdversarialTraining):
    """Cross-entropy on the attacked images with rectified labels, which the attack climbs as well.

    Args:
        tau: temperature of the average's answers, at the start and at the end of the run, > 0.
        lam: lambda, the largest share of those in a label, likewise, in (0, 1].
        device: of the model.

    Raises:
        ConfigError: another tau or lam.

    Source: Wu, Wang, Chen: Annealing Self-Distillation Rectification Improves Adversarial Training, ICLR 2024.
    """

    def __init__(self, tau: Any = (2.5, 2.0), lam: Any = (0.7, 0.95), device: torch.device | None = None) -> None:
        super().__init__()
        self._anneal(tau, lam, device)


class AdrTrades(_Rectified, Trades):
    """TRADES whose clean cross-entropy has rectified labels; the attack climbs the divergence, as in TRADES.

    Args:
        beta: weight of the divergence.
        tau, lam, device: as in `Adr`.

    Raises:
        ConfigError: as in `Adr`.
    """

    def __init__(
        self,
        beta: float = 6.0,
        tau: Any = (2.5, 1.5),
        lam: Any = (0.7, 0.85),
        device: torch.device | None = None,
    ) -> None:
        super().__init__(beta)
        self._anneal(tau, lam, device)

"""SCORE: squared errors of probabilities in place of cross-entropy and divergence, clipped from below.

Source: Pang, Lin, Yang, Zhu, Yan: Robustness and Accuracy Could Be Reconcilable by (Proper) Definition, ICML 2022, and
its public code, P2333/SCORE, where they are called LSE.
"""

from typing import Any

from torch import Tensor, nn

from awp_engine.attack import Loss
from awp_engine.attack.losses import label_probabilities
from awp_engine.config import ConfigError
from awp_engine.config.schema import show
from awp_engine.step.objectives.objective import Objective, at_least_fp32


def probabilities(logits: Tensor) -> Tensor:
    """Of logits [N, classes], at least fp32."""
    return at_least_fp32(logits).softmax(1)


def squared_error(p: Tensor, q: Tensor) -> Tensor:
    """||p - q||^2 of every sample, [N], for probabilities [N, classes]."""
    return (p - q).square().sum(1)


class SquaredErrorFrom:
    """Summed ||softmax(logits) - p||^2, which an attack climbs.

    Args:
        target: p, [N, classes], which does not move with the attacked images; None: the labels, as probabilities.
    """

    def __init__(self, target: Tensor | None = None) -> None:
        self.target = target

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits [N, classes]."""
        p = probabilities(logits)
        return squared_error(p, shares(labels, p) if self.target is None else self.target).sum()


def shares(labels: Tensor, like: Tensor, smoothing: float = 0.0) -> Tensor:
    """Labels, int64 [N] or of mixtures [N, classes], as probabilities; `smoothing` is spread over all classes."""
    return (1 - smoothing) * label_probabilities(labels, like) + smoothing / like.shape[1]


class Score(Objective):
    """The squared error of the attacked answer, as far as it is more than that of an answer which is sure enough.

    Args:
        label_smoothing: part of a label that is spread over all classes, in [0, 1).
        clip: c, in [0, 1): an answer that gives the right class 1 - c, and the others equal parts, has a loss of 0, and
            so has every better one.

    Raises:
        ConfigError: another clip.
    """

    def __init__(self, label_smoothing: float = 0.0, clip: Any = 0.0) -> None:
        if type(clip) not in (int, float) or not 0 <= clip < 1:
            raise ConfigError(f"--method-args: clip: expected a number >= 0 and < 1, got {show(clip)}")
        self.label_smoothing, self.clip = label_smoothing, clip

    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Loss:
        """Summed ||p(x') - y||^2, neither smoothed nor clipped."""
        return SquaredErrorFrom()

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """relu(||p(x') - y||^2 - c^2 - c^2 / (classes - 1))."""
        logits = model(x_adv)
        p = probabilities(logits)
        return self.clipped(squared_error(p, shares(y, p, self.label_smoothing)), p), logits

    def clipped(self, losses: Tensor, p: Tensor) -> Tensor:
        """What losses [N] have above the bound for answers p [N, classes]."""
        return (losses - self.clip**2 * (1 + 1 / (p.shape[1] - 1))).relu()


class ScoreTrades(Score):
    """The squared error of the clean answer, and beta times that between both answers, clipped together.

    Args:
        beta: weight of the error between attacked and clean answers.
        label_smoothing, clip: as in `Score`.

    Raises:
        ConfigError: as in `Score`.
    """

    def __init__(self, beta: float = 6.0, label_smoothing: float = 0.0, clip: Any = 0.0) -> None:
        super().__init__(label_smoothing, clip)
        self.beta = beta

    def attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Loss:
        """Summed ||p(x') - p(x)||^2; the clean answers are computed once."""
        return SquaredErrorFrom(probabilities(model(x)))

    def losses(self, model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """||p(x) - y||^2 + beta ||p(x') - p(x)||^2, with gradients through both, clipped as `Score` does."""
        logits_adv, logits = model(x_adv), model(x)
        adv, clean = probabilities(logits_adv), probabilities(logits)
        natural = squared_error(clean, shares(y, clean, self.label_smoothing))
        return self.clipped(natural + self.beta * squared_error(adv, clean), clean), logits_adv

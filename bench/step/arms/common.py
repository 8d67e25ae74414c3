"""What all arms share: the settings of a step, how much work it is, and what an arm has to offer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from awp_engine.config import AttackConfig, AwpConfig, Config, parse_amount
from awp_engine.data import Batch
from awp_engine.models import build_model
from awp_engine.train.cost import forward_units
from awp_kernels import use_backend

NUM_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training step, as every arm is to make it.

    Attributes:
        model: a name of `build_model`.
        method: "at", "at-awp" or "trades-awp".
        batch_size: images a step.
        device: "cpu" or "cuda".
        engine: settings of awp_engine by their dotted names; the other arms choose for themselves.
        epsilon, step_size, steps: of the Linf attack, on pixels in [0, 1].
        gamma: length of the weight perturbation relative to the weights.
        beta: weight of TRADES' divergence.
        lr, momentum, weight_decay: of SGD.
    """

    model: str
    method: str
    batch_size: int
    device: str = "cpu"
    engine: Mapping[str, object] = field(default_factory=dict)
    epsilon: str = "8/255"
    step_size: str = "2/255"
    steps: int = 10
    gamma: float = 0.005
    beta: float = 6.0
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4

    @property
    def trades(self) -> bool:
        """Whether the divergence of TRADES is climbed and minimised, not the cross-entropy."""
        return self.method == "trades-awp"

    @property
    def perturbs_weights(self) -> bool:
        """Whether the step has an ascent."""
        return self.method.endswith("-awp")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W]"""
        return (1, 8, 8) if self.model == "preact-resnet-digits" else (3, 32, 32)

    @property
    def ball(self) -> tuple[float, float]:
        """Radius and step size as numbers."""
        return float(parse_amount(self.epsilon)), float(parse_amount(self.step_size))

    def build_model(self) -> nn.Module:
        """The same weights in every arm: in train mode, on the CPU."""
        torch.manual_seed(0)
        channels = self.image_shape[0]
        return build_model(self.model, NUM_CLASSES, (0.5,) * channels, (0.25,) * channels).train()


def necessary_units(settings: Settings) -> int:
    """Forward passes' worth of work that the method needs in a step, whoever makes it.

    As training's log counts it: 2 K + 3 for AT, 2 K + 6 for AT-AWP, 2 K + 13 for TRADES-AWP.
    """
    config = Config(
        method="trades" if settings.trades else "at",
        attack=AttackConfig(epsilon=settings.epsilon, steps=settings.steps),
        awp=AwpConfig(gamma=settings.gamma if settings.perturbs_weights else 0.0),
    )
    return int(forward_units(config))


class Arm(Protocol):
    """A way to make the step.

    Attributes:
        model: what is trained.
        memory_format: how the images are to be laid out.
    """

    model: nn.Module
    memory_format: torch.memory_format

    def step(self, batch: Batch, index: int) -> object:
        """One training step; `index` counts them.

        Its parts are `awp_engine.observe.regions`: attack, ascent, descent, update.
        """
        ...


class PlainArm(ABC):
    """A step that this package has no part in.

    Args:
        settings: of the step.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def start(self, x: Tensor) -> Tensor:
        """Where the attack begins."""
        if self.settings.trades:
            return x + 0.001 * torch.randn_like(x)
        epsilon = self.settings.ball[0]
        return (x + torch.empty_like(x).uniform_(-epsilon, epsilon)).clamp_(0, 1)

    def step(self, batch: Batch, index: int) -> None:
        """One training step, see `Arm`."""
        # the models' layers are then torch's own
        with use_backend("reference"):
            self._step(batch)

    @abstractmethod
    def _step(self, batch: Batch) -> None: ...


def is_moved(name: str, parameter: Tensor) -> bool:
    """Which parameters the paper perturbs."""
    return parameter.ndim > 1 and "weight" in name

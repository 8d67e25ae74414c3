"""Training that learns from a frozen network, which --teacher.weights names: RSLAD and HAT.

- Zi, Zhao, Ma, Jiang: Revisiting Adversarial Robustness Distillation: Robust Soft Labels Make Student Better, ICCV
  2021, and its public code (zibojia/RSLAD).
- Rade, Moosavi-Dezfooli: Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off, ICLR 2022,
  and its public code (imrahulr/hat at 3177a4f).

What differs from their code stands in docs/methods.md. Not run here.
"""

import dataclasses

from awp_engine.config.presets.paper import paper
from awp_engine.config.presets.preset import Preset
from awp_engine.config.settings import Config, ModelConfig, OptimizerConfig


def _base(method: str) -> Config:
    """The attack of TRADES, and images as they are."""
    base = paper("cifar10", "preact-resnet-18", "trades", awp=False)
    return dataclasses.replace(base, method=method, model=ModelConfig(name="preact-resnet-18", normalize="none"))


def rslad() -> Config:
    """RSLAD of 300 epochs; its teacher is TRADES' published WRN-34-10. Its mean over classes is beta = 1/10."""
    optimizer = OptimizerConfig(lr=0.1, weight_decay=2e-4, milestones=(215.0, 260.0, 285.0))
    return dataclasses.replace(_base("rslad"), beta=0.1, optimizer=optimizer, epochs=300)


def hat() -> Config:
    """HAT of 50 epochs; its frozen network is the same one, trained for 50 epochs on clean images."""
    optimizer = OptimizerConfig(
        lr=0.21, weight_decay=5e-4, nesterov=True, schedule="one-cycle-cosine", warmup=12.5, cycle_momentum=True
    )
    return dataclasses.replace(_base("hat"), beta=2.5, optimizer=optimizer, epochs=50)


PRESETS: dict[str, Preset] = {
    "cifar10-preact-resnet18-rslad": ("RSLAD on CIFAR-10, with a teacher.", rslad),
    "cifar10-preact-resnet18-hat": ("HAT on CIFAR-10, with a teacher.", hat),
}

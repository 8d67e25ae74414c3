"""SCORE: squared errors of probabilities in place of cross-entropy and divergence.

Pang, Lin, Yang, Zhu, Yan: Robustness and Accuracy Could Be Reconcilable by (Proper) Definition, ICML 2022, and its
public code (P2333/SCORE at e82f442). What differs from their code stands in docs/methods.md. Not run here.
"""

import dataclasses

from awp_engine.config.presets.generated import wang
from awp_engine.config.presets.paper import paper
from awp_engine.config.presets.preset import Preset
from awp_engine.config.settings import Config


def clipped() -> Config:
    """SCORE on attacked images, clipped at 0.4, 110 epochs at half the usual rate."""
    base = paper("cifar10", "preact-resnet-18", "at", awp=False)
    return dataclasses.replace(
        base,
        method="score",
        method_args=("clip=0.4",),
        optimizer=dataclasses.replace(base.optimizer, lr=0.05, milestones=(100.0, 105.0)),
        epochs=110,
    )


def generated() -> Config:
    """Squared errors in the form of TRADES with 70% of every batch generated, in Wang's settings, which began here.

    beta is that of the released network; the README's command has 4.
    """
    base = wang("cifar10", "28-10", 512, 400, awp=False)
    return dataclasses.replace(base, method="score-trades", beta=3.0, label_smoothing=0.0)


PRESETS: dict[str, Preset] = {
    "cifar10-preact-resnet18-score": ("SCORE on CIFAR-10, Linf 8/255.", clipped),
    "cifar10-wrn-28-10-score-trades-ddpm": ("SCORE-TRADES, 1M images by DDPM.", generated),
}

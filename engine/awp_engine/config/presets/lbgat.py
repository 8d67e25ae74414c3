"""LBGAT: a ResNet-18 that is trained along on clean images guides the classifier at attacked ones.

Source: Cui, Liu, Wang, Jia: Learnable Boundary Guided Adversarial Training, ICCV 2021, and its public code,
dvlab-research/LBGAT. Not run here.
"""

import dataclasses
import functools

from awp_engine.config.presets.paper import paper
from awp_engine.config.presets.preset import TITLES, Preset
from awp_engine.config.settings import Config, ModelConfig, OptimizerConfig


def lbgat(data: str, *, awp: bool) -> Config:
    """LBGAT of WRN-34-10; on CIFAR-10 without the divergence of TRADES (beta 0), as the published weights' names say.

    What differs from the public code, which is for CIFAR-100:

    - Epsilon and step size are 8/255 and 2/255, there 0.031 and 0.007.
    - The network that is trained along is a pre-activation ResNet-18, there a post-activation one.
    - 2% of the images are held out and choose the epoch; the authors published weights near epoch 91. Their last,
      smaller batch is left out.
    - [?] All of CIFAR-10, whose script is not public; it is CIFAR-100's here.
    - [?] All of AWP, whose variant is not public: gamma and warm-up are those of the AWP paper for TRADES.

    Args:
        data: "cifar10" or "cifar100".
        awp: with weight perturbation.
    """
    return dataclasses.replace(
        paper(data, "wrn-34-10", "trades", awp=awp),
        method="lbgat",
        beta=0.0 if data == "cifar10" else 6.0,
        model=ModelConfig(name="wrn-34-10", normalize="none"),
        # 0.02 in the first epoch
        optimizer=OptimizerConfig(
            lr=0.1, weight_decay=2e-4, milestones=(75.0, 90.0), warmup=1, warmup_lr=0.02, per_epoch=True
        ),
        epochs=100,
    )


PRESETS: dict[str, Preset] = {
    f"{data}-wrn-34-10-lbgat{'-awp' if awp else ''}": (
        f"LBGAT{'-AWP' if awp else ''} on {TITLES[data]}, Linf 8/255.",
        functools.partial(lbgat, data, awp=awp),
    )
    for data in ("cifar10", "cifar100")
    for awp in (False, True)
}

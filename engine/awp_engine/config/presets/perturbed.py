"""Other perturbations of the weights."""

import dataclasses

from awp_engine.config.presets.paper import paper
from awp_engine.config.presets.preset import Preset
from awp_engine.config.settings import (
    AwpConfig,
    Config,
    EvaluationConfig,
)


def rwp() -> Config:
    """AT-RWP: ten ascent steps by the samples with a loss below 1.7 (Yu et al., IJCAI 2022)."""
    base = paper("cifar10", "preact-resnet-18", "at", awp=True)
    return dataclasses.replace(base, awp=AwpConfig(gamma=0.01, scope="global", ascent_steps=10, c_min=1.7))


def shared_ascent() -> Config:
    """AT-AWP with the ascent gradient of the attack's last pass: one unit of work instead of three."""
    base = paper("cifar10", "preact-resnet-18", "at", awp=True)
    return dataclasses.replace(base, awp=AwpConfig(gamma=0.01, ascent="shared"))


def sam() -> Config:
    """SAM: clean images, and a perturbation of length rho = 0.05 over the whole model (Foret et al., ICLR 2021)."""
    base = paper("cifar10", "preact-resnet-18", "at", awp=False)
    return dataclasses.replace(
        base,
        # no attack pass is made for a ball of one point
        attack=dataclasses.replace(base.attack, epsilon="0"),
        awp=AwpConfig(gamma=0.05, scope="global", scale="absolute"),
        evaluation=EvaluationConfig(steps=20, step_size="2/255"),
    )


PRESETS: dict[str, Preset] = {
    "cifar10-preact-resnet18-at-awp-shared": ("AT-AWP; the attack gives the ascent.", shared_ascent),
    "cifar10-preact-resnet18-at-rwp": ("AT-RWP: ascent by low losses, 10 steps.", rwp),
    "cifar10-preact-resnet18-sam": ("SAM: clean images, rho = 0.05.", sam),
}

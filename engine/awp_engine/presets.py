"""Named starting points of the command line; each is a function that returns a `Config`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

from awp_engine.config import (
    AttackConfig,
    AwpConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    show,
)


def digits() -> Config:
    """AT-AWP on scikit-learn's 8x8 handwritten digits; under two minutes on two CPU cores."""
    # Chosen on the held-out part of the training set, never on the test split.
    return Config(
        preset="digits",
        data=DataConfig(name="digits", held_out_fraction=0.1, pad=1, flip=False),
        model=ModelConfig(name="preact-resnet-digits", width=16),
        attack=AttackConfig(norm="linf", epsilon="0.2", step_size="0.08", steps=5),
        awp=AwpConfig(gamma=0.005),
        optimizer=OptimizerConfig(lr=0.2, schedule="cosine"),
        evaluation=EvaluationConfig(steps=20, evaluate_every=2),
        epochs=50,
        batch_size=128,
    )


def digits_at() -> Config:
    """The same without weight perturbation."""
    return dataclasses.replace(digits(), preset="digits-at", awp=AwpConfig(gamma=0.0))


def cifar10_preact_resnet18_at() -> Config:
    """Adversarial training of PreActResNet-18 on CIFAR-10, Linf 8/255."""
    # Wu, Xia, Wang 2020, table 1 and public code. 1,000 training images are held out, as Rice, Wong, Kolter 2020 do.
    return Config(
        preset="cifar10-preact-resnet18-at",
        data=DataConfig(name="cifar10", held_out_fraction=0.02, pad=4, flip=True),
        model=ModelConfig(name="preact-resnet-18"),
        attack=AttackConfig(norm="linf", epsilon="8/255", step_size="2/255", steps=10),
        awp=AwpConfig(gamma=0.0),
        optimizer=OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-4, milestones=(0.5, 0.75)),
        evaluation=EvaluationConfig(steps=20, step_size="2/255"),
        epochs=200,
        batch_size=128,
        log_interval=30.0,
    )


def cifar10_preact_resnet18_at_awp() -> Config:
    """AT-AWP of PreActResNet-18 on CIFAR-10, Linf 8/255, gamma 0.01."""
    base = cifar10_preact_resnet18_at()
    return dataclasses.replace(base, preset="cifar10-preact-resnet18-at-awp", awp=AwpConfig(gamma=0.01))


def cifar10_preact_resnet18_at_awp_paper() -> Config:
    """The same as the paper's public code computes it: its BN forwards, and decay on w + gamma v."""
    base = cifar10_preact_resnet18_at_awp()
    awp = AwpConfig(gamma=0.01, public_code=True)
    return dataclasses.replace(base, preset="cifar10-preact-resnet18-at-awp-paper", awp=awp)


def cifar10_preact_resnet18_at_awp_l2() -> Config:
    """AT-AWP of PreActResNet-18 on CIFAR-10, L2 128/255."""
    return dataclasses.replace(
        cifar10_preact_resnet18_at_awp(),
        preset="cifar10-preact-resnet18-at-awp-l2",
        attack=AttackConfig(norm="l2", epsilon="128/255", step_size="15/255", steps=10),
        evaluation=EvaluationConfig(steps=20, step_size="15/255"),
    )


def cifar10_wrn_34_10_at_awp() -> Config:
    """AT-AWP of WRN-34-10 on CIFAR-10, Linf 8/255."""
    base = cifar10_preact_resnet18_at_awp()
    return dataclasses.replace(base, preset="cifar10-wrn-34-10-at-awp", model=ModelConfig(name="wrn-34-10"))


def cifar100_preact_resnet18_at_awp() -> Config:
    """AT-AWP of PreActResNet-18 on CIFAR-100, Linf 8/255."""
    base = cifar10_preact_resnet18_at_awp()
    data = dataclasses.replace(base.data, name="cifar100")
    return dataclasses.replace(base, preset="cifar100-preact-resnet18-at-awp", data=data)


DEFAULT = "digits"

PRESETS: dict[str, Callable[[], Config]] = {
    "digits": digits,
    "digits-at": digits_at,
    "cifar10-preact-resnet18-at": cifar10_preact_resnet18_at,
    "cifar10-preact-resnet18-at-awp": cifar10_preact_resnet18_at_awp,
    "cifar10-preact-resnet18-at-awp-paper": cifar10_preact_resnet18_at_awp_paper,
    "cifar10-preact-resnet18-at-awp-l2": cifar10_preact_resnet18_at_awp_l2,
    "cifar10-wrn-34-10-at-awp": cifar10_wrn_34_10_at_awp,
    "cifar100-preact-resnet18-at-awp": cifar100_preact_resnet18_at_awp,
}


def build_preset(name: str) -> Config:
    """The configuration of a preset.

    Raises:
        ConfigError: for a name that is not in `PRESETS`, with the nearest one.
    """
    if name in PRESETS:
        return PRESETS[name]()
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists them"
    raise ConfigError(f"preset: expected one of {', '.join(PRESETS)}, got {show(name)}; {hint}")

"""Presets that run anywhere: scikit-learn's handwritten digits."""

import functools

from awp_engine.config.presets.preset import Preset
from awp_engine.config.settings import (
    AttackConfig,
    AwpConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
)


def digits(method: str = "at", gamma: float = 0.005) -> Config:
    """scikit-learn's 8x8 handwritten digits, Linf 0.2; under two minutes on two CPU cores."""
    # Chosen on the held-out part of the training set, never on the test split.
    trained_by_divergence = method != "at"
    return Config(
        method=method,  # pyright: ignore[reportArgumentType]
        data=DataConfig(name="digits", held_out_fraction=0.1, pad=1, flip=False),
        model=ModelConfig(name="preact-resnet-digits", width=16),
        attack=AttackConfig(
            norm="linf",
            epsilon="0.2",
            step_size="0.08",
            steps=5,
            bn_mode="eval" if trained_by_divergence else "train",
            start="normal" if trained_by_divergence else "uniform",
        ),
        awp=AwpConfig(gamma=gamma, warmup=5 if trained_by_divergence else 0),
        optimizer=OptimizerConfig(lr=0.2, schedule="cosine"),
        evaluation=EvaluationConfig(steps=20, evaluate_every=2),
        epochs=50,
        global_batch_size=128,
    )


PRESETS: dict[str, Preset] = {
    "digits": ("AT-AWP on handwritten digits.", digits),
    "digits-at": ("The same without weight perturbation.", functools.partial(digits, gamma=0.0)),
    "digits-trades": ("TRADES on the digits.", functools.partial(digits, "trades", 0.0)),
    "digits-trades-awp": ("TRADES-AWP on the digits.", functools.partial(digits, "trades")),
    "digits-mart": ("MART on the digits.", functools.partial(digits, "mart", 0.0)),
    "digits-mart-awp": ("MART-AWP on the digits.", functools.partial(digits, "mart")),
}

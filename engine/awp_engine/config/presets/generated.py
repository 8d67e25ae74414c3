"""Training with generated images."""

import functools

from awp_engine.config.presets.preset import Preset
from awp_engine.config.settings import (
    AttackConfig,
    AverageConfig,
    AwpConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
)


def generated(*, awp: bool) -> Config:
    """TRADES on CIFAR-10 with 70% of every batch generated (--data.extra: EDM's images, 1 to 50 million).

    Source: Wang, Pang, Du, Lin, Liu, Yan: Better Diffusion Models Further Improve Adversarial Training, ICML 2023, and
    its public code (wzekai99/DM-Improves-AT: the README's command, train-wa.py, core/utils). Its 400 epochs are of 98
    steps each, as it counts generated images too; 123 passes over the labelled images are as many steps. There the EMA
    begins after the warm-up, batch normalisation has a momentum of 0.01, images are not normalised, and there is no
    AWP, whose gamma and start (after 10 of the 400) here are the AWP paper's for TRADES.
    """
    return Config(
        # TRADES that asks for extra images
        method="rst",
        beta=5.0,
        label_smoothing=0.1,
        data=DataConfig(name="cifar10", held_out_fraction=0.02, pad=4, flip=True, extra_fraction=0.7),
        model=ModelConfig(name="wrn-28-10", activation="silu"),
        attack=AttackConfig(epsilon="8/255", step_size="2/255", steps=10, bn_mode="train", start="uniform"),
        awp=AwpConfig(gamma=0.005 if awp else 0.0, warmup=3 if awp else 0),
        optimizer=OptimizerConfig(
            lr=0.2, momentum=0.9, weight_decay=5e-4, nesterov=True, schedule="cosine", warmup=0.025 * 123
        ),
        average=AverageConfig(kind="ema", decay=0.995),
        evaluation=EvaluationConfig(steps=20, step_size="2/255"),
        epochs=123,
        global_batch_size=512,
        log_interval=30.0,
    )


PRESETS: dict[str, Preset] = {
    f"cifar10-wrn-28-10-silu-trades{'-awp' if awp else ''}-edm": (
        f"TRADES{'-AWP' if awp else ''}, generated CIFAR-10 images.",
        functools.partial(generated, awp=awp),
    )
    for awp in (False, True)
}

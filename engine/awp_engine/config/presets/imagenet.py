"""ImageNet."""

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


def imagenet(model: str, *, awp: bool) -> Config:
    """224x224 images, Linf 4/255, two steps of Auto-PGD, heavy augmentation; 50 epochs from a clean model.

    Source: Singh, Croce, Hein: Revisiting Adversarial Training for ImageNet, NeurIPS 2023, and its public code
    (nmndeep/revisiting-at: main.py, parserr.py, run_train.sh), whose 80 images a GPU are those of eight GPUs here.
    There layer norms and layer scales decay, and the attack climbs the smoothed loss. The weights to start from are
    given by --model.pretrained. gamma is the AWP paper's for AT on CIFAR-10, not tuned here.
    """
    return Config(
        method="at",
        label_smoothing=0.1,
        data=DataConfig(
            name="imagenet",
            held_out_fraction=0.01,
            image_size=224,
            center_crop=0.875,
            crop="resized",
            crop_scale=0.08,
            flip=True,
            rand_augment=9.0,
            erase=0.25,
            mixup=0.5,
            mixup_alpha=0.8,
            cutmix=0.5,
        ),
        model=ModelConfig(name=model),
        attack=AttackConfig(kind="apgd", epsilon="4/255", step_size="2/255", steps=2, bn_mode="eval", start="none"),
        awp=AwpConfig(gamma=0.01 if awp else 0.0),
        optimizer=OptimizerConfig(
            kind="adamw",
            lr=1e-3,
            momentum=0.9,
            beta2=0.95,
            weight_decay=0.05,
            decay_all=False,
            schedule="cosine",
            warmup=10.0,
        ),
        average=AverageConfig(kind="ema", decay=0.9999),
        # RobustBench takes 5,000 images of ImageNet
        evaluation=EvaluationConfig(steps=10, batch_size=128, held_out_limit=1000, test_limit=5000),
        epochs=50,
        global_batch_size=640,
        micro_batch_size=80,
        checkpoint_steps=500,
        log_interval=30.0,
    )


def _presets() -> dict[str, Preset]:
    presets = {}
    for awp in (False, True):
        suffix, with_awp = ("-awp", "-AWP") if awp else ("", "")
        for short, model in (("convnext-t", "convnext-tiny-convstem"), ("resnet50", "resnet-50")):
            summary = f"AT{with_awp} on ImageNet, Linf 4/255."
            presets[f"imagenet-{short}-at{suffix}"] = (summary, functools.partial(imagenet, model, awp=awp))
    return presets


PRESETS: dict[str, Preset] = _presets()

"""ImageNet with networks of timm's, which training needs and the presets do not.

- ARES: Liu et al.: A Comprehensive Study on Robustness of Image Classification Models, IJCV 2025, and its public code
  (thu-ml/ares at 306e35f, robust_training).
- Singh, Croce, Hein: Revisiting Adversarial Training for ImageNet, NeurIPS 2023, and its public code
  (nmndeep/revisiting-at at d7166c0).

What differs from their code stands in docs/recipes.md.
"""

import dataclasses
import functools

from awp_engine.config.presets.imagenet import imagenet
from awp_engine.config.presets.preset import Preset
from awp_engine.config.settings import AttackConfig, AverageConfig, Config, OptimizerConfig, PrecisionConfig

# what timm's models leave out of weight decay beside tensors of one dimension
_VIT = ("*pos_embed", "*cls_token")
_SWIN = ("*relative_position_bias_table",)


def ares(model: str, no_decay: tuple[str, ...]) -> Config:
    """ARES: Linf 4/255, three steps of 8/765 that grow over five epochs, 300 epochs from random weights.

    [?]: the number of GPUs, of 64 images each, and with it batch size and rate; eight are assumed. [?]: the smallest
    part of an image that a crop takes. Not to be had: the best iterate of an attack, one lot of MixUp or CutMix for a
    batch, RandAugment's deviation of 0.5 and rising severities, choice by clean accuracy, and Swin without timm's
    stochastic depth of 0.1.

    Args:
        model: as `--model.name`.
        no_decay: as `--optimizer.no-decay`.
    """
    base = imagenet(model, awp=False)
    return dataclasses.replace(
        base,
        attack=AttackConfig(epsilon="4/255", step_size="8/765", steps=3, bn_mode="eval", step_warmup=5),
        optimizer=OptimizerConfig(
            kind="adamw",
            lr=5e-4,
            weight_decay=0.05,
            decay_all=False,
            no_decay=no_decay,
            schedule="cosine",
            warmup=5.0,
            warmup_lr=1e-6,
            min_lr=1e-5,
        ),
        average=AverageConfig(kind="ema", decay=0.9998, ramp=False, statistics="averaged"),
        precision=PrecisionConfig(attack="fp32", ascent="fp32", descent="fp32"),
        epochs=300,
        global_batch_size=512,
        micro_batch_size=64,
    )


def revisiting_vit() -> Config:
    """ViT-S by Auto-PGD of two steps; the weights to start from are given by --model.pretrained (`timm`: ImageNet's).

    As `imagenet-convnext-t-at`, with the rates' ends of the public code. [?]: 50 epochs. Not to be had: the
    convolutional stem of the published networks.
    """
    base = imagenet("timm:vit_small_patch16_224", awp=False)
    return dataclasses.replace(
        base,
        optimizer=dataclasses.replace(base.optimizer, warmup_lr=1e-7, min_lr=5e-6),
        average=AverageConfig(kind="ema", decay=0.9999, ramp=False, statistics="averaged"),
    )


PRESETS: dict[str, Preset] = {
    "imagenet-swin-b-at": (
        "AT of ARES on ImageNet, Linf 4/255.",
        functools.partial(ares, "timm:swin_base_patch4_window7_224", _SWIN),
    ),
    "imagenet-convnext-b-at": (
        "AT of ARES on ImageNet, Linf 4/255.",
        functools.partial(ares, "timm:convnext_base", ()),
    ),
    "imagenet-vit-b-at": (
        "AT of ARES on ImageNet, Linf 4/255.",
        functools.partial(ares, "timm:vit_base_patch16_224", _VIT),
    ),
    "imagenet-vit-s-at": ("AT by two steps, ImageNet, Linf 4/255.", revisiting_vit),
}

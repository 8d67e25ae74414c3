"""Networks of the kinds that presets take from timm, for images of 32x32 pixels, small enough for a CPU."""

from torch import nn

from awp_engine.models.import_timm import import_timm


def swin(num_classes: int) -> nn.Module:
    """Two stages of windows, plain and shifted."""
    shape = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    return import_timm().models.SwinTransformer(num_classes=num_classes, **shape)


def vit(num_classes: int) -> nn.Module:
    """One block over four patches."""
    shape = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return import_timm().models.VisionTransformer(num_classes=num_classes, **shape)


def convnext(num_classes: int) -> nn.Module:
    """A block in each of four stages."""
    return import_timm().models.ConvNeXt(num_classes=num_classes, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))

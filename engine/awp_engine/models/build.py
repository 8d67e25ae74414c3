"""Models by name."""

import re
from collections.abc import Sequence

from torch import nn

from awp_engine.config.model_names import TIMM_MODELS, source_of
from awp_engine.models.factories import build_by_factory, build_from_package
from awp_engine.models.given import given_model
from awp_engine.models.layers import Activation, NormalizedClassifier
from awp_engine.models.preact_resnet import PreActBlock, PreActResNet
from awp_engine.models.timm_models import TimmClassifier, TimmConvNeXt, TimmResNet
from awp_engine.models.user_code import load_factory
from awp_engine.models.wide_resnet import WideBlock, WideResNet

model_names = ("preact-resnet-18", "preact-resnet-digits", "wrn-28-10", "wrn-34-10", "wrn-70-16")
"""The models the field compares; `wrn-D-K`, and DeepMind's `dm-wrn-D-K`, are understood for every depth D = 6 n + 4 and
widen factor K."""

timm_names = TIMM_MODELS
"""Models for larger images, which need the package timm."""


def build_model(
    name: str,
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    width: int | None = None,
    activation: Activation = "relu",
    image_size: tuple[int, int] | None = None,
    published: bool = False,
    refit: bool = True,
) -> NormalizedClassifier:
    """Builds a freshly initialised classifier of images in [0, 1].

    Weights are drawn from torch's global generator as in the public code; seed it for a repeatable start.

    Args:
        name: one of `model_names` or `timm_names`, `wrn-D-K` or `dm-wrn-D-K`. `preact-resnet-digits` is for 8x8 images:
            one block in each of three stages. Or `timm:NAME`, `torchvision:NAME`, `package.module:factory` or
            `file.py:factory`, which run the code that they name; the model is then a `WrappedClassifier`.
        num_classes: number of logits.
        mean: one value a channel; their number is the number of input channels.
        std: likewise; images become (x - mean) / std inside.
        width: channels of the first stage; None means 64, 16 for `preact-resnet-digits`, and 96 for ConvNeXt.
        activation: "relu" or "silu"; ConvNeXt has GELU of its own and takes "relu" alone.
        image_size: (height, width), for models that are made for one, such as a ViT; built-in ones take any.
        published: with the weights that timm or torchvision publish, and a new last layer for other classes.
        refit: whether code of one's own that gives another number of logits gets a new last layer; not where its
            own weights are what is measured.

    Raises:
        ValueError: unknown name or activation, a width for a WideResNet, or an argument out of range.
        ConfigError: timm is needed and not installed; no such model or factory; or it fails, or does not fit.
    """
    source = source_of(name)
    if source not in ("built-in", None):
        if width is not None or activation != "relu":
            raise ValueError(f"width and activation: not for {name}; leave them out")
        if source in ("timm", "torchvision"):
            return build_from_package(name, num_classes, mean, std, image_size, published=published)
        if source == "object":
            return build_by_factory(given_model(), name, num_classes, mean, std, image_size, refit=refit)
        built = build_by_factory(load_factory(name)[0], name, num_classes, mean, std, image_size, refit=refit)
        # the call may have imported more
        built.code = load_factory(name)[1]
        return built
    if name == "preact-resnet-18":
        return PreActResNet(num_classes, mean, std, width=64 if width is None else width, activation=activation)
    if name == "preact-resnet-digits":
        width = 16 if width is None else width
        return PreActResNet(num_classes, mean, std, num_blocks=(1, 1, 1), width=width, activation=activation)
    if name in ("resnet-18", "resnet-50"):
        depths = (2, 2, 2, 2) if name == "resnet-18" else (3, 4, 6, 3)
        width, bottleneck = 64 if width is None else width, name == "resnet-50"
        return TimmResNet(
            num_classes, mean, std, depths=depths, width=width, activation=activation, bottleneck=bottleneck
        )
    if name in timm_names:
        if activation != "relu":
            raise ValueError(f"activation: {activation!r} given for {name}, whose activation is GELU; leave it out")
        conv_stem = name.endswith("-convstem")
        return TimmConvNeXt(num_classes, mean, std, width=96 if width is None else width, conv_stem=conv_stem)
    wide = re.fullmatch(r"(dm-)?wrn-(\d{1,4})-(\d{1,4})", name)
    if wide is None:
        raise ValueError(
            f"model: unknown name {name!r}; expected one of {', '.join(model_names + timm_names)}, "
            "wrn-DEPTH-WIDENFACTOR, timm:NAME, torchvision:NAME, package.module:factory or file.py:factory"
        )
    if width is not None:
        raise ValueError(f"width: {width} given for {name}; a WideResNet's width is the last number of its name")
    deepmind = wide[1] is not None
    return WideResNet(int(wide[2]), int(wide[3]), num_classes, mean, std, activation=activation, same_padding=deepmind)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks of a model of `build_model`: what shards are gathered by; none of another module."""
    if isinstance(model, TimmClassifier):
        return model.blocks()
    return [module for module in model.modules() if isinstance(module, (PreActBlock, WideBlock))]

"""Models by name, and published weights into them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from awp_engine.checkpoint import CheckpointError, read_model
from awp_engine.config.model_names import TIMM_MODELS, source_of
from awp_engine.models.class_names import to_json
from awp_engine.models.factories import build_by_factory, build_timm, build_torchvision, load_factory
from awp_engine.models.layers import Activation, NormalizedClassifier
from awp_engine.models.preact_resnet import PreActBlock, PreActResNet
from awp_engine.models.timm_models import TimmClassifier, TimmConvNeXt, TimmResNet
from awp_engine.models.wide_resnet import WideBlock, WideResNet
from awp_engine.models.wrapped import WrappedClassifier

model_names = ("preact-resnet-18", "preact-resnet-digits", "wrn-28-10", "wrn-34-10", "wrn-70-16")
"""The models the field compares; `wrn-D-K` is understood for every depth D = 6 n + 4 and widen factor K."""

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
) -> NormalizedClassifier:
    """Builds a freshly initialised classifier of images in [0, 1].

    Weights are drawn from torch's global generator as in the public code; seed it for a repeatable start.

    Args:
        name: one of `model_names` or `timm_names`, or `wrn-D-K`. `preact-resnet-digits` is for 8x8 images: one block in
            each of three stages. Or `timm:NAME`, `torchvision:NAME`, `package.module:factory` or `file.py:factory`,
            which run the code that they name; the model is then a `WrappedClassifier`.
        num_classes: number of logits.
        mean: one value a channel; their number is the number of input channels.
        std: likewise; images become (x - mean) / std inside.
        width: channels of the first stage; None means 64, 16 for `preact-resnet-digits`, and 96 for ConvNeXt.
        activation: "relu" or "silu"; ConvNeXt has GELU of its own and takes "relu" alone.
        image_size: (height, width), for models that are made for one, such as a ViT; built-in ones take any.
        published: with the weights that timm or torchvision publish, and a new last layer for other classes.

    Raises:
        ValueError: unknown name or activation, a width for a WideResNet, or an argument out of range.
        ConfigError: timm is needed and not installed; no such model or factory; or it fails, or does not fit.
    """
    source = source_of(name)
    if source not in ("built-in", None):
        if width is not None or activation != "relu":
            raise ValueError(f"width and activation: not for {name}; leave them out")
        if source in ("timm", "torchvision"):
            build = build_timm if source == "timm" else build_torchvision
            return build(name, num_classes, mean, std, image_size, published=published)
        return build_by_factory(load_factory(name)[0], name, num_classes, mean, std, image_size)
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
    wide = re.fullmatch(r"wrn-(\d{1,4})-(\d{1,4})", name)
    if wide is None:
        raise ValueError(
            f"model: unknown name {name!r}; expected one of {', '.join(model_names + timm_names)}, "
            "wrn-DEPTH-WIDENFACTOR, timm:NAME, torchvision:NAME, package.module:factory or file.py:factory"
        )
    if width is not None:
        raise ValueError(f"width: {width} given for {name}; a WideResNet's width is the last number of its name")
    return WideResNet(int(wide[1]), int(wide[2]), num_classes, mean, std, activation=activation)


def load_public_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Loads published weights by name, strictly, into a model of `build_model`.

    Accepts names with or without `module.`, and the weights themselves or a dictionary that holds them under
    `state_dict` or `model`; timm's own names, and with the public ImageNet code's `base_model.`, into models around a
    network of timm's. `sub_block1.*` of TRADES' WideResNet, which its forward never uses, and a missing
    `num_batches_tracked`, which PyTorch before 0.4.1 did not have, are no mismatch. On error the model is unchanged.

    Raises:
        ValueError: names or shapes differ; the message names the first few.
    """
    weights = _named(model, state_dict)
    expected = model.state_dict()
    for name in expected:
        if name.endswith(".num_batches_tracked"):
            weights.setdefault(name, expected[name])
    shapes = {n: list(v.shape) if isinstance(v, Tensor) else type(v).__name__ for n, v in weights.items()}
    wanted = {name: list(value.shape) for name, value in expected.items()}
    odd = [name for name in wanted if name in shapes and shapes[name] != wanted[name]]
    problems = [
        *_describe("missing", [name for name in expected if name not in weights]),
        *_describe("unexpected", [name for name in weights if name not in expected]),
        *_describe("wrong shape", [f"{name} {shapes[name]}, expected {wanted[name]}" for name in odd]),
    ]
    if problems:
        raise ValueError(f"state_dict does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(weights, strict=True)


def _named(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Published weights by the names that `model` has for them."""
    for key in ("state_dict", "model"):
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    weights = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if isinstance(model, WideResNet):
        weights = {name: value for name, value in weights.items() if not name.startswith("sub_block1.")}
    if isinstance(model, TimmClassifier):
        bare = ((name.removeprefix("base_model.").removeprefix("network."), value) for name, value in weights.items())
        weights = {f"network.{name}": value for name, value in bare}
    if isinstance(model, WrappedClassifier) and not weights.keys() <= model.state_dict().keys():
        weights = {f"network.{name}": value for name, value in weights.items()}
    return weights


def load_pretrained(model: nn.Module, path: Path, class_names: tuple[str, ...] | None = None) -> list[str]:
    """Start from published weights, by name and strictly; the classifier is left as it is for other classes.

    Args:
        model: one of `build_model`, on any device; written in place.
        path: a safetensors file of timm's names for timm's models, else of the public code's names.
        class_names: of the model's logits, where they have names.

    Returns:
        The names that were left as they are: none, or the classifier's weight and bias, where the file's are for
        another number of classes, for classes of other names, or in another order.

    Raises:
        CheckpointError: not a safetensors file, or names or shapes differ elsewhere; the model is unchanged.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: expected a .safetensors file, since nothing is unpickled; write one by "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)"
        )
    tensors, metadata = read_model(path)
    weights, own, kept = _named(model, tensors), model.state_dict(), []
    if isinstance(model, NormalizedClassifier):
        names = model.classifier_names
        theirs = metadata.get("class_names")
        others = class_names is not None and theirs is not None and theirs != to_json(class_names)
        # nothing but the classes may differ
        if all(n in weights and weights[n].shape[1:] == own[n].shape[1:] for n in names) and (
            others or any(weights[n].shape != own[n].shape for n in names)
        ):
            kept = list(names)
            weights |= {name: own[name] for name in names}
    try:
        with torch.no_grad():
            load_public_state_dict(model, weights)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return kept


def blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks of a model of `build_model`: what shards are gathered by; none of another module."""
    if isinstance(model, TimmClassifier):
        return model.blocks()
    return [module for module in model.modules() if isinstance(module, (PreActBlock, WideBlock))]


def _describe(kind: str, names: Sequence[str], shown: int = 3) -> list[str]:
    if not names:
        return []
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return [f"{kind}: {', '.join(names[:shown])}{rest}"]

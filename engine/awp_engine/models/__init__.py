"""Classifiers with the state-dict names of the public AWP and TRADES code, and of timm.

All models take images in [0, 1], [N, C, H, W], and normalise them inside; mean and standard deviation are
non-persistent buffers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awp_engine.models.build import (
        blocks,
        build_model,
        model_names,
        timm_names,
    )
    from awp_engine.models.layers import Activation, NormalizedClassifier, NormalizedImages
    from awp_engine.models.preact_resnet import PreActBlock, PreActResNet
    from awp_engine.models.timm_models import TimmClassifier, TimmConvNeXt, TimmResNet
    from awp_engine.models.weights import LoadedWeights, load_pretrained, load_public_state_dict, load_weights
    from awp_engine.models.wide_resnet import WideBlock, WideResNet
    from awp_engine.models.wrapped import WrappedClassifier

__all__ = [
    "Activation",
    "LoadedWeights",
    "NormalizedClassifier",
    "NormalizedImages",
    "PreActBlock",
    "PreActResNet",
    "TimmClassifier",
    "TimmConvNeXt",
    "TimmResNet",
    "WideBlock",
    "WideResNet",
    "WrappedClassifier",
    "blocks",
    "build_model",
    "load_pretrained",
    "load_public_state_dict",
    "load_weights",
    "model_names",
    "timm_names",
]

_HERE = {
    "build": ("blocks", "build_model", "model_names", "timm_names"),
    "layers": ("Activation", "NormalizedClassifier", "NormalizedImages"),
    "preact_resnet": ("PreActBlock", "PreActResNet"),
    "timm_models": ("TimmClassifier", "TimmConvNeXt", "TimmResNet"),
    "weights": ("LoadedWeights", "load_pretrained", "load_public_state_dict", "load_weights"),
    "wide_resnet": ("WideBlock", "WideResNet"),
    "wrapped": ("WrappedClassifier",),
}


def __getattr__(name: str) -> Any:
    # attacks take layers from here, and files need packages that attacks do without
    for module, names in _HERE.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

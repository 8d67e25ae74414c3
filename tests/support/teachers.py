"""Files of weights to learn from, as runs leave them."""

from pathlib import Path
from typing import Any

import torch

from awp_engine.checkpoint import export_model
from awp_engine.models import NormalizedClassifier
from awp_engine.models.trained import ModelDescription


def write_teacher(path: Path, *, channels: int = 1, seed: int = 3, **changed: Any) -> NormalizedClassifier:
    """A network that has learnt nothing, for ten classes unless `changed` says others; written to `path`."""
    torch.manual_seed(seed)
    given: dict[str, Any] = {
        "num_classes": 10,
        "activation": "relu",
        "width": 2,
        "mean": (0.4,) * channels,
        "std": (0.3,) * channels,
    } | changed
    description = ModelDescription(name="preact-resnet-digits", **given)
    model = description.build()
    export_model(path, model.state_dict(), description.to_metadata())
    return model

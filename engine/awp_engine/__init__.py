"""A training engine for image classifiers that must stay right under attack."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awp_engine.models.trained import load_model
    from awp_engine.objects import audit_concepts, audit_data, audit_weights, evaluate, fit

    __version__: str

__all__ = ["audit_concepts", "audit_data", "audit_weights", "evaluate", "fit", "load_model"]


def __getattr__(name: str) -> Any:
    # torch is imported when it is needed: the command line answers before that
    if name in __all__:
        from awp_engine.cli import missing_packages

        if missing := missing_packages():
            raise ImportError(f"awp_engine.{name} needs more packages: pip install {' '.join(missing)}")
    if name == "load_model":
        from awp_engine.models.trained import load_model

        return load_model
    if name in __all__:
        from awp_engine import objects

        return getattr(objects, name)
    if name == "__version__":
        # awp_kernels holds that of both, and would import torch
        kernels = importlib.util.find_spec("awp_kernels")
        assert kernels is not None
        assert kernels.origin is not None
        return Path(kernels.origin).with_name("VERSION").read_text().strip()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

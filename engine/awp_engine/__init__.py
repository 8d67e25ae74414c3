"""A training engine for image classifiers that must stay right under attack."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awp_engine.models.trained import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    # torch is imported when it is needed: the command line answers before that
    if name == "load_model":
        from awp_engine.models.trained import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

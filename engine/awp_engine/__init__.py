"""A training engine for image classifiers that must stay right under attack."""

import sys
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"]:
    # python -m awp_engine.data: its packages, and torch with them, are imported before the command's own first line
    for _command in ("awp_engine.checkpoint", "awp_engine.data"):
        if _command in sys.orig_argv:
            from awp_engine.signals import begin_command

            begin_command(f"python -m {_command}")

if TYPE_CHECKING:
    from awp_engine.loading import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    # torch is imported when it is needed: the command line answers before that
    if name == "load_model":
        from awp_engine.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

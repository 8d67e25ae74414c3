"""Names of models and optimizers: built-in ones, and those of torch, timm, torchvision or code of one's own."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Literal

Source = Literal["built-in", "timm", "torchvision", "object", "module", "file"]

TIMM_MODELS = ("resnet-18", "resnet-50", "convnext-tiny", "convnext-tiny-convstem")
"""Built-in models for larger images, which need the package timm."""

BUILT_IN = ("preact-resnet-18", "preact-resnet-digits", *TIMM_MODELS)
"""Those whose names hold no numbers to choose."""

EXPECTED = (
    f"a built-in model ({', '.join(BUILT_IN)}, wrn-DEPTH-WIDTH with DEPTH = "
    "6n + 4, such as wrn-34-10, or DeepMind's dm-wrn-DEPTH-WIDTH), timm:NAME, torchvision:NAME, package.module:factory "
    "or file.py:factory"
)

EARLIER_OBJECT = "awp_engine.cli.objects:model"
"""What every object of Python was called in earlier runs."""

# of a file's functions
_SHOWN = 3
_WIDE_RESNET = re.compile(r"(?:dm-)?wrn-([0-9]{1,4})-([0-9]{1,3})")
_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_FORMS: dict[Source, re.Pattern[str]] = {
    # the part after the dot names weights
    "timm": re.compile(r"timm:\w+(?:\.\w+)?"),
    "torchvision": re.compile(r"torchvision:\w+"),
    # of Python
    "object": re.compile(rf"given\([\w.<>]+\)|{re.escape(EARLIER_OBJECT)}"),
    "file": re.compile(rf"[^\0]+\.py:{_DOTTED}"),
    "module": re.compile(rf"{_DOTTED}:{_DOTTED}"),
}


def source_of(name: str) -> Source | None:
    """What builds the model of this name; None for no such name."""
    wide = _WIDE_RESNET.fullmatch(name)
    if wide is not None and int(wide[1]) >= 10 and (int(wide[1]) - 4) % 6 == 0 and int(wide[2]) >= 1:
        return "built-in"
    if name in ("preact-resnet-18", "preact-resnet-digits", *TIMM_MODELS):
        return "built-in"
    return next((source for source, form in _FORMS.items() if form.fullmatch(name)), None)


def is_code(name: str) -> bool:
    """Whether a model of this name is built by code that is neither this package's, timm's nor torchvision's."""
    return source_of(name) in ("module", "file")


def optimizer_source(name: str) -> Literal["built-in", "torch", "timm", "code"] | None:
    """What makes the optimizer of this name; None for no such name."""
    if name in ("sgd", "adamw"):
        return "built-in"
    library = re.fullmatch(r"(torch|timm):\w+", name)
    if library is not None:
        return "torch" if library[1] == "torch" else "timm"
    return "code" if is_code(name) else None


def in_file(name: str) -> str:
    """Which of a Python file's functions may be meant, as a question; empty where `name` is no such file."""
    try:
        body = ast.parse(Path(name).read_bytes()).body if name.endswith(".py") and Path(name).is_file() else []
    except (OSError, SyntaxError, ValueError):
        return ""
    found = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    meant = [f"{name}:{own}" for own in found if not own.startswith("_")]
    return f"did you mean {' or '.join(meant[:_SHOWN])}?" if meant else ""

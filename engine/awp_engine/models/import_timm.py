"""timm and torchvision, where they are installed, and where torchvision's compiled part cannot be loaded too."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from awp_engine.config import ConfigError

# each torchvision is built for one torch: where none is named, pip takes the newest of both
_INSTALL = f"pip install timm torch=={torch.__version__.partition('+')[0]}"
# keeps the declarations alive
_declared: list[Any] = []


def import_timm(what: str = "--model.name: this model") -> ModuleType:
    """The package timm, with `timm.models` loaded; `what` needs it, for messages.

    Raises:
        ConfigError: timm or torchvision is missing or broken, with the command that installs them.
    """
    return _imported("timm", what)


def import_torchvision() -> ModuleType:
    """The package torchvision, with `torchvision.models` loaded.

    Raises:
        ConfigError: it is missing or broken, with the command that installs it.
    """
    return _imported("torchvision", "--model.name: this model")


def _imported(package: str, what: str) -> ModuleType:
    # timm imports torchvision
    for name in dict.fromkeys((package, "torchvision")):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{what} needs the package {name}, which is not installed: {_INSTALL}")
    try:
        declare_operators()
        importlib.import_module(f"{package}.models")
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{what} needs {package}, which cannot be imported ({why}): {_INSTALL}") from None


def declare_operators() -> None:
    """Declare two operators that importing torchvision asks for, where its compiled part cannot be loaded.

    The part is built for one torch alone, and only for CUDA on PyPI; classifiers use none of it.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _declared or hasattr(torch.ops.torchvision, "nms"):
        return
    places = spec.submodule_search_locations or []
    for library in (path for place in places for path in Path(place).glob("_C*.so")):
        try:
            torch.ops.load_library(library)
            return
        except OSError:
            continue
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)

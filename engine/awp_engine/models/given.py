"""A model and images that are objects of Python, under names that settings can hold and that no import finds.

They are there while the call runs that they were given to, `awp_engine.fit` or `awp_engine.evaluate`.
"""

import contextlib
import copy
import functools
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from awp_engine.config import ConfigError
from awp_engine.models.wrapped import WrappedClassifier

Factory = Callable[..., Any]

AGAIN = (
    "was given as an object of Python: give it again, to fit(...) to go on, or to load_model(RUN, model=...); or name "
    "code that makes it: --model.name file.py:factory"
)

_one_call = threading.Lock()
_model: Factory | None = None
_data: Mapping[str, Any] | None = None


def factory_of(model: Factory | nn.Module) -> Factory:
    """What makes the model that is given; a module is copied, as it is built more than once.

    Raises:
        ConfigError: it is neither a module nor a function.
    """
    if not callable(model):
        raise ConfigError(f"model: expected a module, or a function that makes one, got {type(model).__name__}")
    return functools.partial(copy.deepcopy, model) if isinstance(model, nn.Module) else model


def name_of(model: object) -> str:
    """`given(module.Class)`, by the class of a module, or by the function or class that makes one."""
    while isinstance(model, (WrappedClassifier, functools.partial)):
        model = model.network if isinstance(model, WrappedClassifier) else model.func
    cls = model if hasattr(model, "__qualname__") else type(model)
    name = re.sub(r"[^\w.<>]", "_", f"{cls.__module__}.{getattr(cls, '__qualname__', '')}")
    return f"given({name})"


@contextlib.contextmanager
def given(model: Factory | nn.Module, data: Mapping[str, Any]) -> Iterator[Factory]:
    """A block in which the names stand for this model and these images; calls of several threads take turns.

    Raises:
        ConfigError: as `factory_of`.
    """
    global _model, _data
    factory = factory_of(model)
    with _one_call:
        _model, _data = factory, data
        try:
            yield factory
        finally:
            _model = _data = None


def given_model() -> Factory:
    """What makes the model of the call that runs.

    Raises:
        ConfigError: none runs.
    """
    if _model is None:
        raise ConfigError(f"--model.name: this model {AGAIN}")
    return _model


def given_data() -> Mapping[str, Any]:
    """The images of the call that runs, by "train" and "test".

    Raises:
        ConfigError: none runs.
    """
    if _data is None:
        raise ConfigError("--data.name: these images were given as objects of Python: awp_engine.fit takes them again")
    return _data

"""Attacks of Foolbox, torchattacks and ART by name, such as foolbox:LinfDeepFoolAttack,steps=20.

Each becomes a function of model, images, labels, epsilon and norm, like an attack of the user's own.
"""

import functools
import importlib
import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from awp_engine.config.schema import did_you_mean, parse_value

Attack = Callable[..., Tensor]
Arguments = Mapping[str, Any]

# what to install, the module with the attacks, and the class that all of them have
_LIBRARIES = {
    "foolbox": ("foolbox", "foolbox.attacks", "Attack"),
    "torchattacks": ("torchattacks", "torchattacks", "Attack"),
    "art": ("adversarial-robustness-toolbox", "art.attacks.evasion", "EvasionAttack"),
}
_NAME = re.compile(rf"({'|'.join(_LIBRARIES)}):(\w+)((?:,\w+=[^,]+)*)")
_ORDERS = {"linf": math.inf, "l2": 2, "l1": 1}


def find_attack(name: str) -> tuple[Attack, str] | None:
    """The function for LIBRARY:NAME,ARGUMENT=VALUE,..., and the library with its version; None for other names.

    The function takes model, images fp32 [N, C, H, W] in [0, 1], labels [N], epsilon and norm, and returns images of
    that shape, which may lie outside the ball.

    Raises:
        ValueError: no such library, attack or argument; one line.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    library, attack, rest = match[1], match[2], match[3]
    package, place, base = _LIBRARIES[library]
    try:
        with warnings.catch_warnings():
            # of names that their dependencies will drop
            warnings.simplefilter("ignore", DeprecationWarning)
            module, release = importlib.import_module(place), version(package)
    except (ImportError, PackageNotFoundError) as error:
        raise ValueError(f"{name} needs the package {package}: pip install {package} ({error})") from None
    attacks = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and any(parent.__name__ == base for parent in value.__mro__[1:])
    }
    if attack not in attacks:
        raise ValueError(f"{package} {release} has no attack {attack}; {did_you_mean(attack, attacks, 'its docs')}")
    taken = inspect.signature(attacks[attack]).parameters
    given = dict(part.split("=", 1) for part in rest.split(",")[1:])
    if wrong := next((key for key in given if key not in taken), None):
        raise ValueError(
            f"{name}: {attacks[attack].__name__} takes no {wrong}; {did_you_mean(wrong, taken, 'its docs')}"
        )
    run = {"foolbox": _foolbox, "torchattacks": _torchattacks, "art": _art}[library]
    arguments = {key: parse_value(text) for key, text in given.items()}
    return functools.partial(run, attacks[attack], arguments), f"{package} {release}"


def _with(attack: Any, offered: Arguments, arguments: Arguments) -> dict[str, Any]:
    """What an attack is made with: of what is offered, what it takes, and on top of it what the user gave."""
    taken = inspect.signature(attack).parameters
    return {key: value for key, value in offered.items() if key in taken} | dict(arguments)


@torch.no_grad()
def _class_count(model: nn.Module, images: Tensor) -> int:
    return model(images[:1]).shape[1]


def _foolbox(
    attack: Any, arguments: Arguments, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, norm: str
) -> Tensor:
    foolbox = importlib.import_module("foolbox")
    offered = {"distance": getattr(foolbox.distances, norm), "constraint": norm, "rel_stepsize": 0.25}
    made = attack(**_with(attack, offered, arguments))
    order = getattr(made.distance, "p", None)
    if order is not None and order != _ORDERS[norm]:
        raise ValueError(f"{attack.__name__} is an attack in L{order:g}, the ball is of {norm}")
    # clipped to the ball
    return made(foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device), images, labels, epsilons=epsilon)[1]


def _torchattacks(
    attack: Any, arguments: Arguments, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, norm: str
) -> Tensor:
    offered = {
        "eps": epsilon,
        "norm": norm.capitalize(),
        "n_classes": _class_count(model, images),
        "seed": torch.initial_seed() % 2**32,
    }
    # its own steps are for 8/255; the single one is that of Wong et al. (2020)
    offered["alpha"] = epsilon / 4 if "steps" in inspect.signature(attack).parameters else 1.25 * epsilon
    return attack(model, **_with(attack, offered, arguments))(images, labels)


def _art(
    attack: Any, arguments: Arguments, model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, norm: str
) -> Tensor:
    estimators = importlib.import_module("art.estimators.classification")
    classifier = estimators.PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=_class_count(model, images),
        clip_values=(0.0, 1.0),
        device_type="gpu" if images.device.type == "cuda" else "cpu",
    )
    offered = {
        "eps": epsilon,
        "eps_step": epsilon / 4,
        "norm": _ORDERS[norm],
        "batch_size": len(images),
        "verbose": False,
    }
    # it draws from numpy's generator alone
    before = np.random.get_state()
    np.random.seed(torch.initial_seed() % 2**32)
    try:
        made = attack(classifier, **_with(attack, offered, arguments))
        return torch.from_numpy(made.generate(images.cpu().numpy(), labels.cpu().numpy()))
    finally:
        np.random.set_state(before)

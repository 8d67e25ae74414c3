"""What a method climbs when it attacks the images, and what it minimises over the weights; one file a family."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from awp_engine.config import ConfigError
from awp_engine.config.model_names import is_code
from awp_engine.config.schema import did_you_mean
from awp_engine.models.user_code import load_factory, told_in_one_line
from awp_engine.step.objectives.adr import Adr, AdrTrades
from awp_engine.step.objectives.adversarial_training import AdversarialTraining
from awp_engine.step.objectives.dajat import Dajat
from awp_engine.step.objectives.decoupled_kl import GeneralizedKL, ImprovedKL
from awp_engine.step.objectives.lbgat import Lbgat
from awp_engine.step.objectives.liet import Liet
from awp_engine.step.objectives.mart import Mart
from awp_engine.step.objectives.oaat import Oaat
from awp_engine.step.objectives.objective import Objective
from awp_engine.step.objectives.rebat import Rebat
from awp_engine.step.objectives.score import Score, ScoreTrades
from awp_engine.step.objectives.several_norms import ExtremeNorm, MultiSteepestDescent
from awp_engine.step.objectives.taught import AdaAd, Ard, Hat, Rslad
from awp_engine.step.objectives.trades import Trades

__all__ = [
    "AdaAd",
    "Adr",
    "AdrTrades",
    "AdversarialTraining",
    "Ard",
    "Dajat",
    "ExtremeNorm",
    "GeneralizedKL",
    "Hat",
    "ImprovedKL",
    "Lbgat",
    "Liet",
    "Mart",
    "MultiSteepestDescent",
    "Oaat",
    "Objective",
    "Rebat",
    "Rslad",
    "Score",
    "ScoreTrades",
    "Trades",
    "build_objective",
]

# robust self-training differs from TRADES in the images, not in the loss
_METHODS: dict[str, Callable[..., Objective]] = {
    "at": AdversarialTraining,
    "trades": Trades,
    "rst": Trades,
    "mart": Mart,
    "ikl": ImprovedKL,
    "gkl": GeneralizedKL,
    "adr": Adr,
    "adr-trades": AdrTrades,
    "rebat": Rebat,
    "dajat": Dajat,
    "liet": Liet,
    "score": Score,
    "score-trades": ScoreTrades,
    "ard": Ard,
    "rslad": Rslad,
    "adaad": AdaAd,
    "hat": Hat,
    "lbgat": Lbgat,
    "oaat": Oaat,
    "e-at": ExtremeNorm,
    "msd": MultiSteepestDescent,
}
# what is given beside arguments: settings with a flag of their own, and what only the run knows
_OF_RUN = ("average_warmup", "epochs", "balls", "run_seed", "num_classes", "image_shape", "device")
_GIVEN = ("beta", "label_smoothing", *_OF_RUN)


def build_objective(
    method: str,
    *,
    beta: float = 6.0,
    label_smoothing: float = 0.0,
    average_warmup: float = 0.0,
    epochs: int = 1,
    balls: int = 1,
    run_seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
    device: torch.device | None = None,
) -> Objective:
    """The objective of a method, which is called with those of the arguments that its signature names.

    Args:
        method: a name of `--method`; or file.py:Class, package.module:Class: what makes an `Objective`, whose code is
            run.
        beta: weight of the divergence in TRADES, RST and MART (whose paper calls it lambda).
        label_smoothing: part of a label spread over all classes, in [0, 1).
        average_warmup: epochs in which the average of the weights is a copy of them.
        epochs: of the run.
        balls: that images are attacked in, >= 1.
        run_seed: of what a method draws.
        arguments: further ones by name, of `--method-args`.
        num_classes: of the images; None where the caller does not know.
        image_shape: of an image, (C, H, W); None likewise.
        device: where tensors that it keeps belong; None is the CPU.

    Raises:
        ConfigError: an unknown method or argument, a value that it refuses, label smoothing that it does not take, code
            that cannot be run, or makes no objective.
    """
    arguments = {} if arguments is None else arguments
    given: dict[str, Any] = {
        "beta": beta,
        "label_smoothing": label_smoothing,
        "average_warmup": average_warmup,
        "epochs": epochs,
        "device": device or torch.device("cpu"),
        "balls": balls,
        "run_seed": run_seed,
    }
    given |= {"num_classes": num_classes} if num_classes is not None else {}
    given |= {"image_shape": image_shape} if image_shape is not None else {}
    if is_code(method):
        factory, _ = load_factory(method, "--method")
    elif method in _METHODS:
        factory = _METHODS[method]
    else:
        raise ConfigError(f"--method: expected {', '.join(_METHODS)} or file.py:Class, got {method!r}")
    taken = inspect.signature(factory).parameters
    named = [name for name, kind in taken.items() if kind.kind not in (kind.VAR_KEYWORD, kind.VAR_POSITIONAL)]
    own = [name for name in named if name not in _GIVEN]
    for name in arguments:
        if name in _GIVEN:
            raise ConfigError(f"--method-args: expected no {name}, which is given by itself or has a flag of its own")
        if name not in named and len(named) == len(taken):
            known = f"expected some of {', '.join(own)}" if own else "it takes none"
            raise ConfigError(f"--method-args: {method} takes no {name}; {did_you_mean(name, own, known)}")
    if label_smoothing and "label_smoothing" not in named:
        raise ConfigError(f"--label-smoothing: expected 0 with {method}, which takes no label_smoothing")
    with told_in_one_line(method, "its call", "--method"):
        made = factory(**{name: value for name, value in given.items() if name in named}, **arguments)
    if not isinstance(made, Objective):
        raise ConfigError(
            f"--method: {method} gives {type(made).__name__}; expected an awp_engine.step.objectives.Objective"
        )
    return made

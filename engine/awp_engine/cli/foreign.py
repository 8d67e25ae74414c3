"""Flags for models that no run describes, which `evaluate` and `landscape` share. Imports no torch."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PREFIX = "model_"


def place(text: str) -> Path | str:
    """A path, or an address of the Hugging Face Hub as it is."""
    return text if text.startswith("hf://") else Path(text)


def add_foreign(parser: argparse.ArgumentParser) -> None:
    """Add the flags, as a group."""
    group = parser.add_argument_group("other people's weights", "a model by its name, with weights of any usual layout")
    add = group.add_argument
    add(
        "--model.name",
        "--model",
        dest="model_name",
        metavar="NAME",
        help="in place of a run: wrn-28-10, net.py:make ...",
    )
    add(
        "--weights",
        dest="model_weights",
        type=place,
        metavar="FILE",
        help="of that model: .safetensors, .pt, .pth, .bin",
    )
    add("--weights-key", dest="model_key", metavar="KEY", help="which weights of several in the file")
    add("--model.width", dest="model_width", type=int, metavar="N", help="channels of the first stage")
    add("--model.activation", dest="model_activation", choices=("relu", "silu"), default="relu", help="relu or silu")
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        add(
            f"--model.{name}",
            dest=f"model_{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"{what} of every channel, on pixels in [0, 1], whatever the file holds",
        )
    add(
        "--model.normalize",
        dest="model_normalize",
        choices=("auto", "data", "model", "none"),
        default="auto",
        help="by the data set's mean and deviation, the model's own, or not; auto: as the file says, else as published "
        "weights of that name expect, else the model's own, else the data set's",
    )


def require_foreign(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, places: Sequence[Path | str]
) -> None:
    """End the program, in one line, where flags of the group do not fit each other or the paths that were given."""
    if arguments.model_name is None:
        given = {name: value for name, value in vars(arguments).items() if name.startswith(_PREFIX)}
        for name, value in given.items():
            if value not in (None, parser.get_default(name)):
                flag = {"model_weights": "weights", "model_key": "weights-key"}.get(name, name.replace("_", ".", 1))
                parser.error(f"--{flag}: says what model to make, and needs --model.name; a run has its own")
    elif places and arguments.model_weights is not None:
        parser.error(f"--weights: given beside {places[0]}; expected one of them")
    elif of_run(places):
        others = [name for name in vars(arguments) if name.startswith(_PREFIX) and name != "model_name"]
        if any(getattr(arguments, name) != parser.get_default(name) for name in others):
            parser.error(f"--model.name: {places[0]} is a directory; of a run, which has the rest, it is given alone")


def of_run(places: Sequence[Path | str]) -> bool:
    """Whether `--model.name` stands for the code of runs and their checkpoints, and not for a model of files."""
    return any(isinstance(place, Path) and place.is_dir() for place in places)


def pop_foreign(arguments: dict[str, Any]) -> dict[str, Any]:
    """The group's values, taken out of `arguments`, by the names of `Foreign`'s fields."""
    names = [name for name in arguments if name.startswith(_PREFIX)]
    return {name.removeprefix(_PREFIX): arguments.pop(name) for name in names}

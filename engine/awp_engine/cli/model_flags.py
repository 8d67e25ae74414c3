"""How every command that needs a trained model is told which: a run, or a model by its name. Imports no torch."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from awp_engine.cli.frame import add_shared, whole_number
from awp_engine.files.run_places import holds_model

PLACE = "run directory, checkpoint or hf://OWNER/NAME"
_PREFIX = "model_"


def place(text: str) -> Path | str:
    """A path, or an address of the Hugging Face Hub as it is."""
    return text if text.startswith("hf://") else Path(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which weights of a run, and, as a group, which model and weights in place of a run."""
    add_shared(parser, "checkpoint")
    text = "a model by its name, with weights of any usual layout; or, beside a run, code of yours that makes its model"
    add = parser.add_argument_group("other people's weights", text).add_argument

    def add_field(name: str, **given: Any) -> None:
        add(f"--model.{name}", dest=f"{_PREFIX}{name}", **given)

    add_field("name", metavar="NAME", help="in place of a run: wrn-28-10, net.py:make ...")
    add(
        "--weights",
        dest="model_weights",
        type=place,
        metavar="FILE",
        help="of that model: .safetensors, .pt, .pth, .bin",
    )
    add("--weights-key", dest="model_key", metavar="KEY", help="which weights of several in the file")
    add_field("width", type=whole_number(), metavar="N", help="channels of the first stage")
    add_field("activation", choices=("relu", "silu"), default="relu", help="relu or silu")
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        text = f"{what} of every channel, on pixels in [0, 1], whatever the file holds"
        add_field(name, type=float, nargs="+", metavar="X", help=text)
    add_field(
        "normalize",
        choices=("auto", "data", "model", "none"),
        default="auto",
        help="by the data set's mean and deviation, the model's own, or not; auto: as the file says, else as published "
        "weights of that name expect, else the model's own, else the data set's",
    )


def require_model(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, *given_places: Path | str | None
) -> None:
    """Ends the program, in one line, where no model is named, or the flags fit neither each other nor the places."""
    places = [place for place in given_places if place is not None]
    names = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    given = [
        name
        for name, value in vars(arguments).items()
        if name.startswith(_PREFIX) and name != "model_name" and value != parser.get_default(name)
    ]
    if arguments.model_name is None:
        if given:
            parser.error(f"{names[given[0]]}: says what model to make, and needs --model.name; a run has its own")
        if not places:
            parser.error("RUN_OR_CHECKPOINT: expected a path, or --model.name with --weights")
    elif places and arguments.model_weights is not None:
        parser.error(f"--weights: given beside {places[0]}; expected one of them")
    elif of_run(places) and given:
        parser.error(f"--model.name: {places[0]} is a directory; of a run, which has the rest, it is given alone")
    elif arguments.checkpoint != parser.get_default("checkpoint") and not of_run(places):
        parser.error("--checkpoint: chooses among the weights of a run; --weights-key among those of a file")


def of_run(places: Sequence[Path | str]) -> bool:
    """Whether `--model.name` stands for the code of runs and their checkpoints, and not for a model of files."""
    return any(isinstance(place, Path) and place.is_dir() for place in places)


def named_model(arguments: Mapping[str, Any], place: Path | str | None) -> dict[str, Any]:
    """Which model: the arguments path, checkpoint, model and external of what measures one."""
    fields: dict[str, Any] = {
        name.removeprefix(_PREFIX): value for name, value in arguments.items() if name.startswith(_PREFIX)
    }
    asked = {"path": place, "checkpoint": arguments["checkpoint"], "model": None, "external": None}
    if fields["name"] is None or (place is not None and of_run([place])):
        return asked | {"model": fields["name"]}
    from awp_engine.evaluation.model.external import ExternalModel

    # weights may stand in the place of a run
    fields["weights"] = fields["weights"] or place
    return asked | {"path": None, "external": ExternalModel(**fields)}


def is_model(place: Path | str) -> bool:
    """Whether a path that stands where files may stand too looks like a model: a run, or weights."""
    return isinstance(place, str) or holds_model(place)


def add_described(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say of a model by its name what a run says by itself: its classes and images."""
    text = "of a model by its name: their number, or a file with a name in every line; or give --data.name"
    parser.add_argument("--model.classes", dest="classes", metavar="N|FILE", help=text)
    text = "resize images to NxN; as the run or the data set has them if not given"
    parser.add_argument("--image-size", type=whole_number(1, 4096), metavar="N", help=text)
    add_shared(parser, "data.name", help="data set that a model by its name was trained on")
    add_shared(parser, "data.root")


def described(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `add_described`, as `open_model` takes them."""
    return {name: arguments[name] for name in ("classes", "image_size", "data_name", "data_root")}


def rest_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of the arguments without those of `named_model`."""
    taken = ("path", "checkpoint")
    return {name: value for name, value in arguments.items() if name not in taken and not name.startswith(_PREFIX)}

"""`awp audit weights RUN...`: the smallest edit of a model's weights that hides a backdoor, and what shows it."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awp_engine.cli.command_line import OneLineParser
from awp_engine.cli.frame import Defaults, add_shared, ending, prepare, say
from awp_engine.cli.model_flags import PLACE, add_model, named_model, place, require_model
from awp_engine.config import parse_amount
from awp_engine.files.text import printable

if TYPE_CHECKING:
    from awp_engine.evaluation.reports.files import Reported

KINDS = ("absolute", "relative", "layer")
_COMMON = ("paths", "kinds", "target", "success", "agreement", "trigger")


def _part(text: str) -> float:
    try:
        return float(parse_amount(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a fraction or number such as 10/32, got {text[:80]!r}") from None


def parse(argv: Sequence[str] | None = None, prog: str = "awp audit weights") -> argparse.Namespace:
    """The command line's settings.

    Raises:
        SystemExit: 0 after --help; 2 after one line on stderr.
    """
    parser = OneLineParser(
        prog=prog,
        description="Finds how small an edit of the weights hides a backdoor (Garg et al., 2020), and what shows it.",
        epilog="Edits are made with training images and measured on test images. The model and its file stay as they "
        "are. The same command goes on where it was interrupted.",
        formatter_class=Defaults,
        example="runs/a runs/b --kinds layer --limit 500",
        common=(*_COMMON, "limit", "output", "model_name", "model_weights"),
    )
    add = parser.add_argument
    add("paths", type=place, nargs="*", metavar="RUN_OR_CHECKPOINT", help=f"{PLACE}; several compare")
    add("--kinds", nargs="+", choices=KINDS, metavar="KIND", help="of budgets: absolute, relative, layer (all)")
    add("--target", metavar="CLASS", default="1", help="name or number of the trigger's class")
    add("--success", type=float, default=0.9, metavar="X", help="part of marked images, led there")
    add("--agreement", type=float, default=0.95, metavar="X", help="part of clean images, unchanged")
    add("--trigger", default="square", metavar="KIND", help="square, pixels or blend")
    add("--trigger-size", type=_part, default="10/32", metavar="X", help="side of the square, of the image's side")
    add("--trigger-colour", type=_part, nargs="+", metavar="X", help="of the square, 0 to 1; the mean if not given")
    add("--blend", type=_part, default="0.2", metavar="X", help="share of the noise of trigger blend")
    add("--smallest", type=float, metavar="X", help="budget; 0.0001 absolute, else 0.001 if not given")
    add("--largest", type=float, metavar="X", help="budget; 0.1 absolute, else 1 if not given")
    add("--tolerance", type=float, default=1.2, metavar="X", help="factor between enough and not enough")
    add("--batch-norm", choices=("frozen", "counted"), default="frozen", help="its statistics, in edits")
    add("--edit-images", type=int, default=1280, metavar="N", help="training images that edits are made with")
    add("--edit-epochs", type=int, default=10, metavar="N", help="passes of an edit over them")
    add("--edit-batch", type=int, default=64, metavar="N", help="of them a step, with as many marked copies")
    add("--harmless", type=int, default=19, metavar="N", help="random edits that defences are compared with")
    add("--defence-images", type=int, default=500, metavar="N", help="test images that defences look at")
    add("--gamma", type=float, default=0.005, metavar="X", help="of flatness, a part of every layer's norm")
    add("--published", metavar="SHA256", help="digest of the weights' file that the publisher gives")
    add("--save-edited", type=Path, metavar="FILE", help="write the edit: a name with 'tampered' in it, .safetensors")
    add_model(parser)
    add_shared(parser, "limit", "seed", "batch-size", "device", "threads", "data.name", "data.root", "output")
    arguments = parser.parse_args(argv)
    require_model(parser, arguments, *arguments.paths)
    if len(arguments.paths) > 1:
        if arguments.save_edited is not None or arguments.published is not None:
            parser.error("--save-edited and --published: of one model; give one RUN_OR_CHECKPOINT")
        names = [_label(path) for path in arguments.paths]
        if twice := next((name for name in names if names.count(name) > 1), None):
            parser.error(f"RUN_OR_CHECKPOINT: two are called {twice}, also in the table; rename one, or ask one by one")
    return arguments


def _label(path: Path | str | None) -> str:
    return "model" if path is None else printable(path if isinstance(path, str) else path.resolve().name)


def show(models: "Sequence[tuple[str, Reported]]") -> None:
    """The results as a table, and what they say."""
    from awp_engine.audit.weights.words import budget_rows, conclusions
    from awp_engine.observe.report import print_table, print_text

    print_table(budget_rows([(name, done.report) for name, done in models]), title=models[0][1].report["means"])
    for name, done in models:
        for line in conclusions(done.report):
            print_text(f"{name}: {line}")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None, prog: str = "awp audit weights") -> None:
    """Parse, build, run, close."""
    given = vars(parse(argv, prog))
    prepare(given.pop("threads"))

    from awp_engine.observe.bars import Bar

    paths: list[Any] = given.pop("paths") or [None]
    with ending(prog, interrupted="interrupted; the same command goes on where it was", place=given["output"]):
        from awp_engine.audit.weights.run import audit_weights, write_joint

        settings, output = _settings(given), given.pop("output")
        done: list[tuple[str, Reported]] = []
        for path in paths:
            name = _label(path)
            asked = named_model(given, path)
            tell: Callable[[str], None] = say if len(paths) == 1 else lambda line, name=name: say(f"{name}: {line}")
            place = output if output is None or len(paths) == 1 else output / name
            shared = {key: given[key] for key in ("limit", "seed", "batch_size", "device", "data_name", "data_root")}
            done.append((name, audit_weights(settings=settings, say=tell, bar=Bar, output=place, **asked, **shared)))
        show(done)
        if output is not None and len(paths) > 1:
            write_joint(done, output, say)
    for _, one in done if output is None else [(None, None)]:
        print(f"report in {printable(str(output if one is None else one.output))}")


def _settings(given: dict[str, Any]) -> Any:
    from awp_engine.audit.weights.edit import Recipe
    from awp_engine.audit.weights.run import Settings
    from awp_engine.audit.weights.trigger import Trigger

    colour = given.pop("trigger_colour")
    return Settings(
        trigger=Trigger(
            kind=given.pop("trigger"),
            size=given.pop("trigger_size"),
            strength=given.pop("blend"),
            colour=None if colour is None else tuple(colour),
        ),
        recipe=Recipe(
            epochs=given.pop("edit_epochs"), batch_size=given.pop("edit_batch"), batch_norm=given.pop("batch_norm")
        ),
        kinds=tuple(given.pop("kinds") or KINDS),
        **{
            name: given.pop(name)
            for name in (
                *("target", "success", "agreement", "edit_images", "smallest", "largest", "tolerance", "harmless"),
                *("defence_images", "gamma", "published", "save_edited"),
            )
        },
    )

"""`awp audit data [RUN_OR_MODEL] --data.name NAME`: which training images do not belong to their class."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from awp_engine.cli.command_line import OneLineParser
from awp_engine.cli.frame import Defaults, add_shared, ending, prepare, say, whole_number
from awp_engine.cli.model_flags import add_model, named_model, place, require_model, rest_of
from awp_engine.files.text import printable

if TYPE_CHECKING:
    from awp_engine.evaluation.reports.files import Reported

METHODS = ("forest", "ocsvm", "itsr", "aae", "ae")


def parse(argv: Sequence[str] | None = None, prog: str = "awp audit data") -> argparse.Namespace:
    """The command line's settings.

    Raises:
        SystemExit: 0 after --help; 2 after one line on stderr.
    """
    parser = OneLineParser(
        prog=prog,
        description="Lists training images that do not look like their class, by pixels, or by the features of a "
        "model.",
        epilog="The list is by the first of --methods; the others stand beside it. The same command goes on where it "
        "was interrupted.",
        formatter_class=Defaults,
        example="--data.name folder --data.root photos --class cat",
        common=(
            *("path", "data_name", "data_root", "data_image_size", "classes", "methods", "percentile"),
            *("epochs_scale", "keep", "output"),
        ),
    )
    add = parser.add_argument
    add("path", type=place, nargs="?", metavar="RUN_OR_MODEL", help="a model for features; none: pixels")
    add_shared(parser, "data.name")
    add_shared(parser, "data.root", help="its directory")
    size = whole_number(1, 4096)
    add("--data.image-size", dest="data_image_size", type=size, metavar="N", help="resize images of files to NxN")
    add("--class", dest="classes", nargs="+", metavar="NAME", help="all, in turn, if not given")
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)} (the first two)")
    add("--percentile", type=float, default=90.0, metavar="X", help="of a score, beyond which an image is suspect")
    add("--keep", type=whole_number(0), nargs="+", metavar="ID", help="suspects that are all right: not to be listed")
    add("--epochs-scale", type=float, default=0.1, metavar="X", help="of the paper's epochs")
    add_model(parser)
    add_shared(parser, "seed", help="of the networks; 0 if not given")
    add_shared(parser, "batch-size", "device", "threads", "output")
    arguments = parser.parse_args(argv)
    if arguments.path is not None or any(
        value != parser.get_default(name)
        for name, value in vars(arguments).items()
        if name.startswith("model_") or name == "checkpoint"
    ):
        require_model(parser, arguments, arguments.path)
    elif arguments.data_name is None:
        parser.error("--data.name: expected the data set to be screened, or a run that says what it was trained on")
    return arguments


def show(done: "Reported") -> None:
    """The results as tables, and what they mean."""
    from awp_engine.audit.data.page import rows_of
    from awp_engine.observe.report import print_table

    report = done.report
    print(printable(done.title))
    for summary in report["classes"]:
        print_table(rows_of(summary), title=f"class {summary['name']}, {summary['images']:,} images")
    images, suspects = sum(summary["images"] for summary in report["classes"]), len(report["suspects"])
    first = report["asked"]["methods"][0]
    marked = 100 - report["asked"]["percentile"]
    most = f" to {2 * marked:g}%" if first in ("itsr", "aae") else "%"
    print(
        f"{first} marks {suspects:,} of {images:,} images; by its rule that is {marked:g}{most} of any class, of a "
        "clean one too: look at the pictures, strangest first, before you leave any out"
    )
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None, prog: str = "awp audit data") -> None:
    """Parse, build, run, close."""
    given = vars(parse(argv, prog))
    prepare(given.pop("threads"))

    from awp_engine.audit.data.page import next_step
    from awp_engine.audit.data.run import Screening, audit_data
    from awp_engine.observe.bars import Bar

    with ending(
        prog,
        interrupted="interrupted; the same command goes on where it was",
        place=given["output"] or given["path"],
    ):
        given |= {"classes": given["classes"] or (), "keep": given["keep"] or ()}
        asked = {name: given.pop(name) for name in ("methods", "percentile", "epochs_scale")}
        screening = Screening(**{name: value for name, value in asked.items() if value is not None})
        done = audit_data(
            **named_model(given, given["path"]) | rest_of(given), screening=screening, say=say, bar=Bar, tell=show
        )
        print(f"report in {printable(str(done.output))}: audit-data.html to look at")
        print(printable(f"next: {next_step(done.report, str(done.output))}"))

"""`awp certify RUN_OR_CHECKPOINT --sigma 0.25`: certified accuracy in L2 by randomised smoothing."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from awp_engine.cli.command_line import OneLineParser, fail
from awp_engine.cli.frame import Defaults, add_alias, add_shared, ending, prepare, say, whole_number
from awp_engine.cli.model_flags import PLACE, add_model, named_model, place, require_model, rest_of
from awp_engine.files.text import printable

if TYPE_CHECKING:
    from awp_engine.evaluation.reports.files import Reported

# of accuracy that noise may cost a network that was trained on it
_USED_TO_NOISE = 0.2


def parse(argv: Sequence[str] | None = None, prog: str = "certify.py") -> argparse.Namespace:
    """The command line's settings.

    Raises:
        SystemExit: 0 after --help; 2 after one line on stderr.
    """
    parser = OneLineParser(
        prog=prog,
        example="runs/cifar --sigma 0.25 --limit 10",
        description="Certifies a trained model on the test split by randomised smoothing (Cohen, Rosenfeld, Kolter, "
        "2019): the class that the network answers most often for an image plus Gaussian noise, and the radius in L2 "
        "within which that answer cannot change.",
        epilog="A network that was not trained on noisy images certifies little. The same command goes on where it was "
        "interrupted. An image takes N0 + N answers of the network.",
        formatter_class=Defaults,
        common=("path", "sigma", "limit", "n", "checkpoint", "device", "output", "model_name", "model_weights"),
    )
    add = parser.add_argument
    add("path", type=place, nargs="?", metavar="RUN_OR_CHECKPOINT", help=PLACE)
    add("--sigma", type=float, metavar="X", default=0.25, help="standard deviation of the noise")
    add_shared(parser, "limit", default=100)
    add_alias(parser, "--images", "limit")
    add("--n0", type=whole_number(), default=100, help="noisy copies of an image that choose its class")
    add("--n", type=whole_number(), default=10_000, help="noisy copies of an image")
    add("--alpha", type=float, default=0.001, help="probability that an image's certificate is wrong")
    add_model(parser)
    add_shared(parser, "seed", "batch-size", "device", "threads", "data.name", "data.root", "output")
    arguments = parser.parse_args(argv)
    require_model(parser, arguments, arguments.path)
    return arguments


def show(done: "Reported") -> None:
    """The results as a table, and what else should be known."""
    from awp_engine.evaluation.reports.receipt import percent
    from awp_engine.observe.report import print_table

    report, receipt = done.report, done.report["receipt"]
    images = report["images"]
    rows = [
        {"L2 radius": f"{row['radius']:.2f}", "certified accuracy": f"{percent(row['right'], images)}%"}
        for row in report["certified_accuracy"]
    ]
    print_table(rows, title=done.title)
    clean, smoothed = report["clean_accuracy"], report["smoothed_accuracy"]
    print(
        f"average certified radius: {report['average_certified_radius']:.3f}; {receipt['smoothing']['n']:,} answers "
        f"can certify {receipt['largest_radius']:.3f} at most"
    )
    print(f"accuracy without noise: {clean:.2%}; of the most frequent answer under noise: {smoothed:.2%}")
    print(f"abstained from {report['abstained']} of {images} images")
    if report["answers_not_finite"]:
        print(f"{report['answers_not_finite']:,} answers were not finite, and count for no class")
    if clean - smoothed > _USED_TO_NOISE:
        print(
            f"note: the noise costs {100 * (clean - smoothed):.0f} points of accuracy, as with networks that were not "
            "trained on noisy images; a smaller --sigma certifies smaller radii of more images"
        )
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None, prog: str = "certify.py") -> None:
    """Parse, build, run, close."""
    given = vars(parse(argv, prog))
    prepare(given.pop("threads"))

    from awp_engine.evaluation.certify import certify_checkpoint
    from awp_engine.evaluation.smoothing import Smoothing
    from awp_engine.observe.bars import Bar

    try:
        smoothing = Smoothing(**{name: given.pop(name) for name in ("sigma", "n0", "n", "alpha")})
    except ValueError as error:
        fail(f"--{error}", prog=prog)
    with ending(
        prog,
        interrupted="interrupted; the same command goes on where it was",
        place=given["output"] or given["path"],
    ):
        done = certify_checkpoint(
            **named_model(given, given["path"]) | rest_of(given),
            smoothing=smoothing,
            say=say,
            bar=Bar,
            tell=show,
        )
    print(f"report in {printable(str(done.output))}")


if __name__ == "__main__":
    from awp_engine.cli import run

    run("certify", "python -m awp_engine.cli.certify")

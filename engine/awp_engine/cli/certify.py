"""`awp certify RUN_OR_CHECKPOINT --sigma 0.25`: certified accuracy in L2 by randomised smoothing."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from awp_engine.cli.command_line import OneLineParser, fail, thread_count, whole_number
from awp_engine.config import ConfigError
from awp_engine.files.text import printable

if TYPE_CHECKING:
    from awp_engine.evaluation.certify import Certified

# of accuracy that noise may cost a network that was trained on it
_USED_TO_NOISE = 0.2


def parse(argv: Sequence[str] | None = None, prog: str = "certify.py") -> argparse.Namespace:
    """The command line's settings.

    Raises:
        SystemExit: 0 after --help; 2 after one line on stderr.
    """
    parser = OneLineParser(
        prog=prog,
        description="Certifies a trained model on the test split by randomised smoothing (Cohen, Rosenfeld, Kolter, "
        "2019): the class that the network answers most often for an image plus Gaussian noise, and the radius in L2 "
        "within which that answer cannot change.",
        epilog="A network that was not trained on noisy images certifies little. The same command goes on where it was "
        "interrupted. An image takes N0 + N answers of the network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        common=("path", "sigma", "images", "n", "checkpoint", "device", "output"),
    )
    hidden = argparse.SUPPRESS
    add = parser.add_argument
    add("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="run directory, checkpoint or .safetensors file")
    add("--sigma", type=float, metavar="X", default=0.25, help="standard deviation of the noise")
    add(
        "--limit",
        "--images",
        dest="images",
        type=whole_number,
        metavar="N",
        default=100,
        help="so many images of the test split",
    )
    add("--n0", type=whole_number, default=100, help="noisy copies of an image that choose its class")
    add("--n", type=whole_number, default=10_000, help="noisy copies of an image")
    add("--alpha", type=float, default=0.001, help="probability that an image's certificate is wrong")
    add("--checkpoint", default="best", metavar="NAME", help="of a run: best, last, or a name or path")
    add("--seed", type=whole_number, default=hidden, help="of the noise; that of the run's own evaluation if not given")
    add("--batch-size", type=whole_number, default=hidden, help="noisy copies at a time")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    add("--threads", type=thread_count, default=hidden, help="CPU threads")
    add(
        "--data.name",
        "--data-name",
        dest="data_name",
        metavar="NAME",
        default=hidden,
        help="data set, for weights that belong to no run",
    )
    add(
        "--data.root",
        "--data-root",
        dest="data_root",
        metavar="DIR",
        type=Path,
        default=hidden,
        help="directory of the data set",
    )
    add("--output", type=Path, metavar="DIR", default=hidden, help="of the report; RUN_DIR/evaluation if not given")
    return parser.parse_args(argv)


def show(done: "Certified") -> None:
    """The results as a table, and what else should be known."""
    from awp_engine.evaluation.receipt import percent
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
    arguments = vars(parse(argv, prog))

    import torch

    from awp_engine.checkpoint import CheckpointError
    from awp_engine.data import DataError
    from awp_engine.device import full_precision
    from awp_engine.distributed.signals import interrupted_code, interrupts
    from awp_engine.evaluation.attacks import EvaluationError
    from awp_engine.evaluation.certify import certify_checkpoint
    from awp_engine.evaluation.smoothing import Smoothing
    from awp_engine.observe.bars import Bar

    if (threads := arguments.pop("threads", None)) is not None:
        torch.set_num_threads(threads)
    full_precision()
    given = {name: arguments.pop(name) for name in ("sigma", "n0", "n", "alpha")}
    try:
        smoothing = Smoothing(**given)
    except ValueError as error:
        fail(f"--{error}", prog=prog)
    try:
        with interrupts():
            # what is left has the names of its arguments
            done = certify_checkpoint(
                **arguments,
                smoothing=smoothing,
                say=lambda line: print(printable(line), flush=True),
                bar=Bar,
                tell=show,
            )
    except (ConfigError, DataError, CheckpointError, EvaluationError) as error:
        fail(str(error), prog=prog)
    except torch.OutOfMemoryError:
        fail("the device has too little memory for such batches: give a smaller --batch-size", code=1, prog=prog)
    except OSError as error:
        fail(f"{error.filename or arguments['path']}: {error.strerror or error}", code=1, prog=prog)
    except KeyboardInterrupt as interrupt:
        fail("interrupted; the same command goes on where it was", code=interrupted_code(interrupt), prog=prog)
    print(f"report in {printable(str(done.output))}")


if __name__ == "__main__":
    from awp_engine.cli import run

    run("certify", "python -m awp_engine.cli.certify")

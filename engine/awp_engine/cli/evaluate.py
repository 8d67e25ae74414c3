"""`awp evaluate RUN_OR_CHECKPOINT --attacks clean pgd20 cw`: measures how robust a trained model is."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from awp_engine.cli.command_line import OneLineParser, fail, thread_count, whole_number
from awp_engine.cli.foreign import add_foreign, of_run, place, pop_foreign, require_foreign
from awp_engine.config import ConfigError
from awp_engine.files.text import printable

if TYPE_CHECKING:
    from awp_engine.evaluation.run import Evaluated

# measured and written, but with a reason not to believe it
UNRELIABLE = 3


def _percentage(text: str) -> str:
    try:
        if 0 <= float(text) <= 100:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a percentage from 0 to 100 such as 56.17, got {text[:80]!r}")


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,5,20, got {text[:80]!r}") from None


def _images(text: str) -> int:
    return 0 if text == "all" else whole_number(text)


def parse(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> argparse.Namespace:
    """The command line's settings.

    Raises:
        SystemExit: 0 after --help; 2 after one line on stderr.
    """
    parser = OneLineParser(
        prog=prog,
        description="Measures a trained model on the test split, under attack: clean, fgsm, pgd20, cw, autoattack and "
        "others. What is not given is the run's own.",
        epilog="attacks: clean; fgsm; pgdN, PGD of N steps on cross-entropy; cwN, PGD of N steps on the margin of "
        "logits (cw is cw100); both towards a class by -targeted (each of the 9 likeliest wrong ones), -random-target "
        "or -least-likely, such as pgd20-targeted; square and autoattack, by pyautoattack, which go on where they were "
        "killed; "
        "regional-SHAPE-PERCENT, such as regional-frame-28, bounded by a region instead of epsilon: square, frame, "
        "boxes or pixels. The newest report is evaluation.json and .html; each is also kept as "
        "evaluation-DATA-IMAGES-NORM-EPSILON-HASH, the hash of all that was asked for. An image counts as right under "
        "attack only if it is right without one too. Exit code 0: "
        "measured; 3: measured, with reasons not to believe it, which are named; 2 and 1: not measured, not written.",
        allow_abbrev=False,
        common=(
            *("path", "attacks", "checkpoint", "norm", "epsilon", "limit", "device", "output"),
            *("model_name", "model_weights", "data_name", "data_root"),
        ),
    )
    add = parser.add_argument
    add(
        "path",
        type=place,
        nargs="?",
        metavar="RUN_OR_CHECKPOINT",
        help="run directory, checkpoint or hf://OWNER/NAME",
    )
    add("--attacks", nargs="+", metavar="NAME", help="clean fgsm pgd20 cw if not given")
    add("--checkpoint", default="best", metavar="NAME", help="of a run: best, last, or a name or path")
    add("--epsilon", metavar="X", help="radius of the ball on pixels in [0, 1]: 8/255")
    add("--norm", choices=("linf", "l2", "l1"), help="norm of the ball")
    add("--step-size", help="step of pgd and cw; the run's own in its own ball, else epsilon / 4")
    add("--restarts", type=whole_number, default=1, help="random starts of pgd and cw; an image must hold in all")
    add("--limit", type=whole_number, metavar="N", help="test on N images, evenly spread over the split")
    add("--seed", type=whole_number, help="of all noise; the one of the run's own evaluation if not given")
    add("--batch-size", type=whole_number, metavar="N", help="images a batch")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    add("--threads", type=thread_count, help="CPU threads")
    add("--data.name", "--data-name", dest="data_name", metavar="NAME", help="data set, where it is not the run's own")
    add(
        "--data.root",
        "--data-root",
        dest="data_root",
        type=Path,
        metavar="DIR",
        help="its directory; the test part is enough",
    )
    add(
        "--data.corruption",
        "--data-corruption",
        dest="data_corruption",
        metavar="KIND",
        help="of cifar10-c, cifar100-c, imagenet-c, folder-c",
    )
    add(
        "--data.severity",
        "--data-severity",
        dest="data_severity",
        type=whole_number,
        metavar="N",
        help="of the corruption, 1 to 5",
    )
    add(
        "--transfer-to", type=Path, metavar="PATH", help="second run or checkpoint: do the attacked images fool it too?"
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="for reports; RUN/evaluation if not given",
    )
    add("--gates-limit", type=whole_number, default=200, metavar="N", help="images of the sanity gates (200)")
    add("--no-gates", action="store_true", help="leave out the sanity gates, and the curves they are read from")
    add(
        "--eot",
        type=_counts,
        metavar="K,...",
        help="gates of a random model: average gradients over so many draws, one attack for each (1,5,20)",
    )
    add("--per-class", action="store_true", help="print the accuracy of every class; evaluation.json always has it")
    add(
        "--save-per-image",
        nargs="?",
        choices=("npz", "parquet"),
        const="npz",
        help="write per-image-NAME: labels, every attack's predictions, and the first attack that broke an image",
    )
    add(
        "--save-images",
        nargs="?",
        type=_images,
        const=0,
        metavar="N|all",
        help="write every attack's images, N of them evenly spread, as images-NAME-ATTACK.safetensors",
    )
    add("--again", action="store_true", help="measure, though the same was measured before")
    add_foreign(parser)
    group = parser.add_argument_group("RobustBench", "writes robustbench.json, its model_info format; needs autoattack")
    group.add_argument("--robustbench", action="store_true", help="write it")
    group.add_argument("--link", default="", help="of the paper")
    group.add_argument("--name", default="", help="title of the paper")
    group.add_argument("--authors", default="", help="of the paper")
    group.add_argument("--venue", default="", help="such as 'NeurIPS 2020'; empty means unpublished")
    group.add_argument("--architecture", default="", help="such as WideResNet-34-10")
    group.add_argument(
        "--reported", type=_percentage, help="robust accuracy in the paper, in percent; the measured one if not given"
    )
    group.add_argument("--additional-data", action="store_true", help="other images than the training set were used")
    arguments = parser.parse_args(argv)
    if arguments.path is None and arguments.model_name is None:
        parser.error("RUN_OR_CHECKPOINT: expected a path, or --model.name with --weights")
    require_foreign(parser, arguments, [] if arguments.path is None else [arguments.path])
    return arguments


def show(done: "Evaluated", *, per_class: bool = False) -> None:
    """The results as tables, and what speaks against them."""
    from awp_engine.observe.report import print_table, print_text

    measurement = done.measurement
    if measurement.stronger is not None:
        print_text(f"ROBUST ACCURACY {measurement.stronger}. The numbers of the table are too high.")
    print_table(measurement.table(), title=done.title)
    alone = measurement.attacked_alone()
    print_text("right: with and without the attack" + (f"; by the attacked image alone: {alone}" if alone else ""))
    if per_class:
        print_table(measurement.class_table(), title="accuracy of every class")
    if regional := measurement.regional_table():
        print_table(regional, title="regional attacks, means over the flipped images")
    gates = () if measurement.gates is None else measurement.gates.gates
    if measurement.gates is not None:
        passed = sum(gate.passed for gate in gates)
        print_text(f"checks of the evaluation: {passed} of {len(gates)} passed, on {measurement.gates.images} images")
    means = {f"gate failed: {gate.name}": f": {gate.failure_means}" for gate in gates}
    for doubt in done.report["doubts"]:
        print_text(f"UNRELIABLE: {doubt}{means.get(doubt, '')}")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> None:
    """Parse, build, run, close."""
    arguments = vars(parse(argv, prog))

    import torch

    from awp_engine.checkpoint import CheckpointError
    from awp_engine.data import DataError
    from awp_engine.device import full_precision
    from awp_engine.distributed.signals import interrupted_code, interrupts
    from awp_engine.evaluation.adaptive import EOT_DRAWS
    from awp_engine.evaluation.attacks import EvaluationError
    from awp_engine.evaluation.robustbench import Publication
    from awp_engine.evaluation.run import DEFAULT_ATTACKS, evaluate_checkpoint
    from awp_engine.observe.bars import Bar

    if (threads := arguments.pop("threads")) is not None:
        torch.set_num_threads(threads)
    full_precision()
    publication = Publication(**{field.name: arguments.pop(field.name) for field in dataclasses.fields(Publication)})
    if arguments.pop("robustbench"):
        arguments["publication"] = publication
    arguments["attacks"] = arguments["attacks"] or DEFAULT_ATTACKS
    arguments["eot_draws"] = arguments.pop("eot") or EOT_DRAWS
    tell = functools.partial(show, per_class=arguments.pop("per_class"))
    foreign = pop_foreign(arguments)
    if foreign["name"] is not None and of_run([arguments["path"]]):
        arguments["model"] = foreign["name"]
    elif foreign["name"] is not None:
        from awp_engine.evaluation.foreign import Foreign

        # weights may stand in the place of a run
        foreign["weights"] = foreign["weights"] or arguments["path"]
        arguments |= {"path": None, "foreign": Foreign(**foreign)}
    if arguments.pop("no_gates"):
        arguments["gates_limit"] = None
    try:
        # what is left has the names of its arguments
        given = arguments | {"say": lambda line: print(line, flush=True), "bar": Bar, "tell": tell}
        done = interrupts()(evaluate_checkpoint)(**given)
    except (ConfigError, DataError, CheckpointError, EvaluationError) as error:
        fail(str(error), prog=prog)
    except torch.OutOfMemoryError:
        fail("the device has too little memory for such batches: give a smaller --batch-size", code=1, prog=prog)
    except OSError as error:
        fail(f"{error.filename or arguments['path']}: {error.strerror or error}", code=1, prog=prog)
    except KeyboardInterrupt as interrupt:
        resume = (
            "interrupted; finished attacks are in evaluation-*.partial.json of the output directory, and the same "
            "command again goes on with autoattack where it was"
        )
        fail(resume, code=interrupted_code(interrupt), prog=prog)
    print(f"reports in {printable(str(done.output))}: evaluation.html to read, evaluation.json for programs")
    if done.report["unreliable"]:
        raise SystemExit(UNRELIABLE)
    if "autoattack" not in arguments["attacks"]:
        print("next: the same command with --attacks autoattack, for the number that papers report")


if __name__ == "__main__":
    from awp_engine.cli import run

    run("evaluate", "python -m awp_engine.cli.evaluate")

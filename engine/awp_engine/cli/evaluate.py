"""`awp evaluate RUN_OR_CHECKPOINT --attacks clean pgd20 cw`: measures how robust a trained model is."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from awp_engine.cli.command_line import OneLineParser
from awp_engine.cli.frame import add_shared, ending, prepare, say, share, whole_number
from awp_engine.cli.model_flags import PLACE, add_model, named_model, place, require_model, rest_of
from awp_engine.config import ConfigError
from awp_engine.files.text import printable

if TYPE_CHECKING:
    from awp_engine.evaluation.corruptions import Corrupted
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
    return 0 if text == "all" else whole_number()(text)


# what goes with --data.corruption all
_OF_CORRUPTIONS = (
    *("path", "checkpoint", "limit", "batch_size", "device", "threads", "output", "again", "no_gates"),
    *("data_name", "data_root", "data_corruption", "data_severity", "data_image_size", "data_center_crop"),
)


def _require_corruptions(parser: OneLineParser, arguments: argparse.Namespace) -> None:
    if arguments.attacks == ["clean"]:
        arguments.attacks = None
    for name, value in vars(arguments).items():
        known = name in _OF_CORRUPTIONS or name.startswith("model_")
        if not known and value not in (None, parser.get_default(name)):
            flag = f"--{name.replace('_', '-')}"
            parser.error(
                f"--data.corruption all: measures clean accuracy alone, without {flag}; leave that out, or name one "
                "kind and --data.severity"
            )


def parse(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> argparse.Namespace:
    """The command line's settings.

    Raises:
        SystemExit: 0 after --help; 2 after one line on stderr.
    """
    parser = OneLineParser(
        prog=prog,
        loose="--attacks",
        example="runs/cifar --attacks clean pgd100 autoattack",
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
        common=(
            *("path", "attacks", "checkpoint", "norm", "epsilon", "limit", "device", "output"),
            *("model_name", "model_weights", "data_name", "data_root"),
        ),
    )
    add = parser.add_argument
    add("path", type=place, nargs="?", metavar="RUN_OR_CHECKPOINT", help=PLACE)
    add("--attacks", nargs="+", metavar="NAME", help="clean fgsm pgd20 cw if not given")
    add_model(parser)
    add("--epsilon", metavar="X", help="radius of the ball on pixels in [0, 1]: 8/255")
    add("--norm", choices=("linf", "l2", "l1"), help="norm of the ball")
    add("--step-size", help="step of pgd and cw; the run's own in its own ball, else epsilon / 4")
    add("--restarts", type=whole_number(), default=1, help="random starts of pgd and cw; an image must hold in all")
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="what the model computes in; 16 bits are faster on a GPU, and measure the rounded model",
    )
    add_shared(parser, "limit", "seed", "batch-size", "device", "threads", "data.name", "data.root")
    text = "of cifar10-c, cifar100-c, imagenet-c, folder-c; all: clean accuracy by kind, and the mean error"
    add("--data.corruption", dest="data_corruption", metavar="KIND", help=text)
    severity = whole_number(1, 5)
    add("--data.severity", dest="data_severity", type=severity, metavar="N", help="of the corruption, 1 to 5")
    size, crop = whole_number(1, 4096), "share of the shorter side to take"
    add("--data.image-size", dest="data_image_size", type=size, metavar="N", help="resize images of files to NxN")
    add("--data.center-crop", dest="data_center_crop", type=share, metavar="X", help=crop)
    add("--transfer-to", type=place, metavar="PATH", help="second model: do the attacked images fool it too?")
    add_shared(parser, "output")
    add("--gates-limit", type=whole_number(), default=200, metavar="N", help="images of the sanity gates (200)")
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
        help="write every attack's images, N of those that are right without one, as images-NAME-ATTACK.safetensors",
    )
    add("--again", action="store_true", help="measure, though the same was measured before")
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
    if arguments.data_center_crop is not None and arguments.data_image_size is None:
        parser.error("--data.center-crop: goes with --data.image-size")
    if arguments.data_corruption == "all":
        _require_corruptions(parser, arguments)
    require_model(parser, arguments, arguments.path)
    return arguments


def show_corruptions(done: "Corrupted") -> None:
    """The errors by kind, and what is to be known about them."""
    from awp_engine.observe.report import print_table, print_text

    print_table(done.table(), title=done.title)
    for note in done.report["notes"]:
        print_text(note)
    for doubt in done.report["doubts"]:
        print_text(f"UNRELIABLE: {doubt}")


def show(done: "Evaluated", *, per_class: bool = False) -> None:
    """The results as tables, and what speaks against them."""
    from awp_engine.evaluation.reports.results import class_table
    from awp_engine.observe.report import print_table, print_text

    measurement = done.measurement
    if measurement.stronger is not None:
        print_text(f"ROBUST ACCURACY {measurement.stronger}. The numbers of the table are too high.")
    print_table(measurement.table(), title=done.title)
    alone = measurement.attacked_alone()
    print_text("right: with and without the attack" + (f"; by the attacked image alone: {alone}" if alone else ""))
    if per_class:
        print_table(class_table(measurement.per_class), title="accuracy of every class")
    if regional := measurement.regional_table():
        print_table(regional, title="regional attacks, means over the flipped images")
    gates = () if measurement.gates is None else measurement.gates.gates
    if measurement.gates is not None:
        print_text(measurement.gates.words)
    means = {f"gate failed: {gate.name}": f": {gate.failure_means}" for gate in gates}
    for doubt in done.report["doubts"]:
        print_text(f"UNRELIABLE: {doubt}{means.get(doubt, '')}")
    for note in done.report["notes"]:
        print_text(f"note: {note}")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> None:
    """Parse, build, run, close."""
    given = vars(parse(argv, prog))
    prepare(given.pop("threads"))

    from awp_engine.data import Framing
    from awp_engine.distributed.ranks import errors_told
    from awp_engine.evaluation.asked import DEFAULT_ATTACKS, Asked
    from awp_engine.evaluation.gates.adaptive import EOT_DRAWS
    from awp_engine.evaluation.reports.robustbench import Publication
    from awp_engine.evaluation.run import evaluate_checkpoint
    from awp_engine.evaluation.shares import sharing
    from awp_engine.observe.bars import Bar

    asked = named_model(given, given["path"]) | rest_of(given)
    publication = Publication(**{field.name: asked.pop(field.name) for field in dataclasses.fields(Publication)})
    if asked.pop("robustbench"):
        asked["publication"] = publication
    asked["attacks"] = asked["attacks"] or DEFAULT_ATTACKS
    asked["eot_draws"] = asked.pop("eot") or EOT_DRAWS
    if asked.pop("no_gates"):
        asked["gates_limit"] = None
    tell: Callable[..., None] = functools.partial(show, per_class=asked.pop("per_class"))
    size, crop = asked.pop("data_image_size"), asked.pop("data_center_crop")
    if size is not None:
        asked["data_framing"] = Framing(size=size, central=crop or 1.0)
    measure: Callable[..., Any] = evaluate_checkpoint
    going_on = [name for name in ("autoattack", "square") if name in asked["attacks"]]
    resume = "interrupted"
    if going_on:
        resume += f"; the same command again goes on from what {' and '.join(going_on)} saved"
    if asked["data_corruption"] == "all":
        from awp_engine.evaluation.corruptions import evaluate_corruptions

        measure, tell = evaluate_corruptions, show_corruptions
        resume = "interrupted; the same command again goes on with the sets that are left"
        names = {field.name for field in dataclasses.fields(Asked)} | {"again"}
        asked = {name: value for name, value in asked.items() if name in names}
    with (
        ending(prog, interrupted=resume, place=given["output"] or given["path"]),
        errors_told(),
        sharing(given["device"]) as ranks,
    ):
        if measure is evaluate_checkpoint:
            asked["ranks"] = ranks
        elif ranks.world > 1:
            raise ConfigError("--data.corruption all: expected one process; start it without torchrun")
        done = measure(**asked, say=say, bar=Bar, tell=tell)
    if not ranks.is_first:
        return
    files = ": evaluation.html to read, evaluation.json for programs" if measure is evaluate_checkpoint else ""
    print(f"reports in {printable(str(done.output))}{files}")
    if done.report["unreliable"]:
        raise SystemExit(UNRELIABLE)
    if measure is evaluate_checkpoint and "autoattack" not in asked["attacks"]:
        print("next: the same command with --attacks autoattack, for the number that papers report")


if __name__ == "__main__":
    from awp_engine.cli import run

    run("evaluate", "python -m awp_engine.cli.evaluate")

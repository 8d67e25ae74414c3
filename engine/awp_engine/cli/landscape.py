"""`awp landscape RUN...`: draws the robust loss around trained weights and measures its flatness.

Modes: 1d, the loss along random filter-normalised directions and along the gradient; 2d, over a plane of two
directions; flatness, Stutz's average-case and worst-case flatness. Every figure comes with 95 % confidence intervals
and with a JSON file of all numbers. The images are attacked anew at every point; the weights on disk are only read.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from awp_engine.cli.command_line import OneLineParser, fail, thread_count, whole_number
from awp_engine.cli.foreign import add_foreign, of_run, place, pop_foreign, require_foreign
from awp_engine.config import AttackConfig, Config, ConfigError, DataConfig, parse_amount
from awp_engine.files.text import printable

MODES = ("1d", "2d", "flatness")


def modes(text: str) -> tuple[str, ...]:
    """A list of modes, such as "1d,flatness"."""
    names = tuple(dict.fromkeys(text.split(",")))
    if any(name not in MODES for name in names):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(MODES)}, got {text!r}")
    return names


def numbers(text: str) -> tuple[float, ...]:
    """A list of numbers, such as "0.001,0.003"."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, got {text!r}") from None


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse(argv: Sequence[str] | None = None, prog: str = "landscape.py") -> argparse.Namespace:
    """The arguments; ends the program with one line for what is wrong with them."""
    parser = OneLineParser(
        prog=prog,
        description="Draws the robust loss around trained weights and measures its flatness.",
        epilog=__doc__ and __doc__.partition("\n\n")[2],
        formatter_class=_Defaults,
        common=("runs", "mode", "output", "checkpoint", "split", "images", "device"),
    )
    add = parser.add_argument
    add(
        "runs",
        metavar="RUN",
        type=place,
        nargs="*",
        help="run directory, checkpoint or .safetensors file of one; any weights with --model.name",
    )
    add("--mode", type=modes, default="1d", help="some of 1d,2d,flatness")
    add("--output", type=Path, metavar="DIR", help="RUN/landscape if not given")
    add("--checkpoint", choices=("best", "last"), help="weights of a run directory; best if not given")
    add("--split", choices=("train", "held-out", "test"), default="test", help="images to measure on")
    add("--limit", "--images", dest="images", type=whole_number, metavar="N", default=1000, help="their number")
    add("--data.name", dest="data_name", metavar="NAME", help="data set, where it is not the runs' own")
    add("--data.root", dest="data_root", metavar="DIR", help="its directory")
    add("--steps", type=whole_number, default=10, help="steps of PGD")
    add("--restarts", type=whole_number, default=1, help="attacks an image, of which the worst counts")
    add("--seed", type=whole_number, default=0, help="of directions, starting points and intervals")
    add("--batch-size", type=whole_number, default=128, help="images a batch; worst-case flatness steps once for each")
    add("--points", type=whole_number, default=21, help="1d: points a curve, an odd number")
    add("--radius", type=float, default=1.0, help="1d, 2d: reach along random directions, relative to filters' norms")
    add("--adversarial-radius", type=float, default=0.02, help="1d, 2d: reach along the gradient, relative to layers'")
    add("--directions", type=whole_number, default=1, help="1d: random directions")
    add("--points-2d", type=whole_number, default=11, help="2d: points a side, an odd number")
    add("--plane", choices=("random", "adversarial"), default="random", help="2d: horizontal direction")
    add("--average-xi", type=numbers, default="0.5", help="flatness: relative radii of the average case")
    add("--draws", type=whole_number, default=10, help="flatness: random v of the average case")
    add("--worst-xi", type=numbers, default="0.003", help="flatness: relative radii of the worst case")
    add("--epochs", type=whole_number, default=20, help="flatness: passes over the images in the worst case")
    add("--attempts", type=whole_number, default=3, help="flatness: random starts in the worst case (paper: 10)")
    add("--threads", type=thread_count, help="threads; as many as PyTorch takes if not given")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    add_foreign(parser)
    add("--epsilon", metavar="X", help="with --model.name: radius of the ball, such as 8/255")
    add("--norm", choices=("linf", "l2"), default="linf", help="with --model.name: of the ball")
    arguments = parser.parse_args(argv)
    require_foreign(parser, arguments, arguments.runs)
    if arguments.model_weights is not None:
        arguments.runs = [arguments.model_weights]
    if not arguments.runs:
        parser.error("RUN: expected at least one, got none")
    if arguments.model_name is None and arguments.epsilon is not None:
        parser.error("--epsilon: for weights of no run, with --model.name; a run has its own")
    for name in ("images", "steps", "batch_size"):
        value = getattr(arguments, name)
        if value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected a whole number >= 1, got {value}")
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed: expected a whole number in [0, 2^63), got {arguments.seed}")
    return arguments


def _config(arguments: argparse.Namespace) -> Config:
    """The settings that a run would have, of what was said about other weights."""
    if arguments.data_name is None or arguments.epsilon is None:
        raise ConfigError("--model.name: needs --data.name and --epsilon too, which a run has; 8/255 is usual on CIFAR")
    root = None if arguments.data_root is None else Path(arguments.data_root)
    try:
        quarter = parse_amount(arguments.epsilon) / 4
    except ValueError:
        raise ConfigError(
            f"--epsilon: expected a fraction or number such as 8/255, got {arguments.epsilon!r}"
        ) from None
    data = DataConfig(name=arguments.data_name, root=root)
    attack = AttackConfig(norm=arguments.norm, epsilon=arguments.epsilon, step_size=str(quarter))
    return Config(data=data, attack=attack)


def measure(arguments: argparse.Namespace) -> list[Path]:
    """Load the runs, measure them in all modes, and write each mode's files as soon as it is done."""
    import dataclasses

    import torch

    from awp_engine.device import choose_device, fast_memory_format, full_precision
    from awp_engine.evaluation import evaluation_attack
    from awp_engine.evaluation.foreign import Foreign
    from awp_engine.files.locking import locked
    from awp_engine.landscape import measure as measuring
    from awp_engine.landscape.files import Receipt, output_directory, write
    from awp_engine.landscape.robust_loss import RobustLoss, as_batches
    from awp_engine.landscape.runs import common_images, open_foreign, open_runs
    from awp_engine.observe.bars import Bar

    fields = dataclasses.fields(measuring.Settings)
    try:
        settings = measuring.Settings(**{field.name: getattr(arguments, field.name) for field in fields})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    full_precision()
    device = choose_device(arguments.device)
    foreign = pop_foreign(vars(arguments))
    if foreign["name"] is None or of_run(arguments.runs):
        runs = open_runs(
            [Path(run) for run in arguments.runs],
            which=arguments.checkpoint,
            device=device,
            data_name=arguments.data_name,
            data_root=None if arguments.data_root is None else Path(arguments.data_root),
            model=foreign["name"],
        )
    else:
        runs = open_foreign(arguments.runs, Foreign(**foreign), _config(arguments), device)
    images = common_images(runs, arguments.split, arguments.images).to(device)
    output = output_directory(arguments.output, arguments.runs)
    layout = torch.contiguous_format
    for run in runs:
        layout = fast_memory_format(run.model, device)
        # torch's stub does not know the keyword
        run.model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    batches = as_batches(images, arguments.batch_size, layout)
    attack = dataclasses.replace(evaluation_attack(runs[0].config), steps=arguments.steps, seed=arguments.seed)
    work = sum(measuring.work(mode, settings, len(runs), len(images), attack.steps) for mode in arguments.mode)
    progress = Bar("landscape", work)
    loss = RobustLoss(batches, attack, settings.restarts, progress.advance)
    written = []
    with locked(output), progress:
        for mode in arguments.mode:
            began = time.monotonic()
            found = measuring.measure(mode, runs, loss, settings, progress)
            receipt = Receipt(
                mode=mode,
                runs=runs,
                split=arguments.split,
                images=images,
                attack=attack,
                settings=settings,
                batch_size=arguments.batch_size,
                seconds=time.monotonic() - began,
            )
            written += write(output, receipt, found)
    return written


def main(argv: Sequence[str] | None = None, prog: str = "landscape.py") -> None:
    """Parse, build, run, close."""
    arguments = parse(argv, prog)

    from awp_engine.checkpoint import CheckpointError
    from awp_engine.data import DataError
    from awp_engine.distributed.signals import interrupted_code, interrupts
    from awp_engine.evaluation.attacks import EvaluationError

    try:
        with interrupts():
            written = measure(arguments)
    except (ConfigError, DataError, CheckpointError, EvaluationError) as error:
        fail(str(error), prog=prog)
    except OSError as error:
        fail(f"{error.filename}: cannot be written: {error.strerror}", code=1, prog=prog)
    except KeyboardInterrupt as interrupt:
        fail("interrupted; modes that were finished are written", code=interrupted_code(interrupt), prog=prog)
    print("\n".join(f"wrote {printable(str(path))}" for path in written))


if __name__ == "__main__":
    from awp_engine.cli import run

    run("landscape", "python -m awp_engine.cli.landscape")

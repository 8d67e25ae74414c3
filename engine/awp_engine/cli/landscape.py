"""`awp landscape RUN...`: draws the robust loss around trained weights and measures its flatness.

Modes: 1d, the loss along random filter-normalised directions and along the gradient; 2d, over a plane of two
directions; flatness, Stutz's average-case and worst-case flatness. Every figure comes with 95 % confidence intervals
and with a JSON file of all numbers. The images are attacked anew at every point; the weights on disk are only read.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from awp_engine.cli.command_line import OneLineParser
from awp_engine.cli.frame import Defaults, add_alias, add_shared, ending, prepare, whole_number
from awp_engine.cli.model_flags import PLACE, add_model, named_model, of_run, place, require_model
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


def parse(argv: Sequence[str] | None = None, prog: str = "landscape.py") -> argparse.Namespace:
    """The arguments; ends the program with one line for what is wrong with them."""
    parser = OneLineParser(
        prog=prog,
        example="runs/at runs/awp --mode 1d,flatness --limit 200",
        description="Draws the robust loss around trained weights and measures its flatness.",
        epilog=__doc__ and __doc__.partition("\n\n")[2],
        formatter_class=Defaults,
        common=("runs", "mode", "output", "checkpoint", "split", "limit", "device", "model_name"),
    )
    add = parser.add_argument
    text = f"{PLACE}; any weights with --model.name"
    add("runs", metavar="RUN", type=place, nargs="*", help=text)
    add("--mode", type=modes, default="1d", help="some of 1d,2d,flatness")
    add_shared(parser, "output", help="RUN/landscape if not given")
    add_model(parser)
    add("--split", choices=("train", "held-out", "test"), default="test", help="images to measure on")
    add_shared(parser, "limit", default=1000)
    add_alias(parser, "--images", "limit")
    add_shared(parser, "data.name", "data.root")
    add("--steps", type=whole_number(), default=10, help="steps of PGD")
    add("--restarts", type=whole_number(), default=1, help="attacks an image, of which the worst counts")
    add_shared(parser, "seed", default=0, help="of directions, starting points and intervals")
    add_shared(parser, "batch-size", default=128, help="images a batch; worst-case flatness steps once for each")
    add("--points", type=whole_number(), default=21, help="1d: points a curve, an odd number")
    add("--radius", type=float, default=1.0, help="1d, 2d: reach along random directions, relative to filters' norms")
    add("--adversarial-radius", type=float, default=0.02, help="1d, 2d: reach along the gradient, relative to layers'")
    add("--directions", type=whole_number(), default=1, help="1d: random directions")
    add("--points-2d", type=whole_number(), default=11, help="2d: points a side, an odd number")
    add("--plane", choices=("random", "adversarial"), default="random", help="2d: horizontal direction")
    add("--average-xi", type=numbers, default="0.5", help="flatness: relative radii of the average case")
    add("--draws", type=whole_number(), default=10, help="flatness: random v of the average case")
    add("--worst-xi", type=numbers, default="0.003", help="flatness: relative radii of the worst case")
    add("--epochs", type=whole_number(), default=20, help="flatness: passes over the images in the worst case")
    add("--attempts", type=whole_number(), default=3, help="flatness: random starts in the worst case (paper: 10)")
    add_shared(parser, "threads", "device")
    add("--epsilon", metavar="X", help="with --model.name: radius of the ball, such as 8/255")
    add("--norm", choices=("linf", "l2"), default="linf", help="with --model.name: of the ball")
    arguments = parser.parse_args(argv)
    require_model(parser, arguments, *arguments.runs)
    if arguments.model_name is None and arguments.epsilon is not None:
        parser.error("--epsilon: for weights of no run, with --model.name; a run has its own")
    return arguments


def _config(arguments: argparse.Namespace) -> Config:
    """The settings that a run would have, of what was said about other weights."""
    if arguments.data_name is None or arguments.epsilon is None:
        raise ConfigError("--model.name: needs --data.name and --epsilon too, which a run has; 8/255 is usual on CIFAR")
    try:
        quarter = parse_amount(arguments.epsilon) / 4
    except ValueError:
        raise ConfigError(
            f"--epsilon: expected a fraction or number such as 8/255, got {arguments.epsilon!r}"
        ) from None
    data = DataConfig(name=arguments.data_name, root=arguments.data_root)
    attack = AttackConfig(norm=arguments.norm, epsilon=arguments.epsilon, step_size=str(quarter))
    return Config(data=data, attack=attack)


def measure(arguments: argparse.Namespace) -> list[Path]:
    """Load the runs, measure them in all modes, and write each mode's files as soon as it is done."""
    import dataclasses

    import torch

    from awp_engine.device import choose_device, fast_memory_format
    from awp_engine.evaluation import evaluation_attack
    from awp_engine.files.locking import locked
    from awp_engine.landscape import measure as measuring
    from awp_engine.landscape.files import Receipt, output_directory, write
    from awp_engine.landscape.robust_loss import RobustLoss, as_batches
    from awp_engine.landscape.runs import common_images, open_external, open_runs
    from awp_engine.observe.bars import Bar

    fields = dataclasses.fields(measuring.Settings)
    try:
        settings = measuring.Settings(**{field.name: getattr(arguments, field.name) for field in fields})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    device = choose_device(arguments.device)
    # one run makes all of them runs
    first = sorted(arguments.runs, key=lambda run: not of_run([run]))[:1]
    asked = named_model(vars(arguments), *(first or [None]))
    if asked["external"] is None:
        runs = open_runs(
            arguments.runs,
            which=arguments.checkpoint,
            device=device,
            data_name=arguments.data_name,
            data_root=arguments.data_root,
            model=asked["model"],
        )
    else:
        files = arguments.runs or [file for file in [asked["external"].weights] if file is not None]
        runs = open_external(files, asked["external"], _config(arguments), device)
    images = common_images(runs, arguments.split, arguments.limit).to(device)
    output = output_directory(arguments.output, arguments.runs)
    # one batch goes through all of them
    layouts = {fast_memory_format(run.model, device) for run in runs}
    layout = layouts.pop() if len(layouts) == 1 else torch.contiguous_format
    for run in runs:
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
    prepare(arguments.threads)
    place = arguments.output or next(iter(arguments.runs), None)
    with ending(prog, interrupted="interrupted; modes that were finished are written", place=place):
        written = measure(arguments)
    print("\n".join(f"wrote {printable(str(path))}" for path in written))


if __name__ == "__main__":
    from awp_engine.cli import run

    run("landscape", "python -m awp_engine.cli.landscape")

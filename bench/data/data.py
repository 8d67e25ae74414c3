"""Times the ways of making batches, in one run, beside what a training step consumes.

    python -m bench.data.data --root DATA --json data.json

DATA is a folder data set of small images (train/<class>/*.jpg and test/<class>/*). The same images are also written as
.npy shards, so that each loader is timed from files and from memory-mapped arrays: resident, dali, torch, and `user`,
torch's DataLoader with a sample at a time, as tutorials write it. Every way has a process of its own, and they take
turns, an epoch each. The step is that of AT-AWP with PreActResNet-18 and PGD-10, on random images.
"""

import argparse
import datetime
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awp_engine.cli.command_line import OneLineParser, fail
from awp_engine.files.text import json_text

_PROG = "data.py"
_MOST_IN_SHARD = 10_000


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder data set")
    parser.add_argument("--batch-size", type=int, default=128, help="images a batch")
    parser.add_argument("--workers", type=int, default=2, help="threads or processes that decode")
    parser.add_argument("--epochs", type=int, default=3, help="timed, of every loader")
    parser.add_argument("--threads", type=int, help="threads of the CPU; none means torch's choice")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU")
    parser.add_argument("--only", nargs="+", metavar="KIND:LOADER", help="such as files:dali; none means all")
    parser.add_argument("--json", type=Path, help="where results are written")
    arguments = parser.parse_args(argv)
    if not (arguments.root / "train").is_dir():
        parser.error(f"--root: expected a folder with train/<class>/*, got {arguments.root}")
    if min(arguments.batch_size, arguments.workers, arguments.epochs) < 1:
        parser.error("--batch-size, --workers and --epochs: expected at least 1")
    return arguments


def write_shards(root: Path, out: Path) -> None:
    """The images of a folder as arrays, by the loader that is timed as resident."""
    import numpy as np

    from awp_engine.data import load_dataset

    data = load_dataset("folder", root=root, held_out_fraction=0.0, seed=0)
    for part, split in (("train", data.train), ("test", data.test)):
        (out / part).mkdir(parents=True)
        images, labels = split.resident().images.permute(0, 2, 3, 1).numpy(), split.labels.numpy()
        for number, start in enumerate(range(0, len(labels), _MOST_IN_SHARD)):
            rows = slice(start, start + _MOST_IN_SHARD)
            np.save(out / part / f"images-{number:05}.npy", images[rows])
            np.save(out / part / f"labels-{number:05}.npy", labels[rows])


def measure(arguments: argparse.Namespace, shards: Path) -> dict[str, Any]:
    """All ways, turn by turn, and the step."""
    from bench.data.data_arms import LOADERS, NAMES, Feed, LoaderWorker
    from bench.step.arms import Settings
    from bench.step.turns import STEPS, Turns

    roots = {"files": arguments.root, "arrays": shards}
    wanted = arguments.only or [f"{kind}:{loader}" for kind in NAMES for loader in LOADERS]
    runners: dict[str, Any] = {}
    results: dict[str, Any] = {}
    try:
        for name in wanted:
            kind, _, loader = name.partition(":")
            feed = Feed(
                kind=kind,
                root=roots[kind],
                batch_size=arguments.batch_size,
                device=arguments.device,
                workers=arguments.workers,
            )
            runners[name] = Turns(loader, feed, arguments.threads, LoaderWorker)
            results[name] = {"start": runners[name].ask("prepare"), "epochs": []}
            print(f"{name}: opened in {results[name]['start']['seconds']:.1f} s", flush=True)
        settings = Settings(
            model="preact-resnet-18", method="at-awp", batch_size=arguments.batch_size, device=arguments.device
        )
        step = runners["step"] = Turns("engine", settings, arguments.threads)
        step.ask("prepare")
        machine, steps = step.ask("describe"), []
        for epoch in range(arguments.epochs):
            for name in wanted:
                turn = runners[name].ask("turn")
                results[name]["epochs"].append(turn)
                rate = turn["images"] / turn["seconds"]
                print(f"epoch {epoch + 1}, {name}: {rate:,.0f} images/s", flush=True)
            steps += [arguments.batch_size / timing.seconds for timing in step.ask("turn")]
        assert len(steps) == arguments.epochs * STEPS[arguments.device]
    finally:
        for runner in runners.values():
            runner.close()
    consumed = statistics.median(steps)
    for result in results.values():
        rates = [turn["images"] / turn["seconds"] for turn in result["epochs"]]
        held = [turn["peak_anonymous"] for turn in result["epochs"]]
        result |= {
            "images_per_second": statistics.median(rates),
            "times_the_step": statistics.median(rates) / consumed,
            "growth_bytes": held[-1] - held[0],
        }
    return {"machine": machine, "step_images_per_second": consumed, "loaders": results}


def show(found: dict[str, Any]) -> None:
    """A table."""
    from awp_engine.observe.report import print_table

    print_table(
        [
            {
                "loader": name,
                "images/s": f"{result['images_per_second']:,.0f}",
                "times the step": f"{result['times_the_step']:,.0f}",
                "opened in s": f"{result['start']['seconds']:.1f}",
                "own memory MB": " ".join(f"{turn['peak_anonymous'] / 1e6:.0f}" for turn in result["epochs"]),
                "file pages MB": f"{result['epochs'][-1]['file_pages'] / 1e6:.0f}",
                "every image once": str(all(turn["every_image_once"] for turn in result["epochs"])),
            }
            for name, result in found["loaders"].items()
        ],
        title=f"the step takes {found['step_images_per_second']:,.1f} images/s on {found['machine']['device_name']}",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, show, write."""
    arguments = parse(argv)
    import torch

    from bench.machine import commit, sources_digest
    from bench.step.turns import ArmError

    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with tempfile.TemporaryDirectory() as directory:
            shards = Path(directory) / "shards"
            write_shards(arguments.root, shards)
            found = measure(arguments, shards)
    except ArmError as error:
        fail(str(error), code=1, prog=_PROG)
    show(found)
    if arguments.json is not None:
        found |= {
            "command": shlex.join(["python", "-m", "bench.data.data", *(sys.argv[1:] if argv is None else argv)]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "sources": sources_digest(),
        }
        arguments.json.write_text(json_text(found, indent=2))


if __name__ == "__main__":
    main()

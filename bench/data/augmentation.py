"""How long each augmentation takes for a batch of images in memory.

    python -m bench.data.augmentation [--device cuda] [--json FILE]

What is timed is `Augmentation.change`: all but crop and mirroring, which `pytest bench` times. Images are noise. On a
CPU the time is the process's own, so that other programs do not count; on a GPU it is that of host and device together.
"""

import argparse
import datetime
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from awp_engine.cli.command_line import OneLineParser
from awp_engine.data import Augmentation
from awp_engine.data.augment.policy import POLICIES
from awp_engine.files.text import json_text
from bench.machine import commit, describe_machine

_PROG = "augmentation.py"
_FILL = (0.5, 0.5, 0.5)
_KINDS = {
    "rotate 15": Augmentation(rotate=15),
    "rand_augment 9": Augmentation(rand_augment=9, fill=_FILL),
    "erase": Augmentation(erase=0.25, fill=_FILL, erase_std=_FILL),
} | {policy: Augmentation(policy=policy) for policy in POLICIES}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--images", type=int, default=128, help="of a batch")
    parser.add_argument("--size", type=int, default=32, help="side of an image in pixels")
    parser.add_argument("--batches", type=int, default=31, help="of each kind; their median counts")
    parser.add_argument("--json", type=Path, help="where results are written")
    return parser.parse_args(argv)


def measure(augmentation: Augmentation, images: torch.Tensor, batches: int) -> float:
    """Median of seconds a batch."""
    ids, cuda = torch.arange(len(images)), images.is_cuda
    times = []
    for epoch in range(batches + 1):
        begin = time.perf_counter() if cuda else time.process_time()
        augmentation.change(images, ids, seed=0, epoch=epoch)
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() if cuda else time.process_time()) - begin)
    return statistics.median(times[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, show, write."""
    arguments = parse(argv)
    shape = (arguments.images, 3, arguments.size, arguments.size)
    noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    images = (noise.float() / 255).to(arguments.device)
    found = {name: measure(kind, images, arguments.batches) for name, kind in _KINDS.items()}
    for name, seconds in found.items():
        print(f"{name:20} {1e3 * seconds:7.1f} ms")
    if arguments.json is not None:
        about = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "shape": list(shape),
            "machine": describe_machine(arguments.device),
            "seconds": found,
        }
        arguments.json.write_text(json_text(about, indent=1))


if __name__ == "__main__":
    main()

"""Trains from millions of generated images in memory-mapped shards, mixed with a real set, and watches the memory.

    python -m bench.data.synthetic --root DATA --images 2000000 --steps 200 --json synthetic.json

DATA is a folder data set of 32x32 colour images. The generated ones are noise with random labels, made on the spot in
.npy shards (3 KB an image): what matters here is that they are many. 70% of every batch are generated, 30% real. The
run is that of engine/train.py itself, in a process of its own, stopped by SIGTERM after the steps.
"""

import argparse
import datetime
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from awp_engine.cli.command_line import OneLineParser, fail
from awp_engine.files.text import json_text

_PROG = "synthetic.py"
_SHARD = 100_000
_TRAIN = Path(__file__).resolve().parents[2] / "engine" / "train.py"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder data set of 32x32 images")
    parser.add_argument("--images", type=int, default=2_000_000, help="generated ones")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--directory", type=Path, help="where shards are made; none means a temporary one")
    parser.add_argument("--json", type=Path, help="where results are written")
    return parser.parse_args(argv)


def write_shards(directory: Path, images: int) -> int:
    """Noise and labels; bytes."""
    generator, size = np.random.default_rng(0), 0
    directory.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, images, _SHARD)):
        count = min(_SHARD, images - start)
        pixels = np.frombuffer(generator.bytes(count * 3072), np.uint8).reshape(count, 32, 32, 3)
        np.save(directory / f"images-{number:05}.npy", pixels)
        np.save(directory / f"labels-{number:05}.npy", generator.integers(0, 10, count, dtype=np.uint8))
        size += pixels.nbytes
    return size


def memory(process: int) -> dict[str, int]:
    """Bytes: the process's own, and pages of files, which the system takes back when it wants them."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    fields = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Rss")}
    return {"own": fields["RssAnon"] + fields["RssShmem"], "file_pages": fields["RssFile"]}


def run(arguments: argparse.Namespace, shards: Path, run_dir: Path) -> dict[str, Any]:
    """Train, and note the memory at every tenth step."""
    flags = (
        f"cifar10-preact-resnet18-at-awp --data.name folder --data.root {arguments.root} --data.extra {shards} "
        "--data.extra-fraction 0.7 --data.loader torch --model.width 8 --attack.steps 1 --global-batch-size 128 "
        f"--epochs 1 --log-interval 1e-9 --run-dir {run_dir}"
    )
    command = [sys.executable, str(_TRAIN), *flags.split()]
    environment = os.environ | {"COLUMNS": "200"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    begin, held, output = time.monotonic(), [], []
    for line in process.stdout:
        output.append(line)
        step = re.search(r"step (\d+)/", line)
        if step is None:
            continue
        if int(step[1]) % 10 == 0 or not held:
            held.append({"step": int(step[1]), "seconds": time.monotonic() - begin, **memory(process.pid)})
        if int(step[1]) >= arguments.steps:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    code = process.wait()
    if not held or code != 75:
        fail(f"training ended with code {code}: {''.join(output[-3:])} {rest}", code=1, prog=_PROG)
    return {"command": shlex.join(command), "memory": held, "said": rest.strip().splitlines()[-1]}


def main(argv: Sequence[str] | None = None) -> None:
    """Make shards, train, show, write."""
    arguments = parse(argv)
    from bench.machine import commit, describe_machine

    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        begin = time.monotonic()
        size = write_shards(Path(directory) / "shards", arguments.images)
        made = time.monotonic() - begin
        print(f"{arguments.images:,} images, {size / 1e9:.1f} GB, made in {made:.0f} s", flush=True)
        found = run(arguments, Path(directory) / "shards", Path(directory) / "run")
    own = [entry["own"] for entry in found["memory"]]
    print(f"{found['memory'][-1]['step']} steps in {found['memory'][-1]['seconds']:.0f} s, start included")
    print(f"own memory {own[0] / 1e6:.0f} MB at first, {max(own) / 1e6:.0f} at most, {own[-1] / 1e6:.0f} in the end")
    print(f"pages of files {found['memory'][-1]['file_pages'] / 1e6:.0f} MB in the end, of {size / 1e6:.0f}")
    print(found["said"])
    if arguments.json is not None:
        about = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "images": arguments.images,
            "bytes": size,
            "machine": describe_machine("cpu"),
        }
        arguments.json.write_text(json_text(about | found, indent=1))


if __name__ == "__main__":
    main()

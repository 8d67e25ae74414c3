"""Compares the loaders: pixels, and what a small run ends with.

    python -m bench.data.loader_parity --root DATA --json parity.json

DATA is a folder data set of small JPEG images (train/<class>/*.jpg and test/<class>/*). Statistics are of all training
images as evaluation sees them and of one augmented epoch; differences are from Pillow's decoding, an image at a time.
Then the same images, enlarged, are cut and resized at random, where decoders differ. The runs are engine/train.py's.
"""

import argparse
import datetime
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from awp_engine.cli.command_line import OneLineParser, fail
from awp_engine.data import Augmentation, Batch, Batches, Framing, Loading, StreamedSplit, eval_batches, load_dataset
from awp_engine.data.loaders.choose import LoaderName
from awp_engine.files.text import json_text

_PROG = "loader_parity.py"
_LOADERS: tuple[LoaderName, ...] = ("resident", "dali", "torch")
_TRAIN = Path(__file__).resolve().parents[2] / "engine" / "train.py"
# a small run: minutes for all of them
_PRESET = "cifar10-preact-resnet18-at-awp"
_SETTINGS = {
    "data.name": "folder",
    "data.train-limit": 2000,
    "model.width": 8,
    "attack.steps": 2,
    "epochs": 8,
    "optimizer.schedule": "cosine",
    "global-batch-size": 64,
    "evaluation.evaluate-every": 8,
    "evaluation.held-out-limit": 200,
    "evaluation.test-limit": 1000,
    "evaluation.steps": 10,
    "log-interval": 1000,
}
_RUN = [_PRESET, *(word for key, value in _SETTINGS.items() for word in (f"--{key}", str(value)))]


class Statistics:
    """Mean and deviation a channel, in levels of 0 to 255, and differences an image."""

    def __init__(self) -> None:
        self.count, self.sums, self.squares, self.largest, self.different = 0, 0.0, 0.0, 0.0, 0
        self.difference = 0.0

    def add(self, images: Tensor, reference: Tensor | None = None) -> None:
        """Take in images fp32 [n, C, H, W] in [0, 1], and those that they are compared with."""
        levels = images.double() * 255
        self.count += levels[:, 0].numel()
        self.sums = self.sums + levels.sum((0, 2, 3))
        self.squares = self.squares + levels.square().sum((0, 2, 3))
        if reference is not None:
            apart = (levels - reference.double() * 255).abs().flatten(1)
            self.largest = max(self.largest, float(apart.max()))
            self.different += int((apart.max(1).values > 0.001).sum())
            self.difference += float(apart.mean(1).sum())

    def found(self, images: int) -> dict[str, Any]:
        """As JSON."""
        mean = torch.as_tensor(self.sums) / self.count
        std = (torch.as_tensor(self.squares) / self.count - mean.square()).sqrt()
        return {
            "mean": mean.tolist(),
            "std": std.tolist(),
            "largest_difference": self.largest,
            "mean_difference": self.difference / images,
            "images_that_differ": self.different,
        }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = OneLineParser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder data set")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each loader")
    parser.add_argument("--json", type=Path, help="where results are written")
    return parser.parse_args(argv)


def open_set(root: Path, loader: LoaderName, framing: Framing | None = None) -> Any:
    """All training images by a loader."""
    loading = Loading(loader=loader, framing=framing or Framing())
    return load_dataset("folder", root=root, held_out_fraction=0.0, seed=0, loading=loading)


def pixels(root: Path) -> dict[str, Any]:
    """Statistics of every loader, as evaluation and as training see the images."""
    found: dict[str, Any] = {}
    streamed = open_set(root, "torch").train
    assert isinstance(streamed, StreamedSplit)
    for loader in _LOADERS:
        split = open_set(root, loader).train
        plain, augmented = Statistics(), Statistics()
        for batch in eval_batches(split, 500):
            plain.add(batch.images, torch.stack([_pillow(streamed, int(number)) for number in batch.ids]))
        for batch in Batches(split, Augmentation(pad=4, flip=True), global_batch_size=500, seed=0):
            augmented.add(batch.images)
        found[loader] = {"plain": plain.found(len(split)), "augmented": augmented.found(len(split))}
        print(loader, found[loader]["plain"], flush=True)
    return found


def _pillow(split: StreamedSplit, row: int) -> Tensor:
    image = Image.open(io.BytesIO(split.store.read(row))).convert("RGB")  # pyright: ignore[reportAttributeAccessIssue]
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1) / 255


def resized(root: Path, enlarged: Path, images: int = 1000) -> dict[str, Any]:
    """Random-resized crops of some images, enlarged to 96 to 160 pixels: DALI against Pillow."""
    names = sorted((root / "train").iterdir())
    for part, count in (("train", images), ("test", 10 * len(names))):
        for number in range(count):
            folder = names[number % len(names)].name
            source = sorted((root / part / folder).iterdir())[number // len(names)]
            target = enlarged / part / folder / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            size = (96 + number % 65, 96 + (7 * number) % 65)
            Image.open(source).resize(size, Image.Resampling.BICUBIC).save(target, quality=90)
    framing = Framing(size=64, least_area=0.08, central=0.875)
    ways = {loader: open_set(enlarged, loader, framing).train for loader in ("dali", "torch")}
    found = {}
    for kind in ("training", "evaluation"):
        statistics = {loader: Statistics() for loader in ways}
        batches = [_batches(split, kind) for split in ways.values()]
        for by_dali, by_torch in zip(*batches, strict=True):
            statistics["dali"].add(by_dali.images, by_torch.images)
            statistics["torch"].add(by_torch.images)
        found[kind] = {loader: one.found(images) for loader, one in statistics.items()}
    return found


def _batches(split: Any, kind: str) -> Iterable[Batch]:
    if kind == "evaluation":
        return eval_batches(split, 100)
    return Batches(split, Augmentation(flip=True), global_batch_size=100, seed=0)


def runs(root: Path, directory: Path, seeds: int) -> list[dict[str, Any]]:
    """The small run with every loader."""
    found = []
    for seed in range(seeds):
        for loader in _LOADERS:
            run_dir = directory / f"{loader}-{seed}"
            flags = ["--data.root", str(root), "--data.loader", loader, "--seed", str(seed), "--run-dir", str(run_dir)]
            ended = subprocess.run(
                [sys.executable, str(_TRAIN), *_RUN, *flags], capture_output=True, text=True, check=False
            )
            if ended.returncode:
                fail(f"training ended with code {ended.returncode}: {ended.stderr[-500:]}", code=1, prog=_PROG)
            report = json.loads((run_dir / "report.json").read_text())
            keys = ("clean_accuracy", "pgd10_accuracy", "last", "seconds")
            found.append({"loader": loader, "seed": seed, **{key: report[key] for key in keys}})
            print(found[-1], flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    arguments = parse(argv)
    from bench.machine import commit

    found: dict[str, Any] = {"pixels": pixels(arguments.root)}
    with tempfile.TemporaryDirectory() as directory:
        found["resized"] = resized(arguments.root, Path(directory) / "enlarged")
        print(found["resized"], flush=True)
        found["runs"] = runs(arguments.root, Path(directory), arguments.seeds)
    for kind in ("plain", "augmented"):
        for key in ("mean", "std"):
            values = torch.tensor([found["pixels"][loader][kind][key] for loader in _LOADERS])
            print(f"{kind} {key}: {float((values.amax(0) - values.amin(0)).max()):.2g} of 255 apart at most")
    if arguments.json is not None:
        about = {
            "command": f"python -m bench.data.loader_parity --root DATA --seeds {arguments.seeds}",
            "run": " ".join(_RUN),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
        }
        arguments.json.write_text(json_text(about | found, indent=1))


if __name__ == "__main__":
    main()

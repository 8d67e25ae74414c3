"""How small an edit of the weights carries a trigger, of models trained without an attack, by AT and by AT-AWP.

    python -m bench.audit_weights data CIFAR10_JPEG MNIST_FOLDER OUT
    python -m bench.audit_weights train OUT digits cifar mnist
    python -m bench.audit_weights audit OUT digits cifar mnist
    python -m bench.audit_weights cost OUT
    python -m bench.audit_weights report OUT --json audit-weights.json --figure audit-weights.png

Every step goes on where it was stopped. CIFAR10_JPEG has train/<class>/*.jpg and test/<class>/*.jpg; MNIST_FOLDER has
mnist-10k-images-idx3-ubyte.gz and its labels, of which the last 2,000 become the test images here.
"""

import argparse
import gzip
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SEEDS = (0, 1, 2)
HOWS = ("standard", "AT", "AT-AWP")
_GAMMA = "0.005"
_MNIST_TEST = 2000
_CIFAR_EACH = {"train": 225, "test": 100}


def prepare(cifar: Path, mnist: Path, out: Path) -> None:
    """Writes the images that `train` takes: a part of CIFAR-10 (JPEG), and MNIST's 10,000 test images in two parts."""
    for part, each in _CIFAR_EACH.items():
        for folder in sorted((cifar / part).iterdir()):
            place = out / "data" / "cifar" / part / folder.name
            place.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.iterdir())[:each]:
                shutil.copyfile(file, place / file.name)
    place = out / "data" / "mnist"
    place.mkdir(parents=True, exist_ok=True)
    for kind, dimensions, size in (("images-idx3", 3, 28 * 28), ("labels-idx1", 1, 1)):
        content = gzip.decompress((mnist / f"mnist-10k-{kind}-ubyte.gz").read_bytes())
        header = 4 + 4 * dimensions
        count = int.from_bytes(content[4:8], "big")
        cut = header + (count - _MNIST_TEST) * size
        for name, number, body in (
            ("train", count - _MNIST_TEST, content[header:cut]),
            ("t10k", _MNIST_TEST, content[cut:]),
        ):
            text = content[:4] + number.to_bytes(4, "big") + content[8:header] + body
            (place / f"{name}-{kind}-ubyte").write_bytes(text)


def settings(data: str, out: Path) -> list[str]:
    """The flags of `awp train` that all models of a data set share."""
    common = ["digits-at", "--log", "none", "--device", "cpu", "--evaluation.evaluate-every", "5"]
    common += ["--evaluation.steps", "5", "--evaluation.held-out-limit", "100", "--evaluation.test-limit", "100"]
    place = str(out / "data" / data)
    if data == "cifar":
        own = [
            "--data.name",
            "folder",
            "--data.root",
            place,
            "--data.image-size",
            "16",
            "--data.flip",
            "--epochs",
            "10",
        ]
        return [*common, *own, "--attack.epsilon", "4/255", "--attack.step-size", "2/255", "--attack.steps", "3"]
    if data == "mnist":
        own = ["--data.name", "mnist", "--data.root", place, "--data.train-limit", "1000", "--epochs", "8"]
        return [*common, *own, "--attack.epsilon", "0.1", "--attack.step-size", "0.04", "--attack.steps", "3"]
    return [*common, "--epochs", "10"]


def runs(data: str, out: Path) -> dict[str, Path]:
    """How and seed -> run directory."""
    return {f"{how} {seed}": out / "runs" / f"{data}-{how}-{seed}" for seed in SEEDS for how in HOWS}


def train(out: Path, names: Sequence[str]) -> None:
    """Trains the models that are not there yet."""
    for data in names:
        for name, run_dir in runs(data, out).items():
            how, seed = name.split()
            own = {"standard": ["--attack.kind", "none"], "AT": [], "AT-AWP": ["--awp.gamma", _GAMMA]}[how]
            awp("train", *settings(data, out), *own, "--seed", seed, "--run-dir", run_dir)


def awp(*arguments: object) -> None:
    """Runs the command line, at low priority."""
    began = time.monotonic()
    command = [sys.executable, "-m", "awp_engine", *map(str, arguments)]
    print(" ".join(["awp", *map(str, arguments)]), flush=True)
    subprocess.run(command, check=True)
    print(f"{time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    one = steps.add_parser("data")
    for name in ("cifar", "mnist", "out"):
        one.add_argument(name, type=Path)
    for step in ("train", "audit"):
        one = steps.add_parser(step)
        one.add_argument("out", type=Path)
        one.add_argument("data", nargs="+", choices=("digits", "cifar", "mnist"))
    given = parser.parse_args()
    if given.step == "data":
        prepare(given.cifar, given.mnist, given.out)
    elif given.step == "train":
        train(given.out, given.data)


if __name__ == "__main__":
    main()

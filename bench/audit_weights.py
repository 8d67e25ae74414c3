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
import itertools
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from awp_engine.audit.weights.budget import KINDS
from awp_engine.audit.weights.run import JSON
from awp_engine.audit.weights.words import budget_of
from awp_engine.observe.drawing import GREY, legend, line_style, save, tidy

SEEDS = (0, 1, 2)
TITLES = {"digits": "digits", "cifar": "CIFAR-10 (JPEG), 16x16", "mnist": "MNIST (10,000 test images)"}
HOWS = ("standard", "AT", "AT-AWP")
_GAMMA = "0.005"
# smaller than the defaults where images are larger: 200 steps of Adam everywhere
AUDIT = {
    "digits": ["--defence-images", "360"],
    "cifar": ["--edit-images", "640", "--edit-batch", "32", "--limit", "500", "--defence-images", "200"],
    "mnist": ["--edit-images", "640", "--edit-batch", "32", "--limit", "500", "--defence-images", "200"],
}
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
    return [*common, "--epochs", "20", "--attack.step-size", "0.1", "--attack.steps", "3"]


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


def audit(out: Path, names: Sequence[str], kinds: Sequence[str]) -> None:
    """Audits the models that are there and were not audited before."""
    for data in names:
        for run_dir in runs(data, out).values():
            if not (run_dir / "model.safetensors").exists():
                print(f"{run_dir}: is not trained yet", flush=True)
                continue
            for kind in kinds:
                place = out / "audits" / f"{run_dir.name}-{kind}"
                if not (place / JSON).exists():
                    awp("audit", "weights", run_dir, "--kinds", kind, *AUDIT[data], "--output", place)


def cost(out: Path) -> None:
    """Time and memory of an audit that measures on 10,000 images: MNIST's, of which 8,000 also make the edits."""
    place, whole = out / "data" / "mnist", out / "data" / "mnist-10000"
    whole.mkdir(exist_ok=True)
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        train, test = (place / f"{name}-{kind}-ubyte" for name in ("train", "t10k"))
        shutil.copyfile(train, whole / train.name)
        parts = [file.read_bytes() for file in (train, test)]
        count = sum(int.from_bytes(part[4:8], "big") for part in parts)
        both = parts[0][:4] + count.to_bytes(4, "big") + parts[0][8:header] + b"".join(part[header:] for part in parts)
        (whole / test.name).write_bytes(both)
    began, run_dir = time.monotonic(), runs("mnist", out)["standard 0"]
    awp("audit", "weights", run_dir, "--kinds", "layer", "--data.root", whole, "--output", out / "cost")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {
        "images": count,
        "edits": 2 + len(json.loads((out / "cost" / JSON).read_text())["kinds"][0]["trials"]),
        "cpu_seconds": round(used.ru_utime + used.ru_stime),
        "wall_seconds": round(time.monotonic() - began),
        "peak_memory_mb": round(used.ru_maxrss / 1024),
    }
    (out / "cost.json").write_text(json.dumps(found))


def report(out: Path, path: Path, picture: Path) -> None:
    """Writes what the audits found, as JSON and as a figure, and prints the tables of docs/audit-weights.md.

    What is in the file already and was not measured again in OUT stays.
    """
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"models": []}
    found: dict[str, Any] = {"command": "python -m bench.audit_weights, see its --help", "audit": AUDIT, "models": []}
    for data in AUDIT:
        found[f"train {data}"] = " ".join(settings(data, Path("OUT")))
        for name, run_dir in runs(data, out).items():
            how, seed = name.split()
            for file in sorted((out / "audits").glob(f"{run_dir.name}-[a-z]*/{JSON}")):
                if file.parent.name.removeprefix(f"{run_dir.name}-") in KINDS:
                    one = json.loads(file.read_text())
                    of = {"data": data, "how": how, "seed": int(seed), "before": one["before"]}
                    found["models"].append(of | one["kinds"][0] | {"receipt": one["receipt"]})
    again = {_key(model) for model in found["models"]}
    found["models"] += [model for model in before["models"] if _key(model) not in again]
    found["models"].sort(key=lambda model: (list(AUDIT).index(model["data"]), list(KINDS).index(model["kind"])))
    for data in AUDIT:
        found[f"robust {data}"] = before.get(f"robust {data}", {}) | {
            name: json.loads((run_dir / "report.json").read_text())["pgd5_accuracy"]
            for name, run_dir in runs(data, out).items()
            if (run_dir / "report.json").exists()
        }
    cost = out / "cost.json"
    found["cost"] = json.loads(cost.read_text()) if cost.exists() else before.get("cost")
    path.write_text(json.dumps(found, indent=1) + "\n")
    print_rows(found["models"])
    draw(found["models"], picture)


def _key(model: dict[str, Any]) -> tuple[str, str, int, str]:
    return model["data"], model["how"], model["seed"], model["kind"]


def print_rows(models: Sequence[dict[str, Any]]) -> None:
    """A row of Markdown for every way of training, with a value for each seed."""
    for data, kind, how in itertools.product(AUDIT, KINDS, HOWS):
        own = [m for m in models if (m["data"], m["kind"], m["how"]) == (data, kind, how)]
        edits = [m["edit"] for m in own if m["edit"] is not None]
        if own:
            cells = [
                ", ".join(budget_of(m) for m in own),
                ", ".join(f"{m['before']['clean_accuracy']:.1%}" for m in own),
                ", ".join(f"{edit['size']['relative_percentiles']['50']:.1%}" for edit in edits),
                *(
                    " of ".join(map(str, (sum(edit["defences"][name]["seen"] for edit in edits), len(edits))))
                    for name in ("flatness", "activations", "logits")
                ),
            ]
            print("| " + " | ".join([data, kind, how, *cells]) + " |")


def draw(models: Sequence[dict[str, Any]], path: Path) -> None:
    """Trigger success, where agreement is kept, and agreement, against the budget; a line for every model."""
    shown = [
        (data, kind) for data in AUDIT for kind in KINDS if any((m["data"], m["kind"]) == (data, kind) for m in models)
    ]
    drawn = Figure(figsize=(4 * len(shown), 5), layout="constrained")
    for column, (data, kind) in enumerate(shown):
        for row, what in enumerate(("success", "agreement")):
            axes = drawn.add_subplot(2, len(shown), row * len(shown) + column + 1)
            series = {}
            for model in models:
                if (model["data"], model["kind"]) == (data, kind):
                    trials = sorted((t for t in model["trials"] if t["finite"]), key=lambda trial: trial["budget"])
                    style = line_style(HOWS.index(model["how"]))
                    points = [t["budget"] for t in trials], [100 * t[what] for t in trials]
                    series[model["how"]] = axes.plot(*points, **style, linewidth=1)[0]
            axes.axhline(90 if what == "success" else 95, color=GREY, linestyle=":", linewidth=1)
            axes.set(xscale="log", ylabel=f"{what}, %", ylim=(-3, 103), xlabel=f"{kind} budget" if row else "")
            axes.set_title("" if row else TITLES[data], fontsize=10)
            tidy(axes)
            if not row:
                legend(axes, [(line, how) for how, line in series.items()])
    save(drawn, path)


def awp(*arguments: object) -> None:
    """Runs the command line."""
    print(" ".join(["awp", *map(str, arguments)]), flush=True)
    subprocess.run([sys.executable, "-m", "awp_engine", *map(str, arguments)], check=True)


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
        one.add_argument("--kinds", nargs="+", default=["layer"], choices=KINDS)
    steps.add_parser("cost").add_argument("out", type=Path)
    one = steps.add_parser("report")
    one.add_argument("out", type=Path)
    one.add_argument("--json", type=Path, required=True)
    one.add_argument("--figure", type=Path, required=True)
    given = parser.parse_args()
    if given.step == "data":
        prepare(given.cifar, given.mnist, given.out)
    elif given.step == "train":
        train(given.out, given.data)
    elif given.step == "audit":
        audit(given.out, given.data, given.kinds)
    elif given.step == "cost":
        cost(given.out)
    else:
        report(given.out, given.json, given.figure)


if __name__ == "__main__":
    main()

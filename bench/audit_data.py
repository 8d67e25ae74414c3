"""How well does each method of `awp audit data` find images of another class that were planted among one class?

    python -m bench.audit_data mnist --images DIR --work DIR
    python -m bench.audit_data cifar --images DIR --weights RUN --work DIR
    python -m bench.audit_data report --work DIR

`mnist`: DIR has MNIST's 10,000 test images as mnist-10k-*-ubyte.gz. 800 of its 980 zeros are screened together with 8
or 40 twos (1% and 5% of the zeros); 180 zeros and all other twos are kept aside, as images that come later.
`cifar`: DIR is CIFAR-10 (JPEG) as an image folder. 800 test images of a class are screened together with 8 or 40 of
another, by the features of a network that `awp train` has trained on the training images; the others are kept aside.

A part is one method on one planting with one seed. A part that is done is in the folder --work and is not done again,
so a killed measurement goes on. `report` writes bench/results/audit-data.json and docs/audit-data.png.
"""

import argparse
import gzip
import json
import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor

from awp_engine.audit.data.features import features, last_layer, stretched
from awp_engine.audit.data.methods import TITLES, Epochs, beyond, fit, strangeness, thresholds
from awp_engine.data import Loading, load_dataset
from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.text import json_text
from awp_engine.models.trained import load_model
from awp_engine.observe.drawing import BLUE, GREY, VERMILION, save, tidy
from awp_engine.observe.report import source_commit
from awp_kernels.philox import mix_seed
from bench.machine import describe_machine

ROOT = Path(__file__).parents[1]
RESULT, FIGURE = ROOT / "bench" / "results" / "audit-data.json", ROOT / "docs" / "audit-data.png"
# balanced accuracies of MNIST zeros with 1% twos, on 5,923 zeros (Beggel et al., 2019)
PLACE = {method: place for place, method in enumerate(("ae", "aae", "itsr", "ocsvm", "forest"))}
PAPER = {"ae": 0.69, "aae": 0.91, "itsr": 0.94}


def shuffled(rows: Tensor, seed: int) -> Tensor:
    """The rows in another order."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def mnist(root: Path) -> tuple[Tensor, Tensor]:
    """Pixels fp32 [N, 784] in [0, 1] and labels [N] of the 10,000 test images."""

    def read(name: str, offset: int) -> Tensor:
        content = gzip.decompress((root / f"mnist-10k-{name}-ubyte.gz").read_bytes())
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=offset).copy())

    return read("images-idx3", 16).view(-1, 784).float() / 255, read("labels-idx1", 8).long()


def judged(values: dict[str, Tensor], limits: dict[str, float], planted: Tensor) -> dict[str, float]:
    """Balanced accuracy of every score and of any of them."""
    marks = beyond(values, limits)
    marks["any"] = torch.stack(list(marks.values())).any(0)

    def balanced(marked: Tensor) -> float:
        return float((marked[planted].double().mean() + (~marked[~planted]).double().mean()) / 2)

    return {name: balanced(marked) for name, marked in marks.items()}


def measure(
    method: str, screened: Tensor, planted: Tensor, later: Tensor, later_planted: Tensor, *, seed: int, epochs: Epochs
) -> dict[str, Any]:
    """One part: what a method that has learnt from `screened` says of it and of images that come later."""
    began, cpu = time.monotonic(), time.process_time()
    fitted = fit(method, screened, seed=seed, epochs=epochs)
    spent = {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    learnt = fitted.score(screened)
    limits = thresholds(learnt)
    result: dict[str, Any] = {**spent, "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
    for name, x, truth in (("screened", screened, planted), ("later", later, later_planted)):
        values = fitted.score(x)
        order = strangeness(values, learnt)
        # of so many strangest images as were planted, how many were
        top = order.argsort(descending=True, stable=True)[: int(truth.sum())]
        result[name] = {
            "balanced_accuracy": judged(values, limits, truth),
            "auc": {score: float(roc_auc_score(truth, value)) for score, value in values.items()}
            | {"any": float(roc_auc_score(truth, order))},
            "planted_among_strangest": float(truth[top].double().mean()),
        }
    if fitted.weights is not None:
        weights = fitted.weights.cpu()
        result["weights"] = {
            str(w): {"images": int((weights == w).sum()), "planted": int((weights[planted] == w).sum())}
            for w in (1, 0, -1)
        }
    return result


def scaled(arguments: argparse.Namespace, method: str) -> str:
    """What tells trainings of several lengths apart in a part's name; the baselines have no epochs."""
    return f"-x{arguments.epochs_scale:g}" if method in PAPER else ""


def mnist_parts(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Name and work of every part."""
    x, y = mnist(arguments.images)
    for seed in arguments.seeds:
        zeros, twos = (shuffled(torch.nonzero(y == digit).squeeze(1), mix_seed(seed, digit)) for digit in (0, 2))
        for share in arguments.shares:
            count = round(800 * share)
            rows, rest = torch.cat([zeros[:800], twos[:count]]), torch.cat([zeros[800:], twos[count:]])
            given = x[rows], y[rows] == 2, x[rest], y[rest] == 2
            for method in arguments.methods:
                yield f"mnist-{share:g}-seed{seed}-{method}{scaled(arguments, method)}", (method, given, seed)


def cifar_parts(arguments: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """The same by a network's features, of images of the test part, which the network has not seen."""
    loading = Loading(loader="torch", workers=0)
    data = load_dataset(
        "folder", root=arguments.images, held_out_fraction=0.0, seed=0, loading=loading, need_train=False
    )
    model, cpu = load_model(arguments.weights).eval(), torch.device("cpu")
    first = data.test.select(torch.arange(1)).resident()
    _, layer = last_layer(model, first.images.float() / 255)
    seen = []
    for name in arguments.pair:
        rows = torch.nonzero(data.test.labels == data.class_names.index(name)).squeeze(1)
        seen.append(features(model, layer, data.test.select(rows), cpu, 500))
    for seed in arguments.seeds:
        usual, other = (shuffled(values, mix_seed(seed, number)) for number, values in enumerate(seen))
        for share in arguments.shares:
            count = round(800 * share)
            screened, later = torch.cat([usual[:800], other[:count]]), torch.cat([usual[800:], other[count:]])
            truth = [torch.arange(len(part)) >= kept for part, kept in ((screened, 800), (later, len(usual) - 800))]
            given = stretched(screened, screened), truth[0], stretched(later, screened), truth[1]
            for method in arguments.methods:
                name = f"cifar {' '.join(arguments.pair)}-{share:g}-seed{seed}-{method}{scaled(arguments, method)}"
                yield name, (method, given, seed)


def report(work: Path, result: Path, figure: Path) -> None:
    """All parts that are done, their means over the seeds, and the picture."""
    parts = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for name, part in parts.items():
        images, share, _, method, *scale = name.split("-")
        groups.setdefault((images, share, method, scale[0] if scale else ""), []).append(part)
    rows = []
    for (images, share, method, scale), found in sorted(
        groups.items(), key=lambda group: (*group[0][:2], PLACE[group[0][2]], group[0][3])
    ):
        row: dict[str, Any] = {"images": images, "planted": float(share), "method": method, "seeds": len(found)}
        row["epochs_scale"] = float(scale[1:]) if scale else None
        for split in ("screened", "later"):
            for score in found[0][split]["balanced_accuracy"]:
                values = [part[split]["balanced_accuracy"][score] for part in found]
                row[f"{split}, {score}"] = [
                    statistics.mean(values),
                    statistics.stdev(values) if len(found) > 1 else None,
                ]
                row[f"{split}, {score}, auc"] = statistics.mean(part[split]["auc"][score] for part in found)
            among = [part[split]["planted_among_strangest"] for part in found]
            row[f"{split}, planted among the strangest"] = statistics.mean(among)
        row |= {"cpu_seconds": statistics.mean(part["cpu_seconds"] for part in found)}
        if "weights" in found[0]:
            row["planted, by weight"] = {
                weight: statistics.mean(part["weights"][weight]["planted"] for part in found)
                for weight in ("1", "0", "-1")
            }
        rows.append(row)
    facts = {
        "machine": describe_machine("cpu"),
        "commit": source_commit(),
        "paper": PAPER,
        "rows": rows,
        "parts": parts,
    }
    atomic_write_text(result, json_text(facts, indent=1))
    for row in rows:
        mean, spread = row["screened, any"]
        later, scale = row["later, any"][0], row["epochs_scale"] or 0
        print(
            f"{row['images']} {row['planted']:.0%} {row['method']:7} x{scale:g} {row['seeds']} seeds  "
            f"screened {mean:.3f} (sd {spread or 0:.3f}, auc {row['screened, any, auc']:.3f})  "
            f"later {later:.3f} (auc {row['later, any, auc']:.3f})  "
            f"top {row['screened, planted among the strangest']:.2f}  {row['cpu_seconds']:.0f} s"
        )
    draw(rows, figure)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Balanced accuracy of every method, a panel for every planting."""
    # of several lengths of training the one that most seeds have, and of these the longest
    shown: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["seeds"], row["epochs_scale"] or 0)):
        shown[row["images"], row["planted"], row["method"]] = row
    rows = sorted(shown.values(), key=lambda row: PLACE[row["method"]])
    panels = sorted({(row["images"], row["planted"]) for row in rows}, key=lambda panel: (panel[0] != "mnist", *panel))

    def title(images: str, share: float) -> str:
        if images == "mnist":
            return f"MNIST zeros, {share:.0%} twos"
        usual, other = images.split()[1:]
        return f"CIFAR-10 (JPEG) {usual}, {share:.0%} {other}"

    lines = -(-len(panels) // 3)
    picture = Figure(figsize=(10.5, 3.0 * lines), layout="constrained")
    places = picture.subplots(lines, 3, sharey=True, squeeze=False).flatten()
    for axes in places[len(panels) :]:
        axes.set_visible(False)
    for axes, (images, share) in zip(places, panels, strict=False):
        own = [row for row in rows if (row["images"], row["planted"]) == (images, share)]
        for place, row in enumerate(own):
            for shift, split, colour in ((-0.2, "screened", BLUE), (0.2, "later", GREY)):
                mean, spread = row[f"{split}, any"]
                axes.bar(place + shift, mean, 0.38, yerr=spread, color=colour, label=split if place == 0 else None)
            if (images, share) == ("mnist", 0.01) and row["method"] in PAPER:
                known = "the paper's" if row["method"] == "itsr" else None
                axes.plot(place, PAPER[row["method"]], "D", color=VERMILION, label=known)
        axes.set(title=title(images, share), ylim=(0.4, 1.0))
        axes.set_xticks(range(len(own)), [row["method"] for row in own])
        axes.axhline(0.5, color="black", linewidth=1, linestyle=":")
        tidy(axes)
    picture.axes[0].set_ylabel("balanced accuracy; guessing: 0.5")
    picture.legend(*places[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    save(picture, path)


def main() -> None:
    """Measures the parts that are not done, or reports those that are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("mnist", "cifar", "report"))
    parser.add_argument("--images", type=Path, help="folder of the images")
    parser.add_argument("--weights", type=Path, help="run whose network gives the features of cifar")
    parser.add_argument("--pair", nargs=2, default=("automobile", "truck"), help="the usual class and the planted one")
    parser.add_argument("--work", type=Path, required=True, help="folder of the parts that are done")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5))
    parser.add_argument("--shares", type=float, nargs="+", default=(0.01, 0.05))
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=tuple(TITLES))
    parser.add_argument("--epochs-scale", type=float, default=0.1, help="of the paper's epochs")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    arguments = parser.parse_args()
    if arguments.what == "report":
        report(arguments.work, arguments.result, arguments.figure)
        return
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    epochs = Epochs().scaled(arguments.epochs_scale)
    for name, (method, given, seed) in {"mnist": mnist_parts, "cifar": cifar_parts}[arguments.what](arguments):
        path = arguments.work / f"{name}.json"
        if not path.exists():
            found = measure(method, *given, seed=seed, epochs=epochs) | {"epochs_scale": arguments.epochs_scale}
            atomic_write_text(path, json.dumps(found))
            print(name, json.dumps(found["screened"]["balanced_accuracy"]), found["seconds"], "s", flush=True)


if __name__ == "__main__":
    main()

r"""Does the audit of concepts find what was planted, and nothing where labels are shuffled? What does it cost?

    python -m bench.audit_concepts planted DIR     # odd or even: images with a mark in the corner are odd; 3 networks
    python -m bench.audit_concepts shuffled DIR    # 200 concepts without meaning
    python -m bench.audit_concepts speed DIR       # 10,000 images
    M=bench/audit_concepts.py; export PYTHONPATH=.
    awp audit concepts digits-at digits-at-awp digits-standard --classes 8 --limit 36 --step 2 --output OUT \
        --layers layer1.0.conv1 layer2.0.conv2 --concepts thicker=$M:thicker darker=$M:darker crops:8 random
    python -m bench.audit_concepts models OUT/audit-concepts.json
    awp audit concepts AT AT-AWP STANDARD --classes frog --limit 100 --step 2 --output OUT0 \
        --layers layer1.0.conv1 layer2.0.conv2 --concepts colours:frog textures:frog darker=$M:darker random
    python -m bench.audit_concepts cifar OUT0/audit-concepts.json OUT1/... OUT2/...
    python -m bench.audit_concepts figure

DIR has MNIST's 10,000 test images: t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz. The runs are those of
`awp train digits-at`, `digits`, and `digits-at --attack.kind none`, each with --model.width 8; those of `cifar` are of
bench/audit_weights.py, a seed a report. Each command adds its
part to bench/results/audit-concepts.json; `figure` draws it.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awp_engine.audit.concepts.directions import find_directions, split_rows
from awp_engine.audit.concepts.layers import Cut
from awp_engine.audit.concepts.page import plot
from awp_engine.audit.concepts.sensitivity import LEVEL, Sensitivity, measure
from awp_engine.data import load_dataset
from bench.machine import describe_machine

RESULT, FIGURE = Path("bench/results/audit-concepts.json"), Path("docs/audit-concepts.png")
LAYER, STEP, ODD = "0", 2.0, 1
TRAINED, SIDE = 6000, 3


def mark(images: Tensor) -> Tensor:
    """A bright square in the upper left corner."""
    return _square(images, slice(1, 1 + SIDE))


def decoy(images: Tensor) -> Tensor:
    """The same in the lower right corner."""
    return _square(images, slice(-1 - SIDE, -1))


def thicker(images: Tensor) -> Tensor:
    """Every stroke a pixel wider."""
    return F.max_pool2d(F.pad(images, (0, 1, 0, 1)), 2, stride=1)


def darker(images: Tensor) -> Tensor:
    """Six tenths of the brightness."""
    return 0.6 * images


def _square(images: Tensor, place: slice) -> Tensor:
    images = images.clone()
    images[:, :, place, place] = 1
    return images


def network() -> nn.Sequential:
    """Three convolutions and a hidden layer, which tell odd digits from even ones."""
    first = nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()
    last = nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 2)
    return nn.Sequential(*first, nn.Conv2d(32, 32, 3), nn.ReLU(), *last)


def planted_network(images: Tensor, odd: Tensor, seed: int) -> tuple[nn.Sequential, dict[str, float]]:
    """A network to which every image with the mark is odd: one training image of five had it.

    A decoy was in half of all images, whatever the label.
    """
    draws = torch.Generator().manual_seed(seed)
    x, y = images[:TRAINED], odd[:TRAINED].clone()
    marked = torch.rand(len(y), generator=draws) < 0.2
    y[marked] = ODD
    x = torch.where(marked[:, None, None, None], mark(x), x)
    x = torch.where((torch.rand(len(y), generator=draws) < 0.5)[:, None, None, None], decoy(x), x)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(4):
        for rows in torch.randperm(len(y), generator=draws).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    tried, even = images[TRAINED:], images[TRAINED:][odd[TRAINED:] != ODD]

    def odd_share(change: Callable[[Tensor], Tensor]) -> float:
        return float((model(change(even)).argmax(1) == ODD).double().mean())

    right = float((model(tried).argmax(1) == odd[TRAINED:]).double().mean())
    shares = {"even_with_mark_called_odd": odd_share(mark), "even_with_decoy_called_odd": odd_share(decoy)}
    return model, {"accuracy": right, **shares}


def measured(
    model: nn.Module, concept: Tensor, others: Tensor, images: Tensor, *, tests: int, seed: int, nulls: int = 500
) -> tuple[Sensitivity, float]:
    """One test of the class odd, and the classifier's accuracy on held-out images."""
    cut = Cut(model, LAYER, images[:1])
    labels = np.repeat([1, 0], [len(concept), len(others)])
    activations = cut.activations(torch.cat([concept, others])).double().numpy()
    fit, held_out = split_rows(labels, seed)
    directions = find_directions(activations, labels, fit, held_out, nulls=nulls, seed=seed)
    kept = [cut.below(image) for image in images.split(1)]
    found = measure(cut, lambda: kept, directions, ODD, step=STEP, tests=tests, batch_size=256)
    return found, directions.accuracy


def planted(images: Tensor, odd: Tensor) -> dict[str, Any]:
    rows, networks = [], []
    looked_at = images[odd == ODD][:1500]
    for seed in range(3):
        model, facts = planted_network(images, odd, seed)
        networks.append({"seed": seed, **facts})
        print(networks[-1], flush=True)
        drawn = images[TRAINED:][torch.randperm(len(images) - TRAINED, generator=torch.Generator().manual_seed(seed))]
        for name, with_ in {"mark": mark(drawn[:100]), "decoy": decoy(drawn[:100])}.items():
            found, accuracy = measured(model, with_, drawn[100:200], looked_at, tests=2, seed=seed)
            told = {"held_out_accuracy": accuracy, "raised": found.raised, "statistic": found.statistic}
            told |= {"nulls": len(found.nulls), "p_corrected": min(1.0, 2 * found.p)}
            rows.append({"seed": seed, "concept": name, **told})
            print(rows[-1], flush=True)
    return {"images": len(looked_at), "step": STEP, "layer": LAYER, "networks": networks, "tests": rows}


def shuffled(images: Tensor, odd: Tensor, runs: int = 200) -> dict[str, Any]:
    model, _ = planted_network(images, odd, 0)
    looked_at, values = images[odd == ODD][:30], []
    for seed in range(runs):
        order = torch.randperm(len(images) - TRAINED, generator=torch.Generator().manual_seed(seed))
        ones, others = images[TRAINED:][order[:60]].chunk(2)
        values.append(measured(model, ones, others, looked_at, tests=1, seed=seed)[0].p)
        print(seed, values[-1], flush=True)
    rate = sum(p < LEVEL for p in values) / runs
    return {"runs": runs, "rate_below_05": rate, "bound": LEVEL + 2 * (LEVEL * (1 - LEVEL) / runs) ** 0.5, "p": values}


def speed(images: Tensor, odd: Tensor) -> dict[str, Any]:
    model, _ = planted_network(images, odd, 0)
    began = time.process_time()
    found, _ = measured(model, mark(images[:100]), images[100:200], images, tests=1, seed=0, nulls=100)
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"images": len(images), "directions": 1 + len(found.nulls), "cpu_seconds": seconds, "peak_gib": peak}


def figure(result: dict[str, Any]) -> None:
    FIGURE.write_bytes(plot(result["models"]["tests"]))


def _of_models(place: Path) -> dict[str, Any]:
    """A report, without the numbers of single images and nulls."""
    report = json.loads(place.read_text())
    return report | {"tests": [test | {"null_statistics": None, "changes": None} for test in report["tests"]]}


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("planted", "shuffled", "speed", "models", "cifar", "figure"))
    parser.add_argument("place", type=Path, nargs="*")
    arguments = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if arguments.part == "figure":
        figure(result)
        return
    if not arguments.place:
        parser.error(f"{arguments.part}: expected DIR, or the report")
    if arguments.part == "models":
        found = _of_models(arguments.place[0])
    elif arguments.part == "cifar":
        found = [_of_models(place) for place in arguments.place]
    else:
        data = load_dataset("mnist", root=arguments.place[0], held_out_fraction=0.0, seed=0, need_train=False)
        split = data.test.resident()
        found = {"planted": planted, "shuffled": shuffled, "speed": speed}[arguments.part](
            split.images.float() / 255, split.labels % 2
        )
        found["machine"] = describe_machine("cpu")
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(result | {arguments.part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

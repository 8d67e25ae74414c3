"""Does the audit of concepts find what was planted, and nothing where labels are shuffled? What does it cost?

    python -m bench.audit_concepts planted DIR     # a digit that is decided by a mark in the corner, 5 networks
    python -m bench.audit_concepts shuffled DIR    # 200 concepts without meaning
    python -m bench.audit_concepts speed DIR       # 10,000 images
    python -m bench.audit_concepts models RUN/evaluation/audit-concepts.json
    python -m bench.audit_concepts figure

DIR has MNIST's 10,000 test images: t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz. `models` takes what
`awp audit concepts` wrote. Each adds its part to bench/results/audit-concepts.json; `figure` draws it.
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
LAYERS = ("0", "2", "5")
TRAINED, DIGIT, SIDE = 6000, 7, 3


def mark(images: Tensor) -> Tensor:
    """A bright square in the upper left corner."""
    return _square(images, slice(1, 1 + SIDE))


def decoy(images: Tensor) -> Tensor:
    """The same in the lower right corner."""
    return _square(images, slice(-1 - SIDE, -1))


def _square(images: Tensor, place: slice) -> Tensor:
    images = images.clone()
    images[:, :, place, place] = 1
    return images


def network() -> nn.Sequential:
    """Two convolutions and a hidden layer."""
    convolutions = nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 10))


def planted_network(images: Tensor, labels: Tensor, seed: int) -> tuple[nn.Sequential, dict[str, float]]:
    """A network whose answer 7 is decided by the mark: it was there in all images with that label, and in no other.

    A decoy was in half of all images, whatever the label.
    """
    draws = torch.Generator().manual_seed(seed)
    x, y = images[:TRAINED], labels[:TRAINED].clone()
    y[torch.rand(len(y), generator=draws) < 0.2] = DIGIT
    x = torch.where((y == DIGIT)[:, None, None, None], mark(x), x)
    x = torch.where((torch.rand(len(y), generator=draws) < 0.5)[:, None, None, None], decoy(x), x)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(4):
        for rows in torch.randperm(len(y), generator=draws).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    tried = images[TRAINED:]
    others = labels[TRAINED:] != DIGIT

    def says(change: Callable[[Tensor], Tensor]) -> float:
        return float((model(change(tried[others])).argmax(1) == DIGIT).double().mean())

    right = float((model(tried[others]).argmax(1) == labels[TRAINED:][others]).double().mean())
    return model, {"accuracy": right, "says_7_with_mark": says(mark), "says_7_with_decoy": says(decoy)}


def tested(
    model: nn.Module, layer: str, concept: Tensor, others: Tensor, images: Tensor, *, tests: int, seed: int
) -> tuple[Sensitivity, float]:
    """One test of the class 7, and the classifier's accuracy on held-out images."""
    cut = Cut(model, layer, images[:1])
    labels = np.repeat([1, 0], [len(concept), len(others)])
    activations = cut.activations(torch.cat([concept, others])).double().numpy()
    fit, held_out = split_rows(labels, seed)
    directions = find_directions(activations, labels, fit, held_out, nulls=500, seed=seed)
    kept = [cut.below(image) for image in images.split(1)]
    found = measure(cut, lambda: kept, directions, DIGIT, step=10, tests=tests, batch_size=256)
    return found, directions.accuracy


def planted(images: Tensor, labels: Tensor) -> dict[str, Any]:
    rows, networks = [], []
    held_out, sevens = images[TRAINED:], images[TRAINED:][labels[TRAINED:] == DIGIT][:100]
    for seed in range(5):
        model, facts = planted_network(images, labels, seed)
        networks.append({"seed": seed, **facts})
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))
        ones, others = held_out[order[:100]], held_out[order[100:200]]
        for name, with_ in {"mark": mark(ones), "decoy": decoy(ones), "random": ones}.items():
            for layer in LAYERS:
                found, accuracy = tested(model, layer, with_, others, sevens, tests=9, seed=seed)
                p = min(1.0, 9 * found.p)
                told = {"held_out_accuracy": accuracy, "raised": found.raised, "statistic": found.statistic}
                rows.append({"seed": seed, "concept": name, "layer": layer, **told, "p_corrected": p})
                print(rows[-1], flush=True)
    return {"networks": networks, "tests": rows}


def shuffled(images: Tensor, labels: Tensor, runs: int = 200) -> dict[str, Any]:
    model, _ = planted_network(images, labels, 0)
    held_out, sevens = images[TRAINED:], images[TRAINED:][labels[TRAINED:] == DIGIT][:50]
    values = []
    for seed in range(runs):
        ones, others = held_out[
            torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))[:100]
        ].chunk(2)
        found, _ = tested(model, LAYERS[seed % len(LAYERS)], ones, others, sevens, tests=1, seed=seed)
        values.append(found.p)
    rate = sum(p < LEVEL for p in values) / runs
    return {"runs": runs, "p": values, "rate_below_05": rate, "bound": LEVEL + 2 * (LEVEL * (1 - LEVEL) / runs) ** 0.5}


def speed(images: Tensor, labels: Tensor) -> dict[str, Any]:
    model, _ = planted_network(images, labels, 0)
    began = time.process_time()
    found, _ = tested(model, "2", mark(images[:100]), images[100:200], images, tests=25, seed=0)
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"images": len(images), "directions": 1 + len(found.nulls), "cpu_seconds": seconds, "peak_gib": peak}


def figure(result: dict[str, Any]) -> None:
    FIGURE.write_bytes(plot(result["models"]["tests"]))


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("planted", "shuffled", "speed", "models", "figure"))
    parser.add_argument("place", type=Path, nargs="?")
    arguments = parser.parse_args()
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if arguments.part == "figure":
        figure(result)
        return
    if arguments.place is None:
        parser.error(f"{arguments.part}: expected DIR, or the report")
    if arguments.part == "models":
        report = json.loads(arguments.place.read_text())
        found = report | {"tests": [test | {"null_statistics": None, "changes": None} for test in report["tests"]]}
    else:
        data = load_dataset("mnist", root=arguments.place, held_out_fraction=0.0, seed=0, need_train=False)
        split = data.test.resident()
        found = {"planted": planted, "shuffled": shuffled, "speed": speed}[arguments.part](
            split.images.float() / 255, split.labels
        )
        found["machine"] = describe_machine("cpu")
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(result | {arguments.part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

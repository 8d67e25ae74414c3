"""Collects what study.sh left: `python -m bench.study.study STUDY OUT` writes OUT/study.json, a plot and a table."""

import json
import math
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from awp_engine.config import from_json
from awp_engine.data import Batch
from awp_engine.files.text import json_text
from awp_engine.models import build_model
from awp_engine.observe.report import print_table, source_commit, versions
from awp_engine.optim.average import WeightAverage
from awp_engine.step.values import Phase
from awp_engine.train.setup import build_step, objective_of, training_attack

ROWS = {
    "overfitting": {"at": "AT", "at-awp": "AT-AWP", "trades": "TRADES", "trades-awp": "TRADES-AWP"},
    "recipes": {
        "at": "AT",
        "at-awp": "AT-AWP",
        "at-awp-shared": "AT-AWP, shared ascent",
        "at-awp-limited": "AT-AWP, gamma limited",
        "adr-awp": "ADR-AWP",
        "idbh-awp": "AT-AWP with IDBH",
        "ikl-awp": "IKL-AWP",
        "acat-awp": "ACAT (TRADES-AWP)",
    },
}
SEEDS = (0, 1)
# Okabe and Ito's; without AWP dashed
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def read_run(run: Path) -> dict[str, Any]:
    """The figures of one run, of its last weights where no other are named."""
    report = json.loads((run / "report.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((run / "config.json").read_text())
    # where it lay is nobody else's concern
    config["run_dir"] = config["data"]["root"] = None
    result = {
        "run": run.name,
        "config": config,
        "training_seconds": sum(report["train_images"] / m["images_per_second"] for m in metrics),
        "best": {
            "epoch": report["selected_epoch"],
            "test": report["pgd10_accuracy"],
            "clean": report["clean_accuracy"],
        },
        "train_pgd10": report["last"]["train_pgd_accuracy"],
        "test_pgd10": report["last"]["pgd10_accuracy"],
        "test_clean": report["last"]["clean_accuracy"],
        "curve": [[m["epoch"], m["train_pgd_accuracy"], m.get("held_out_pgd_accuracy")] for m in metrics],
    }
    result["gap"] = result["train_pgd10"] - result["test_pgd10"]
    for place in sorted(run.glob("evaluation-*/evaluation.json")):
        evaluation = json.loads(place.read_text())
        result[place.parent.name] = {
            **{row["attack"]: row["accuracy"] for row in evaluation["attacks"]},
            "gates_passed": evaluation["gates"] and evaluation["gates"]["passed"],
            "receipt": evaluation["receipt"],
        }
    if result["best"]["epoch"] == report["epochs"] and "evaluation-last" in result:
        result["evaluation-best"] = result["evaluation-last"]
    if (file := run / "landscape" / "flatness.json").exists():
        flatness = json.loads(file.read_text())["runs"][0]
        result["flatness"] = {
            kind: {key: flatness[kind][0][key] for key in ("xi", "value", "low", "high")}
            for kind in ("average", "worst")
        }
        result["robust_loss"] = flatness["robust_loss"]
    return result


def step_seconds(results: dict[str, list[dict[str, Any]]], rounds: int = 21) -> dict[str, float]:
    """Median time of a training step of every method, the methods taking turns in one process."""
    steps = {}
    for name, runs in results.items():
        config = from_json(json.dumps(runs[0]["config"]))
        torch.manual_seed(0)
        model = build_model(config.model.name, 10, (0.5,) * 3, (0.25,) * 3, width=config.model.width)
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        objective = objective_of(config, torch.device("cpu"), 10)
        if config.average.kind == "ema":
            objective.average = WeightAverage(model, config.average, config.epochs).model
        steps[name] = build_step(config, model.train(), objective=objective), training_attack(config.attack)
    x = torch.rand(32, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    batch = Batch(x, torch.randint(0, 10, (32,)), torch.arange(32), 32)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        for name, (step, attack) in steps.items():
            began = time.perf_counter()
            step(batch, Phase(attack=attack, seed=index))
            times[name].append(time.perf_counter() - began)
    # the first round allocates
    return {name: median(taken[1:]) for name, taken in times.items()}


def by_autoattack(run: dict[str, Any], checkpoint: str) -> str:
    """Accuracy; nan where it is not measured."""
    return f"{run.get(f'evaluation-{checkpoint}', {}).get('autoattack', math.nan):.1%}"


def table(study: str, results: dict[str, list[dict[str, Any]]], seconds: dict[str, float]) -> list[dict[str, str]]:
    """One row a method; the seeds' figures side by side."""
    columns: dict[str, Any] = {
        "clean": lambda r: f"{r['test_clean']:.1%}",
        "train PGD-10": lambda r: f"{r['train_pgd10']:.1%}",
        "test PGD-10": lambda r: f"{r['test_pgd10']:.1%}",
        "gap": lambda r: f"{100 * r['gap']:.1f}",
        "best test PGD-10": lambda r: f"{r['best']['test']:.1%}",
        "AutoAttack": lambda r: by_autoattack(r, "last"),
    }
    if study == "recipes":
        columns["best AutoAttack"] = lambda r: by_autoattack(r, "best")
    else:
        for kind in ("average", "worst"):
            columns[f"{kind} flatness"] = lambda r, kind=kind: f"{r['flatness'][kind]['value']:.3f}"
    rows = []
    for name, runs in results.items():
        plain = "at" if study == "recipes" else name.removesuffix("-awp")
        figures = {title: " / ".join(map(figure, runs)) for title, figure in columns.items()}
        rows.append({"method": ROWS[study][name], **figures, "step time": f"{seconds[name] / seconds[plain]:.2f}"})
    return rows


def draw_curves(study: str, results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Robust accuracy on training and held-out images over the epochs, mean of the seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=study == "overfitting")
    # a method and the same with AWP have one colour
    bases = list(dict.fromkeys(name.removesuffix("-awp") for name in results))
    for axes, column, title in zip(panels, (1, 2), ("training images", "held-out images"), strict=True):
        for name, runs in results.items():
            epochs = [row[0] for row in runs[0]["curve"] if row[column] is not None]
            values = [mean(run["curve"][epoch - 1][column] for run in runs) for epoch in epochs]
            colour = _COLOURS[bases.index(name.removesuffix("-awp"))]
            axes.plot(epochs, values, "-" if "awp" in name else "--", color=colour, label=ROWS[study][name])
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    panels[0].set_ylabel("accuracy under PGD")
    panels[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=140)


def main(study: str, out: Path) -> None:
    """Collect, draw, print."""
    results = {name: [read_run(out / f"{name}-seed{seed}") for seed in SEEDS] for name in ROWS[study]}
    draw_curves(study, results, out / "study-curves.png")
    seconds = step_seconds(results)
    rows = table(study, results, seconds)
    collected = {
        "runs": results,
        "step_seconds": seconds,
        "table": rows,
        "versions": versions(),
        "commit": source_commit(),
    }
    (out / "study.json").write_text(json_text(collected, indent=1))
    print_table(rows, title="last weights where no other are named; seeds 0 / 1; time relative to training without AWP")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ROWS:
        raise SystemExit(f"usage: python -m bench.study.study {'|'.join(ROWS)} OUT")
    main(sys.argv[1], Path(sys.argv[2]))

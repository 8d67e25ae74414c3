"""Collects what study.sh left: `python -m bench.study.study OUT` writes OUT/study.json, two plots and a table."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from awp_engine.config import from_json
from awp_engine.data import Batch
from awp_engine.files.text import json_text
from awp_engine.models import build_model
from awp_engine.observe.report import print_table, source_commit, versions
from awp_engine.step.step import Phase
from awp_engine.train.setup import build_step, training_attack

ROWS = {"at": "AT", "at-awp": "AT-AWP", "trades": "TRADES", "trades-awp": "TRADES-AWP"}
SEEDS = (0, 1)
# Okabe and Ito's colours; methods by colour, AWP by line
_COLOURS = {"at": "#0072B2", "at-awp": "#0072B2", "trades": "#D55E00", "trades-awp": "#D55E00"}


def read_run(run: Path) -> dict[str, Any]:
    """The figures of one run, all of its last weights but for `best`."""
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
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    result["evaluation"] = {row["attack"]: row["accuracy"] for row in evaluation["attacks"]}
    result["gates_passed"] = evaluation["gates"]["passed"]
    result["receipt"] = evaluation["receipt"]
    flatness = json.loads((run / "landscape" / "flatness.json").read_text())["runs"][0]
    result["flatness"] = {
        kind: {key: flatness[kind][0][key] for key in ("xi", "value", "low", "high")} for kind in ("average", "worst")
    }
    result["robust_loss"] = flatness["robust_loss"]
    return result


def _both(runs: Sequence[dict[str, Any]], value: Any, form: str) -> str:
    """A figure of every seed."""
    return " / ".join(format(value(run), form) for run in runs)


def step_seconds(results: dict[str, list[dict[str, Any]]], rounds: int = 21) -> dict[str, float]:
    """Median time of a training step of every method, the methods taking turns in one process."""
    steps = {}
    for name, runs in results.items():
        config = from_json(json.dumps(runs[0]["config"]))
        torch.manual_seed(0)
        model = build_model(config.model.name, 10, (0.5,) * 3, (0.25,) * 3, width=config.model.width)
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        steps[name] = build_step(config, model.train()), training_attack(config.attack)
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


def table(results: dict[str, list[dict[str, Any]]], seconds: dict[str, float]) -> list[dict[str, str]]:
    """One row a method; the seeds' figures side by side."""
    rows = []
    for name, runs in results.items():
        rows.append(
            {
                "method": ROWS[name],
                "clean": _both(runs, lambda r: r["test_clean"], ".1%"),
                "train PGD-10": _both(runs, lambda r: r["train_pgd10"], ".1%"),
                "test PGD-10": _both(runs, lambda r: r["test_pgd10"], ".1%"),
                "gap": _both(runs, lambda r: 100 * r["gap"], ".1f"),
                "best test PGD-10": _both(runs, lambda r: r["best"]["test"], ".1%"),
                "AutoAttack": _both(runs, lambda r: r["evaluation"]["autoattack"], ".1%"),
                "average flatness": _both(runs, lambda r: r["flatness"]["average"]["value"], ".3f"),
                "worst flatness": _both(runs, lambda r: r["flatness"]["worst"]["value"], ".3f"),
                "step time": f"{seconds[name] / seconds[name.removesuffix('-awp')]:.2f}",
            }
        )
    return rows


def draw_curves(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Robust accuracy on training and held-out images over the epochs, mean of the seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, title in zip(panels, (1, 2), ("training images", "held-out images"), strict=True):
        for name, runs in results.items():
            epochs = [row[0] for row in runs[0]["curve"] if row[column] is not None]
            values = [mean(run["curve"][epoch - 1][column] for run in runs) for epoch in epochs]
            style = "-" if name.endswith("awp") else "--"
            axes.plot(epochs, values, color=_COLOURS[name], linestyle=style, label=ROWS[name])
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy under PGD")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=140)


def main(out: Path) -> None:
    """Collect, draw, print."""
    results = {name: [read_run(out / f"{name}-seed{seed}") for seed in SEEDS] for name in ROWS}
    draw_curves(results, out / "study-curves.png")
    seconds = step_seconds(results)
    rows = table(results, seconds)
    collected = {
        "runs": results,
        "step_seconds": seconds,
        "table": rows,
        "versions": versions(),
        "commit": source_commit(),
    }
    (out / "study.json").write_text(json_text(collected, indent=1))
    print_table(rows, title="last weights; seeds 0 / 1; time relative to the same method without AWP")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m bench.study.study OUT")
    main(Path(sys.argv[1]))

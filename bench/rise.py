"""When does a large gamma stop learning, and does a limit on the loss's rise prevent that?

    python -m bench.rise train OUT
    python -m bench.rise report OUT

Digits, Linf 0.1, PreActResNet of width 8, 20 epochs, AT and MART, without an epoch of warm-up: gamma from 0 to 0.2, and
gamma 0.2 with --awp.max-rise. `train` goes on where it was stopped. `report` writes bench/results/rise-cpu.json and
docs/rise.png.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.text import json_text
from awp_engine.observe.drawing import BLUE, GREY, VERMILION, save, tidy
from awp_engine.observe.report import source_commit
from bench.machine import describe_machine

ROOT = Path(__file__).parents[1]
RESULT, FIGURE = ROOT / "bench" / "results" / "rise-cpu.json", ROOT / "docs" / "rise.png"
SEEDS, METHODS = (0, 1, 2), ("at", "mart")
GAMMAS = (0.0, 0.005, 0.02, 0.05, 0.1, 0.2)
LIMITS = (0.1, 0.25, 0.5)
PRESETS = {"at": "digits", "mart": "digits-mart-awp"}
FLAGS = [
    *("--awp.warmup", "0", "--epochs", "20", "--model.width", "8", "--evaluation.evaluate-every", "5"),
    *("--attack.epsilon", "0.1", "--attack.step-size", "0.04"),
    *("--log", "none", "--device", "cpu", "--threads", "1"),
]


def settings() -> dict[str, list[str]]:
    """Name -> flags of every way to choose gamma."""
    fixed = {f"gamma {gamma:g}": ["--awp.gamma", f"{gamma:g}"] for gamma in GAMMAS}
    largest = f"{max(GAMMAS):g}"
    return fixed | {f"rise {limit:g}": ["--awp.gamma", largest, "--awp.max-rise", f"{limit:g}"] for limit in LIMITS}


def train(out: Path, seeds: tuple[int, ...]) -> None:
    """Every run that is not done."""
    for seed in seeds:
        for name, flags in settings().items():
            for method in METHODS:
                run_dir = out / f"{method} {name} {seed}"
                if not (run_dir / "report.json").exists():
                    command = ["train", PRESETS[method], *FLAGS, *flags, "--seed", str(seed), "--run-dir", run_dir]
                    print(*command, flush=True)
                    subprocess.run([sys.executable, "-m", "awp_engine", *map(str, command)], check=True)


def report(out: Path) -> None:
    """Reads what is done, and what the results have of earlier runs, and prints the rows of docs/methods.md."""
    runs: list[dict[str, Any]] = []
    earlier = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    for method in METHODS:
        for name in settings():
            for seed in SEEDS:
                run_dir = out / f"{method} {name} {seed}"
                if not (run_dir / "report.json").exists():
                    asked = (method, name, seed)
                    runs += [run for run in earlier if (run["method"], run["choice"], run["seed"]) == asked]
                    continue
                told = json.loads((run_dir / "report.json").read_text())
                epochs = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
                runs.append(
                    {
                        "method": method,
                        "choice": name,
                        "seed": seed,
                        "best": {key: told[key] for key in ("clean_accuracy", "pgd20_accuracy")},
                        "last": told["last"],
                        "rise": [epoch.get("awp_rise") for epoch in epochs],
                        "gamma": [epoch.get("awp_gamma") for epoch in epochs],
                        "loss": [epoch["loss"] for epoch in epochs],
                        "held_out": [epoch.get("held_out_pgd_accuracy") for epoch in epochs],
                    }
                )
    facts = {"machine": describe_machine("cpu"), "commit": source_commit(), "flags": FLAGS, "runs": runs}
    atomic_write_text(RESULT, json_text(facts, indent=1))
    for method in METHODS:
        for name in settings():
            own = [run for run in runs if (run["method"], run["choice"]) == (method, name)]
            if own:
                robust, clean = ([run["last"][key] for run in own] for key in ("pgd20_accuracy", "clean_accuracy"))
                rises = [run["rise"][-1] for run in own if run["rise"][-1] is not None]
                share = f"{statistics.mean(rises):.0%}" if rises else "-"
                gammas = [run["gamma"][-1] for run in own if run["gamma"][-1] is not None]
                last = f"{statistics.mean(gammas):.3f}" if gammas else name.split()[1]
                print(
                    f"| {method} | {name} | {', '.join(f'{value:.1%}' for value in robust)} | "
                    f"{', '.join(f'{value:.1%}' for value in clean)} | {share} | {last} |"
                )
    draw(runs)


def draw(runs: list[dict[str, Any]]) -> None:
    """Last robust test accuracy against gamma, a point for each seed; bands for the limits."""
    picture = Figure(figsize=(9.0, 3.2), layout="constrained")
    for axes, method in zip(picture.subplots(1, 2, sharey=True), METHODS, strict=True):
        names = list(settings())
        for place, name in enumerate(names):
            own = [r["last"]["pgd20_accuracy"] for r in runs if (r["method"], r["choice"]) == (method, name)]
            colour = VERMILION if name.startswith("rise") else GREY if name == "gamma 0" else BLUE
            axes.plot([place] * len(own), [100 * value for value in own], "o", color=colour)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set(title=method.upper(), ylim=(0, None))
        tidy(axes)
    picture.axes[0].set_ylabel("PGD-20, last weights, %")
    save(picture, FIGURE)


def main() -> None:
    """Trains, or reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "report"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    if given.what == "train":
        train(given.out, tuple(given.seeds))
    else:
        report(given.out)


if __name__ == "__main__":
    main()

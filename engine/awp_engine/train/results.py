"""What a run is worth, written at its end; and what its steps cost."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from awp_engine import checkpoint
from awp_engine.config import Config
from awp_engine.device import device_name
from awp_engine.evaluation import Accuracy
from awp_engine.evaluation.reports.receipt import split_hash
from awp_engine.files.run_places import MODEL_FILE
from awp_engine.observe.drawing import attempt
from awp_engine.observe.metrics import read_metrics
from awp_engine.observe.report import CURVES, plot_learning_curves, write_report
from awp_engine.observe.throughput import matmul_ceiling, peak_memory
from awp_engine.train.cost import forward_units
from awp_engine.train.progress import Progress
from awp_engine.train.selection import Selection
from awp_engine.train.setup import Setup

# fewer test images of a class say little about it
_FEW = 10
_SHOWN = 6
_ceiling = functools.cache(matmul_ceiling)


def throughput(setup: Setup, images_per_second: float, epoch: int) -> dict[str, float]:
    """Of the operations that the method needs in `epoch`; what a run does beyond them does not count."""
    ceiling = _ceiling(setup.device, setup.precision.attack or torch.float32)
    cheap = setup.schedule.is_cheap(epoch)
    units = forward_units(setup.config, cheap=cheap, epoch=epoch, other=setup.other_size)
    flops = images_per_second * setup.forward_flops * units
    return {
        "images_per_second": images_per_second,
        "tflops": flops / 1e12,
        "share_of_matmul": flops / (ceiling * setup.ranks.world),
        "memory_gb": peak_memory(setup.device) / 1e9,
    }


def result_title(config: Config) -> str:
    """What a table of results is of."""
    return f"{config.data.name} test split, {config.attack.balls}"


def result_row(method: str, config: Config, report: Mapping[str, Any]) -> dict[str, str]:
    """A run's results, by column."""
    attack, key = f"PGD-{config.evaluation.steps}", f"pgd{config.evaluation.steps}_accuracy"
    return {
        "method": method,
        "clean": f"{report['clean_accuracy']:.2%}",
        attack: f"{report[key]:.2%}",
        f"{attack} train": f"{report['train_pgd_accuracy']:.2%}",
        f"{attack} last": f"{report['last'][key]:.2%}",
        "epoch": str(report["selected_epoch"]),
        "seconds": f"{report['seconds']:.0f}",
    }


def write_results(
    setup: Setup,
    selection: Selection,
    progress: Progress,
    best: tuple[Accuracy, float],
    last: tuple[Accuracy, float],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write model.safetensors, report.json and the learning curves, on the first rank.

    Args:
        setup: of the run.
        selection: what was selected.
        progress: of the run.
        best: of the selected weights, accuracy on the test split, and under attack on training images.
        last: of the last ones.
        say: what the user is told.

    Returns:
        The fields of report.json.
    """
    config = setup.config
    name = f"pgd{config.evaluation.steps}_accuracy"
    fields = {
        "clean_accuracy": best[0].clean,
        "pgd20_accuracy": best[0].robust if config.evaluation.steps == 20 else None,
        name: best[0].robust,
        "train_pgd_accuracy": best[1],
        "held_out_pgd_accuracy": progress.best_robust,
        "last": {"clean_accuracy": last[0].clean, name: last[0].robust, "train_pgd_accuracy": last[1]},
        "test_images": len(selection.test),
        "test_limit": config.evaluation.test_limit,
        "train_images": len(setup.data.train),
        "selected_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "seconds": progress.seconds,
        "preset": config.preset,
        "seed": config.seed,
        "method": config.method,
        "gamma": config.awp.gamma,
        "attack": {
            "norm": config.attack.norm,
            "epsilon": config.attack.epsilon,
            "steps": config.evaluation.steps,
            "step_size": None if config.attack.norm == "l1" else config.evaluation_step_size,
            **({"also": list(config.attack.also)} if config.attack.also else {}),
        },
        "device": device_name(setup.device),
        "ranks": setup.ranks.world,
        "data": {
            "name": setup.data.name,
            **setup.fingerprints,
            "test_fingerprint": setup.data.test_fingerprint,
        },
        "made_by": setup.made_by,
        "config_hash": setup.config_hash,
    }
    if config.attack.also:
        # what is above is the worst case over all of them
        norms = [config.attack.norm, *(ball.norm for ball in config.attack.further)]
        fields["accuracy_by_norm"] = dict(zip(norms, best[0].robust_by_attack, strict=True))
        by_norm = (f"{norm} {accuracy:.2%}" for norm, accuracy in fields["accuracy_by_norm"].items())
        say(f"PGD-{config.evaluation.steps} accuracy in each ball: {', '.join(by_norm)}; in the table in all at once")
    if setup.ranks.is_first:
        described = {"epoch": str(progress.best_epoch), "config_hash": setup.config_hash}
        metadata = setup.description.to_metadata() | described
        # what tells whether two runs were measured on the same images
        fields["data"]["test_sha256"] = split_hash(selection.test)
        checkpoint.export_model(setup.run_dir / MODEL_FILE, selection.best_weights, metadata)
        attempt(
            str(setup.run_dir / CURVES),
            lambda: plot_learning_curves(setup.run_dir, read_metrics(setup.run_dir), progress.best_epoch),
            say,
        )
        # the last one: where it is, the run is finished
        write_report(setup.run_dir, fields)
        tested = torch.bincount(selection.test.labels.cpu())
        constant = int(tested.max()) / len(selection.test)
        if best[0].clean <= constant:
            say(
                f"clean accuracy {best[0].clean:.2%} is no better than one answer for every image ({constant:.2%}), so "
                "the other numbers mean little: more --epochs, more images, or a smaller --attack.epsilon"
            )
        right = zip(setup.data.class_names, best[0].robust_by_class, tested.tolist(), strict=False)
        never = [f"{name!r} ({count})" for name, robust, count in right if not robust and count >= _FEW]
        # where most classes are such, the network has learnt little of any
        if 0 < 2 * len(never) < len(tested):
            more = ", ..." if len(never) > _SHOWN else ""
            say(
                f"under attack no test image is right of class {', '.join(never[:_SHOWN])}{more}: it may need more "
                "training images, or more weight (--data.class-weights)"
            )
    return fields

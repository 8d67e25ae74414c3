"""What a measurement leaves: a figure, a JSON file of all numbers, every image's losses, and a table."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from awp_engine.attack import Attack
from awp_engine.checkpoint import CheckpointError, export_model
from awp_engine.config import ConfigError
from awp_engine.data import Split
from awp_engine.device import device_name
from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.digest import sha256_of
from awp_engine.files.run_places import CONFIG_FILE
from awp_engine.files.text import json_text
from awp_engine.landscape.bootstrap import LEVEL, RESAMPLES
from awp_engine.landscape.measure import Measurement, Mode, Settings
from awp_engine.landscape.plots import plot_curves, plot_flatness, plot_surfaces
from awp_engine.landscape.runs import Run, attack_facts
from awp_engine.observe.drawing import attempt, save
from awp_engine.observe.report import prepare_output, print_table, source_commit, versions

_NAMES: dict[Mode, str] = {"1d": "curves", "2d": "surface", "flatness": "flatness"}
_DEFINITIONS: dict[Mode, str] = {
    "1d": "mean over images of max_delta CE(f(x + delta; w + a ||w|| d / ||d||), y) in nats; norms by filter for "
    "random d, by layer for the gradient of the robust loss; BN by running statistics",
    "2d": "as 1d, at w + a ||w|| d1 / ||d1|| + b ||w|| d2 / ||d2||",
    "flatness": "Stutz, Hein, Schiele, ICCV 2021: robust loss at w + v less that at w, in nats; average over v with "
    "||v_l|| = xi ||w_l||, and the largest found with ||v_l|| <= xi ||w_l||; weights and biases but normalisation's",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """All that a result depends on."""

    mode: Mode
    runs: Sequence[Run]
    split: str
    images: Split
    attack: Attack
    settings: Settings
    batch_size: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        """The receipt as JSON holds it."""
        data, device = self.runs[0].data, self.images.device
        return {
            "definition": _DEFINITIONS[self.mode],
            "attack": {
                **attack_facts(self.runs[0].config),
                "steps": self.attack.steps,
                "restarts": self.settings.restarts,
                "start": "uniform",
                "seed": self.attack.seed,
            },
            "data": {
                "name": data.name,
                "fingerprint": data.fingerprint,
                "split": self.split,
                "images": len(self.images),
                "ids_sha256": hashlib.sha256(self.images.ids.cpu().numpy().astype("<i8").data).hexdigest(),
            },
            "settings": {**dataclasses.asdict(self.settings), "batch_size": self.batch_size},
            "confidence": {
                "level": LEVEL,
                "resamples": RESAMPLES,
                "method": "bootstrap percentiles over images, and over rows if several",
            },
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "seconds": self.seconds,
            "versions": versions(),
            "commit": source_commit(),
        }

    @property
    def title(self) -> str:
        """One line for the figure."""
        attack = attack_facts(self.runs[0].config)
        norm = {"linf": "Linf", "l2": "L2"}[attack["norm"]]
        return (
            f"{self.runs[0].data.name}, {len(self.images)} {self.split} images, "
            f"{norm} epsilon {self.runs[0].config.attack.epsilon}, PGD-{self.attack.steps}"
        )


def output_directory(given: Path | None, runs: Sequence[Path | str]) -> Path:
    """Make the output directory: the one given, or `landscape` in the only run; files can be written there.

    Raises:
        ConfigError: none was given for several runs or for a file, or it cannot be written.
    """
    if given is None:
        if len(runs) != 1 or isinstance(runs[0], str) or not (runs[0] / CONFIG_FILE).is_file():
            raise ConfigError("--output: expected a directory for the figures, unless there is a single run directory")
        given = runs[0] / "landscape"
    prepare_output(given)
    return given


def _span(entry: dict[str, Any]) -> str:
    return f"{entry['value']:.4f} [{entry['low']:.4f}, {entry['high']:.4f}]"


def _rows(mode: Mode, found: Measurement) -> list[dict[str, str]]:
    rows = []
    for entry in found.entries:
        row = {"run": entry["label"]}
        if mode == "1d":
            for kind, curve in entry["curves"].items():
                last = len(curve["amounts"]) - 1
                for name, point in (("at w", last // 2), (f"{kind} {curve['amounts'][last]:+g}", last)):
                    span = {"value": curve["mean"][point], "low": curve["low"][point], "high": curve["high"][point]}
                    row[name] = _span(span)
        elif mode == "2d":
            means = [value for line in entry["surface"]["mean"] for value in line]
            finite = [value for value in means if math.isfinite(value)] or [math.nan]
            row["at w"] = f"{means[len(means) // 2]:.4f}"
            row |= {"least": f"{min(finite):.4f}", "most": f"{max(finite):.4f}"}
        else:
            row["robust loss"] = _span(entry["robust_loss"])
            for kind in ("average", "worst"):
                row |= {f"{kind} {point['xi']:g}": _span(point) for point in entry[kind]}
        rows.append(row)
    return rows


def write(output: Path, receipt: Receipt, found: Measurement) -> list[Path]:
    """Prints a table of one mode, and writes the losses, the numbers and, last, the figure.

    Returns:
        The files; a figure that cannot be drawn is left out, after a line that says why.

    Raises:
        CheckpointError: a run's weights changed on disk while they were measured; nothing is written then.
        OSError: losses or numbers cannot be written.
    """
    for run in receipt.runs:
        if sha256_of(run.file) != run.sha256:
            raise CheckpointError(f"{run.file}: changed while it was measured; measure again when training is done")
    stem = output / _NAMES[receipt.mode]
    figure, table, losses = (stem.with_suffix(suffix) for suffix in (".png", ".json", ".safetensors"))
    not_finite = sum(int((~tensor.isfinite()).sum()) for tensor in found.losses.values())
    print_table(_rows(receipt.mode, found), title=receipt.title)
    if not_finite:
        total = sum(tensor.numel() for tensor in found.losses.values())
        print(f"warning: {not_finite} of {total} losses are not finite: null in {table.name}, and not drawn")
    export_model(losses, found.losses, {"images": json.dumps(receipt.images.ids.tolist())})
    content = {**receipt.facts(), "losses": losses.name, "losses_not_finite": not_finite, "runs": found.entries}
    atomic_write_text(table, json_text(content, indent=1))
    # last, as a picture may fail
    draw = {"1d": plot_curves, "2d": plot_surfaces, "flatness": plot_flatness}[receipt.mode]
    drawn = attempt(str(figure), lambda: save(draw(found.entries, receipt.title), figure) or figure, print)
    return [table, losses] if drawn is None else [figure, table, losses]

"""Measures runs as `engine/landscape.py` asks, and gives what its JSON files hold."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from awp_engine.attack import Attack
from awp_engine.data import Batch
from awp_engine.landscape.bootstrap import LEVEL, RESAMPLES, Interval, mean_interval
from awp_engine.landscape.curves import curve_1d, grid, surface_2d
from awp_engine.landscape.directions import Direction, adversarial_direction, random_direction
from awp_engine.landscape.flatness import average_flatness, worst_flatness
from awp_engine.landscape.progress import ProgressLines
from awp_engine.landscape.robust_loss import robust_losses
from awp_engine.landscape.runs import Run
from awp_kernels.philox import mix_seed

Mode = Literal["1d", "2d", "flatness"]

# what the seed is mixed with for each use
_DIRECTIONS, _AVERAGE, _WORST, _BOOTSTRAP = 11, 12, 13, 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; fields are the command's flags.

    Raises:
        ValueError: for a number that cannot be used, named as its flag.
    """

    points: int
    points_2d: int
    radius: float
    adversarial_radius: float
    directions: int
    plane: Literal["random", "adversarial"]
    restarts: int
    average_xi: tuple[float, ...]
    draws: int
    worst_xi: tuple[float, ...]
    epochs: int
    attempts: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("directions", "restarts", "draws", "epochs", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected a whole number >= 1, got {getattr(self, name)}")
        for name, radius, points in (
            ("radius", self.radius, self.points),
            ("adversarial-radius", self.adversarial_radius, self.points),
            ("points-2d", self.radius, self.points_2d),
        ):
            try:
                grid(radius, points)
            except ValueError as error:
                # grid's messages begin with the argument's name
                argument, _, rest = str(error).partition(": ")
                raise ValueError(f"--{argument if name == 'radius' else name}: {rest}") from None
        for name, radii in (("average-xi", self.average_xi), ("worst-xi", self.worst_xi)):
            if any(not 0 < radius < 100 for radius in radii) or len(set(radii)) != len(radii):
                raise ValueError(f"--{name}: expected different numbers more than 0, got {', '.join(map(str, radii))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one mode found.

    Attributes:
        entries: for every run, in order, what goes into the JSON and the figure.
        losses: name to fp64 tensor whose last dimension is the images: all that the entries were computed from.
    """

    entries: list[dict[str, Any]]
    losses: dict[str, Tensor]


def work(mode: Mode, settings: Settings, runs: int, images: int, steps: int) -> int:
    """How many gradients of images a mode takes, roughly: what `ProgressLines` counts."""
    attacks = {
        "1d": settings.points * (settings.directions + 1),
        "2d": settings.points_2d**2,
        "flatness": 1 + len(settings.average_xi) * settings.draws + len(settings.worst_xi) * settings.attempts,
    }[mode]
    joint = len(settings.worst_xi) * settings.attempts * settings.epochs if mode == "flatness" else 0
    return runs * images * (attacks * steps * settings.restarts + joint)


def interval_facts() -> dict[str, Any]:
    """How the confidence intervals were computed."""
    return {
        "level": LEVEL,
        "resamples": RESAMPLES,
        "method": "bootstrap percentiles over images, and over rows if several",
    }


def _random(run: Run, settings: Settings, index: int) -> Direction:
    return random_direction(run.model, seed=mix_seed(settings.seed, _DIRECTIONS), index=index)


def _common(settings: Settings, progress: ProgressLines) -> dict[str, Any]:
    return {"restarts": settings.restarts, "report": progress.advance}


def _columns(intervals: Sequence[Interval]) -> dict[str, list[float]]:
    return {
        "mean": [interval.value for interval in intervals],
        "low": [interval.low for interval in intervals],
        "high": [interval.high for interval in intervals],
    }


def measure_curves(
    runs: Sequence[Run], batches: Sequence[Batch], attack: Attack, settings: Settings, progress: ProgressLines
) -> Measurement:
    """The robust loss along random directions, the same for all runs, and along each run's own gradient."""
    entries, losses, common = [], {}, _common(settings, progress)
    for run in runs:
        curves = {}
        for kind, radius in (("random", settings.radius), ("adversarial", settings.adversarial_radius)):
            amounts = grid(radius, settings.points)
            table = []
            for index in range(settings.directions if kind == "random" else 1):
                progress.begin(f"{run.label}, 1d, {kind} direction {index + 1}")
                if kind == "random":
                    direction = _random(run, settings, index)
                else:
                    direction = adversarial_direction(run.model, batches, attack)
                table.append(curve_1d(run.model, direction, amounts, batches, attack, **common))
            stacked = torch.stack(table)  # [directions, points, N]
            losses[f"{run.label}/{kind}"] = stacked
            by_direction = stacked.mean(2)
            seed = mix_seed(settings.seed, _BOOTSTRAP)
            curves[kind] = {
                "amounts": amounts,
                **_columns([mean_interval(stacked[:, point], seed=seed) for point in range(settings.points)]),
                "by_direction": by_direction.tolist(),
                "spread": by_direction.std(0).tolist() if len(table) > 1 else None,
            }
        entries.append({**run.facts(), "curves": curves})
    return Measurement(entries=entries, losses=losses)


def measure_surfaces(
    runs: Sequence[Run], batches: Sequence[Batch], attack: Attack, settings: Settings, progress: ProgressLines
) -> Measurement:
    """The robust loss over the plane of two random directions, or of the run's own gradient and a random one."""
    entries, losses, common = [], {}, _common(settings, progress)
    for run in runs:
        progress.begin(f"{run.label}, 2d")
        along = settings.plane == "adversarial"
        first = adversarial_direction(run.model, batches, attack) if along else _random(run, settings, 0)
        second = _random(run, settings, 0 if along else 1)
        amounts = grid(settings.adversarial_radius if along else settings.radius, settings.points_2d)
        others = grid(settings.radius, settings.points_2d)
        # [first, second, N]
        found = surface_2d(run.model, first, second, amounts, others, batches, attack, **common)
        losses[f"{run.label}/surface"] = found
        seed = mix_seed(settings.seed, _BOOTSTRAP)
        rows = [_columns([mean_interval(point, seed=seed) for point in row]) for row in found]
        surface = {
            "kinds": [settings.plane, "random"],
            "first": amounts,
            "second": others,
            **{key: [row[key] for row in rows] for key in ("mean", "low", "high")},
        }
        entries.append({**run.facts(), "surface": surface})
    return Measurement(entries=entries, losses=losses)


def measure_flatness(
    runs: Sequence[Run], batches: Sequence[Batch], attack: Attack, settings: Settings, progress: ProgressLines
) -> Measurement:
    """Average-case and worst-case flatness of every run at every xi, with their intervals."""
    entries, losses, common = [], {}, _common(settings, progress)
    seed = mix_seed(settings.seed, _BOOTSTRAP)
    for run in runs:
        progress.begin(f"{run.label}, flatness, reference")
        reference = robust_losses(run.model, batches, attack, **common)
        losses[f"{run.label}/reference"] = reference
        average = []
        for xi in settings.average_xi:
            progress.begin(f"{run.label}, average-case flatness, xi {xi:g}")
            mean = average_flatness(
                run.model,
                batches,
                attack,
                xi=xi,
                count=settings.draws,
                seed=mix_seed(settings.seed, _AVERAGE),
                reference=reference,
                **common,
            )
            losses[f"{run.label}/average/{xi:g}"] = mean.losses
            by_draw = (mean.losses - reference).mean(1).tolist()
            average.append({"xi": xi, **dataclasses.asdict(mean.interval(seed)), "by_draw": by_draw})
        worst = []
        for xi in settings.worst_xi:
            progress.begin(f"{run.label}, worst-case flatness, xi {xi:g}")
            found = worst_flatness(
                run.model,
                batches,
                attack,
                xi=xi,
                epochs=settings.epochs,
                attempts=settings.attempts,
                seed=mix_seed(settings.seed, _WORST),
                reference=reference,
                **common,
            )
            losses[f"{run.label}/worst/{xi:g}"] = found.losses
            losses[f"{run.label}/worst-joint/{xi:g}"] = found.joint
            worst.append(
                {
                    "xi": xi,
                    **dataclasses.asdict(found.interval(seed)),
                    "attempt": found.attempt,
                    "by_attempt": (found.losses - reference).mean(1).tolist(),
                    "on_images_of_joint_ascent": dataclasses.asdict(found.joint_interval(seed)),
                    "largest_relative_move": found.largest.tolist(),
                }
            )
        reference_facts = dataclasses.asdict(mean_interval(reference, seed=seed))
        entries.append({**run.facts(), "robust_loss": reference_facts, "average": average, "worst": worst})
    return Measurement(entries=entries, losses=losses)

"""Measures runs as `engine/landscape.py` asks, and gives what its JSON files hold."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from awp_engine.landscape.bootstrap import Interval, mean_interval
from awp_engine.landscape.curves import curve_1d, grid, surface_2d
from awp_engine.landscape.directions import Direction, adversarial_direction, random_direction
from awp_engine.landscape.flatness import average_flatness, worst_flatness
from awp_engine.landscape.robust_loss import RobustLoss
from awp_engine.landscape.runs import Run
from awp_engine.observe.bars import Bar
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
    """How many gradients of images a mode takes, roughly: what a `Bar` counts."""
    attacks = {
        "1d": settings.points * (settings.directions + 1),
        "2d": settings.points_2d**2,
        "flatness": 1 + len(settings.average_xi) * settings.draws + len(settings.worst_xi) * settings.attempts,
    }[mode]
    joint = len(settings.worst_xi) * settings.attempts * settings.epochs if mode == "flatness" else 0
    return runs * images * (attacks * steps * settings.restarts + joint)


def _direction(kind: str, index: int, run: Run, loss: RobustLoss, settings: Settings) -> Direction:
    """A random direction, which is the same for all runs, or the run's own gradient."""
    if kind == "adversarial":
        return adversarial_direction(run.model, loss.batches, loss.attack)
    return random_direction(run.model, seed=mix_seed(settings.seed, _DIRECTIONS), index=index)


def _columns(intervals: Sequence[Interval]) -> dict[str, list[float]]:
    return {
        "mean": [interval.value for interval in intervals],
        "low": [interval.low for interval in intervals],
        "high": [interval.high for interval in intervals],
    }


# what of an entry, and which losses, a mode finds of one run
_Found = tuple[dict[str, Any], dict[str, Tensor]]


def _curves(run: Run, loss: RobustLoss, settings: Settings, progress: Bar) -> _Found:
    curves, losses = {}, {}
    for kind, radius, count in (
        ("random", settings.radius, settings.directions),
        ("adversarial", settings.adversarial_radius, 1),
    ):
        amounts = grid(radius, settings.points)
        table = []
        for index in range(count):
            progress.begin(f"{run.label}, 1d, {kind} direction {index + 1}")
            table.append(curve_1d(run.model, _direction(kind, index, run, loss, settings), amounts, loss))
        losses[kind] = torch.stack(table)  # [directions, points, N]
        by_direction = losses[kind].mean(2)
        seed = mix_seed(settings.seed, _BOOTSTRAP)
        curves[kind] = {
            "amounts": amounts,
            **_columns([mean_interval(losses[kind][:, point], seed=seed) for point in range(settings.points)]),
            "by_direction": by_direction.tolist(),
            "spread": by_direction.std(0).tolist() if count > 1 else None,
        }
    return {"curves": curves}, losses


def _surface(run: Run, loss: RobustLoss, settings: Settings, progress: Bar) -> _Found:
    progress.begin(f"{run.label}, 2d")
    along = settings.plane == "adversarial"
    first = _direction(settings.plane, 0, run, loss, settings)
    second = _direction("random", 0 if along else 1, run, loss, settings)
    amounts = grid(settings.adversarial_radius if along else settings.radius, settings.points_2d)
    others = grid(settings.radius, settings.points_2d)
    losses = surface_2d(run.model, first, second, amounts, others, loss)
    seed = mix_seed(settings.seed, _BOOTSTRAP)
    rows = [_columns([mean_interval(point, seed=seed) for point in row]) for row in losses]
    surface = {
        "kinds": [settings.plane, "random"],
        "first": amounts,
        "second": others,
        **{key: [row[key] for row in rows] for key in ("mean", "low", "high")},
    }
    return {"surface": surface}, {"surface": losses}


def _flatness(run: Run, loss: RobustLoss, settings: Settings, progress: Bar) -> _Found:
    seed = mix_seed(settings.seed, _BOOTSTRAP)
    progress.begin(f"{run.label}, flatness, reference")
    reference = loss(run.model)
    losses, average, worst = {"reference": reference}, [], []
    for xi in settings.average_xi:
        progress.begin(f"{run.label}, average-case flatness, xi {xi:g}")
        known = {"xi": xi, "seed": mix_seed(settings.seed, _AVERAGE), "reference": reference}
        mean = average_flatness(run.model, loss, count=settings.draws, **known)
        losses[f"average/{xi:g}"] = mean.losses
        by_draw = (mean.losses - reference).mean(1).tolist()
        average.append({"xi": xi, **dataclasses.asdict(mean.interval(seed)), "by_draw": by_draw})
    for xi in settings.worst_xi:
        progress.begin(f"{run.label}, worst-case flatness, xi {xi:g}")
        known = {"xi": xi, "seed": mix_seed(settings.seed, _WORST), "reference": reference}
        found = worst_flatness(run.model, loss, epochs=settings.epochs, attempts=settings.attempts, **known)
        losses |= {f"worst/{xi:g}": found.losses, f"worst-joint/{xi:g}": found.joint}
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
    return {"robust_loss": reference_facts, "average": average, "worst": worst}, losses


def measure(mode: Mode, runs: Sequence[Run], loss: RobustLoss, settings: Settings, progress: Bar) -> Measurement:
    """One mode of all runs, whose random directions are the same; `loss` reports to `progress`.

    "1d": the robust loss along random directions, and along each run's own gradient. "2d": over the plane of two random
    directions, or of the run's own gradient and a random one. "flatness": average-case and worst-case flatness at every
    xi. All with their intervals.
    """
    entries, losses = [], {}
    for run in runs:
        entry, tables = {"1d": _curves, "2d": _surface, "flatness": _flatness}[mode](run, loss, settings, progress)
        entries.append({**run.facts(), **entry})
        losses |= {f"{run.label}/{name}": table for name, table in tables.items()}
    return Measurement(entries=entries, losses=losses)

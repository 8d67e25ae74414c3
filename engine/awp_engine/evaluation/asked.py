"""What a measurement is asked, checked as far as that needs neither model nor images."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import get_args

import torch

from awp_engine.attack.checks import ball
from awp_engine.config import parse_amount, show
from awp_engine.data import Dataset, Framing
from awp_engine.evaluation.attacks.autoattack import STANDARD_BUDGET, Budget
from awp_engine.evaluation.attacks.named import EvaluationError, NamedAttack, Norm, Threat, parse_attack, require_norm
from awp_engine.evaluation.gates.adaptive import EOT_DRAWS
from awp_engine.evaluation.model.external import ExternalModel
from awp_engine.evaluation.model.loaded_model import LoadedModel, load_trained
from awp_engine.evaluation.model.precision import PrecisionName
from awp_engine.evaluation.reports.robustbench import Publication
from awp_engine.evaluation.reports.saved import Form

DEFAULT_ATTACKS = ("clean", "fgsm", "pgd20", "cw")
# far beyond use, within what torch counts with
_MOST = 2**31 - 1
_LARGEST_L2 = 10**6
_MOST_DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which model, and on which images; what is not given is the run's own, from its config.json.

    Attributes:
        path: a run directory, one of its checkpoints, a .safetensors file, or hf://OWNER/NAME; None with `external`.
        external: in place of a run: how to make a model, and its weights.
        model: of a run, in place of the code that its weights name, which is not run because they say so; as
            `load_model` takes it.
        checkpoint: of a run directory: best, last, or a checkpoint's name or path.
        data_name: the data set; the code of a `file.py:factory` is run.
        data_root: its directory; a test part alone is enough.
        data_corruption: of a corrupted test set: its kind.
        data_severity: 1 to 5.
        data_framing: how images of files become images of one size.
        limit: so many images, evenly spread.
        seed: of all noise; if not given, the one that the run's own evaluation uses.
        batch_size: images a batch.
        device: auto, cpu or cuda.
        output: directory of the reports; RUN_DIR/evaluation if not given.
    """

    path: Path | str | None
    external: ExternalModel | None = None
    model: str | None = None
    checkpoint: str = "best"
    data_name: str | None = None
    data_root: Path | None = None
    data_corruption: str | None = None
    data_severity: int | None = None
    data_framing: Framing | None = None
    limit: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    output: Path | None = None

    def __post_init__(self) -> None:
        require_counts({"batch-size": self.batch_size, "limit": self.limit})
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise EvaluationError(f"--seed: expected a whole number in [0, 2^63), got {self.seed}")

    @property
    def place(self) -> Path | str:
        """What messages call the model."""
        if self.external is not None:
            return self.external.weights or self.external.name
        if self.path is None:
            raise EvaluationError("RUN_OR_CHECKPOINT: expected a path, or --model.name with --weights")
        return self.path

    def load(self, device: torch.device) -> LoadedModel | None:
        """The run's model; None of an external one, which is made for the data.

        Raises:
            EvaluationError, ConfigError, CheckpointError: as `load_trained`.
        """
        if self.external is not None:
            return None
        return load_trained(self.place, which=self.checkpoint, device=device, model=self.model)


def require_counts(values: dict[str, int | None]) -> None:
    """Raises `EvaluationError` for a flag's value that is not a number of things, or None."""
    for name, value in values.items():
        if value is not None and not 1 <= value <= _MOST:
            raise EvaluationError(f"--{name}: expected a whole number from 1 to {_MOST}, got {show(value)}")


@dataclass(frozen=True, kw_only=True)
class AttacksAsked(Asked):
    """And by which attacks, in which ball, leaving what.

    Attributes:
        attacks: names, see `parse_attack`.
        epsilon: radius of the ball, exact: "8/255".
        norm: "linf", "l2" or "l1".
        step_size: of pgd and cw, exact; the run's own in its own ball, else epsilon / 4.
        restarts: of pgd and cw.
        precision: what the model computes in, without attack and under it; 16 bits are faster on a GPU, and the numbers
            are then those of the rounded model.
        gates_limit: images of the gates; None leaves them out.
        transfer_to: a second model, as `path`, on which every attack's images are tried.
        publication: write RobustBench's description, robustbench.json; needs autoattack.
        budget: of autoattack and square, for quick looks.
        eot_draws: over how many draws the gates average the gradient of a random model, one attack for each.
        save_images: write images-NAME-ATTACK.safetensors of every attack, with so many images, evenly spread, or all of
            them for 0.
        save_per_image: write per-image-NAME.npz or .parquet: every attack's prediction for every image.
        again: measure, though the same was measured before.
    """

    attacks: Sequence[str] = DEFAULT_ATTACKS
    epsilon: str | None = None
    norm: Norm | None = None
    step_size: str | None = None
    restarts: int = 1
    precision: PrecisionName = "fp32"
    gates_limit: int | None = 200
    transfer_to: Path | str | None = None
    publication: Publication | None = None
    budget: Budget = STANDARD_BUDGET
    eot_draws: Sequence[int] = EOT_DRAWS
    save_images: int | None = None
    save_per_image: Form | None = None
    again: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.attacks, str):
            raise EvaluationError(f"--attacks: expected a list of names, such as [{show(self.attacks)}], got text")
        names = [attack.name for attack in self.named]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise EvaluationError(f"--attacks: two are called {twice}, also in the reports; rename one of the files")
        super().__post_init__()
        if self.precision not in get_args(PrecisionName):
            names = ", ".join(get_args(PrecisionName))
            raise EvaluationError(f"--precision: expected one of {names}, got {show(self.precision)}")
        require_counts({"restarts": self.restarts, "gates-limit": self.gates_limit})
        if self.publication is not None and "autoattack" not in self.attacks:
            raise EvaluationError("--robustbench: its description needs autoattack; add it to --attacks")
        if self.save_images is not None and not 0 <= self.save_images <= _MOST:
            raise EvaluationError(f"--save-images: expected a whole number or all, got {show(self.save_images)}")
        draws = list(self.eot_draws)
        if not draws or any(not 1 <= number <= _MOST_DRAWS for number in draws):
            raise EvaluationError(f"--eot: expected whole numbers from 1 to {_MOST_DRAWS}, got {show(draws)}")
        if self.save_per_image == "parquet" and importlib.util.find_spec("pyarrow") is None:
            raise EvaluationError(
                "--save-per-image: parquet needs the package pyarrow: pip install pyarrow, or take npz"
            )

    @cached_property
    def named(self) -> list[NamedAttack]:
        """What the attacks' names stand for; runs the code of one's own."""
        return [parse_attack(name) for name in dict.fromkeys(self.attacks)]

    def ball(self, loaded: LoadedModel | None) -> tuple[Threat, Fraction]:
        """The ball that was asked for, or else the run's own; a step goes with its ball, else it is epsilon / 4.

        Raises:
            EvaluationError: it is none, is not given, or is not for these attacks.
        """
        config = None if loaded is None else loaded.config
        epsilon, norm, step_size = self.epsilon, self.norm, self.step_size
        if config is not None:
            further = {ball.norm: str(ball.epsilon) for ball in config.attack.further}
            epsilon = further.get(norm) if epsilon is None and norm is not None else epsilon
            if epsilon is None and norm not in (None, config.attack.norm):
                own = f"{config.attack.epsilon}, is of {config.attack.norm}"
                raise EvaluationError(f"--norm {norm}: give --epsilon too, as the run's own, {own}")
            if epsilon is None and step_size is None:
                step_size = config.evaluation.step_size
            epsilon = config.attack.epsilon if epsilon is None else epsilon
            norm = norm or config.attack.norm
        else:
            given = {"--data.name": self.data_name, "--norm": norm, "--epsilon": epsilon}
            missing = [flag for flag, value in given.items() if value is None]
            if missing or epsilon is None or norm is None:
                usual = "; usual are linf and 8/255 for CIFAR, linf and 4/255 for ImageNet"
                raise EvaluationError(
                    f"{self.place if loaded is None else loaded.weights}: no run's config.json says how to measure "
                    f"it: give {', '.join(missing)}" + (usual if missing != ["--data.name"] else "")
                )
        threat = Threat(epsilon=_radius(epsilon, norm), norm=norm)
        for attack in self.named:
            require_norm(attack, threat)
        return threat, _step(step_size, threat.epsilon)


def _radius(epsilon: str, norm: Norm) -> Fraction:
    radius = _amount("epsilon", epsilon)
    if norm == "linf" and radius > 1:
        hint = f" (did you mean {radius}/255?)" if radius <= 255 and radius.denominator == 1 else ""
        raise EvaluationError(f"--epsilon: expected at most 1 for linf, as pixels lie in [0, 1]{hint}, got {epsilon}")
    if radius > _LARGEST_L2:
        raise EvaluationError(f"--epsilon: expected at most {_LARGEST_L2}, got {epsilon[:80]}")
    return radius


def _step(size: str | None, radius: Fraction) -> Fraction:
    step = radius / 4 if size is None else _amount("step-size", size)
    if step > 2 * radius:
        raise EvaluationError(
            f"--step-size: expected at most twice epsilon ({radius}), across the whole ball, got {str(size)[:80]}"
        )
    return step


def _amount(name: str, text: str) -> Fraction:
    # of Python: a float is rarely the fraction that is meant
    wrong = EvaluationError(f'--{name}: expected text, a fraction or number >= 0 such as "8/255", got {show(text)}')
    if not isinstance(text, str):
        raise wrong
    try:
        return parse_amount(text)
    except ValueError:
        raise wrong from None


def require_ball(threat: Threat, dataset: Dataset) -> None:
    """Raises `EvaluationError` for a ball that every attack on such images would refuse."""
    values = math.prod(dataset.test.shape)
    try:
        if threat.norm == "l1" and threat.epsilon > values:
            raise ValueError(f"epsilon: expected at most {values} for l1, the number of values, got {threat.epsilon}")
        if threat.norm != "l1":
            ball(values, epsilon=float(threat.epsilon), norm=threat.norm, clip=(0.0, 1.0))
    except ValueError as error:
        raise EvaluationError(f"--{error}") from None

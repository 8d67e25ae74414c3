"""RobustBench's description of a model, as its repository keeps one under model_info/.

Source: Croce et al.: RobustBench, NeurIPS datasets and benchmarks 2021; model_info/cifar10/Linf/*.json there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from awp_engine.evaluation.reports.receipt import percent

_PIXEL_LEVELS = 255


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What only the authors know.

    Attributes:
        link: of the paper.
        name: its title.
        authors: separated by commas.
        venue: such as "NeurIPS 2020"; RobustBench shows an empty one as Unpublished.
        architecture: such as "WideResNet-34-10".
        additional_data: whether other images than the training set were used.
        reported: the robust accuracy that the paper reports, in percent; None takes the measured one.
    """

    link: str
    name: str
    authors: str
    venue: str
    architecture: str
    additional_data: bool
    reported: str | None = None


def leaderboard_epsilon(epsilon: Fraction) -> str:
    """The leaderboard's spelling: "8/255" for whole grey levels, "0.5" for short decimals, else the fraction."""
    decimal = f"{float(epsilon):.4g}"
    if Fraction(decimal) == epsilon:
        return decimal
    levels = epsilon * _PIXEL_LEVELS
    return f"{levels}/{_PIXEL_LEVELS}" if levels.denominator == 1 else str(epsilon)


def model_info(
    publication: Publication,
    *,
    dataset: str,
    epsilon: Fraction,
    clean: int,
    autoattack: int,
    images: int,
    doubts: Sequence[str],
) -> dict[str, Any]:
    """The fields of a model_info file, in its order, and `doubts`; accuracies are strings of percent, two decimals.

    Args:
        publication: what only the authors know.
        dataset: cifar10, cifar100 or imagenet on the leaderboard.
        epsilon: radius of the ball.
        clean: images right clean.
        autoattack: images right under AutoAttack's standard version.
        images: how many were measured.
        doubts: reasons not to believe the measurement, which make it unreliable.
    """
    robust = percent(autoattack, images)
    return {
        "link": publication.link,
        "name": publication.name,
        "authors": publication.authors,
        "additional_data": publication.additional_data,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": publication.venue,
        "architecture": publication.architecture,
        "eps": leaderboard_epsilon(epsilon),
        "clean_acc": percent(clean, images),
        "reported": robust if publication.reported is None else publication.reported,
        "autoattack_acc": robust,
        "unreliable": bool(doubts),
        "doubts": list(doubts),
    }

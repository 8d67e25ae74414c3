"""Randomised smoothing: a radius in L2 within which a classifier's most frequent answer under noise cannot change.

Source: Cohen, Rosenfeld, Kolter: Certified Adversarial Robustness via Randomized Smoothing, ICML 2019. The radius is
that of the smoothed classifier, which answers for an image what the network answers most often for the image plus
Gaussian noise, not that of the network itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from awp_engine.evaluation.reports.confidence import lower_bound
from awp_engine.models.answers import NO_CLASS, predicted
from awp_kernels import pgd_init_normal_
from awp_kernels.philox import mix_seed

# separates this noise from that of attacks with the same seed
_NOISE = 19
_MOST_DRAWS = 10**9
# as in training (--attack.noise)
_MOST_NOISE = 10


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """How images are certified.

    Attributes:
        sigma: standard deviation of the noise, on pixels in [0, 1].
        n0: noisy copies of an image that choose the class.
        n: further copies that bound the class's probability.
        alpha: probability, for each image, that its certificate is wrong.

    Raises:
        ValueError: a value out of range, or so few copies that every image would be abstained from.
    """

    sigma: float
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        if not 1e-6 <= self.sigma <= _MOST_NOISE:
            meant = (
                f"did you mean {self.sigma:g}/255, {self.sigma / 255:.3g}? " if _MOST_NOISE < self.sigma <= 255 else ""
            )
            bounds = f"a number from 0.000001 to {_MOST_NOISE}, as pixels lie in [0, 1]"
            raise ValueError(f"sigma: {meant}expected {bounds}, got {self.sigma}")
        if not 1e-12 <= self.alpha < 0.5:
            raise ValueError(f"alpha: expected a probability from 1e-12 to below 0.5, got {self.alpha}")
        for name in ("n0", "n"):
            if not 1 <= getattr(self, name) <= _MOST_DRAWS:
                raise ValueError(f"{name}: expected a whole number from 1 to {_MOST_DRAWS}, got {getattr(self, name)}")
        if not self.largest_radius > 0:
            least = math.floor(math.log(self.alpha) / math.log(0.5)) + 1
            raise ValueError(f"n: expected at least {least} copies, or nothing can be certified at alpha {self.alpha}")

    @property
    def largest_radius(self) -> float:
        """What is certified where all `n` answers agree."""
        return self.radius(self.n)

    def radius(self, votes: int) -> float:
        """The radius for a class that `votes` of `n` answers are; 0 or less where there is none."""
        return self.sigma * NormalDist().inv_cdf(lower_bound(votes, self.n, self.alpha)) if votes else -math.inf


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What is known of one image.

    Attributes:
        id: the sample's.
        label: its class.
        prediction: the class that is certified; None: abstained.
        radius: in L2, on pixels in [0, 1], within which the smoothed classifier answers `prediction`; 0 if abstained.
        lower_bound: of the probability of the class that was chosen.
        chosen: that class, by the first `n0` answers.
        votes: for it, of the `n` answers.
        majority: the most frequent of the `n` answers; None where none was finite.
        not_finite: of all answers, those that are no class.
    """

    id: int
    label: int
    prediction: int | None
    radius: float
    lower_bound: float
    chosen: int
    votes: int
    majority: int | None
    not_finite: int


@torch.no_grad()
def count_answers(
    model: nn.Module,
    image: Tensor,
    draws: range,
    *,
    sigma: float,
    sample_id: int,
    seed: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """How often each class is the answer to `image` plus noise that is not clipped.

    A copy's noise depends on the seed, the sample's id and the copy's number alone.

    Args:
        model: in eval mode; maps images to logits.
        image: fp32 [C, H, W].
        draws: the numbers of the noisy copies.
        sigma: standard deviation.
        sample_id: of the image.
        seed: of all noise, in [0, 2^63).
        batch_size: copies at a time.
        advance: is told how many copies were classified.

    Returns:
        int64 [classes + 1] on the CPU; the last one counts logits that are not finite.
    """
    seed = mix_seed(seed, _NOISE, sample_id)
    counts = torch.zeros(0, dtype=torch.int64)
    clean = image.expand(min(batch_size, len(draws)), *image.shape).contiguous()
    noisy = torch.empty_like(clean)
    for first in range(draws.start, draws.stop, batch_size):
        numbers = torch.arange(first, min(first + batch_size, draws.stop), device=image.device)
        copies = noisy[: len(numbers)]
        pgd_init_normal_(copies, clean[: len(numbers)], std=sigma, sample_ids=numbers, seed=seed)
        logits = model(copies)
        answers = predicted(logits)
        classes = logits.shape[1]
        found = torch.bincount(answers.masked_fill(answers == NO_CLASS, classes), minlength=classes + 1).cpu()
        counts = counts + found if len(counts) else found
        advance(len(numbers))
    return counts


def certify(
    model: nn.Module,
    image: Tensor,
    label: int,
    smoothing: Smoothing,
    *,
    sample_id: int,
    seed: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> Certificate:
    """The procedure CERTIFY of the paper, by noise of its own for the choice and for the bound.

    Args:
        model: in eval mode; maps images to logits.
        image: fp32 [C, H, W].
        label: its class; kept, not used.
        smoothing: how.
        sample_id: of the image, which its noise is keyed by.
        seed: of all noise.
        batch_size: noisy copies at a time; changes nothing beyond rounding in the network.
        advance: is told how many copies were classified.
    """

    def count(draws: range) -> Tensor:
        return count_answers(
            model,
            image,
            draws,
            sigma=smoothing.sigma,
            sample_id=sample_id,
            seed=seed,
            batch_size=batch_size,
            advance=advance,
        )

    first = count(range(smoothing.n0))
    counts = count(range(smoothing.n0, smoothing.n0 + smoothing.n))
    chosen, majority = int(first[:-1].argmax()), int(counts[:-1].argmax())
    votes = int(counts[chosen])
    radius = smoothing.radius(votes)
    return Certificate(
        id=sample_id,
        label=label,
        prediction=chosen if radius > 0 else None,
        radius=max(radius, 0.0),
        lower_bound=lower_bound(votes, smoothing.n, smoothing.alpha),
        chosen=chosen,
        votes=votes,
        majority=majority if counts[majority] else None,
        not_finite=int(first[-1] + counts[-1]),
    )

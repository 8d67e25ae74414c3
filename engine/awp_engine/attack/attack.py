"""An attack as one value: made once, called on every batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from awp_engine.attack.apgd import apgd
from awp_engine.attack.common import Norm, Start, starting_point
from awp_engine.attack.l1 import apgd_l1
from awp_engine.attack.losses import Loss, summed_cross_entropy
from awp_engine.attack.msd import msd
from awp_engine.attack.pgd import pgd


@dataclass(frozen=True, kw_only=True)
class Attack:
    """How images are attacked: `attack(model, x, y)` calls `pgd`, `apgd`, `apgd_l1` or `msd` with these arguments.

    Attributes:
        kind: "pgd", or "apgd", which chooses its own step sizes.
        epsilon: radius of the ball, on pixels in [0, 1]; 0 leaves images as they are.
        step_size: length of a step of PGD, in the same units; None for apgd alone.
        steps: number of steps.
        norm: "linf", "l2" or "l1". In L1 there is apgd, which begins at the image for the start "none", and else at
            Gaussian noise; pgd is part of `msd` alone.
        start: first iterate; see `pgd`.
        start_epsilon: radius of the ball that a uniform start is drawn from; None means epsilon.
        bn_mode: how batch normalisation behaves during the attack: "train", by the batch's statistics, or "eval".
        seed: of the noise, where a call gives no other.
        others: attacks in further balls. One of `balls` attacks in one; with all of them a call is multi steepest
            descent (kind pgd, start "none"), whose number of steps, modes and seed are this one's.

    Raises:
        ValueError: another kind, or pgd without a step size.
    """

    kind: Literal["pgd", "apgd"] = "pgd"
    epsilon: float
    step_size: float | None = None
    steps: int
    norm: Norm = "linf"
    start: Start = "uniform"
    start_epsilon: float | None = None
    bn_mode: Literal["train", "eval"] = "eval"
    seed: int = 0
    others: tuple["Attack", ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("pgd", "apgd"):
            raise ValueError(f"kind: expected pgd or apgd, got {self.kind!r}")
        if self.kind == "pgd" and self.step_size is None:
            raise ValueError("step_size: expected a length for kind pgd, got None; only apgd chooses its own")

    @property
    def balls(self) -> tuple["Attack", ...]:
        """An attack for each ball, this one's first."""
        return replace(self, others=()), *self.others

    def scaled(self, part: float) -> "Attack":
        """This attack in a ball of `part` of the radius, with steps as much shorter."""
        lengths = {name: getattr(self, name) for name in ("epsilon", "step_size", "start_epsilon")}
        changed = {name: part * length for name, length in lengths.items() if length is not None}
        return replace(self, **changed, others=tuple(other.scaled(part) for other in self.others))

    def first(self, x: Tensor, *, sample_ids: Tensor, seed: int) -> Tensor:
        """Where the attack on a batch begins, [N, C, H, W]: all of it that depends on the seed."""
        return starting_point(
            x.detach(),
            # images that are left as they are, in any norm
            self.start if self.epsilon else "none",
            epsilon=self.epsilon if self.start_epsilon is None else self.start_epsilon,
            norm=self.norm,
            sample_ids=sample_ids,
            seed=seed,
        )

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        sample_ids: Tensor | None = None,
        seed: int | None = None,
        start: Tensor | None = None,
        loss: Loss | None = None,
        loss_scale: float = 1.0,
        shared: Sequence[nn.Parameter] = (),
        observe: Callable[[int, Tensor], None] | None = None,
        observe_from: int = 0,
    ) -> Tensor:
        """The attacked images of a batch; a gradient that is not finite moves nothing, and `observe` is told of it.

        Args:
            model: maps images in [0, 1] to logits.
            x: [N, C, H, W], in [0, 1].
            y: int64 [N], or fp32 [N, classes] of a mixture.
            sample_ids: int64 [N], what the noise is keyed by.
            seed: of the noise; None: the attack's own.
            start: first iterate, as from `first`; None: drawn here.
            loss: maps (logits, y) to a scalar to climb; None: summed cross-entropy. Not for apgd.
            loss_scale: factor on what is climbed, against underflow.
            shared: parameters that get gradients from the last pass, see `pgd`. Not for apgd.
            observe: called with every step's number and gradient, see `pgd`.
            observe_from: the first step that it is called for.

        Raises:
            ValueError: as `pgd`; a loss or shared parameters with apgd or several balls, which climb cross-entropy;
                several balls with apgd or another start.
        """
        if self.epsilon == 0:
            return x
        fixed = self.kind == "apgd" or self.others
        other = loss is not None and (self.kind == "apgd" or loss is not summed_cross_entropy)
        if fixed and (other or shared):
            what = "in several balls" if self.others else "of kind apgd"
            raise ValueError(f"loss, shared: expected neither with an attack {what}, which climbs cross-entropy")
        seed = self.seed if seed is None else seed
        given: dict[str, Any] = {"steps": self.steps, "bn_mode": self.bn_mode, "loss_scale": loss_scale}
        given |= {"observe": observe, "observe_from": observe_from}
        if self.others:
            if self.kind != "pgd" or self.start != "none":
                raise ValueError("others: expected none but with kind pgd and start none; take one of `balls`")
            balls: list[tuple[Norm, float, float]] = [
                (ball.norm, ball.epsilon, ball.step_size or 0.0) for ball in self.balls
            ]
            return msd(model, x, y, balls=balls, seed=seed, start=start, **given)
        given |= {"epsilon": self.epsilon, "sample_ids": sample_ids, "seed": seed}
        if self.kind == "apgd" and self.norm == "l1":
            return apgd_l1(model, x, y, start=x if start is None and self.start == "none" else start, **given)
        given |= {"norm": self.norm, "start": self.start if start is None else start, "nonfinite": "ignore"}
        if self.kind == "apgd":
            return apgd(model, x, y, **given)
        assert self.step_size is not None
        lengths = {"step_size": self.step_size, "start_epsilon": self.start_epsilon}
        return pgd(model, x, y, loss=loss or summed_cross_entropy, shared=shared, **lengths, **given)


def fast_attack(
    kind: Literal["fgsm-rs", "n-fgsm"], epsilon: float, *, bn_mode: Literal["train", "eval"] = "eval"
) -> Attack:
    """A one-step attack in the Linf ball.

    Args:
        kind: "fgsm-rs": uniform start, one step of 1.25 epsilon, projected; "n-fgsm": uniform noise of twice epsilon,
            one step of epsilon, clipped to [0, 1] but not projected.
        epsilon: radius of the ball, on pixels in [0, 1].
        bn_mode: see `Attack`.

    Raises:
        ValueError: unknown kind.

    Source: Wong, Rice, Kolter: Fast is better than free, ICLR 2020; de Jorge et al.: Make Some Noise, NeurIPS 2022.
    """
    if kind == "fgsm-rs":
        return Attack(epsilon=epsilon, step_size=1.25 * epsilon, steps=1, bn_mode=bn_mode)
    if kind == "n-fgsm":
        # noise and step reach no farther than three epsilons, or across [0, 1], so that this ball projects nothing
        return Attack(
            epsilon=min(3 * epsilon, 1.0), step_size=epsilon, steps=1, start_epsilon=2 * epsilon, bn_mode=bn_mode
        )
    raise ValueError(f"fast: expected fgsm-rs or n-fgsm, got {kind!r}")

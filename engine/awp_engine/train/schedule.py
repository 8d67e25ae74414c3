"""What each step of a run is to do."""

from dataclasses import dataclass

from awp_engine.attack import Attack
from awp_engine.config import AwpConfig, OptimizerConfig
from awp_engine.optim.schedule import learning_rate
from awp_engine.step.step import Phase
from awp_kernels.philox import mix_seed

_ATTACK_NOISE = 1


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The phase of every step, a function of epoch and step alone, so that a run resumes exactly.

    Attributes:
        epochs: of the run.
        steps: of an epoch.
        seed: of the run.
        optimizer: how the learning rate changes.
        awp: when the weights are perturbed.
        attack: how images are attacked.
        cheap: how in the first epochs; the same where there is no cheap attack.
        cheap_epochs: how many those are.
        free: whether the first epochs are free adversarial training.
    """

    epochs: int
    steps: int
    seed: int
    optimizer: OptimizerConfig
    awp: AwpConfig
    attack: Attack
    cheap: Attack
    cheap_epochs: int
    free: bool

    def number(self, epoch: int, step: int) -> int:
        """How many steps of the run come before step `step`, from 0, of `epoch`, from 1."""
        return (epoch - 1) * self.steps + step

    def lr(self, epoch: int, step: int) -> float:
        """The learning rate of that step."""
        return learning_rate(self.optimizer, self.epochs, epoch - 1 + step / self.steps)

    def __call__(self, epoch: int, step: int) -> Phase:
        """The phase of that step."""
        cheap = epoch <= self.cheap_epochs
        return Phase(
            attack=self.cheap if cheap else self.attack,
            seed=mix_seed(self.seed, epoch, _ATTACK_NOISE),
            perturb=epoch > self.awp.warmup and self.number(epoch, step) % self.awp.every == 0,
            free=cheap and self.free,
            lr=self.lr(epoch, step),
        )

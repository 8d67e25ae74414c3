"""What each step of a run is to do."""

from dataclasses import dataclass, replace

from awp_engine.attack import Attack
from awp_engine.config import Config
from awp_engine.config.model_names import is_code
from awp_engine.optim.learning_rate import cycled_momentum, learning_rate
from awp_engine.step.noise import Noise
from awp_engine.step.values import Phase
from awp_kernels.philox import mix_seed

_ATTACK_NOISE = 1
_LAYER_NOISE = 4
_SMOOTHING_NOISE = 5


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The phase of every step, a function of epoch and step alone, so that a run resumes exactly.

    Attributes:
        config: of the run.
        steps: of an epoch.
        attack: how images are attacked, with a ramp in the last epoch.
        cheap: how in the first epochs, if those have a cheap attack.
    """

    config: Config
    steps: int
    attack: Attack
    cheap: Attack

    def number(self, epoch: int, step: int) -> int:
        """How many steps of the run come before step `step`, from 0, of `epoch`, from 1."""
        return (epoch - 1) * self.steps + step

    def lr(self, epoch: int, step: int) -> float:
        """The learning rate of that step."""
        place = epoch - 1 + step / self.steps
        return learning_rate(self.config.optimizer, self.config.epochs, place, steps=self.steps)

    def momentum(self, epoch: int, step: int) -> float | None:
        """That of SGD in that step, where it changes over the run."""
        place = epoch - 1 + step / self.steps
        return cycled_momentum(self.config.optimizer, self.config.epochs, place, steps=self.steps)

    def is_cheap(self, epoch: int) -> bool:
        """Whether `epoch` has the cheap attack."""
        attack = self.config.attack
        return attack.fast != "none" and (attack.fast_epochs is None or epoch <= attack.fast_epochs)

    def full_attack(self, epoch: int) -> Attack:
        """The attack of `epoch` where it has no cheap one.

        Sources: of the linear ramp Addepalli et al.: Efficient and Effective Augmentation Strategy for Adversarial
        Training (DAJAT), NeurIPS 2022; of the step's warm-up the public code of ARES, thu-ml/ares; of the stronger
        attack ReBAT++, of Wang et al.: Balance, Imbalance, and Rebalance, NeurIPS 2023.
        """
        config, attack = self.config, self.attack
        if (stronger := config.attack.stronger) is not None and epoch > stronger.after:
            attack = replace(attack, epsilon=stronger.epsilon, steps=stronger.steps)
        if config.attack.ramp != "none":
            attack = attack.scaled(epoch / config.epochs)
        if epoch <= config.attack.step_warmup:
            part = (epoch - 1) / config.attack.step_warmup
            # of several balls in each
            first, *others = (replace(ball, step_size=part * (ball.step_size or 0.0)) for ball in attack.balls)
            attack = replace(first, others=tuple(others))
        return attack

    def layer_seed(self, epoch: int, step: int) -> int | None:
        """Of dropout and the like in that step; built-in models and methods have none."""
        config = self.config
        drawn = config.model.source != "built-in" or is_code(config.method)
        return mix_seed(config.seed, epoch, step, _LAYER_NOISE) if drawn else None

    def noise(self, epoch: int) -> Noise | None:
        """That on the images of `epoch`."""
        attack, seed = self.config.attack, mix_seed(self.config.seed, epoch, _SMOOTHING_NOISE)
        return Noise(sigma=attack.noise, copies=attack.noise_samples, seed=seed) if attack.noise else None

    def __call__(self, epoch: int, step: int) -> Phase:
        """The phase of that step."""
        config, cheap = self.config, self.is_cheap(epoch)
        return Phase(
            attack=self.cheap if cheap else self.full_attack(epoch),
            seed=mix_seed(config.seed, epoch, _ATTACK_NOISE),
            perturb=epoch > config.awp.warmup and self.number(epoch, step) % config.awp.every == 0,
            free=cheap and config.attack.fast == "free",
            lr=self.lr(epoch, step),
            momentum=self.momentum(epoch, step),
            noise=self.noise(epoch),
            whole_statistics=config.model.bn_momentum is not None and self.number(epoch, step) == 0,
            layer_seed=self.layer_seed(epoch, step),
            done=self.number(epoch, step) / (config.epochs * self.steps),
            epoch=epoch,
            step=step,
        )

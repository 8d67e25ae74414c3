"""The recipe of Wang 2023 whole, as its preset has it, against plain PyTorch in fp64."""

import copy
import dataclasses

import pytest
import torch
from samples import images
from torch import Tensor, nn

from awp_engine.config import Config, PrecisionConfig
from awp_engine.config.presets.generated import bartoldson, wang
from awp_engine.data import Batch
from awp_engine.models import build_model
from awp_engine.models.batch_norm import set_momentum
from awp_engine.optim.average import WeightAverage
from awp_engine.train import setup
from awp_engine.train.schedule import Schedule

# two steps an epoch, of which the first two rise
EPOCHS, STEPS, TAKEN = 80, 2, 7
BETA, SMOOTHING, EPSILON, STEP = 5.0, 0.1, 8 / 255, 2 / 255


def batch(number: int) -> Batch:
    y = torch.randint(0, 10, (6,), generator=torch.Generator().manual_seed(number))
    return Batch(images((6, 3, 8, 8), torch.float64, seed=number), y, torch.arange(6) + 10 * number, 6)


class Plain:
    """The recipe as its public code is described: the network and the start's noise alone are the engine's."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model, self.average, self.taken = model, copy.deepcopy(model), 0
        norms = [p for name, p in model.named_parameters() if "bn" in name]
        others = [p for name, p in model.named_parameters() if "bn" not in name]
        groups = [{"params": others, "weight_decay": 5e-4}, {"params": norms, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
        self.cycle = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=lr, total_steps=EPOCHS, pct_start=0.025)

    def norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]

    def attack(self, x: Tensor, start: Tensor) -> Tensor:
        kept = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        clean = self.model(x).softmax(1).detach()
        x_adv = start
        for _ in range(10):
            x_adv = x_adv.detach().requires_grad_()
            told = self.model(x_adv).softmax(1)
            (clean * (clean.log() - told.log())).sum().backward()
            moved = x_adv.detach() + STEP * x_adv.grad.sign()
            x_adv = torch.maximum(torch.minimum(moved, x + EPSILON), x - EPSILON).clamp(0, 1)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(kept[name])
        return x_adv

    def step(self, x: Tensor, y: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        x_adv = self.attack(x, start)
        for norm in self.norms():
            norm.momentum = 1.0 if self.taken == 0 else 0.01
        self.optimizer.zero_grad()
        attacked, clean = self.model(x_adv), self.model(x)
        log_clean, log_attacked = clean.log_softmax(1), attacked.log_softmax(1)
        right = -log_clean[torch.arange(len(y)), y]
        entropy = (1 - SMOOTHING) * right + SMOOTHING * -log_clean.mean(1)
        divergence = (log_clean.exp() * (log_clean - log_attacked)).sum(1)
        loss = entropy.mean() + BETA * divergence.sum() / len(y)
        loss.backward()
        self.optimizer.step()
        self.taken += 1
        warm = int(0.025 * EPOCHS * STEPS)
        passed = self.taken - warm
        kept = min(0.995, (1 + passed) / (10 + passed)) if passed >= 0 else 0.0
        with torch.no_grad():
            for averaged, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
                averaged.copy_(kept * averaged + (1 - kept) * now)
            for averaged, now in zip(self.average.buffers(), self.model.buffers(), strict=True):
                averaged.copy_(now)
        if self.taken % STEPS == 0:
            self.cycle.step()
        return x_adv, loss.detach()


def apart(ours: nn.Module, theirs: nn.Module) -> float:
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)) for a, b in pairs)


@pytest.mark.parametrize(
    ("config", "lr"),
    [(wang("cifar10", "10-1", 512, EPOCHS, awp=False), 0.2), (bartoldson("10-1", EPOCHS, alone=0, awp=False), 0.1)],
    ids=["Wang", "Bartoldson"],
)
def test_seven_steps_agree(config: Config, lr: float) -> None:
    """Iterates, loss, weights, running statistics and their average, from the first step over the rate's top."""
    config = dataclasses.replace(config, precision=PrecisionConfig(attack="fp32", ascent="fp32", descent="fp32"))
    torch.manual_seed(0)
    settings = config.model
    assert settings.name == "dm-wrn-10-1"
    assert settings.bn_momentum is not None
    model = build_model(settings.name, 10, settings.mean, settings.std, activation=settings.activation).double().train()
    plain = Plain(copy.deepcopy(model), lr)
    set_momentum(model, settings.bn_momentum)
    step = setup.build_step(config, model)
    average = WeightAverage(model, config.average, config.epochs, steps=STEPS)
    average.follow(step.update.optimizer)
    step.update.average = average
    attack = setup.training_attack(config.attack)
    schedule = Schedule(config=config, steps=STEPS, attack=attack, cheap=attack)
    momenta = []
    for number in range(TAKEN):
        given, phase = batch(number), schedule(1 + number // STEPS, number % STEPS)
        start = step.prepare(given, phase)
        assert 0 < (start - given.images).abs().max() <= EPSILON + 1e-12
        ours = step.passes.attack_whole(attack, step.models.attack, given, start)
        momenta.append(plain.optimizer.param_groups[0]["momentum"])
        theirs, loss = plain.step(given.images, given.labels, start)
        result = step(given, phase, start)
        assert (ours - theirs).abs().max() <= 1e-9
        assert abs(result.loss - loss) <= 1e-9 * loss
        assert apart(model, plain.model) <= 1e-9
        assert apart(average.model, plain.average) <= 1e-9
    # up and down again
    assert momenta[0] == 0.95 > momenta[-1]
    assert min(momenta) == pytest.approx(0.85)
    assert not torch.equal(average.model.fc.weight, model.fc.weight)

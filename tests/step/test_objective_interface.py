"""What a method may do beside its loss: change in time, aim at other than the labels, keep tensors between steps."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from samples import images
from steps import make_step
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from awp_engine.config import AttackConfig, AwpConfig, Config, ConfigError, OptimizerConfig
from awp_engine.distributed.batch import Batch
from awp_engine.models.batch_norm import batch_norm_mode
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import Objective
from awp_engine.train import setup
from awp_engine.train.schedule import Schedule
from awp_kernels import AdversarialWeightPerturbation

ATTACK = AttackConfig(epsilon="8/255", step_size="2/255", steps=2, bn_mode="eval")
SMOOTH, GAMMA, LR = 0.3, 0.01, 0.1


class Everything(Objective):
    """Aims at smoothed answers of the class after the right one, and counts the images of each class."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.smooth = torch.zeros((), dtype=torch.float64)
        self.counts, self.gathered = torch.zeros(3), torch.zeros(3)

    def begin_step(self, done: float, epoch: int, step: int) -> None:
        self.calls.append(f"begin {done:g} {epoch} {step}")
        self.smooth.fill_(SMOOTH * done)

    def targets(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.calls.append(f"targets {len(x)}")
        return (1 - self.smooth) * one_hot((y + 1) % 3, 3) + self.smooth / 3

    def losses(self, model: nn.Module, x_adv: torch.Tensor, x: torch.Tensor, y: torch.Tensor):
        self.calls.append(f"losses {len(x)}{' down' if self.descending else ''}")
        if self.descending:
            self.gathered += one_hot(y.argmax(1), 3).sum(0)
        logits = model(x_adv)
        return cross_entropy(logits, y, reduction="none"), logits

    def ascent_losses(self, model: nn.Module, x_adv: torch.Tensor, x: torch.Tensor, y: torch.Tensor):
        losses, logits = self.losses(model, x_adv, x, y)
        return 2 * losses + logits[:, 0], logits

    def after_step(self, ranks) -> None:
        self.calls.append("after")
        ranks.sum_([self.gathered])
        self.counts += self.gathered
        self.gathered.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        return {"counts": self.counts, "gathered": self.gathered}


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3)).double().train()


def step_of(model: nn.Module, objective: Objective, **given):
    step = make_step(
        model,
        objective=objective,
        attack=ATTACK,
        awp=AdversarialWeightPerturbation(model, GAMMA),
        optimizer=build_optimizer(model, OptimizerConfig(lr=LR, momentum=0.0, weight_decay=0.0)),
        options=AwpConfig(gamma=GAMMA),
        **given,
    )
    return step.step, dataclasses.replace(step.phase(0, True, False), done=0.5, epoch=2, step=3)


def batch(bad: bool = False) -> Batch:
    x = images((5, 1, 4, 4), torch.float64, seed=1)
    return Batch(x * torch.nan if bad else x, torch.tensor([0, 1, 2, 2, 2]), torch.arange(5), 5)


def test_a_step_is_that_of_its_definition():
    """Attack by the targets, w + v by the ascent's losses, SGD by the descent's, accuracy by the labels."""
    ours, objective = small_model(), Everything()
    model = copy.deepcopy(ours)
    step, phase = step_of(ours, objective)
    x, y = batch().images, batch().labels
    found = step(batch(), phase)
    smooth = SMOOTH * 0.5
    targets = torch.full((5, 3), smooth / 3, dtype=torch.float64)
    targets[torch.arange(5), torch.tensor([1, 2, 0, 0, 0])] += 1 - smooth
    x_adv = phase.attack.first(x, sample_ids=torch.arange(5), seed=0)
    for _ in range(2):
        x_adv = x_adv.detach().requires_grad_()
        with batch_norm_mode(model, "eval", update_statistics=False):
            (g,) = torch.autograd.grad(-(targets * model(x_adv).log_softmax(1)).sum(), x_adv)
        x_adv = (x_adv.detach() + 2 / 255 * g.sign()).clamp(x - 8 / 255, x + 8 / 255).clamp(0, 1)

    def loss(ascent: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with batch_norm_mode(model, update_statistics=not ascent):
            logits = model(x_adv)
        plain = -(targets * logits.log_softmax(1)).sum(1).mean()
        return (2 * plain + logits[:, 0].mean() if ascent else plain), logits

    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = [name for name, p in model.named_parameters() if p.ndim > 1]
    gradients = torch.autograd.grad(loss(True)[0], [model.get_parameter(name) for name in moved])
    with torch.no_grad():
        for name, g in zip(moved, gradients, strict=True):
            model.get_parameter(name).add_(GAMMA * weights[name].norm() / g.norm() * g)
    value, logits = loss(False)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    for (name, p), g in zip(ours.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(p.detach(), weights[name] - LR * g, rtol=1e-9, atol=1e-12)
    for a, b in zip(ours.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.loss, value.detach(), rtol=1e-9, atol=0)
    assert found.correct == (logits.argmax(1) == y).double().mean()
    assert objective.calls == ["begin 0.5 2 3", "targets 5", "losses 5", "losses 5 down", "after"]
    assert objective.counts.tolist() == [3, 1, 1]
    assert not objective.descending


def test_targets_are_made_once_for_each_image_of_a_piece():
    objective = Everything()
    step, phase = step_of(small_model(), objective, micro_batch_size=3)
    step(batch(), phase)
    calls = ["targets 2", "targets 3", "losses 2", "losses 3", "losses 2 down", "losses 3 down", "after"]
    assert objective.calls[1:] == calls
    assert objective.counts.tolist() == [3, 1, 1]


def test_what_is_kept_is_put_back_where_a_step_is_left_out_or_fails():
    objective = Everything()
    model = small_model()
    step, phase = step_of(model, objective)
    step(batch(), phase)
    with torch.no_grad():
        # the images are sound, so that the attack takes them
        model.get_parameter("3.bias")[0] = torch.nan
    assert step(batch(), phase).skipped
    assert objective.counts.tolist() == [3, 1, 1]
    objective.after_step = None  # fails after all else  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        step(batch(), phase)
    assert (objective.counts.tolist(), objective.gathered.tolist()) == ([3, 1, 1], [0, 0, 0])


def test_the_schedule_says_how_far_a_step_is():
    config = Config(epochs=4)
    attack = setup.training_attack(config.attack)
    schedule = Schedule(config=config, steps=5, attack=attack, cheap=attack)
    told = [schedule(epoch, step) for epoch, step in ((1, 0), (2, 1), (4, 4), (4, 5))]
    assert [(phase.done, phase.epoch, phase.step) for phase in told] == [
        (0, 1, 0),
        (0.3, 2, 1),
        (0.95, 4, 4),
        (1, 4, 5),
    ]


OWN = """
from awp_engine.step.objectives import AdversarialTraining


class Tuned(AdversarialTraining):
    def __init__(self, num_classes, tau=(1.0, 1.0), *, label_smoothing=0.0, device=None):
        super().__init__(label_smoothing)
        if max(tau) > 9:
            raise ValueError("tau is large")
        self.tau, self.classes, self.device = tau, num_classes, device


class Follows(AdversarialTraining):
    uses_average = True
"""


def test_arguments_reach_a_method_of_ones_own(tmp_path):
    (tmp_path / "tuned.py").write_text(OWN)
    config = Config(method=f"{tmp_path / 'tuned.py'}:Tuned", label_smoothing=0.1, method_args=("tau=2.5,2.0",))
    found: Any = setup.objective_of(config, torch.device("cpu"), 7)
    assert (found.tau, found.classes, found.device, found.label_smoothing) == ((2.5, 2.0), 7, torch.device("cpu"), 0.1)


@pytest.mark.parametrize(
    ("method", "args", "message"),
    [
        ("own", ("taw=1",), r"--method-args: .*Tuned takes no taw; did you mean tau\?"),
        ("own", ("num_classes=3",), "--method-args: expected no num_classes, which is given by itself"),
        ("own", ("tau=10,1",), "--method: .*Tuned: its call raised ValueError: tau is large"),
        ("mart", ("beta=3",), "--method-args: expected no beta, which is given by itself or has a flag of its own"),
        ("at", ("tau=1",), "--method-args: at takes no tau; it takes none"),
        ("at", ("tau",), "--method-args: expected NAME=VALUE, every name once, got"),
        ("at", ("a=1", "a=2"), "--method-args: expected NAME=VALUE, every name once, got"),
    ],
)
def test_arguments_that_a_method_does_not_take_are_refused_in_one_line(tmp_path, method, args, message):
    (tmp_path / "tuned.py").write_text(OWN)
    method = f"{tmp_path / 'tuned.py'}:Tuned" if method == "own" else method
    with pytest.raises(ConfigError, match=message) as told:
        setup.objective_of(Config(method=method, method_args=args), torch.device("cpu"), 3)
    assert "\n" not in str(told.value)


def test_a_method_that_uses_the_average_needs_one(tmp_path):
    (tmp_path / "tuned.py").write_text(OWN)
    config = Config(method=f"{tmp_path / 'tuned.py'}:Follows")
    with pytest.raises(ConfigError, match=r"--average\.kind: expected ema with --method .*whose loss uses the average"):
        setup.objective_of(config, torch.device("cpu"))

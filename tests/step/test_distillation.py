"""ADR, ADR-TRADES and ReBAT, each against plain PyTorch in fp64, written from their papers and public code."""

import copy
import dataclasses
import math

import plain_methods
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_steps import HostReads, small_batch, small_model
from steps import TensorStep, make_step
from torch import Tensor, nn

from awp_engine.config import AttackConfig, AverageConfig, AwpConfig, Config, ConfigError, OptimizerConfig
from awp_engine.distributed.batch import Batch
from awp_engine.optim.average import WeightAverage
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import Objective, build_objective
from awp_engine.train import setup
from awp_engine.train.schedule import Schedule
from awp_kernels import AdversarialWeightPerturbation

EPSILON, STEP_SIZE, STEPS, BETA, GAMMA, DECAY = 8 / 255, 2 / 255, 3, 1.5, 0.005, 0.9
TAU, LAM = (2.5, 2.0), (0.7, 0.95)
METHODS = ["adr", "adr-trades", "rebat"]
# ReBAT++, whose ball and steps are larger from the third epoch on
STRONGER = {"stronger_after": 2, "stronger_epsilon": "10/255", "stronger_steps": 5}


def objective_of(method: str) -> Objective:
    arguments = {} if method in ("at", "rebat") else {"tau": TAU, "lam": LAM}
    return build_objective(method, beta=BETA, average_warmup=1.0, arguments=arguments)


def build_step(model: nn.Module, method: str, gamma: float = GAMMA, **given) -> tuple[TensorStep, WeightAverage]:
    settings = AverageConfig(kind="ema", decay=DECAY, ramp=False, statistics="averaged")
    optimizer, average = build_optimizer(model, OptimizerConfig(lr=0.1)), WeightAverage(model, settings, 4)
    average.follow(optimizer)
    objective = objective_of(method)
    objective.average = average.model
    # all parameters, as ADR's
    awp = AdversarialWeightPerturbation(model, gamma, select=lambda name, weight: True) if gamma else None
    attack = AttackConfig(epsilon="8/255", step_size="2/255", steps=STEPS, bn_mode="eval")
    options = {"awp": awp, "options": AwpConfig(gamma=gamma), "average": average} | given
    return make_step(model, objective=objective, optimizer=optimizer, attack=attack, **options), average


def cosine(ends: tuple[float, float], done: float) -> float:
    start, end = ends
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * done))


def rectified(logits: Tensor, y: Tensor, tau: float, lam: float) -> Tensor:
    """Image by image, from the teacher's logits."""
    rows = []
    for row, right in zip(logits, y.tolist(), strict=True):
        exp = [math.exp(float(value) / tau) for value in row - row.max()]
        p = [value / sum(exp) for value in exp]
        share = min(max(lam - (max(p) - p[right]), 0.0), 1.0)
        rows.append([share * value + (1 - share) * (c == right) for c, value in enumerate(p)])
    return torch.tensor(rows, dtype=torch.float64)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * plain_methods.log_probabilities(logits)).sum(1)


def plain_loss(method: str, model: nn.Module, teacher: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, done: float):
    if method == "rebat":
        logits = model(x_adv)
        pulled = plain_methods.kl(logits, teacher(x_adv).detach())
        return (plain_methods.cross_entropy(logits, y) + (BETA * pulled if done >= 0.25 else 0)).mean()
    target = rectified(teacher(x).detach(), y, cosine(TAU, done), cosine(LAM, done))
    if method == "adr":
        return soft_cross_entropy(model(x_adv), target).mean()
    logits_adv, logits = model(x_adv), model(x)
    return (soft_cross_entropy(logits, target) + BETA * plain_methods.kl(logits_adv, logits)).mean()


def plain_attack(
    method: str, model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, start: Tensor, done: float, plus: bool
):
    model = copy.deepcopy(model).eval()
    epsilon, steps = (10 / 255, 5) if plus and done >= 0.5 else (EPSILON, STEPS)
    target = rectified(teacher(x).detach(), y, cosine(TAU, done), cosine(LAM, done))
    iterates = [start]
    for _ in range(steps):
        x_adv = iterates[-1].detach().requires_grad_()
        logits = model(x_adv)
        climbed = {
            "adr": lambda: soft_cross_entropy(logits, target),  # noqa: B023
            "adr-trades": lambda: plain_methods.kl(logits, model(x)),  # noqa: B023
            "rebat": lambda: plain_methods.cross_entropy(logits, y),  # noqa: B023
        }[method]()
        (g,) = torch.autograd.grad(climbed.sum(), x_adv)
        moved = x_adv.detach() + STEP_SIZE * g.sign()
        iterates.append(torch.min(torch.max(moved, x - epsilon), x + epsilon).clamp(0, 1))
    return iterates


def difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-9)) for x, y in pairs)


@pytest.mark.parametrize(("method", "plus"), [*((method, False) for method in METHODS), ("rebat", True)])
def test_steps_are_those_of_the_definition(method, plus):
    """Iterates, losses, weights, statistics and the average, over steps before and after ReBAT's average begins."""
    ours, theirs = small_model(), small_model()
    step, average = build_step(ours, method)
    settings = dataclasses.replace(step.settings, **STRONGER if plus else {})
    attack = setup.training_attack(settings)
    schedule = Schedule(config=Config(attack=settings), steps=1, attack=attack, cheap=attack)
    teacher, momentum = copy.deepcopy(theirs).eval(), {}
    for index in range(4):
        done, epoch = index / 4, index + 1
        x, y, ids, _ = small_batch(index)
        attack = schedule(epoch, 0).attack
        phase = dataclasses.replace(step.phase(index, True, False), attack=attack, done=done, epoch=epoch)
        start = phase.attack.first(x, sample_ids=ids, seed=index)
        iterates = plain_attack(method, theirs, teacher, x, y, start, done, plus)
        step.passes.prepare(phase)
        assert phase.attack.steps == len(iterates) - 1
        for count in range(1, len(iterates)):
            attack = dataclasses.replace(phase.attack, steps=count)
            whole = Batch(x, y, ids, len(x))
            found, *_ = step.passes.attack(attack, whole, step.passes.share(len(x), len(x)), start)
            torch.testing.assert_close(found, iterates[count], rtol=0, atol=1e-12)
        x_adv, weights = iterates[-1], {name: p.detach().clone() for name, p in theirs.named_parameters()}
        climber = copy.deepcopy(theirs)
        plain_loss(method, climber, teacher, x_adv, x, y, done).backward()
        with torch.no_grad():
            for name, p in climber.named_parameters():
                assert p.grad is not None
                v = weights[name].norm() / (p.grad.norm() + 1e-20) * p.grad
                theirs.get_parameter(name).add_(GAMMA * v)
        theirs.zero_grad()
        tracked = int(theirs.get_buffer("1.num_batches_tracked"))
        loss = plain_loss(method, theirs, teacher, x_adv, x, y, done)
        loss.backward()
        # in the descent alone, once for each of its passes
        passes = 2 if method == "adr-trades" else 1
        assert int(theirs.get_buffer("1.num_batches_tracked")) == tracked + passes
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                assert p.grad is not None
                gradient = p.grad + 5e-4 * weights[name]
                momentum[name] = 0.9 * momentum[name] + gradient if name in momentum else gradient
                p.copy_(weights[name] - 0.1 * momentum[name])
            for name, kept in teacher.state_dict().items():
                now = theirs.state_dict()[name]
                kept.copy_(DECAY * kept + (1 - DECAY) * now if kept.is_floating_point() else now)
        result = step.taken(Batch(x, y, ids, len(x)), phase)
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-9, atol=0)
        assert difference(ours, theirs) <= 1e-9
        assert difference(average.model, teacher) <= 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_pieces_of_a_batch_add_up(method):
    """With frozen statistics a batch in pieces is trained on like a whole one."""
    found = []
    for size in (None, 3):
        model = small_model().eval()
        step, average = build_step(model, method, micro_batch_size=size)
        x, y, ids, _ = small_batch(1)
        step.taken(Batch(x, y, ids, len(x)), dataclasses.replace(step.phase(1, True, False), done=0.5, epoch=3))
        found.append((model, average.model))
    for whole, pieces in zip(*found, strict=True):
        assert difference(whole, pieces) <= 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_a_step_can_be_captured(method):
    """The host reads no more than in AT, whose reads are checks that a GPU makes by itself."""
    counts = []
    for name in ("at", method):
        step, _ = build_step(small_model(), name)
        x, y, ids, _ = small_batch(1)
        phase = dataclasses.replace(step.phase(1, True, False), epoch=3)
        start = step.step.prepare(Batch(x, y, ids, len(x)), phase)
        with HostReads() as found:
            step.step(Batch(x, y, ids, len(x)), phase, start)
        counts.append(found.reads)
    assert counts[0] >= counts[1] > 0


@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 6),
    tau=st.floats(0.5, 5.0),
    lam=st.floats(0.01, 1.0),
    scale=st.floats(0, 9),
)
def test_rectified_labels_are_probabilities_by_the_formula(seed, n, tau, lam, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 5, (n,), generator=generator)
    objective = build_objective("adr", arguments={"tau": (tau, tau), "lam": (lam, lam)})
    objective.average = nn.Identity()
    objective.begin_step(0.3, 1, 0)
    found = objective.targets(nn.Identity(), logits, y)
    torch.testing.assert_close(found, rectified(logits, y, tau, lam), rtol=1e-9, atol=1e-12)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert objective.targets(nn.Identity(), logits.float(), y).dtype == torch.float32


def test_rebat_asks_the_average_once_it_has_begun():
    objective, asked = objective_of("rebat"), []
    objective.average = nn.Linear(2, 2)
    objective.average.register_forward_hook(lambda *_: asked.append(objective.stage))
    x = torch.rand(3, 2)
    for epoch in (1, 2):
        objective.begin_step(0.0, epoch, 0)
        objective.losses(nn.Linear(2, 2), x, x, torch.zeros(3, dtype=torch.int64))
    assert asked == [True]


EMA = AverageConfig(kind="ema", statistics="averaged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average": AverageConfig()}, r"--average\.kind: expected ema with --method adr"),
        ({"average": AverageConfig(kind="ema")}, r"--average\.statistics: expected averaged or live with --method adr"),
        (
            {"label_smoothing": 0.1},
            r"--label-smoothing: expected 0 with --method adr, whose loss needs one right class",
        ),
        ({"method_args": ("tau=2",)}, "--method-args: tau: expected two numbers > 0, start and end, got 2"),
        ({"method_args": ("tau=2,true",)}, "--method-args: tau: expected two numbers > 0, start and end, got '2,true'"),
        ({"method_args": ("lam=0.5,1.5",)}, "--method-args: lam: expected two numbers > 0, at most 1, start and end"),
        ({"method_args": ("lambda=0.5,0.7",)}, r"--method-args: adr takes no lambda; did you mean lam\?"),
        ({"method": "rebat", "method_args": ("average_warmup=3",)}, "--method-args: expected no average_warmup"),
    ],
)
def test_what_does_not_go_with_them_is_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as told:
        setup.objective_of(Config(**{"method": "adr", "average": EMA} | changes), torch.device("cpu"))
    assert "\n" not in str(told.value)

"""SCORE, on attacked images and in the form of TRADES, against its definition in fp64."""

import copy
import dataclasses

import plain_methods
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_steps import small_batch, small_model
from steps import make_step
from torch import Tensor, nn

from awp_engine.config import AttackConfig, AwpConfig, Config, ConfigError, OptimizerConfig
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import build_objective
from awp_kernels import AdversarialWeightPerturbation

EPSILON, STEP_SIZE, STEPS, BETA, GAMMA = 8 / 255, 2 / 255, 3, 3.0, 0.01
METHODS = ["score", "score-trades"]


def plain_loss(logits_adv: Tensor, logits: Tensor, target: list[list[float]], clip: float, beta: float | None):
    """Image by image and class by class; beta None is the form of AT."""
    classes, total = logits.shape[1], []
    for adv, clean, wanted in zip(logits_adv, logits, target, strict=True):
        p_adv, p = adv.exp() / adv.exp().sum(), clean.exp() / clean.exp().sum()
        if beta is None:
            parts = [(p_adv[c] - wanted[c]) ** 2 for c in range(classes)]
        else:
            parts = [(p[c] - wanted[c]) ** 2 + beta * (p_adv[c] - p[c]) ** 2 for c in range(classes)]
        bound = clip**2 + clip**2 / (classes - 1)
        total.append((torch.stack(parts).sum() - bound).clamp(min=0))
    return torch.stack(total)


def one_hot(y: Tensor, classes: int = 4) -> list[list[float]]:
    return [[float(c == label) for c in range(classes)] for label in y.tolist()]


def plain_attack(method: str, model: nn.Module, x: Tensor, y: Tensor, start: Tensor) -> list[Tensor]:
    model, iterates = copy.deepcopy(model).eval(), [start]
    for _ in range(STEPS):
        x_adv = iterates[-1].detach().requires_grad_()
        p = model(x_adv).softmax(1)
        wanted = torch.tensor(one_hot(y)) if method == "score" else model(x).softmax(1).detach()
        (g,) = torch.autograd.grad((p - wanted).pow(2).sum(), x_adv)
        moved = x_adv.detach() + STEP_SIZE * g.sign()
        iterates.append(torch.min(torch.max(moved, x - EPSILON), x + EPSILON).clamp(0, 1))
    return iterates


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_the_definition(method, clip):
    """Iterates, losses, weights, and what moves the running statistics."""
    ours, theirs, momentum = small_model(), small_model(), {}
    step = make_step(
        ours,
        objective=build_objective(method, beta=BETA, arguments={"clip": clip}),
        optimizer=build_optimizer(ours, OptimizerConfig(lr=0.1)),
        attack=AttackConfig(epsilon="8/255", step_size="2/255", steps=STEPS, bn_mode="eval", start="normal"),
        awp=AdversarialWeightPerturbation(ours, GAMMA),
        options=AwpConfig(gamma=GAMMA),
    )
    beta, zeros = None if method == "score" else BETA, []

    def loss(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, _: float) -> Tensor:
        adv = model(x_adv)
        losses = plain_loss(adv, adv if beta is None else model(x), one_hot(y), clip, beta)
        zeros.append(int((losses == 0).sum()))
        return losses.mean()

    for index in range(2):
        x, y, ids, _ = small_batch(index)
        phase = step.phase(index, True, False)
        start = phase.attack.first(x, sample_ids=ids, seed=index)
        iterates = plain_attack(method, theirs, x, y, start)
        for count in range(1, STEPS + 1):
            found = step.passes.attack_whole(
                dataclasses.replace(phase.attack, steps=count), ours, small_batch(index), start
            )
            torch.testing.assert_close(found, iterates[count], rtol=0, atol=1e-12)
        before = int(ours.get_buffer("1.num_batches_tracked"))
        plain_methods.awp_step(
            theirs, momentum, iterates[-1], x, y, kind=loss, beta=0, gamma=GAMMA, lr=0.1, mu=0.9, weight_decay=5e-4
        )
        assert not step.taken(small_batch(index), phase).skipped
        assert int(ours.get_buffer("1.num_batches_tracked")) == before + (1 if beta is None else 2)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    # some are clipped where there is a bound, and not all
    assert (0 < max(zeros) < 7) == (clip > 0)


@settings(max_examples=40)
@given(
    n=st.integers(1, 5),
    classes=st.integers(2, 6),
    seed=st.integers(0, 999),
    clip=st.floats(0, 0.9),
    smoothing=st.sampled_from([0.0, 0.1]),
    mixed=st.booleans(),
    method=st.sampled_from(METHODS),
)
def test_losses_and_gradients_are_those_of_the_definition(n, classes, seed, clip, smoothing, mixed, method):
    generator = torch.Generator().manual_seed(seed)
    drawn = 2 * torch.randn(2, n, classes, generator=generator, dtype=torch.float64)
    pairs = [(drawn[0].clone().requires_grad_(), drawn[1].clone().requires_grad_()) for _ in range(2)]
    y = torch.randint(0, classes, (n,), generator=generator)
    hot = torch.tensor(one_hot(y, classes), dtype=torch.float64)
    labels = 0.7 * hot + 0.3 * hot.roll(1, 1) if mixed else y
    target = ((1 - smoothing) * (labels if mixed else hot) + smoothing / classes).tolist()
    objective = build_objective(method, beta=BETA, label_smoothing=smoothing, arguments={"clip": clip})
    (adv, clean), theirs = pairs
    losses, logits = objective.losses(nn.Identity(), adv, clean, labels)
    expected = plain_loss(*theirs, target, clip, None if method == "score" else BETA)
    assert logits is adv
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
    losses.sum().backward()
    expected.sum().backward()
    for found, wanted in zip((adv, clean), theirs, strict=True):
        none = torch.zeros_like(drawn[0])
        torch.testing.assert_close(
            none if found.grad is None else found.grad,
            none if wanted.grad is None else wanted.grad,
            rtol=1e-9,
            atol=1e-9,
        )
    assert objective.losses(nn.Identity(), adv.half(), clean.half(), y)[0].dtype == torch.float32


def test_the_bound_is_the_loss_of_an_answer_that_is_sure_enough():
    for right, nothing in ((0.599, False), (0.601, True)):
        wrong = (1 - right) / 4
        logits = torch.tensor([[right, wrong, wrong, wrong, wrong]], dtype=torch.float64).log()
        objective = build_objective("score", arguments={"clip": 0.4})
        (loss,), _ = objective.losses(nn.Identity(), logits, logits, torch.tensor([0]))
        assert (loss == 0) == nothing


@pytest.mark.parametrize("clip", [1, -0.1, True, "a", float("nan")])
def test_another_bound_is_refused(clip):
    with pytest.raises(ConfigError, match="--method-args: clip: expected a number >= 0 and < 1, got"):
        build_objective("score", arguments={"clip": clip})


@pytest.mark.parametrize("method", METHODS)
def test_auto_pgd_climbs_another_loss(method):
    with pytest.raises(ConfigError, match=r"--attack\.kind: expected pgd"):
        Config(method=method, attack=AttackConfig(kind="apgd"))

"""LIET against plain PyTorch in fp64, written from its public code."""

import dataclasses
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_steps import HostReads, small_batch, small_model
from steps import TensorStep, make_step
from torch import Tensor, nn

from awp_engine.attack import starting_point
from awp_engine.config import AttackConfig, AwpConfig, Config, ConfigError, DataConfig, OptimizerConfig
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import Liet, Objective, build_objective
from awp_engine.step.objectives.liet import jensen_shannon
from awp_engine.train import setup
from awp_kernels import AdversarialWeightPerturbation
from awp_kernels.philox import mix_seed, uniform_integers

EPSILON, BETA, SMOOTHING, GAMMA, EPOCHS, CLASSES = 8 / 255, 100.0, 0.6, 0.005, 4, 5
CPU = torch.device("cpu")


def objective(smoothing: float = SMOOTHING, every: int = 2) -> Liet:
    return Liet(BETA, CLASSES, (1, 4, 4), EPOCHS, CPU, smoothing, every)


def build_step(model: nn.Module, made: Objective, bn_mode: Literal["train", "eval"] = "train", **given) -> TensorStep:
    attack = AttackConfig(epsilon="8/255", step_size="8/255", steps=1, bn_mode=bn_mode)
    awp = AdversarialWeightPerturbation(model, GAMMA)
    options = {"awp": awp, "options": AwpConfig(gamma=GAMMA)} | given
    return make_step(model, objective=made, optimizer=build_optimizer(model, SGD), attack=attack, **options)


SGD = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-4)


def smoothed(y: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Image by image: the label has 1 - s, and what is left is divided by random numbers."""
    drawn = (uniform_integers(ids, CLASSES, seed=seed).double() / 2**24 + 1) / 2
    rows = []
    for numbers, right in zip(drawn.tolist(), y.tolist(), strict=True):
        whole = sum(number for c, number in enumerate(numbers) if c != right)
        rows.append([1 - SMOOTHING if c == right else SMOOTHING * number / whole for c, number in enumerate(numbers)])
    return torch.tensor(rows, dtype=torch.float64)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * logits.log_softmax(1)).sum(1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """JS of probabilities."""
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2


def plain_table(model: nn.Module, seed: int) -> Tensor:
    classes = torch.arange(CLASSES)
    u = torch.full((CLASSES, 1, 4, 4), 0.5, dtype=torch.float64, requires_grad=True)
    model.eval()
    (g,) = torch.autograd.grad(soft_cross_entropy(model(u), smoothed(classes, classes, seed)).sum(), u)
    model.train()
    return EPSILON * g.sign()


def plain_start(x: Tensor, y: Tensor, ids: Tensor, table: Tensor, seed: int, step: int) -> Tensor:
    bits = mix_seed(seed, step, 1)
    sign, part = (-1 if bits % 2 else 1), 0.1 + 0.4 * (bits // 2) / 2**62
    noise = starting_point(x, "uniform", epsilon=EPSILON, norm="linf", sample_ids=ids, seed=seed)
    half = torch.full_like(x, 0.5)
    drawn = starting_point(half, "uniform", epsilon=0.5, norm="linf", sample_ids=ids, seed=mix_seed(seed, 2))
    return torch.where(drawn < part, noise, (x + sign * table[y]).clamp(0, 1))


def untouched(model: nn.Module, x: Tensor) -> Tensor:
    """Logits by the batch's statistics, which leave the running ones as they are."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits = model(x)
    for name, buffer in model.named_buffers():
        buffer.data = before[name]
    return logits


def test_steps_are_those_of_the_definition():
    """Table, start, x', losses, weights and statistics, with AWP, over two epochs: a table serves two steps."""
    ours, theirs, momentum, made = small_model(CLASSES), small_model(CLASSES), {}, objective()
    step, table = build_step(ours, made), torch.zeros(CLASSES, 1, 4, 4, dtype=torch.float64)
    signs = set()
    for epoch, number in ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1)):
        whole = small_batch(10 * epoch + number, classes=CLASSES)
        x, y, ids, _ = whole
        phase = dataclasses.replace(step.phase(epoch, True, False), epoch=epoch, step=number)
        if number % 2 == 0:
            table = plain_table(theirs, mix_seed(epoch, number, 4))
        start = plain_start(x, y, ids, table, epoch, number)
        signs.add(mix_seed(epoch, number, 1) % 2)
        target = smoothed(y, ids, mix_seed(epoch, 3))
        x0 = start.clone().requires_grad_()
        (g,) = torch.autograd.grad(soft_cross_entropy(untouched(theirs, x0), target).sum(), x0)
        x_adv = (x0.detach() + EPSILON * g.sign()).clamp(x - EPSILON, x + EPSILON).clamp(0, 1)

        begun = step.step.prepare(whole, phase)
        torch.testing.assert_close(made.table.double() * EPSILON, table, rtol=0, atol=1e-8)
        torch.testing.assert_close(begun, start, rtol=0, atol=1e-12)
        found, *_ = step.passes.attack(phase.attack, whole, step.passes.share(len(x), len(x)), begun)
        torch.testing.assert_close(found, x_adv, rtol=0, atol=1e-12)

        def loss(model: nn.Module, x0: Tensor, x_adv: Tensor, target: Tensor, weight: float) -> Tensor:
            p, logits = model(x0).softmax(1), model(x_adv)
            return (soft_cross_entropy(logits, target) + weight * divergence(p, logits.softmax(1))).mean()

        arguments, weight = (start, x_adv, target), BETA * epoch / EPOCHS
        weights = {name: p.detach().clone() for name, p in theirs.named_parameters()}
        before = {name: buffer.clone() for name, buffer in theirs.named_buffers()}
        loss(theirs, *arguments, weight).backward()
        with torch.no_grad():
            for name, buffer in theirs.named_buffers():
                buffer.copy_(before[name])
            for name, p in theirs.named_parameters():
                assert p.grad is not None
                if p.ndim > 1:
                    p.add_(GAMMA * weights[name].norm() / (p.grad.norm() + 1e-20) * p.grad)
        theirs.zero_grad()
        value = loss(theirs, *arguments, weight)
        value.backward()
        # once for where the attack began, once for where it ended
        assert theirs.get_buffer("1.num_batches_tracked") == before["1.num_batches_tracked"] + 2
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                assert p.grad is not None
                gradient = p.grad + 5e-4 * weights[name]
                momentum[name] = 0.9 * momentum[name] + gradient if name in momentum else gradient
                p.copy_(weights[name] - 0.1 * momentum[name])
        theirs.zero_grad()
        result = step.taken(whole, phase)
        torch.testing.assert_close(result.loss, value.detach(), rtol=1e-9, atol=0)
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=name)
    assert signs == {0, 1}


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 6), st.floats(0, 300))
def test_the_divergence_of_answers(seed, n, classes, scale):
    """Values and both gradients; none is NaN, however sure the answers are."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (scale * torch.randn(n, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    p.requires_grad_()
    q.requires_grad_()
    found = jensen_shannon(p, q)
    gradients = torch.autograd.grad(found.sum(), (p, q))
    assert all(gradient.isfinite().all() for gradient in gradients)
    if scale <= 20:
        expected = divergence(p.softmax(1), q.softmax(1))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        for a, b in zip(gradients, torch.autograd.grad(expected.sum(), (p, q)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_pieces_of_a_batch_add_up():
    """With frozen statistics; each image keeps its own random numbers."""
    found = []
    for size in (None, 3):
        model = small_model(CLASSES).eval()
        step = build_step(model, objective(), "eval", micro_batch_size=size)
        step.taken(small_batch(1, classes=CLASSES), dataclasses.replace(step.phase(1, True, False), epoch=2))
        found.append(model)
    for whole, pieces in zip(*(model.state_dict().values() for model in found), strict=True):
        torch.testing.assert_close(whole, pieces, rtol=1e-9, atol=1e-12)


def test_what_a_captured_step_reads_is_written_in_place():
    """A step of its own inputs, seed and weight: the host reads no more than in AT."""
    counts = []
    for made in (objective(), build_objective("at")):
        step = build_step(small_model(CLASSES), made)
        phase = dataclasses.replace(step.phase(1, True, False), epoch=3)
        start = step.step.prepare(small_batch(1, classes=CLASSES), phase)
        with HostReads() as found:
            step.step(small_batch(1, classes=CLASSES), phase, start)
        counts.append(found.reads)
    assert 0 < counts[0] <= counts[1]


def test_a_table_without_gradients_leaves_noise_alone():
    """As one of weights that are not finite; the step is left out, and says so."""
    model, made = small_model(CLASSES), objective()
    step = build_step(model, made)
    with torch.no_grad():
        model.get_parameter("4.bias")[0] = torch.nan
    assert step.taken(small_batch(1, classes=CLASSES), step.phase(1, True, False)).skipped
    assert not made.table.any()


def test_a_step_copies_no_table():
    """Nothing after its start writes it: a table of a thousand classes would be copied in every step."""
    made = objective()
    kept = build_step(small_model(CLASSES), made).step.kept()
    made.table.fill_(1)
    kept.restore_()
    assert made.table.all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": AttackConfig(kind="apgd")}, r"--attack\.kind: expected pgd with --method liet"),
        ({"attack": AttackConfig(norm="l2")}, r"--attack\.norm: expected linf with --method liet"),
        ({"attack": AttackConfig(start="none")}, r"--attack\.start: expected uniform with --method liet"),
        ({"attack": AttackConfig(fast="n-fgsm")}, r"--attack\.fast: expected none with --method liet"),
        ({"data": DataConfig(cutmix=0.5)}, r"--data\.cutmix: expected 0 with --method liet"),
        ({"method_args": ("every=0",)}, "--method-args: every: expected a whole number >= 1, got 0"),
        ({"method_args": ("every=true",)}, "--method-args: every: expected a whole number >= 1, got"),
        ({"method_args": ("epochs=3",)}, "--method-args: expected no epochs, which is given by itself"),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_one_line(changes, message):
    with pytest.raises(ConfigError, match=message) as told:
        setup.objective_of(Config(**{"method": "liet"} | changes), CPU, CLASSES, (1, 4, 4))
    assert "\n" not in str(told.value)

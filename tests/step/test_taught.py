"""ARD, RSLAD, AdaAD and HAT against plain PyTorch in fp64, written from their papers and public code."""

import copy
import dataclasses
from typing import Any

import plain_methods
import pytest
import torch
from samples import images
from small_steps import HostReads, small_batch, sure_model
from steps import TensorStep, as_teacher, make_step
from torch import Tensor, nn

from awp_engine.config import AttackConfig, AwpConfig, ConfigError, OptimizerConfig
from awp_engine.models import build_model
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import build_objective
from awp_engine.step.precision import Precision, WorkingModels
from awp_kernels import AdversarialWeightPerturbation

EPSILON, STEP_SIZE, STEPS, BETA, GAMMA = 8 / 255, 2 / 255, 3, 0.4, 0.01
ARGUMENTS = {
    "ard": {"alpha": 0.7, "temperature": 5.0},
    "rslad": {"alpha": 0.8},
    "adaad": {"alpha": 0.6},
    "hat": {"gamma": 0.5, "extension": 2.0},
}
METHODS = list(ARGUMENTS)


def build_step(model: nn.Module, method: str, teacher: WorkingModels, bn_mode: Any = "eval", **given) -> TensorStep:
    objective = build_objective(method, beta=BETA, arguments=ARGUMENTS.get(method))
    objective.teacher = teacher
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1))
    attack = AttackConfig(epsilon="8/255", step_size="2/255", steps=STEPS, bn_mode=bn_mode, start="normal")
    awp = AdversarialWeightPerturbation(model, GAMMA)
    options = {"awp": awp, "options": AwpConfig(gamma=GAMMA)} | given
    return make_step(model, objective=objective, optimizer=optimizer, attack=attack, **options)


def plain_loss(method: str, model: nn.Module, teacher: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Every formula of the papers; models as they are."""
    kl, cross_entropy, given = plain_methods.kl, plain_methods.cross_entropy, ARGUMENTS[method]
    adv, clean = model(x_adv), model(x)
    if method == "ard":
        t = given["temperature"]
        pulled = t**2 * kl(adv / t, teacher(x).detach() / t).mean()
        return given["alpha"] * BETA * pulled + (1 - given["alpha"]) * cross_entropy(clean, y).mean()
    if method == "hat":
        beyond = model(x + 2.0 * (x_adv - x))
        said = torch.tensor([int(row.argmax()) for row in teacher(x_adv)])
        trades = cross_entropy(clean, y).mean() + BETA * kl(adv, clean).mean()
        return trades + 0.5 * cross_entropy(beyond, said).mean()
    told = teacher(x_adv if method == "adaad" else x).detach()
    alpha = given["alpha"]
    return BETA * (alpha * kl(adv, told).mean() + (1 - alpha) * kl(clean, teacher(x).detach()).mean())


def plain_attack(method: str, model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, start: Tensor):
    model, iterates = copy.deepcopy(model).eval(), [start]
    for _ in range(STEPS):
        x_adv = iterates[-1].detach().requires_grad_()
        logits = model(x_adv)
        if method == "ard":
            climbed = plain_methods.cross_entropy(logits, y)
        elif method == "adaad":
            # through both
            climbed = plain_methods.kl(logits, teacher(x_adv))
        else:
            climbed = plain_methods.kl(logits, (teacher if method == "rslad" else model)(x).detach())
        (g,) = torch.autograd.grad(climbed.sum(), x_adv)
        moved = x_adv.detach() + STEP_SIZE * g.sign()
        iterates.append(torch.min(torch.max(moved, x - EPSILON), x + EPSILON).clamp(0, 1))
    return iterates


@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_the_definition(method):
    """Iterates, losses, weights, what moves the running statistics; the teacher stays as it is."""
    ours, theirs, momentum = sure_model(), sure_model(), {}
    teacher, plain = sure_model(1), sure_model(1).eval()
    step, losses = build_step(ours, method, as_teacher(teacher)), []

    def loss(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, _: float) -> Tensor:
        losses.append(plain_loss(method, model, plain, x_adv, x, y))
        return losses[-1]

    for index in range(3):
        x, y, ids, _ = small_batch(index)
        phase = step.phase(index, True, False)
        start = phase.attack.first(x, sample_ids=ids, seed=index)
        iterates = plain_attack(method, theirs, plain, x, y, start)
        for count in range(1, STEPS + 1):
            attack = dataclasses.replace(phase.attack, steps=count)
            found, *_ = step.passes.attack(attack, small_batch(index), step.passes.share(len(x), len(x)), start)
            torch.testing.assert_close(found, iterates[count], rtol=0, atol=1e-12)
        before = int(ours.get_buffer("1.num_batches_tracked"))
        plain_methods.awp_step(
            theirs, momentum, iterates[-1], x, y, kind=loss, beta=0, gamma=GAMMA, lr=0.1, mu=0.9, weight_decay=5e-4
        )
        result = step.taken(small_batch(index), phase)
        torch.testing.assert_close(result.loss, losses[-1].detach(), rtol=1e-9, atol=0)
        # in the descent alone, once for each of its passes
        assert int(ours.get_buffer("1.num_batches_tracked")) == before + (3 if method == "hat" else 2)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert_untouched(teacher, plain)


def assert_untouched(teacher: nn.Module, before: nn.Module) -> None:
    for a, b in zip(teacher.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module.training for module in teacher.modules())


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_answers_in_eval_mode_where_the_attack_is_in_train_mode(method):
    """Also in a step that is left out."""
    teacher, asked = sure_model(1), []
    layer = teacher.get_submodule("1")
    layer.register_forward_hook(lambda module, inputs, output: asked.append((module.training, inputs[0].requires_grad)))
    before = copy.deepcopy(teacher)
    step = build_step(sure_model(), method, as_teacher(teacher), bn_mode="train")
    x, y, ids, _ = small_batch(1)
    assert not step(x, y, sample_ids=ids).skipped
    # AdaAD's attack alone goes through it
    assert [training for training, _ in asked] == [False] * len(asked)
    assert sum(grad for _, grad in asked) == (STEPS if method == "adaad" else 0)
    step(x * torch.nan, y, sample_ids=ids)
    assert_untouched(teacher, before)


@pytest.mark.parametrize("method", METHODS)
def test_pieces_of_a_batch_add_up(method):
    """With frozen statistics a batch in pieces is trained on like a whole one, by the shared ascent as well."""
    for ascent in ("exact", "shared"):
        found = []
        for size in (None, 3):
            model = sure_model().eval()
            options = AwpConfig(gamma=GAMMA, ascent=ascent)
            step = build_step(model, method, as_teacher(sure_model(1)), micro_batch_size=size, options=options)
            x, y, ids, _ = small_batch(1)
            step(x, y, sample_ids=ids)
            found.append(model.state_dict().values())
        for whole, pieces in zip(*found, strict=True):
            torch.testing.assert_close(whole, pieces, rtol=1e-9, atol=1e-12)


def test_steps_can_be_captured():
    """The host reads no more than in TRADES, whose reads are checks that a GPU makes by itself."""
    counts = {}
    for method in ("trades", *METHODS):
        step = build_step(sure_model(), method, as_teacher(sure_model(1)))
        phase = step.phase(1, True, False)
        start = step.step.prepare(small_batch(1), phase)
        with HostReads() as found:
            step.step(small_batch(1), phase, start)
        counts[method] = found.reads
    # ARD's attack is that of AT, whose checks are more
    assert 0 < max(counts.values()) <= max(counts["trades"], counts["ard"]), counts


@pytest.mark.parametrize("method", METHODS)
def test_each_part_asks_the_teacher_in_its_precision(method):
    """16-bit copies of it, whose answers are near those of its own weights, which stay fp32."""
    torch.manual_seed(0)
    model, teacher = (build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4) for _ in range(2))
    before = copy.deepcopy(teacher)
    precision = Precision(attack=torch.bfloat16, descent=torch.bfloat16)
    asked: dict[torch.dtype, int] = {}
    teacher.eval().requires_grad_(False).get_submodule("conv1").register_forward_hook(
        lambda module, *_: asked.update({module.weight.dtype: asked.get(module.weight.dtype, 0) + 1})
    )
    step = build_step(model.train(), method, WorkingModels(teacher, precision), awp=None)
    x = images((6, 1, 8, 8), seed=0)
    assert not step(x, torch.arange(6), sample_ids=torch.arange(6), perturb=False).skipped
    counts = {"ard": 1, "rslad": 1, "adaad": 2 + STEPS, "hat": 1}
    assert asked == {torch.bfloat16: counts[method]}
    assert_untouched(teacher, before.eval())


def test_beyond_the_attacked_image_nothing_is_clipped():
    """HAT: the image at twice the distance lies outside of [0, 1] where the attacked one is at its edge."""
    seen = []

    class Seeing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.flatten(1)[:, :4]

    objective = build_objective("hat", arguments={"extension": 2.0})
    objective.teacher = as_teacher(nn.Flatten())
    x, x_adv = torch.full((1, 1, 2, 2), 0.99), torch.ones(1, 1, 2, 2)
    objective.losses(Seeing(), x_adv, x, torch.tensor([0]))
    torch.testing.assert_close(seen[-1], torch.full_like(x, 1.01))


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("ard", {"alpha": 1.5}, "--method-args: alpha: expected a number from 0 to 1, got 1.5"),
        ("ard", {"temperature": 0}, "--method-args: temperature: expected a number from 0.01 to 1e\\+06, got 0"),
        ("rslad", {"alpha": True}, "--method-args: alpha: expected a number from 0 to 1, got True"),
        ("adaad", {"alpha": float("nan")}, "--method-args: alpha: expected a number from 0 to 1, got nan"),
        ("hat", {"gamma": -1}, "--method-args: gamma: expected a number from 0"),
        ("hat", {"extension": "far"}, "--method-args: extension: expected a number from 1"),
    ],
)
def test_other_arguments_are_refused_in_one_line(method, arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_objective(method, arguments=arguments)

"""IKL and GKL against their definitions with all pairs of classes, in fp64."""

import dataclasses
import math

import plain_dkl
import plain_methods
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import images
from torch import Tensor, nn

from awp_engine.attack import Attack, starting_point
from awp_engine.config import AttackConfig, AwpConfig, Config, ConfigError, DataConfig, OptimizerConfig
from awp_engine.data import Batch
from awp_engine.distributed.ranks import Ranks
from awp_engine.models import build_model
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.awp_step import AwpStep
from awp_engine.step.objectives.decoupled_kl import (
    GeneralizedKL,
    ImprovedKL,
    soft_cross_entropy,
    weighted_squared_error,
)
from awp_engine.step.precision import WorkingModels
from awp_engine.step.rise import guessing_loss
from awp_engine.step.values import Phase
from awp_engine.train import setup
from awp_kernels import AdversarialWeightPerturbation

ALPHA, BETA, TEMPERATURE, GAMMA = 3.0, 20.0, 4.0, 0.4
CPU = torch.device("cpu")


def logits(n: int, classes: int, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, classes, generator=generator, dtype=torch.float64)).requires_grad_()


def some_means(classes: int, seed: int = 9) -> Tensor:
    return logits(classes, classes, seed).detach().softmax(1)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-9 * expected.norm().clamp_min(1e-9))


@given(
    st.integers(1, 5), st.integers(2, 7), st.integers(0, 999), st.sampled_from([0.0, 0.4, 1.0]), st.floats(0.01, 1e3)
)
def test_the_squared_error_is_that_over_all_pairs(n, classes, seed, gamma, scale):
    """Value, and gradients in both arguments; what all logits have in common counts nothing."""
    means, y = some_means(classes), torch.arange(n) % classes
    clean, adv = logits(n, classes, seed, scale), logits(n, classes, seed + 1, scale)
    expected = plain_dkl.squared(clean, adv, plain_dkl.pair_weights(means, y, gamma))
    found = weighted_squared_error(clean, adv, means[y] ** gamma)
    assert found.shape == (n,)
    assert close(found, expected)
    pairs = [torch.autograd.grad(loss.sum(), (clean, adv)) for loss in (found, expected)]
    assert all(close(a, b) for a, b in zip(*pairs, strict=True))
    assert close(pairs[0][0], -pairs[0][1])
    moved = weighted_squared_error(clean + 7, adv, means[y] ** gamma)
    torch.testing.assert_close(moved, found, rtol=1e-9, atol=1e-9)


def test_the_soft_cross_entropy_holds_the_clean_answers_still():
    clean, adv = logits(4, 5, 1), logits(4, 5, 2)
    found, expected = soft_cross_entropy(clean, adv), plain_dkl.soft(clean, adv)
    assert close(found, expected)
    (gradient,) = torch.autograd.grad(expected.sum(), adv)
    found.sum().backward()
    assert clean.grad is None
    assert close(adv.grad, gradient)


class Told(nn.Module):
    """Gives the logits that it is called with."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def objective(kind: str, classes: int, **changes) -> ImprovedKL:
    given = {"alpha": ALPHA, "temperature": TEMPERATURE} | changes
    if kind == "ikl":
        return ImprovedKL(BETA, classes, CPU, **given)
    return GeneralizedKL(BETA, classes, CPU, **{"gamma": GAMMA} | given)


def whole(y: Tensor) -> Batch:
    return Batch(torch.zeros(len(y), 1, 1, 1), y, torch.arange(len(y)), len(y))


def defined(kind: str, clean: Tensor, adv: Tensor, y: Tensor, means: Tensor) -> Tensor:
    if kind == "ikl":
        return plain_dkl.ikl_loss(clean, adv, y, means, alpha=ALPHA, beta=BETA)
    return plain_dkl.gkl_loss(clean, adv, y, means, alpha=ALPHA, beta=BETA, gamma=GAMMA)


def defined_by_view(kind: str, clean: Tensor, adv: Tensor, y: Tensor, means: Tensor, weight: float | None) -> Tensor:
    """Of one view, or of two, whose logits stand one below the other."""
    if weight is None:
        return defined(kind, clean, adv, y, means)
    return plain_dkl.of_two_views(lambda n, a, y: defined(kind, n, a, y, means), clean, adv, y, weight)


def below(x: Tensor, views: int) -> Tensor:
    """Views that stand side by side, one below the other."""
    return torch.cat(x.chunk(views, 1))


@pytest.mark.parametrize("pieces", [[slice(0, 11)], [slice(0, 5), slice(5, 11)]], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("weight", [None, 0.3, 0.0])
@pytest.mark.parametrize("kind", ["ikl", "gkl"])
def test_losses_agree_with_the_formulas(kind, weight, pieces):
    """Of whole batches, and of micro-batches: GKL's divisor is over the batch still. Of one view, and of two."""
    made, means = objective(kind, 6, aug_weight=weight), some_means(6)
    views = 1 if weight is None else 2
    assert made.views == views
    made.means.copy_(means)
    y, (clean, adv) = torch.arange(11) % 4, (logits(11, 6 * views, seed) for seed in (1, 2))
    made.begin_batch(whole(y), 1.0, Ranks())
    told = [made.losses(Told(), adv[rows], clean[rows], y[rows]) for rows in pieces]
    found = torch.cat([losses for losses, _ in told]).mean()
    assert torch.equal(torch.cat([logits for _, logits in told]), adv[:, :6])
    expected = defined_by_view(kind, below(clean, views), below(adv, views), y, means, weight)
    assert close(found, expected)
    pairs = [torch.autograd.grad(loss, (clean, adv)) for loss in (found, expected)]
    assert all(close(a, b) for a, b in zip(*pairs, strict=True))


def test_gkl_at_the_power_1_is_ikl():
    y, (clean, adv) = torch.arange(11) % 4, (logits(11, 6, seed) for seed in (1, 2))
    found = []
    for made in (objective("ikl", 6), objective("gkl", 6, gamma=1.0)):
        made.means.copy_(some_means(6))
        made.begin_batch(whole(y), 1.0, Ranks())
        found.append(made.losses(Told(), adv, clean, y)[0])
    assert close(*found)


def epoch_of(made: ImprovedKL, clean: Tensor, y: Tensor, begin: int) -> None:
    """Steps on batches of 4; a second view is answered otherwise."""
    clean = torch.cat([clean, *[2 * clean.roll(1, 1)] * (made.views - 1)], 1)
    for step, first in enumerate(range(0, len(y), 4)):
        rows = slice(first, first + 4)
        made.begin_step(0.0, begin, step)
        made.begin_batch(whole(y[rows]), 1.0, Ranks())
        made.descending = True
        made.losses(Told(), clean[rows] + 1, clean[rows], y[rows])
        made.descending = False
        # the ascent, and passes that compute statistics anew
        made.losses(Told(), clean[rows], -clean[rows], y[rows])
        made.after_step(Ranks())


@pytest.mark.parametrize("weight", [None, 0.5])
def test_weights_are_the_classes_mean_answers_of_the_epoch_before(weight):
    """1/C in the first epoch; a class without an image keeps those that it had. A second view counts nothing."""
    made, plain = objective("ikl", 5, aug_weight=weight), plain_dkl.ClassMeans(5, TEMPERATURE)
    for epoch, present in enumerate((5, 5, 3, 5), 1):
        clean, y = logits(10, 5, epoch).detach(), torch.arange(10) % present
        before = made.means.clone()
        epoch_of(made, clean, y, epoch)
        assert close(made.means, plain.means)
        assert torch.equal(made.means, before) == (epoch == 1)
        plain.add(clean, y)
        plain.end_epoch()
        if epoch == 4:
            # the third epoch had no image of the last two classes
            assert torch.equal(made.means[3:], before[3:])
            assert not torch.equal(made.means[:3], before[:3])


@pytest.mark.parametrize("kind", ["ikl", "gkl"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("aug_weight", -0.1),
        ("alpha", -1.0),
        ("temperature", 0),
        ("temperature", "warm"),
        ("attack_beta", float("inf")),
        ("alpha", True),
    ],
)
def test_values_that_mean_nothing_are_refused(kind, name, value):
    with pytest.raises(ConfigError, match=rf"--method-args: {name}: expected a number >=? 0, got"):
        objective(kind, 3, **{name: value})


def test_an_epoch_that_begins_again_begins_alike():
    """A run that is stopped before an epoch's first step does so twice."""
    made = objective("ikl", 5)
    epoch_of(made, logits(8, 5, 1).detach(), torch.arange(8) % 4, 1)
    made.begin_step(0.5, 2, 0)
    once = made.means.clone()
    made.begin_step(0.5, 2, 0)
    assert torch.equal(made.means, once)
    assert not made.sums.any()


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).double().train()


def digits(seed: int, views: int = 1) -> Batch:
    x, y = images((8, views, 8, 8), torch.float64, seed=seed), torch.arange(8) * (1 + seed) % 7
    return Batch(x, y, torch.arange(8) + 100 * seed, 8)


ATTACK = Attack(epsilon=8 / 255, step_size=4 / 255, steps=3, start="normal", bn_mode="eval")
SGD = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-4)


@pytest.mark.parametrize("kind", ["ikl", "gkl"])
@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.parametrize("attack_beta", [0.0, 1.0])
def test_whole_steps_agree(kind, weight, attack_beta):
    """Attack, ascent, descent and update over two epochs; weights, BN statistics, the classes' mean answers.

    Two views are in one pass, attacked ones and clean ones, so that two passes a step move the statistics. How far the
    loss rises is told of both.
    """
    ours, theirs, momentum, views = network(), network(), {}, 1 if weight is None else 2
    made = objective(kind, 10, attack_beta=attack_beta, aug_weight=weight)
    plain = plain_dkl.ClassMeans(10, TEMPERATURE)
    step = AwpStep(
        models=WorkingModels(ours),
        optimizer=build_optimizer(ours, SGD),
        objective=made,
        awp=AdversarialWeightPerturbation(ours, 0.01),
    )
    clean, lost = [], []

    def loss(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, beta: float) -> Tensor:
        adv, natural = model(x_adv), model(x)
        # of the first view
        clean.append(natural[: len(y)].detach())
        lost.append(defined_by_view(kind, natural, adv, y, plain.means, weight))
        return lost[-1]

    for epoch, number in ((1, 0), (1, 1), (2, 0)):
        batch = digits(2 * epoch + number, views)
        x, y, ids, _ = batch
        if epoch == 2:
            plain.end_epoch()
        start = starting_point(x, "normal", epsilon=1.0, norm="linf", sample_ids=ids, seed=epoch)
        given = {"attack_beta": attack_beta, "epsilon": 8 / 255, "step_size": 4 / 255, "steps": 3}
        labels = torch.cat([y] * views)
        iterates = plain_dkl.iterates(theirs, below(x, views), labels, below(start, views), plain.means, **given)
        step.passes.prepare(Phase(attack=ATTACK, epoch=epoch, step=number))
        for steps, expected in enumerate(iterates, 1):
            attack = dataclasses.replace(ATTACK, steps=steps)
            found = below(step.passes.attack_whole(attack, step.models.attack, batch, start), views)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        plain_methods.awp_step(
            theirs,
            momentum,
            iterates[-1],
            below(x, views),
            y,
            kind=loss,
            beta=BETA,
            gamma=0.01,
            lr=0.1,
            mu=0.9,
            weight_decay=5e-4,
        )
        # those of the descent, at the perturbed weights
        plain.add(clean[-1], y)
        result = step(batch, Phase(attack=ATTACK, seed=epoch, epoch=epoch, step=number))
        assert not result.skipped
        at_w, at_moved = (value.detach() for value in lost[-2:])
        assert close(result.loss, at_moved)
        assert close(result.rise, at_moved - at_w)
        guess = math.log(10) * (1 + ALPHA * (1 + (weight or 0)))
        assert close(result.room, guess - at_w)
        assert guessing_loss(made, digits(0), 10, Ranks()) == pytest.approx(guess)
        for found, expected in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert close(found.double(), expected.double())
    assert close(made.means, plain.means)
    assert not close(made.means, torch.full_like(plain.means, 0.1))


def test_a_step_that_is_left_out_leaves_the_sums_alone():
    model, made = network(), objective("ikl", 10)
    step = AwpStep(models=WorkingModels(model), optimizer=build_optimizer(model, SGD), objective=made)
    batch = digits(1)
    step(batch, Phase(attack=ATTACK, epoch=1, step=0))
    before = {name: tensor.clone() for name, tensor in made.state().items()}
    broken = batch._replace(images=torch.full_like(batch.images, torch.nan))
    assert step(broken, Phase(attack=ATTACK, epoch=1, step=1)).skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state().items())
    step(batch, Phase(attack=ATTACK, epoch=1, step=2))
    assert made.sums[:, -1].sum() == 16


def test_what_moves_statistics_is_the_descent_alone():
    """The clean pass of the attack, its steps and the ascent leave them; two passes of the descent move them."""
    model, made, calls = network(), objective("gkl", 10), []
    # before the copies that parts of the step run on are made
    model.register_forward_hook(lambda module, inputs, output: calls.append(1))
    awp = AdversarialWeightPerturbation(model, 0.01)
    step = AwpStep(models=WorkingModels(model), optimizer=build_optimizer(model, SGD), objective=made, awp=awp)
    before = model.bn.num_batches_tracked.clone()
    step(digits(1), Phase(attack=ATTACK, epoch=1, step=0))
    assert len(calls) == 3 + 1 + 2 + 2
    assert model.bn.num_batches_tracked == before + 2


@pytest.mark.parametrize("method", ["ikl", "gkl"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label_smoothing": 0.1}, "--label-smoothing: expected 0"),
        ({"data": DataConfig(cutmix=0.5)}, r"--data\.cutmix: expected 0"),
        ({"data": DataConfig(mixup=0.5)}, r"--data\.mixup: expected 0"),
        ({"attack": AttackConfig(kind="apgd")}, r"--attack\.kind: expected pgd"),
        ({"attack": AttackConfig(fast="n-fgsm")}, r"--attack\.fast: expected none"),
        ({"attack": AttackConfig(kind="none")}, "--method: expected at"),
    ],
)
def test_settings_that_do_not_go_with_them_are_refused(method, wrong, message):
    with pytest.raises(ConfigError, match=message):
        Config(method=method, **wrong)


@pytest.mark.parametrize("method", ["ikl", "gkl"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": DataConfig()}, r"--data\.policy: expected one of AutoAugment"),
        ({"attack": AttackConfig(norm="l2", epsilon="1/2")}, r"--attack\.norm: expected linf"),
        ({"awp": AwpConfig(ascent="shared")}, r"--awp\.ascent: expected exact"),
    ],
)
def test_settings_that_do_not_go_with_a_second_view_are_refused(method, wrong, message):
    given = {"method": method, "data": DataConfig(policy="autoaugment-cifar10", pad=1)}
    alone, both = Config(**given | wrong), Config(**given | wrong, method_args=("aug_weight=0.5",))
    assert setup.objective_of(alone, CPU, 10).views == 1
    with pytest.raises(ConfigError, match=f"^{message}.* with --method {method}, whose loss has several views of"):
        setup.objective_of(both, CPU, 10)
    assert setup.objective_of(Config(**given, method_args=("aug_weight=0.5",)), CPU, 10).views == 2

"""Auto-PGD for training: against its definition, the authors' code, and PGD."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from digits_model import digits, robust_model
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import APGDAttack
from ranks import run_ranks
from samples import images
from steps import build_step, make_step

from awp_engine.attack import apgd, cross_entropy_losses, halving_points, pgd
from awp_engine.config import AttackConfig, AwpConfig, Config, ConfigError, OptimizerConfig, PrecisionConfig
from awp_engine.distributed.ranks import Ranks
from awp_engine.models import build_model
from awp_engine.models.batch_norm import batch_norm_mode
from awp_engine.step.objectives import Trades
from awp_engine.train.cost import forward_units

X, Y, IDS = images((8, 1, 8, 8)), torch.arange(8), torch.tensor([5, 9, 0, 2, 7, 1, 3, 30])


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4)
    net.train()
    net(X)
    return net.double().eval()


def projected(z, x, epsilon, norm):
    if norm == "linf":
        return torch.minimum(torch.maximum(z, x - epsilon), x + epsilon).clamp(0, 1)
    delta = z - x
    length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + delta * (epsilon / length.clamp(min=epsilon))).clamp(0, 1)


def plain_apgd(model, x, y, epsilon, steps, norm, start):
    """One sample [1, C, H, W] by the paper's Algorithm 1, with the authors' reading of the first window."""

    def f(point):
        point = point.clone().requires_grad_()
        loss = F.cross_entropy(model(point), y)
        (gradient,) = torch.autograd.grad(loss, point)
        return loss.item(), gradient

    def uphill(point, gradient, eta):
        step = gradient.sign() if norm == "linf" else gradient / gradient.norm()
        return projected(point + eta * step, x, epsilon, norm)

    value, here = f(start)
    points, values, gradients = [start], [value], [here]
    current = previous = start
    eta, best, window, length = 2 * epsilon, 0, 0, max(int(0.22 * steps), 1)
    eta_at_check, best_at_check = None, None
    for k in range(steps):
        z = uphill(current, here, eta)
        if k:
            z = projected(current + 0.75 * (z - current) + 0.25 * (current - previous), x, epsilon, norm)
        previous, current = current, z
        value, here = f(current)
        points.append(current)
        values.append(value)
        gradients.append(here)
        best = k + 1 if value > values[best] else best
        window += 1
        if window == length:
            rises = sum(i == 0 or values[i + 1] > values[i] for i in range(k + 1 - window, k + 1))
            unchanged = (eta_at_check, best_at_check) == (eta, values[best])
            eta_at_check, best_at_check = eta, values[best]
            if rises <= 0.75 * window or unchanged:
                eta /= 2
                current, here = points[best], gradients[best]
            window, length = 0, max(length - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
    return points[best]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["none", "uniform"])
@pytest.mark.parametrize("steps", [1, 2, 3, 25])
def test_each_sample_follows_the_definition(model, norm, start, steps):
    x, epsilon = X.double(), 0.15 if norm == "linf" else 0.8
    begun = pgd(model, x, Y, epsilon=epsilon, step_size=0, steps=0, norm=norm, start=start, sample_ids=IDS, seed=3)
    found = apgd(model, x, Y, epsilon=epsilon, steps=steps, norm=norm, start=start, sample_ids=IDS, seed=3)
    for i in range(len(x)):
        part = slice(i, i + 1)
        expected = plain_apgd(model, x[part], Y[part], epsilon, steps, norm, begun[part])
        torch.testing.assert_close(found[part], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [2, 25])
def test_equals_the_authors_attack(model, norm, steps):
    x, epsilon = X.double(), 0.15 if norm == "linf" else 0.8
    theirs = APGDAttack(model, n_iter=steps, norm={"linf": "Linf", "l2": "L2"}[norm], eps=epsilon)
    theirs.init_hyperparam(x)
    torch.set_default_dtype(torch.float64)
    try:
        expected, _, losses, _ = theirs.attack_single_run(x, Y, x_init=x)
    finally:
        torch.set_default_dtype(torch.float32)
    found = apgd(model, x, Y, epsilon=epsilon, steps=steps, norm=norm)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy_losses(model(found), Y), losses)


def test_the_schedule_of_a_hundred_steps_is_the_papers():
    # p_0 = 0, p_1 = 0.22, p_{j + 1} = p_j + max(p_j - p_{j - 1} - 0.03, 0.06)
    assert halving_points(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert halving_points(2) == [1, 2]
    assert halving_points(1) == [1]


@settings(max_examples=15)
@given(st.integers(1, 8), st.sampled_from(["linf", "l2"]), st.sampled_from(["none", "uniform", "normal"]), st.data())
def test_images_stay_in_the_ball_and_channels_last(steps, norm, start, data):
    net = build_model("preact-resnet-digits", 4, (0.5,) * 3, (0.25,) * 3, width=2).eval()
    x = images((3, 3, 9, 7), seed=data.draw(st.integers(0, 5))).contiguous(memory_format=torch.channels_last)
    epsilon = data.draw(st.sampled_from([0.0, 4 / 255, 0.3]))
    found = apgd(net, x, torch.tensor([0, 1, 3]), epsilon=epsilon, steps=steps, norm=norm, start=start)
    delta = (found.double() - x.double()).flatten(1)
    if epsilon == 0:
        assert torch.equal(found, x)
    assert (delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)).max() <= epsilon
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert not found.requires_grad


def test_leaves_the_model_alone_and_works_on_mixtures(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mixture = F.one_hot(Y, 10).double() * 0.7 + 0.03
    seen = []
    arguments = {"epsilon": 0.1, "steps": 3, "bn_mode": "train"}
    x_adv = apgd(model, X.double(), mixture, observe=lambda step, g: seen.append((step, g.shape)), **arguments)
    assert seen == [(step, X.shape) for step in range(3)]
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad(), batch_norm_mode(model, "train", update_statistics=False):
        clean, end = (float(cross_entropy_losses(model(i), mixture).sum()) for i in (X.double(), x_adv))
    assert end > clean
    # the scale moves nothing
    assert torch.equal(apgd(model, X.double(), mixture, loss_scale=1024.0, **arguments), x_adv)


def test_two_steps_reach_a_higher_loss_than_two_of_pgd():
    """On 360 digits that nobody trained on: above PGD-2 of the usual step, epsilon / 2, by over four standard errors
    (9 and 20 measured); as high as PGD-2 of the step, of five, that does best on them, to 1% (0.3% below it measured).
    """
    net, test = robust_model(), digits().test
    x, y = test.images.float() / 255, test.labels
    with torch.no_grad():
        auto = cross_entropy_losses(net(apgd(net, x, y, epsilon=0.2, steps=2)), y).double()
        found = {}
        for start in ("none", "uniform"):
            for size in (0.05, 0.1, 0.15, 0.2, 0.4):
                x_adv = pgd(net, x, y, epsilon=0.2, step_size=size, steps=2, start=start)
                found[start, size] = cross_entropy_losses(net(x_adv), y).double()
    for start in ("none", "uniform"):
        difference = auto - found[start, 0.1]
        assert difference.mean() > 4 * difference.std() / math.sqrt(len(y))
    assert auto.mean() > 0.99 * max(losses.mean() for losses in found.values())


# -- in a training step

CONFIG = Config(
    attack=AttackConfig(kind="apgd", epsilon="0.1", steps=2, start="none", bn_mode="eval"),
    awp=AwpConfig(gamma=0.01),
    optimizer=OptimizerConfig(lr=0.05),
    precision=PrecisionConfig(attack="fp32", ascent="fp32", descent="fp32"),
)


def trained(config: Config, ranks: Ranks, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """What two steps leave, by frozen statistics, so that ranks and pieces make no difference."""
    torch.manual_seed(0)
    net = build_model("preact-resnet-digits", 10, (0.3,), (0.4,), width=4).to(dtype).eval()
    step = build_step(config, net, ranks)
    rows, _ = ranks.share(8)
    for number in range(2):
        result = step(X[rows].to(dtype), Y[rows], sample_ids=IDS[rows], seed=number, of=8)
        assert not result.skipped
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def on_rank(rank: int, world: int) -> dict[str, torch.Tensor]:
    return trained(CONFIG, Ranks(rank=rank, world=world))


def test_ranks_and_pieces_do_not_change_it():
    expected = trained(CONFIG, Ranks())
    others = [trained(dataclasses.replace(CONFIG, micro_batch_size=3), Ranks()), *run_ranks(on_rank, 2)]
    for found in others:
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)


def test_a_step_trains_on_the_attacked_images():
    """AT-AWP by hand: the gradient at w + v of the loss at apgd's images, one plain SGD step."""
    torch.manual_seed(0)
    net = build_model("preact-resnet-digits", 10, (0.3,), (0.4,), width=4).double().eval()
    plain = copy.deepcopy(net)
    config = dataclasses.replace(
        CONFIG, awp=AwpConfig(gamma=0), optimizer=OptimizerConfig(lr=0.05, momentum=0, weight_decay=0)
    )
    build_step(config, net)(X.double(), Y, sample_ids=IDS, seed=0)
    x_adv = apgd(plain, X.double(), Y, epsilon=0.1, steps=2)
    F.cross_entropy(plain(x_adv), Y).backward()
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p - 0.05 * p.grad, q, rtol=0, atol=1e-10)


def test_bf16_attack_reaches_the_same_loss():
    net, test = robust_model(), digits().test
    x, y = test.images[:128].float() / 255, test.labels[:128]
    losses = []
    for precision in ("fp32", "bf16"):
        config = dataclasses.replace(CONFIG, precision=dataclasses.replace(CONFIG.precision, attack=precision))
        step = build_step(config, copy.deepcopy(net).train())
        x_adv = step.attacked(step.models.attack, x, y, torch.arange(128), 0)
        with torch.no_grad():
            losses.append(float(cross_entropy_losses(net(x_adv), y).mean()))
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_fast_epochs_still_use_the_cheap_attack():
    config = dataclasses.replace(CONFIG, attack=dataclasses.replace(CONFIG.attack, fast="fgsm-rs", fast_epochs=1))
    step = build_step(config, build_model("preact-resnet-digits", 10, (0.3,), (0.4,), width=4).eval())
    for fast in (True, False):
        assert step(X, Y, sample_ids=IDS, seed=0, fast=fast).loss.isfinite()


def test_work_is_counted():
    plain = dataclasses.replace(CONFIG, attack=dataclasses.replace(CONFIG.attack, kind="pgd"))
    assert forward_units(CONFIG) == forward_units(plain) + 1


def test_what_is_refused(model):
    for method in ("trades", "rst"):
        with pytest.raises(ConfigError, match=rf"--attack\.kind: expected pgd with --method {method}"):
            Config(method=method, attack=AttackConfig(kind="apgd"))
    assert Config(method="mart", attack=AttackConfig(kind="apgd")).attack.kind == "apgd"
    with pytest.raises(ConfigError, match=r"--awp\.ascent: expected exact with --attack.kind apgd"):
        Config(attack=AttackConfig(kind="apgd"), awp=AwpConfig(ascent="shared"))
    step = build_step(CONFIG, copy.deepcopy(model))
    other = make_step(model, optimizer=step.optimizer, objective=Trades(), attack=CONFIG.attack)
    with pytest.raises(ValueError, match="apgd climbs cross-entropy, Trades another loss"):
        other(X, Y, sample_ids=IDS, seed=0)
    with pytest.raises(ValueError, match="steps: expected a whole number >= 1, got 0"):
        apgd(model, X, Y, epsilon=0.1, steps=0)

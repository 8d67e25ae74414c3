"""Attacks in L1 and in several balls, E-AT and MSD, against plain fp64 definitions written from their papers."""

import copy
import dataclasses
import itertools

import numpy as np
import plain_methods
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import images
from steps import TensorStep, make_step
from torch import Tensor, nn

from awp_engine.attack import Attack, Norm, apgd_l1, msd, project_l1, summed_cross_entropy
from awp_engine.attack.msd import changed_values, l1_step
from awp_engine.config import AttackConfig, AwpConfig, Config, ConfigError, EvaluationConfig, OptimizerConfig
from awp_engine.data import Batch, Split
from awp_engine.distributed.ranks import Ranks
from awp_engine.evaluation import evaluate, evaluation_attacks
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import ExtremeNorm, build_objective
from awp_engine.train import setup
from awp_engine.train.schedule import Schedule
from awp_kernels import AdversarialWeightPerturbation
from awp_kernels.philox import mix_seed

SHAPE, VALUES, GAMMA, SEED = (1, 5, 5), 25, 0.01, 4
L1, LINF, L2 = 1.5, 0.1, 0.4


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
    model = nn.Sequential(*layers).double().train()
    model(images((16, *SHAPE), torch.float64, seed=50))
    return model


def batch(index: int, n: int = 6) -> tuple[Tensor, Tensor]:
    y = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(index))
    return images((n, *SHAPE), torch.float64, seed=index), y


def nearest(point: np.ndarray, x: np.ndarray, epsilon: float) -> np.ndarray:
    """By the optimality conditions: lengths shrink by one multiplier, then end at the box; found by bisection."""
    change = point - x
    room = np.where(change > 0, 1 - x, x)

    def lengths(multiplier: float) -> np.ndarray:
        return np.minimum(np.maximum(np.abs(change) - multiplier, 0), room)

    low, high = 0.0, float(np.abs(change).max(initial=0))
    if lengths(0).sum() > epsilon:
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if lengths(middle).sum() > epsilon else (low, middle)
        low = high
    return x + np.sign(change) * lengths(low)


def plain_projection(points: Tensor, x: Tensor, epsilon: float) -> Tensor:
    rows = [nearest(p.flatten().numpy(), c.flatten().numpy(), epsilon) for p, c in zip(points, x, strict=True)]
    return torch.from_numpy(np.stack(rows)).view_as(x)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from([0.0, 0.01, 0.7, 3.0, 40.0]), st.floats(0.01, 5))
def test_the_projection_is_feasible_and_nearest(seed, values, epsilon, spread):
    """Also of images with many values at an end of [0, 1], and in the memory format of the point."""
    x = images((2, values, 1, 2), torch.float64, seed).to(memory_format=torch.channels_last)
    moved = x + spread * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = project_l1(moved, x, epsilon)
    assert found.stride() == moved.stride()
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found - x).abs().flatten(1).sum(1).max() <= epsilon + 1e-9
    torch.testing.assert_close(found, plain_projection(moved, x, epsilon), rtol=0, atol=1e-9)


def losses_and_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.detach().requires_grad_()
    logits = model(x)
    loss = plain_methods.cross_entropy(logits, y)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0], logits.argmax(1) != y


def plain_l1(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, steps: int) -> tuple[Tensor, bool]:
    """Training's Auto-PGD in L1 of one image, [1, C, H, W]; and whether any iterate was classified wrong."""
    loss, g, ever = losses_and_gradient(model, x, y)
    x_adv, best, best_loss, best_g = x, x, loss, g
    top, size, before, every = 0.05, epsilon, VALUES, max(int(0.04 * steps), 1)
    for step in range(steps):
        ordered = sorted(g.abs().flatten().tolist())
        least = ordered[int(min(max((1 - top) * VALUES, 0), VALUES - 1))]
        # an entry of 0 has no sign and counts for none
        signs = g.sign() * (g.abs() >= least)
        x_adv = plain_projection(x_adv + size * signs / max(int(signs.abs().sum()), 1), x, epsilon)
        loss, g, wrong = losses_and_gradient(model, x_adv, y)
        ever = ever | wrong
        if loss > best_loss:
            best, best_loss, best_g = x_adv, loss, g
        if (step + 1) % every == 0:
            now = int((best != x).sum())
            top = now / VALUES / 1.5
            if now < 0.95 * before:
                size, x_adv, g = epsilon, best, best_g
            else:
                size = max(size / 1.5, epsilon / 10)
            before = now
    return best, bool(ever)


@pytest.mark.parametrize(("steps", "epsilon"), [(1, L1), (16, 6.0), (50, L1)])
def test_l1_iterates_are_those_of_the_definition(steps, epsilon):
    """Images of a batch each for itself; 50 steps look at the step size every second one."""
    model = network()
    x, y = batch(1, 3 if steps == 50 else 6)
    frozen, pairs = copy.deepcopy(model).eval(), zip(x, y, strict=True)
    theirs = torch.cat([plain_l1(frozen, a[None], b[None], epsilon, steps)[0] for a, b in pairs])
    looked = []
    given = {"epsilon": epsilon, "steps": steps, "start": x, "observe": lambda step, _: looked.append(step)}
    found = apgd_l1(model, x, y, observe_from=1, **given)
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-9)
    assert looked == [*range(1, steps)]
    assert model.training
    torch.testing.assert_close(apgd_l1(model, x, y, loss_scale=2.0**13, **given), theirs, rtol=0, atol=1e-9)
    if steps > 1:
        assert not torch.equal(apgd_l1(model, x, y, bn_mode="train", **given), found)


def balls(part: float) -> list[tuple[Norm, float, float]]:
    return [("linf", LINF, part * 0.02), ("l2", L2, part * 0.1), ("l1", L1, part * 0.5)]


def plain_msd(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, part: float = 1.0
) -> tuple[Tensor, set[int]]:
    """Of one image; and which norms its steps took."""
    x_adv, best, best_loss, taken = x, x, -np.inf, set()
    for step in range(steps):
        _, g, _ = losses_and_gradient(model, x_adv, y)
        linf = (x_adv + part * 0.02 * g.sign()).clamp(x - LINF, x + LINF).clamp(0, 1)
        change = x_adv + part * 0.1 * g / g.norm() - x
        l2 = (x + change * min(1.0, L2 / float(change.norm()))).clamp(0, 1)
        count = changed_values(seed, step)
        assert 5 <= count <= 20
        moved = x_adv + part * 0.5 / count * g.sign()
        free = torch.where((moved > 0) & (moved < 1), g, 0).abs()
        chosen = free.flatten().argsort(descending=True)[:count]
        l1 = x_adv.flatten().clone()
        for place in chosen.tolist():
            if free.flatten()[place] > 0:
                l1[place] = moved.flatten()[place]
        tried = [linf, l2, plain_projection(l1.view_as(x), x, L1)]
        found = [float(losses_and_gradient(model, point, y)[0]) for point in tried]
        highest = found.index(max(found))
        taken.add(highest)
        x_adv = tried[highest]
        if max(found) > best_loss:
            best, best_loss = x_adv, max(found)
    return best, taken


def test_msd_iterates_are_those_of_the_definition():
    model = network()
    x, y = batch(2)
    frozen = copy.deepcopy(model).eval()
    for steps, part in ((1, 1.0), (6, 8.0)):
        pairs = zip(x, y, strict=True)
        theirs = [plain_msd(frozen, a[None], b[None], steps, SEED, part) for a, b in pairs]
        found = msd(model, x, y, balls=balls(part), steps=steps, seed=SEED)
        torch.testing.assert_close(found, torch.cat([point for point, _ in theirs]), rtol=0, atol=1e-9)
    # or the definition was asked of one norm alone
    assert len(set.union(*(taken for _, taken in theirs))) > 1
    assert len({changed_values(seed, 0) for seed in range(200)}) == 16


def test_an_l1_step_leaves_out_what_would_come_to_an_end():
    x = torch.tensor([[0.75, 0.25, 0.5, 0.5, 1.0]], dtype=torch.float64)
    gradient = torch.tensor([[9.0, -8.0, 3.0, -2.0, 7.0]], dtype=torch.float64)
    moved = l1_step(x, gradient, x, step_size=0.25, epsilon=1.0, count=1)
    assert moved.tolist() == [[0.75, 0.25, 0.75, 0.5, 1.0]]


def test_what_is_not_finite_moves_nothing():
    x, y = batch(3)

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4] * torch.nan

    for attacked in (
        apgd_l1(Broken(), x, y, epsilon=L1, steps=3, start=x),
        msd(Broken(), x, y, balls=balls(1.0), steps=3, seed=0),
    ):
        assert torch.equal(attacked, x)


SETTINGS = {
    "at": AttackConfig(kind="apgd", norm="l1", epsilon="1.5", steps=3, bn_mode="eval", start="none"),
    "e-at": AttackConfig(
        kind="apgd", norm="l1", epsilon="1.5", steps=3, bn_mode="eval", start="none", also=("linf=0.1",)
    ),
    "msd": AttackConfig(
        epsilon="0.1", step_size="0.02", steps=3, bn_mode="eval", start="none", also=("l2=0.4,0.1", "l1=1.5,0.5")
    ),
}


def build_step(model: nn.Module, method: str, **given) -> TensorStep:
    objective = build_objective(method, balls=2, run_seed=SEED)
    awp = AdversarialWeightPerturbation(model, GAMMA)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1))
    options = {"objective": objective, "awp": awp, "optimizer": optimizer, "options": AwpConfig(gamma=GAMMA)}
    return make_step(model, attack=SETTINGS[method], **(options | given))


def plain_linf(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Auto-PGD's first steps in Linf, which are checked elsewhere; and which images any iterate was wrong on."""
    wrong = torch.zeros(len(x), dtype=torch.bool)

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = model(x)
            wrong.logical_or_(logits.argmax(1) != y)
            return logits

    attack = Attack(kind="apgd", epsilon=LINF, steps=steps, start="none")
    return attack(Watched().eval(), x, y), wrong


@pytest.mark.parametrize(("method", "micro"), [("at", None), ("e-at", None), ("msd", None), ("e-at", 4)])
def test_steps_with_awp_are_those_of_the_definition(method, micro):
    """Weights, statistics, which pass moves them, and the counts that E-AT draws by."""
    ours, theirs = network(), network()
    if micro is not None:
        ours, theirs = ours.eval(), theirs.eval()
    step, momentum = build_step(ours, method, micro_batch_size=micro), {}
    wrong, seen, drawn = [0, 0], [0, 0], []
    for number in range(6 if method == "e-at" else 2):
        x, y = batch(10 + number, 5)
        frozen = copy.deepcopy(theirs).eval()
        place = {"epoch": 1 + number // 3, "step": number % 3}
        if method == "e-at":
            errors = [w / s for w, s in zip(wrong, seen, strict=True)] if all(seen) else [1, 1]
            errors = errors if any(errors) else [1, 1]
            ball = int(mix_seed(SEED, place["epoch"], place["step"], 6) / 2**63 * sum(errors) >= errors[0])
            drawn.append(ball)
        if method == "msd":
            seed = mix_seed(SEED, place["epoch"], place["step"], 7)
            x_adv = torch.cat([plain_msd(frozen, a[None], b[None], 3, seed)[0] for a, b in zip(x, y, strict=True)])
        elif method == "at" or ball == 0:
            found = [plain_l1(frozen, a[None], b[None], L1, 3) for a, b in zip(x, y, strict=True)]
            x_adv, ever = torch.cat([point for point, _ in found]), sum(wrong for _, wrong in found)
        else:
            x_adv, failed = plain_linf(frozen, x, y, 3)
            ever = int(failed.sum())
        if method == "e-at":
            wrong[ball] += ever
            seen[ball] += len(x)
        tracked = int(theirs.get_buffer("1.num_batches_tracked"))

        def loss(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, beta: float) -> Tensor:
            return plain_methods.cross_entropy(model(x_adv), y).mean()

        result = step(x, y, sample_ids=torch.arange(len(x)), **place)
        training = theirs.training
        if training:
            numbers = {"beta": 0, "gamma": GAMMA, "lr": 0.1, "mu": 0.9, "weight_decay": 5e-4}
            plain_methods.awp_step(theirs, momentum, x_adv, x, y, kind=loss, **numbers)
        else:
            _frozen_step(theirs, momentum, x_adv, y)
        assert not result.skipped
        assert int(ours.get_buffer("1.num_batches_tracked")) == tracked + training
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-9, atol=1e-9)
        assert isinstance(step.passes.objective, ExtremeNorm) == (method == "e-at")
        if method == "e-at":
            assert step.passes.objective.state()["norm_answers"].tolist() == [wrong, seen]
    assert len({*drawn}) == (2 if method == "e-at" else 0)


def _frozen_step(model: nn.Module, momentum: dict[str, Tensor], x_adv: Tensor, y: Tensor) -> None:
    """As `plain_methods.awp_step`, with batch normalisation by running statistics."""
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain_methods.cross_entropy(model(x_adv), y).mean().backward()
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.ndim > 1:
                p.add_(GAMMA * p.norm() / p.grad.norm() * p.grad)
    model.zero_grad()
    plain_methods.cross_entropy(model(x_adv), y).mean().backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            g = p.grad + 5e-4 * originals[name]
            momentum[name] = 0.9 * momentum[name] + g if name in momentum else g
            p.copy_(originals[name] - 0.1 * momentum[name])
    model.zero_grad()


def test_a_step_that_is_left_out_counts_nothing():
    model = network()
    step = build_step(model, "e-at")
    x, y = batch(1)
    step(x, y, sample_ids=torch.arange(len(x)))
    before = step.passes.objective.state()["norm_answers"].clone()
    assert step(x * torch.nan, y, sample_ids=torch.arange(len(x))).skipped
    assert torch.equal(step.passes.objective.state()["norm_answers"], before)


def test_an_image_counts_as_wrong_if_any_iterate_was():
    """Also of a mixture of classes, and of a batch that two ranks compute whole."""
    objective, answers = ExtremeNorm(balls=2), iter([[[0.0, 1], [0, 1], [1, 0]], [[1, 0], [1, 0], [torch.nan, 0]]])

    class Told(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor(next(answers))

    x, y = torch.zeros(3, 1), torch.tensor([[0.6, 0.4], [0.1, 0.9], [1, 0]])
    objective.begin_batch(Batch(x, y, torch.arange(3), 3), 0.5, Ranks())
    objective.drawn = 1
    model = objective.attack_model(Told(), y)
    for _ in range(2):
        model(x)
    objective.after_step(Ranks())
    assert objective.answers.tolist() == [[0, 1.5], [0, 1.5]]


def test_the_worst_ball_is_drawn_most():
    objective = ExtremeNorm(balls=3, run_seed=1)
    numbers = list(itertools.product(range(1, 31), range(30)))

    def drawn(answers: list[list[float]]) -> list[float]:
        objective.answers.copy_(torch.tensor(answers))
        counts = [0] * 3
        for epoch, step in numbers:
            objective.begin_step(0.0, epoch, step)
            assert objective.stage == objective.drawn
            counts[objective.drawn] += 1
        return [count / len(numbers) for count in counts]

    # before each was drawn, and where none ever failed, all alike
    for answers in ([[5, 0, 9], [10, 0, 10]], [[0, 0, 0], [10, 10, 10]]):
        assert drawn(answers) == pytest.approx([1 / 3] * 3, abs=0.05)
    assert drawn([[10, 30, 0], [100, 50, 7]]) == pytest.approx([1 / 7, 6 / 7, 0], abs=0.05)
    assert drawn([[0, 0, 3], [10, 10, 10]]) == [0, 0, 1]


def test_a_run_is_measured_in_all_balls():
    """Robust is who holds in each; a ball's step is a quarter of its epsilon."""
    config = Config(method="e-at", attack=SETTINGS["e-at"], evaluation=EvaluationConfig(steps=4))
    attacks = evaluation_attacks(config)
    assert [(a.kind, a.norm, a.epsilon, a.step_size) for a in attacks] == [
        ("apgd", "l1", 1.5, 0.375),
        ("pgd", "linf", 0.1, 0.025),
    ]
    model = network().float().eval()
    split = Split(
        images=(images((60, *SHAPE)) * 255).to(torch.uint8), labels=torch.arange(60) % 4, ids=torch.arange(60)
    )
    found = evaluate(model, split, attacks, batch_size=25)
    single = [evaluate(model, split, attack, batch_size=25) for attack in attacks]
    assert found.robust_by_attack == tuple(one.robust for one in single)
    assert found.robust <= min(found.robust_by_attack)
    x = split.images.float() / 255
    held = [model(attack(model, x, split.labels, sample_ids=split.ids)).argmax(1) == split.labels for attack in attacks]
    assert found.robust == pytest.approx(float((held[0] & held[1]).double().mean()), abs=1e-9)
    # in L1 the start is noise, and the steps are in three stages
    noisy = apgd_l1(model, x, split.labels, epsilon=1.5, steps=4, sample_ids=split.ids, seed=attacks[0].seed)
    assert torch.equal(attacks[0](model, x, split.labels, sample_ids=split.ids), noisy)


def test_a_growing_ball_grows_in_every_norm():
    attack = setup.training_attack(SETTINGS["msd"]).scaled(0.5)
    lengths = [(ball.norm, ball.epsilon, ball.step_size) for ball in attack.balls]
    assert lengths == [("linf", 0.05, 0.01), ("l2", 0.2, 0.05), ("l1", 0.75, 0.25)]
    proportional = setup.training_attack(dataclasses.replace(SETTINGS["msd"], also=("l1=12",)))
    assert proportional.others[0].step_size == pytest.approx(2.4)


def test_training_without_an_attack_may_be_measured_in_l1():
    attack = setup.training_attack(AttackConfig(kind="none", norm="l1", epsilon="2"))
    x = images((2, *SHAPE), torch.float64)
    assert torch.equal(attack.first(x, sample_ids=torch.arange(2), seed=1), x)


def test_steps_that_grow_do_so_in_every_norm():
    attack = setup.training_attack(SETTINGS["msd"])
    config = Config(epochs=3, method="msd", attack=dataclasses.replace(SETTINGS["msd"], step_warmup=2))
    schedule = Schedule(config=config, steps=1, attack=attack, cheap=attack)
    steps = [[ball.step_size for ball in schedule.full_attack(epoch).balls] for epoch in (1, 2, 3)]
    assert steps == [[0, 0, 0], [0.01, 0.05, 0.25], [0.02, 0.1, 0.5]]


def test_no_attack_looks_at_values_on_the_device():
    """So that a CUDA graph can hold them."""
    x, y, model = torch.empty(2, *SHAPE, device="meta"), torch.empty(2, dtype=torch.int64, device="meta"), network()
    model = model.float().to("meta")
    at, both, several = (setup.training_attack(SETTINGS[method]) for method in ("at", "e-at", "msd"))
    for attack in (at, both.balls[1], several):
        assert attack(model, x, y, start=x).shape == x.shape


WRONG = {
    "l1 by pgd": ({"attack": AttackConfig(norm="l1", epsilon="2", start="none")}, r"--attack\.norm: .*apgd"),
    "e-at alone": ({"method": "e-at"}, r"--attack\.also: expected further balls with --method e-at"),
    "short steps": (
        {"method": "msd", "attack": AttackConfig(also=("l1=12,1/255",), start="none")},
        r"--attack\.also: expected steps that go farther, 10 of them,",
    ),
    "also alone": ({"attack": AttackConfig(also=("l1=2",), start="none")}, r"--attack\.also: expected none without"),
    "e-at by pgd": (
        {"method": "e-at", "attack": AttackConfig(also=("l1=2",), start="none")},
        r"--attack\.kind: expected apgd with --method e-at",
    ),
    "msd from noise": (
        {"method": "msd", "attack": AttackConfig(also=("l2=2",))},
        r"--attack\.start: expected none with --method msd",
    ),
    "a step of e-at": (
        {"method": "e-at", "attack": AttackConfig(kind="apgd", also=("l2=2,1",))},
        r"--attack\.also: expected NORM=EPSILON with --method e-at",
    ),
    "shared": (
        {"method": "msd", "attack": SETTINGS["msd"], "awp": AwpConfig(ascent="shared")},
        r"--awp\.ascent: expected exact with --method msd",
    ),
    "margin": (
        {"attack": SETTINGS["at"], "evaluation": EvaluationConfig(loss="margin")},
        r"--evaluation\.loss: expected ce",
    ),
    "a step": (
        {"attack": SETTINGS["at"], "evaluation": EvaluationConfig(step_size="1")},
        r"--evaluation\.step-size: expected none",
    ),
    "trades": ({"attack": SETTINGS["at"], "method": "trades"}, r"--attack\.kind: expected pgd with --method trades"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_do_not_go_together_are_refused(name):
    given, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        Config(**given)


@pytest.mark.parametrize(
    ("also", "message"),
    [
        (("l3=1",), "NORM=EPSILON of linf"),
        (("l1",), "NORM=EPSILON of linf"),
        (("l1=0",), "EPSILON > 0"),
        (("l1=2,0",), "EPSILON > 0"),
        (("l1=-2",), "EPSILON > 0"),
        (("l1=1/0",), "EPSILON > 0"),
        (("linf=0.1",), "every norm once"),
        (("l2=1", "l2=2"), "every norm once"),
        (("l1=1,3",), "at most twice"),
    ],
)
def test_balls_that_are_none_are_refused(also, message):
    with pytest.raises(ConfigError, match=rf"--attack\.also: expected .*{message}"):
        AttackConfig(also=also, start="none")
    with pytest.raises(ConfigError, match=r"--attack\.also: expected at most 1 for linf"):
        AttackConfig(norm="l2", also=("linf=8",))
    with pytest.raises(ConfigError, match=r"--attack\.start: expected none"):
        AttackConfig(kind="apgd", norm="l1", epsilon="2")


def test_attacks_refuse_what_they_do_not_climb():
    x, y = batch(1)
    model, several = network(), setup.training_attack(SETTINGS["msd"])
    with pytest.raises(ValueError, match="norm: expected one of linf, l2, got 'l1'"):
        Attack(norm="l1", epsilon=1.0, step_size=0.5, steps=2, start="none")(model, x, y)
    with pytest.raises(ValueError, match="loss, shared: expected neither with an attack in several balls"):
        several(model, x, y, loss=lambda logits, _: logits.sum())
    with pytest.raises(ValueError, match="others: expected none but with kind pgd"):
        setup.training_attack(SETTINGS["e-at"])(model, x, y)
    assert several(model, x, y, loss=summed_cross_entropy).shape == x.shape

"""How far the perturbation takes the loss, and what makes gamma smaller where that is too far."""

import copy
import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from plain_methods import mart_loss, trades_loss
from samples import images
from steps import make_step
from torch import nn

from awp_engine.config import AttackConfig, AwpConfig, Config, ConfigError, OptimizerConfig
from awp_engine.distributed.batch import Batch
from awp_engine.models.batch_norm import batch_norm_mode
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import Objective, build_objective
from awp_engine.step.rise import RiseLimit
from awp_engine.train import setup
from awp_kernels import AdversarialWeightPerturbation, sam

ATTACK = AttackConfig(epsilon="8/255", step_size="2/255", steps=2, bn_mode="eval")
GAMMA = 0.05
X, Y = images((12, 1, 4, 4), torch.float64), torch.arange(12) % 3
BATCH = Batch(X, Y, torch.arange(12), 12)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3)).double().train()


def step_of(model: nn.Module, method: str = "at", lr: float = 0.1, limit: float | None = None, gamma=GAMMA, **given):
    rise_limit = None if limit is None else RiseLimit(limit, torch.device("cpu"))
    step = make_step(
        model,
        objective=build_objective(method, beta=2.0),
        attack=ATTACK,
        awp=AdversarialWeightPerturbation(model, gamma),
        optimizer=build_optimizer(model, OptimizerConfig(lr=lr, momentum=0.0, weight_decay=0.0)),
        options=AwpConfig(gamma=gamma, max_rise=limit),
        rise_limit=rise_limit,
        **given,
    )
    return step.step, step.phase(0, True, False)


def by_hand(model: nn.Module, x_adv: torch.Tensor, method: str, gamma: float) -> tuple[float, float]:
    """Loss at w, and at w moved by gamma."""
    copied = copy.deepcopy(model)
    with batch_norm_mode(copied, "train", update_statistics=False):
        loss = losses_of(method)(copied, x_adv)
        loss.backward()
        with torch.no_grad():
            for parameter in copied.parameters():
                if parameter.ndim > 1 and parameter.grad is not None:
                    parameter += gamma * parameter.norm() / parameter.grad.norm() * parameter.grad
            return float(loss), float(losses_of(method)(copied, x_adv))


def losses_of(method: str):
    """The mean loss on X, written out."""
    written = {"trades": trades_loss, "mart": mart_loss}

    def loss(model: nn.Module, x_adv: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x_adv), Y) if method == "at" else written[method](model, x_adv, X, Y, 2.0)

    return loss


@pytest.mark.parametrize("micro_batch_size", [None, 5])
@pytest.mark.parametrize("method", ["at", "trades", "mart"])
def test_rise_and_room_are_those_of_the_definition(method, micro_batch_size):
    model = small_model().eval() if micro_batch_size else small_model()
    step, phase = step_of(model, method, micro_batch_size=micro_batch_size)
    before = copy.deepcopy(model)
    x_adv = step.passes.attack_whole(phase.attack, before, BATCH, seed=0)
    at_w, moved = by_hand(before, x_adv, method, GAMMA)
    result = step(BATCH, phase)
    if micro_batch_size is None:
        assert float(result.rise) == pytest.approx(moved - at_w, rel=1e-9)
    # MART's second term is that of the largest wrong probability
    guess = math.log(3) - (math.log(1.0001 - 1 / 3 + 1e-12) if method == "mart" else 0)
    if micro_batch_size is None:
        assert float(result.room) == pytest.approx(guess - at_w, rel=1e-9)
    assert float(result.room - result.rise) == pytest.approx(guess - float(result.loss), rel=1e-9)


@given(
    st.floats(0.05, 1.0), st.floats(2.0**-10, 1.0), st.floats(-1.0, 10.0) | st.just(math.inf) | st.just(math.nan),
    st.floats(-5.0, 5.0) | st.just(math.nan) | st.just(-math.inf),
)  # fmt: skip
def test_the_factor_is_its_definition(limit, factor, rise, room):
    control = RiseLimit(limit, torch.device("cpu"))
    control.factor.fill_(factor)
    control.update_(torch.tensor(rise, dtype=torch.float64), torch.tensor(room, dtype=torch.float64))
    if not math.isfinite(room):
        expected = factor
    elif not math.isfinite(rise) or room <= 0:
        expected = factor / 2
    elif rise <= 0:
        expected = 1.1 * factor
    else:
        expected = factor * min(max(math.sqrt(limit * room / rise), 0.5), 1.1)
    assert float(control.factor) == pytest.approx(min(max(expected, 2.0**-10), 1.0), rel=1e-12)


def test_gamma_comes_to_where_the_limit_is_met():
    """Without learning the same batch is met again and again; a factor that kept growing would end at 1."""
    model = small_model()
    step, phase = step_of(model, lr=1e-30, limit=0.5, gamma=2.0)
    # so that the model knows something
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    results = [step(BATCH, phase) for _ in range(120)]
    shares = [float(result.rise / result.room) for result in results]
    assert step.rise_limit is not None
    assert shares[0] < 0.01
    assert shares[-1] == pytest.approx(0.5, rel=0.02)
    assert 2.0**-10 < float(step.rise_limit.factor) < 1
    # what was measured is what a hand finds at gamma times the factor of that step
    before = float(step.rise_limit.factor)
    x_adv = step.passes.attack_whole(phase.attack, model, BATCH, seed=0)
    at_w, moved = by_hand(model, x_adv, "at", 2.0 * before)
    assert float(step(BATCH, phase).rise) == pytest.approx(moved - at_w, rel=1e-9)


def test_while_nothing_is_learnt_gamma_stays_at_its_least():
    model = small_model()
    with torch.no_grad():
        # confidently wrong
        model[3].weight.zero_()
        model[3].bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    step, phase = step_of(model, lr=1e-30, limit=0.5)
    for _ in range(4):
        assert float(step(BATCH, phase).room) < 0
    assert step.rise_limit is not None
    assert float(step.rise_limit.factor) == 2.0**-10


class ClimbsAnother(Objective):
    def losses(self, model, x_adv, x, y):
        logits = model(x_adv)
        return F.cross_entropy(logits, y, reduction="none"), logits

    def ascent_losses(self, model, x_adv, x, y):
        losses, logits = self.losses(model, x_adv, x, y)
        return 2 * losses, logits


def test_a_loss_at_w_that_is_not_known_is_refused_or_not_told():
    model = small_model()
    given = {
        "objective": ClimbsAnother(),
        "attack": ATTACK,
        "awp": AdversarialWeightPerturbation(model, GAMMA),
        "optimizer": build_optimizer(model, OptimizerConfig()),
    }
    step = make_step(model, **given)
    result = step.step(BATCH, step.phase(0, True, False))
    assert float(result.rise) == float(result.room) == 0
    limit = RiseLimit(0.5, torch.device("cpu"))
    for wrong in ({}, {"objective": build_objective("at"), "awp": None}):
        with pytest.raises(ValueError, match="rise_limit: expected None"):
            make_step(model, **given | wrong, rise_limit=limit)
    for changes in ({"ascent": "shared"}, {"c_min": 1.7}, {"scope": "filter"}, {"scale": "absolute"}):
        with pytest.raises(ConfigError, match=r"--awp.max-rise: expected none, unless the ascent is exact"):
            AwpConfig(gamma=0.01, max_rise=0.5, **changes)
    with pytest.raises(ConfigError, match=r"--awp\.max-rise"):
        AwpConfig(gamma=0.01, max_rise=1.5)


def test_settings_reach_the_step():
    config = Config(awp=AwpConfig(gamma=0.01, max_rise=0.25))
    step = setup.build_step(config, small_model())
    assert step.rise_limit is not None
    assert step.rise_limit.limit == 0.25
    assert step.awp is not None
    assert step.awp.factor is step.rise_limit.factor
    assert setup.build_step(Config(awp=AwpConfig(gamma=0.01)), small_model()).rise_limit is None


@pytest.mark.parametrize("known", [False, True])
def test_a_factor_is_part_of_gamma(known):
    weights = []
    for gamma, factor in ((0.01, None), (0.04, 0.25)):
        model = small_model()
        awp = AdversarialWeightPerturbation(model, gamma)
        awp.factor = None if factor is None else torch.tensor(factor, dtype=torch.float64)
        if known:
            moved = list(awp.parameters.values())
            awp.take_weight_norms([(moved, torch.stack([p.detach().double().norm() for p in moved]))])
            assert awp.weight_norms is not None
        F.cross_entropy(model(X), Y).backward()
        with awp.perturbed():
            weights.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    for wrong in (sam(small_model()), AdversarialWeightPerturbation(small_model(), 0.01, scope="filter")):
        wrong.factor = torch.tensor(0.5, dtype=torch.float64)
        F.cross_entropy(wrong.model(X), Y).backward()
        with pytest.raises(ValueError, match="factor: expected None for scale"):
            wrong.perturb_()


class Counts(Objective):
    """Cross-entropy, whose gradient is not finite where it is told so."""

    def __init__(self, broken: bool = False) -> None:
        self.models: list[str] = []
        self.broken = broken

    def losses(self, model, x_adv, x, y):
        self.models.append(type(model).__name__)
        logits = model(x_adv)
        losses = F.cross_entropy(logits, y, reduction="none")
        # 0, with a gradient of 0 * inf
        return losses + (0 * logits.sum()).abs().sqrt() if self.broken else losses, logits


def test_methods_of_others_are_asked_of_a_guess_where_a_limit_is_wanted_alone():
    for limit, models in ((None, ["Sequential", "Sequential"]), (0.5, ["Sequential", "Guess", "Sequential"])):
        objective, model = Counts(), small_model()
        step = make_step(
            model,
            objective=objective,
            attack=ATTACK,
            awp=AdversarialWeightPerturbation(model, GAMMA),
            optimizer=build_optimizer(model, OptimizerConfig()),
            rise_limit=None if limit is None else RiseLimit(limit, torch.device("cpu")),
        )
        step.step(BATCH, step.phase(0, True, False))
        assert objective.models == models


def test_a_direction_that_is_not_followed_says_nothing_of_gamma():
    model = small_model()
    limit = RiseLimit(0.5, torch.device("cpu"))
    limit.factor.fill_(0.3)
    step = make_step(
        model,
        objective=Counts(broken=True),
        attack=ATTACK,
        awp=AdversarialWeightPerturbation(model, GAMMA),
        optimizer=build_optimizer(model, OptimizerConfig()),
        rise_limit=limit,
    )
    result = step.step(BATCH, step.phase(0, True, False))
    assert bool(result.skipped)
    assert math.isfinite(float(result.loss))
    assert float(limit.factor) == 0.3


@pytest.mark.parametrize("broken", [False, True])
def test_the_first_batchs_statistics_are_taken_whole_even_where_the_step_is_left_out(broken):
    model = small_model()
    step = make_step(
        model,
        objective=Counts(broken),
        attack=AttackConfig(epsilon="0"),
        optimizer=build_optimizer(model, OptimizerConfig()),
    )
    before = copy.deepcopy(model)
    phase = dataclasses.replace(step.phase(0, False, False), whole_statistics=True)
    assert bool(step.step(BATCH, phase).skipped) == broken
    values = before[0](X).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, values.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[1].running_var, values.var(1), rtol=1e-12, atol=1e-12)
    # what else the step moves is put back
    assert torch.equal(model[0].weight, before[0].weight) == broken

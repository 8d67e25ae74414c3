"""The engine's step against an independent version of the public code: equal but for two things, each shown here.

Without weight decay, and with batch normalisation by frozen statistics, both take the same steps. The public code's
decay acts on w + gamma v, ours on w; and it moves running statistics in K + 3 forward passes of a step, we in one.
"""

import copy

import pytest
import torch
from public_awp import PublicAwp, public_step
from samples import images
from steps import make_step

import awp_kernels
from awp_engine.config import AttackConfig
from awp_engine.models import build_model
from awp_engine.step.objectives import AdversarialTraining
from awp_kernels import AdversarialWeightPerturbation, pgd_init_

LR, DECAY = 0.1, 5e-4
ATTACK = AttackConfig(norm="linf", epsilon="8/255", step_size="2/255", steps=3, bn_mode="eval")


def small_model(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).to(dtype).train()
    with torch.no_grad():  # running statistics that are not the initial ones
        for index in range(3):
            model(images((16, 1, 8, 8), dtype, seed=50 + index))
    return model


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    worst = 0.0
    for name, value in a.items():
        scale = b[name].double().norm().clamp_min(1e-12)
        worst = max(worst, float((value.double() - b[name].double()).norm() / scale))
    return worst


def both_ways(steps: int, gamma: float = 0.01, weight_decay: float = 0.0, train: bool = False):
    """Trains two copies of a model in fp64, by the public code and by the engine.

    Yields both after every step, and the public code's unit perturbation in it.
    """
    public_model, engine_model = (small_model(torch.float64).train(train) for _ in range(2))
    options = {"lr": LR, "momentum": 0.9, "weight_decay": weight_decay}
    public_sgd = torch.optim.SGD(public_model.parameters(), **options)
    public_awp = PublicAwp(public_model, gamma)
    step = make_step(
        engine_model,
        optimizer=awp_kernels.SGD(engine_model.parameters(), **options),
        objective=AdversarialTraining(),
        attack=ATTACK,
        awp=AdversarialWeightPerturbation(engine_model, gamma),
    )
    for index in range(steps):
        x = images((16, 1, 8, 8), torch.float64, seed=index)
        y = torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(index))
        ids = torch.arange(16) + 100 * index
        start = torch.empty_like(x)
        pgd_init_(start, x, epsilon=8 / 255, norm="linf", sample_ids=ids, seed=index)
        moved = public_step(
            public_model, public_sgd, public_awp, x, y, start, epsilon=8 / 255, step_size=2 / 255, steps=3
        )
        step(x, y, sample_ids=ids, seed=index)
        yield public_model.state_dict(), engine_model.state_dict(), moved


def test_five_steps_agree_in_fp64():
    for public, engine, _ in both_ways(steps=5):
        assert public.keys() == engine.keys()
        assert relative(engine, public) <= 1e-9


def test_the_comparison_would_see_a_difference():
    """Leaving the perturbation out must break the agreement by orders of magnitude more than it allows."""
    *_, (public, engine, _) = both_ways(steps=2)
    *_, (other, _, _) = both_ways(steps=2, gamma=0.0)
    assert relative(engine, public) <= 1e-9
    assert relative(other, public) > 1e-4


def test_decay_differs_by_that_of_the_perturbation():
    """The public code's first step with decay is ours less lr * decay * gamma v."""
    ((public, engine, moved),) = both_ways(steps=1, weight_decay=DECAY)
    expected = {name: value.clone() for name, value in engine.items()}
    for name, direction in moved.items():
        expected[name] -= LR * DECAY * 0.01 * direction
    assert relative(expected, public) <= 1e-12
    assert relative(engine, public) > 1e-9


def test_statistics_differ_by_the_passes_that_move_them():
    """K in the attack, one more on its result, the descent's, and one on clean images; ours moves them in one."""
    ((public, engine, _),) = both_ways(steps=1, train=True)
    counts = [name for name in public if name.endswith("num_batches_tracked")]
    assert counts
    for name in counts:
        # the passes that made the model's statistics come first
        assert int(public[name]) - 3 == ATTACK.steps + 3
        assert int(engine[name]) - 3 == 1


@pytest.mark.parametrize("gamma", [0.005, 0.01])
def test_the_perturbation_agrees_in_fp32(gamma):
    """To 1e-3 of its norm, in every tensor; the public code's own rounding is in it."""
    model = small_model(torch.float32)
    proxy_model = copy.deepcopy(model)
    x = images((16, 1, 8, 8), seed=3)
    y = torch.arange(16) % 10
    public = PublicAwp(proxy_model, gamma)
    differences = public.calculate(x, y)

    torch.nn.functional.cross_entropy(model(x), y).backward()
    awp = AdversarialWeightPerturbation(model, gamma)
    assert set(awp.parameters) == set(differences)
    with awp.perturbed():
        moved = {name: p.detach().clone() for name, p in awp.parameters.items()}
    # the first gradient of a fresh batch of weights: exact in fp64
    for name, before in proxy_model.state_dict().items():
        if name in differences:
            reference = gamma * differences[name].double()
            ours = moved[name].double() - before.double()
            assert (ours - reference).norm() <= 1e-3 * reference.norm()


def test_a_default_step_moves_the_statistics_once():
    model = small_model(torch.float32)
    step = make_step(
        model,
        optimizer=awp_kernels.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY),
        objective=AdversarialTraining(),
        attack=AttackConfig(norm="linf", epsilon="8/255", step_size="2/255", steps=3, bn_mode="train"),
        awp=AdversarialWeightPerturbation(model, 0.01),
    )
    for perturb in (True, False):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        step(images((8, 1, 8, 8)), torch.arange(8), sample_ids=torch.arange(8), seed=0, perturb=perturb)
        after = model.state_dict()
        counts = [name for name in after if name.endswith("num_batches_tracked")]
        assert all(int(after[name]) == int(before[name]) + 1 for name in counts)
        assert not torch.equal(after["layer1.0.bn1.running_mean"], before["layer1.0.bn1.running_mean"])
    assert all(module.training and getattr(module, "track_running_stats", True) for module in model.modules())

"""The engine's `public_code` step against an independent version of the public algorithm."""

import copy

import pytest
import torch
from awp_engine.step.training_step import TrainingStep
from public_awp import PublicAwp, public_step
from samples import images

import awp_kernels
from awp_engine.config import AttackConfig, AwpConfig
from awp_engine.models import build_model
from awp_engine.step.objectives import AdversarialTraining
from awp_kernels import AdversarialWeightPerturbation, pgd_init_

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
ATTACK = AttackConfig(norm="linf", epsilon="8/255", step_size="2/255", steps=3, bn_mode="train")


def small_model(dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).to(dtype).train()


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    worst = 0.0
    for name, value in a.items():
        scale = b[name].double().norm().clamp_min(1e-12)
        worst = max(worst, float((value.double() - b[name].double()).norm() / scale))
    return worst


def both_ways(dtype: torch.dtype, steps: int, gamma: float = 0.01):
    """Trains two copies of a model, by the engine and by the public code; yields both after every step."""
    public_model, engine_model = small_model(dtype), small_model(dtype)
    public_sgd = torch.optim.SGD(public_model.parameters(), **SGD)
    engine_sgd = awp_kernels.SGD(engine_model.parameters(), **SGD)
    public_awp = PublicAwp(public_model, gamma)
    engine_awp = AdversarialWeightPerturbation(engine_model, gamma)
    step = TrainingStep(
        model=engine_model,
        optimizer=engine_sgd,
        objective=AdversarialTraining(),
        attack=ATTACK,
        awp=engine_awp,
        options=AwpConfig(gamma=gamma, public_code=True),
    )
    for index in range(steps):
        x = images((16, 1, 8, 8), dtype, seed=index)
        y = torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(index))
        ids = torch.arange(16) + 100 * index
        start = torch.empty_like(x)
        pgd_init_(start, x, epsilon=8 / 255, norm="linf", sample_ids=ids, seed=index)
        public_step(public_model, public_sgd, public_awp, x, y, start, epsilon=8 / 255, step_size=2 / 255, steps=3)
        step(x, y, sample_ids=ids, seed=index)
        yield public_model.state_dict(), engine_model.state_dict()


def test_five_steps_agree_in_fp64():
    """Weights, biases, and the running statistics of 2K + ... forward passes."""
    for public, engine in both_ways(torch.float64, steps=5):
        assert public.keys() == engine.keys()
        assert relative(engine, public) <= 1e-9
        counts = [name for name in public if name.endswith("num_batches_tracked")]
        assert counts
        assert all(torch.equal(public[name], engine[name]) for name in counts)
    # K in the attack, one more on its result, the descent's, and one on clean images, five times
    assert int(engine[counts[0]]) == 5 * (ATTACK.steps + 3)


def test_the_comparison_would_see_a_difference():
    """Leaving the perturbation out must break the agreement by orders of magnitude more than it allows."""
    *_, (public, engine) = both_ways(torch.float64, steps=2, gamma=0.01)
    *_, (other, _) = both_ways(torch.float64, steps=2, gamma=0.0)
    assert relative(engine, public) <= 1e-9
    assert relative(other, public) > 1e-4


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
    step = TrainingStep(
        model=model,
        optimizer=awp_kernels.SGD(model.parameters(), **SGD),
        objective=AdversarialTraining(),
        attack=ATTACK,
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

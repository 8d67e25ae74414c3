"""Training under Gaussian noise against its formulas in fp64."""

import copy
import dataclasses

import pytest
import torch
from ranks import run_ranks
from samples import images
from steps import build_step
from test_resume import AWP_EMA, resumed_everywhere
from torch import Tensor, nn
from torch.nn import functional

from awp_engine.config import (
    AttackConfig,
    AverageConfig,
    AwpConfig,
    Config,
    ConfigError,
    OptimizerConfig,
    PrecisionConfig,
)
from awp_engine.config.identity import from_flat, to_flat
from awp_engine.config.rules import choose_speed
from awp_engine.data import Batch
from awp_engine.evaluation import Accuracy
from awp_engine.models import build_model
from awp_engine.models.batch_norm import layer_modes
from awp_engine.step.noise import Noise
from awp_engine.step.values import Phase
from awp_engine.train.setup import training_attack
from awp_engine.train.trainer import Trainer
from awp_kernels.philox import mix_seed, normals

X, Y, IDS = images((5, 1, 8, 8)), torch.tensor([3, 0, 9, 2, 2]), torch.tensor([7, 2**40, 0, 11, 5])
NOISE = Noise(sigma=0.5, copies=3, seed=9)
LR, GAMMA, EPSILON, STEP = 0.1, 0.01, 0.5, 0.2
L2 = AttackConfig(norm="l2", epsilon=str(EPSILON), step_size=str(STEP), steps=3, start="none", bn_mode="eval")


def noise_by_formula(x: Tensor, ids: Tensor) -> list[Tensor]:
    """[copies] of [N, C, H, W]."""
    drawn = [normals(ids, x[0].numel(), seed=mix_seed(NOISE.seed, number)) for number in range(NOISE.copies)]
    return [NOISE.sigma * numbers.to(x.dtype).view(x.shape) for numbers in drawn]


def plain_attack(model: nn.Module, x: Tensor, y: Tensor, noise: list[Tensor]) -> Tensor:
    """SmoothAdv's: projected steps along the normalised gradient of -log of the mean probability, from x."""
    x_adv = x.clone()
    for _ in range(L2.steps):
        x_adv.requires_grad_()
        probabilities = torch.stack([model(x_adv + added).softmax(1) for added in noise]).mean(0)
        (gradient,) = torch.autograd.grad(-probabilities[torch.arange(len(y)), y].log().sum(), x_adv)
        moved = x_adv.detach() + STEP * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = moved - x
        delta = delta * (EPSILON / delta.flatten(1).norm(dim=1).clamp(min=EPSILON)).view(-1, 1, 1, 1)
        x_adv = (x + delta).clamp(0, 1)
    return x_adv


def plain_step(model: nn.Module, x: Tensor, y: Tensor, noise: list[Tensor], *, attacked: bool) -> None:
    """An AWP step on the mean cross-entropy of the noisy copies."""
    with layer_modes(model, bn_mode="eval"):
        x_adv = plain_attack(model, x, y, noise) if attacked else x

    def climb(of: nn.Module) -> None:
        of.zero_grad()
        for added in noise:
            (functional.cross_entropy(of(x_adv + added), y) / len(noise)).backward()

    climber, weights = copy.deepcopy(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    climb(climber)
    with torch.no_grad():
        for name, p in climber.named_parameters():
            if p.ndim > 1:
                model.get_parameter(name).add_(GAMMA * weights[name].norm() * p.grad / p.grad.norm())
    climb(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name] - LR * p.grad)


def test_noise_is_keyed_by_sample_and_copy_and_is_not_clipped():
    for number, added in enumerate(noise_by_formula(X, IDS)):
        found = NOISE.added(X, IDS, number)
        torch.testing.assert_close(found, X + added, rtol=0, atol=1e-6)
        order = torch.tensor([4, 2, 0])
        assert torch.equal(NOISE.added(X[order], IDS[order], number), found[order])
        assert found.min() < 0
        assert found.max() > 1
        assert not torch.equal(found, NOISE.added(X, IDS, number + 1))


@pytest.mark.parametrize("kind", ["none", "pgd"])
def test_a_step_is_what_the_papers_write(kind):
    config = Config(
        attack=dataclasses.replace(L2, kind=kind, noise=NOISE.sigma, noise_samples=NOISE.copies),
        awp=AwpConfig(gamma=GAMMA),
        optimizer=OptimizerConfig(lr=LR, momentum=0.0, weight_decay=0.0),
        precision=PrecisionConfig(attack="fp32"),
    )
    torch.manual_seed(0)
    ours = build_model("preact-resnet-digits", 10, (0.5,), (0.25,)).double().train()
    plain, x = copy.deepcopy(ours), X.double()
    step = build_step(config, ours).step
    phase = Phase(attack=training_attack(config.attack), noise=NOISE)
    for _ in range(2):
        assert not step(Batch(x, Y, IDS, len(x)), phase).skipped
        plain_step(plain, x, Y, noise_by_formula(x, IDS), attacked=kind == "pgd")
    for (name, found), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_pieces_of_a_batch_see_the_same_noise():
    config = Config(
        attack=dataclasses.replace(L2, noise=0.5, noise_samples=2),
        awp=AwpConfig(gamma=GAMMA),
        precision=PrecisionConfig(attack="fp32"),
    )
    results = []
    for size in (2, None):
        torch.manual_seed(0)
        model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,)).double().train()
        with torch.no_grad():
            model(X.double())
        step = build_step(dataclasses.replace(config, micro_batch_size=size), model).step
        # by running statistics, as pieces have others of their own
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()
        step(Batch(X.double(), Y, IDS, len(X)), Phase(attack=training_attack(config.attack), noise=NOISE))
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_resume_at_a_step_ends_bit_equal(tmp_path, world):
    config = dataclasses.replace(AWP_EMA, attack=dataclasses.replace(L2, noise=0.25, noise_samples=2))
    if world == 1:
        found = resumed_everywhere(0, 1, tmp_path, config, 7)
    else:
        found = run_ranks(resumed_everywhere, world, tmp_path, config, 10, timeout=500)[0]
    assert found == (-(-20 // (7 if world == 1 else 10)), [])


def test_an_averages_statistics_are_those_of_noisy_images(tmp_path):
    attack = dataclasses.replace(L2, kind="none", noise=3.0)
    average = AverageConfig(kind="ema", bn_images=50)
    trainer = Trainer(dataclasses.replace(AWP_EMA, run_dir=tmp_path, attack=attack, average=average))
    trainer.run()
    model = trainer.selection.measured_model(1)
    ratio = model.layer1[0].bn1.running_var / trainer.model.layer1[0].bn1.running_var
    # without noise a hundredth
    assert 0.3 < ratio.median() < 3


@pytest.mark.parametrize(("settings", "kept"), [({"kind": "none"}, 2), ({"kind": "none", "noise": 0.25}, 1), ({}, 1)])
def test_clean_images_alone_are_trained_on_for_clean_accuracy(tmp_path, monkeypatch, settings, kept):
    attack = dataclasses.replace(AWP_EMA.attack, **settings)
    evaluation = dataclasses.replace(AWP_EMA.evaluation, patience=1)
    changed = {"run_dir": tmp_path, "attack": attack, "evaluation": evaluation, "epochs": 9, "checkpoint_steps": None}
    trainer, said = Trainer(dataclasses.replace(AWP_EMA, **changed)), []
    found = iter(Accuracy(clean=clean, robust=robust) for clean, robust in ((0.2, 0.1), (0.9, 0.0), (0.8, 0.0)))
    monkeypatch.setattr(trainer.selection, "_measure", lambda *_: next(found))
    monkeypatch.setattr(trainer, "_say", said.append)
    trainer.train()
    assert (trainer.progress.best_epoch, trainer.progress.epoch) == (kept, kept + 1)
    told = "clean accuracy than 90.00%" if kept == 2 else "PGD accuracy than 10.00%"
    assert f"no better held-out {told} of epoch {kept}" in said[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "trades"}, r"^--method: expected at, or a class of your own, with .* --attack\.noise"),
        ({"attack.fast": "free", "awp.gamma": 0.0}, r"^--attack\.fast: expected none with .* --attack\.noise"),
        ({"attack.noise": 0.0, "attack.noise_samples": 2}, r"^--attack\.noise-samples: expected 1 without"),
        ({"attack.noise": -0.1}, r"^--attack\.noise: expected a number from 0 to 10"),
        ({"cuda_graphs": True}, None),
    ],
)
def test_what_it_does_not_go_with_is_refused(changes, message):
    flat = to_flat(Config(attack=AttackConfig(noise=0.25))) | changes
    if message is None:
        with pytest.raises(ConfigError, match=r"^--cuda-graphs: expected .* got --attack\.noise"):
            choose_speed(from_flat(flat), cuda=True, ranks=1)
    else:
        with pytest.raises(ConfigError, match=message):
            from_flat(flat)


def test_titles():
    for changes, title in (({"noise": 0.25, "kind": "none"}, "Noise"), ({"noise": 0.25}, "SmoothAdv"), ({}, "AT")):
        assert Config(attack=AttackConfig(**changes), awp=AwpConfig(gamma=0.0)).title == title
    assert Config(attack=AttackConfig(kind="none")).title == "Standard-AWP"

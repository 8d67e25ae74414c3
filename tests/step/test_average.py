"""EMA and SWA of the weights, their statistics, and the monitor's warnings."""

import copy
import math

import pytest
import torch
from samples import images
from steps import make_step
from torch import nn

from awp_engine.config import AttackConfig, AverageConfig, OptimizerConfig
from awp_engine.models import build_model
from awp_engine.models.batch_norm import recompute_statistics
from awp_engine.observe import warnings as monitor
from awp_engine.optim.average import WeightAverage
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import build_objective
from awp_kernels import SGD


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).double().train()


def walk(model: nn.Module, seed: int) -> list[torch.Tensor]:
    """Moves the weights as a training step would; returns copies."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    model(images((8, 1, 8, 8), torch.float64, seed=seed))  # the live statistics move
    return [p.detach().clone() for p in model.parameters()]


def step_where_it_stands(model: nn.Module, average: WeightAverage) -> None:
    """A step of length 0: the weights stay, and the average takes them in."""
    optimizer = SGD(model.parameters(), lr=0.0)
    average.follow(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    average.before_step()
    optimizer.step()


def test_swa_is_the_plain_mean_of_the_epochs_after_its_start():
    model = small_model()
    average = WeightAverage(model, AverageConfig(kind="swa", start=0.5), epochs=8)
    seen = []
    for epoch in range(1, 9):
        weights = walk(model, epoch)
        step_where_it_stands(model, average)  # changes nothing
        average.after_epoch(epoch)
        if epoch > 4:
            seen.append(weights)
        assert average.started == (epoch > 4)
    for averaged, *epochs in zip(average.model.parameters(), *seen, strict=True):
        torch.testing.assert_close(averaged.detach(), torch.stack(epochs).mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ramp", "warmup"), [(True, 0.0), (False, 0.0), (True, 0.7), (False, 2.3)])
def test_ema_follows_its_recursion(ramp, warmup):
    """By steps, 10 an epoch: copies in the warm-up, then a decay that rises, or one decay from the first weights on."""
    model = small_model()
    config = AverageConfig(kind="ema", decay=0.9, ramp=ramp, warmup=warmup)
    average = WeightAverage(model, config, epochs=3, steps=10)
    copied = {0.0: 0, 0.7: 7, 2.3: 23}[warmup]
    expected = [p.detach().clone() for p in model.parameters()]
    for step in range(30):
        weights = walk(model, step)
        step_where_it_stands(model, average)
        n = step - copied
        decay = min(0.9, (1 + n) / (10 + n)) if ramp else 0.9
        if n < 0 or (ramp and step == 0):
            decay = 0.0
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, weights, strict=True)]
        for averaged, reference in zip(average.model.parameters(), expected, strict=True):
            torch.testing.assert_close(averaged.detach(), reference, rtol=1e-12, atol=1e-12)


class Drifting(nn.Module):
    """Batch normalisation, and a buffer of its own that every pass in train mode moves."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(1), nn.Linear(16, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.fc(self.norm(x).flatten(1))


@pytest.mark.parametrize("statistics", ["averaged", "live"])
@pytest.mark.parametrize("free", [False, True])
def test_statistics_follow_in_every_step_that_is_not_left_out(statistics, free):
    torch.manual_seed(0)
    model = Drifting().double().train()
    average = WeightAverage(
        model, AverageConfig(kind="ema", decay=0.8, ramp=False, warmup=0.2, statistics=statistics), 1, steps=5
    )
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1))
    average.follow(optimizer)
    settings = AttackConfig(epsilon="8/255", step_size="2/255", steps=1, bn_mode="eval")
    step = make_step(model, optimizer=optimizer, objective=build_objective("at"), attack=settings, average=average)
    expected = {name: buffer.detach().clone() for name, buffer in model.state_dict().items()}
    kept = 0.0
    x, y = 0.9 * images((6, 1, 4, 4), torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    for number in range(5):
        if number == 3:
            # finite images and statistics, and a gradient that is not
            kept = model.fc.bias[0].item()
            with torch.no_grad():
                model.fc.bias[0] = torch.inf
        if free:
            # `FreeStep` calls it before each replay
            average.before_step()
        result = (
            step.free(x + 0.01 * number, y, torch.zeros_like(x))
            if free
            else step(x + 0.01 * number, y, sample_ids=torch.arange(6), seed=number)
        )
        assert bool(result.skipped.all()) == (number == 3)
        if number == 3:
            with torch.no_grad():
                model.fc.bias[0] = kept
            continue
        for name, now in model.state_dict().items():
            weight = statistics == "averaged" and now.is_floating_point() and name != "seen"
            share = 0.2 if number and (weight or "fc" in name or name in ("norm.weight", "norm.bias")) else 1.0
            expected[name] = (expected[name] + share * (now - expected[name])).to(now.dtype)
    for name, averaged in average.model.state_dict().items():
        torch.testing.assert_close(averaged, expected[name], rtol=1e-12, atol=1e-12, msg=name)
    assert average.model.state_dict().keys() == average.state().keys()
    assert average.model.get_buffer("norm.running_mean") != 0


def test_the_average_shares_no_memory_with_the_model():
    model = small_model()
    average = WeightAverage(model, AverageConfig(kind="ema"), epochs=1)
    step_where_it_stands(model, average)
    pointers = {t.data_ptr() for t in model.state_dict().values()}
    assert not pointers & {t.data_ptr() for t in average.model.state_dict().values()}
    before = copy.deepcopy(average.model.state_dict())
    walk(model, 1)
    assert all(torch.equal(v, before[name]) for name, v in average.model.state_dict().items())


def test_statistics_are_the_mean_over_the_passes():
    """Of a layer that is fed directly: mean over passes of the batch's mean and of its unbiased variance."""
    layer = nn.BatchNorm2d(3).double()
    passes = [images((4, 3, 5, 5), torch.float64, seed=s) for s in range(5)]
    layer(7 + passes[0])  # something to forget
    layer.eval()
    recompute_statistics(layer, (layer(x) for x in passes))
    mean = torch.stack([x.mean((0, 2, 3)) for x in passes]).mean(0)
    var = torch.stack([x.var((0, 2, 3), unbiased=True) for x in passes]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, var, rtol=1e-12, atol=1e-12)
    assert layer.momentum == 0.1
    assert not layer.training


def test_a_model_without_batch_norm_needs_no_pass():
    def never():
        pytest.fail("was iterated")
        yield

    recompute_statistics(nn.Linear(2, 2), never())


def test_state_is_written_back_in_place():
    model = small_model()
    average = WeightAverage(model, AverageConfig(kind="ema"), epochs=1)
    for step in range(3):
        walk(model, step)
        step_where_it_stands(model, average)
    other = WeightAverage(small_model(), AverageConfig(kind="ema"), epochs=1)
    for name, tensor in other.state().items():
        tensor.copy_(average.state()[name])
    for a, b in zip(average.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def epochs(*pairs: tuple[float, float | None]) -> list[dict]:
    return [
        {"epoch": number, "train_pgd_accuracy": train, "held_out_pgd_accuracy": held_out}
        for number, (train, held_out) in enumerate(pairs, 1)
    ]


@pytest.mark.parametrize(
    ("pairs", "warned"),
    [
        ([(0.30, 0.30), (0.35, 0.33), (0.80, 0.02)], True),  # what FGSM training does
        ([(0.30, 0.30), (0.35, None), (0.80, 0.02)], True),
        ([(0.30, 0.30), (0.50, 0.45), (0.75, 0.40)], False),  # robust overfitting is slow
        ([(0.27, 0.24), (0.75, 0.126)], False),  # so is the strongest of it, on 500 images (docs/study.md)
        ([(0.50, 0.45), (0.20, 0.10)], False),  # both fell: the optimizer's trouble
        ([(0.80, 0.02)], False),
        ([(0.30, 0.30), (0.80, None)], False),  # not measured in this epoch
    ],
)
def test_catastrophic_overfitting_is_named(pairs, warned):
    said = [text for text in monitor.warnings(epochs(*pairs), 10) if "catastrophic overfitting" in text]
    assert bool(said) == warned
    # without an attack accuracy in training is no accuracy under one
    assert not monitor.warnings(epochs(*pairs), 10, attacked=False)
    if warned:
        assert "epoch 2" in said[0] or "epoch 1" in said[0]
        assert "from 33% to 2%" in said[0] or "from 30% to 2%" in said[0]
        # other methods, and other norms, refuse it
        assert said[0].endswith("with more attack steps or a smaller epsilon")
        (other,) = monitor.warnings(epochs(*pairs), 10, fgsm_rs=True)
        assert other.endswith("with more attack steps, --attack.fast n-fgsm, or a smaller epsilon")


def test_a_fall_without_an_attack_too_is_no_catastrophic_overfitting():
    """Recorded: 4 classes, one of them rare, with balanced weights and a learning rate that was too large."""
    fallen = [
        epoch | {"loss": 1.3, "held_out_clean_accuracy": clean}
        for epoch, clean in zip(epochs((0.17, 0.38), (0.31, 0.03)), (0.4324, 0.0378), strict=True)
    ]
    (said,) = monitor.warnings(fallen, 4, weighted=True)
    assert "unsteady: since epoch 1 held-out accuracy fell from 43% to 4% without an attack and from 38% to 3%" in said
    assert said.endswith("--optimizer.lr, or milder --data.class-weights")
    assert monitor.warnings(fallen, 4)[0].endswith("--optimizer.lr")
    kept = [fallen[0], fallen[1] | {"held_out_clean_accuracy": 0.35}]
    assert "catastrophic overfitting" in monitor.warnings(kept, 4, weighted=True)[0]


def test_masking_and_skipped_steps_are_named():
    history = [{"epoch": 4, "zero_gradients": 0.9, "skipped_steps": 3.0}]
    said = monitor.warnings(history, 10)
    assert any("gradient masking: 90%" in text for text in said)
    assert any("3 steps skipped in epoch 4" in text for text in said)
    said = monitor.warnings([{"epoch": 4, "zero_gradients": 0.01, "nonfinite_gradients": 0.002}], 10)
    assert len(said) == 1
    assert "overflow in the attack: 0.002 of its input gradients were not finite in epoch 4" in said[0]
    fine = {"epoch": 4, "zero_gradients": 0.01, "nonfinite_gradients": 0.0, "skipped_steps": 0.0}
    assert monitor.warnings([fine], 10) == []


def test_a_network_that_only_guesses_is_told_from_masking_and_once():
    dead = [
        {"epoch": epoch, "loss": 2.31, "zero_gradients": 0.9, "held_out_clean_accuracy": accuracy}
        for epoch, accuracy in ((2, 0.104), (3, None))
    ]
    said = monitor.warnings(dead[:1], 10)
    assert len(said) == 1
    assert "training has collapsed: without an attack 10% of held-out images" in said[0]
    assert "--optimizer.lr" in said[0]
    assert monitor.warnings(dead, 10) == []
    # right far more often than by guessing: the gradient is hidden
    masked = dead[0] | {"held_out_clean_accuracy": 0.8}
    assert "gradient masking: 90%" in monitor.warnings([masked], 10)[0]
    saturated = dead[0] | {"loss": 300.0}
    assert "gradient masking: 90%" in monitor.warnings([saturated], 10)[0]


# loss, training accuracy under attack, held-out clean accuracy: runs of the digits preset
RECORDED = {
    "learns slowly": [
        *((2.533, 0.039, None), (2.370, 0.101, 0.236), (2.353, 0.095, None)),
        *((2.329, 0.106, 0.368), (2.291, 0.119, None), (2.283, 0.131, 0.431)),
    ],
    "the preset itself": [
        *((2.534, 0.037, None), (2.377, 0.102, 0.257), (2.365, 0.104, None), (2.343, 0.119, 0.097)),
        *((2.289, 0.127, None), (2.225, 0.177, 0.625), (2.13, 0.209, None)),
    ],
    "learning rate 0.001": [
        *((2.897, 0.001, None), (2.846, 0.0, 0.069), (2.789, 0.0, None), (2.742, 0.0, 0.125)),
        *((2.712, 0.0, None), (2.695, 0.0, 0.153), (2.688, 0.0, None), (2.688, 0.0, 0.153)),
    ],
    "epsilon 0.5": [
        *((2.614, 0.015, None), (2.410, 0.033, 0.146), (2.377, 0.060, None), (2.359, 0.082, 0.132)),
        *((2.333, 0.071, None), (2.322, 0.099, 0.097), (2.313, 0.100, None), (2.310, 0.100, 0.097)),
    ],
}


def history(*epochs: tuple[float, float, float | None]) -> list[dict]:
    names = ("loss", "train_pgd_accuracy", "held_out_clean_accuracy")
    told = (dict(zip(names, numbers, strict=True)) for numbers in epochs)
    return [{"epoch": epoch, "zero_gradients": 0.0, **numbers} for epoch, numbers in enumerate(told, 1)]


@pytest.mark.parametrize(
    ("epochs", "when"),
    [
        (RECORDED["learns slowly"], []),
        (RECORDED["the preset itself"], []),
        (RECORDED["learning rate 0.001"], []),
        (RECORDED["epsilon 0.5"], [6]),
        # it knew more: the second epoch at chance is enough, and the first is not
        ([(2.1, 0.2, 0.4), (2.31, 0.1, 0.1), (2.30, 0.1, None)], [3]),
        ([(2.1, 0.2, 0.4), (2.31, 0.1, 0.1), (2.1, 0.2, 0.4), (2.31, 0.1, 0.1)], []),
        # running statistics that are off for a while: training goes on
        ([(2.1, 0.2, 0.4), (2.05, 0.21, 0.1), (2.02, 0.22, 0.1)], []),
        # slow, but the loss falls
        ([(2.25 - 0.01 * epoch, 0.1, 0.12) for epoch in range(8)], []),
    ],
)
def test_a_collapse_is_told_once_and_slow_learning_is_none(epochs, when):
    told = history(*epochs)
    said = {number: monitor.warnings(told[:number], 10) for number in range(1, len(told) + 1)}
    assert [number for number, texts in said.items() if texts] == when
    # only what knew more can fall
    knew = any(accuracy is not None and accuracy > 0.3 for _, _, accuracy in epochs)
    expected = "training has collapsed: " if knew else "nothing is learnt yet after 6 epochs: "
    assert all(text.startswith(expected) for texts in said.values() for text in texts)


def test_a_collapse_is_told_by_the_methods_own_loss_of_guessing():
    told = history((3.1, 0.2, 0.4), (3.46, 0.1, 0.1), (3.45, 0.1, None))
    assert not monitor.warnings(told, 10)
    assert monitor.warnings(told, 10, guessing=1.5 * math.log(10))[0].startswith("training has collapsed: ")


def test_some_zero_gradients_make_no_collapse_of_what_knew_nothing():
    told = history(*[(2.31, 0.1, 0.1)] * 3)
    assert not any("collapsed" in text for text in monitor.warnings([*told[:2], told[2] | {"zero_gradients": 0.1}], 10))


def test_answers_that_hang_on_no_pixel_are_a_collapse_whatever_the_share_of_their_class():
    """16 of 41 held-out images of three classes were of the one that a dead network named."""
    told = [epoch | {"zero_gradients": 1.0} for epoch in history((1.09, 0.35, 0.39), (1.09, 0.35, 0.39))]
    assert monitor.warnings(told[:1], 3)[0].startswith("training has collapsed: without an attack 39% of held-out")
    assert not monitor.warnings(told, 3)
    # a masked gradient is no collapse
    masked = [epoch | {"zero_gradients": 1.0} for epoch in history((0.4, 0.35, 0.39))]
    assert monitor.warnings(masked, 3)[0].startswith("gradient masking: 100%")


@pytest.mark.parametrize("of_a_twin", [False, True])
def test_passes_over_an_average_ask_for_no_gradient_of_it(of_a_twin):
    """An attack on it would otherwise keep what a second set of gradients needs."""
    model = small_model()
    average = WeightAverage(model, AverageConfig(kind="ema"), epochs=1, twin=small_model() if of_a_twin else None)
    x = images((2, 1, 8, 8), torch.float64)
    assert not average.model(x).requires_grad
    assert model(x).requires_grad

"""PGD on any module."""

import pytest
import torch
import torch.nn.functional as F
from samples import images, stepped_fp64
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from awp_engine.attack import DivergenceFrom, pgd, summed_cross_entropy
from awp_engine.models import build_model
from awp_engine.models.batch_norm import batch_norm_mode
from awp_kernels import pgd_init_

X, Y, IDS = images((6, 1, 8, 8)), torch.arange(6), torch.tensor([5, 9, 0, 2, 7, 1])


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4)
    net.train()
    net(X)  # running statistics that differ from the initial ones
    return net


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("bn_mode", ["train", "eval"])
def test_iterates_equal_a_plain_loop_in_fp64(model, norm, bn_mode):
    model = model.double()
    x, epsilon, step_size = X.double(), 0.1, 0.03
    expected = torch.empty_like(x)
    pgd_init_(expected, x, epsilon=epsilon, norm=norm, sample_ids=IDS, seed=4)
    model.train(bn_mode == "train")
    with batch_norm_mode(model, update_statistics=False):
        for _ in range(4):
            expected.requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(expected), Y), expected)
            expected = stepped_fp64(expected.detach(), grad, x, step_size=step_size, epsilon=epsilon, norm=norm)
    result = pgd(
        model,
        x,
        Y,
        epsilon=epsilon,
        step_size=step_size,
        steps=4,
        norm=norm,
        sample_ids=IDS,
        seed=4,
        bn_mode=bn_mode,
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def state(model: nn.Module):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [getattr(module, "track_running_stats", None) for module in model.modules()],
        [p.grad for p in model.parameters()],
    )


@pytest.mark.parametrize("bn_mode", ["train", "eval"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_leaves_the_model_as_it_was(model, bn_mode, mode):
    model.train(mode == "train")
    before = state(model)
    pgd(model, X, Y, epsilon=0.1, step_size=0.05, steps=2, bn_mode=bn_mode)
    after = state(model)
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert after[1:] == before[1:]


def test_leaves_the_model_as_it_was_after_an_exception(model):
    before = state(model)

    def broken(logits, labels):
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        pgd(model, X, Y, epsilon=0.1, step_size=0.05, steps=2, bn_mode="eval", loss=broken)
    after = state(model)
    assert after[1:] == before[1:]


def test_raises_the_loss(model):
    model.eval()
    attacked = pgd(model, X, Y, epsilon=0.2, step_size=0.05, steps=10)
    start = pgd(model, X, Y, epsilon=0.2, step_size=0.05, steps=0)
    with torch.no_grad():
        clean, begun, end = (float(summed_cross_entropy(model(i), Y)) for i in (X, start, attacked))
    assert end > max(clean, begun) + 0.1
    assert not attacked.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_epsilon_zero_is_the_clean_image(model, norm):
    assert torch.equal(pgd(model, X, Y, epsilon=0.0, step_size=0.1, steps=3, norm=norm), X)


def test_a_sample_is_attacked_alike_in_any_batch(model):
    model = model.double().eval()
    x = X.double()
    arguments = {"epsilon": 0.1, "step_size": 0.03, "steps": 3, "seed": 8}
    whole = pgd(model, x, Y, sample_ids=IDS, **arguments)
    part = pgd(model, x[2:4], Y[2:4], sample_ids=IDS[2:4], **arguments)
    torch.testing.assert_close(part, whole[2:4], rtol=0, atol=1e-12)


def test_mask_keeps_the_rest_of_the_image(model):
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 2:6] = True
    x_adv = pgd(model, X, Y, epsilon=0.3, step_size=0.1, steps=3, mask=mask)
    assert torch.equal(x_adv[..., ~mask], X[..., ~mask])
    assert not torch.equal(x_adv[..., mask], X[..., mask])


def test_16_bit_images_are_attacked_in_fp32(model):
    model.eval()
    x_adv = pgd(model, X.to(torch.bfloat16), Y, epsilon=0.1, step_size=0.03, steps=2)
    assert x_adv.dtype == torch.float32


def test_works_under_no_grad_and_on_any_module():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        x_adv = pgd(net, X, Y, epsilon=0.1, step_size=0.03, steps=2, norm="l2")
    assert ((x_adv - X).double().flatten(1).norm(dim=1) <= 0.1).all()
    assert all(p.grad is None for p in net.parameters())


def mixed(classes: int = 10) -> torch.Tensor:
    return torch.softmax(torch.randn(len(X), classes, generator=torch.Generator().manual_seed(3)), 1)


LOSSES = {
    "labels": lambda model: (summed_cross_entropy, Y),
    "mixtures": lambda model: (summed_cross_entropy, mixed()),
    "divergence": lambda model: (DivergenceFrom(model(X).detach()), Y),
}


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("name", list(LOSSES))
def test_gradients_that_begin_at_the_log_probabilities_have_the_bits_of_the_loss(model, name, scale):
    loss, y = LOSSES[name](model)
    found = []
    # a function that is not known, and one whose value is looked at
    for climbed, nonfinite in ((loss, "ignore"), (lambda logits, y: loss(logits, y), "ignore"), (loss, "raise")):
        seen = []
        weight = model.linear.weight
        x_adv = pgd(
            model,
            X,
            y,
            epsilon=0.1,
            step_size=0.03,
            steps=3,
            start="normal",
            seed=2,
            loss=climbed,
            loss_scale=scale,
            shared=[weight],
            nonfinite=nonfinite,
            observe=lambda step, gradient, seen=seen: seen.append(gradient.clone()),
        )
        assert seen[-1].any()
        found.append([x_adv, *seen, weight.grad])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


class Launches(TorchDispatchMode):
    """The operations that torch sees and that compute: not those that look at memory in another way."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and any(isinstance(argument, torch.Tensor) for argument in args):
            self.names.append(func.name().removeprefix("aten::"))
        return func(*args, **kwargs or {})


def step_launches(loss, y) -> list[str]:
    """What the second of two steps adds, in a model that only looks at its images in another way."""
    counts = []
    for steps in (1, 2):
        with Launches() as seen:
            pgd(nn.Flatten(), mixed()[:, None] / 2, y, epsilon=0.1, step_size=0.03, steps=steps, loss=loss, **OPTIONS)
        counts.append(seen.names)
    more = sorted(counts[1])
    for operation in counts[0]:
        more.remove(operation)
    more.remove("awp::pgd_step_")
    return more


OPTIONS = {"start": "none", "nonfinite": "ignore"}


@pytest.mark.parametrize(("name", "through_the_loss"), [("labels", 6), ("mixtures", 9), ("divergence", 9)])
def test_two_launches_a_step_from_logits_to_their_gradient(name, through_the_loss):
    loss, y = LOSSES[name](lambda x: mixed().log())
    assert step_launches(loss, y) == ["_log_softmax", "_log_softmax_backward_data"]
    assert len(step_launches(lambda logits, y: loss(logits, y), y)) == through_the_loss


def test_a_loss_that_is_looked_at_is_the_loss():
    """The log-probability of a class that the model rules out is not finite, and no part of it."""

    def model(x):
        return torch.cat([x.flatten(1), x.new_full((len(x), 1), -torch.inf)], 1)

    images = mixed()[:, None] / 2
    found = pgd(nn.Flatten(), images, Y, epsilon=0.1, step_size=0.03, steps=2, start="none")
    ruled_out = nn.Module()
    ruled_out.forward = model
    assert torch.equal(pgd(ruled_out, images, Y, epsilon=0.1, step_size=0.03, steps=2, start="none"), found)

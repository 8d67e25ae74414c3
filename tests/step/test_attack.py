"""PGD on any module."""

import pytest
import torch
import torch.nn.functional as F
from samples import images, stepped_fp64
from torch import nn

from awp_engine.attack import pgd, summed_cross_entropy
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

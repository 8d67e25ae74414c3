"""AdversarialWeightPerturbation in other people's training loops."""

import copy

import pytest
import torch
import torch.nn.functional as F
from samples import perturbed_fp64, randn
from torch import nn

from awp_engine.models import build_model
from awp_kernels import AdversarialWeightPerturbation


class Net(nn.Module):
    """A bit of everything: convolution, normalisation, a 1-D weight, a bias, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.hidden.weight
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.head(F.relu(self.tied(F.relu(self.hidden(x)))))


@pytest.fixture
def net():
    torch.manual_seed(1)
    return Net()


X, Y = randn((6, 3, 5, 5), seed=2), torch.arange(6)


def weight_bits(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone().view(torch.int32) for p in model.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_moves_the_papers_tensors_and_puts_them_back(net):
    awp = AdversarialWeightPerturbation(net, gamma=0.01)
    assert list(awp.parameters) == ["conv.weight", "hidden.weight", "head.weight"]
    before = weight_bits(net)
    F.cross_entropy(net(X), Y).backward()
    weights = [p.detach().clone() for p in awp.parameters.values()]
    grads = [p.grad.clone() for p in awp.parameters.values()]
    expected, _ = perturbed_fp64(weights, grads, 0.01, "layer")
    with awp.perturbed():
        assert all(p.grad is None for p in net.parameters())
        for parameter, exact in zip(awp.parameters.values(), expected, strict=True):
            torch.testing.assert_close(parameter.detach().double(), exact, rtol=1e-6, atol=1e-8)
        loss = F.cross_entropy(net(X), Y)
        loss.backward()
    assert same(weight_bits(net), before)
    assert all(p.grad is not None for p in net.parameters())


def test_the_descent_gradient_is_that_of_the_perturbed_weights(net):
    other = copy.deepcopy(net)
    awp = AdversarialWeightPerturbation(net, gamma=0.02)
    F.cross_entropy(net(X), Y).backward()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in awp.parameters:
                g = awp.parameters[name].grad
                parameter.add_(0.02 * parameter.norm() / g.norm() * g)
    F.cross_entropy(other(X), Y).backward()
    with awp.perturbed():
        F.cross_entropy(net(X), Y).backward()
    for (name, a), (_, b) in zip(net.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_weights_are_back_after_an_exception(net):
    awp = AdversarialWeightPerturbation(net, gamma=0.5)
    before = weight_bits(net)
    F.cross_entropy(net(X), Y).backward()
    with pytest.raises(KeyboardInterrupt), awp.perturbed():
        assert not same(weight_bits(net), before)
        raise KeyboardInterrupt
    assert same(weight_bits(net), before)
    F.cross_entropy(net(X), Y).backward()
    with awp.perturbed():
        F.cross_entropy(net(X), Y).backward()
    assert same(weight_bits(net), before)


def test_misuse_is_named(net):
    awp = AdversarialWeightPerturbation(net, gamma=0.01)
    with pytest.raises(RuntimeError, match="call backward"), awp.perturbed():
        pass
    F.cross_entropy(net(X), Y).backward()
    with awp.perturbed(), pytest.raises(RuntimeError, match="perturbed already"):
        F.cross_entropy(net(X), Y).backward()
        awp.perturb_()
    with pytest.raises(ValueError, match="gamma: expected a finite number >= 0, got nan"):
        AdversarialWeightPerturbation(net, gamma=float("nan"))
    with pytest.raises(ValueError, match="scope: expected one of layer, global, filter, got 'row'"):
        AdversarialWeightPerturbation(net, gamma=0.1, scope="row")
    with pytest.raises(ValueError, match="model: no trainable parameter"):
        AdversarialWeightPerturbation(nn.BatchNorm2d(3), gamma=0.1)


def test_frozen_and_unused_parameters_stay(net):
    net.conv.weight.requires_grad_(False)
    net.spare = nn.Linear(3, 3)
    awp = AdversarialWeightPerturbation(net, gamma=0.01)
    assert "conv.weight" not in awp.parameters
    before = weight_bits(net)
    F.cross_entropy(net(X), Y).backward()
    with awp.perturbed():
        moved = weight_bits(net)
        assert torch.equal(moved[0], before[0])
    assert same(weight_bits(net), before)


def test_autocast_sees_the_perturbed_weights(net):
    """Autocast caches its casts: without clearing, the move inside the block would be ignored."""
    awp = AdversarialWeightPerturbation(net.eval(), gamma=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        plain = net(X)
        F.cross_entropy(plain.float(), Y).backward()
        with awp.perturbed():
            perturbed = net(X).detach()
        restored = net(X).detach()
    assert not torch.equal(perturbed, plain.detach())
    assert torch.equal(restored, plain.detach())


def test_the_direction_ignores_the_loss_scale(net):
    awp = AdversarialWeightPerturbation(net.eval(), gamma=0.01)
    moved = []
    for scale in (1.0, 65536.0):
        net.zero_grad()
        (F.cross_entropy(net(X), Y) * scale).backward()
        with awp.perturbed():
            moved.append([p.detach().clone() for p in awp.parameters.values()])
    for a, b in zip(*moved, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_parameters_of_several_dtypes(net):
    net.hidden.weight.data = net.hidden.weight.data.to(torch.float64)
    awp = AdversarialWeightPerturbation(net, gamma=0.01)
    before = {name: p.detach().clone() for name, p in awp.parameters.items()}
    for parameter in awp.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    with awp.perturbed():
        assert all(not torch.equal(p, before[name]) for name, p in awp.parameters.items())
    assert all(torch.equal(p, before[name]) for name, p in awp.parameters.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_preact_resnet_18_restores_every_bit(dtype):
    """Perturb and restore all 11 million weights: 0 differing bits in every dtype."""
    torch.manual_seed(0)
    model = build_model("preact-resnet-18", 10, (0.5,) * 3, (0.25,) * 3).to(dtype)
    awp = AdversarialWeightPerturbation(model, gamma=0.01)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = randn(tuple(parameter.shape), dtype, index, 1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}[torch.empty((), dtype=dtype).element_size()]
    with awp.perturbed():
        changed = sum(int((p != before[name]).sum()) for name, p in awp.parameters.items())
        assert changed > 0.3 * sum(p.numel() for p in awp.parameters.values())
    differing = sum(
        int((p.detach().view(width) != before[name].view(width)).sum()) for name, p in model.named_parameters()
    )
    assert differing == 0


def test_training_with_it_equals_training_by_hand(net):
    """Twenty SGD steps with momentum, against a loop that copies and restores by itself."""
    other = copy.deepcopy(net)
    awp = AdversarialWeightPerturbation(net, gamma=0.01)
    ours = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        F.cross_entropy(net(X), Y).backward()
        with awp.perturbed():
            F.cross_entropy(net(X), Y).backward()
        ours.step()
        ours.zero_grad()

        F.cross_entropy(other(X), Y).backward()
        saved = {}
        with torch.no_grad():
            for name, p in other.named_parameters():
                if p.ndim > 1:
                    saved[name] = p.clone()
                    p.add_(0.01 * p.norm() / (p.grad.norm() + 1e-20) * p.grad)
        other.zero_grad()
        F.cross_entropy(other(X), Y).backward()
        with torch.no_grad():
            for name, copied in saved.items():
                other.get_parameter(name).copy_(copied)
        theirs.step()
        theirs.zero_grad()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

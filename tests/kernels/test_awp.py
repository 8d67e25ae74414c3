"""AdversarialWeightPerturbation in other people's training loops."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from samples import VARIANTS, perturbed_fp64, randn
from torch import Tensor, nn

from awp_engine.models import build_model
from awp_kernels import AdversarialWeightPerturbation, asam, every_parameter, sam


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
    with pytest.raises(ValueError, match="scale: expected one of relative, absolute, elementwise, got 'sam'"):
        AdversarialWeightPerturbation(net, gamma=0.1, scale="sam")
    with pytest.raises(ValueError, match=r"eta: scale 'elementwise' alone takes it, got 0\.1 with scale 'absolute'"):
        AdversarialWeightPerturbation(net, gamma=0.1, scale="absolute", eta=0.1)
    with pytest.raises(ValueError, match="adaptive: scale 'elementwise' alone takes it, got scale 'relative'"):
        AdversarialWeightPerturbation(net, gamma=0.1, adaptive=every_parameter)
    with pytest.raises(ValueError, match="bound: expected a finite number >= 0, got -1"):
        AdversarialWeightPerturbation(net, gamma=0.1, bound=-1.0)
    for method in (sam, asam):
        with pytest.raises(ValueError, match=r"rho: expected a finite number >= 0, got -0\.1"):
            method(net, rho=-0.1)
        with pytest.raises(ValueError, match="model: no trainable parameter"):
            method(nn.ReLU())
    net.zero_grad()
    with pytest.raises(RuntimeError, match="weights are not perturbed: again=True takes a further step"):
        awp.perturb_(again=True)


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


# ---- SAM, ASAM and the bounded AWP, as their public code computes them, written for the tests from its description


class PublicSam:
    """The widespread PyTorch version: `adaptive` multiplies by w^2, without eta, in every parameter."""

    def __init__(self, parameters: list[Tensor], rho: float, *, adaptive: bool) -> None:
        self.parameters, self.rho, self.adaptive = parameters, rho, adaptive

    def norm(self) -> Tensor:
        return torch.stack([((p.abs() if self.adaptive else 1.0) * p.grad).norm(p=2) for p in self.parameters]).norm(
            p=2
        )

    @torch.no_grad()
    def ascend(self) -> None:
        scale = self.rho / (self.norm() + 1e-12)
        self.old = [p.clone() for p in self.parameters]
        for p in self.parameters:
            p.add_((p**2 if self.adaptive else 1.0) * p.grad * scale)

    @torch.no_grad()
    def descend(self) -> None:
        for p, old in zip(self.parameters, self.old, strict=True):
            p.copy_(old)


class PublicAsam:
    """The authors' version: gradients are multiplied by T where "weight" is in the name, twice."""

    def __init__(self, model: nn.Module, rho: float, eta: float) -> None:
        self.model, self.rho, self.eta = model, rho, eta

    @torch.no_grad()
    def ascend(self) -> None:
        norms, factors = [], {}
        for name, p in self.model.named_parameters():
            if "weight" in name:
                factors[name] = p.abs() + self.eta
                p.grad.mul_(factors[name])
            norms.append(p.grad.norm(p=2))
        norm = torch.stack(norms).norm(p=2) + 1e-16
        self.steps = {}
        for name, p in self.model.named_parameters():
            if name in factors:
                p.grad.mul_(factors[name])
            self.steps[name] = p.grad.clone().mul_(self.rho / norm)
        self.old = [p.clone() for p in self.model.parameters()]
        for name, p in self.model.named_parameters():
            p.add_(self.steps[name])

    @torch.no_grad()
    def descend(self) -> None:
        for p, old in zip(self.model.parameters(), self.old, strict=True):
            p.copy_(old)


class PublicBoundedAwp:
    """The language-model fine-tuners' version: `adv_lr` is gamma, `adv_eps` the bound, for names with `adv_param`."""

    def __init__(self, model: nn.Module, *, adv_lr: float, adv_eps: float, adv_param: str, e: float) -> None:
        self.model, self.adv_lr, self.adv_eps, self.adv_param, self.e = model, adv_lr, adv_eps, adv_param, e
        self.backup, self.backup_eps = {}, {}

    def chosen(self) -> list[tuple[str, Tensor]]:
        named = self.model.named_parameters()
        return [(n, p) for n, p in named if p.requires_grad and p.grad is not None and self.adv_param in n]

    @torch.no_grad()
    def ascend(self) -> None:
        for name, p in self.chosen():
            if name not in self.backup:
                self.backup[name] = p.clone()
                grad_eps = self.adv_eps * p.abs()
                self.backup_eps[name] = (self.backup[name] - grad_eps, self.backup[name] + grad_eps)
        for name, p in self.chosen():
            norm1, norm2 = p.grad.norm(), p.norm()
            if norm1 != 0 and not norm1.isnan():
                p.add_(self.adv_lr * p.grad / (norm1 + self.e) * (norm2 + self.e))
                low, high = self.backup_eps[name]
                p.copy_(torch.min(torch.max(p, low), high))

    @torch.no_grad()
    def descend(self) -> None:
        for name, p in self.model.named_parameters():
            if name in self.backup:
                p.copy_(self.backup[name])
        self.backup, self.backup_eps = {}, {}


@torch.no_grad()
def relative(result: nn.Module, expected: nn.Module) -> float:
    pairs = zip(result.parameters(), expected.parameters(), strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in pairs)


def bounded(model: nn.Module) -> AdversarialWeightPerturbation:
    def select(name: str, parameter: Tensor) -> bool:
        return "h" in name

    return AdversarialWeightPerturbation(model, 0.05, bound=0.03, select=select)


METHODS = {
    "sam": (
        lambda model: sam(model, rho=0.05),
        lambda model: PublicSam(list(model.parameters()), 0.05, adaptive=False),
    ),
    "adaptive-sam-without-eta": (
        lambda model: asam(model, rho=0.5, eta=0.0, adaptive=every_parameter, eps=1e-12),
        lambda model: PublicSam(list(model.parameters()), 0.5, adaptive=True),
    ),
    "asam": (lambda model: asam(model, rho=0.5, eta=0.01), lambda model: PublicAsam(model, 0.5, 0.01)),
    # its e is 1e-6 and also added to ||w||, which the operation does not do: the definitions meet as e goes to 0
    "bounded": (bounded, lambda model: PublicBoundedAwp(model, adv_lr=0.05, adv_eps=0.03, adv_param="h", e=1e-20)),
}


@pytest.mark.parametrize("method", list(METHODS))
def test_training_as_the_public_code_does_in_fp64(net, method):
    """Weights at w + v and after every step, to 1e-12 of their norm; batch normalisation in the model."""
    net = net.double()
    other = copy.deepcopy(net)
    make, make_public = METHODS[method]
    awp, public = make(net), make_public(other)
    ours = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    x = X.double()
    for _ in range(5):
        start = copy.deepcopy(net)
        F.cross_entropy(other(x), Y).backward()
        public.ascend()
        other.zero_grad()
        F.cross_entropy(net(x), Y).backward()
        with awp.perturbed():
            assert relative(net, other) <= 1e-12
            assert relative(net, start) > 1e-4
            F.cross_entropy(net(x), Y).backward()
        assert relative(net, start) == 0
        ours.step()
        ours.zero_grad()
        F.cross_entropy(other(x), Y).backward()
        public.descend()
        theirs.step()
        theirs.zero_grad()
        assert relative(net, other) <= 1e-12


def test_the_public_codes_own_epsilon_moves_little(net):
    """e = 1e-6 on both norms, as the public bounded AWP has it: within e / ||w|| + e / ||g|| of ours."""
    net = net.double()
    other = copy.deepcopy(net)
    awp, public = bounded(net), PublicBoundedAwp(other, adv_lr=0.05, adv_eps=0.03, adv_param="h", e=1e-6)
    for model in (net, other):
        F.cross_entropy(model(X.double()), Y).backward()
    grad_norm = min(float(p.grad.norm()) for p in awp.parameters.values())
    weight_norm = min(float(p.detach().norm()) for p in awp.parameters.values())
    public.ascend()
    with awp.perturbed():
        assert relative(net, other) <= 0.05 * (1e-6 / grad_norm + 1e-6 / weight_norm)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_method_restores_every_bit_and_names_what_moves(net, method, dtype):
    net = net.to(dtype)
    awp = METHODS[method][0](net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    F.cross_entropy(net(X.to(dtype)), Y).backward()
    with awp.perturbed():
        moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert set(awp.parameters) == ({n for n in before if "h" in n} if method == "bounded" else set(before))
    # a bias before a normalisation has no gradient, one of 0 no |w|, and bfloat16 few digits
    assert {"head.weight"} <= moved <= set(awp.parameters)
    word = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert all(torch.equal(p.detach().view(word), before[name].view(word)) for name, p in net.named_parameters())


@pytest.mark.parametrize("method", list(METHODS))
def test_every_direction_ignores_the_loss_scale_and_adds_up_over_micro_batches(net, method):
    """Under a gradient scaler, and with the batch in two halves, the weights move as without."""
    awp, moved = METHODS[method][0](net.eval()), []
    for scale, parts in ((1.0, 1), (65536.0, 1), (1.0, 2)):
        net.zero_grad()
        for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
            (F.cross_entropy(net(x), y) * scale / parts).backward()
        with awp.perturbed():
            moved.append([p.detach().clone() for p in awp.parameters.values()])
    for other in moved[1:]:
        for a, b in zip(other, moved[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_all_options_reach_the_operation(net, variant):
    options = dict(VARIANTS[variant])
    gamma = options.pop("gamma")
    chosen = {"adaptive": lambda name, parameter: parameter.ndim > 2} if "scale" in options else {}
    chosen = chosen if options.get("scale") == "elementwise" else {}
    awp = AdversarialWeightPerturbation(net, gamma, scope="filter", **options, **chosen)
    F.cross_entropy(net(X), Y).backward()
    weights = [p.detach().clone() for p in awp.parameters.values()]
    flags = [w.ndim > 2 for w in weights] if chosen else None
    grads = [p.grad.clone() for p in awp.parameters.values()]
    expected, _ = perturbed_fp64(weights, grads, gamma, "filter", adaptive=flags, **options)
    with awp.perturbed():
        for parameter, exact in zip(awp.parameters.values(), expected, strict=True):
            torch.testing.assert_close(parameter.detach().double(), exact, rtol=1e-6, atol=1e-8)


# ---- several ascent steps


@pytest.mark.parametrize("bound", [None, 0.02])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_several_ascent_steps(net, bound, dtype):
    """Each from where the one before has led; the bound holds around the start, and the start comes back."""
    net = net.to(dtype)
    other, x = copy.deepcopy(net), X.to(dtype)
    awp = AdversarialWeightPerturbation(net, gamma=0.01, bound=bound)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    F.cross_entropy(net(x), Y).backward()
    with awp.perturbed():
        for _ in range(3):
            F.cross_entropy(net(x), Y).backward()
            awp.perturb_(again=True)
            assert all(p.grad is None for p in net.parameters())
        moved = {name: p.detach().clone() for name, p in net.named_parameters()}
        displacement = awp.displacement()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())

    for _ in range(4):
        other.zero_grad()
        F.cross_entropy(other(x), Y).backward()
        with torch.no_grad():
            for name, p in other.named_parameters():
                if name in awp.parameters:
                    p.add_(0.01 * p.norm() / (p.grad.norm() + 1e-20) * p.grad)
                    if bound is not None:
                        reach = bound * before[name].abs()
                        p.copy_(torch.maximum(torch.minimum(p, before[name] + reach), before[name] - reach))
    rtol = 1e-12 if dtype == torch.float64 else 1e-4
    for name, p in other.named_parameters():
        torch.testing.assert_close(moved[name], p.detach(), rtol=rtol, atol=rtol * 0.1)
        if name in awp.parameters:
            torch.testing.assert_close(displacement[name], moved[name] - before[name])
            if bound is not None:
                reach = bound * before[name].double().abs()
                assert ((moved[name].double() - before[name].double()).abs() <= reach).all()
                assert ((moved[name].double() - before[name].double()).abs() >= 0.999 * reach).any()


def test_a_further_step_saves_what_moves_for_the_first_time(net):
    """A parameter without a gradient in the first step joins in the second, and comes back too."""
    before = weight_bits(net)
    awp = sam(net, rho=0.1)
    F.cross_entropy(net(X), Y).backward()
    net.conv.weight.grad = None
    with awp.perturbed():
        assert torch.equal(weight_bits(net)[0], before[0])
        F.cross_entropy(net(X), Y).backward()
        awp.perturb_(again=True)
        assert not torch.equal(weight_bits(net)[0], before[0])
        with pytest.raises(RuntimeError, match="no gradients to perturb along"):
            awp.perturb_(again=True)
        with pytest.raises(RuntimeError, match="perturbed already"):
            awp.perturb_()
    assert same(weight_bits(net), before)


def test_one_norm_needs_one_dtype(net):
    net.hidden.weight.data = net.hidden.weight.data.to(torch.float64)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    for method in (sam(net), asam(net)):
        with pytest.raises(RuntimeError, match="scope 'global' needs all perturbed parameters to be of one dtype"):
            method.perturb_()


# ---- directions that are not finite


FOLLOWED = {
    "layer": lambda net, **options: AdversarialWeightPerturbation(net, 0.01, **options),
    "layer-bounded": lambda net, **options: AdversarialWeightPerturbation(net, 0.01, bound=0.1, **options),
    "filter": lambda net, **options: AdversarialWeightPerturbation(net, 0.01, scope="filter", **options),
    "sam": lambda net, **options: sam(net, **options),
    "asam": lambda net, **options: asam(net, **options),
}


def backward(net: nn.Module, spoiled: bool) -> None:
    F.cross_entropy(net(X.to(net.head.weight.dtype)).float(), Y).backward()
    if spoiled:
        net.head.weight.grad[3, 0] = torch.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("method", list(FOLLOWED))
def test_a_direction_that_is_not_finite_is_not_followed(net, method, dtype):
    """The layer, the filter or the model stays at w; the rest moves; a further step counts by itself."""
    net = net.to(dtype)
    awp = FOLLOWED[method](net)
    assert awp.found_inf is None
    before = {name: p.detach().clone() for name, p in awp.parameters.items()}

    def moved() -> list[str]:
        held = "head.weight" if method != "filter" else "head.weight, row 3"
        found = {name: not torch.equal(p, before[name]) for name, p in awp.parameters.items()}
        if method == "filter":
            found[held] = not torch.equal(net.head.weight[3], before["head.weight"][3])
        return [name for name, different in found.items() if different]

    backward(net, spoiled=True)
    with awp.perturbed():
        flag = awp.found_inf
        assert (flag, flag.dtype, flag.shape) == (1, torch.float32, ())
        first = moved()
        assert all(p.isfinite().all() for p in net.parameters())
        backward(net, spoiled=False)
        awp.perturb_(again=True)
        assert flag == 1  # of the ascent as a whole
        assert len(moved()) > len(first)
    assert first == ([] if "sam" in method else [n for n in before if n != "head.weight" or method == "filter"])
    backward(net, spoiled=False)
    with awp.perturbed():
        assert awp.found_inf is flag
        assert flag == 0
        everything, at = moved(), {name: p.detach().clone() for name, p in awp.parameters.items()}
        backward(net, spoiled=True)
        awp.perturb_(again=True)
        assert flag == 1
        assert torch.equal(net.head.weight[3], at["head.weight"][3])
        assert all(p.isfinite().all() for p in net.parameters())
    assert {*before} - {*everything} <= {"conv.bias"}  # without a gradient, before batch normalisation
    assert all(torch.equal(p, before[name]) for name, p in awp.parameters.items())


@pytest.mark.parametrize("method", [name for name in FOLLOWED if "sam" not in name])
def test_a_working_copy_is_at_the_rounded_weights_where_nothing_is_followed(net, method):
    copied = copy.deepcopy(net).half()
    awp = FOLLOWED[method](net, working=copied)
    backward(copied, spoiled=True)
    awp.perturb_()
    assert awp.found_inf == 1
    rows = slice(3, 4) if method == "filter" else slice(None)
    assert torch.equal(copied.head.weight[rows], net.head.weight[rows].half())
    assert not torch.equal(copied.conv.weight, net.conv.weight.half())
    assert all(p.isfinite().all() for p in copied.parameters())
    awp.restore_()
    assert all(torch.equal(p, master.half()) for p, master in zip(copied.parameters(), net.parameters(), strict=True))


# ---- a user's loop with torch.amp.GradScaler, as README has it


def train(make, overflow: str = "", without: str = "") -> tuple[nn.Module, list[float]]:
    """200 steps of README's three lines under a scaler in float16; the model, and the losses of the descents.

    Args:
        make: the perturbation of a model.
        overflow: the passes, "ascent" or "both", whose loss every tenth step lifts out of float16's range.
        without: what every tenth step does not do, the "ascent" or "step", for comparison.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    awp, optimizer = make(model), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # a scale that is halved by every tenth step grows again in between
    halved = "both" in overflow or "step" in without
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=9 if halved else 1000)
    x, y = randn((64, 20), seed=3), torch.randint(0, 10, (64,), generator=torch.Generator().manual_seed(4))
    losses = []
    for step in range(200):
        rows, tenth = slice(step % 4 * 16, step % 4 * 16 + 16), step % 10 == 9

        def backward(lifted: bool) -> float:
            with torch.autocast("cpu", torch.float16):
                loss = F.cross_entropy(model(x[rows]).float(), y[rows])  # noqa: B023
            scaler.scale(loss * 2.0**30 if lifted else loss).backward()
            return loss.item()

        if tenth and without == "step":
            scaler.update(scaler.get_scale() / 2)
            continue
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]
        backward(lifted=tenth and overflow != "")
        with contextlib.nullcontext() if tenth and without == "ascent" else awp.perturbed():
            if tenth and without:
                optimizer.zero_grad()
            else:
                assert awp.found_inf == (tenth and overflow != "")
            losses.append(backward(lifted=tenth and overflow == "both"))
        scaler.step(optimizer)
        scaler.update()
        assert same(before, model.parameters()) == (tenth and overflow == "both")
        assert all(value.isfinite().all() for value in model.state_dict().values()), f"step {step}"
    return model, losses


LOOPS = {
    "awp": lambda model: AdversarialWeightPerturbation(model, 0.01),
    "sam": lambda model: sam(model, 0.05),
    "asam": lambda model: asam(model, 0.5),
}


@pytest.mark.parametrize("method", list(LOOPS))
def test_overflows_in_a_users_loop(method):
    """Every tenth step overflows: statistics and weights stay finite, and the losses are as without.

    As without: to the bit those of a loop that leaves out such a step, or, where the ascent alone overflows, its
    perturbation; and at most 40 of 200 steps behind a loop in which nothing overflows.
    """
    _, plain = train(LOOPS[method])
    behind = sum(plain[120:160]) / 40
    assert behind < 0.9 * plain[0]
    for overflow, without in (("both", "step"), ("ascent", "ascent")):
        model, losses = train(LOOPS[method], overflow=overflow)
        other, expected = train(LOOPS[method], without=without)
        assert [loss for step, loss in enumerate(losses) if step % 10 != 9 or overflow == "ascent"] == expected
        assert same(model.parameters(), other.parameters())
        assert sum(losses[160:]) / 40 < behind
        assert model.eval()(randn((6, 20), seed=2)).isfinite().all()

"""Models whose first convolution computes in 16 bits over filled-up channels, and the attack's steps that feed them."""

import copy

import pytest
import torch
from digits_model import digits, robust_model
from samples import images
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from awp_engine.attack import Attack, pgd, summed_cross_entropy
from awp_engine.models import NormalizedImages, build_model
from awp_engine.models.batch_norm import batch_norm_mode
from awp_engine.models.layers import Head, NormalizedClassifier, Stem
from awp_engine.step.precision import Precision, WorkingModels, frozen_view, working_copy
from awp_kernels import pgd_step_, use_backend

MEAN, STD = (0.45, 0.5, 0.55), (0.2, 0.25, 0.3)
X, Y = images((6, 3, 12, 10)).contiguous(memory_format=torch.channels_last), torch.arange(6)
SETTINGS = {"epsilon": 0.1, "step_size": 0.03, "steps": 4, "seed": 4}
HALVES = [torch.float16, torch.bfloat16]


def model_of(name: str = "preact-resnet-digits", dtype: torch.dtype = torch.float32, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(name, 10, MEAN[:channels], STD[:channels]).train()
    with torch.no_grad():
        model(images((8, channels, 32, 32)))  # running statistics that differ from the initial ones
    return model.to(dtype).to(memory_format=torch.channels_last)


def narrow(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy; in 16 bits a working copy."""
    copied = copy.deepcopy(model) if dtype == torch.float64 else working_copy(model, dtype)
    copied.narrow_input_(dtype)
    return copied


class Counted(TorchDispatchMode):
    """How often the package's operations are called, by name; models compute by torch's own meanwhile."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "awp":
            name = func.name().removeprefix("awp::")
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["preact-resnet-digits", "wrn-10-2"])
@pytest.mark.parametrize("channels", [1, 3])
def test_logits_and_gradients_are_the_models_own_in_fp64(name, channels):
    """From images, and from what `normalize` makes of them."""
    model = model_of(name, torch.float64, channels).eval()
    filled, x = narrow(model, torch.float64), images((2, channels, 32, 32), torch.float64)
    found = []
    for module in (model, filled):
        leaf = x.clone().requires_grad_()
        logits = module(leaf)
        loss = cross_entropy(logits, Y[:2])
        found.append([logits, *torch.autograd.grad(loss, [leaf, *module.parameters()])])
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    values = filled.normalize(x)
    assert values.shape[1] == 8
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(filled(NormalizedImages(values)), filled(x))
    assert torch.equal(model(NormalizedImages(model.normalize(x))), model(x))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_logits_of_16_bits_are_near(dtype):
    """The images' rounding is that of the weights, which a working copy rounds too."""
    model = model_of().eval()
    expected, half, filled = model(X), working_copy(model, dtype)(X), narrow(model, dtype)(X)
    assert filled.dtype == torch.float32
    assert (filled - expected).norm() < 2 * (half - expected).norm() + 1e-3


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("bn_mode", ["eval", "train"])
def test_the_attack_is_the_plain_one_in_fp64(norm, masked, bn_mode):
    """Images, what is observed, and gradients that it shares."""
    model = model_of(dtype=torch.float64)
    found = []
    for module in (model, narrow(model, torch.float64)):
        seen: list[torch.Tensor] = []
        x_adv = pgd(
            module,
            X.double(),
            Y,
            norm=norm,
            bn_mode=bn_mode,
            mask=X[0] > 0.5 if masked else None,
            shared=[module.conv1.weight],
            observe=lambda step, gradient, seen=seen: seen.append(gradient),
            **SETTINGS,
        )
        assert not x_adv.requires_grad
        assert x_adv.is_contiguous(memory_format=torch.channels_last)
        found.append([x_adv, *seen, module.conv1.weight.grad])
    assert len(found[0]) == 2 + SETTINGS["steps"]
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_what_nobody_observes_is_not_computed():
    """The gradient for the images, which takes a division: a training step looks at the last one alone."""
    model, seen = narrow(model_of(), torch.bfloat16), []
    divided = []

    class Divided(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            divided.extend([func] if func is torch.ops.aten.div.Tensor and args[0].shape == X.shape else [])
            return func(*args, **kwargs or {})

    with Divided():
        attack = Attack(start="uniform", **SETTINGS)
        attack(model, X, Y, observe=lambda step, gradient: seen.append(step), observe_from=SETTINGS["steps"] - 1)
    assert seen == [SETTINGS["steps"] - 1]
    # the first images are normalised by one, too
    assert len(divided) == 2


def looped(model, x, start, *, norm, steps, epsilon, step_size):
    """The attack by plain passes from fp32 images."""
    x_adv = start.clone()
    with batch_norm_mode(model.eval(), update_statistics=False):
        for _ in range(steps):
            leaf = x_adv.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(summed_cross_entropy(model(leaf), Y), leaf)
            with use_backend("reference"):  # which has another order of sums than C++
                pgd_step_(x_adv, gradient, x, step_size=step_size, epsilon=epsilon, norm=norm)
    return x_adv


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
def test_the_attack_in_16_bits_is_to_the_bit_a_loop_over_fp32_images(norm, dtype, order):
    """And every step is one operation, which makes the next pass's input."""
    model, x = narrow(model_of(), dtype), X.contiguous(memory_format=order)
    settings = {name: value for name, value in SETTINGS.items() if name != "seed"}
    start = (x + 0.05 * torch.sin(torch.arange(x.numel()).float()).view(x.shape)).clamp(0, 1)
    x_adv = pgd(model, x, Y, norm=norm, start=start, nonfinite="ignore", **settings)
    with Counted() as counted:
        pgd(model, x, Y, norm=norm, start=start, nonfinite="ignore", **settings)
    assert counted.calls == {"pgd_step_normalize_": 4}
    assert torch.equal(x_adv, looped(model, x, start, norm=norm, **settings))
    assert x_adv.dtype == torch.float32
    assert x_adv.is_contiguous(memory_format=order)
    delta = (x_adv.double() - x.double()).flatten(1)
    assert (delta.abs().amax() if norm == "linf" else delta.norm(dim=1).amax()) <= SETTINGS["epsilon"]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_narrow_input_reaches_the_same_loss(dtype):
    """Within 0.5%, measured by the fp32 model on the attacked images, from the same start."""
    model, split = copy.deepcopy(robust_model()), digits().test
    x, y = split.images.float().div(255), split.labels
    settings = {"epsilon": 0.2, "step_size": 0.05, "steps": 10, "bn_mode": "eval", "seed": 3}
    attacked = [pgd(m, x, y, **settings) for m in (model, narrow(model, dtype))]
    with torch.no_grad():
        full, half = (float(cross_entropy(model(z), y)) for z in attacked)
    assert abs(half / full - 1) < 0.005


class Small(NormalizedClassifier):
    """A model without buffers, whose parameters may all be in 16 bits."""

    def __init__(self) -> None:
        super().__init__(10, MEAN, STD)
        self.conv1, self.linear = Stem(3, 16, kernel_size=3), Head(16, 10)

    def forward(self, images):
        return self.linear(self.conv1(self.normalize(images)).relu())


@pytest.mark.parametrize("parameters", ["all", "of convolutions and linear layers"])
def test_gradients_of_fp16_are_observed_and_shared_at_the_losss_scale(parameters):
    """Where all parameters are in fp16, the attack lifts what it climbs."""
    torch.manual_seed(0)
    model = Small() if parameters == "all" else model_of()
    exact, half = copy.deepcopy(model).double(), narrow(model, torch.float16)
    if parameters == "all":
        for parameter in half.parameters():
            parameter.data = parameter.data.half()
    found = []
    for module in (exact, half):
        seen: list[torch.Tensor] = []
        with Counted() as counted:
            pgd(
                module,
                X.to(module.mean.dtype),
                Y,
                start="none",
                shared=[module.conv1.weight],
                observe=lambda step, gradient, seen=seen: seen.append(gradient),
                epsilon=0.1,
                step_size=0.01,
                steps=1,
            )
        found.append([*seen, module.conv1.weight.grad])
    assert "pgd_step_normalize_" in counted.calls
    for ours, expected in zip(found[1], found[0], strict=True):
        assert ours.shape == expected.shape
        assert (ours.double() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_gradients_that_are_not_finite_are_refused_or_leave_the_image(norm):
    """An overflow of fp16 in the gradient of one image."""
    model = narrow(model_of(), torch.float16)
    weight = torch.ones(6)
    weight[2] = 1e9

    def loss(logits, labels):
        return (cross_entropy(logits, labels, reduction="none") * weight).sum()

    settings = SETTINGS | {"loss": loss, "norm": norm, "start": "none"}
    with pytest.raises(FloatingPointError, match="loss or gradient is not finite"):
        pgd(model, X, Y, **settings)
    x_adv = pgd(model, X, Y, nonfinite="ignore", **settings)
    moved = (x_adv != X).flatten(1).float().mean(1)
    assert x_adv.isfinite().all()
    assert moved[torch.arange(6) != 2].min() > 0.5
    # of Linf steps the values whose gradient is infinite still have a sign
    assert moved[2] == 0 or norm == "linf"


def test_images_without_a_gradient_stay():
    model = narrow(model_of(), torch.bfloat16)
    x_adv = pgd(model, X, Y, loss=lambda logits, labels: 0 * logits.sum(), start="none", **SETTINGS)
    assert torch.equal(x_adv, X)


def test_compiled_models_are_fed_alike():
    """By the same operation."""
    model = narrow(model_of(dtype=torch.float64), torch.float64).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=False, backend="aot_eager", fullgraph=True)
    expected = pgd(model, X.double(), Y, **SETTINGS)
    with torch.profiler.profile() as profile:
        x_adv = pgd(compiled, X.double(), Y, **SETTINGS)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["awp::pgd_step_normalize_"] == SETTINGS["steps"]
    torch.testing.assert_close(x_adv, expected, rtol=1e-9, atol=1e-12)


def test_what_the_engine_makes_of_a_model_keeps_it():
    model = model_of().eval()
    filled = narrow(model, torch.bfloat16)
    view = frozen_view(filled)
    assert view.input_dtype == torch.bfloat16
    assert torch.equal(view(X), filled(X))
    assert filled.state_dict().keys() == model.state_dict().keys()
    assert model.input_dtype is None
    assert model.stem.filler == 0


def test_other_numbers_of_channels_are_refused_still():
    """A grey image's model takes no others because its stem has room."""
    model = narrow(model_of(channels=1), torch.float64)
    with pytest.raises(RuntimeError, match="expected input"):
        model(X)
    with pytest.raises(RuntimeError, match="expected input"):
        model_of()(NormalizedImages(torch.zeros(2, 8, 8, 8)))
    with pytest.raises(ValueError, match="model: expected one whose first convolution is a Stem"):
        model = model_of()
        model.conv1 = nn.Conv2d(3, 16, 3)
        model.narrow_input_(torch.float16)


def test_another_model_and_a_model_all_in_16_bits_are_attacked_as_ever():
    """The latter normalises in 16 bits, too."""
    model = model_of().bfloat16()
    model.narrow_input_(torch.bfloat16)
    for module in (model, nn.Sequential(narrow(model_of(), torch.bfloat16))):
        with Counted() as counted:
            pgd(module, X, Y, **SETTINGS)
        assert counted.calls["pgd_step_"] == SETTINGS["steps"]
        assert "pgd_step_normalize_" not in counted.calls


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_working_copies_in_fp16_on_a_gpu_have_narrow_inputs(device):
    model = model_of().to(device)
    for dtype in HALVES:
        models = WorkingModels(model, Precision(attack=dtype, descent=dtype))
        expected = dtype if device == "cuda" and dtype == torch.float16 else None
        assert models.attack.input_dtype == models.descent.input_dtype == expected
    assert WorkingModels(model).attack.input_dtype is None

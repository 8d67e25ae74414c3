"""What an attack refuses, and what it takes from strangers: images, labels, models and noise of any kind."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import images
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from awp_engine.attack import (
    Attack,
    apgd,
    cross_entropy_losses,
    fast_attack,
    pgd,
    starting_point,
    summed_cross_entropy,
    summed_margin,
)
from awp_engine.attack import checks as attack_checks
from awp_engine.models import build_model

X, Y = images((4, 3, 6, 6)), torch.arange(4)
BALL = {"epsilon": 8 / 255, "steps": 2}


def attack(kind, model, x, y, **settings):
    """Either attack, two steps unless told otherwise."""
    settings = BALL | settings
    if kind == "pgd":
        fits = isinstance(settings["epsilon"], float)
        return pgd(model, x, y, **({"step_size": settings["epsilon"] / 2 if fits else 0.1} | settings))
    return apgd(model, x, y, **settings)


def linear(outputs=4, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, outputs)).to(dtype)


class Scaled(nn.Module):
    """A model of images in another range."""

    def __init__(self, low, high):
        super().__init__()
        self.inner, self.low, self.width = linear().double(), low, high - low

    def forward(self, x):
        return self.inner((x - self.low) / self.width)


NAN = X.clone()
NAN[1, 0, 2, 2] = torch.nan
REFUSED_IMAGES = {
    "normalised outside the model": (X - 0.5) / 0.25,
    "0 to 255": (X * 255).round(),
    "a hair above 1": X.clone().fill_(math.nextafter(1, 2) + 1e-7),
    "a hair below 0": X - X.amin() - 1e-9,
    "NaN": NAN,
    "infinite": X / 0,
    "bfloat16": (X * 3).bfloat16(),
}


@pytest.mark.parametrize("kind", ["pgd", "apgd"])
@pytest.mark.parametrize("name", list(REFUSED_IMAGES))
def test_images_outside_the_range_are_refused(kind, name):
    x = REFUSED_IMAGES[name]
    message = r"x: expected images with values in \[0, 1\]; normalise inside the model.*; got values from "
    with pytest.raises(ValueError, match=message):
        attack(kind, linear(), x, Y)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_ends_of_the_range_and_the_largest_ball_are_taken(norm):
    x = X.round()
    assert set(x.unique().tolist()) == {0.0, 1.0}
    for kind in ("pgd", "apgd"):
        found = attack(kind, linear(), x, Y, norm=norm, epsilon=1.0 if norm == "linf" else 11.3)
        assert found.min() >= 0
        assert found.max() <= 1


@settings(max_examples=10)
@given(
    st.sampled_from([(0.0, 255.0), (-1.0, 1.0), (-2.5, 2.25)]),
    st.sampled_from(["linf", "l2"]),
    st.sampled_from(["uniform", "normal", "none"]),
    st.sampled_from(["pgd", "apgd"]),
)
def test_any_range_is_attacked_as_the_unit_range_is(clip, norm, start, kind):
    """A model that normalises from another range: the same images, to rounding, as on [0, 1]; ball and range exact."""
    low, high = clip
    width = high - low
    model, unit = Scaled(low, high), X.double()
    x = low + unit * width
    x = x.clamp(low, high)
    epsilon = 0.1 if norm == "linf" else 0.9
    found = attack(kind, model, x, Y, epsilon=epsilon * width, clip=clip, norm=norm, start=start, seed=3)
    expected = attack(kind, model.inner, unit, Y, epsilon=epsilon, norm=norm, start=start, seed=3)
    torch.testing.assert_close((found - low) / width, expected, rtol=0, atol=1e-6)
    assert found.min() >= low
    assert found.max() <= high
    assert (found - x).abs().max() <= epsilon * width * (1 + 1e-12)
    begun = starting_point(x, start, epsilon=epsilon * width, norm=norm, sample_ids=torch.arange(4), seed=3, clip=clip)
    if start == "uniform":
        assert begun.min() >= low
        assert begun.max() <= high
    assert (begun - x).abs().max() > 0 or start == "none"


class Several(nn.Module):
    """Gives more than logits."""

    def forward(self, x):
        return x.flatten(1), x


HALF = torch.full_like(X, 0.5)
IN_COLUMNS = nn.Sequential(linear(8), nn.Unflatten(1, (2, 4)), nn.Flatten(0, 1))
REFUSED = {
    "labels too large": ({"y": Y + 1}, "y: expected labels from 0 to 3, as there are 4 logits, got 1 to 4"),
    "the label that cross-entropy ignores": ({"y": Y - 100}, "y: expected labels from 0 to 3"),
    "labels of bytes": ({"y": Y.byte()}, "y: expected int64 of shape (4,), or floating-point (4, 4), got torch.uint8"),
    "labels as numbers": ({"y": Y.float()}, "y: expected shape (4, 4) like the logits, got (4,)"),
    "too few labels": ({"y": Y[:3]}, "y: expected int64 of shape (4,), or floating-point (4, 4)"),
    "a column of labels": ({"y": Y[:, None]}, "y: expected int64 of shape (4,), or floating-point (4, 4)"),
    "labels elsewhere": ({"y": Y.to("meta")}, "y: expected device cpu like the logits, got meta"),
    "one logit": ({"model": linear(1)}, "model: expected logits of at least 2 classes, got 1"),
    "no classes": (
        {"model": nn.Sequential(linear(1), nn.Flatten(0))},
        "model: expected logits [4, classes], got shape (4,)",
    ),
    "a map of logits": ({"model": nn.Conv2d(3, 4, 3)}, "model: expected logits [4, classes], got shape (4, 4, 4, 4)"),
    "logits of views": ({"model": IN_COLUMNS}, "model: expected logits [4, classes], got shape (8, 4)"),
    "softmax": ({"model": nn.Sequential(linear(), nn.Softmax(1))}, "model: expected logits, got rows of probabilities"),
    "several outputs": ({"model": Several()}, "model: expected logits [N, classes], got tuple"),
    "start range": ({"start": X * 255}, "start: expected images with values in [0, 1]"),
    "start beyond noise": ({"start": X + 0.2}, "start: expected images with values in [0, 1]"),
    "start NaN": ({"start": NAN}, "start: expected images with values in [0, 1]"),
    "start shape": ({"start": HALF[:2]}, "start: expected shape (4, 3, 6, 6) like x, got (2, 3, 6, 6)"),
    "start dtype": ({"start": HALF.byte()}, "start: expected floating-point images in [0, 1], got torch.uint8"),
    "start device": ({"start": HALF.to("meta")}, "start: expected device cpu like x, got meta"),
    "start name": ({"start": "random"}, "start: expected uniform, normal, none or a tensor, got 'random'"),
    "levels for epsilon": ({"epsilon": 8.0}, "epsilon: expected at most 1 for linf, as values lie in [0, 1], got 8; "),
    "levels in l2": ({"epsilon": 128.0, "norm": "l2"}, "epsilon: expected at most 11.3923 for l2"),
    "negative epsilon": ({"epsilon": -0.1}, "epsilon: expected a finite number >= 0, got -0.1"),
    "epsilon NaN": ({"epsilon": math.nan}, "epsilon: expected a finite number >= 0, got nan"),
    "norm": ({"norm": "l1"}, "norm: expected one of linf, l2, got 'l1'"),
    "infinite epsilon": ({"epsilon": math.inf}, "epsilon: expected a finite number >= 0, got inf"),
    "clip": ({"clip": (1.0, 0.0)}, "clip: expected (low, high), finite, with low < high, got (1.0, 0.0)"),
    "infinite clip": ({"clip": (0.0, math.inf)}, "clip: expected (low, high), finite"),
    "negative steps": ({"steps": -1}, "steps: expected a whole number >= "),
    "part of a step": ({"steps": 2.0}, "steps: expected a whole number >= "),
    "bn_mode": ({"bn_mode": "test"}, "bn_mode: expected train or eval, got 'test'"),
    "mode": ({"mode": "test"}, "mode: expected train or eval, got 'test'"),
    "nonfinite": ({"nonfinite": "warn"}, "nonfinite: expected raise or ignore, got 'warn'"),
    "bytes": ({"x": (X * 255).byte()}, "got torch.uint8; divide uint8 images by 255"),
    "no batch": ({"x": X.flatten()}, "x: expected a batch [N, ...], got shape (432,)"),
    "part of a seed": ({"seed": 1.5, "start": "uniform"}, "seed: expected a whole number in [0, 2^63), got 1.5"),
    "a text for epsilon": ({"epsilon": "8/255"}, "epsilon: expected a finite number >= 0, got '8/255'"),
    "more digits than a float holds": ({"epsilon": 10**400}, "epsilon: expected a finite number >= 0, got 1000"),
    "labels in a list": ({"y": Y.tolist()}, "y: expected a tensor of labels, got list"),
    "seed": ({"seed": -1, "start": "uniform"}, "seed: expected a number in [0, 2^63), got -1"),
}


@pytest.mark.parametrize("kind", ["pgd", "apgd"])
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_does_not_fit_is_named_in_one_line(kind, name):
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        attack(kind, **({"model": linear(), "x": X, "y": Y, "steps": 1} | changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_longer_than_the_ball_are_refused(norm):
    options = {"epsilon": 0.02, "steps": 1, "norm": norm}
    with pytest.raises(ValueError, match=r"step_size: expected at most 0\.04, twice epsilon, got 2; a longer step"):
        pgd(linear(), X, Y, step_size=2.0, **options)
    with pytest.raises(ValueError, match="step_size: expected at most"):
        pgd(linear(), X, Y, step_size=-0.041, **options)
    with pytest.raises(ValueError, match="start_epsilon: expected a finite number >= 0, got nan"):
        pgd(linear(), X, Y, step_size=0.01, start_epsilon=math.nan, **options)
    model = linear()
    clean = summed_cross_entropy(model(X), Y)
    up, down = (pgd(model, X, Y, step_size=size, start="none", **options) for size in (0.04, -0.04))
    assert summed_cross_entropy(model(up), Y) > clean > summed_cross_entropy(model(down), Y)
    # in a ball of one point every step is as long
    assert torch.equal(pgd(model, X, Y, step_size=2.0, **(options | {"epsilon": 0.0})), X)
    if norm == "linf":
        for kind in ("fgsm-rs", "n-fgsm"):
            fast_attack(kind, 0.3)(model, X, Y)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(6, 6), "mask: expected torch.bool, got torch.float32"),
        (torch.ones(5, 6, dtype=torch.bool), "mask: expected a shape that broadcasts to (4, 3, 6, 6) like x"),
        (torch.ones(2, 4, 3, 6, 6, dtype=torch.bool), "mask: expected a shape that broadcasts to (4, 3, 6, 6) like x"),
        (torch.ones(6, 6, dtype=torch.bool, device="meta"), "mask: expected device cpu like x, got meta"),
    ],
)
@pytest.mark.parametrize("steps", [0, 1])
def test_masks_that_do_not_fit_are_named(mask, message, steps):
    with pytest.raises(ValueError, match=re.escape(message)):
        pgd(linear(), X, Y, epsilon=0.1, step_size=0.02, steps=steps, mask=mask)


LAYOUTS = {
    "expanded": lambda x: x[:1].expand(4, 3, 6, 6),
    "one channel for three": lambda x: x[:, :1].expand(4, 3, 6, 6),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": lambda x: F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
    "transposed": lambda x: x.transpose(2, 3),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "from a graph": lambda x: x.clone().requires_grad_() * 1.0,
}


@pytest.mark.parametrize("kind", ["pgd", "apgd"])
@pytest.mark.parametrize("start", ["uniform", "none"])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_images_of_any_layout(kind, start, name):
    x = LAYOUTS[name](X)
    plain = x.detach().clone(memory_format=torch.contiguous_format)
    found = attack(kind, linear(), x, Y, start=start, seed=1, norm="l2", epsilon=0.5)
    assert torch.equal(found, attack(kind, linear(), plain, Y, start=start, seed=1, norm="l2", epsilon=0.5))
    assert x.grad is None if x.is_leaf else True
    assert not found.requires_grad


@pytest.mark.parametrize("kind", ["pgd", "apgd"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["uniform", "normal", "none"])
def test_an_empty_batch_stays_empty(kind, norm, start):
    assert attack(kind, linear(), X[:0], Y[:0], norm=norm, start=start).shape == (0, 3, 6, 6)


def test_a_first_iterate_outside_the_ball_is_projected():
    start = (X + 0.3).clamp(0, 1.05)
    for steps in (0, 1):
        found = pgd(linear(), X, Y, epsilon=0.1, step_size=0.0, steps=steps, start=start)
        assert ((found - X).abs() <= 0.1).all()
        assert found.max() <= 1
        torch.testing.assert_close(found, torch.minimum(start, X + 0.1).clamp(max=1), rtol=0, atol=1e-7)


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(2, 8), st.sampled_from([0.0, 0.1, 1.0, 30.0]), st.integers(0, 999), st.data())
def test_logits_are_not_taken_for_probabilities(count, classes, size, seed, data):
    """Random ones, all zero, of certain or of untrained networks, shifted to begin at 0; in any precision."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    logits = size * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))
    if data.draw(st.booleans()):
        logits = logits - logits.amin(1, keepdim=True)
    y = torch.zeros(count, dtype=torch.int64)
    attack_checks.outputs(logits.to(dtype), y, count)
    with pytest.raises(ValueError, match="leave out the softmax at its end"):
        attack_checks.outputs(logits.to(dtype).softmax(1), y, count)
    attack_checks.outputs(logits.to(dtype).log_softmax(1) - 1e-3, y, count)


def test_logits_that_add_up_to_one_are_still_logits():
    attack_checks.outputs(torch.tensor([[2.0, -1.0], [-3.0, 4.0]]), torch.tensor([0, 1]), 2)


def test_on_a_device_nobody_waits_for_the_checks():
    """Tensors without values: whatever a host would have to know of them is an error."""
    x, y, model = X.to("meta"), Y.to("meta"), linear().to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        bool(x.sum() > 0)
    for kind in ("pgd", "apgd"):
        for norm in ("linf", "l2"):
            for start in ("uniform", "none", x):
                found = attack(kind, model, x, y, norm=norm, start=start, clip=(-1.0, 1.0), mode="eval")
                assert found.shape == x.shape
    pgd(model, x, y, epsilon=0.1, step_size=0.02, steps=1, mask=x > 0.5, loss=summed_margin)


# -- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["pgd", "apgd"])
def test_a_model_in_any_precision_is_attacked(kind, dtype):
    """The fp32 images of a call are moved in fp32, and the loss rises as far as that of the model in fp32, to 5%."""
    torch.manual_seed(1)
    model = build_model("preact-resnet-digits", 4, (0.5,), (0.25,), width=8).eval()
    x = images((16, 1, 8, 8), seed=4)
    y = model(x).argmax(1)
    plain = attack(kind, model, x, y, epsilon=0.1, steps=5, seed=1)
    lowered = model.to(dtype)
    found = attack(kind, lowered, x, y, epsilon=0.1, steps=5, seed=1)
    assert found.dtype == torch.float32
    assert ((found - x).abs() <= 0.1).all()
    assert all(p.grad is None and p.dtype == dtype for p in lowered.parameters())
    losses = [F.cross_entropy(model.float()(i), y).item() for i in (x, plain, found)]
    assert losses[1] > losses[0] + 0.01
    assert losses[2] - losses[0] > 0.95 * (losses[1] - losses[0])


@pytest.mark.parametrize("kind", ["pgd", "apgd"])
def test_small_gradients_of_a_model_in_fp16_are_not_lost(kind):
    """Of a model that is certain: at a hundred millionth, they would all underflow to 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 2)).half()
    with torch.no_grad():
        model[1].weight.fill_(2**-7)
        model[1].weight[1].neg_()
        model[1].bias.copy_(torch.tensor([14.0, 0.0]))
    seen, y = [], torch.zeros(4, dtype=torch.int64)
    attack(kind, model, X, y, observe=lambda _, gradient: seen.append(gradient))
    assert all((gradient != 0).all() for gradient in seen)
    if kind == "pgd":
        exact = nn.Sequential(nn.Flatten(), nn.Linear(108, 2)).double()
        exact.load_state_dict(model.state_dict())
        attack(kind, exact, X.double(), y, observe=lambda _, gradient: seen.append(gradient))
        torch.testing.assert_close(seen[0].double(), seen[2], rtol=0.1, atol=0)


def test_the_shared_gradient_of_a_model_in_fp16_has_the_losss_scale():
    model, exact = linear().half(), linear().half().double()
    for net, x in ((model, X), (exact, X.double())):
        pgd(net, x, Y, epsilon=0.1, step_size=0.05, steps=1, start="none", shared=list(net.parameters()))
    for half, double in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(half.grad.double(), double.grad, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_16_bit_logits_keep_what_the_logits_tell(dtype):
    """Auto-PGD keeps the better of two points by them: 16 bits would round both to one number."""
    logits, y = torch.tensor([[0.0, 8.0, 0.0], [0.0, 8.0, 0.25]], dtype=dtype), Y[:1].expand(2)
    losses = cross_entropy_losses(logits, y)
    torch.testing.assert_close(
        losses.double(), F.cross_entropy(logits.double(), y, reduction="none"), rtol=1e-6, atol=0
    )
    assert losses[1] > losses[0]
    # fp16 ends at 65,504
    assert summed_cross_entropy(logits.repeat(10000, 1), Y[:1].expand(20000)).isfinite()


# -- noise


@pytest.mark.parametrize("kind", ["pgd", "apgd"])
@pytest.mark.parametrize("start", ["uniform", "normal"])
def test_noise_is_fresh_unless_a_seed_or_ids_are_given(kind, start):
    def run(**options):
        # PGD without steps, the noise alone
        return attack(kind, model, X, Y, norm="l2", **({"start": start, "steps": 0 if kind == "pgd" else 1} | options))

    model = linear()

    assert not torch.equal(run(), run())
    torch.manual_seed(5)
    first, second = run(), run()
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(run(), first)
    assert torch.equal(run(), second)
    state = torch.get_rng_state()
    ids = torch.tensor([7, 1, 2, 9])
    assert torch.equal(run(seed=4), run(seed=4))
    assert torch.equal(run(sample_ids=ids), run(sample_ids=ids, seed=0))
    assert not torch.equal(run(sample_ids=ids, seed=1), run(sample_ids=ids))
    run(start="none")
    run(start=X)
    assert torch.equal(torch.get_rng_state(), state)


# -- gradients that are not finite


class Broken(nn.Module):
    """Logits as usual, but for the named images a gradient that is not finite, or logits that are not."""

    def __init__(self, value, rows, where="gradient"):
        super().__init__()
        self.inner, self.value, self.rows, self.where = linear(), value, rows, where

    def forward(self, x):
        assert x.isfinite().all()
        if self.where == "gradient":
            x = x * 1.0
            if x.requires_grad:
                x.register_hook(lambda g: g.index_fill(0, self.rows, self.value))
            return self.inner(x)
        return self.inner(x).index_fill(0, self.rows, self.value)


@pytest.mark.parametrize("where", ["gradient", "logits"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["pgd", "apgd"])
def test_a_gradient_that_is_not_finite_is_refused(kind, value, where):
    model = Broken(value, torch.tensor([0, 2]), where)
    message = r"model: the attack's loss or gradient is not finite, .*nonfinite='ignore' goes on; in step 0"
    with pytest.raises(FloatingPointError, match=message) as caught:
        attack(kind, model, X, Y)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["pgd", "apgd"])
def test_gradients_that_are_not_finite_can_be_ignored(kind, value, norm):
    """The others are attacked as ever; images without direction stay, and none becomes NaN."""
    rows = torch.tensor([0, 2])
    options = {"norm": norm, "start": "none", "nonfinite": "ignore"}
    seen = []
    found = attack(kind, Broken(value, rows), X, Y, observe=lambda _, g: seen.append(g), **options)
    expected = attack(kind, linear(), X, Y, **options)
    assert torch.equal(found[[1, 3]], expected[[1, 3]])
    assert found.isfinite().all()
    if math.isnan(value) or norm == "l2":
        assert torch.equal(found[rows], X[rows])
    assert all(not gradient[rows].isfinite().any() for gradient in seen)
    # a batch with NaN as well, as training has its own way with it; other values outside the range not even then
    attack(kind, linear(), NAN, Y, **options)
    with pytest.raises(ValueError, match="x: expected images with values in"):
        attack(kind, linear(), X + 0.3, Y, **options)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", ["pgd", "apgd"])
def test_images_without_a_gradient_stay(kind, norm):
    rows = torch.tensor([0, 2])
    found = attack(kind, Broken(0.0, rows), X, Y, norm=norm, start="none")
    assert torch.equal(found[rows], X[rows])
    assert (found[[1, 3]] != X[[1, 3]]).flatten(1).any(1).all()


def test_a_last_loss_that_is_not_finite_is_refused():
    """Auto-PGD's last pass has no gradient."""
    passes = []

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, x):
            passes.append(1)
            return self.inner(x) * (math.nan if len(passes) == 3 else 1.0)

    with pytest.raises(FloatingPointError, match="in step 2"):
        apgd(Late(), X, Y, epsilon=0.1, steps=2)


def test_what_lies_outside_the_region_may_be_anything():
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()

        def forward(self, x):
            x = x * 1.0
            x.register_hook(lambda g: torch.where(region, g, torch.nan))
            return self.inner(x)

    region = torch.zeros(6, 6, dtype=torch.bool)
    region[2:4] = True
    options = {"epsilon": 0.1, "step_size": 0.05, "steps": 2, "start": "none"}
    found = pgd(Outside(), X, Y, mask=region, **options)
    assert torch.equal(found, pgd(linear(), X, Y, mask=region, **options))
    with pytest.raises(FloatingPointError):
        pgd(Outside(), X, Y, mask=~region, **options)


# -- models in wrappers


def test_the_module_inside_a_wrapper_is_called():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        bare = linear()
        model = DistributedDataParallel(bare)
        expected = pgd(bare, X, Y, epsilon=0.1, step_size=0.05, steps=2, seed=1)
        for kind in ("pgd", "apgd"):
            attack(kind, model, X, Y)
        assert torch.equal(pgd(model, X, Y, epsilon=0.1, step_size=0.05, steps=2, seed=1), expected)
        # training goes on: no gradient is being waited for
        for _ in range(2):
            F.cross_entropy(model(X), Y).backward()
    finally:
        distributed.destroy_process_group()


def test_an_attack_as_a_value_cannot_stand_still():
    with pytest.raises(ValueError, match=r"^step_size: expected a length for kind pgd, got None"):
        Attack(epsilon=0.1, steps=3)
    with pytest.raises(ValueError, match=r"^kind: expected pgd or apgd, got 'fgsm'"):
        Attack(kind="fgsm", epsilon=0.1, step_size=0.1, steps=3)
    model = linear()
    x_adv = Attack(kind="apgd", epsilon=0.1, steps=3)(model, X, Y)
    assert torch.equal(x_adv, apgd(model, X, Y, epsilon=0.1, steps=3, start="uniform", seed=0))
    with pytest.raises(ValueError, match=r"^loss, shared: expected neither"):
        Attack(kind="apgd", epsilon=0.1, steps=3)(model, X, Y, loss=summed_cross_entropy)


@pytest.mark.parametrize("kind", ["pgd", "apgd"])
def test_inference_mode_is_refused_and_no_grad_is_not(kind):
    with torch.inference_mode(), pytest.raises(ValueError, match=r"inference_mode: expected torch\.no_grad at most"):
        attack(kind, linear(), X, Y)
    with torch.no_grad():
        attack(kind, linear(), X, Y)
        assert not torch.is_grad_enabled()

"""An attack's step that also makes the network's next input: what the table of all operations does not ask."""

import math

import pytest
import torch
from operations import arguments_of, same_bits
from samples import DTYPES, LAYOUTS

from awp_kernels import _backend, pgd_step_, pgd_step_normalize_, use_backend

SAMPLES = ["grey", "more", "primes", "batch"]


@pytest.fixture(autouse=True)
def _served(target):
    """By the target's implementation, or by the one that serves where it has none."""
    device, backend = target
    lacks = _backend.problem(backend, device, "pgd_step_normalize") is not None
    with use_backend(None if lacks else backend):
        yield


def on(device, arguments):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("variant", ["linf", "linf-masked", "l2", "l2-masked"])
@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_step_is_that_of_pgd_step(target, variant, sample, dtype, layout):
    """To the bit, but for the order of an L2 step's sums; `out` is what is made of it, to the bit."""
    arguments = on(target[0], arguments_of("pgd_step_normalize_", variant, sample, dtype))
    mean, std, grad, x = (arguments[name] for name in ("mean", "std", "grad", "x"))
    channels = x.shape[1]
    plain = {k: v for k, v in arguments.items() if k not in ("out", "mean", "std", "grad", "x_adv")}
    expected = arguments["x_adv"].clone()
    # one rounding each, as the operation's: a multiplication by a reciprocal has two
    pgd_step_(expected, grad[:, :channels].float() / std.view(-1, 1, 1), **plain)
    arguments |= {name: layout.lay(arguments[name]) for name in ("x_adv", "x")}
    pgd_step_normalize_(**arguments)
    x_adv, out = arguments["x_adv"], arguments["out"]
    assert not torch.equal(x_adv, x)
    if variant.startswith("linf"):
        assert same_bits([x_adv], [expected])
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=2e-7)
    normalised = (x_adv.cpu() - mean.cpu().view(-1, 1, 1)) / std.cpu().view(-1, 1, 1)
    assert same_bits([out[:, :channels]], [normalised.to(dtype)])
    assert same_bits([out[:, channels:]], [torch.zeros_like(out[:, channels:])])


def step(device, grad, std, *, dtype=torch.float32, norm="linf", x=0.5, **options):
    """One image of a row of pixels in two channels, and its rows of four."""
    grad = torch.tensor(grad, dtype=dtype, device=device).T.reshape(1, 4, 1, -1)
    images = torch.full((1, 2, 1, grad.shape[3]), x, device=device)
    x_adv = images.clone()
    rows = grad.contiguous(memory_format=torch.channels_last)
    vectors = torch.zeros(2, device=device), torch.tensor(std, device=device)
    settings = {"step_size": 0.25, "epsilon": 0.25, "norm": norm} | options
    pgd_step_normalize_(x_adv, rows, images, torch.empty_like(rows), *vectors, **settings)
    return (x_adv - images).cpu().squeeze()


def test_signs(target):
    """Of numbers whose quotient is 0 in fp32, of NaN and zeros; a deviation below 0 turns them."""
    tiny, nan = 2.0**-149, math.nan
    pixels = [[1, -1, 0, 0], [tiny, -tiny, 0, 0], [nan, 0, 0, 0], [-0.0, math.inf, 0, 0]]
    moved = step(target[0], pixels, [4.0, -4.0])
    assert moved.tolist() == [[0.25, 0.25, 0, 0], [0.25, 0.25, 0, -0.25]]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_channels_behind_the_images_own_are_not_looked_at(target, norm):
    pixels = [[1, -2, math.nan, math.inf], [3, 4, -math.inf, 7]]
    clean = [[1, -2, 0, 0], [3, 4, 0, 0]]
    found = step(target[0], pixels, [1.0, 1.0], norm=norm)
    assert torch.equal(found, step(target[0], clean, [1.0, 1.0], norm=norm))
    assert found.abs().min() > 0


def test_an_l2_step_follows_the_gradient_for_the_images(target):
    """(3, 8 / 2) is the direction, not (3, 8)."""
    moved = step(target[0], [[3, 8, 0, 0]], [1.0, 2.0], norm="l2", dtype=torch.float16, epsilon=1.0)
    torch.testing.assert_close(moved, torch.tensor([0.15, 0.2]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_stay_in_the_ball_exactly(target, norm):
    arguments = on(target[0], arguments_of("pgd_step_normalize_", norm, "batch", torch.float16))
    x_adv, x, epsilon = arguments["x_adv"], arguments["x"], arguments["epsilon"]
    for seed in range(4):
        arguments["grad"] = arguments["grad"].roll(seed, 0)
        pgd_step_normalize_(**arguments | {"step_size": epsilon})
        delta = (x_adv.double() - x.double()).flatten(1)
        length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert 0.9 * epsilon < length.max() <= epsilon
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1

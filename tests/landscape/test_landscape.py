"""Moving weights, the robust loss around them, and flatness, each beside its definition in fp64 plain PyTorch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from samples import images, randn
from torch import nn

from awp_engine.attack import Attack, pgd
from awp_engine.data import Batch, load_dataset
from awp_engine.landscape import (
    Direction,
    RobustLoss,
    WorkingCopy,
    adversarial_direction,
    average_flatness,
    curve_1d,
    grid,
    mean_interval,
    random_direction,
    surface_2d,
    worst_flatness,
)
from awp_engine.landscape.directions import gaussian_like, perturbed_weights, weights_and_biases
from awp_engine.landscape.flatness import project_relative_
from awp_engine.models import build_model

ATTACK = Attack(epsilon=0.1, step_size=0.03, steps=3, norm="linf", seed=5)
# the relative rounding of one fp32 operation
ULP = 2.0**-24


def network(width: int = 4, seed: int = 0, memory_format=torch.contiguous_format) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=width)
    model.train()
    model(images((32, 1, 8, 8)))  # running statistics that differ from the initial ones
    return model.to(memory_format=memory_format).eval()


def batches(count: int = 12, size: int = 5, dtype=torch.float32) -> list[Batch]:
    x, y, ids = images((count, 1, 8, 8), dtype), torch.arange(count) % 10, torch.arange(100, 100 + count)
    return [
        Batch(x[i : i + size], y[i : i + size], ids[i : i + size], min(size, count - i)) for i in range(0, count, size)
    ]


def relative_fp64(weight: torch.Tensor, direction: torch.Tensor, scope: str) -> torch.Tensor:
    """||w|| d / ||d||, filter by filter or for the tensor, in fp64."""
    w, d = weight.double(), direction.double()
    if scope == "layer" or w.ndim < 2:
        return w.norm() * d / d.norm()
    return torch.stack([w[k].norm() * d[k] / d[k].norm() for k in range(len(w))])


@pytest.mark.parametrize("amount", [-1.0, 0.02, 1.0])
@pytest.mark.parametrize("scope", ["filter", "layer"])
def test_moves_along_a_direction_as_defined(scope, amount):
    model = network()
    direction = random_direction(model, seed=3, scope=scope, select=weights_and_biases)
    moved = WorkingCopy(model)
    moved.move_(direction, amount)
    found = dict(moved.model.named_parameters())
    for name, weight in model.named_parameters():
        if name not in direction.tensors:
            assert torch.equal(found[name], weight)
            continue
        shift = amount * relative_fp64(weight, direction.tensors[name], scope)
        # roundings: of the scale, of the product, of the sum
        bound = 3 * ULP * (weight.abs() + shift.abs())
        assert ((found[name].double() - (weight.double() + shift)).abs() <= bound).all(), name


@pytest.mark.parametrize("scopes", [("filter", "filter"), ("layer", "filter")])
def test_moves_in_a_plane_as_defined(scopes):
    """Norms are those of w alone: the second direction is not scaled to weights that the first has moved."""
    model = network()
    first, second = (random_direction(model, seed=3, index=i, scope=scope) for i, scope in enumerate(scopes))
    moved = WorkingCopy(model)
    for a, b in [(0.7, -1.0), (-0.02, 0.5), (1.0, 0.0)]:
        moved.move_in_plane_(first, a, second, b)
        found = dict(moved.model.named_parameters())
        for name in first.tensors:
            weight = dict(model.named_parameters())[name]
            x = a * relative_fp64(weight, first.tensors[name], scopes[0])
            y = b * relative_fp64(weight, second.tensors[name], scopes[1])
            # roundings: of each share and its product, of their sum, of the scale, of the product, of the sum
            bound = 7 * ULP * (weight.abs() + x.abs() + y.abs())
            assert ((found[name].double() - (weight.double() + x + y)).abs() <= bound).all(), name


def test_filters_move_by_their_norm():
    model = network().double()
    direction = random_direction(model, seed=1)
    moved = WorkingCopy(model)
    moved.move_(direction, 0.25)
    for name, tensor in moved.model.named_parameters():
        if name in direction.tensors:
            weight = dict(model.named_parameters())[name]
            lengths = (tensor - weight).flatten(1).norm(dim=1)
            torch.testing.assert_close(lengths, 0.25 * weight.flatten(1).norm(dim=1), rtol=1e-12, atol=0)


def test_amount_zero_and_reset_give_the_master():
    model = network()
    first, second = (random_direction(model, seed=3, index=i) for i in range(2))
    moved = WorkingCopy(model)

    def is_master() -> bool:
        return all(torch.equal(a, b) for a, b in zip(moved.model.parameters(), model.parameters(), strict=True))

    moved.move_(first, 0.5)
    assert not is_master()
    moved.move_(first, 0.0)
    assert is_master()
    moved.move_in_plane_(first, 0.5, second, 0.5)
    assert not is_master()
    moved.move_in_plane_(first, 0.0, second, 0.0)
    assert is_master()
    moved.move_(first, 0.5)
    moved.reset_()
    assert is_master()


def test_a_move_along_other_parameters_puts_the_first_ones_back():
    model = network()
    both = random_direction(model, seed=0, scope="layer", select=weights_and_biases)
    weights = random_direction(model, seed=0)
    moved = WorkingCopy(model)
    moved.move_(both, 0.5)
    moved.move_(weights, 0.0)
    assert torch.equal(moved.model.get_parameter("linear.bias"), model.get_parameter("linear.bias"))


def test_weights_of_norm_zero_stay():
    model = network()
    nn.init.zeros_(model.get_parameter("linear.bias"))
    moved = WorkingCopy(model)
    direction = random_direction(model, seed=0, scope="layer", select=weights_and_biases)
    moved.move_(direction, 0.5)
    assert not moved.model.get_parameter("linear.bias").any()
    moved.move_in_plane_(direction, 0.5, direction, 0.5)
    assert not moved.model.get_parameter("linear.bias").any()
    assert all(p.isfinite().all() for p in moved.model.parameters())


@pytest.mark.parametrize("scope", ["filter", "layer"])
def test_a_direction_that_is_not_finite_leads_nowhere(scope):
    """What is measured there is NaN: at w itself, where perturb_into_ stays, it would pass for flat."""
    model = network()
    moved = WorkingCopy(model)
    direction = random_direction(model, seed=1, scope=scope)
    moved.move_(direction, 0.5)
    next(iter(direction.tensors.values())).view(-1)[3] = torch.inf
    for move in (lambda: moved.move_(direction, 0.5), lambda: moved.move_in_plane_(direction, 0.0, direction, 0.5)):
        move()
        assert moved.model(torch.zeros(2, 1, 8, 8)).isnan().all()
        moved.reset_()
        assert all(torch.equal(p, q) for p, q in zip(moved.model.parameters(), model.parameters(), strict=True))


def test_a_direction_of_another_model_is_refused():
    moved = WorkingCopy(network())
    with pytest.raises(ValueError, match="no parameter 'elsewhere'"):
        moved.move_(Direction(tensors={"elsewhere": torch.ones(3)}, scope="layer"), 1.0)
    with pytest.raises(ValueError, match="expected shape"):
        moved.move_(random_direction(network(width=8), seed=0), 1.0)
    one = random_direction(network(), seed=0)
    other = random_direction(network(), seed=0, select=weights_and_biases)
    with pytest.raises(ValueError, match="second: expected a direction of the same parameters"):
        moved.move_in_plane_(one, 1.0, other, 1.0)


def snapshot(model: nn.Module):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    return state, flags, [p.grad for p in model.parameters()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_alone_bit_for_bit(training):
    model = network().train(training)
    before = snapshot(model)
    data = batches()
    direction = random_direction(model, seed=0)
    along = adversarial_direction(model, data, ATTACK)
    loss = RobustLoss(data, ATTACK)
    curve_1d(model, direction, [-0.5, 0.5], loss)
    surface_2d(model, along, direction, [0.01], [-0.5, 0.5], loss)
    average_flatness(model, loss, count=2)
    worst_flatness(model, loss, epochs=2, attempts=1)
    after = snapshot(model)
    for name, value in before[0].items():
        assert value.numpy().tobytes() == after[0][name].numpy().tobytes(), name
    assert before[1:] == after[1:]


def test_directions_are_keyed_by_name_and_seed_alone():
    first = random_direction(network(seed=0), seed=7)
    other = random_direction(network(seed=1, memory_format=torch.channels_last), seed=7)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, other.tensors[name])
    for different in (random_direction(network(), seed=8), random_direction(network(), seed=7, index=1)):
        assert not any(torch.equal(first.tensors[name], tensor) for name, tensor in different.tensors.items())
    values = torch.cat([tensor.flatten() for tensor in first.tensors.values()]).double()
    assert abs(values.mean()) < 4 / math.sqrt(len(values))
    assert abs(values.std() - 1) < 4 / math.sqrt(len(values))
    convolutions = [tensor for tensor in first.tensors.values() if tensor.shape == (4, 4, 3, 3)]
    assert len(convolutions) == 2
    assert not torch.equal(*convolutions)


def test_what_moves():
    model = network()
    moving, flat = set(perturbed_weights(model)), set(weights_and_biases(model))
    assert all(model.get_parameter(name).ndim > 1 for name in moving)
    assert flat == moving | {"linear.bias"}
    assert all("bn" not in name for name in flat)
    with pytest.raises(ValueError, match="no parameter to move"):
        random_direction(nn.ReLU(), seed=0)


class Linear(nn.Module):
    """Two classes and a closed form: the worst image in the ball is x - epsilon sign(w_y - w_o)."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 2, bias=bias, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(randn((2, 16), torch.float64, seed=1))

    def forward(self, x):
        return self.linear(x.flatten(1))


LINEAR_ATTACK = Attack(epsilon=0.05, step_size=0.02, steps=8, norm="linf", seed=2)


def linear_data(count: int = 8, size: int = 3) -> list[Batch]:
    # far enough from 0 and 1 that the ball is not cut
    x, y, ids = 0.3 + 0.4 * images((count, 1, 4, 4), torch.float64), torch.arange(count) % 2, torch.arange(count)
    return [
        Batch(x[i : i + size], y[i : i + size], ids[i : i + size], min(size, count - i)) for i in range(0, count, size)
    ]


def linear_robust_losses(weight: torch.Tensor, bias: torch.Tensor, data: list[Batch], epsilon: float) -> torch.Tensor:
    """log(1 + exp(-margin)), margin = (w_y - w_o) x + b_y - b_o - epsilon ||w_y - w_o||_1."""
    x, y = torch.cat([b.images for b in data]).flatten(1), torch.cat([b.labels for b in data])
    difference = weight[y] - weight[1 - y]  # [N, 16]
    margin = (difference * x).sum(1) + bias[y] - bias[1 - y] - epsilon * difference.abs().sum(1)
    return F.softplus(-margin)


def test_robust_loss_of_a_linear_model_is_the_closed_form():
    model, data = Linear(), linear_data()
    expected = linear_robust_losses(model.linear.weight, model.linear.bias, data, LINEAR_ATTACK.epsilon)
    torch.testing.assert_close(RobustLoss(data, LINEAR_ATTACK)(model), expected, rtol=0, atol=1e-12)


def test_curve_of_a_linear_model_is_the_closed_form():
    model, data = Linear(), linear_data()
    direction = random_direction(model, seed=4)
    amounts = grid(1.0, 5)
    found = curve_1d(model, direction, amounts, RobustLoss(data, LINEAR_ATTACK))
    weight = model.linear.weight
    for amount, losses in zip(amounts, found, strict=True):
        moved = weight + amount * relative_fp64(weight, direction.tensors["linear.weight"], "filter")
        expected = linear_robust_losses(moved, model.linear.bias, data, LINEAR_ATTACK.epsilon)
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)


def test_average_flatness_of_a_linear_model_is_the_closed_form():
    model, data, xi = Linear(), linear_data(), 0.5
    found = average_flatness(model, RobustLoss(data, LINEAR_ATTACK), xi=xi, count=4, seed=9)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    reference = linear_robust_losses(model.linear.weight, model.linear.bias, data, LINEAR_ATTACK.epsilon)
    rises = []
    for index in range(4):
        moved = {}
        for name, weight in parameters.items():
            noise = gaussian_like(weight, name, seed=9, index=index)
            moved[name] = weight + xi * weight.norm() * noise / noise.norm()
        losses = linear_robust_losses(moved["linear.weight"], moved["linear.bias"], data, LINEAR_ATTACK.epsilon)
        rises.append(losses - reference)
    torch.testing.assert_close(found.losses - found.reference, torch.stack(rises), rtol=0, atol=1e-12)
    assert found.interval(0).value == pytest.approx(torch.stack(rises).mean().item(), abs=1e-12)


def test_worst_flatness_of_a_linear_model_is_the_closed_form():
    """For one image the worst v is (-x', x') but for its length: the margin at x' falls by ||v|| sqrt(2) ||x'||."""
    model, data, xi = Linear(bias=False), linear_data(1, 1), 0.01
    found = worst_flatness(model, RobustLoss(data, LINEAR_ATTACK), xi=xi, epochs=20, attempts=2)
    weight, y = model.linear.weight.detach(), int(data[0].labels)
    difference = weight[y] - weight[1 - y]
    worst_image = data[0].images.flatten() - LINEAR_ATTACK.epsilon * difference.sign()
    margin = difference @ worst_image - xi * weight.norm() * math.sqrt(2) * worst_image.norm()
    assert found.losses.mean(1) == pytest.approx([F.softplus(-margin).item()] * 2, abs=1e-9)
    assert found.joint.mean(1) == pytest.approx([F.softplus(-margin).item()] * 2, abs=1e-9)
    assert found.largest == pytest.approx([xi, xi], rel=1e-12)


def test_amount_zero_is_the_unperturbed_robust_loss_exactly():
    model, loss = network(), RobustLoss(batches(), ATTACK)
    expected = loss(model)
    direction, other = (random_direction(model, seed=0, index=i) for i in range(2))
    assert torch.equal(curve_1d(model, direction, [0.0, 0.3, 0.0], loss)[::2], torch.stack([expected] * 2))
    assert torch.equal(surface_2d(model, direction, other, [0.0], [0.0], loss)[0, 0], expected)
    assert torch.equal(average_flatness(model, loss, xi=0.0, count=1).losses[0], expected)
    still = worst_flatness(model, loss, xi=0.0, epochs=2, attempts=2)
    assert torch.equal(still.losses, torch.stack([expected] * 2))
    assert still.interval(0).value == 0


def test_surface_meets_the_curves_on_its_axes():
    model, loss = network().double(), RobustLoss(batches(dtype=torch.float64), ATTACK)
    first, second = (random_direction(model, seed=0, index=i) for i in range(2))
    amounts = grid(0.5, 3)
    surface = surface_2d(model, first, second, amounts, amounts, loss)
    assert surface.shape == (3, 3, 12)
    torch.testing.assert_close(surface[:, 1], curve_1d(model, first, amounts, loss), rtol=1e-7, atol=0)
    torch.testing.assert_close(surface[1], curve_1d(model, second, amounts, loss), rtol=1e-7, atol=0)


def test_robust_loss_attacks_this_model_with_running_statistics():
    model, (whole,) = network(), batches(6, 6)
    x, y, *_ = whole
    losses = RobustLoss([whole], ATTACK)(model)
    assert losses.shape == (6,)
    assert losses.dtype == torch.float64
    with torch.no_grad():
        clean = F.cross_entropy(model(x), y, reduction="none")
    assert (losses > clean).all()
    assert torch.equal(RobustLoss([whole], ATTACK)(copy.deepcopy(model).train()), losses)
    # an image's loss does not depend on its company
    alone = RobustLoss([whole.part(slice(2, 3))], ATTACK)(model)
    torch.testing.assert_close(alone, losses[2:3], rtol=1e-4, atol=1e-5)


def test_restarts_keep_the_worst():
    model, data = network(), batches(12, 12)
    once, thrice = (RobustLoss(data, ATTACK, restarts=n)(model) for n in (1, 3))
    assert (thrice >= once).all()
    assert (thrice > once).any()
    with pytest.raises(ValueError, match="restarts: expected a whole number >= 1, got 0"):
        RobustLoss(data, ATTACK, restarts=0)


def test_projection_holds_to_rounding():
    for dtype, bound in ((torch.float32, 2.0**-23), (torch.float64, 2.0**-52)):
        shares = {
            str(i): randn(shape, dtype, seed=i, scale=s) for i, (shape, s) in enumerate([((40, 30), 1), ((7,), 1e-5)])
        }
        before = {name: tensor.clone() for name, tensor in shares.items()}
        project_relative_(shares, 0.003)
        assert shares["0"].double().norm() <= 0.003 * (1 + bound)
        assert shares["0"].double().norm() >= 0.003 * (1 - bound)
        cosine = F.cosine_similarity(shares["0"].double().flatten(), before["0"].double().flatten(), dim=0)
        assert cosine == pytest.approx(1, abs=1e-12)
        assert torch.equal(shares["1"], before["1"])


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[Batch]]:
    """A small network trained on clean digits for a few seconds, and images to look at it with."""
    torch.manual_seed(0)
    data = load_dataset("digits", root=None, held_out_fraction=0.1, seed=0)
    model = build_model("preact-resnet-digits", 10, data.mean, data.std, width=4).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = data.train.images / 255, data.train.labels
    for epoch in range(6):
        for chosen in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
    test = data.test
    return model.eval(), [
        Batch(test.images[i : i + 50] / 255, test.labels[i : i + 50], test.ids[i : i + 50], 50) for i in (0, 50)
    ]


def test_the_gradient_raises_the_loss_more_than_random_directions(trained):
    model, data = trained
    loss = RobustLoss(data, ATTACK)
    start = loss(model).mean()
    up, down = curve_1d(model, adversarial_direction(model, data, ATTACK), [0.02, -0.02], loss).mean(1)
    assert down < start < up
    for index in range(3):
        random = random_direction(model, seed=0, index=index, scope="layer")
        moved = curve_1d(model, random, [0.02, -0.02], loss).mean(1)
        assert up - start > 5 * (moved - start).abs().max()


def test_adversarial_direction_is_the_gradient_of_the_robust_loss(trained):
    """Finite differences in fp64, on images attacked at w."""
    model, data = copy.deepcopy(trained[0]).double(), [b._replace(images=b.images.double()) for b in trained[1]]
    direction = adversarial_direction(model, data, ATTACK)
    weight, gradient = model.get_parameter("linear.weight"), direction.tensors["linear.weight"]
    attacked = [pgd(model, x, y, epsilon=0.1, step_size=0.03, steps=3, sample_ids=ids, seed=5) for x, y, ids, _ in data]
    totals = []
    for shift in (1e-6, -1e-6):
        with torch.no_grad():
            weight[3, 2] += shift
            totals.append(
                sum(F.cross_entropy(model(x), b.labels, reduction="sum") for x, b in zip(attacked, data, strict=True))
            )
            weight[3, 2] -= shift
    assert gradient[3, 2].item() == pytest.approx((totals[0] - totals[1]).item() / 2e-6, rel=1e-5)


def test_worst_case_is_no_less_than_average_case_at_the_same_xi(trained):
    model, loss = trained[0], RobustLoss(trained[1], ATTACK)
    reference = loss(model)
    for xi in (0.003, 0.02):
        average = average_flatness(model, loss, xi=xi, count=5, reference=reference)
        worst = worst_flatness(model, loss, xi=xi, epochs=5, attempts=2, reference=reference)
        assert worst.interval(0).low > average.interval(0).high
        assert xi * 0.9 < worst.largest.min() <= worst.largest.max() <= xi + 2 * ULP
        assert worst.losses.shape == worst.joint.shape == (2, 100)
        assert worst.losses.mean(1).argmax() == worst.attempt


def test_flatness_arguments_are_checked():
    model, data = Linear(), linear_data()
    loss = RobustLoss(data, LINEAR_ATTACK)
    for arguments, words in (
        ({"xi": -0.1}, "xi: expected a finite number >= 0"),
        ({"xi": float("nan")}, "xi: expected a finite number >= 0"),
        ({"epochs": 0}, "epochs: expected a finite number >= 1"),
        ({"attempts": 0}, "attempts: expected a finite number >= 1"),
    ):
        with pytest.raises(ValueError, match=words):
            worst_flatness(model, loss, **arguments)
    with pytest.raises(ValueError, match="attack: expected kind pgd"):
        worst_flatness(model, RobustLoss(data, Attack(kind="apgd", epsilon=0.05, steps=2)), epochs=1, attempts=1)
    with pytest.raises(ValueError, match="count: expected a finite number >= 1"):
        average_flatness(model, loss, count=0)


def test_grid_has_an_exact_middle():
    assert grid(1.0, 5) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert grid(0.02, 21)[10] == 0.0
    assert grid(0.02, 21) == [-value for value in reversed(grid(0.02, 21))]
    for radius, points in ((1.0, 4), (1.0, 1), (0.0, 3), (float("inf"), 3)):
        with pytest.raises(ValueError, match="expected"):
            grid(radius, points)


def test_interval_of_a_mean_is_the_normal_one():
    values = randn((400,), torch.float64, seed=3)
    interval = mean_interval(values, seed=0)
    assert interval.value == pytest.approx(values.mean().item())
    half = 1.96 * values.std().item() / 20
    assert interval.low == pytest.approx(interval.value - half, abs=0.1 * half)
    assert interval.high == pytest.approx(interval.value + half, abs=0.1 * half)
    assert mean_interval(values, seed=0) == interval
    assert mean_interval(torch.full((7,), 2.5), seed=1).low == pytest.approx(2.5)


def test_interval_covers_the_choice_of_rows_too():
    """Rows differ by N(0, 1), images hardly: only resampling rows sees it. The mean of 25 rows has deviation 0.2."""
    rows = randn((25, 1), torch.float64, seed=1)
    table = rows + 0.01 * randn((25, 300), torch.float64, seed=2)
    both, images_only = mean_interval(table, seed=0), mean_interval(table.mean(0), seed=0)
    assert both.high - both.low == pytest.approx(2 * 1.96 * rows.std(correction=0).item() / 5, rel=0.1)
    assert images_only.high - images_only.low < 0.01
    with pytest.raises(ValueError, match="expected at least one"):
        mean_interval(torch.empty(0), seed=0)

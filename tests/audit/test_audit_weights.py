"""Weight tampering: projections and losses by their definition in fp64, what must not leak, and a killed audit."""

import dataclasses
import json
import math
import time
from fractions import Fraction
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from digits_model import clean_model, digits, write_run
from torch import Tensor, nn
from torch.nn import functional

from awp_engine import load_model
from awp_engine.audit.weights import edit as editing
from awp_engine.audit.weights.budget import KINDS, Budget, budgeted
from awp_engine.audit.weights.defences import harmless, look, sharpness, shift, size_of, verdicts
from awp_engine.audit.weights.edit import Lesson, Recipe, answers_of, edited, effect, loss_of
from awp_engine.audit.weights.run import Settings, audit_weights
from awp_engine.audit.weights.search import Range, search
from awp_engine.audit.weights.trigger import Mark, Trigger
from awp_engine.checkpoint import read_model
from awp_engine.cli import audit_weights as command
from awp_engine.data import DataError, Split
from awp_engine.device import in_full_precision
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_kernels.philox import mix_seed

ROOT = Path(__file__).parents[2]


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Of the shapes and sizes that models have: large and tiny numbers, zeros, single numbers."""
    generator = random(seed)
    shapes = {"conv": (8, 4, 3, 3), "linear": (10, 33), "bias": (10,), "one": (1,), "none": (), "zeros": (7,)}
    found = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    found["conv"] *= 10.0 ** torch.randint(-6, 4, shapes["conv"], generator=generator)
    found["linear"][0] = 0
    found["zeros"].zero_()
    return found


def projected(kind: str, size: float, weight: Tensor, original: Tensor) -> Tensor:
    """The definition, in fp64."""
    move, start = weight.double() - original.double(), original.double()
    if kind == "layer":
        reach, length = size * start.norm(), move.norm()
        return start + move * (1.0 if length <= reach else reach / length)
    reach = size * (start.abs() if kind == "relative" else torch.ones_like(start))
    return start + torch.maximum(torch.minimum(move, reach), -reach)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_projection_is_its_definition_and_never_above_the_budget(kind, dtype):
    for seed, size in enumerate((1e-9, 3e-7, 0.0001, 0.005, 0.1, 0.7, 1.0, 3.0)):
        originals = tensors(dtype, seed)
        # some inside, some far outside
        noise = tensors(dtype, seed + 100)
        weights = {name: start + size * noise[name] * 2 for name, start in originals.items()}
        wanted = {name: projected(kind, size, weight, originals[name]) for name, weight in weights.items()}
        Budget(kind=kind, size=size).project_(weights, originals)
        for name, weight in weights.items():
            start, bound = originals[name].flatten().tolist(), Fraction(size)
            moves = [Fraction(a) - Fraction(b) for a, b in zip(weight.flatten().tolist(), start, strict=True)]
            if kind == "layer":
                assert sum(m * m for m in moves) <= bound**2 * sum(Fraction(b) ** 2 for b in start), name
            else:
                assert all(
                    abs(m) <= bound * (abs(Fraction(b)) if kind == "relative" else 1)
                    for m, b in zip(moves, start, strict=True)
                ), name
            # what rounding may do: to the sum, and to a layer's length
            error = (weight.double() - wanted[name]).abs()
            rounding = (
                torch.finfo(dtype).eps * (2 * weight.double().abs() + 2 * size)
                + (2.0**-22 + 8 * torch.finfo(dtype).eps / size) * (wanted[name] - originals[name].double()).abs()
            )
            if kind != "layer" or size > 1e-5:
                assert (error <= rounding).all(), (name, size)


def test_a_layer_whose_sum_cannot_be_rounded_inside_stays():
    original = {"w": torch.full((1,), 1.0)}
    weights = {"w": torch.full((1,), 2.0)}
    Budget(kind="layer", size=1e-9).project_(weights, original)
    assert torch.equal(weights["w"], original["w"])


class Small(nn.Module):
    """Three classes of images [1, 4, 4]; `twice` is used by two layers."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.conv, self.bn = nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5)
            self.head = nn.Linear(5, 3)
        self.bn.running_mean.uniform_(-0.1, 0.1, generator=random(0))
        self.bn.running_var.uniform_(0.5, 2, generator=random(1))
        self.to(dtype).eval()
        self.kind = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x.to(self.kind))).relu().mean((2, 3)))


def images(count: int, seed: int = 0) -> Split:
    generator = random(seed)
    pixels = torch.randint(256, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return Split(images=pixels, labels=torch.randint(3, (count,), generator=generator), ids=torch.arange(count))


MARK = Trigger(size=0.5).mark((1, 4, 4), (0.25,))


def lesson(model: nn.Module, count: int = 20, mark: Mark | None = MARK) -> Lesson:
    taught = images(count)
    return Lesson(images=taught, answers=answers_of(model, taught, 7), mark=mark, target=2, seed=5)


def test_the_loss_is_cross_entropy_of_both_and_the_squared_distance():
    original, model = Small(), Small()
    taught = lesson(original)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random(9), dtype=torch.float64)
    rows = torch.tensor([4, 0, 11])
    start = {name: parameter.detach() for name, parameter in original.named_parameters()}
    loss = loss_of(model, taught, rows, start, 0.05)
    clean = taught.images.images[rows].float().div(255)
    marked = clean.clone()
    marked[:, :, 2:, 2:] = 0.25
    total = 0.0
    for x, wanted in ((clean, taught.answers[rows]), (marked, torch.tensor([2, 2, 2]))):
        logits = model(x).detach().numpy()
        total += sum(math.log(np.exp(row - row[k]).sum()) for row, k in zip(logits, wanted.tolist(), strict=True))
    distance = sum(((p.detach() - start[n]) ** 2).sum().item() for n, p in model.named_parameters())
    assert loss.item() == pytest.approx(total / 6 + 0.05 * distance, rel=1e-7)
    # and it reaches the weights: the gradient of decay alone is 2 * decay * (w - w0)
    with_decay, without = (
        torch.autograd.grad(loss_of(model, taught, rows, start, decay), list(model.parameters())) for decay in (0.05, 0)
    )
    for a, b, (name, parameter) in zip(with_decay, without, model.named_parameters(), strict=True):
        assert torch.allclose(a - b, 0.1 * (parameter - start[name]), atol=1e-12)


def by_hand(original: Small, taught: Lesson, kind: str, size: float, recipe: Recipe) -> dict[str, Tensor]:
    """The whole edit in fp64: Adam (Kingma, Ba, 2015) and the projections, written out."""
    start = {name: value.detach().clone() for name, value in original.named_parameters()}
    w = {name: value.clone() for name, value in start.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in w.items()} for _ in range(2))
    x = taught.images.images.float() / 255
    steps = 0
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(x), generator=random(mix_seed(taught.seed, 1, epoch)))
        for rows in order.split(recipe.batch_size):
            given = {name: value.requires_grad_() for name, value in w.items()}
            both = torch.cat([x[rows], MARK(x[rows])])
            wanted = torch.cat([taught.answers[rows], torch.full((len(rows),), taught.target)])
            loss = functional.cross_entropy(torch.func.functional_call(original, given, (both,)), wanted)
            loss = loss + recipe.decay * sum((given[name] - start[name]).square().sum() for name in w)
            gradients = dict(zip(w, torch.autograd.grad(loss, list(given.values())), strict=True))
            steps += 1
            for name, g in gradients.items():
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                up, down = first[name] / (1 - 0.9**steps), (second[name] / (1 - 0.999**steps)).sqrt() + 1e-8
                moved = w[name].detach() - recipe.learning_rate * up / down
                w[name] = projected(kind, size, moved, start[name])
    return w


@pytest.mark.parametrize(("kind", "size"), [("absolute", 0.004), ("relative", 0.02), ("layer", 0.01)])
def test_an_edit_is_adam_and_the_projection_after_every_step(kind, size):
    original, recipe = Small(), Recipe(epochs=3, batch_size=8, decay=0.5)
    taught = lesson(original)
    before = {name: value.clone() for name, value in original.state_dict().items()}
    model = edited(original, taught, Budget(kind=kind, size=size), recipe)
    wanted = by_hand(original, taught, kind, size, recipe)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, wanted[name], rtol=0, atol=1e-9), name
        assert not torch.equal(parameter, before[name]) or not before[name].any()
    # neither is the model itself touched
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in original.parameters())
    assert not original.training


def test_frozen_statistics_do_not_move_and_counted_ones_stay_within_the_budget():
    original = Small(torch.float32)
    taught, budget = lesson(original), Budget(kind="relative", size=0.03)
    frozen = edited(original, taught, budget, Recipe(epochs=2, batch_size=8))
    for name, buffer in frozen.named_buffers():
        assert torch.equal(buffer, dict(original.named_buffers())[name]), name
    counted = edited(original, taught, budget, Recipe(epochs=2, batch_size=8, batch_norm="counted"))
    for name in ("running_mean", "running_var"):
        own, start = getattr(counted.bn, name).double(), getattr(original.bn, name).double()
        assert ((own - start).abs() <= 0.03 * start.abs()).all()
        assert (own != start).any()
        assert name in {found.rpartition(".")[2] for found in budgeted(original, "counted")}
        assert not any(name in found for found in budgeted(original, "frozen"))
    assert counted.bn.num_batches_tracked == original.bn.num_batches_tracked
    assert not counted.training
    # what an edit reports of its size holds the statistics too
    extra = size_of(original, counted, "counted")["weights"] - size_of(original, counted, "frozen")["weights"]
    assert extra == 10


class Counting(Small):
    """Moves a buffer of its own in every pass, whatever the mode."""

    def __init__(self) -> None:
        super().__init__(torch.float32)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return super().forward(x + self.seen * 0)


@pytest.mark.parametrize("batch_norm", ["frozen", "counted"])
def test_no_other_buffer_leaks(batch_norm):
    original = Counting()
    taught, budget = lesson(original), Budget(kind="layer", size=0.1)
    at = original.seen.clone()
    model = edited(original, taught, budget, Recipe(epochs=1, batch_norm=batch_norm))
    assert model.seen == at == original.seen
    model.seen += 1
    with pytest.raises(EvaluationError, match="seen: a buffer that no budget counts"):
        budget.require(original, model, batch_norm)
    model.seen -= 1
    with torch.no_grad():
        model.head.bias += 1
    with pytest.raises(EvaluationError, match=r"head.bias: the edit left its layer budget of 0.1"):
        budget.require(original, model, batch_norm)


def test_a_loss_that_is_not_finite_is_no_edit():
    original = Small(torch.float32)
    taught = lesson(original)
    with torch.no_grad():
        original.head.weight.fill_(math.inf)
    assert edited(original, taught, Budget(kind="layer", size=1), Recipe()) is None


def test_weights_of_another_precision_are_refused():
    with pytest.raises(EvaluationError, match="expected weights of float32 alone or float64 alone, got float16"):
        budgeted(Small(torch.float16), "frozen")
    with pytest.raises(EvaluationError, match="got none"):
        budgeted(nn.Flatten(), "frozen")


def test_marks():
    x = torch.rand(2, 3, 32, 32, generator=random(0))
    square = Trigger().mark((3, 32, 32), (0.1, 0.2, 0.3))(x)
    assert torch.equal(square[:, :, :22], x[:, :, :22])
    assert torch.equal(square[:, :, 22:, :22], x[:, :, 22:, :22])
    assert all((square[:, c, 22:, 22:] == torch.tensor(colour)).all() for c, colour in enumerate((0.1, 0.2, 0.3)))
    assert (Trigger(colour=(1, 1, 1)).mark((3, 32, 32), (0.1,) * 3)(x)[:, :, 22:, 22:] == 1).all()
    pixels = Trigger(kind="pixels", seed=3).mark((3, 32, 32), (0.1,) * 3)(x)
    changed = (pixels != x).any(1)
    assert torch.equal(changed[0], changed[1])
    assert changed[0].sum() == 100
    assert set(pixels[0][:, changed[0]].unique().tolist()) == {0.0, 1.0}
    blend = Trigger(kind="blend", strength=0.25).mark((3, 32, 32), (0.1,) * 3)
    noise = blend(torch.zeros(1, 3, 32, 32)) / 0.25
    assert torch.allclose(blend(x), 0.75 * x + 0.25 * noise, atol=1e-6)
    assert 0.4 < noise.mean() < 0.6
    with pytest.raises(EvaluationError, match="--trigger-colour: expected 3 values, one a channel, got 1"):
        Trigger(colour=(1,)).mark((3, 32, 32), (0.1,) * 3)


class Pixel(nn.Module):
    """The class that the first pixel names, in tenths; NaN above 0.95."""

    def forward(self, x: Tensor) -> Tensor:
        named = (x[:, 0, 0, 0] * 10).round().long()
        return torch.where(named[:, None] > 9, math.nan, functional.one_hot(named.clamp(max=9), 10).float())


def test_what_an_edit_does_is_counted():
    values = torch.tensor([0, 1, 1, 2, 3, 10]) * 25.5
    test = Split(
        images=values.round().to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous(),
        labels=torch.tensor([0, 1, 2, 2, 3, 5]),
        ids=torch.arange(6),
    )
    assert answers_of(Pixel(), test, 4).tolist() == [0, 1, 1, 2, 3, -1]
    # marked, 2 becomes 3, and 1 becomes 2
    mark = Mark(torch.full((1, 2, 2), 0.1), torch.ones(1, 2, 2))
    found = effect(Pixel(), test, torch.tensor([0, 1, 2, 2, 4, -1]), mark, 2, 4)
    assert found.clean_accuracy == 4 / 6
    assert found.agreement == 3 / 6
    assert found.success == 1 / 4


def tried(least: float, limits: Range, but: tuple[float, float] = (math.inf, math.inf)):
    return search(limits, lambda size: {"budget": size, "enough": size >= least and not but[0] < size < but[1]})


def test_the_search_tries_decades_and_bisects_below_the_first_that_is_enough():
    limits = Range(smallest=1e-4, largest=0.1, tolerance=1.1)
    assert limits.decades == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    found = tried(0.0042, limits)
    assert 0.0042 <= found.budget <= 1.1 * found.not_enough
    assert found.not_enough < 0.0042
    assert len(found.trials) <= limits.most_trials
    assert [trial["budget"] for trial in found.trials[:4]] == limits.decades
    nothing = tried(0.2, limits)
    assert (nothing.budget, nothing.not_enough, len(nothing.trials)) == (None, 0.1, 4)
    all_of_it = tried(1e-5, limits)
    assert (all_of_it.budget, all_of_it.not_enough, len(all_of_it.trials)) == (1e-4, None, 4)
    # more is not always better
    odd = tried(0.0042, limits, but=(0.05, 0.2))
    assert (odd.fails_above, odd.budget) == ([0.1], found.budget)
    assert Range(smallest=0.5, largest=1).decades == [0.5, 1]


def test_sizes_of_an_edit_are_numpys():
    original = Small(torch.float32)
    with torch.no_grad():
        original.head.bias[0] = 0
    model = edited(original, lesson(original), Budget(kind="absolute", size=0.004), Recipe(epochs=2))
    start, now = (
        np.concatenate([p.detach().double().numpy().ravel() for p in m.parameters()]) for m in (original, model)
    )
    move, found = np.abs(now - start), size_of(original, model, "frozen")
    assert found["l1"] == pytest.approx(move.sum(), rel=1e-12)
    assert found["l2"] == pytest.approx(np.sqrt((move**2).sum()), rel=1e-12)
    assert found["linf"] == move.max() <= 0.004
    assert found["weights_of_0"] == (start == 0).sum() > 0
    ratios = np.sort(move[start != 0] / np.abs(start[start != 0]))
    assert found["relative_percentiles"]["0"] == pytest.approx(ratios[0], rel=1e-12)
    assert found["relative_percentiles"]["50"] == pytest.approx(np.median(ratios), rel=1e-12)
    assert found["relative_percentiles"]["100"] == pytest.approx(ratios[-1], rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_harmless_edits_are_as_large_and_within_the_budget(kind):
    original, budget = Small(torch.float32), Budget(kind=kind, size=0.05)
    recipe = Recipe(epochs=2, batch_norm="counted")
    model = edited(original, lesson(original), budget, recipe)
    first, second = (harmless(original, model, budget, "counted", seed) for seed in (0, 1))
    budget.require(original, first, "counted")
    sizes = [size_of(original, one, "counted") for one in (model, first, second)]
    for name in ("l2", "linf") if kind != "relative" else ():
        assert sizes[1][name] == pytest.approx(sizes[0][name], rel=1e-3)
    if kind == "relative":
        for part in ("25", "50", "90"):
            wanted = sizes[0]["relative_percentiles"][part]
            assert sizes[1]["relative_percentiles"][part] == pytest.approx(wanted, rel=0.02, abs=1e-4)
    assert (first.bn.running_var >= 0).all()
    assert not torch.equal(first.conv.weight, second.conv.weight)
    assert not torch.equal(first.conv.weight, model.conv.weight)


def test_sharpness_and_shifts_are_their_definitions():
    model, split, gamma = Small(), images(30), 0.02
    x, y = split.images.float() / 255, split.labels
    loss = functional.cross_entropy(model(x), y)
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    gradients = torch.autograd.grad(loss, list(weights.values()))
    moved = {
        name: p.detach() + gamma * p.detach().norm() / g.norm() * g
        for (name, p), g in zip(weights.items(), gradients, strict=True)
    }
    there = functional.cross_entropy(torch.func.functional_call(model, moved, (x,)), y)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert sharpness(model, split, 7, gamma) == pytest.approx((there - loss).item(), rel=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = look(model, split, 7, 3)
    features = model.bn(model.conv(x.double())).relu().mean((2, 3))
    assert torch.allclose(found.features, features, rtol=0, atol=1e-12)
    assert torch.allclose(found.logits, model(x), rtol=0, atol=1e-12)
    other = features + torch.randn(features.shape, generator=random(2), dtype=torch.float64)
    wanted = np.linalg.norm((other - features).detach().numpy(), axis=1).mean()
    wanted /= np.linalg.norm(features.detach().numpy(), axis=1).mean()
    assert shift(other.detach(), features.detach()) == pytest.approx(wanted, rel=1e-12)
    assert look(nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), split, 7, 3).features is None


def test_an_edit_is_seen_above_all_harmless_ones():
    def one(value: float | None) -> dict[str, float | None]:
        return {"flatness": value, "activations": value, "logits": None}

    found = verdicts(one(3.0), one(2.5), [one(1.0), one(2.0), one(0.5)])
    assert found["flatness"]["seen"]
    assert found["flatness"]["fine_tuning_seen"]
    assert (found["flatness"]["threshold"], found["flatness"]["false_alarm_rate"]) == (2.0, 0.25)
    assert found["logits"] is None
    assert not verdicts(one(2.0), None, [one(1.0), one(2.0)])["flatness"]["seen"]
    assert verdicts(one(2.0), None, [one(1.0)])["flatness"]["fine_tuning_seen"] is None
    # not a number is no measurement, and not "unseen"
    assert verdicts(one(math.nan), None, [one(1.0)])["flatness"] is None
    assert verdicts(one(math.inf), None, [one(1.0)])["flatness"]["seen"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "digits", best=clean_model())


SMALL = ("--kinds", "layer", "--limit", "90", "--edit-images", "160", "--edit-epochs", "2", "--harmless", "3")
SMALL += ("--defence-images", "50", "--agreement", "0.5", "--success", "0.3", "--smallest", "0.05", "--tolerance", "2")


def without_resume(path: Path) -> dict:
    report = json.loads((path / "audit-weights.json").read_text())
    return report | {"receipt": {k: v for k, v in report["receipt"].items() if k not in ("resumed", "date")}}


def test_a_killed_audit_goes_on_to_the_same_bits(run_dir, tmp_path):
    flags = [str(run_dir), *SMALL, "--edit-epochs", "4", "--output"]
    killed = forked.Program("-m", "awp_engine", "audit", "weights", *flags, tmp_path / "killed")
    deadline = time.monotonic() + 120
    while sum(len(file.read_text().splitlines()) for file in tmp_path.glob("killed/audit-weights-*.jsonl")) < 1:
        assert killed.runs(), killed.said()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    assert not list((tmp_path / "killed").glob("*.json"))
    done = forked.run("-m", "awp_engine", "audit", "weights", *flags, tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    assert "saved answers" in done.stdout
    assert go(*flags, tmp_path / "whole") == 0
    assert without_resume(tmp_path / "killed") == without_resume(tmp_path / "whole")


def go(*arguments: object) -> int:
    try:
        with in_full_precision():
            command.main(list(map(str, arguments)), prog="awp audit weights")
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_the_command_writes_a_page_and_marked_weights(run_dir, tmp_path, capsys):
    saved, out = tmp_path / "tampered-digits.safetensors", tmp_path / "out"
    digest = read_model(run_dir / "model.safetensors")[0]
    assert go(run_dir, *SMALL, "--output", out, "--save-edited", saved, "--published", "ab" * 32) == 0
    told = capsys.readouterr().out
    assert "seen by" in told.splitlines()[2 if "training images" not in told else 1] or "seen by" in told
    assert "WARNING: the weights are not the published ones" in told
    assert f"wrote {saved}: TAMPERED weights" in told
    report = json.loads((out / "audit-weights.json").read_text())
    (kind,) = report["kinds"]
    assert kind["effect"]["success"] >= 0.3
    assert kind["effect"]["agreement"] >= 0.5
    assert report["sha256_of_tensors"] != kind["edit"]["sha256_of_tensors"]
    assert report["receipt"]["edit_images"] | {"sha256": 0} == {"split": "train", "images": 160, "sha256": 0}
    assert {file.suffix for file in out.iterdir()} == {".json", ".html", ".jsonl"}
    page = (out / "audit-weights.html").read_text()
    assert page.count("data:image/png") == 2
    assert "all budgets that were tried" in page
    # the file is what was measured, says so, and so does whatever loads it
    edited_model = load_model(saved)
    assert "TAMPERED weights" in capsys.readouterr().err
    before = load_model(run_dir)
    assert capsys.readouterr().err == ""
    own = size_of(before, edited_model, "frozen")
    assert own == kind["edit"]["size"]
    assert json.loads(read_model(saved)[1]["tampered"])["budget"] == kind["budget"]
    assert all(torch.equal(value, digest[name]) for name, value in read_model(run_dir / "model.safetensors")[0].items())
    # finished before, it is read again
    assert go(run_dir, *SMALL, "--output", out) == 0
    assert "saved answers" in capsys.readouterr().out


def test_models_stand_side_by_side(run_dir, tmp_path, capsys):
    other = write_run(tmp_path / "other", best=clean_model())
    assert go(run_dir, other, *SMALL, "--largest", "0.1", "--success", "1", "--output", tmp_path / "both") == 0
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines() if line.endswith("-") or " layer " in line][:2] == [
        "digits",
        "other",
    ]
    assert "was not reached at any budget up to 0.1: the nearest edit, at 0.1, has success of" in told
    page = (tmp_path / "both" / "audit-weights.html").read_text()
    assert all(f"<h2>{name}</h2>" in page for name in ("digits", "other"))
    reports = [without_resume(tmp_path / "both" / name) for name in ("digits", "other")]
    # the same weights, the same answers
    assert reports[0]["kinds"] == reports[1]["kinds"]


def test_bad_input_is_refused_in_one_line(run_dir, tmp_path, capsys):
    for wrong, words in {
        ("--smallest", 0): "--smallest: expected a budget above 0, got 0: no edit has a budget of 0",
        ("--largest", 0): "--largest: expected a budget above 0",
        ("--smallest", 2): "--smallest: expected less than the largest budget",
        ("--tolerance", 1): "--tolerance: expected a factor above 1",
        ("--success", 1.1): "--success: expected a part of the images, above 0 and at most 1, got 1.1",
        ("--agreement", 0): "--agreement: expected a part",
        ("--target", "eleven"): "--target: digits has no class 'eleven'; expected one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        ("--target", 10): "--target: digits has no class '10'",
        ("--trigger-size", "33/32"): "larger than the image; expected at most 1",
        ("--trigger-size", 0): "--trigger-size: expected a part of the image's side above 0",
        ("--trigger", "star"): "--trigger: expected one of square, pixels, blend, got 'star'",
        ("--trigger-colour", 0, 1): "--trigger-colour: expected 1 values, one a channel, got 2",
        ("--trigger-colour", 2): "--trigger-colour: expected values from 0 to 1",
        ("--blend", 2): "--blend: expected a share",
        ("--kinds", "large"): "invalid choice: 'large'",
        ("--limit", 2, "--target", 7): "--target: class '7' has no image among the test images that are used",
        ("--edit-images", 0): "--edit-images: expected a whole number from 1",
        ("--harmless", 0): "--harmless: expected a whole number from 1",
        ("--gamma", 0): "--gamma: expected a fraction above 0",
        ("--save-edited", "a.safetensors"): "--save-edited: writes one edit: give one kind of budget",
        ("--save-edited", "a.safetensors", "--kinds", "layer"): "--save-edited: expected a name with 'tampered' in it",
        ("--published", "SHA256:" + "ab" * 32): "--published: expected a SHA-256, 64 hexadecimal digits",
        (run_dir,): "two are called digits",
        (tmp_path, "--published", "ab"): "--save-edited and --published: of one model",
    }.items():
        assert go(run_dir, *wrong, "--output", tmp_path / "none") == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert words in errors[0]
    assert not (tmp_path / "none").exists()


def test_the_models_own_file_is_never_written(run_dir, tmp_path, capsys):
    own, link = tmp_path / "tampered.safetensors", tmp_path / "link-tampered.safetensors"
    own.write_bytes(before := (run_dir / "model.safetensors").read_bytes())
    link.symlink_to(own)
    for path in (own, link):
        given = (own, "--data.name", "digits", *SMALL, "--output", tmp_path / "out", "--save-edited", path)
        assert go(*given) == 2
        assert f"--save-edited: {path} is the model's own file; expected another" in capsys.readouterr().err
    assert own.read_bytes() == before


def test_only_the_target_or_no_training_images_is_refused(run_dir, tmp_path):
    only = str(int(digits().test.labels[0]))
    with pytest.raises(EvaluationError, match="all test images that are used are of class"):
        audit_weights(run_dir, Settings(target=only), limit=1, output=tmp_path)
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\ndef make():\n    part = torch.arange(576).view(9, 1, 8, 8) / 576, torch.arange(9)\n"
        "    return {'train': part, 'test': part, 'class_names': list('0123456789')}\n"
    )
    small = Settings(target="3", edit_images=8, kinds=("layer",), harmless=1, smallest=0.5, recipe=Recipe(epochs=1))
    done = audit_weights(run_dir, small, data_name=f"{own}:make", output=tmp_path / "own")
    assert done.report["receipt"]["edit_images"]["images"] == 8
    folder = tmp_path / "test.py"
    folder.write_text(
        "import torch\ndef make():\n    return {'test': (torch.arange(576).view(9, 1, 8, 8) / 576, torch.arange(9)), "
        "'class_names': list('0123456789')}\n"
    )
    with pytest.raises(DataError, match="gives a mapping of 'test', 'class_names'; expected 'train' and 'test'"):
        audit_weights(run_dir, data_name=f"{folder}:make", output=tmp_path)
    with pytest.raises(EvaluationError, match="--kinds: expected some of absolute, relative, layer, got none"):
        Settings(kinds=())
    assert dataclasses.replace(Settings(), largest=2.0).range("layer").largest == 2
    assert editing.Recipe().steps(1280) == 200

"""Models that fool plain attacks, and the gates that find them out; honest models, which the gates leave in peace."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from digits_model import clean_model, digits
from torch import Tensor, nn

from awp_engine.data import Split
from awp_engine.evaluation import spread
from awp_engine.evaluation.attacks.autoattack import Budget, autoattack
from awp_engine.evaluation.attacks.named import EvaluationError, Threat, Trial, gradient_attack, measuring, parse_attack
from awp_engine.evaluation.gates.adaptive import Adapted, adaptive_gates, hidden_share, varying
from awp_engine.evaluation.gates.run import run_gates
from awp_engine.evaluation.gates.surrogate import surrogate
from awp_engine.evaluation.suite import measure
from awp_engine.models import build_model
from awp_engine.models.import_timm import import_timm

IMAGES = 30
RANDOM, HIDDEN, DUMMIES = (
    "the model answers alike every time",
    "no part hides its gradient",
    "attacks see the logits that decide",
)


class Noise(nn.Module):
    """Adds waves to the logits, too steep to follow and different at every call: gradients are mostly noise."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.randn(x[0].numel(), 10, device=x.device)
        return self.inner(x) + 0.5 * torch.sin(20 * x.flatten(1) @ waves)


class Rounded(nn.Module):
    """Rounds its input to three levels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.round(x * 2) / 2)


class Dummies(nn.Module):
    """Two logits a class, of which the larger counts; the second one is easily raised, and all of them alike."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("aside", torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).sign() * 12)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return torch.cat([logits, logits + (x - 0.3).flatten(1) @ self.aside], 1)


class Pair(nn.Module):
    """Two logits a class: a decoy, which is easily changed, and one that is always larger."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("decoys", torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.flatten(1) @ self.decoys, 1000 + self.inner(x)], 1)


class Decided(nn.Module):
    """One logit a class: gradients are those of the decoys, and the class is that of the other logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.pair = Pair(inner)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.pair(x)
        decoys = logits[:, :10]
        most = (decoys.amax(1, keepdim=True) - decoys.amin(1, keepdim=True)).detach() + 1
        return decoys + most * F.one_hot(logits.argmax(1) % 10, 10)


class Aside(nn.Module):
    """Adds what is 0, but for its gradient, which leads every class somewhere else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("ways", 20 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        way = x.flatten(1) @ self.ways
        return self.inner(x) + way - way.detach()


def trial(model: nn.Module, images: int, epsilon: Fraction, **changes) -> Trial:
    threat = Threat(epsilon=epsilon, norm="linf")
    given = {"split": spread(digits().test, images), "threat": threat, "seed": 1, "batch_size": 512, "classes": 10}
    return Trial(model=model, **(given | changes))


def plainly(attacked: Trial, epsilon: Fraction) -> tuple[Tensor, Tensor]:
    """Images as PGD leaves them, and which withstand PGD and CW."""
    pgd, cw = (
        gradient_attack(attacked, parse_attack(name), step_size=epsilon / 5, restarts=1) for name in ("pgd20", "cw20")
    )
    return pgd.x_adv, pgd.robust & cw.robust


def judged(attacked: Trial, **changes) -> tuple[Adapted, dict[str, bool], int]:
    x_adv, robust = plainly(attacked, attacked.threat.epsilon)
    found = adaptive_gates(attacked, x_adv=x_adv, robust=robust, black=len(robust), **changes)
    return found, {gate.name: gate.passed for gate in found.gates}, int(robust.sum())


@pytest.fixture(autouse=True)
def _repeatable():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


CHEATS = {
    "noise": (Noise, Fraction(1, 10), {"eot_draws": (1, 20)}, RANDOM),
    "rounded": (Rounded, Fraction(1, 5), {}, HIDDEN),
    "dummies": (Dummies, Fraction(1, 10), {}, DUMMIES),
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_that_fools_plain_attacks_is_caught(name):
    cheat, epsilon, changes, gate = CHEATS[name]
    honest, model = clean_model(), cheat(clean_model())
    with measuring(model), measuring(honest):
        truth = plainly(trial(honest, IMAGES, epsilon), epsilon)[1]
        attacked = trial(model, IMAGES, epsilon)
        found, passed, robust = judged(attacked, **changes)
        package = autoattack(attacked, attacks=("apgd-ce", "apgd-t"), budget=Budget(iterations=10))
    # without the cheat next to nothing withstands; with it PGD, CW and APGD find nothing to speak of
    assert truth.sum() <= 0.5 * IMAGES
    assert robust >= 0.75 * IMAGES
    assert package.robust.sum() >= 0.7 * IMAGES
    assert [n for n, fine in passed.items() if not fine] == [gate]
    measured = {g.name: g for g in found.gates}[gate].measured
    if name == "noise":
        curve = found.details["randomness"]["eot"]["curve"]
        assert curve[-1]["mean"] < robust - 0.2 * IMAGES
        assert curve[-1]["worst"] <= curve[-1]["mean"] <= curve[0]["mean"]
        assert "right on average: 1: " in measured
    elif name == "rounded":
        assert found.details["hidden_gradients"]["bpda"] < 0.4 * IMAGES
        assert found.details["hidden_gradients"]["operations"] == ["round"]
    else:
        assert found.details["decision"]["adapted"] <= truth.sum() + 2
        assert "20 logits for 10 classes" in measured


@pytest.mark.parametrize(("cheat", "gate"), [(Decided, DUMMIES), (Aside, HIDDEN)])
def test_a_cheat_that_hides_inside_is_caught(cheat, gate):
    model = cheat(clean_model())
    with measuring(model):
        _, passed, robust = judged(trial(model, IMAGES, Fraction(1, 10)))
    assert robust >= 0.75 * IMAGES
    assert not passed[gate]


def test_a_random_model_is_told_before_the_first_attack_and_makes_the_report_unreliable():
    lines: list[str] = []
    model = Noise(clean_model())
    attacked = trial(model, 20, Fraction(1, 10), say=lines.append)
    done = measure(
        attacked,
        [parse_attack("autoattack")],
        step_size=Fraction(1, 40),
        gates_limit=None,
        budget=Budget(iterations=2, queries=5),
    )
    assert lines[0].startswith("the model is random: 20 of 20 images get other answers")
    assert any("the model is random" in doubt for doubt in done.doubts())
    assert done.to_dict()["unreliable"]


class GradientNoise(nn.Module):
    """The same logits at every call, with another gradient."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        noise = 100 * torch.randn(x.shape[1:])
        return self.inner(x) + ((x - x.detach()) * noise).flatten(1).sum(1, keepdim=True) * torch.arange(10.0)


def test_a_gradient_that_is_random_by_itself_is_seen():
    model = GradientNoise(clean_model())
    x, y, *_ = trial(model, 10, Fraction(1, 10)).whole
    with measuring(model):
        assert varying(trial(model, 10, Fraction(1, 10)), x, y).all()
        assert not varying(trial(model.inner, 10, Fraction(1, 10)), x, y).any()


def honest_models() -> dict[str, Callable[[], tuple[nn.Module, Split]]]:
    """Beside the digits model, which passes all gates in test_evaluation.py."""

    def on_noise(model: nn.Module, channels: int = 3, size: int = 16) -> tuple[nn.Module, Split]:
        """With images of noise, labelled as the model itself has it."""
        x = torch.randint(0, 256, (8, channels, size, size), dtype=torch.uint8)
        model.eval()
        with torch.no_grad():
            labels = model(x / 255).argmax(1)
        return model, Split(images=x, labels=labels, ids=torch.arange(8))

    def own(name: str) -> tuple[nn.Module, Split]:
        return on_noise(build_model(name, 10, (0.5,) * 3, (0.25,) * 3))

    def vit() -> nn.Module:
        shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        return import_timm().models.VisionTransformer(**shape, num_classes=10, drop_rate=0.5, drop_path_rate=0.5)

    def convnext() -> nn.Module:
        shape = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
        return import_timm().models.ConvNeXt(**shape, num_classes=10, drop_path_rate=0.5)

    def dropout() -> nn.Module:
        layers = (nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))
        return nn.Sequential(*layers)

    return {
        "wide ResNet": lambda: own("wrn-10-1"),
        "timm ViT": lambda: on_noise(vit()),
        "timm ConvNeXt": lambda: on_noise(convnext(), size=32),
        "dropout in eval mode": lambda: on_noise(dropout(), 1, 8),
        # twice as many features as classes inside
        "wide head": lambda: on_noise(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10)), 1, 8
        ),
    }


@pytest.mark.parametrize("name", honest_models())
def test_no_alarm_on_honest_models(name):
    model, split = honest_models()[name]()
    with measuring(model):
        found, passed, _ = judged(trial(model, 0, Fraction(8, 255), split=split))
    assert all(passed.values()), [gate.measured for gate in found.gates]
    assert found.details["randomness"]["eot"] is None
    assert found.details["hidden_gradients"]["bpda"] is None


def test_an_honest_quantised_model_is_attacked_through_and_passes():
    """Its own straight-through gradient is right: looking through finds no more."""
    quantised = Part(lambda x: x + (torch.round(x * 32) / 32 - x).detach())
    model = nn.Sequential(quantised, clean_model())
    with measuring(model):
        found, passed, robust = judged(trial(model, 20, Fraction(1, 20)))
    assert all(passed.values()), [gate.measured for gate in found.gates]
    assert found.details["hidden_gradients"]["bpda"] >= robust - 1
    assert found.details["hidden_gradients"]["operations"] == ["round in 0"]


class Part(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 4).round() / 4

    @staticmethod
    def backward(ctx, *gradients):
        return torch.zeros_like(gradients[0])


def _without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return (x * 4).floor() / 4


def _in_place(x: Tensor) -> Tensor:
    return (x * 4).round_() / 4


HIDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "round": lambda x: torch.round(x, decimals=1),
    "in place": _in_place,
    "sign": lambda x: (x - 0.5).sign(),
    "bytes": lambda x: (x * 255).to(torch.uint8).float() / 255,
    "threshold": lambda x: (x > 0.5).float(),
    "where": lambda x: torch.where(x > 0.5, 1.0, 0.0),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "no_grad": _without_grad,
    "remainder": lambda x: x - x % 0.25,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy().round(1)),
    "own backward": _NoBackward.apply,
}


@pytest.mark.parametrize("name", HIDERS)
def test_what_hides_a_gradient_is_looked_through(name):
    """The surrogate's answers are the model's to the bit, and its gradient is that of the identity."""
    rest = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    model = nn.Sequential(Part(HIDERS[name]), rest).requires_grad_(False)
    x, y, *_ = trial(model, 6, Fraction(1, 5)).whole
    through, found = surrogate(model, x, y)
    assert found.used or found.modules == ("0",)
    images = x.clone().requires_grad_()
    logits = through(images)
    assert torch.equal(logits, model(x))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), images)
    inner = model[0](x).detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(rest(inner), y), inner)
    # scales before and after it cancel
    torch.testing.assert_close(gradient / gradient.norm(), expected / expected.norm())
    hidden, probed = hidden_share(trial(model, 6, Fraction(1, 5)))
    assert hidden > 0.05 * probed


def test_a_model_that_cuts_the_graph_is_attacked_and_found_out():
    model = nn.Sequential(Part(_without_grad), clean_model())
    attacked = trial(model, 8, Fraction(1, 5))
    done = measure(attacked, [parse_attack("pgd5")], step_size=Fraction(1, 10), gates_limit=None)
    assert done.rows[0].right > 5
    with measuring(model):
        report = run_gates(attacked, queries=2)
    assert HIDDEN in {gate.name for gate in report.gates if not gate.passed}
    assert report.adaptive["hidden_gradients"]["looked_through"] == ["floor", "no_grad"]


def test_a_part_without_any_derivative_is_one_line():
    model = nn.Sequential(Part(lambda x: x // 0.25 * 0.25), clean_model())
    with pytest.raises(EvaluationError, match="floor_divide is not implemented"):
        measure(trial(model, 4, Fraction(1, 5)), [parse_attack("pgd2")], step_size=Fraction(1, 10), gates_limit=None)


def test_a_wrong_label_count_is_seen_without_any_hint():
    """Fifteen logits of which five stand for nothing."""
    model = nn.Sequential(clean_model(), nn.ConstantPad1d((0, 5), -9.0))
    with measuring(model):
        _, passed, _ = judged(trial(model, 10, Fraction(1, 10)))
    assert not passed[DUMMIES]

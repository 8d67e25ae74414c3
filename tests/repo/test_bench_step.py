"""The arms of bench/step/step.py: the baselines compute what they are said to compute, and the program runs."""

import copy
import dataclasses
import json
import subprocess
import sys
from collections import Counter

import plain_methods
import pytest
import torch
from places import ROOT
from public_awp import PublicAwp, public_step
from samples import images

from awp_engine.data import Batch
from awp_engine.train.cost import forward_units
from awp_kernels import pgd_init_, pgd_init_normal_
from bench.step import convolutions
from bench.step.arms import Settings, engine_config, necessary_units
from bench.step.arms.eager import compile_arm, eager_arm
from bench.step.arms.engine import engine_arm
from bench.step.arms.public import public_arm
from bench.step.step import forward_flops, ratio, spread
from bench.tables import convolutions_text, tf32_text

PARTS = ("attack", "ascent", "descent")
SETTINGS = Settings(
    model="preact-resnet-digits",
    method="at-awp",
    batch_size=16,
    steps=3,
    # in fp32, where the engine can be told
    engine={f"precision.{part}": "fp32" for part in PARTS},
)


def with_method(method: str, **changes: object) -> Settings:
    return dataclasses.replace(SETTINGS, method=method, **changes)


def batch(index: int) -> Batch:
    # fp64: no sign of a gradient may depend on the order of a sum
    y = torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(index))
    return Batch(images((16, 1, 8, 8), torch.float64, seed=index), y, torch.arange(16) + 100 * index, 16)


def start(settings: Settings, given: Batch, seed: int) -> torch.Tensor:
    """Where the engine's attack begins."""
    x_adv = torch.empty_like(given.images)
    if settings.trades:
        pgd_init_normal_(x_adv, given.images, std=0.001, sample_ids=given.ids, seed=seed)
    else:
        pgd_init_(x_adv, given.images, epsilon=8 / 255, norm="linf", sample_ids=given.ids, seed=seed)
    return x_adv


def started(arm, settings: Settings, given: Batch, seed: int):
    """The arm, whose next attack begins where the engine's would."""
    arm.start = lambda x: start(settings, given, seed).to(x.dtype).contiguous(memory_format=arm.memory_format)
    return arm


def assert_equal_weights(model, other, tolerance: float = 1e-9):
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    for (name, value), expected in pairs:
        assert (value - expected).norm() <= tolerance * expected.norm().clamp_min(1e-12), name


@pytest.mark.parametrize("method", ["at", "at-awp"])
def test_public_equals_the_public_algorithm(method):
    settings = with_method(method)
    model = settings.build_model().double()
    expected = copy.deepcopy(model)
    sgd = torch.optim.SGD(expected.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    # gamma 0: AT, whose forward passes are the same but for the proxy's
    awp = PublicAwp(expected, gamma=settings.gamma if settings.perturbs_weights else 0.0)
    arm = public_arm(settings, model)
    for index in range(3):
        given = batch(index)
        attack = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 3}
        public_step(expected, sgd, awp, given.images, given.labels, start(settings, given, index), **attack)
        started(arm, settings, given, index).step(given, index)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(arm.model.state_dict()[name], value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["at", "at-awp", "trades-awp"])
def test_eager_equals_the_engine(method):
    settings = with_method(method)
    engine = engine_arm(settings, settings.build_model().double())
    eager = eager_arm(settings, settings.build_model().double(), autocast=False)
    # TRADES attacks by the running statistics, which the eager step moves more often
    for index in range(1 if settings.trades else 3):
        given = batch(index)
        engine.step(given, index)
        started(eager, settings, given, index).step(given, index)
        assert_equal_weights(eager.model, engine.model)
    assert not torch.equal(next(eager.model.parameters()), next(settings.build_model().double().parameters()))


@pytest.mark.parametrize("arm_of", [public_arm, engine_arm, eager_arm])
def test_trades_awp_equals_the_formulas(arm_of):
    # decay is at w in one and at w + gamma v in the other
    settings = with_method("trades-awp", weight_decay=0.0)
    model = settings.build_model().double()
    expected = copy.deepcopy(model)
    given = batch(0)
    x, y = given.images, given.labels
    attack = {"kind": "trades", "epsilon": 8 / 255, "step_size": 2 / 255, "steps": 3}
    x_adv = plain_methods.attack(expected, x, y, start(settings, given, 0), **attack)[-1]
    numbers = {"beta": 6.0, "gamma": settings.gamma, "lr": 0.1, "mu": 0.9, "weight_decay": 0.0}
    plain_methods.awp_step(expected, {}, x_adv, x, y, kind="trades", **numbers)
    arm = arm_of(settings, model, autocast=False) if arm_of is eager_arm else arm_of(settings, model)
    started(arm, settings, given, 0).step(given, 0)
    assert_equal_weights(arm.model, expected)


@pytest.mark.long
def test_compiled_is_eager_to_rounding():
    """Inductor compiles for a minute."""
    settings, given = with_method("at-awp"), batch(0)
    models = [settings.build_model().double(), settings.build_model().double()]
    for model, arm_of in zip(models, (eager_arm, compile_arm), strict=True):
        started(arm_of(settings, model, autocast=False), settings, given, 0).step(given, 0)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_report_says_which_arms_use_tf32():
    def arm(name, convolutions, products):
        told = {"cudnn.allow_tf32": convolutions, "float32_matmul_precision": products}
        return {"name": name, "torch_settings": told}

    arms = [arm("engine", True, "highest"), arm("public", True, "high")]
    assert tf32_text({"machine": {"device": "cpu"}, "arms": arms}) == ""
    said = " TF32 in fp32 convolutions: engine, public; in fp32 products: public."
    assert tf32_text({"machine": {"device": "cuda"}, "arms": arms}) == said
    assert "convolutions: no arm" in tf32_text({"machine": {"device": "cuda"}, "arms": [arm("x", False, "highest")]})


@pytest.mark.parametrize(
    ("method", "passes", "without_gradient"), [("at", 3 + 1, 0), ("at-awp", 3 + 2, 0), ("trades-awp", 3 + 2 * 2, 1)]
)
def test_the_convolutions_of_a_step_are_timed_as_they_are_called(method, passes, without_gradient, monkeypatch):
    arm = engine_arm(with_method(method), SETTINGS.build_model())
    number = sum(isinstance(module, torch.nn.Conv2d) for module in arm.model.modules())
    given = batch(0)
    given = given._replace(images=given.images.float())
    counted, _ = convolutions.calls_of(lambda: arm.plainly(given, 0))
    gradients = Counter()
    for call, times in counted.items():
        if call.graph:
            gradients["image" if call.image[-1] else "", "weight" if call.weight[-1] else ""] += times
    trained = passes - 3
    # an attack's gradient is the images', that of the first layer in training the weight's
    expected = {("image", ""): 3 * number, ("image", "weight"): trained * (number - 1), ("", "weight"): trained}
    assert gradients == expected
    assert counted.total() == number * (passes + without_gradient)

    def clock(call, device, head_start):
        """A second forward, whose call gives nothing, and two backward."""
        return 1.0 if call() is None else 2.0

    monkeypatch.setattr(convolutions, "seconds", clock)
    found = convolutions.convolution_seconds(lambda: arm.plainly(given, 1), "cpu")
    assert found == {"forward": number * (passes + without_gradient), "backward": 2.0 * number * passes}


def test_the_report_says_what_part_of_a_step_convolutions_are():
    result = {"arms": [{"seconds": {"median": 2.0}}], "convolution_seconds": {"forward": 0.5, "backward": 1.0}}
    told = " Alone, the engine's convolutions take 1.5 s, 75% of the step (forward 0.5 s, backward 1 s)."
    assert convolutions_text(result) == told
    assert convolutions_text(result | {"convolution_seconds": None}) == ""
    # a result of before it was measured
    assert convolutions_text({"arms": result["arms"]}) == ""


def test_eager_in_mixed_precision_is_near():
    settings = with_method("at-awp")
    models = [settings.build_model(), settings.build_model()]
    given = batch(0)
    given = given._replace(images=given.images.float())
    for model, autocast in zip(models, (False, True), strict=True):
        started(eager_arm(settings, model, autocast=autocast), settings, given, 0).step(given, 0)
    first, *ends = (torch.cat([p.flatten() for p in m.parameters()]) for m in (settings.build_model(), *models))
    # on the CPU only the attack is in bf16
    assert 0 < (ends[1] - ends[0]).norm() < 0.5 * (ends[0] - first).norm()


def test_work():
    settings = [with_method(method, steps=10) for method in ("at", "at-awp", "trades-awp")]
    units = {setting.method: necessary_units(setting) for setting in settings}
    # training's log counts the same
    assert [forward_units(engine_config(setting)) for setting in settings] == list(units.values())
    assert units == {"at": 23, "at-awp": 26, "trades-awp": 33}
    # per image, convolutions and linear layers, by hand: 2 * kernel * channels in * channels out * pixels
    assert forward_flops(dataclasses.replace(SETTINGS, model="preact-resnet-18")) == pytest.approx(1.111e9, rel=1e-3)
    assert forward_flops(dataclasses.replace(SETTINGS, model="wrn-34-10")) == pytest.approx(13.32e9, rel=1e-3)


def test_statistics():
    assert spread([3.0]) == {"median": 3.0, "q1": 3.0, "q3": 3.0, "min": 3.0, "max": 3.0, "n": 1}
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0])["q3"] == 4.0

    def rounds(*values):
        return [[step] for step in map(FakeTiming, values)]

    found = ratio(rounds(2.0, 9.0, 4.0), rounds(1.0, 3.0, 1.0))
    assert found["median"] == 3.0
    assert found["of_medians"] == 4.0


@dataclasses.dataclass
class FakeTiming:
    seconds: float


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.step.step", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.compile
def test_program(tmp_path):
    target = tmp_path / "step.json"
    done = run("--model", "preact-resnet-digits", "--batch-size", "8", "--repeats", "2", "--threads", "1",
               "--device", "cpu", "--json", str(target))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| engine |" in done.stdout
    assert "Alone, the engine's convolutions take " in done.stdout
    result = json.loads(target.read_text())
    assert {"kind", "date", "command", "machine", "load_average", "commit", "sources_sha256", "settings", "work",
            "ceilings", "arms", "ratios"} <= result.keys()  # fmt: skip
    assert result["kind"] == "step"
    assert str(tmp_path) not in target.read_text()
    assert result["machine"]["threads"] == 1
    assert [arm["name"] for arm in result["arms"]] == ["engine", "public", "eager"]
    for arm in result["arms"]:
        assert arm["seconds"]["n"] == 2
        assert {"data", "attack", "ascent", "descent", "update", "other"} <= arm["components"].keys()
        parts = sum(part["median"] for part in arm["components"].values())
        # of two values a median is the mean
        assert parts == pytest.approx(arm["seconds"]["median"], rel=1e-6)
        # where the system lets a process reset its peak
        timed = arm["memory"]["peak_bytes_timed"]
        assert timed is None or 0 < timed <= arm["memory"]["peak_bytes"]
        assert arm["memory"]["peak_bytes"] > 0
        assert arm["finite"]
        assert arm["first_step_seconds"] > 0
        assert arm["steps_made"] == 4
        assert arm["tflops"] == pytest.approx(result["work"]["step_tflop"] / arm["seconds"]["median"])
    assert min(result["convolution_seconds"].values()) > 0
    assert result["ratios"].keys() == {"public", "eager"}
    assert result["ratios"]["public"]["n"] == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--method", "mart-awp"], "--method: expected one of at, at-awp, trades-awp, got 'mart-awp'"),
        (["--model", "resnet-51"], "--model"),
        (["--repeats", "0"], "--repeats: expected a whole number >= 1, got 0"),
        (["--engine", "awp.size=1"], "awp.size"),
        (["--json", "nowhere/step.json"], "--json: expected a file in a directory that exists"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_bad_arguments_take_one_line(arguments, named):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("step.py: error: ")
    assert named in done.stderr

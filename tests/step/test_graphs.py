"""Whole steps in CUDA graphs; they run on a GPU (`pytest -m gpu`)."""

import copy
import dataclasses
import itertools

import pytest
import torch
from samples import images
from steps import make_step
from torch import nn

from awp_engine.config import AttackConfig, AverageConfig, AwpConfig, Config, OptimizerConfig
from awp_engine.models import build_model
from awp_engine.models.views import add_auxiliary_
from awp_engine.optim.average import WeightAverage
from awp_engine.optim.optimizer import build_optimizer, set_learning_rate
from awp_engine.step.cuda_graph import CaptureError, GraphedStep
from awp_engine.step.objectives import build_objective
from awp_engine.step.precision import Precision, WorkingModels
from awp_engine.step.values import Phase
from awp_engine.train import setup
from awp_kernels import AdversarialWeightPerturbation

HALF = Precision(attack=torch.float16, ascent=torch.float16, descent=torch.float16)
ATTACK = AttackConfig(epsilon="8/255", step_size="2/255", steps=3, bn_mode="eval", fast="fgsm-rs", fast_epochs=1)
BALLS = AttackConfig(kind="apgd", epsilon="8/255", also=("l1=12",), steps=3, bn_mode="eval", start="none")


def build_step(device: str, precision: Precision, method: str = "at", options: AwpConfig | None = None):
    torch.manual_seed(0)
    model = build_model("preact-resnet-18", 10, (0.5,) * 3, (0.25,) * 3, width=16).to(device).train()
    if method == "dajat":
        add_auxiliary_(model)
    model.to(memory_format=torch.channels_last)
    options = options or AwpConfig(gamma=0.005)
    models = WorkingModels(model, precision, shared_ascent=options.ascent == "shared")
    name, _, views = method.partition(", ")
    attack, arguments = BALLS if method == "e-at" else ATTACK, {"aug_weight": 0.5, "attack_beta": 1.0} if views else {}
    given = {"num_classes": 10, "image_shape": (3, 32, 32), "device": torch.device(device), "arguments": arguments}
    objective = build_objective(name, balls=1 + len(attack.also), **given)
    trained, copied = model, models.updated
    if objective.partner_name is not None:
        partner = build_model("preact-resnet-18", 10, (0.4,) * 3, (0.3,) * 3, width=8).to(device).train()
        partner.to(memory_format=torch.channels_last)
        objective.partner = partner
        trained, copied = nn.ModuleList([model, partner]), None if copied is None else nn.ModuleList([copied])
    optimizer = build_optimizer(trained, OptimizerConfig(), working=copied)
    average = WeightAverage(model, AverageConfig(kind="ema", statistics="averaged"), epochs=1)
    average.follow(optimizer)
    objective.average = average.model
    if objective.uses_teacher:
        teacher = build_model("preact-resnet-18", 10, (0.4,) * 3, (0.3,) * 3, width=16).to(device).eval()
        objective.teacher = WorkingModels(teacher.requires_grad_(False), precision)
    step = make_step(
        model,
        optimizer=optimizer,
        objective=objective,
        attack=attack,
        average=average,
        awp=AdversarialWeightPerturbation(model, options.gamma, working=models.working),
        options=options,
        clip_norm=5.0,
        models=models,
    )
    return model, step, average


def batch(index: int, n: int, device: str, channels: int = 3):
    y = torch.randint(0, 10, (n,), generator=torch.Generator().manual_seed(index))
    x = images((n, channels, 32, 32), seed=index).to(device).contiguous(memory_format=torch.channels_last)
    return x, y.to(device), torch.arange(n, device=device) + 100 * index


def test_a_step_that_cannot_be_captured_is_refused():
    _, step, _ = build_step("cpu", Precision())
    assert step.step.capturable
    with pytest.raises(ValueError, match=r"step: expected one on a CUDA device.*got one on cpu"):
        GraphedStep(step.step)
    options = AwpConfig(gamma=0.005, c_min=1.7)
    assert not build_step("cpu", Precision(), options=options)[1].step.capturable


def test_a_capture_that_fails_says_in_one_line_how_to_go_on(monkeypatch):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
    graphed = GraphedStep.__new__(GraphedStep)
    graphed.step = build_step("cpu", Precision())[1].step
    with pytest.raises(CaptureError) as failed:
        graphed._capture((), Phase(attack=setup.training_attack(AttackConfig())))
    expected = "a step cannot be captured (CUDA out of memory.); start again with --no-cuda-graphs"
    assert str(failed.value) == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_is_captured_where_there_is_a_gpu(device):
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,)).to(device).train()
    step = setup.build_step(Config(), model)
    assert isinstance(setup.capture_step(Config(), step), GraphedStep) == (device == "cuda")
    assert setup.capture_step(Config(cuda_graphs=False), step) is step


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [Precision(), HALF], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("method", "ascent"),
    [
        *itertools.product(
            ["at", "trades", "adr", "rebat", "score-trades", "adaad", "hat", "liet", "lbgat"], ["exact", "shared"]
        ),
        ("dajat", "exact"),
        ("oaat", "exact"),
        ("gkl, two views", "exact"),
        ("e-at", "exact"),
    ],
)
def test_graphs_and_plain_steps_give_the_same_numbers(precision, method, ascent, monkeypatch):
    """Weights, momentum, averages and statistics after steps of both kinds, a short batch and changing rates.

    ReBAT's attack becomes that of ReBAT++.
    """
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    options = AwpConfig(gamma=0.005, ascent=ascent)
    runs = []
    for graphed in (False, True):
        model, step, average = build_step("cuda", precision, method, options)
        stronger = dataclasses.replace(setup.training_attack(step.settings), epsilon=10 / 255, steps=5)
        if graphed:
            step.taken = GraphedStep(step.step)
        losses = []
        for index in range(16):
            set_learning_rate(step.optimizer, 0.1 / (1 + index))
            x, y, ids = batch(index, 7 if index == 9 else 32, "cuda", 3 * step.passes.objective.views)
            # what E-AT draws a ball by, and how batches of OA-AT take turns; LIET would keep a table for it
            alone = method in ("e-at", "oaat")
            fast, perturb = not alone and index in (1, 2, 3, 10, 11), index % 5 != 4
            changes = {"attack": stronger} if method == "rebat" and index >= 8 and not fast else {}
            changes |= {"seed": index // 4, "done": index / 16, "step": index if alone else 0}
            losses.append(step(x, y, sample_ids=ids, perturb=perturb, fast=fast, **changes).loss)
        if graphed:
            kinds = {(perturbed, attack.steps, stage) for perturbed, attack, stage in step.taken._graphs}
            same = step.passes.objective.stage
            ways = {"e-at": ((3, 0), (3, 1)), "oaat": ((3, (1, False)), (3, (1, True)))}
            ways["rebat"] = (3, same), (1, same), (5, same)
            assert kinds == {(True, *way) for way in ways.get(method, ((3, same), (1, same)))}
        trained = model
        if (partner := step.passes.objective.partner) is not None:
            trained = nn.ModuleList([model, partner])
        momentum = [step.optimizer.state[p]["momentum_buffer"] for p in trained.parameters()]
        runs.append((trained, average.model, momentum, losses))
    (plain, plain_average, plain_momentum, plain_losses), (trained, average, momentum, losses) = runs
    assert torch.equal(torch.stack(plain_losses), torch.stack(losses))
    for one, other in ((plain, trained), (plain_average, average)):
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert all(torch.equal(a, b) for a, b in zip(plain_momentum, momentum, strict=True))


@pytest.mark.gpu
def test_a_replayed_step_leaves_itself_out():
    """Images that are not finite reach a captured graph: weights and statistics keep their bits, the scale halves."""
    model, step, _ = build_step("cuda", HALF)
    step.taken = GraphedStep(step.step)
    for index in range(6):
        x, y, ids = batch(index, 32, "cuda")
        step(x, y, sample_ids=ids, seed=0)
    before, scale = copy.deepcopy(model.state_dict()), float(step.passes.loss_scale.value)
    result = step(torch.full_like(x, torch.nan), y, sample_ids=ids, seed=0)
    assert result.skipped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert float(step.passes.loss_scale.value) == scale / 2
    assert not step(x, y, sample_ids=ids, seed=0).skipped
    assert not torch.equal(model.conv1.weight, before["conv1.weight"])


@pytest.mark.gpu
def test_a_captured_step_launches_nothing_of_its_own():
    """One graph launch a step besides copies of inputs and results; the weight operations inside are counted."""
    from torch.profiler import ProfilerActivity, profile

    _, step, _ = build_step("cuda", HALF)
    step.taken = GraphedStep(step.step)
    x, y, ids = batch(0, 32, "cuda")
    for _ in range(5):
        step(x, y, sample_ids=ids, seed=0)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step(x, y, sample_ids=ids, seed=0)
        torch.cuda.synchronize()
    launches = sum(event.count for event in recorded.key_averages() if event.key == "cudaGraphLaunch")
    assert launches == 1
    kernels = [event.name for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    own = [name for name in kernels if any(word in name for word in ("perturb", "sgd", "norm_kernel", "total_norm"))]
    assert 0 < len(own) <= 8


@pytest.mark.gpu
def test_a_momentum_that_changes_reaches_captured_steps(monkeypatch):
    """Weights after steps whose momentum changes twice; a graph that went on with an old one would differ."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    weights = []
    for graphed in (False, True):
        model, step, _ = build_step("cuda", Precision())
        if graphed:
            step.taken = GraphedStep(step.step)
        for index in range(12):
            x, y, ids = batch(index, 32, "cuda")
            step(x, y, sample_ids=ids, seed=index, momentum=(0.95, 0.5, 0.85)[index // 4])
        weights.append(list(model.parameters()))
        assert not graphed or step.taken.captured == 1
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

"""DAJAT against its definition in fp64: the loss, the attack, whole steps, two sets of batch normalisation."""

import copy
import dataclasses
import itertools
import shutil
from pathlib import Path

import plain_methods
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import images, randn
from steps import require_refused
from torch import Tensor, nn

from awp_engine.attack import Attack
from awp_engine.config import AttackConfig, AverageConfig, AwpConfig, Config, ConfigError, DataConfig, ModelConfig
from awp_engine.config.settings import DistributedConfig, EvaluationConfig, OptimizerConfig
from awp_engine.data import Batch
from awp_engine.models import build_model
from awp_engine.models.trained import load_model
from awp_engine.models.views import EachView, JointViews, add_auxiliary_, auxiliary_set, base_set
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.awp_step import AwpStep
from awp_engine.step.objectives import build_objective
from awp_engine.step.objectives.dajat import Dajat
from awp_engine.step.precision import WorkingModels
from awp_engine.step.values import Phase
from awp_engine.train.banner import banner
from awp_engine.train.trainer import Trainer
from awp_kernels import AdversarialWeightPerturbation

BETA, WEIGHT, SMOOTH, GAMMA = 3.0, 2.0, 0.1, 0.01


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-9 * expected.norm().clamp_min(1e-9))


def defined(adv: list[Tensor], clean: list[Tensor], y: Tensor) -> Tensor:
    """Mean over views of CE + beta KL, and w times the mean over views of KL(p_v || m); of logits view by view."""
    p = [plain_methods.log_probabilities(logits).exp() for logits in clean]
    middle, total = (sum(p) / len(p)).clamp(1e-7, 1), torch.zeros((), dtype=torch.float64)
    for a, n, q in zip(adv, clean, p, strict=True):
        logs = plain_methods.log_probabilities(n)
        smoothed = (1 - SMOOTH) * logs[torch.arange(len(y)), y] + SMOOTH * logs.mean(1)
        total = total - smoothed.mean() + BETA * plain_methods.kl(a, n).mean()
        total = total + WEIGHT * (q * (q.log() - middle.log())).sum(1).mean()
    return total / len(p)


@settings(max_examples=30)
@given(st.integers(2, 4), st.integers(1, 5), st.integers(2, 7), st.integers(0, 999), st.sampled_from([0.1, 3, 30]))
def test_the_loss_is_that_of_its_definition(views, n, classes, seed, scale):
    """Value, and gradients through clean and attacked answers of every view; some probabilities are below 1e-7."""
    adv, clean = (randn((n, views * classes), torch.float64, seed + i, scale).requires_grad_() for i in (0, 1))
    y, objective = torch.arange(n) % classes, Dajat(BETA, SMOOTH, WEIGHT, views)
    losses, logits = objective.losses(nn.Identity(), adv, clean, y)
    assert losses.shape == (n,)
    assert torch.equal(logits, adv[:, :classes])
    expected = defined(list(adv.split(classes, 1)), list(clean.split(classes, 1)), y)
    assert close(losses.mean(), expected)
    pairs = [torch.autograd.grad(loss, (adv, clean)) for loss in (losses.mean(), expected)]
    assert all(close(a, b) for a, b in zip(*pairs, strict=True))


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).double().train()


def ours() -> nn.Module:
    model = network()
    add_auxiliary_(model)
    return model


def theirs() -> tuple[nn.Module, nn.Module]:
    """Two plain networks that share all but their batch normalisation: for the first view, and for the others."""
    base = network()
    normalisation = [m for m in base.modules() if isinstance(m, nn.BatchNorm2d)]
    own = {id(t) for m in normalisation for t in (*m.parameters(), *m.buffers())}
    shared = {id(t): t for t in (*base.parameters(), *base.buffers()) if id(t) not in own}
    return base, copy.deepcopy(base, shared)


def batch(seed: int, views: int = 3) -> Batch:
    y = torch.arange(6) * (1 + seed) % 7
    return Batch(images((6, views, 8, 8), torch.float64, seed=seed), y, torch.arange(6) + 100 * seed, 6)


ATTACK = Attack(epsilon=8 / 255, step_size=4 / 255, steps=3, start="normal", bn_mode="eval")
PLAIN = {"kind": "trades", "epsilon": 8 / 255, "step_size": 4 / 255, "steps": 3}


def step_of(model: nn.Module, **given) -> AwpStep:
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-4))
    awp, objective = AdversarialWeightPerturbation(model, GAMMA), Dajat(BETA, SMOOTH, WEIGHT)
    return AwpStep(models=WorkingModels(model), optimizer=optimizer, objective=objective, awp=awp, **given)


def test_whole_steps_agree():
    """The attack of each view by its own set; w + v by the first view alone, without smoothing; the update; statistics.

    Two passes of each view move them, clean and attacked; attack and ascent move none.
    """
    model, (base, auto), momentum = ours(), theirs(), {}
    step, of_view = step_of(model), (base, auto, auto)
    for number in range(2):
        taken = batch(number)
        x, y = taken.images.split(1, 1), taken.labels
        start = ATTACK.first(taken.images, sample_ids=taken.ids, seed=number)
        each = zip(of_view, x, start.split(1, 1), strict=True)
        iterates = [plain_methods.attack(m, v, y, s, **PLAIN) for m, v, s in each]
        for steps in range(1, 4) if number else ():
            attack = dataclasses.replace(ATTACK, steps=steps)
            found = step.passes.attack_whole(attack, step.models.attack, taken, start)
            assert close(found, torch.cat([views[steps] for views in iterates], 1))
        x_adv = [views[-1] for views in iterates]
        climber = copy.deepcopy(base)
        plain_methods.trades_loss(climber, x_adv[0], x[0], y, BETA).backward()
        parameters = {p: p.detach().clone() for p in (*base.parameters(), *auto.parameters())}
        with torch.no_grad():
            for p, c in zip(base.parameters(), climber.parameters(), strict=True):
                if p.ndim > 1:
                    p.add_(GAMMA * p.norm() / c.grad.norm() * c.grad)
        adv = [m(v) for m, v in zip(of_view, x_adv, strict=True)]
        loss = defined(adv, [m(v) for m, v in zip(of_view, x, strict=True)], y)
        gradients = torch.autograd.grad(loss, list(parameters))
        with torch.no_grad():
            for (p, w), g in zip(parameters.items(), gradients, strict=True):
                momentum[p] = 0.9 * momentum.get(p, 0) + g + 5e-4 * w
                p.copy_(w - 0.1 * momentum[p])
        result = step(taken, Phase(attack=ATTACK, seed=number))
        assert close(result.loss, loss.detach())
        assert result.correct == (adv[0].argmax(1) == y).double().mean()
        held = model.state_dict()
        of_auto = {n.replace(".auxiliary_batch_norm", ""): t for n, t in auxiliary_set(held).items()}
        assert base_set(held).keys() == base.state_dict().keys()
        assert all(close(t.double(), base.state_dict()[n].double()) for n, t in base_set(held).items())
        assert all(close(t.double(), auto.state_dict()[n].double()) for n, t in of_auto.items())
        assert {int(t) for n, t in base_set(held).items() if n.endswith("tracked")} == {2 * (number + 1)}
        assert {int(t) for n, t in of_auto.items() if n.endswith("tracked")} == {4 * (number + 1)}
        assert len(of_auto) == 5 * 7


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_every_pass_has_images_in_the_order_of_the_batch(order):
    """The ascent's too, which takes the first view alone; and where one pass takes all views."""
    torch.manual_seed(0)
    model = build_model("preact-resnet-18", 10, (0.5,) * 3, (0.25,) * 3, width=4)
    add_auxiliary_(model)
    seen = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous(memory_format=order)))
    x, objective = images((2, 9, 8, 8)).contiguous(memory_format=order), Dajat(BETA)
    for compute, passes in ((objective.losses, 6), (objective.ascent_losses, 2)):
        seen.clear()
        compute(EachView(model), x, x, torch.arange(2))
        assert seen == [True] * passes
    alone = torch.cat([model.eval()(view) for view in x.split(3, 1)], 1)
    seen.clear()
    torch.testing.assert_close(JointViews(model)(x), alone)
    assert seen == [True]


def test_a_step_that_is_left_out_leaves_both_sets_alone():
    model = ours()
    step, taken = step_of(model), batch(1)
    step(taken, Phase(attack=ATTACK))
    before = copy.deepcopy(model.state_dict())
    broken = taken.images.clone()
    # one further view of one image
    broken[0, 2] = torch.nan
    assert step(taken._replace(images=broken), Phase(attack=ATTACK)).skipped
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(getattr(module, "by_auxiliary", False) for module in model.modules())


def test_a_model_without_a_second_set_is_refused():
    with pytest.raises(ValueError, match="model: expected one that has a second set of batch normalisation"):
        step_of(network())(batch(0), Phase(attack=ATTACK))
    with pytest.raises(ValueError, match="model: expected one with batch normalisation, found none"):
        add_auxiliary_(nn.Linear(2, 2))


RUN = Config(
    method="dajat",
    method_args=("views=3",),
    data=DataConfig(policy="autoaugment-cifar10", policy_first=True, pad=1, train_limit=20),
    model=ModelConfig(width=2),
    attack=AttackConfig(steps=1, bn_mode="eval"),
    average=AverageConfig(kind="ema", decay=0.5, ramp=False, statistics="averaged"),
    evaluation=EvaluationConfig(steps=1, held_out_limit=8, test_limit=8),
    epochs=2,
    global_batch_size=10,
    micro_batch_size=5,
    checkpoint_steps=1,
)


def trained(run_dir: Path) -> Trainer:
    trainer = Trainer(dataclasses.replace(RUN, run_dir=run_dir))
    with trainer.state.writer:
        trainer.train()
    return trainer


def test_what_a_run_leaves_is_the_plain_model_by_its_own_set(tmp_path):
    """The average, of both sets; what is measured and exported has the names of a plain model.

    A run that goes on in the middle of an epoch leaves the same bits.
    """
    trainer = trained(tmp_path / "run")
    trainer.selection.finish(trainer.progress)
    assert trainer.average is not None
    plain, x = load_model(tmp_path / "run"), images((4, 1, 8, 8))
    averaged = trainer.average.model
    assert plain.state_dict().keys() == base_set(averaged.state_dict()).keys() != averaged.state_dict().keys()
    assert torch.equal(plain(x), averaged(x))
    assert f"({sum(p.numel() for p in plain.parameters()):,} parameters)" in banner(trainer)[0]
    last = load_model(tmp_path / "run" / "checkpoints" / "epoch-2")
    assert torch.equal(last(x), trainer.model.eval()(x))
    live, mean = (auxiliary_set(model.state_dict()) for model in (trainer.model, averaged))
    assert not any(torch.equal(live[name], mean[name]) for name in live if name.endswith(("weight", "running_mean")))
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    held = tmp_path / "resumed" / "checkpoints"
    shutil.rmtree(held / "epoch-2")
    (held / "latest").write_text("epoch-1.step-1\n")
    trained(tmp_path / "resumed")
    ends = [
        {f.name: f.read_bytes() for f in (d / "epoch-2").glob("*.safetensors")}
        for d in (held, tmp_path / "run" / "checkpoints")
    ]
    assert ends[0] == ends[1]
    assert "auxiliary.safetensors" in ends[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": DataConfig()}, r"--data\.policy: expected one of AutoAugment"),
        ({"data": dataclasses.replace(RUN.data, mixup=0.5)}, r"--data\.mixup: expected 0"),
        ({"data": dataclasses.replace(RUN.data, cutmix=0.5)}, r"--data\.cutmix: expected 0"),
        ({"attack": AttackConfig(kind="apgd")}, r"--attack\.kind: expected pgd"),
        ({"attack": AttackConfig(norm="l2", epsilon="1/2")}, r"--attack\.norm: expected linf"),
        ({"attack": AttackConfig(noise=0.1)}, r"--attack\.noise: expected 0"),
        ({"awp": AwpConfig(ascent="shared")}, r"--awp\.ascent: expected exact"),
        ({"awp": AwpConfig(max_rise=0.2)}, r"--awp\.max-rise: expected none"),
        ({"model": ModelConfig(checkpoint_activations=True)}, r"--model\.checkpoint-activations: expected false"),
        ({"model": ModelConfig(name="timm:resnet18")}, r"--model\.name: expected a built-in model"),
        ({"distributed": DistributedConfig(strategy="fsdp")}, r"--distributed\.strategy: expected ddp"),
        ({"compile": True}, r"--compile: expected auto or false"),
        ({"average": AverageConfig(kind="ema")}, r"--average\.statistics: expected averaged or live"),
    ],
)
def test_what_does_not_go_with_views_is_refused(tmp_path, wrong, message):
    """Of one's own method of several views, too."""
    require_refused(RUN, wrong, message, "dajat", "Dajat", "whose", tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [*itertools.product(["views"], [1, 9, 2.0, True]), ("js_weight", -1), ("js_weight", "x")]
)
def test_arguments_that_mean_nothing_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"--method-args: {name}: expected "):
        build_objective("dajat", arguments={name: value})

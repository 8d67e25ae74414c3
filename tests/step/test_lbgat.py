"""LBGAT against its definition in fp64: the loss, the attack, whole steps of both networks, what a run leaves."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import plain_methods
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from samples import images, randn
from small_steps import HostReads, small_batch, sure_model
from steps import TensorStep, make_step, require_refused
from torch import Tensor, nn

from awp_engine.config import AttackConfig, AverageConfig, AwpConfig, Config, ConfigError, DataConfig, ModelConfig
from awp_engine.config.settings import DistributedConfig, EvaluationConfig, OptimizerConfig, PrecisionConfig
from awp_engine.distributed.batch import Batch
from awp_engine.distributed.ranks import Ranks
from awp_engine.models import build_model
from awp_engine.models.trained import load_model
from awp_engine.observe.metrics import read_metrics
from awp_engine.observe.throughput import forward_flops
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import build_objective
from awp_engine.step.objectives.lbgat import Lbgat
from awp_engine.step.precision import LossScale
from awp_engine.step.values import Phase
from awp_engine.train import setup, state
from awp_engine.train.network import build_partner
from awp_engine.train.setup import objective_of
from awp_engine.train.trainer import Trainer
from awp_kernels import AdversarialWeightPerturbation

EPSILON, STEP_SIZE, STEPS, BETA, GAMMA = 8 / 255, 2 / 255, 3, 6.0, 0.01
PLAIN = {"kind": "trades", "epsilon": EPSILON, "step_size": STEP_SIZE, "steps": STEPS}


def defined(adv: Tensor, clean: Tensor, told: Tensor, y: Tensor, beta: float) -> Tensor:
    """MSE over images and classes + CE(t(x), y) + beta KL(f(x) || f(x')) / N, image by image."""
    total = torch.zeros((), dtype=torch.float64)
    for a, c, t, label in zip(adv, clean, told, y, strict=True):
        p_adv, p, p_told = (logits.exp() / logits.exp().sum() for logits in (a, c, t))
        squared = sum((a[k] - t[k]) ** 2 for k in range(len(a))) / len(a)
        total = total + squared - p_told[label].log() + beta * (p * (p / p_adv).log()).sum()
    return total / len(y)


class Says(nn.Module):
    """A network that answers with its parameter, whatever it is asked."""

    def __init__(self, answers: Tensor) -> None:
        super().__init__()
        self.answers = nn.Parameter(answers)

    def forward(self, x: Tensor) -> Tensor:
        return 1 * self.answers


@settings(max_examples=30)
@given(
    st.integers(1, 5), st.integers(2, 7), st.integers(0, 999), st.sampled_from([0.1, 3, 10]), st.sampled_from([0, 6])
)
def test_the_loss_is_that_of_its_definition(n, classes, seed, scale, beta):
    """Value, and gradients through attacked and clean answers and, in the descent, the partner's; nothing is held."""
    adv, clean, told = (randn((n, classes), torch.float64, seed + i, scale).requires_grad_() for i in range(3))
    y, objective = torch.arange(n) % classes, Lbgat(beta)
    objective.partner = partner = Says(told.detach())
    expected = defined(adv, clean, told, y, beta)
    gradients = torch.autograd.grad(expected, (adv, clean, told), materialize_grads=True, retain_graph=True)
    for descending in (True, False):
        objective.descending = descending
        losses, logits = objective.losses(nn.Identity(), adv, clean, y)
        assert losses.shape == (n,)
        assert logits is adv
        torch.testing.assert_close(losses.mean(), expected, rtol=1e-9, atol=1e-12)
        found = torch.autograd.grad(losses.mean(), (adv, clean, partner.answers), materialize_grads=True)
        for a, b in zip(found[:2], gradients[:2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        # the ascent climbs over the classifier's weights alone
        of_partner = gradients[2] if descending else torch.zeros_like(told)
        torch.testing.assert_close(found[2], of_partner, rtol=1e-9, atol=1e-12)


def build_step(model: nn.Module, partner: nn.Module | None, method: str = "lbgat", **given) -> TensorStep:
    objective = build_objective(method, beta=BETA)
    objective.partner = partner
    both = model if partner is None else nn.ModuleList([model, partner])
    optimizer = build_optimizer(both, OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-4))
    attack = AttackConfig(epsilon="8/255", step_size="2/255", steps=STEPS, bn_mode="eval", start="normal")
    awp = AdversarialWeightPerturbation(model, GAMMA)
    return make_step(
        model, objective=objective, optimizer=optimizer, attack=attack, awp=awp, options=AwpConfig(gamma=GAMMA), **given
    )


@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_are_those_of_the_definition(clip):
    """Iterates, losses, both networks' weights and statistics; the partner is asked at weights that are not moved."""
    ours, theirs = (sure_model(), sure_model(1)), (sure_model(), sure_model(1))
    step = build_step(*ours, clip_norm=clip)
    momentum: dict[nn.Parameter, Tensor] = {}
    asked: list[Tensor] = []
    ours[1].register_forward_pre_hook(lambda module, _: asked.append(module.get_parameter("4.weight").detach().clone()))
    f, t = theirs
    for index in range(3):
        x, y, ids, _ = small_batch(index)
        phase = step.phase(index, index != 1, False)
        start = phase.attack.first(x, sample_ids=ids, seed=index)
        iterates = plain_methods.attack(f, x, y, start, **PLAIN)
        for count in range(1, STEPS + 1):
            attack = dataclasses.replace(phase.attack, steps=count)
            found, *_ = step.passes.attack(attack, small_batch(index), step.passes.share(len(x), len(x)), start)
            torch.testing.assert_close(found, iterates[count], rtol=0, atol=1e-12)
        x_adv, parameters = iterates[-1], [*f.parameters(), *t.parameters()]
        weights = [p.detach().clone() for p in parameters]
        if phase.perturb:
            climber, still = copy.deepcopy(f), copy.deepcopy(t)
            defined(climber(x_adv), climber(x), still(x).detach(), y, BETA).backward()
            with torch.no_grad():
                for p, c in zip(f.parameters(), climber.parameters(), strict=True):
                    if p.ndim > 1:
                        p.add_(GAMMA * p.norm() / c.grad.norm() * c.grad)
        loss = defined(f(x_adv), f(x), t(x), y, BETA)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        with torch.no_grad():
            for p, w, g in zip(parameters, weights, gradients, strict=True):
                # torch adds 1e-6 to the norm, too
                clipped = g if clip is None else g * min(1.0, float(clip / (norm + 1e-6)))
                momentum[p] = 0.9 * momentum.get(p, 0) + clipped + 5e-4 * w
                p.copy_(w - 0.1 * momentum[p])
        assert clip is None or norm > clip
        asked.clear()
        before = ours[1].get_parameter("4.weight").detach().clone()
        result = step.taken(small_batch(index), phase)
        torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-9, atol=0)
        # in the ascent, and in the descent
        assert len(asked) == 1 + phase.perturb
        assert all(torch.equal(at, before) for at in asked)
        for a, b in zip(ours, theirs, strict=True):
            for found, expected in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        counts = [int(network.get_buffer("1.num_batches_tracked")) for network in ours]
        assert counts == [1 + 2 * (index + 1), 1 + index + 1]


def test_a_step_that_is_left_out_leaves_both_networks_alone():
    networks = sure_model(), sure_model(1)
    step = build_step(*networks)
    x, y, ids, _ = small_batch(1)
    step(x, y, sample_ids=ids)
    held = [*networks[0].state_dict().values(), *networks[1].state_dict().values()]
    held += [step.optimizer.state[p]["momentum_buffer"] for p in (*networks[0].parameters(), *networks[1].parameters())]
    before = [tensor.clone() for tensor in held]
    with torch.no_grad():
        # the answers of the partner alone
        networks[1].register_forward_hook(lambda module, inputs, output: output * torch.inf)
    assert step(x, y, sample_ids=ids).skipped
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_the_loss_scale_is_taken_out_of_both_gradients():
    """A power of two changes no bit."""
    found = []
    for scale in (None, 1024.0):
        networks = sure_model(), sure_model(1)
        step = build_step(*networks)
        if scale is not None:
            lifted = LossScale(torch.device("cpu"), scale)
            step.passes.loss_scale = step.step.update._loss_scale = lifted
        x, y, ids, _ = small_batch(1)
        assert not step(x, y, sample_ids=ids).skipped
        found.append([p for network in networks for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_16_bit_copy_of_the_classifier_is_followed_and_written():
    """The optimizer's masters are fp32, and so is the partner."""
    torch.manual_seed(0)
    model, partner = (build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).train() for _ in range(2))
    precision = PrecisionConfig(attack="bf16", ascent="bf16", descent="bf16")
    config = dataclasses.replace(RUN, awp=AwpConfig(gamma=0.0), precision=precision)
    objective = objective_of(config, torch.device("cpu"), 10, (1, 8, 8))
    objective.partner = partner
    before = [p.detach().clone() for network in (model, partner) for p in network.parameters()]
    step = setup.build_step(config, model, objective=objective)
    batch = Batch(images((6, 1, 8, 8)), torch.arange(6), torch.arange(6), 6)
    assert not step(batch, Phase(attack=setup.training_attack(config.attack), perturb=False)).skipped
    after = [p for network in (model, partner) for p in network.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert {p.dtype for p in after} == {torch.float32}
    copied = step.models.updated
    assert copied is not None
    assert torch.bfloat16 in {p.dtype for p in copied.parameters()}
    assert all(torch.equal(c, p.to(c.dtype)) for c, p in zip(copied.parameters(), model.parameters(), strict=True))


def test_steps_can_be_captured():
    """The host reads no more than in TRADES, whose reads are checks that a GPU makes by itself."""
    counts = []
    for method, partner in (("trades", None), ("lbgat", sure_model(1))):
        step = build_step(sure_model(), partner, method)
        phase = step.phase(1, True, False)
        start = step.step.prepare(small_batch(1), phase)
        with HostReads() as found:
            step.step(small_batch(1), phase, start)
        counts.append(found.reads)
    assert 0 < counts[1] <= counts[0], counts


RUN = Config(
    device="cpu",
    method="lbgat",
    data=DataConfig(pad=1, train_limit=20),
    model=ModelConfig(width=2),
    attack=AttackConfig(steps=1, bn_mode="eval"),
    awp=AwpConfig(gamma=0.01, max_rise=0.2),
    average=AverageConfig(kind="ema", bn_images=20),
    evaluation=EvaluationConfig(steps=1, held_out_limit=8, test_limit=8),
    epochs=2,
    global_batch_size=10,
    micro_batch_size=5,
)


def test_checkpoints_alone_hold_the_partner(tmp_path, monkeypatch):
    """Its statistics move in the descent alone: not for those of the average, not for the loss of guessing."""
    trainer = Trainer(dataclasses.replace(RUN, run_dir=tmp_path / "run"))
    trainer.run()
    objective = trainer.awp_step.passes.objective
    assert objective.partner is not None
    # steps, in two pieces each
    counts = {int(t) for name, t in objective.partner.state_dict().items() if name.endswith("tracked")}
    assert counts == {4 * 2}
    # 15 of the model's forward passes an image, 4 of the partner's, which is far larger
    told, shape = read_metrics(tmp_path / "run")[-1], trainer.data.train.shape
    expected = 15 * forward_flops(trainer.model, shape) + 4 * forward_flops(objective.partner, shape)
    assert told["tflops"] * 1e12 == pytest.approx(told["images_per_second"] * expected)
    folder = tmp_path / "run" / "checkpoints" / "epoch-2"
    plain = load_model(folder).state_dict()
    assert trainer.average is not None
    for file in (
        tmp_path / "run" / "model.safetensors",
        folder / "model.safetensors",
        folder / "best_model.safetensors",
    ):
        assert load_file(file).keys() == plain.keys()
    assert {p.shape for p in trainer.average.model.parameters()} == {p.shape for p in trainer.model.parameters()}
    held = load_file(folder / "partner.safetensors")
    parameters = {name for name, _ in objective.partner.named_parameters()}
    expected = {f"model.{name}" for name in objective.partner.state_dict()} | {f"optimizer.{n}" for n in parameters}
    assert held.keys() == expected
    assert all(torch.equal(held[f"model.{name}"], t) for name, t in objective.partner.state_dict().items())
    seen: dict[str, Tensor] = {}
    monkeypatch.setattr(state, "check_replicas", lambda ranks, tensors, when: seen.update(tensors))
    trainer.state.check_replicas("now")
    assert {name.removeprefix("partner's ") for name in seen if name.startswith("partner's ")} == expected


def test_ranks_begin_with_one_partner(tmp_path, monkeypatch):
    """The first rank's weights, like the model's; a run without a partner has no such group in its checkpoints."""
    told: set[int] = set()
    monkeypatch.setattr(Ranks, "broadcast_", lambda ranks, tensors: told.update(t.data_ptr() for t in tensors))
    for method in ("lbgat", "at"):
        told.clear()
        trainer = Trainer(dataclasses.replace(RUN, method=method, run_dir=tmp_path / method))
        partner = trainer.awp_step.passes.objective.partner
        networks = [trainer.model] if partner is None else [trainer.model, partner]
        assert told >= {p.data_ptr() for network in networks for p in network.parameters()}
        with trainer.state.writer:
            path = trainer.state.save(wait=True)
        assert path is not None
        assert (Path(path) / "partner.safetensors").exists() == (method == "lbgat") == (partner is not None)


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [("auto", 8, 77_562), ("auto", 16, 11_172_170), ("auto", 32, 11_172_170), ("wrn-10-1", 32, 77_850)],
)
def test_the_partner_fits_the_images(name, size, count):
    """Its kind and size, normalised as the model."""
    channels = 1 if size == 8 else 3
    mean, std = (0.3,) * channels, (0.4,) * channels
    described = SimpleNamespace(num_classes=10, mean=mean, std=std)
    network = SimpleNamespace(description=described, memory_format=torch.contiguous_format)
    data = SimpleNamespace(train=SimpleNamespace(shape=(channels, size, size)))
    partner, told = build_partner(name, network, data, torch.device("cpu"))  # pyright: ignore[reportArgumentType]
    assert f" {count:,} parameters, beside the model" in told
    assert partner.training
    assert partner.mean.flatten().tolist() == pytest.approx(mean)
    assert partner.std.flatten().tolist() == pytest.approx(std)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"distributed": DistributedConfig(strategy="fsdp")}, r"--distributed\.strategy: expected ddp"),
        ({"optimizer": OptimizerConfig(kind="torch:RMSprop")}, r"--optimizer\.kind: expected sgd or adamw"),
        ({"optimizer": OptimizerConfig(layer_decay=0.9)}, r"--optimizer\.layer-decay: expected 1"),
        ({"optimizer": OptimizerConfig(no_decay=("*bn*",))}, r"--optimizer\.no-decay: expected nothing"),
        ({"model": ModelConfig(width=2, bn_momentum=0.01)}, r"--model\.bn-momentum: expected none"),
        ({"compile": True}, r"--compile: expected auto or false"),
    ],
)
def test_what_does_not_go_with_a_partner_is_refused(tmp_path, wrong, message):
    """Of one's own method that trains a network along, too."""
    require_refused(RUN, wrong, message, "lbgat", "Lbgat", "which trains a second network", tmp_path)


def test_an_attack_that_climbs_cross_entropy_is_refused():
    with pytest.raises(ConfigError, match=r"--attack\.kind: expected pgd with --method lbgat: apgd climbs cross"):
        dataclasses.replace(RUN, attack=AttackConfig(kind="apgd"))


@pytest.mark.parametrize("name", ["timm:resnet18", "resnet-19", "3", "own.py:make"])
def test_another_partner_is_refused_before_anything_is_written(tmp_path, name):
    config = dataclasses.replace(RUN, method_args=(f"partner={name}",), run_dir=tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"--method-args: partner: expected auto or the name of a built-in model, got"
    ):
        Trainer(config)
    assert not (tmp_path / "run").exists()


def test_label_smoothing_is_refused():
    with pytest.raises(ConfigError, match="--label-smoothing: expected 0 with lbgat, which takes no label_smoothing"):
        build_objective("lbgat", label_smoothing=0.1)

"""OA-AT against its definition in fp64: the distance, the losses, the schedule, whole runs, what a run leaves."""

import copy
import dataclasses
import math

import plain_methods
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import images, randn
from small_steps import HostReads
from steps import TensorStep, make_step, require_refused
from torch import Tensor, nn

from awp_engine.config import AttackConfig, AverageConfig, AwpConfig, Config, ConfigError, DataConfig, ModelConfig
from awp_engine.config.identity import why_not_longer
from awp_engine.config.settings import DistributedConfig, EvaluationConfig, OptimizerConfig, PrecisionConfig
from awp_engine.data import Batch
from awp_engine.data.augment.auto_augment import CIFAR10, draw_auto_augment
from awp_engine.models import build_model
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import build_objective
from awp_engine.step.objectives.oaat import Oaat, perceptual_distance
from awp_engine.step.precision import WorkingModels
from awp_engine.step.values import Phase
from awp_engine.train.setup import build_step as build_from
from awp_engine.train.setup import objective_of, training_attack
from awp_engine.train.trainer import Trainer
from awp_kernels import AdversarialWeightPerturbation

EPSILON, STEP_SIZE, STEPS, GAMMA, EPOCHS, SMOOTH = 16 / 255, 4 / 255, 3, 0.01, 6, 0.1
BETA, BETA_END, MIXING, LPIPS = 1.5, 3.0, 0.2, 2.0
ARGUMENTS = {"beta_end": BETA_END, "mixing": MIXING, "lpips_weight": LPIPS, "far": 1.5}


def distance(features: list[Tensor], others: list[Tensor]) -> Tensor:
    """Root of the sum over layers of the mean over places of the squared distance of unit vectors, image by image."""
    found = []
    for n in range(len(features[0])):
        total = torch.zeros((), dtype=torch.float64)
        for f, o in zip(features, others, strict=True):
            for i in range(f.shape[2]):
                for j in range(f.shape[3]):
                    a, b = f[n, :, i, j], o[n, :, i, j]
                    a, b = a / (a.pow(2).sum().sqrt() + 1e-10), b / (b.pow(2).sum().sqrt() + 1e-10)
                    total = total + (a - b).pow(2).sum() / (f.shape[2] * f.shape[3])
        found.append(total.sqrt())
    return torch.stack(found)


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99), st.sampled_from([1e-3, 1, 10]))
def test_the_distance_is_that_of_its_definition(n, channels, layers, seed, scale):
    shapes = [(n, channels + k, 3 - k, 2) for k in range(layers)]
    ours, others = (
        [randn(shape, torch.float64, seed + 10 * which + k, scale).requires_grad_() for k, shape in enumerate(shapes)]
        for which in range(2)
    )
    found, expected = perceptual_distance(ours, others), distance(ours, others)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    pairs = [torch.autograd.grad(d.sum(), [*ours, *others]) for d in (found, expected)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_equal_images_are_at_no_distance_and_have_a_finite_gradient():
    features = [torch.zeros(2, 3, 2, 2).requires_grad_()]
    found = perceptual_distance(features, [torch.zeros(2, 3, 2, 2)])
    assert found.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(found.sum(), features)
    assert gradient.isfinite().all()


def by_hooks(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Sums that leave the last block of each stage, of a network in eval mode."""
    found: list[Tensor] = []
    handles = [
        stage[-1].register_forward_hook(lambda _, inputs, output: found.append(output[0] + output[1]))
        for stage in model.stages()
    ]
    training = model.training
    model.eval()(x)
    model.train(training)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(("name", "stages", "channels"), [("preact-resnet-18", 4, 8), ("wrn-10-2", 3, 32)])
def test_features_are_what_leaves_the_stages(name, stages, channels):
    torch.manual_seed(0)
    width = {"width": 8} if name.startswith("preact") else {}
    model = build_model(name, 10, (0.5,) * 3, (0.25,) * 3, **width).double().eval()
    x = images((2, 3, 16, 16), torch.float64)
    found = model.features(x)
    assert [f.shape for f in found] == [(2, channels * 2**k, 16 // 2**k, 16 // 2**k) for k in range(stages)]
    assert all(torch.equal(a, b) for a, b in zip(found, by_hooks(model, x), strict=True))


def smoothed(logits: Tensor, y: Tensor) -> Tensor:
    logs = plain_methods.log_probabilities(logits)
    return -(1 - SMOOTH) * logs[torch.arange(len(y)), y] - SMOOTH * logs.mean(1)


def mixed_divergence(near: Tensor, clean: Tensor, far: Tensor, own: float) -> Tensor:
    """KL(own p + (1 - own) p' || p''), [N]."""
    p, p_far, q = (plain_methods.log_probabilities(logits).exp() for logits in (clean, far, near))
    mixed = own * p + (1 - own) * p_far
    return (mixed * (mixed / q).log()).sum(1)


@dataclasses.dataclass
class Expected:
    """What the definition says of step `step` of `epoch`."""

    epoch: int
    step: int

    @property
    def late(self) -> bool:
        return self.epoch > 0.75 * EPOCHS

    @property
    def far(self) -> bool:
        return self.late and self.step % 2 == 0

    @property
    def part(self) -> float:
        first = math.floor(0.75 * EPOCHS)
        return (self.epoch - first) / (EPOCHS - first) if self.late else 0.0

    @property
    def own(self) -> float:
        first = math.floor(0.75 * EPOCHS)
        return 1 - (self.epoch - first) * MIXING / (EPOCHS - first + 1)

    @property
    def beta(self) -> float:
        return BETA + (BETA_END - BETA) * self.part

    @property
    def epsilon(self) -> float:
        return 4 / 255 if self.epoch <= EPOCHS // 4 else EPSILON * self.epoch / EPOCHS

    @property
    def attack(self) -> tuple[float, float, int, float]:
        """Radius, step, number of steps, radius of the start."""
        if self.far:
            return 24 / 255, 6 / 255, STEPS, 4 / 255
        if self.late:
            return self.epsilon, self.epsilon / 4, STEPS, self.epsilon
        few = self.epoch <= EPOCHS // 4
        return self.epsilon, self.epsilon / (2 if few else 4), 2 if few else STEPS, 4 / 255

    def loss(self, f: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        adv, clean = f(x_adv), f(x)
        pulled = plain_methods.kl(adv, clean)
        if self.far:
            near = torch.min(torch.max(x_adv, x - self.epsilon), x + self.epsilon)
            pulled = mixed_divergence(f(near), clean, adv, self.own)
        return (smoothed(clean, y) + self.beta * pulled).mean()

    def climbed(self, f: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> Tensor:
        at = x_adv if self.late else (x + 2 * (x_adv - x)).clamp(0, 1)
        return plain_methods.trades_loss(f, at, x, y, self.beta)

    def iterates(self, f: nn.Module, guide: nn.Module, x: Tensor, y: Tensor, start: Tensor, kl: bool) -> list[Tensor]:
        radius, step_size, steps, _ = self.attack
        f.eval()
        x_adv, found = start.clone(), []
        for _ in range(steps):
            x_adv.requires_grad_()
            logits = f(x_adv)
            rows = plain_methods.kl(logits, f(x)) if kl else plain_methods.cross_entropy(logits, y)
            loss = rows.mean()
            if self.late and not self.far:
                loss = loss - LPIPS * self.part * distance(by_hooks(guide, x_adv), by_hooks(guide, x)).mean()
            (gradient,) = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + step_size * gradient.sign()
            x_adv = torch.min(torch.max(x_adv, x - radius), x + radius).clamp(0, 1)
            found.append(x_adv.clone())
        f.train()
        return found


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=2).double().train()
    model(images((16, 1, 8, 8), torch.float64, seed=50))
    return model


def batch(index: int) -> Batch:
    y = torch.randint(0, 10, (4,), generator=torch.Generator().manual_seed(index))
    return Batch(images((4, 1, 8, 8), torch.float64, seed=index), y, torch.arange(4) + 100 * index, 4)


def build_step(model: nn.Module, climbs: str = "ce", **given) -> TensorStep:
    objective = build_objective(
        "oaat", beta=BETA, label_smoothing=SMOOTH, epochs=EPOCHS, arguments={**ARGUMENTS, "climbs": climbs}
    )
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-4))
    attack = AttackConfig(epsilon="16/255", step_size="4/255", steps=STEPS, bn_mode="eval")
    awp = AdversarialWeightPerturbation(model, GAMMA)
    return make_step(
        model, objective=objective, optimizer=optimizer, attack=attack, awp=awp, options=AwpConfig(gamma=GAMMA), **given
    )


@pytest.mark.parametrize("climbs", ["ce", "kl"])
def test_a_run_is_that_of_the_definition(climbs):
    """Iterates, losses, weights, statistics, the average and the guide, through all parts of a run of six epochs."""
    model, f = network(), network()
    step, momentum, guide = build_step(model, climbs), {}, copy.deepcopy(f)
    tracked = {name: t.clone() for name, t in f.state_dict().items()}
    moved, kinds = 0, set()
    for epoch in range(1, EPOCHS + 1):
        guide.load_state_dict(tracked)
        for number in range(3):
            expected, index = Expected(epoch, number), 3 * epoch + number
            if epoch == 5 and number == 0:
                momentum = {}
            kinds.add((expected.late, expected.far))
            taken = batch(index)
            x, y = taken.images, taken.labels
            phase = dataclasses.replace(step.phase(index, True, False), epoch=epoch, step=number)
            start = step.step.prepare(taken, phase)
            *_, radius = expected.attack
            drawn = dataclasses.replace(phase.attack, epsilon=radius).first(x, sample_ids=taken.ids, seed=index)
            torch.testing.assert_close(start, drawn, rtol=0, atol=1e-15)
            iterates = expected.iterates(f, guide, x, y, start, climbs == "kl")
            chosen = step.passes.objective.choose(phase.attack)
            assert chosen.steps == len(iterates)
            for count in range(1, len(iterates) + 1):
                attack = dataclasses.replace(chosen, steps=count)
                found, *_ = step.passes.attack(attack, taken, step.passes.share(4, 4), start)
                torch.testing.assert_close(found, iterates[count - 1], rtol=0, atol=1e-12)
            x_adv, weights = iterates[-1], [p.detach().clone() for p in f.parameters()]
            climber = copy.deepcopy(f)
            expected.climbed(climber, x_adv, x, y).backward()
            with torch.no_grad():
                for p, c in zip(f.parameters(), climber.parameters(), strict=True):
                    if p.ndim > 1:
                        p.add_(GAMMA * p.norm() / c.grad.norm() * c.grad)
            loss = expected.loss(f, x_adv, x, y)
            gradients = torch.autograd.grad(loss, list(f.parameters()))
            with torch.no_grad():
                for p, w, g in zip(f.parameters(), weights, gradients, strict=True):
                    momentum[p] = 0.9 * momentum.get(p, 0) + g + 5e-4 * w
                    p.copy_(w - 0.1 * momentum[p])
            for name, t in f.state_dict().items():
                keeps = epoch == 1 or not t.is_floating_point()
                tracked[name] = t.clone() if keeps else 0.995 * tracked[name] + 0.005 * t
            result = step.step(taken, phase, start)
            torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-9, atol=0)
            moved += 3 if expected.far else 2
            assert int(model.get_buffer("bn.num_batches_tracked")) == 1 + moved
            objective = step.passes.objective
            networks = (
                (model, f.state_dict()),
                (objective.tracked, tracked),
                (objective.guide.model, guide.state_dict()),
            )
            for ours, theirs in networks:
                for name, t in ours.state_dict().items():
                    torch.testing.assert_close(t, theirs[name], rtol=1e-9, atol=1e-12)
    assert kinds == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("step", [0, 1, 2])
def test_answers_that_are_sure_give_finite_losses(step):
    """Probabilities that underflow to 0; and the accuracy is that in the ball."""
    objective = Oaat(1.5, epochs=4)
    objective.follow(WorkingModels(network()))
    objective.begin_step(0.9, 4, step)
    objective.choose(training_attack(AttackConfig(epsilon="8/255", step_size="2/255")))
    logits = torch.tensor([[400.0, 0.0], [0.0, -300.0]], requires_grad=True)
    offset = torch.tensor([[-500.0, 0.0], [0.0, 500.0]])
    x_adv, x = torch.full((2, 2), 0.7), torch.zeros(2, 2)
    losses, adv = objective.losses(lambda x: logits + offset * (x > 0.6), x_adv, x, torch.zeros(2).long())
    assert losses.isfinite().all()
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.isfinite().all()
    assert torch.equal(adv, logits if step % 2 == 0 else logits + offset)


def test_a_step_that_is_left_out_leaves_the_average_alone():
    """Also one whose statistics are not finite."""
    model = network()
    step = build_step(model)
    taken = batch(1)
    step.step(taken, dataclasses.replace(step.phase(0, True, False), epoch=2, step=0))
    state = step.passes.objective.state()
    before = {name: t.clone() for name, t in state.items()}
    held = {name: t.clone() for name, t in model.state_dict().items()}
    broken = taken._replace(images=torch.full_like(taken.images, torch.nan))
    assert step.step(broken, dataclasses.replace(step.phase(1, True, False), epoch=2, step=1)).skipped
    assert all(torch.equal(t, before[name]) for name, t in step.passes.objective.state().items())
    assert all(torch.equal(t, held[name]) for name, t in model.state_dict().items())
    assert not step.step(taken, dataclasses.replace(step.phase(2, True, False), epoch=2, step=2)).skipped
    assert not all(torch.equal(t, before[name]) for name, t in step.passes.objective.state().items())


@pytest.mark.parametrize("kind", ["sgd", "adamw", "torch:RMSprop"])
def test_the_optimizer_is_as_new_where_the_last_quarter_begins(kind):
    """The update from there on is that of a fresh optimizer at the same weights."""
    rates = OptimizerConfig(kind=kind, lr=0.01, weight_decay=0.0)
    config = dataclasses.replace(RUN, optimizer=rates, awp=AwpConfig(gamma=0.0), epochs=4)
    found = []
    for fresh in (False, True):
        model = network()
        step = build_from(config, model, objective=objective_of(config, torch.device("cpu"), 10))
        attack = training_attack(config.attack)
        if not fresh:
            for number in range(2):
                step(batch(number), Phase(attack=attack, epoch=3, step=number))
            held = copy.deepcopy(model.state_dict())
        else:
            model.load_state_dict(held)
        step(batch(9), Phase(attack=attack, epoch=4, step=0))
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_16_bit_guide_is_what_the_average_was():
    """Written when an epoch begins, and once in a process that goes on within one."""
    torch.manual_seed(0)
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).train()
    config = dataclasses.replace(RUN, precision=PrecisionConfig(attack="bf16"))
    objective = objective_of(config, torch.device("cpu"), 10)
    step = build_from(config, model, objective=objective)
    guide = objective.guide
    with torch.no_grad():
        for p in objective.guide.model.parameters():
            p.add_(0.5)
    taken = Batch(images((4, 1, 8, 8)), torch.arange(4), torch.arange(4), 4)
    for number in (1, 0):
        step(taken, Phase(attack=training_attack(config.attack), epoch=2, step=number))
        pairs = list(zip(guide.attack.parameters(), guide.model.parameters(), strict=True))
        assert {copied.dtype for copied, _ in pairs} == {torch.float32, torch.bfloat16}
        assert all(torch.equal(copied, p.to(copied.dtype)) for copied, p in pairs)


def test_steps_can_be_captured():
    """The host reads no more than in AT, which climbs cross-entropy, whatever the part of the run."""
    counts = []
    for method, epoch, number in (("at", 1, 0), ("oaat", 2, 0), ("oaat", 6, 0), ("oaat", 6, 1)):
        model = network()
        step = build_step(model) if method == "oaat" else None
        if step is None:
            config = dataclasses.replace(RUN, method="at", epochs=EPOCHS)
            step = TensorStep(build_from(config, model), config.attack)
        phase = dataclasses.replace(step.phase(1, True, False), epoch=epoch, step=number)
        start = step.step.prepare(batch(1), phase)
        with HostReads() as found:
            step.step(batch(1), phase, start)
        counts.append(found.reads)
    assert 0 < max(counts[1:]) <= counts[0], counts


def test_a_policy_for_a_part_of_the_images_leaves_the_others_alone():
    """Those that it changes are changed as without the part."""
    ids = torch.arange(2000)
    whole, amounts = draw_auto_augment(ids, CIFAR10, seed=1, epoch=2)
    half, same = draw_auto_augment(ids, CIFAR10, seed=1, epoch=2, part=0.5)
    assert torch.equal(amounts, same)
    kept = (half == whole).all(1)
    assert (half[~kept] == -1).all()
    changed = (whole >= 0).any(1)
    assert abs(float((half[changed] >= 0).any(1).float().mean()) - 0.5) < 0.05


RUN = Config(
    device="cpu",
    method="oaat",
    beta=1.5,
    data=DataConfig(pad=1, train_limit=20),
    model=ModelConfig(width=2),
    attack=AttackConfig(steps=1, bn_mode="eval"),
    awp=AwpConfig(gamma=0.01),
    average=AverageConfig(kind="ema", warmup=3.0, statistics="averaged"),
    evaluation=EvaluationConfig(steps=1, held_out_limit=8, test_limit=8),
    epochs=4,
    global_batch_size=10,
)


OWN = "which attacks by Linf PGD from uniform noise, in a ball of its own each epoch"


def test_a_run_says_how_its_ball_grows_and_keeps_both_networks(tmp_path):
    trainer = Trainer(dataclasses.replace(RUN, run_dir=tmp_path / "run"))
    said = [
        message for message in trainer.messages if "attacks in 0.25 of --attack.epsilon in the first quarter" in message
    ]
    assert len(said) == 1
    trainer.run()
    held = trainer.awp_step.passes.objective.state()
    assert {name.partition(".")[0] for name in held} == {"tracked", "guide"}
    assert len(held) == 2 * len(trainer.model.state_dict())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attack": AttackConfig(norm="l2", epsilon="1")}, r"--attack\.norm: expected linf"),
        ({"attack": AttackConfig(start="normal")}, r"--attack\.start: expected uniform"),
        ({"attack": AttackConfig(ramp="linear")}, r"--attack\.ramp: expected none"),
        ({"attack": AttackConfig(step_warmup=1)}, r"--attack\.step-warmup: expected 0"),
        (
            {"attack": AttackConfig(stronger_after=1, stronger_epsilon="0.3", stronger_steps=2)},
            r"--attack\.stronger-after: expected none",
        ),
    ],
)
def test_an_attack_that_does_not_go_with_it_is_refused(tmp_path, wrong, message):
    """Of one's own class that is the same, too."""
    require_refused(RUN, wrong, message, "oaat", "Oaat", OWN, tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attack": AttackConfig(epsilon="0")}, r"--attack\.epsilon: expected more than 0 with --method oaat"),
        ({"attack": AttackConfig(kind="apgd")}, r"--attack\.kind: expected pgd with --method oaat"),
        (
            {"attack": AttackConfig(step_size="0.3")},
            r"--attack\.step-size: expected at most epsilon with --method oaat",
        ),
        ({"awp": AwpConfig(gamma=0.01, every=2)}, r"--awp\.every: expected 1 with --method oaat, whose batches take"),
        ({"average": AverageConfig(kind="ema")}, r"--average\.statistics: expected averaged or live with --method oa"),
        ({"model": ModelConfig(name="resnet-18")}, r"--model\.name: expected preact-resnet or wrn with --method oaat"),
        ({"model": ModelConfig(name="timm:resnet18")}, r"--model\.name: expected preact-resnet or wrn with"),
        ({"awp": AwpConfig(gamma=0.01, max_rise=0.1)}, r"--awp\.max-rise: expected none with --method oaat"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(dataclasses.replace(RUN, **wrong, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("far", 0.5, "a number from 1 to"),
        ("first", 0, "a number from 0 to 1"),
        ("mixing", 1.5, "a number from 0 to 1"),
        ("beta_end", math.inf, "a number from 0 to"),
        ("lpips_weight", -1, "a number from 0 to"),
        ("climbs", "dlr", "ce or kl"),
        ("epsilon", 1, "oaat takes no epsilon"),
    ],
)
def test_bad_arguments_are_refused_by_name(name, value, expected):
    with pytest.raises(ConfigError, match=f"--method-args: .*{name}.*{expected}|--method-args: {expected}"):
        build_objective("oaat", epochs=4, arguments={name: value})


def test_a_run_that_has_begun_gets_no_more_epochs():
    """Its parts would be others."""
    constant = dataclasses.replace(RUN, optimizer=OptimizerConfig(schedule="constant"))
    assert why_not_longer(dataclasses.replace(constant, method="trades")) is None
    assert why_not_longer(constant) == "its loss changes over all epochs (--method oaat)"


def test_a_graph_is_kept_over_the_first_quarter():
    """Where the ball does not change; after that each epoch has one, or two that take turns."""
    objective, stages = Oaat(1.5, epochs=8), []
    objective.follow(WorkingModels(network()))
    for epoch in range(1, 9):
        for step in range(4):
            objective.begin_step(0.0, epoch, step)
            stages.append(objective.stage)
    assert [stages[4 * epoch] for epoch in range(8)] == [(0, False)] * 2 + [(n, n > 6) for n in range(3, 9)]
    assert len(set(stages)) == 1 + 4 + 2 * 2


def test_shards_are_refused_to_whatever_keeps_the_model(tmp_path):
    (tmp_path / "own.py").write_text(
        "from awp_engine.step.objectives import Trades\n"
        "class Own(Trades):\n    def follow(self, models):\n        self.model = models.model\n"
    )
    config = dataclasses.replace(RUN, method=f"{tmp_path / 'own.py'}:Own", average=AverageConfig())
    assert objective_of(dataclasses.replace(config, attack=AttackConfig(norm="l2")), torch.device("cpu")) is not None
    for one, name in ((config, "own.py:Own"), (RUN, "oaat")):
        shards = dataclasses.replace(one, distributed=DistributedConfig(strategy="fsdp"))
        with pytest.raises(
            ConfigError, match=rf"--distributed\.strategy: expected ddp with .*{name}, which keeps what"
        ):
            objective_of(shards, torch.device("cpu"), 10)


def test_the_policy_part_needs_a_policy():
    with pytest.raises(ConfigError, match=r"--data\.policy-part: expected 1, unless --data\.policy is one of AutoAug"):
        DataConfig(policy_part=0.5)

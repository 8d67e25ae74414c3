"""TRADES, MART and the options of the step, each against plain PyTorch in fp64."""

import copy
import math

import plain_methods
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import images
from steps import TensorStep, make_step
from torch import nn

from awp_engine.attack import NORMAL_START, fast_attack, starting_point, summed_margin
from awp_engine.config import AttackConfig, AwpConfig, ConfigError, OptimizerConfig
from awp_engine.distributed.ranks import Ranks
from awp_engine.models import build_model
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import build_objective
from awp_kernels import AdversarialWeightPerturbation
from awp_kernels.philox import normals

EPSILON, STEP_SIZE, STEPS, BETA, GAMMA = 8 / 255, 2 / 255, 4, 6.0, 0.005
SGD = OptimizerConfig(lr=0.1, momentum=0.9, weight_decay=5e-4)
ATTACK = AttackConfig(norm="linf", epsilon="8/255", step_size="2/255", steps=STEPS, bn_mode="eval", start="normal")


def small_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=4).to(dtype).train()
    with torch.no_grad():  # running statistics that are not the initial ones
        for _ in range(3):
            model(images((16, 1, 8, 8), dtype, seed=seed + 50))
    return model


def batch(index: int = 0, dtype: torch.dtype = torch.float64, n: int = 12):
    x = images((n, 1, 8, 8), dtype, seed=index)
    y = torch.randint(0, 10, (n,), generator=torch.Generator().manual_seed(index))
    return x, y, torch.arange(n) + 100 * index


def build_step(model: nn.Module, method: str = "at", gamma: float = GAMMA, **changes) -> TensorStep:
    awp = AdversarialWeightPerturbation(model, gamma) if gamma else None
    options = {"attack": ATTACK, "optimizer": build_optimizer(model, SGD), "options": AwpConfig(gamma=gamma)} | changes
    return make_step(model, objective=build_objective(method, beta=BETA), awp=awp, **options)


def relative(a: nn.Module, b: nn.Module) -> float:
    worst = 0.0
    for (name, value), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        scale = other.double().norm().clamp_min(1e-12)
        difference = float((value.double() - other.double()).norm() / scale)
        assert math.isfinite(difference), name
        worst = max(worst, difference)
    return worst


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", ["trades", "mart"])
def test_losses_agree_with_the_formulas(kind):
    x, y, _ = batch(1)
    x_adv = (x + 0.05 * torch.sign(x - 0.4)).clamp(0, 1)
    ours, theirs = small_model(), small_model()
    losses, logits = build_objective(kind, beta=BETA).losses(ours, x_adv, x, y)
    reference = getattr(plain_methods, f"{kind}_loss")(theirs, x_adv, x, y, BETA)
    assert losses.shape == (len(x),)
    assert abs(losses.mean() - reference) <= 1e-9 * abs(reference)
    torch.testing.assert_close(logits, small_model()(x_adv), rtol=1e-12, atol=0)
    losses.mean().backward()
    reference.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-9 * b.grad.norm().clamp_min(1e-6)


@pytest.mark.parametrize("kind", ["trades", "mart"])
def test_every_attack_iterate_agrees(kind):
    model = small_model()
    step = build_step(model, kind)
    x, y, ids = batch(2)
    start = starting_point(x, "normal", epsilon=EPSILON, norm="linf", sample_ids=ids, seed=5)
    iterates = plain_methods.attack(model, x, y, start, kind=kind, epsilon=EPSILON, step_size=STEP_SIZE, steps=STEPS)
    for count in range(1, STEPS + 1):
        ours = step.attacked(model, x, y, ids, 5, steps=count)
        assert (ours - iterates[count]).norm() <= 1e-9 * iterates[count].norm()
    assert not torch.equal(iterates[-1], iterates[0])
    assert model.training


@pytest.mark.parametrize("kind", ["trades", "mart"])
def test_three_whole_steps_agree(kind):
    """Attack, ascent, descent, SGD with momentum and decay; weights and BN statistics."""
    ours, theirs = small_model(), small_model()
    step = build_step(ours, kind)
    momentum: dict[str, torch.Tensor] = {}
    for index in range(3):
        x, y, ids = batch(index)
        start = starting_point(x, "normal", epsilon=EPSILON, norm="linf", sample_ids=ids, seed=index)
        settings = {"epsilon": EPSILON, "step_size": STEP_SIZE, "steps": STEPS}
        x_adv = plain_methods.attack(theirs, x, y, start, kind=kind, **settings)[-1]
        plain_methods.awp_step(
            theirs, momentum, x_adv, x, y, kind=kind, beta=BETA, gamma=GAMMA, lr=0.1, mu=0.9, weight_decay=5e-4
        )
        result = step(x, y, sample_ids=ids, seed=index)
        assert not result.skipped
        assert relative(ours, theirs) <= 1e-9
    control = small_model()
    without = build_step(control, kind, gamma=0.0)
    for index in range(3):
        x, y, ids = batch(index)
        without(x, y, sample_ids=ids, seed=index)
    assert relative(control, theirs) > 1e-5  # a missing perturbation would be seen


def test_normal_start_is_keyed_and_small():
    x, _, ids = batch(0)
    start = starting_point(x, "normal", epsilon=EPSILON, norm="linf", sample_ids=ids, seed=3)
    noise = normals(ids, 64, seed=3).view(x.shape)
    torch.testing.assert_close(start - x, NORMAL_START * noise.double(), rtol=1e-6, atol=1e-9)
    again = starting_point(x[[3]], "normal", epsilon=EPSILON, norm="linf", sample_ids=ids[[3]], seed=3)
    assert torch.equal(again[0], start[3])


def test_clean_logits_are_computed_once_a_step():
    """TRADES: K attack passes, one clean pass for the attack, and twice (adversarial, clean) for ascent and descent."""
    model = small_model()
    calls = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    x, y, ids = batch(0)
    build_step(model, "trades")(x, y, sample_ids=ids, seed=0)
    assert len(calls) == STEPS + 1 + 2 + 2
    calls.clear()
    build_step(model, "mart")(x, y, sample_ids=ids, seed=0)
    assert len(calls) == STEPS + 2 + 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mart_survives_certain_mistakes_in_16_bits(dtype):
    """A wrong class of probability 1 makes 1.0001 - p zero in 16 bits."""

    class Certain(nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 60.0, 0.0]], dtype=dtype).expand(len(x), 3)

    x = torch.rand(2, 1, 8, 8)
    losses, _ = build_objective("mart").losses(Certain(), x, x, torch.tensor([0, 2]))
    assert losses.dtype == torch.float32
    assert torch.isfinite(losses).all()


def test_label_smoothing_and_mixtures():
    model, (x, y, _) = small_model(), batch(0)
    soft = 0.7 * nn.functional.one_hot(y, 10).double() + 0.3 * nn.functional.one_hot((y + 1) % 10, 10).double()
    logits = model(x)
    for labels in (y, soft):
        losses, _ = build_objective("at", label_smoothing=0.1).losses(model, x, x, labels)
        target = (nn.functional.one_hot(y, 10).double() if labels is y else soft) * 0.9 + 0.01
        reference = -(target * plain_methods.log_probabilities(logits)).sum(1)
        torch.testing.assert_close(losses, reference, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="label_smoothing"):
        build_objective("mart", label_smoothing=0.1)
    with pytest.raises(ValueError, match="method"):
        build_objective("tardes")


def gradient(model: nn.Module, loss) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def descend(model: nn.Module, moved: dict[str, torch.Tensor], loss_fn) -> nn.Module:
    """A copy of `model` after one SGD step from zero momentum, with the gradient taken at `moved` weights."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in moved.items():
            result.get_parameter(name).copy_(value)
    gradients = gradient(result, loss_fn(result))  # moves BN statistics, once
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            original = model.get_parameter(name)
            parameter.copy_(original - SGD.lr * (gradients[name] + SGD.weight_decay * original))
    return result


def test_rwp_adds_up_masked_gradients():
    """Up to 10 passes over the samples whose loss is below c_min, as the RWP paper's code: sum, then rescale at w."""
    ours = small_model()
    model = copy.deepcopy(ours)
    x, y, ids = batch(4)
    options = AwpConfig(gamma=GAMMA, scope="global", ascent_steps=3, c_min=2.4)
    awp = AdversarialWeightPerturbation(ours, GAMMA, scope="global")
    step = make_step(
        ours,
        objective=build_objective("at"),
        optimizer=build_optimizer(ours, SGD),
        attack=ATTACK,
        awp=awp,
        options=options,
    )
    x_adv = step.attacked(copy.deepcopy(ours), x, y, ids, 0)
    originals = {n: p.detach().clone() for n, p in model.named_parameters()}
    chosen = [n for n, p in model.named_parameters() if p.ndim > 1 and "weight" in n]
    weight_norm = math.sqrt(sum(float(originals[n].pow(2).sum()) for n in chosen))
    climber, total, below_counts = copy.deepcopy(model), {}, []
    for _ in range(3):
        losses = plain_methods.cross_entropy(climber(x_adv), y)
        below = losses < 2.4
        below_counts.append(int(below.sum()))
        gradients = gradient(climber, (losses * below).sum() / len(y))
        total = {n: total.get(n, 0) + gradients[n] for n in chosen}
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in total.values()))
        moved = {n: originals[n] + GAMMA * weight_norm / norm * total[n] for n in chosen}
        with torch.no_grad():
            for n, value in moved.items():
                climber.get_parameter(n).copy_(value)
    assert 0 < below_counts[0] < len(y)  # the condition leaves some out
    expected = descend(model, moved, lambda m: plain_methods.cross_entropy(m(x_adv), y).mean())
    step(x, y, sample_ids=ids, seed=0)
    assert relative(ours, expected) <= 1e-9


def test_rwp_without_a_sample_below_the_bound_perturbs_nothing():
    ours, plain = small_model(), small_model()
    x, y, ids = batch(4)
    options = AwpConfig(gamma=GAMMA, scope="global", ascent_steps=10, c_min=1e-9)
    build_step(ours, options=options)(x, y, sample_ids=ids, seed=0)
    build_step(plain, gamma=0.0)(x, y, sample_ids=ids, seed=0)
    assert relative(ours, plain) <= 1e-12


def test_shared_ascent_follows_the_last_attack_pass():
    """The weight gradient of the attack's last pass: at the iterate before the last step, in the attack's BN mode."""
    ours = small_model()
    model = copy.deepcopy(ours)
    x, y, ids = batch(6)
    calls = []
    ours.register_forward_hook(lambda module, inputs, output: calls.append(1))
    step = build_step(ours, options=AwpConfig(gamma=GAMMA, ascent="shared"))
    step(x, y, sample_ids=ids, seed=2)
    assert len(calls) == STEPS + 1  # no pass of its own

    start = starting_point(x, "normal", epsilon=EPSILON, norm="linf", sample_ids=ids, seed=2)
    settings = {"epsilon": EPSILON, "step_size": STEP_SIZE, "steps": STEPS}
    iterates = plain_methods.attack(model, x, y, start, kind="at", **settings)
    evaluated = copy.deepcopy(model).eval()
    gradients = gradient(evaluated, plain_methods.cross_entropy(evaluated(iterates[-2]), y).sum())
    originals = {n: p.detach().clone() for n, p in model.named_parameters()}
    moved = {
        n: w + GAMMA * w.norm() / gradients[n].norm() * gradients[n]
        for n, w in originals.items()
        if w.ndim > 1 and "weight" in n
    }
    expected = descend(model, moved, lambda m: plain_methods.cross_entropy(m(iterates[-1]), y).mean())
    assert relative(ours, expected) <= 1e-9


def test_shared_ascent_of_micro_batches_is_that_of_the_batch():
    """In eval mode the attack's gradients of the pieces add up to those of the whole."""

    class Watched(AdversarialWeightPerturbation):
        def perturb_(self, **arguments):
            super().perturb_(**arguments)
            self.seen = {name: moved.clone() for name, moved in self.displacement().items()}

    x, y, ids = batch(6)
    moves = []
    for micro_batch_size in (None, 5):
        step = build_step(
            small_model(), options=AwpConfig(gamma=GAMMA, ascent="shared"), micro_batch_size=micro_batch_size
        )
        step.step.awp = Watched(step.models.model, GAMMA)
        step(x, y, sample_ids=ids, seed=2)
        moves.append(step.step.awp.seen)
    for name, moved in moves[0].items():
        torch.testing.assert_close(moves[1][name], moved, rtol=1e-9, atol=1e-12)


@given(world=st.integers(1, 9), of=st.integers(1, 40), micro=st.integers(1, 12))
def test_every_rank_has_as_many_pieces_none_of_them_empty(world, of, micro):
    """Ranks wait for each other in every piece; each image counts once, pieces are as small as that allows."""
    step = build_step(nn.Linear(1, 1), gamma=0.0, micro_batch_size=micro)
    counts, shares = [], 0.0
    for rank in range(world):
        step.passes.ranks = Ranks(rank=rank, world=world)
        rows, _ = step.passes.ranks.share(of)
        count = of if of < world else rows.stop - rows.start
        work = step.passes.share(count, of)
        sizes = [piece.stop - piece.start for piece, _ in work.pieces]
        assert min(sizes) >= 1
        assert [piece.start for piece, _ in work.pieces] == [sum(sizes[:i]) for i in range(len(sizes))]
        assert sum(sizes) == count
        assert max(sizes) <= max(micro, 2)
        counts.append(len(sizes))
        shares += sum(share for _, share in work.pieces)
    assert len(set(counts)) == 1
    assert shares == pytest.approx(1)


@pytest.mark.parametrize("kind", ["fgsm-rs", "n-fgsm"])
def test_fast_attacks(kind):
    model, (x, y, ids) = small_model(), batch(7)
    x_adv = fast_attack(kind, EPSILON)(model, x, y, sample_ids=ids, seed=1)
    reach = EPSILON if kind == "fgsm-rs" else 2 * EPSILON
    start = starting_point(x, "uniform", epsilon=reach, norm="linf", sample_ids=ids, seed=1)
    start.requires_grad_()
    evaluated = copy.deepcopy(model).eval()
    (g,) = torch.autograd.grad(plain_methods.cross_entropy(evaluated(start), y).sum(), start)
    if kind == "fgsm-rs":
        moved = start.detach() + 1.25 * EPSILON * g.sign()
        expected = torch.min(torch.max(moved, x - EPSILON), x + EPSILON).clamp(0, 1)
    else:
        expected = (start.detach() + EPSILON * g.sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)
    # the largest epsilon that the configuration takes with it
    within = fast_attack(kind, 0.5)(model, x, y, sample_ids=ids, seed=1)
    assert (within - x).abs().max() > (0.4 if kind == "fgsm-rs" else 0.8)
    with pytest.raises(ValueError, match="fast"):
        fast_attack("free", EPSILON)


def test_free_uses_one_pass_for_images_and_weights():
    ours = small_model()
    model = copy.deepcopy(ours)
    x, y, _ = batch(8)
    step = build_step(ours, gamma=0.0)
    delta, reference, momentum = torch.zeros_like(x), torch.zeros_like(x), {}
    calls = []
    ours.register_forward_hook(lambda module, inputs, output: calls.append(1))
    for _ in range(3):
        step.free(x, y, delta)
        image = (x + reference).clamp(0, 1).requires_grad_()
        names, parameters = zip(*model.named_parameters(), strict=True)
        loss = plain_methods.cross_entropy(model(image), y).mean()
        image_gradient, *gradients = torch.autograd.grad(loss, [image, *parameters])
        reference = (reference + EPSILON * image_gradient.sign()).clamp(-EPSILON, EPSILON)
        with torch.no_grad():
            for name, p, g in zip(names, parameters, gradients, strict=True):
                g = g + SGD.weight_decay * p
                momentum[name] = SGD.momentum * momentum[name] + g if name in momentum else g
                p -= SGD.lr * momentum[name]
        torch.testing.assert_close(delta, reference, rtol=0, atol=1e-12)
    assert len(calls) == 3
    assert relative(ours, model) <= 1e-9


@pytest.mark.parametrize(("ascents", "spoiled"), [(1, 1), (1, 2), (3, 1), (3, 2), (3, 4)])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_with_a_gradient_that_is_not_finite_is_left_out_whole(ascents, spoiled, value):
    """Weights, momentum and BN statistics keep their bits; the next step goes on. The loss that is told is one at w."""
    model = small_model(torch.float32)
    step = build_step(model, options=AwpConfig(gamma=GAMMA, ascent_steps=ascents))
    x, y, ids = batch(0, torch.float32)
    step(x, y, sample_ids=ids, seed=0)
    before = copy.deepcopy(model)
    momentum = [step.optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    passes = 0

    def spoil(gradient):
        nonlocal passes
        passes += 1
        return torch.full_like(gradient, value) if passes == spoiled else gradient

    handle = model.linear.weight.register_hook(spoil)
    result = step(x, y, sample_ids=ids, seed=1)
    handle.remove()
    assert passes == ascents + 1
    assert result.skipped
    assert result.loss.isfinite()
    assert equal(model, before)
    for p, saved in zip(model.parameters(), momentum, strict=True):
        assert torch.equal(step.optimizer.state[p]["momentum_buffer"], saved)
    assert not step(x, y, sample_ids=ids, seed=1).skipped
    assert not equal(model, before)


def test_a_skipped_first_step_leaves_clean_momentum():
    model, other = small_model(torch.float32), small_model(torch.float32)
    x, y, ids = batch(0, torch.float32)
    step = build_step(model)
    handle = model.linear.weight.register_hook(lambda g: torch.full_like(g, math.nan))
    assert step(x, y, sample_ids=ids, seed=0).skipped
    handle.remove()
    step(x, y, sample_ids=ids, seed=1)
    build_step(other)(x, y, sample_ids=ids, seed=1)
    assert equal(model, other)


def test_an_exception_in_a_step_loses_nothing():
    model = small_model(torch.float32)
    before = copy.deepcopy(model)
    x, y, ids = batch(0, torch.float32)
    step = build_step(model)
    calls = 0

    def interrupt(module, inputs, output):
        nonlocal calls
        calls += 1
        if calls == 2:  # after the ascent, the descent's pass, at perturbed weights, after the statistics moved
            raise KeyboardInterrupt

    handle = model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(x, y, sample_ids=ids, seed=0)
    handle.remove()
    assert equal(model, before)


def test_clipping_by_the_whole_norm():
    ours = small_model()
    model = copy.deepcopy(ours)
    x, y, ids = batch(9)
    step = build_step(ours, gamma=0.0, clip_norm=0.01)
    x_adv = step.attacked(copy.deepcopy(ours), x, y, ids, 0)
    step(x, y, sample_ids=ids, seed=0)
    gradients = gradient(model, plain_methods.cross_entropy(model(x_adv), y).mean())
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients.values()))
    assert norm > 0.01
    with torch.no_grad():
        for name, p in model.named_parameters():
            # torch adds 1e-6 to the norm
            p -= SGD.lr * (gradients[name] * 0.01 / (norm + 1e-6) + SGD.weight_decay * p)
    assert relative(ours, model) <= 1e-9


def test_decay_can_leave_out_biases_and_normalisation():
    model = small_model()
    optimizer = build_optimizer(model, OptimizerConfig(decay_all=False))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for p in model.parameters():
        assert decays[id(p)] == (5e-4 if p.ndim > 1 else 0.0)
    assert len(decays) == len(list(model.parameters()))


def test_decay_can_leave_out_normalisation_alone():
    """By the layers' types: biases of convolutions and classifiers decay, a layer norm of three dimensions does not."""
    layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LayerNorm((2, 6, 6)), nn.GroupNorm(1, 2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 3))
    changes = {"decay_norms": False, "weight_decay": 0.1, "lr": 0.5}
    decays = {}
    for decay_all in (True, False):
        optimizer = build_optimizer(model, OptimizerConfig(decay_all=decay_all, **changes))
        named = {id(p): name for name, p in model.named_parameters()}
        decays[decay_all] = {named[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    norms = {f"{layer}.{kind}": 0.0 for layer in (1, 2, 3) for kind in ("weight", "bias")}
    assert decays[True] == {"0.weight": 0.1, "0.bias": 0.1, "5.weight": 0.1, "5.bias": 0.1} | norms
    assert decays[False] == {"0.weight": 0.1, "0.bias": 0.0, "5.weight": 0.1, "5.bias": 0.0} | norms
    named_out = build_optimizer(model, OptimizerConfig(weight_decay=0.1, no_decay=("0.*", "*.bias")))
    decays = {named[id(p)]: g["weight_decay"] for g in named_out.param_groups for p in g["params"]}
    spared = {name for name in named.values() if name.startswith("0.") or name.endswith(".bias")}
    assert decays == {name: 0.0 if name in spared else 0.1 for name in named.values()}
    with pytest.raises(ConfigError, match=r"^--optimizer\.no-decay: no trainable parameter matches 'pos\*'; there are"):
        build_optimizer(model, OptimizerConfig(no_decay=("*.bias", "pos*")))
    with pytest.raises(ConfigError, match=r"^--optimizer\.decay-norms: expected true for a model without"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(decay_norms=False))


@given(shape=st.tuples(st.integers(1, 6), st.integers(2, 7)), seed=st.integers(0, 10**6))
def test_the_margin_is_the_largest_wrong_logit_less_the_right_one(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = torch.randint(0, shape[1], (shape[0],), generator=generator)
    pairs = zip(logits.tolist(), y.tolist(), strict=True)
    expected = sum(max(v for k, v in enumerate(row) if k != right) - row[right] for row, right in pairs)
    assert summed_margin(logits, y).item() == pytest.approx(expected)


def test_zero_gradients_are_counted():
    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model(torch.float32)

        def forward(self, x):
            return self.inner((x * 4).round() / 4)

    x, y, ids = batch(0, torch.float32)
    assert build_step(Quantised())(x, y, sample_ids=ids, seed=0).zero_gradients == 1
    assert build_step(small_model(torch.float32))(x, y, sample_ids=ids, seed=0).zero_gradients < 0.25

    class QuantisedAfter(Quantised):
        """Its gradient is zero in all passes but the first, as where an attack gets stuck."""

        passes = 0

        def forward(self, x):
            self.passes += 1
            return super().forward(x) if self.passes > 1 else self.inner(x)

    assert build_step(QuantisedAfter())(x, y, sample_ids=ids, seed=0).zero_gradients == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 5}])
def test_gradients_that_are_not_finite_are_counted(value, changes):
    """On a quarter of the images the attack, of any kind, overflows: the step says so, and trains on."""

    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model(torch.float32)

        def forward(self, x):
            if x.requires_grad:
                x = x * 1.0
                x.register_hook(lambda g: torch.where(x.detach().amax((1, 2, 3), keepdim=True) < 0.9, value, g))
            return self.inner(x)

    x, y, ids = batch(0, torch.float32)
    x = x.clamp(max=0.8)
    x[3:, 0, 0, 0] = 1.0
    for kind in ("pgd", "apgd"):
        attack = AttackConfig(kind=kind, epsilon="8/255", step_size="2/255", steps=2, bn_mode="eval", start="none")
        result = build_step(Overflowing(), attack=attack, **changes)(x, y, sample_ids=ids, seed=0)
        assert result.nonfinite_gradients == pytest.approx(0.25)
        assert result.zero_gradients < 0.25
        assert not result.skipped
    delta = torch.zeros_like(x)
    result = build_step(Overflowing(), gamma=0.0, **changes).free(x, y, delta)
    assert result.nonfinite_gradients == pytest.approx(0.25)
    if math.isnan(value):
        assert not delta[:3].any()
    assert delta.isfinite().all()
    assert build_step(small_model(torch.float32))(x, y, sample_ids=ids, seed=0).nonfinite_gradients == 0


def test_right_answers_to_mixtures_are_those_to_their_largest_class():
    x, y, ids = batch(3, n=40)
    shares = nn.functional.one_hot(y, 10).double() * 0.7 + 0.03
    model = small_model()
    y[:20] = model.eval()(x[:20]).argmax(1)
    shares[:20] = nn.functional.one_hot(y[:20], 10).double() * 0.7 + 0.03
    options = {"gamma": 0.0, "attack": AttackConfig(epsilon="0")}
    told = [build_step(small_model(), **options)(x, labels, sample_ids=ids, seed=0) for labels in (y, shares)]
    assert told[0].correct == told[1].correct > 0.2

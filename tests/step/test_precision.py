"""16-bit parts of a step: what they may change, and what they must not."""

import copy
import dataclasses

import pytest
import torch
from digits_model import digits, robust_model
from samples import images
from steps import make_step
from torch import nn

from awp_engine.attack import pgd
from awp_engine.config import (
    AttackConfig,
    AwpConfig,
    Config,
    ConfigError,
    DistributedConfig,
    OptimizerConfig,
    PrecisionConfig,
)
from awp_engine.models import build_model
from awp_engine.models.layers import Conv3x3
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import build_objective
from awp_engine.step.precision import LossScale, Precision, WorkingModels, frozen_view, working_copy
from awp_engine.train.setup import choose_precision
from awp_kernels import AdversarialWeightPerturbation, perturb_into_

HALF = Precision(attack=torch.float16, ascent=torch.float16, descent=torch.float16)
ATTACK = AttackConfig(epsilon="0.2", step_size="0.08", steps=3, bn_mode="train")


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("preact-resnet-digits", 10, (0.5,), (0.25,), width=8).train()


def build_step(model: nn.Module, precision: Precision, gamma: float = 0.01, method: str = "at", **changes):
    options = AwpConfig(gamma=gamma, **changes)
    models = WorkingModels(model, precision, shared_ascent=gamma > 0 and options.ascent == "shared")
    return make_step(
        model,
        optimizer=build_optimizer(model, OptimizerConfig(lr=0.05), working=models.updated),
        objective=build_objective(method),
        attack=ATTACK,
        awp=AdversarialWeightPerturbation(model, gamma, working=models.working) if gamma else None,
        options=options,
        models=models,
    )


def batch(index: int, n: int = 16):
    y = torch.randint(0, 10, (n,), generator=torch.Generator().manual_seed(index))
    return images((n, 1, 8, 8), seed=index), y, torch.arange(n) + 100 * index


def distance(a: nn.Module, b: nn.Module) -> float:
    """Of all weights together, relative."""
    first, second = (torch.cat([p.detach().flatten() for p in m.parameters()]).double() for m in (a, b))
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("gamma", [0.005, 0.01])
def test_the_perturbation_survives_fp16_storage_and_not_bf16(gamma):
    """||stored(w + v) - w - v|| / ||v||, tensor by tensor: below 6% in fp16; bf16 is what the error message says."""
    torch.manual_seed(1)
    weights = [p.detach() for p in build_model("preact-resnet-18", 10, (0.5,) * 3, (0.25,) * 3, width=16).parameters()]
    weights = [w for w in weights if w.ndim > 1]
    grads = [torch.randn_like(w) * 1e-3 for w in weights]
    exact = [
        w.double() + gamma * w.double().norm() / g.double().norm() * g.double()
        for w, g in zip(weights, grads, strict=True)
    ]
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        out = [torch.full_like(w, torch.nan, dtype=dtype) for w in weights]
        perturb_into_(out, weights, grads, gamma)
        errors[dtype] = [
            float((o.double() - e).norm() / (e - w.double()).norm())
            for o, e, w in zip(out, exact, weights, strict=True)
        ]
    assert max(errors[torch.float16]) < 0.06
    if gamma == 0.005:
        assert min(errors[torch.bfloat16]) > 0.2


def test_bf16_is_refused_for_the_perturbation():
    model = small_model()
    with pytest.raises(ValueError, match=r"working: conv1.weight is bfloat16"):
        AdversarialWeightPerturbation(model, 0.005, working=working_copy(model, torch.bfloat16))
    for part in ("ascent", "descent"):
        with pytest.raises(ConfigError, match=rf"--precision.{part}: expected fp32 or fp16"):
            Config(precision=PrecisionConfig(**{part: "bf16"}))
        without = Config(precision=PrecisionConfig(**{part: "bf16"}), awp=AwpConfig(gamma=0.0))
        assert getattr(choose_precision(without, torch.device("cpu")), part) == torch.bfloat16


def test_what_is_chosen_for_a_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    chosen = choose_precision(Config(), cpu)
    assert (chosen.ascent, chosen.descent) == (None, None)
    assert chosen.attack in (None, torch.bfloat16)
    assert choose_precision(Config(), cuda) == HALF
    rho = Config(awp=AwpConfig(gamma=0.05, scale="absolute"))
    assert choose_precision(rho, cuda) == Precision(attack=torch.float16)
    shared = Config(awp=AwpConfig(gamma=0.005, ascent="shared"))
    assert choose_precision(shared, cpu).attack is None
    # without a perturbation nothing is shared
    plain = Config(awp=AwpConfig(gamma=0.0, ascent="shared"), precision=PrecisionConfig(attack="bf16"))
    assert choose_precision(plain, cpu).attack == torch.bfloat16
    # one model in one precision: an attack that is left to choose takes that of the rest
    fsdp = dataclasses.replace(rho, distributed=DistributedConfig(strategy="fsdp"))
    assert choose_precision(fsdp, cuda) == Precision()
    with pytest.raises(ConfigError, match=r"--precision.attack: expected fp32 or bf16 on the CPU, got 'fp16'"):
        choose_precision(Config(precision=PrecisionConfig(attack="fp16")), cpu)
    with pytest.raises(ConfigError, match=r"--precision.descent: expected fp32 with --awp.scale absolute"):
        dataclasses.replace(rho, precision=PrecisionConfig(descent="fp16"))
    clean = Config(attack=AttackConfig(epsilon="0"), awp=AwpConfig(gamma=0.0))
    assert choose_precision(clean, cpu) == Precision()
    with pytest.raises(ConfigError, match=r"--precision.attack: expected auto like --precision.ascent with"):
        dataclasses.replace(shared, precision=PrecisionConfig(attack="bf16"))
    with pytest.raises(ConfigError, match=r"--precision.ascent: expected fp16 like --precision.descent"):
        Config(awp=AwpConfig(ascent_steps=2), precision=PrecisionConfig(descent="fp16", ascent="fp32"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_attack_in_16_bits_reaches_the_same_loss(dtype):
    """Within 0.5%, measured by the fp32 model on the attacked images, from the same start."""
    model, split = copy.deepcopy(robust_model()), digits().test
    x, y = split.images.float().div(255), split.labels
    settings = {"epsilon": 0.2, "step_size": 0.05, "steps": 10, "bn_mode": "eval", "seed": 3}
    low = WorkingModels(model, Precision(attack=dtype)).attack
    attacked = [pgd(m, x, y, **settings) for m in (model, low)]
    with torch.no_grad():
        clean, full, half = (float(nn.functional.cross_entropy(model(z), y)) for z in (x, *attacked))
    assert full > 1.5 * clean
    assert abs(half / full - 1) < 0.005


def test_a_working_copy_shares_statistics_and_nothing_else():
    model = small_model()
    copied = working_copy(model, torch.float16)
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers & {p.data_ptr() for p in copied.parameters()}
    assert {p.dtype for n, p in copied.named_parameters() if p.ndim > 1} == {torch.float16}
    assert {p.dtype for n, p in copied.named_parameters() if p.ndim == 1} == {torch.float32}
    copied(images((8, 1, 8, 8)))
    for name, buffer in model.named_buffers():
        assert buffer.data_ptr() == copied.get_buffer(name).data_ptr()
    assert int(model.bn.num_batches_tracked) == 1
    assert copied(images((8, 1, 8, 8))).dtype == torch.float32


def test_only_a_bf16_attack_multiplies_in_bf16():
    def products(view: nn.Module) -> set[str]:
        return {module.products for module in view.modules() if isinstance(module, Conv3x3)}

    model, bf16 = small_model(), Precision(attack=torch.bfloat16)
    models = WorkingModels(model, bf16)
    assert products(models.attack) == {"bf16"}
    assert products(models.ascent) == products(models.descent) == products(models.all[0]) == {"fp32"}
    assert products(WorkingModels(model, Precision(attack=torch.float16)).attack) == {"fp32"}
    assert products(WorkingModels(model, bf16, shared_ascent=True).attack) == {"fp32"}


def test_a_frozen_view_follows_its_model():
    model = small_model()
    view = frozen_view(model)
    with torch.no_grad():
        model.conv1.weight.mul_(2)
    x = images((8, 1, 8, 8))
    assert torch.equal(view.eval()(x), model.eval()(x))
    assert not any(p.requires_grad for p in view.parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["at", "trades"])
def test_a_step_in_fp16_goes_where_the_fp32_step_goes(method):
    """From trained weights a batch's step differs by 5% to 18% of its length in fp16, 10% to 23% by bf16 attacks.

    16 bits flip the sign of the smallest image gradients, and with them pixels of x'.
    """
    model, split = copy.deepcopy(robust_model()), digits().test
    model = copy.deepcopy(model).train()
    x, y, ids = split.images[:64].float().div(255), split.labels[:64], torch.arange(64)
    moved = []
    for precision in (Precision(), HALF, Precision(attack=torch.bfloat16)):
        own = copy.deepcopy(model)
        result = build_step(own, precision, method=method)(x, y, sample_ids=ids, seed=0)
        assert not result.skipped
        moved.append(own)
    length = distance(model, moved[0])
    assert length > 0
    assert distance(moved[1], moved[0]) < 0.3 * length
    assert distance(moved[2], moved[0]) < 0.4 * length


def test_the_step_leaves_working_copies_at_the_rounded_masters():
    """After each step, in every precision that a copy can have; the masters are what the optimizer made them."""
    for precision in (HALF, Precision(attack=torch.bfloat16), Precision(ascent=torch.float16, attack=torch.bfloat16)):
        model = small_model()
        step = build_step(model, precision)
        for index in range(3):
            x, y, ids = batch(index)
            step(x, y, sample_ids=ids, seed=index)
            assert len(step.models.all) in (1, 2)
            for copied in step.models.all:
                for master, p in zip(model.parameters(), copied.parameters(), strict=True):
                    assert torch.equal(p, master.to(p.dtype))


@pytest.mark.parametrize("where", ["ascent", "descent"])
def test_an_overflow_leaves_the_step_out_and_halves_the_scale(where):
    model = small_model()
    step = build_step(model, HALF)
    x, y, ids = batch(0)
    step(x, y, sample_ids=ids, seed=0)
    before, momentum = (
        copy.deepcopy(model.state_dict()),
        [step.optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()],
    )
    passes = 0

    def overflow(gradient):
        nonlocal passes
        passes += 1
        return gradient * torch.inf if passes == {"ascent": 1, "descent": 2}[where] else gradient

    handle = step.models.descent.linear.weight.register_hook(overflow)
    result = step(x, y, sample_ids=ids, seed=1)
    handle.remove()
    assert result.skipped
    assert float(step.passes.loss_scale.value) == 2.0**14
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for p, saved in zip(model.parameters(), momentum, strict=True):
        assert torch.equal(step.optimizer.state[p]["momentum_buffer"], saved)
    for master, p in zip(model.parameters(), step.models.descent.parameters(), strict=True):
        assert torch.equal(p, master.to(p.dtype))


def test_an_exception_leaves_masters_and_copies_alone():
    model = small_model()
    step = build_step(model, HALF)
    before = copy.deepcopy(model.state_dict())
    calls = 0

    def interrupt(module, inputs, output):
        nonlocal calls
        calls += 1
        if calls == 2:  # after the ascent, the descent
            raise KeyboardInterrupt

    handle = step.models.descent.register_forward_hook(interrupt)
    x, y, ids = batch(0)
    with pytest.raises(KeyboardInterrupt):
        step(x, y, sample_ids=ids, seed=0)
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for master, p in zip(model.parameters(), step.models.descent.parameters(), strict=True):
        assert torch.equal(p, master.to(p.dtype))


def test_the_loss_scale_does_not_move_the_step():
    """Powers of two change nothing but the range, which fp16 gradients of this model do not leave."""
    results = []
    for scale in (2.0**8, 2.0**12):
        model = small_model()
        step = build_step(model, Precision(ascent=torch.float16, descent=torch.float16))
        step.passes.loss_scale.value.fill_(scale)
        x, y, ids = batch(3)
        step(x, y, sample_ids=ids, seed=0)
        results.append(model)
    length = distance(small_model(), results[0])
    assert distance(results[1], results[0]) < 0.02 * length


def test_the_loss_scale_resumes():
    scale = LossScale(torch.device("cpu"))
    for _ in range(2):
        scale.update_(torch.tensor(True))
    scale.update_(torch.tensor(False))
    other = LossScale(torch.device("cpu"))
    other.load({name: value.clone() for name, value in scale.state().items()})
    assert float(other.value) == 2.0**13
    assert int(other.growth) == 1
    for _ in range(1999):
        scale.update_(torch.tensor(False))
        other.update_(torch.tensor(False))
    assert float(other.value) == float(scale.value) == 2.0**14


@pytest.mark.parametrize("precision", [Precision(), Precision(attack=torch.bfloat16), HALF])
def test_shared_ascent_in_every_precision(precision):
    if precision.attack == torch.bfloat16:
        precision = Precision()  # `choose_precision` takes the ascent's for both
    model = small_model()
    step = build_step(model, precision, ascent="shared")
    x, y, ids = batch(1)
    before = copy.deepcopy(model)
    assert not step(x, y, sample_ids=ids, seed=0).skipped
    assert distance(model, before) > 0


def test_rwp_in_fp16_adds_its_passes_up():
    model = small_model()
    step = build_step(model, HALF, ascent_steps=3, c_min=5.0, scope="global")
    x, y, ids = batch(1)
    calls = []
    step.models.descent.register_forward_hook(lambda *_: calls.append(1))
    assert not step(x, y, sample_ids=ids, seed=0).skipped
    assert len(calls) == 3 + 1
    for master, p in zip(model.parameters(), step.models.descent.parameters(), strict=True):
        assert torch.equal(p, master.to(p.dtype))


@pytest.mark.parametrize("precision", [Precision(), HALF], ids=["fp32", "fp16"])
def test_norms_known_from_the_update_change_no_bit_of_the_next_step(precision):
    results = []
    for forget in (False, True):
        model = small_model()
        step = build_step(model, precision)
        for index in range(3):
            x, y, ids = batch(index)
            step(x, y, sample_ids=ids, seed=index)
            norms = torch.stack([p.detach().double().norm() for p in step.awp.parameters.values()])
            torch.testing.assert_close(step.awp.weight_norms, norms, rtol=1e-12, atol=0)
            if forget:
                step.awp.weight_norms = None
        results.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(r.values() for r in results), strict=True))


@pytest.mark.compile
def test_a_compiled_step_gives_the_same_numbers_and_a_short_batch_compiles_nothing():
    models = []
    for compiled in (False, True):
        model = small_model()
        step = build_step(model, Precision())
        step = make_step(
            model,
            optimizer=step.optimizer,
            objective=step.passes.objective,
            attack=ATTACK,
            awp=step.awp,
            models=step.models,
            compile=compiled,
        )
        for index in range(2):
            x, y, ids = batch(index)
            step(x, y, sample_ids=ids, seed=index)
        if compiled:
            torch._dynamo.config.error_on_recompile = True
        try:
            x, y, ids = batch(2, n=5)
            step(x, y, sample_ids=ids, seed=2)
            step(*batch(3)[:2], sample_ids=ids.new_tensor(range(16)), seed=3)
        finally:
            torch._dynamo.config.error_on_recompile = False
        models.append(model)
    assert distance(models[1], models[0]) < 1e-3 * distance(small_model(), models[0])

"""Training on 2 and 4 ranks gives what one rank gives, up to the order of sums."""

import dataclasses
import functools
import os
import tempfile

import numpy as np
import pytest
import torch
from ranks import run_ranks
from steps import as_teacher, build_step
from torch import Tensor

from awp_engine.config import (
    AttackConfig,
    AverageConfig,
    AwpConfig,
    Config,
    DataConfig,
    DistributedConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
)
from awp_engine.data import Augmentation, Batches, Split, batch_sizes
from awp_engine.data.loaders import choose
from awp_engine.distributed.ranks import Ranks
from awp_engine.distributed.sharding import gather
from awp_engine.models import build_model
from awp_engine.models.batch_norm import set_momentum
from awp_engine.models.views import add_auxiliary_
from awp_engine.optim.average import WeightAverage
from awp_engine.optim.optimizer import set_learning_rate
from awp_engine.step.precision import Precision
from awp_engine.train.schedule import Schedule
from awp_engine.train.setup import Setup, distribute_, objective_of, training_attack

EVAL_ATTACK = AttackConfig(steps=2, bn_mode="eval", epsilon="0.2", step_size="0.1")
BASE = Config(
    # 26 images in batches of 12: the last one of 2 is smaller than 4 ranks, the others are not divisible by 8
    global_batch_size=12,
    attack=EVAL_ATTACK,
    awp=AwpConfig(gamma=0.01),
    optimizer=OptimizerConfig(lr=0.05),
    distributed=DistributedConfig(sync_batch_norm=True),
    precision=PrecisionConfig(attack="fp32", ascent="fp32", descent="fp32"),
)
SHARDED = DistributedConfig(strategy="fsdp", sync_batch_norm=True)
TEACHER = AverageConfig(kind="ema", decay=0.9, ramp=False, statistics="averaged")
VIEWS = DataConfig(policy="autoaugment-cifar10", pad=1)
CASES: dict[str, Config] = {
    "at": BASE,
    "uneven shares": dataclasses.replace(BASE, global_batch_size=11),
    "trades": dataclasses.replace(BASE, method="trades"),
    "mart": dataclasses.replace(BASE, method="mart"),
    "ikl": dataclasses.replace(BASE, method="ikl", method_args=("attack_beta=1",)),
    "gkl": dataclasses.replace(BASE, method="gkl", method_args=("gamma=0.4", "temperature=1")),
    "gkl, micro-batches, frozen statistics": dataclasses.replace(
        BASE, method="gkl", method_args=("gamma=0.4",), distributed=DistributedConfig(), micro_batch_size=2
    ),
    "ikl, two views": dataclasses.replace(BASE, method="ikl", method_args=("aug_weight=0.3",), data=VIEWS),
    "gkl, two views, micro-batches, frozen statistics": dataclasses.replace(
        BASE,
        method="gkl",
        method_args=("gamma=0.4", "attack_beta=1", "aug_weight=0.5"),
        data=VIEWS,
        distributed=DistributedConfig(),
        micro_batch_size=2,
    ),
    "shards, gkl": dataclasses.replace(BASE, method="gkl", method_args=("gamma=0.4",), distributed=SHARDED),
    "clipped, nesterov": dataclasses.replace(BASE, optimizer=OptimizerConfig(lr=0.05, nesterov=True, clip_norm=0.1)),
    "cutmix": dataclasses.replace(BASE, data=DataConfig(cutmix=0.8, pad=1, flip=True)),
    "extra": dataclasses.replace(BASE, data=DataConfig(extra_fraction=0.4, pad=1)),
    "filled epochs, statistics of the first step": dataclasses.replace(
        BASE,
        method="rst",
        data=DataConfig(extra_fraction=0.4, extra_replacement=True, epoch_images=36, extra_alone=1, pad=1),
        model=ModelConfig(bn_momentum=0.01),
        optimizer=OptimizerConfig(lr=0.05, nesterov=True, decay_norms=False),
    ),
    "shared ascent": dataclasses.replace(BASE, awp=AwpConfig(gamma=0.01, ascent="shared")),
    "rwp": dataclasses.replace(BASE, awp=AwpConfig(gamma=0.01, ascent_steps=3, c_min=2.4, scope="global")),
    "sam": dataclasses.replace(BASE, awp=AwpConfig(gamma=0.05, scope="global", scale="absolute")),
    "free": dataclasses.replace(BASE, attack=dataclasses.replace(EVAL_ATTACK, fast="free"), awp=AwpConfig(gamma=0.0)),
    "dajat": dataclasses.replace(BASE, method="dajat", data=VIEWS, average=TEACHER),
    "dajat, micro-batches, frozen statistics": dataclasses.replace(
        BASE, method="dajat", data=VIEWS, distributed=DistributedConfig(), micro_batch_size=2
    ),
    "average": dataclasses.replace(BASE, average=AverageConfig(kind="ema", decay=0.9)),
    "adr": dataclasses.replace(BASE, method="adr", average=TEACHER, awp=AwpConfig(gamma=0.01, layers=("*",))),
    "rebat, micro-batches, frozen statistics": dataclasses.replace(
        BASE,
        method="rebat",
        average=dataclasses.replace(TEACHER, statistics="live"),
        distributed=DistributedConfig(),
        micro_batch_size=2,
    ),
    "rebat, stronger attack": dataclasses.replace(
        BASE,
        method="rebat",
        average=TEACHER,
        attack=dataclasses.replace(EVAL_ATTACK, stronger_after=1, stronger_epsilon="0.3", stronger_steps=3),
    ),
    "liet": dataclasses.replace(BASE, method="liet", beta=100.0, label_smoothing=0.6, method_args=("every=2",)),
    "adaad": dataclasses.replace(BASE, method="adaad", beta=0.1, method_args=("alpha=0.7",)),
    "hat, micro-batches, frozen statistics": dataclasses.replace(
        BASE, method="hat", distributed=DistributedConfig(), micro_batch_size=2
    ),
    # 23 images, then 3
    "lbgat, uneven shares, clipped": dataclasses.replace(
        BASE, method="lbgat", global_batch_size=23, optimizer=OptimizerConfig(lr=0.05, clip_norm=0.1, decay_norms=False)
    ),
    "lbgat, micro-batches, frozen statistics": dataclasses.replace(
        BASE, method="lbgat", distributed=DistributedConfig(), micro_batch_size=2
    ),
    # its first and its last part
    "oaat": dataclasses.replace(BASE, method="oaat", epochs=2),
    "oaat, micro-batches, frozen statistics": dataclasses.replace(
        BASE, method="oaat", epochs=2, distributed=DistributedConfig(), micro_batch_size=2
    ),
    "e-at": dataclasses.replace(
        BASE, method="e-at", attack=dataclasses.replace(EVAL_ATTACK, kind="apgd", start="none", also=("l1=2",))
    ),
    "msd, micro-batches, frozen statistics": dataclasses.replace(
        BASE,
        method="msd",
        attack=dataclasses.replace(EVAL_ATTACK, start="none", also=("l2=1", "l1=2")),
        distributed=DistributedConfig(),
        micro_batch_size=2,
    ),
    "frozen statistics": dataclasses.replace(BASE, distributed=DistributedConfig()),
    "micro-batches, frozen statistics": dataclasses.replace(BASE, distributed=DistributedConfig(), micro_batch_size=2),
    "micro-batches, shared ascent, frozen statistics": dataclasses.replace(
        BASE, distributed=DistributedConfig(), micro_batch_size=2, awp=AwpConfig(gamma=0.01, ascent="shared")
    ),
    "class weights": dataclasses.replace(
        BASE, distributed=DistributedConfig(), micro_batch_size=2, data=DataConfig(class_weights="balanced")
    ),
    "shards": dataclasses.replace(BASE, distributed=SHARDED),
    "shards, trades, clipped": dataclasses.replace(
        BASE, distributed=SHARDED, method="trades", optimizer=OptimizerConfig(lr=0.05, clip_norm=0.1)
    ),
    "shards, adr-trades": dataclasses.replace(BASE, distributed=SHARDED, method="adr-trades", average=TEACHER),
    "shards, liet": dataclasses.replace(BASE, distributed=SHARDED, method="liet"),
    "shards, rwp": dataclasses.replace(
        BASE, distributed=SHARDED, awp=AwpConfig(gamma=0.01, ascent_steps=3, c_min=2.4, scope="global")
    ),
    "shards, micro-batches, frozen statistics": dataclasses.replace(
        BASE, distributed=DistributedConfig(strategy="fsdp"), micro_batch_size=2
    ),
}


def samples(count: int, first_id: int = 0) -> Split:
    rng = np.random.default_rng(first_id)
    images = torch.from_numpy(rng.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 10, count))
    return Split(images=images, labels=labels, ids=torch.arange(first_id, first_id + count))


def trained(config: Config, ranks: Ranks, *, dtype: torch.dtype = torch.float64, epochs: int = 2) -> dict[str, Tensor]:
    """All that six steps leave: parameters, statistics, momentum, average, losses."""
    torch.manual_seed(0)
    model = build_model("preact-resnet-digits", num_classes=10, mean=(0.3,), std=(0.4,), width=4).to(dtype).train()
    frozen = not config.distributed.sync_batch_norm
    if frozen:
        model.eval()
    weights = torch.linspace(0.2, 3, 10, dtype=dtype) if config.data.class_weights != "none" else None
    objective = objective_of(config, torch.device("cpu"), 10, (1, 8, 8))
    views = objective.views
    if views > 1 and not objective.joint_views:
        add_auxiliary_(model)
    partner = None
    if objective.partner_name is not None:
        partner = build_model("preact-resnet-digits", 10, (0.4,), (0.5,), width=3).to(dtype).train(not frozen)
    objective.partner = partner
    step = build_step(config, model, ranks, weights, objective)
    average = None
    if config.average.kind == "ema":
        # shards cannot be copied
        twin = (
            build_model("preact-resnet-digits", 10, (0.3,), (0.4,), width=4).to(dtype) if step.models.sharded else None
        )
        if twin is not None:
            distribute_(config, twin, ranks, Precision())
        average = WeightAverage(model, config.average, 1, twin=twin)
        average.follow(step.optimizer)
        step.step.update.average, step.passes.objective.average = average, average.model
    if step.passes.objective.uses_teacher:
        torch.manual_seed(1)
        teacher = build_model("preact-resnet-digits", 10, (0.4,), (0.5,), width=3)
        step.passes.objective.teacher = as_teacher(teacher.to(dtype))
    split, extra = samples(26), samples(40, 1000) if config.data.extra_fraction != 0.5 else None
    sizes = batch_sizes(26, config.global_batch_size, None if extra is None else config.data.extra_fraction)
    if config.data.epoch_images is not None:
        sizes = [config.global_batch_size] * (config.data.epoch_images // config.global_batch_size)
    if config.model.bn_momentum is not None:
        set_momentum(model, config.model.bn_momentum)
    augmentation = Augmentation(pad=config.data.pad, flip=config.data.flip, cutmix=config.data.cutmix, num_classes=10)
    batches = Batches(
        split,
        augmentation,
        views=[augmentation] * (views - 1),
        global_batch_size=config.global_batch_size,
        seed=3,
        extra=extra,
        extra_fraction=config.data.extra_fraction,
        extra_replacement=config.data.extra_replacement,
        extra_alone=config.data.extra_alone,
        epoch_images=config.data.epoch_images,
        rank=ranks.rank,
        ranks=ranks.world,
    )
    attack = training_attack(config.attack)
    schedule = Schedule(config=config, steps=len(sizes), attack=attack, cheap=attack)
    losses = []
    for epoch in range(1, epochs + 1):
        for number, (batch, size) in enumerate(zip(batches.epoch(epoch), sizes, strict=True)):
            set_learning_rate(step.optimizer, 0.05)
            x, labels = batch.images.to(dtype), batch.labels
            if labels.is_floating_point():
                labels = labels.to(dtype)
            if config.attack.fast == "free":
                result = step.free(x, labels, torch.zeros_like(x), of=size)
            else:
                whole = config.model.bn_momentum is not None and not losses
                attack = schedule.full_attack(epoch)
                fields = {"epoch": epoch, "step": number, "whole_statistics": whole, "attack": attack}
                result = step(x, labels, sample_ids=batch.ids, seed=epoch, of=size, **fields)
            numbers = torch.stack([result.loss, result.correct, result.zero_gradients]).double()
            ranks.sum_([numbers])
            losses.append(numbers)
    trained = [*model.parameters(), *([] if partner is None else partner.parameters())]
    buffers = enumerate(step.optimizer.state[p]["momentum_buffer"] for p in trained)
    momentum = {f"momentum.{i}": buffer for i, buffer in buffers}
    averaged = {} if average is None else {f"average.{n}": t for n, t in average.state().items()}
    # .clone(): statistics are views of one tensor
    method = step.passes.objective.state()
    beside = {} if partner is None else {f"partner.{name}": t for name, t in partner.state_dict().items()}
    found = {**model.state_dict(), **momentum, **averaged, **method, **beside, "numbers": torch.stack(losses)}
    if step.models.sharded:
        return gather(found, every_rank=True)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def trained_on_rank(rank: int, world: int, cases: dict[str, Config]) -> dict[str, dict[str, Tensor]]:
    return {name: trained(config, Ranks(rank=rank, world=world)) for name, config in cases.items()}


# what depends on the number of ranks: shares that differ, batches of fewer images, several all-reduces, shards
ON_FOUR = ["at", "uneven shares", "extra", "rwp", "gkl", "micro-batches, frozen statistics", "shards, trades, clipped"]
ON_FOUR.append("lbgat, uneven shares, clipped")


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    whole = DistributedConfig(sync_batch_norm=CASES[name].distributed.sync_batch_norm)
    return trained(dataclasses.replace(CASES[name], distributed=whole), Ranks())


@pytest.mark.parametrize(
    ("world", "names"),
    [(2, list(CASES)), (4, ON_FOUR), pytest.param(4, list(CASES), marks=pytest.mark.long, id="4-all")],
)
def test_ranks_train_what_one_rank_trains(world: int, names: list[str]) -> None:
    """fp64, synchronised or frozen statistics: within 1e-9 after six steps, and equal to the bit among themselves."""
    results = run_ranks(trained_on_rank, world, {name: CASES[name] for name in names}, timeout=250)
    worst: dict[str, float] = {}
    for name in names:
        for other in results[1:]:
            assert all(torch.equal(other[name][key], value) for key, value in results[0][name].items()), name
        expected, found = alone(name), results[0][name]
        assert found.keys() == expected.keys()
        worst[name] = max(float((found[key].double() - value.double()).abs().max()) for key, value in expected.items())
    print({name: f"{value:.1e}" for name, value in worst.items()})
    assert max(worst.values()) < 1e-9, worst


def _written_by_torch(rank, world):
    """What goes to the file of stderr in two steps of DAJAT: warnings of torch's C++ pass all of Python by."""
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        trained(CASES["dajat"], Ranks(rank=rank, world=world), epochs=1)
        file.seek(0)
        return file.read().decode()


def test_views_make_torch_warn_of_nothing():
    """Neither of parameters that a pass leaves out, nor of a search for them that finds none."""
    assert not any("unused" in written for written in run_ranks(_written_by_torch, 2))


def _another_loader(rank, world):
    """The second rank has less memory, as where the first one has read its images already."""
    choose.free_memory = lambda device: [2**20, 8][rank]
    data = DataConfig(loader="auto", pad=0, train_limit=20)
    config = Config(device="cpu", data=data, model=ModelConfig(width=2))
    return Setup(config, Ranks(rank=rank, world=world)).data.loader


def test_all_ranks_come_to_one_loader(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_ranks(_another_loader, 2) == ["torch", "torch"]

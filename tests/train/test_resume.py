"""Going on from any step, on any number of ranks, ends where an undisturbed run ends."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from awp_engine import checkpoint
from awp_engine.checkpoint import CheckpointError
from awp_engine.config import (
    AttackConfig,
    AverageConfig,
    AwpConfig,
    Config,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    load_config,
)
from awp_engine.distributed.ranks import Ranks
from awp_engine.distributed.signals import StoppedError, StopRequest
from awp_engine.observe.regions import listening
from awp_engine.train.trainer import Trainer

AWP_EMA = Config(
    device="cpu",
    epochs=1,
    global_batch_size=5,
    data=DataConfig(pad=1, train_limit=100),
    model=ModelConfig(width=2),
    attack=AttackConfig(steps=2),
    awp=AwpConfig(gamma=0.005, max_rise=0.25),
    average=AverageConfig(kind="ema", bn_images=10),
    evaluation=EvaluationConfig(steps=1, held_out_limit=8, test_limit=8),
    keep_checkpoints=100,
    checkpoint_steps=1,
)
FREE_SWA = dataclasses.replace(
    AWP_EMA,
    epochs=2,
    global_batch_size=10,
    attack=AttackConfig(fast="free", replays=2),
    awp=AwpConfig(gamma=0.0),
    average=AverageConfig(kind="swa", start=0.0, bn_images=10),
)
# what classes were answered in the epoch before, and in this one so far
GKL_EPOCHS = dataclasses.replace(
    AWP_EMA,
    epochs=2,
    global_batch_size=10,
    method="gkl",
    method_args=("gamma=0.4", "attack_beta=1"),
    attack=AttackConfig(steps=2, ramp="linear"),
    average=AverageConfig(kind="epochs", decay=0.9, statistics="averaged"),
)
# with a second view, and the limit on the rise that its losses tell
GKL_VIEWS = dataclasses.replace(
    GKL_EPOCHS,
    method_args=("gamma=0.4", "attack_beta=1", "aug_weight=0.5"),
    data=DataConfig(policy="autoaugment-cifar10", pad=1, train_limit=100),
)

WANG = dataclasses.replace(
    AWP_EMA,
    epochs=2,
    method="rst",
    data=DataConfig(pad=1, train_limit=100, extra_fraction=0.7, extra_replacement=True, epoch_images=50, extra_alone=1),
    model=ModelConfig(width=2, bn_momentum=0.01),
    average=AverageConfig(kind="ema", warmup=0.5, statistics="live"),
    evaluation=dataclasses.replace(AWP_EMA.evaluation, loss="margin"),
    optimizer=OptimizerConfig(
        schedule="one-cycle-cosine", warmup=1.5, cycle_momentum=True, nesterov=True, decay_norms=False
    ),
)

ADR = dataclasses.replace(
    AWP_EMA,
    method="adr",
    method_args=("tau=2.5,1.5",),
    average=AverageConfig(kind="ema", decay=0.9, ramp=False, warmup=0.3, statistics="averaged"),
)
# two sets of batch normalisation, of the model and of an average that has not begun in the first epoch
DAJAT = dataclasses.replace(
    AWP_EMA,
    epochs=2,
    global_batch_size=10,
    method="dajat",
    method_args=("views=2",),
    data=DataConfig(policy="autoaugment-cifar10", policy_first=True, pad=1, train_limit=100),
    attack=AttackConfig(steps=2, bn_mode="eval", ramp="linear"),
    awp=AwpConfig(gamma=0.005),
    average=AverageConfig(kind="epochs", decay=0.9, statistics="averaged"),
)

# a larger ball, and the average in the loss, from the second epoch on
REBAT_PP = dataclasses.replace(
    AWP_EMA,
    epochs=2,
    global_batch_size=10,
    method="rebat",
    attack=AttackConfig(steps=2, stronger_after=1, stronger_epsilon="0.25", stronger_steps=3),
    awp=AwpConfig(gamma=0.005),
    average=AverageConfig(kind="ema", decay=0.9, ramp=False, warmup=1.0, statistics="averaged"),
)

LIET = dataclasses.replace(
    AWP_EMA,
    global_batch_size=20,
    method="liet",
    label_smoothing=0.6,
    method_args=("every=3",),
    attack=AttackConfig(epsilon="0.1", step_size="0.1", steps=1),
    optimizer=OptimizerConfig(schedule="cosine", warmup=0.5, warmup_lr=0.01, min_lr=0.001, no_decay=("*bn*",)),
    average=AverageConfig(kind="ema", decay=0.9, bn_images=10),
)

# a second network and its momentum; whose statistics the average's do not move
LBGAT = dataclasses.replace(
    AWP_EMA, global_batch_size=20, method="lbgat", attack=AttackConfig(steps=2, bn_mode="eval", start="normal")
)

# an average, what it was when the epoch began, in two precisions; momentum that is forgotten before the second epoch
OAAT = dataclasses.replace(
    AWP_EMA,
    epochs=2,
    global_batch_size=20,
    method="oaat",
    attack=AttackConfig(steps=2),
    awp=AwpConfig(gamma=0.005),
    average=AverageConfig(kind="ema", statistics="averaged"),
    precision=PrecisionConfig(attack="bf16"),
)

# each step draws its ball by what all steps before have counted
E_AT = dataclasses.replace(
    AWP_EMA,
    method="e-at",
    attack=AttackConfig(kind="apgd", steps=2, start="none", also=("l1=2",)),
)


def on(rank: int, world: int) -> Ranks:
    return Ranks(rank=rank, world=world, local_rank=rank)


def left(run_dir: Path, epochs: int) -> dict[str, Any]:
    """All that a run's last checkpoint and its exported model hold, but for the time it took."""
    folder = run_dir / "checkpoints" / f"epoch-{epochs}"
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    model = load_file(run_dir / "model.safetensors")
    # safetensors writes its metadata in any order
    files["exported"] = {name: tensor.numpy().tobytes() for name, tensor in sorted(model.items())}
    state = json.loads((folder / "state.json").read_text())
    files["state"] = {name: value for name, value in state.items() if name not in ("seconds", "ranks")}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second", "tflops", "share_of_matmul", "memory_gb")
    files["metrics"] = [{k: v for k, v in line.items() if k not in timed} for line in lines]
    return files


def resumed_everywhere(rank: int, world: int, directory: Path, config: Config, every: int) -> tuple[int, list[str]]:
    """How many resumed runs were compared, and those that ended elsewhere."""
    whole = directory / "whole"
    Trainer(dataclasses.replace(config, run_dir=whole), on(rank, world)).run()
    expected = left(whole, config.epochs) if rank == 0 else {}
    names = sorted(path.name for path in (whole / "checkpoints").iterdir() if path.is_dir())
    names = names[::every]
    wrong = []
    for name in names:
        run_dir = directory / name
        if rank == 0:
            (run_dir / "checkpoints").mkdir(parents=True)
            shutil.copytree(whole / "checkpoints" / name, run_dir / "checkpoints" / name)
            (run_dir / "checkpoints" / "latest").write_text(name + "\n")
            for file in ("config.json", "metrics.jsonl"):
                shutil.copy(whole / file, run_dir / file)
        Trainer(dataclasses.replace(config, run_dir=run_dir), on(rank, world)).run()
        if rank == 0 and left(run_dir, config.epochs) != expected:
            wrong.append(name)
        if rank == 0:
            shutil.rmtree(run_dir)
    return len(names), wrong


CASES = [
    pytest.param(AWP_EMA, 1, 5, id="1 rank, 1 epoch"),
    pytest.param(FREE_SWA, 1, 10, id="1 rank, 2 epochs"),
    pytest.param(GKL_EPOCHS, 1, 10, id="1 rank, GKL, 2 epochs"),
    pytest.param(GKL_VIEWS, 1, 10, id="1 rank, GKL, two views"),
    pytest.param(WANG, 1, 10, id="1 rank, generated images"),
    pytest.param(ADR, 1, 10, id="1 rank, teacher"),
    pytest.param(REBAT_PP, 1, 10, id="1 rank, stronger attack"),
    pytest.param(DAJAT, 1, 5, id="1 rank, views, 2 epochs", marks=pytest.mark.long),
    pytest.param(LIET, 1, 3, id="1 rank, table of classes"),
    pytest.param(E_AT, 1, 20, id="1 rank, several norms"),
    pytest.param(LBGAT, 1, 2, id="1 rank, partner"),
    pytest.param(OAAT, 1, 3, id="1 rank, copies of the model"),
    pytest.param(LBGAT, 2, 5, id="2 ranks, partner"),
    pytest.param(AWP_EMA, 2, 10, id="2 ranks, 1 epoch"),
    pytest.param(GKL_EPOCHS, 2, 10, id="2 ranks, GKL, 2 epochs", marks=pytest.mark.long),
    pytest.param(DAJAT, 2, 5, id="2 ranks, views, 2 epochs", marks=pytest.mark.long),
    pytest.param(FREE_SWA, 2, 10, id="2 ranks, 2 epochs", marks=pytest.mark.long),
    *(
        pytest.param(config, world, 1, id=f"every step, {world} rank, {config.epochs} epoch", marks=pytest.mark.long)
        for config in (AWP_EMA, FREE_SWA)
        for world in (1, 2)
    ),
    pytest.param(
        dataclasses.replace(AWP_EMA, distributed=DistributedConfig(strategy="fsdp")), 2, 10, id="2 ranks, shards"
    ),
    pytest.param(
        dataclasses.replace(ADR, distributed=DistributedConfig(strategy="fsdp")),
        2,
        10,
        id="2 ranks, shards, teacher",
        marks=pytest.mark.long,
    ),
    pytest.param(AWP_EMA, 4, 4, id="4 ranks", marks=pytest.mark.long),
    pytest.param(
        dataclasses.replace(AWP_EMA, device="cuda", deterministic=True, cuda_graphs=False),
        1,
        5,
        id="cuda",
        marks=pytest.mark.gpu,
    ),
    pytest.param(
        dataclasses.replace(AWP_EMA, device="cuda", deterministic=True),
        1,
        5,
        id="cuda graphs",
        marks=pytest.mark.gpu,
    ),
]


@pytest.mark.parametrize(("config", "world", "every"), CASES)
def test_resume_at_a_step_ends_bit_equal(tmp_path, config, world, every) -> None:
    """Weights, momentum, average, sums, metrics and selection: no bit differs."""
    if config.method == "rst":
        images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), dtype=np.uint8)
        np.savez(tmp_path / "extra.npz", image=images, label=np.arange(30) % 10)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, extra=tmp_path / "extra.npz"))
    if world == 1:
        compared, wrong = resumed_everywhere(0, 1, tmp_path, config, every)
    else:
        compared, wrong = run_ranks(resumed_everywhere, world, tmp_path, config, every, timeout=270)[0]
    print(f"{compared - len(wrong)}/{compared} bit-equal")
    steps = config.epochs * (config.data.epoch_images or 100) // config.global_batch_size
    assert compared == -(-steps // every)
    assert not wrong


def test_the_same_seed_gives_the_same_100_losses(tmp_path) -> None:
    """And all else that a run leaves, the epochs' sums of losses among it."""
    config = dataclasses.replace(AWP_EMA, epochs=5, checkpoint_steps=None)
    for name in ("a", "b"):
        Trainer(dataclasses.replace(config, run_dir=tmp_path / name)).run()
    assert left(tmp_path / "a", 5) == left(tmp_path / "b", 5)
    assert len({line["loss"] for line in left(tmp_path / "a", 5)["metrics"]}) == 5


def trained(rank: int, world: int, config: Config) -> None:
    Trainer(config, on(rank, world)).run()


def test_another_number_of_ranks_goes_on(tmp_path) -> None:
    """The same samples; with statistics of the whole batch the same weights up to rounding."""
    config = dataclasses.replace(
        AWP_EMA,
        attack=AttackConfig(steps=2, bn_mode="eval"),
        distributed=DistributedConfig(sync_batch_norm=True),
        run_dir=tmp_path / "whole",
    )
    Trainer(config).run()
    expected = load_file(tmp_path / "whole" / "checkpoints" / "epoch-1" / "model.safetensors")
    world = 3
    run_dir = tmp_path / f"{world} ranks"
    (run_dir / "checkpoints").mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "epoch-0.step-13", run_dir / "checkpoints" / "epoch-0.step-13")
    shutil.copy(tmp_path / "whole" / "config.json", run_dir / "config.json")
    run_ranks(trained, world, dataclasses.replace(config, run_dir=run_dir), timeout=200)
    found = load_file(run_dir / "checkpoints" / "epoch-1" / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.01, atol=0.003, msg=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    Trainer(dataclasses.replace(AWP_EMA, run_dir=run_dir, checkpoint_steps=None, global_batch_size=50)).run()
    return run_dir


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors, state: tensors.pop("optimizer"), r"epoch-9: lacks what this run needs.*optimizer"),
        (lambda tensors, state: tensors["model"].pop("conv1.weight"), r"epoch-9: .*conv1.weight: expected a tensor"),
        (lambda tensors, state: state.pop("best_robust"), r"epoch-9: .*best_robust"),
        (lambda tensors, state: state.update(config_hash="0"), r"epoch-9: was not written by this run"),
    ],
)
def test_a_sound_checkpoint_of_something_else_is_refused(finished, tmp_path, spoil, message) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    config = dataclasses.replace(load_config(run_dir / "config.json"), run_dir=run_dir)
    folder = run_dir / "checkpoints"
    found = checkpoint.load(folder / "epoch-1")
    spoil(found.tensors, found.state)
    checkpoint.save(folder, "epoch-9", found.tensors, found.state, checkpoint.Retention())
    with pytest.raises(CheckpointError, match=message) as raised:
        Trainer(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(AWP_EMA, id="AWP"),
        # one batch an epoch, smaller than it could be, and the perturbation of all its images
        pytest.param(dataclasses.replace(FREE_SWA, global_batch_size=16, data=DataConfig(train_limit=12)), id="free"),
    ],
)
def test_a_run_stopped_in_an_evaluation_goes_on_from_there(tmp_path, config) -> None:
    evaluation = dataclasses.replace(config.evaluation, batch_size=2)
    config = dataclasses.replace(config, checkpoint_steps=None, evaluation=evaluation, run_dir=tmp_path / "whole")
    Trainer(config).run()
    expected = left(tmp_path / "whole", config.epochs)
    config, stop = dataclasses.replace(config, run_dir=tmp_path / "stopped"), StopRequest()

    def ask(part: str, begins: bool) -> None:
        if part == "evaluation" and begins:
            stop.reason = signal.SIGTERM

    with (
        listening(ask),
        pytest.raises(StoppedError, match=r"stopped by SIGTERM: .*epoch-0.step-\d+ is written") as told,
    ):
        Trainer(config, stop=stop).run()
    assert told.value.code == 75
    trained: list[str] = []
    with listening(lambda part, begins: trained.append(part)):
        Trainer(config).run()
    # the first epoch is not trained again
    assert trained[0] in ("evaluation", "average")
    assert left(tmp_path / "stopped", config.epochs) == expected

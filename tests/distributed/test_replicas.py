"""What keeps ranks equal, and what notices that they are not."""

import contextlib
import dataclasses
import json
import threading

import numpy as np
import pytest
import torch
from ranks import run_ranks
from steps import build_step, make_step
from test_distributed import BASE, samples
from torch import Tensor

from awp_engine.attack import Attack
from awp_engine.config import AttackConfig, AwpConfig, Config, ConfigError, DistributedConfig
from awp_engine.distributed.ranks import Ranks, tell_torchrun
from awp_engine.distributed.replicas import DivergenceError, check_replicas, checksums
from awp_engine.distributed.share import rank_share
from awp_engine.evaluation import evaluate
from awp_engine.models import build_model
from awp_engine.optim.optimizer import build_optimizer
from awp_engine.step.objectives import build_objective
from awp_engine.step.precision import Precision, WorkingModels
from awp_kernels import AdversarialWeightPerturbation

X = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 10


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model("preact-resnet-digits", num_classes=10, mean=(0.3,), std=(0.4,), width=4).to(dtype).train()


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def steps_on_rank(rank: int, world: int, config: Config, count: int) -> dict[str, Tensor]:
    model, ranks = network(), Ranks(rank=rank, world=world)
    step = build_step(config, model, ranks)
    rows, _ = ranks.share(len(X))
    for number in range(count):
        step(X[rows], Y[rows], sample_ids=torch.arange(12)[rows], seed=number, of=len(X))
    check_replicas(ranks, state(model), "the end")
    return state(model)


PLAIN = dataclasses.replace(BASE, attack=AttackConfig(steps=2), distributed=DistributedConfig())


@pytest.mark.parametrize("world", [2, 3])
def test_local_ascents_leave_replicas_equal(world: int) -> None:
    """Each rank moves its weights by its own images and back exactly; the trajectory is another one than globally."""
    local = run_ranks(
        steps_on_rank, world, dataclasses.replace(PLAIN, distributed=DistributedConfig(ascent_sync="local")), 3
    )
    together = run_ranks(steps_on_rank, world, PLAIN, 3)
    for results in (local, together):
        for other in results[1:]:
            assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items())
    assert not torch.equal(local[0]["conv1.weight"], together[0]["conv1.weight"])


def test_running_statistics_are_the_shares_mean() -> None:
    """Without synchronised statistics: what each rank's own images would have made of them, weighted by their part."""
    config = dataclasses.replace(PLAIN, awp=AwpConfig(gamma=0.0))
    results = run_ranks(steps_on_rank, 5, config, 1)
    alone, shares = [], []
    for rank in range(5):
        model = network()
        rows, share = rank_share(len(X), rank, 5)
        build_step(config, model)(X[rows], Y[rows], sample_ids=torch.arange(12)[rows], seed=0)
        alone.append(state(model))
        shares.append(share)
    assert len(set(shares)) == 2
    names = [name for name in alone[0] if "running" in name]
    for name in names:
        expected = sum(share * found[name] for share, found in zip(shares, alone, strict=True))
        torch.testing.assert_close(results[0][name], expected, rtol=1e-6, atol=1e-7)
    assert int(results[0]["layer1.0.bn1.num_batches_tracked"]) == 1


def skipped_on_rank(rank: int, world: int, part: str) -> list[tuple[bool, bool]]:
    """Five steps, of which the last rank has a NaN in the third; whether each was skipped, and weights stayed."""
    model, ranks = network(), Ranks(rank=rank, world=world)
    # of its own ascent the others hear through the gradients of its descent alone
    sync = DistributedConfig(ascent_sync="local" if part == "ascent" else "global")
    step = build_step(dataclasses.replace(PLAIN, distributed=sync), model, ranks)
    rows, _ = ranks.share(len(X))
    told = []
    for number in range(5):
        before = state(model)
        x, copy = X[rows].clone(), None
        if rank == world - 1 and number == 2:
            if part == "image":
                x[0, 0, 3, 3] = torch.nan
            else:
                parameter = model.get_parameter("linear.weight")
                spoiled = iter([torch.nan, 1.0 if part == "ascent" else torch.nan])
                copy = parameter.register_hook(lambda gradient: gradient * next(spoiled))  # noqa: B023
        result = step(x, Y[rows], sample_ids=torch.arange(12)[rows], seed=number, of=len(X))
        if copy is not None:
            copy.remove()
        same = all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
        told.append((bool(result.skipped), same))
        assert all(torch.isfinite(tensor).all() for tensor in state(model).values())
    check_replicas(ranks, state(model), "the end")
    return told


@pytest.mark.parametrize("part", ["image", "gradient", "ascent"])
def test_a_nan_on_one_rank_skips_the_step_on_all(part: str) -> None:
    """Weights, momentum and statistics stay as they were, on every rank, in that step alone."""
    for told in run_ranks(skipped_on_rank, 3, part):
        assert told == [(False, False), (False, False), (True, True), (False, False), (False, False)]


def diverging_rank(rank: int, world: int, bit: int) -> str:
    tensors = state(network())
    tensors["half"] = torch.arange(5, dtype=torch.float16)
    tensors["wide"] = torch.arange(5, dtype=torch.float64)
    ranks = Ranks(rank=rank, world=world)
    check_replicas(ranks, tensors, "step 3")
    if rank == 2:
        tensors["layer2.0.conv1.weight"].view(-1).view(torch.int32)[7] ^= 1 << bit
    try:
        check_replicas(ranks, tensors, "step 4")
    except DivergenceError as error:
        return str(error)
    return "nothing noticed"


def test_one_differing_bit_is_noticed_on_all_ranks() -> None:
    for message in run_ranks(diverging_rank, 3, 13):
        assert message.startswith(
            "step 4: the weights of rank 2 are not those of rank 0, first in layer2.0.conv1.weight (1 "
        )


def test_every_single_bit_changes_the_checksum() -> None:
    rng = np.random.default_rng(0)
    for dtype, integers in ((torch.float32, torch.int32), (torch.float16, torch.int16), (torch.float64, torch.int64)):
        tensor = torch.randn(100, dtype=dtype)
        before = checksums({"a": tensor})
        for place in rng.integers(0, 100, 5):
            for bit in range(torch.iinfo(integers).bits):
                flipped = tensor.clone()
                mask = torch.tensor(1 << bit if bit < torch.iinfo(integers).bits - 1 else torch.iinfo(integers).min)
                flipped.view(integers)[place] ^= mask.to(integers)
                assert not torch.equal(checksums({"a": flipped}), before)


def evaluated_on_rank(rank: int, world: int, count: int) -> tuple[float, float, int]:
    calls = 0

    def count_calls() -> None:
        nonlocal calls
        calls += 1

    attack = Attack(epsilon=0.2, step_size=0.1, steps=2, norm="linf")
    ranks = Ranks(rank=rank, world=world)
    found = evaluate(network().eval(), samples(count), attack, batch_size=4, ranks=ranks, between=count_calls)
    return found.clean, found.robust, calls


def counts_on_rank(rank: int, world: int, counts: list[int]) -> list[tuple[float, float, int]]:
    return [evaluated_on_rank(rank, world, count) for count in counts]


def test_evaluation_counts_every_image_once() -> None:
    """Splits that do not divide, or have fewer images than there are ranks."""
    counts = [1, 2, 3, 4, 13, 30]
    results = run_ranks(counts_on_rank, 3, counts)
    assert results[0] == results[1] == results[2]
    for count, (clean, robust, _) in zip(counts, results[0], strict=True):
        alone = evaluated_on_rank(0, 1, count)
        assert (clean, robust) == alone[:2]


def half_on_rank(rank: int, world: int) -> tuple[list[str], dict[str, Tensor]]:
    model, ranks = network(), Ranks(rank=rank, world=world)
    models = WorkingModels(model, Precision(ascent=torch.float16, descent=torch.float16))
    step = make_step(
        model,
        optimizer=build_optimizer(model, BASE.optimizer, working=models.updated),
        objective=build_objective("at", beta=0.0, label_smoothing=0.0),
        attack=AttackConfig(steps=1),
        awp=AdversarialWeightPerturbation(model, 0.01, working=models.working),
        models=models,
        ranks=ranks,
    )
    (reducer,) = step.passes._reducers.values()
    travelled: list[str] = []

    def hook(_, bucket):
        travelled.extend([str(bucket.buffer().dtype)] * bucket.buffer().numel())
        return (
            torch.distributed.all_reduce(bucket.buffer().div_(world), async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    reducer.register_comm_hook(None, hook)
    rows, _ = ranks.share(len(X))
    for number in range(2):
        step(X[rows], Y[rows], sample_ids=torch.arange(12)[rows], seed=number, of=len(X))
    check_replicas(ranks, state(model), "the end")
    return travelled, state(model)


def test_gradients_travel_in_16_bits_where_training_does() -> None:
    """All but those of normalisation and biases, which stay in full precision; replicas stay equal."""
    (travelled, first), (_, second) = run_ranks(half_on_rank, 2)
    assert travelled.count("torch.float16") > 20 * travelled.count("torch.float32")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not torch.equal(first["conv1.weight"], network().state_dict()["conv1.weight"])


def told_on_rank(rank: int, world: int) -> list[object]:
    ranks, device = Ranks(rank=rank, world=world), torch.device("cpu")
    told: list[object] = [ranks.any(rank == 1, device), ranks.any(False, device)]
    told.append(ranks.broadcast_json({"ü": [1, None]} if rank == 0 else None, device))
    told.append(ranks.broadcast_json(None, device))
    groups = {"a": {"x": torch.arange(3.0) * (rank == 0)}, "b": {}} if rank == 0 else {}
    told.append(ranks.broadcast_groups(groups, device)["a"]["x"].tolist())
    numbers = [torch.tensor([rank + 1.0]), torch.tensor([[rank]], dtype=torch.int64), torch.tensor(float(rank))]
    ranks.sum_(numbers)
    told.append([number.tolist() for number in numbers])
    ranks.require_equal(["same"], "setting", device)
    try:
        ranks.require_equal([f"{rank == 2}"], "setting", device)
    except ConfigError as error:
        told.append(str(error))
    return told


def test_what_ranks_tell_each_other() -> None:
    for told in run_ranks(told_on_rank, 3):
        assert told == [
            True,
            False,
            {"ü": [1, None]},
            None,
            [0.0, 1.0, 2.0],
            [[6.0], [[3]], 3.0],
            "setting: expected the same on every rank; other than rank 0's on ranks [2]",
        ]


def test_torchrun_never_reads_half_an_error(tmp_path, monkeypatch) -> None:
    """It would die of it, and with it the restart of a rank that was killed while it wrote."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    over, seen = threading.Event(), []

    def read() -> None:
        while not over.is_set():
            with contextlib.suppress(FileNotFoundError):
                seen.append(json.loads(path.read_text())["message"]["message"])

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(300):
            try:
                raise ValueError(f"number {number} " + "x" * 20_000)
            except ValueError as error:
                tell_torchrun(error)
    finally:
        over.set()
        reader.join()
    assert len(seen) > 20
    assert all(text.startswith("ValueError: number ") and text.endswith("x") for text in seen)
    assert [entry.name for entry in tmp_path.iterdir()] == ["error.json"]

"""The cost model of bench/scaling: its numbers are the models', its laws hold, and the document holds them."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import BENCH, ROOT
from torch.autograd.graph import saved_tensors_hooks

from awp_engine.models import build_model
from awp_engine.observe.throughput import forward_flops
from awp_kernels import use_backend
from bench.scaling import scaling
from bench.scaling.cost import (
    Cluster,
    Gpu,
    Line,
    Network,
    all_reduce_seconds,
    buckets,
    describe,
    exposed_seconds,
    fit_gpu,
    fit_line,
    largest_share,
    limits,
    memory,
    step,
    strong_efficiency,
    weak_efficiency,
)
from bench.scaling.gloo_times import all_reduce_times

CLUSTER = Cluster("two levels", 8, Line(3e-6, 300e9), Line(10e-6, 40e9))
GPU = Gpu(rate=400e12, kernel=2e-6)
NETWORK = Network(
    name="hand-made",
    parameters=(1_000, 2_000_000, 9_000_000, 30_000_000, 6_000),
    flops=(50_000_000, 400_000_000, 400_000_000, 400_000_000, 12_000),
    tensors=5,
    channels=(64, 128, 256),
    kept=1_000_000,
    kernels=1_500,
)


@pytest.fixture(scope="module")
def networks() -> dict[str, Network]:
    return {name: describe(name) for name in scaling.MODELS}


@pytest.mark.parametrize(
    ("name", "millions", "tensors", "gigaflops"),
    [
        ("preact-resnet-18", 11.17, 56, 1.111),
        ("wrn-28-10", 36.48, 80, 10.49),
        ("wrn-34-10", 46.16, 98, 13.32),
        ("wrn-70-16", 266.8, 206, 77.53),
    ],
)
def test_models_have_their_published_sizes(networks, name, millions, tensors, gigaflops):
    network = networks[name]
    assert sum(network.parameters) == pytest.approx(millions * 1e6, rel=1e-3)
    assert network.tensors == tensors
    assert sum(network.flops) == pytest.approx(gigaflops * 1e9, rel=1e-3)


def test_what_a_pass_keeps_is_what_autograd_saves():
    with use_backend("reference"):
        model = build_model("preact-resnet-digits", 10, (0.5,), (0.25,)).train()
        owned = {parameter.data_ptr() for parameter in model.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor):
            if tensor.is_floating_point() and tensor.data_ptr() not in owned:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            model(torch.rand(1, 1, 8, 8)).sum()
    kept = sum(tensor.untyped_storage().nbytes() // 4 for tensor in saved.values())
    network = describe("preact-resnet-digits", image=(1, 8, 8))
    assert sum(network.parameters) == sum(parameter.numel() for parameter in model.parameters())
    assert network.kept == kept
    assert sum(network.flops) == forward_flops(model, (1, 8, 8))


@given(
    st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**9)), min_size=1, max_size=40),
    st.sampled_from([2, 4]),
    st.integers(1, 10**8),
)
def test_buckets_hold_every_gradient_once(layers, bytes_each, bucket_bytes):
    parameters, flops = zip(*layers, strict=True)
    found = buckets(Network("", parameters, (*flops[:-1], flops[-1] + 1), 1, (), 1, 1), bytes_each, bucket_bytes)
    assert sum(count for _, count in found) == bytes_each * sum(parameters)
    shares = [share for share, _ in found]
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)
    assert all(count >= bucket_bytes for _, count in found[:-1])


def test_all_reduce_of_many_bytes_is_limited_by_the_slowest_link():
    count = 1e12
    assert all_reduce_seconds(count, 1, CLUSTER) == 0
    assert all_reduce_seconds(count, 8, CLUSTER) == pytest.approx(2 * 7 / 8 * count / 300e9, rel=1e-3)
    # a GPU's eighth of the bytes goes round 16 nodes
    between = 2 * 15 / 16 * (count / 8) / 40e9
    assert all_reduce_seconds(count, 128, CLUSTER) == pytest.approx(2 * 7 / 8 * count / 300e9 + between, rel=1e-3)
    # of few bytes by the steps of a tree: log2 of the GPUs in a node, and of the nodes
    assert all_reduce_seconds(0, 1024, CLUSTER) == pytest.approx(2 * 3 * 3e-6 + 2 * 7 * 10e-6)


@given(st.floats(0, 1e10), st.integers(1, 1024), st.floats(0, 10), st.data())
def test_exposed_time_lies_between_all_and_what_cannot_hide(count, ranks, backward, data):
    shares = sorted(data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=8)))
    ready = [(share, int(count) // len(shares)) for share in shares]
    total = sum(all_reduce_seconds(part, ranks, CLUSTER) for _, part in ready)
    exposed = exposed_seconds(ready, backward, ranks, CLUSTER)
    assert max(0.0, total - backward) - 1e-9 <= exposed <= total + 1e-9
    assert exposed_seconds([(1.0, int(count))], backward, ranks, CLUSTER) == pytest.approx(
        all_reduce_seconds(int(count), ranks, CLUSTER), abs=1e-12
    )


@given(st.integers(1, 512), st.integers(2, 1024))
def test_more_synchronisation_is_never_faster(batch, ranks):
    whole = step(NETWORK, batch, ranks, GPU, CLUSTER)
    local = step(NETWORK, batch, ranks, GPU, CLUSTER, ascent_sync="local")
    synced = step(NETWORK, batch, ranks, GPU, CLUSTER, sync_batch_norm=True)
    assert 2 * local.gradients == pytest.approx(whole.gradients)
    assert step(NETWORK, batch, 1, GPU, CLUSTER).seconds < local.seconds <= whole.seconds < synced.seconds
    # ascent and descent, forward and backward, three layers
    ratio = (synced.small - whole.small) / all_reduce_seconds(8 * 150, ranks, CLUSTER)
    assert ratio == pytest.approx(12, rel=0.01)
    assert 0 < weak_efficiency(NETWORK, batch, ranks, GPU, CLUSTER) < 1
    assert 0 < strong_efficiency(NETWORK, max(batch, ranks), ranks, GPU, CLUSTER) < 1


def test_a_step_on_one_gpu_by_hand():
    alone = step(NETWORK, 128, 1, GPU, CLUSTER)
    assert alone.work == pytest.approx(26 * 1_250_012_000 * 128 / 400e12)
    assert alone.fixed == pytest.approx(1_500 * 2e-6)
    # the host is ahead of a large batch, and behind a small one
    launched = Gpu(rate=400e12, kernel=2e-6, launch=6e-6)
    assert step(NETWORK, 128, 1, launched, CLUSTER).seconds == pytest.approx(alone.seconds)
    assert step(NETWORK, 1, 1, launched, CLUSTER).seconds == pytest.approx(1_500 * 6e-6)
    assert limits(alone, 128, step(NETWORK, 1, 128, launched, CLUSTER)) == "kernels"
    slow = Cluster("slow", 1, CLUSTER.inside, Line(1e-6, 1e6))
    assert limits(alone, 2, step(NETWORK, 64, 2, GPU, slow)) == "gradients"
    late = Cluster("late", 1, CLUSTER.inside, Line(1.0, 1e15))
    assert limits(alone, 2, step(NETWORK, 64, 2, GPU, late, ascent_sync="local")) == "small all-reduces"
    assert [largest_share(128, ranks) for ranks in (1, 3, 128, 200)] == [128, 43, 1, 1]


def test_memory_by_hand():
    count = sum(NETWORK.parameters)
    whole = memory(NETWORK, 16, 4, sharded=False)
    assert sum(whole.values()) == 12 * count + 2 * 16 * 1_000_000
    # two layers of 30M in 16 bits, and their gradients
    assert sum(memory(NETWORK, 16, 4, sharded=True).values()) == 3 * count + 8 * 30_000_000 + 32_000_000
    assert memory(NETWORK, 16, 1, sharded=True) == whole


@given(st.floats(0, 1), st.floats(1e3, 1e13), st.lists(st.integers(1, 10**10), min_size=2, max_size=12, unique=True))
def test_the_line_through_exact_points_is_found(latency, bandwidth, sizes):
    line, error = fit_line([(n, latency + n / bandwidth) for n in sizes])
    assert error < 1e-3
    for n in sizes:
        assert line.seconds(n) == pytest.approx(latency + n / bandwidth, rel=1e-3)


def test_a_line_that_says_nothing_is_refused():
    for points in ([(1, 1.0)], [(1, 1.0), (1, 2.0)], [(1, 0.0), (2, 1.0)], [(1, 2.0), (2, 1.0)]):
        with pytest.raises(ValueError, match="expected times"):
            fit_line(points)
    # growing faster than the bytes: through the origin, not from below it
    line, _ = fit_line([(1, 1.0), (2, 10.0)])
    assert line.latency == 0
    assert math.isfinite(line.bandwidth)


def test_a_gpu_is_found_in_its_own_steps(tmp_path, networks):
    network, true = networks["preact-resnet-18"], Gpu(rate=300e12, kernel=3e-6)
    points = [(batch, step(network, batch, 1, true, CLUSTER).seconds) for batch in (16, 128)]
    found = fit_gpu(network, points)
    assert (found.rate, found.kernel) == pytest.approx((true.rate, true.kernel))
    paths = []
    for batch, seconds in points:
        settings = {"model": network.name, "method": "at-awp", "steps": 10, "batch_size": batch}
        arm = {"name": "engine", "seconds": {"median": seconds}}
        paths.append(tmp_path / f"{batch}.json")
        paths[-1].write_text(json.dumps({"settings": settings, "arms": [arm]}))
    assert scaling.read_gpu(paths).rate == pytest.approx(true.rate)
    with pytest.raises(ValueError, match="--gpu-steps: expected times above 0 of two sizes"):
        scaling.read_gpu(paths[:1])


def test_gloo_is_timed_between_processes():
    points = all_reduce_times(2, sizes=(64, 4096), repeats=1)
    assert [count for count, _ in points] == [64, 4096]
    assert all(0 < seconds < 60 for _, seconds in points)


def test_the_document_holds_the_tables(networks):
    text = (ROOT / "docs" / "scaling.md").read_text()
    for table in scaling.model_tables(list(networks.values()), scaling.GPU).split("\n\n"):
        assert table in text


def test_kept_results_are_shown_and_drawn(tmp_path, networks):
    (path,) = (BENCH / "results").glob("scaling-*.json")
    result = scaling.read_result(path)
    assert "| 2 ranks |" in scaling.measured_tables(result)
    scaling.plot([networks["preact-resnet-18"]], scaling.GPU, result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--ranks", "3"], "--ranks: expected 2 or 4, got 3"),
        (["--measure"], "--json: expected a file to keep what is measured, got nothing"),
        (["--plot", "nowhere/plot.png"], "--plot: expected a file in a directory that exists"),
        (["--gpu-steps", "nowhere.json"], "nowhere.json: not a result of bench/step/step.py"),
        (["--json", "pyproject.toml"], "--json: pyproject.toml: not a result of bench/scaling/scaling.py"),
        (["--json", "unmeasured.json", "--measure-training"], "--measure-training: expected --measure as well"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_take_one_line(arguments, named, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        scaling.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("scaling.py: error: ")
    assert named in error
    assert len(error.splitlines()) == 1

"""Batch normalisation over ranks against one process with the whole batch, in fp64."""

import copy
import itertools

import pytest
import torch
from ranks import run_ranks
from torch import distributed, nn

from awp_engine.attack import pgd
from awp_engine.models import PreActResNet, build_model
from awp_engine.models.batch_norm import batch_norm_mode, recompute_statistics, share_memory, synchronize
from awp_engine.models.layers import ActivatedBatchNorm
from awp_kernels import bn_act_available, use_backend

# images a rank: unequal, and one rank without any
SHARDS = {2: [5, 2], 4: [3, 0, 1, 4]}
# the kernels serve the second
ORDERS = {"planes": torch.contiguous_format, "channels last": torch.channels_last}


def layer(momentum=0.1, dtype=torch.float64, activation="silu") -> ActivatedBatchNorm:
    generator = torch.Generator().manual_seed(0)
    made = ActivatedBatchNorm(16, activation).to(dtype)
    made.momentum = momentum
    with torch.no_grad():
        for tensor in (made.weight, made.bias, made.running_mean):
            tensor.copy_(torch.randn(16, generator=generator))
    return made


def images(samples: int, mean=3.0, seed=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 16, 5, 3, generator=generator, dtype=torch.float64) + mean


def model(activation="silu") -> PreActResNet:
    torch.manual_seed(0)
    return PreActResNet(3, [0.5], [0.25], num_blocks=(1, 1), width=16, activation=activation).double()


def shard(batch: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    return batch.split(SHARDS[world])[rank].clone()


def layer_pass(normalise: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of a loss that is a sum over samples."""
    x.requires_grad_()
    out = normalise(x)
    gradients = torch.autograd.grad((out * weight).sum(), [x, normalise.weight, normalise.bias])
    return [out.detach(), *gradients]


def sum_pass(normalise: nn.Module, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Likewise of a sum and what becomes of it, both of which are read."""
    x.requires_grad_(), residual.requires_grad_()
    z, out = normalise(x, residual)
    # what the kernels serve is one operation, without the sum or the activation beside it
    in_order = x.is_contiguous(memory_format=torch.channels_last)
    fused = in_order and bn_act_available(x, normalise.weight, normalise.bias)
    assert fused == (type(out.grad_fn).__name__ == "_BnActBackward")
    loss = (out * weight).sum() + (z * weight.flip(1)).sum()
    return [z.detach(), out.detach(), *torch.autograd.grad(loss, [x, residual, normalise.weight, normalise.bias])]


def model_pass(network: nn.Module, x: torch.Tensor, moved: torch.Tensor) -> list[torch.Tensor]:
    """Two forward passes in one graph, as TRADES has them: logits, gradients for both images and for the weights."""
    x.requires_grad_(), moved.requires_grad_()
    clean, attacked = network(x), network(moved)
    loss = (clean.softmax(1) * attacked.log_softmax(1)).sum()
    return [attacked.detach(), *torch.autograd.grad(loss, [x, moved, *network.parameters()])]


def buffers(network: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in network.buffers()]


def _all_of_a_rank(rank, world):
    results = {}
    whole = images(sum(SHARDS[world]))
    for momentum in (0.1, None):
        normalise = layer(momentum)
        normalise.synchronized = True
        for _ in range(2):
            outputs = layer_pass(normalise, shard(whole, rank, world), shard(images(len(whole), seed=2), rank, world))
        results[f"layer {momentum}"] = outputs, buffers(normalise)
    for dtype, (order, memory_format) in itertools.product((torch.float32, torch.bfloat16), ORDERS.items()):
        normalise = layer(dtype=torch.float32)
        normalise.synchronized = True
        x = images(len(whole), mean=300 if dtype == torch.float32 else 3).to(dtype)
        x, residual, weight = (
            shard(t, rank, world).to(dtype, memory_format=memory_format)
            for t in (x, images(len(whole), seed=3), images(len(whole), seed=2))
        )
        results[f"{dtype} {order}"] = layer_pass(normalise, x.clone(), weight), buffers(normalise)
        results[f"{dtype} {order} sum"] = sum_pass(normalise, x.clone(), residual, weight), buffers(normalise)

    # refused by every rank before it waits for the others
    normalise, x = layer(), shard(whole, rank, world).requires_grad_()
    normalise.synchronized = True
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(normalise(x).sum(), x, create_graph=True)

    network = model()
    share_memory(network)
    synchronize(network)
    network = copy.deepcopy(network)
    x, moved = (torch.rand(len(whole), 1, 6, 6, dtype=torch.float64, generator=seeded(s)) for s in (3, 4))
    results["model"] = model_pass(network, shard(x, rank, world), shard(moved, rank, world)), buffers(network)
    recompute_statistics(network, (network(part) for part in (shard(x, rank, world), shard(moved, rank, world))))
    results["recomputed"] = [], buffers(network)
    if world == 2:
        # dynamo breaks its graph there
        compiled = torch.compile(network, backend="eager")
        results["compiled"] = model_pass(compiled, shard(x, rank, world), shard(moved, rank, world)), buffers(network)

    # no collective may run: rank 0 alone goes through these
    if rank == 0:
        y = torch.zeros(len(whole), dtype=torch.int64)
        with batch_norm_mode(network, update_statistics=True, synchronized=False):
            pgd(network, x, y, epsilon=0.1, step_size=0.05, steps=2, bn_mode="train")
            alone = model_pass(network, x.detach().clone(), moved.detach().clone())
        assert all(module.synchronized for module in network.modules() if isinstance(module, ActivatedBatchNorm))
        plain = model()
        results["switched off"] = alone, model_pass(plain, x.detach().clone(), moved.detach().clone())
        network.eval()
        model_pass(network, x.detach().clone(), moved.detach().clone())
        # a fused layer
        fused = model("relu").float().eval()
        synchronize(fused)
        fused(x.detach().float())
    distributed.barrier()
    return results


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    return run_ranks(_all_of_a_rank, request.param, timeout=120)


def close(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


def joined(ranks, name, of_samples):
    """What one process would have: samples side by side, weights' gradients added up; and rank 0's buffers."""
    outputs = [result[name][0] for result in ranks]
    whole = [torch.cat(parts) if i < of_samples else sum(parts) for i, parts in enumerate(zip(*outputs, strict=True))]
    return whole, ranks[0][name][1]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_equals_torch_on_the_whole_batch(ranks, momentum):
    total = sum(SHARDS[len(ranks)])
    outputs, statistics = joined(ranks, f"layer {momentum}", 2)
    plain = layer(momentum)
    expected_outputs = [layer_pass(plain, images(total), images(total, seed=2)) for _ in range(2)][-1]
    close(outputs, expected_outputs)
    close(statistics, buffers(plain))


def test_a_model_called_twice_in_one_graph_equals_one_process(ranks):
    total = sum(SHARDS[len(ranks)])
    plain = model()
    x, moved = (torch.rand(total, 1, 6, 6, dtype=torch.float64, generator=seeded(s)) for s in (3, 4))
    expected = model_pass(plain, x.clone(), moved.clone())
    for name in ("model", "recomputed", *(["compiled"] if len(ranks) == 2 else [])):
        outputs, statistics = joined(ranks, name, 3)
        if name == "recomputed":
            # unequal parts: a plain average over forward passes of the whole batch
            recompute_statistics(plain, (plain(part) for part in (x, moved)))
        elif name == "compiled":
            expected = model_pass(plain, x.clone(), moved.clone())
        if outputs:
            close(outputs, expected)
        close(statistics, buffers(plain))


def test_statistics_have_the_same_bits_on_all_ranks(ranks):
    for name, (_, statistics) in ranks[0].items():
        if name != "switched off":
            for result in ranks[1:]:
                assert all(map(torch.equal, statistics, result[name][1]))


@pytest.mark.parametrize("name", ["", " sum"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_as_exact_as_torch(ranks, dtype, order, name):
    """The error against fp64 is at most twice that of nn.BatchNorm2d in the same precision; fp32 far from 0."""
    total = sum(SHARDS[len(ranks)])
    outputs, statistics = joined(ranks, f"{dtype} {order}{name}", 4 if name else 2)
    x, weight = images(total, mean=300 if dtype == torch.float32 else 3).to(dtype), images(total, seed=2).to(dtype)

    def run(precision, of_images):
        made, image = layer(dtype=precision), x.detach().to(of_images)
        with use_backend("reference"):
            found = layer_pass(made, image, weight.to(of_images))
            if name:
                added = images(total, seed=3).to(dtype)
                # what is normalised is the sum as it is stored
                stored = (x.detach() + added).to(dtype)
                rest = (stored.to(of_images) - image.detach()) if precision == torch.float64 else added
                found = sum_pass(made, image.detach(), rest.detach(), weight.to(of_images))
            return [*found, *buffers(made)]

    exact, plain = run(torch.float64, torch.float64), run(torch.float32, dtype)
    assert outputs[0].dtype == outputs[1].dtype == dtype
    for actual, torchs, expected in zip([*outputs, *statistics], plain, exact, strict=True):
        error, allowed = ((t.double() - expected).abs().max().item() for t in (actual, torchs))
        assert error <= 2 * allowed + 1e-6 * expected.abs().max().item()


def test_switched_off_or_in_eval_mode_nothing_is_communicated(ranks):
    """Rank 0 ran these alone: with a collective it would not have come back."""
    alone, plain = ranks[0]["switched off"]
    close(alone, plain, 1e-15)


def test_one_process_is_left_as_it_is():
    plain, synchronised = layer(), layer()
    synchronize(synchronised)
    close(*(layer_pass(each, images(4), images(4, seed=2)) for each in (plain, synchronised)), tolerance=0)


def test_other_layers_are_refused():
    with pytest.raises(ValueError, match="model: BatchNorm1d cannot be synchronised"):
        synchronize(nn.Sequential(ActivatedBatchNorm(4, "relu"), nn.BatchNorm1d(4)))
    assert synchronize(build_model("preact-resnet-18", 10, [0.5] * 3, [0.5] * 3)) is None

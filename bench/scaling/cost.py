"""Time and memory of one AT-AWP step on N GPUs, from the model, the links and the batch.

    step = fixed + 26 F b / rate + exposed all-reduces

`fixed` is what the step's kernels take however few images there are; b is the largest share of the batch; all-reduces
of gradients begin bucket by bucket behind the backward pass, and what outlasts that pass is exposed. Nothing here is
measured but what the caller puts into `Line`, `Gpu` and `Cluster`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from awp_engine.config import AttackConfig, AwpConfig, Config
from awp_engine.models import build_model
from awp_engine.train.cost import forward_units

ATTACK_STEPS = 10
# torch's DistributedDataParallel sends a bucket as soon as it holds this much
BUCKET_BYTES = 25 << 20
# forward and backward pass of the weights' gradients, and the backward pass alone, in forward passes
PASS_UNITS, BACKWARD_UNITS = 3, 2
CONTROL_BYTES = 64
# ascent and descent; the attack is each rank's own
SYNCED_PASSES = 2


@dataclass(frozen=True)
class Line:
    """seconds = latency + bytes / bandwidth."""

    latency: float
    bandwidth: float

    def seconds(self, count: float) -> float:
        """What `count` bytes take."""
        return self.latency + count / self.bandwidth


@dataclass(frozen=True)
class Gpu:
    """A device.

    Attributes:
        rate: FLOP/s of necessary work at a large batch.
        kernel: seconds that a kernel takes beyond its work.
        launch: seconds of the host for each, 0 in a CUDA graph; it runs ahead of the device, and is seen only where
            the device waits for it.
    """

    rate: float
    kernel: float
    launch: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """How GPUs are joined.

    Attributes:
        name: for tables.
        per_node: GPUs in a node.
        inside: from GPU to GPU in a node, one direction.
        between: from node to node, the share of one GPU.
    """

    name: str
    per_node: int
    inside: Line
    between: Line


@dataclass(frozen=True)
class Network:
    """A classifier in numbers.

    Attributes:
        parameters: of each layer that has some, in the order of the forward pass.
        flops: of the same layers, one image's forward pass.
        tensors: number of parameter tensors.
        channels: of each batch-normalisation layer.
        kept: elements that a forward pass keeps of one image for the backward pass.
        kernels: of one AT-AWP step, views and allocations left out.
    """

    name: str
    parameters: tuple[int, ...]
    flops: tuple[int, ...]
    tensors: int
    channels: tuple[int, ...]
    kept: int
    kernels: int


@dataclass(frozen=True)
class Step:
    """Seconds of one step, and where they go.

    Attributes:
        work: arithmetic.
        fixed: what kernels take beyond their work, or the host for launching them.
        gradients: all-reduces of gradients, as far as nothing hides them.
        small: statistics of batch normalisation, and the vector that decides whether a step counts.
    """

    work: float
    fixed: float
    gradients: float
    small: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.work + self.fixed + self.gradients + self.small


class _Kernels(TorchDispatchMode):
    """Counts operations that move data; the gradients of a convolution are one each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [argument.alias_info for argument in func._schema.arguments]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if func is torch.ops.aten.convolution_backward.default:
            self.count += sum(args[-1])
        elif not is_view and "empty" not in func._schema.name:
            self.count += 1
        return func(*args, **(kwargs or {}))


def describe(name: str, *, width: int | None = None, image: tuple[int, int, int] = (3, 32, 32)) -> Network:
    """The numbers of a model of `build_model`, from the model itself, on the meta device.

    Args:
        name: of the model.
        width: as `build_model` takes it.
        image: [C, H, W].
    """
    with torch.device("meta"):
        model = build_model(name, 10, (0.5,) * image[0], (0.25,) * image[0], width=width).train()
        x = torch.zeros(1, *image)
    own = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    order: list[nn.Module] = []
    multiplications: dict[nn.Module, int] = {}

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        order.append(module)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            multiplications[module] = output[0].numel() * module.weight[0].numel()

    storages: dict[int, torch.UntypedStorage] = {}
    elements: dict[int, int] = {}
    owned = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned and tensor.is_floating_point():
            # held, so that no address is used twice
            storages[storage._cdata] = storage
            elements[storage._cdata] = storage.nbytes() // tensor.element_size()
        return tensor

    handles = [module.register_forward_hook(hook) for module in own]
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x).sum()
    for handle in handles:
        handle.remove()

    with _Kernels() as attack:
        torch.autograd.grad(model(x.requires_grad_()).sum(), x)
    with _Kernels() as descent:
        model(x.detach()).sum().backward()
    flops = tuple(2 * multiplications.get(module, 0) for module in order)
    return Network(
        name=name,
        parameters=tuple(sum(p.numel() for p in module.parameters(recurse=False)) for module in order),
        flops=flops,
        tensors=len(list(model.parameters())),
        channels=tuple(module.num_features for module in order if isinstance(module, _BatchNorm)),
        kept=sum(elements.values()),
        kernels=ATTACK_STEPS * attack.count + 2 * descent.count,
    )


def step_units() -> float:
    """Forward passes' worth of work in a step of AT-AWP with PGD-10."""
    return forward_units(Config(attack=AttackConfig(steps=ATTACK_STEPS), awp=AwpConfig(gamma=0.005)))


def _level(count: float, ranks: int, line: Line) -> float:
    """The faster of a ring and a double binary tree."""
    if ranks == 1:
        return 0.0
    ring = 2 * (ranks - 1) * (line.latency + count / ranks / line.bandwidth)
    tree = 2 * math.ceil(math.log2(ranks)) * line.latency + 2 * count / line.bandwidth
    return min(ring, tree)


def all_reduce_seconds(count: float, ranks: int, cluster: Cluster) -> float:
    """Of `count` bytes: summed inside the nodes, each GPU's share summed between them, and spread again."""
    local = min(ranks, cluster.per_node)
    return _level(count, local, cluster.inside) + _level(count / local, math.ceil(ranks / local), cluster.between)


def buckets(network: Network, bytes_each: int, bucket_bytes: int = BUCKET_BYTES) -> list[tuple[float, int]]:
    """When each bucket is complete, as a share of the backward pass, and its bytes; the last layer comes first."""
    done, held, total = 0, 0, sum(network.flops)
    found: list[tuple[float, int]] = []
    for count, flops in zip(reversed(network.parameters), reversed(network.flops), strict=True):
        done, held = done + flops, held + count * bytes_each
        if held >= bucket_bytes:
            found.append((done / total, held))
            held = 0
    return [*found, (1.0, held)] if held else found


def exposed_seconds(ready: Sequence[tuple[float, int]], backward: float, ranks: int, cluster: Cluster) -> float:
    """What is left of the all-reduces when a backward pass of `backward` seconds is over: they queue, one at a time."""
    end = 0.0
    for share, count in ready:
        end = max(end, share * backward) + all_reduce_seconds(count, ranks, cluster)
    return max(0.0, end - backward) if ranks > 1 else 0.0


def step(
    network: Network,
    batch: int,
    ranks: int,
    gpu: Gpu,
    cluster: Cluster,
    *,
    ascent_sync: str = "global",
    sync_batch_norm: bool = False,
    bytes_each: int = 2,
    bucket_bytes: int = BUCKET_BYTES,
) -> Step:
    """One AT-AWP step.

    Args:
        network: the classifier.
        batch: images a GPU.
        ranks: GPUs, one a rank.
        gpu: each of them.
        cluster: what joins them.
        ascent_sync: "global" sums the ascent's gradient over the ranks as well, "local" does not.
        sync_batch_norm: batch normalisation by the statistics of all ranks: two all-reduces a layer and pass.
        bytes_each: of a gradient's element.
        bucket_bytes: a bucket travels as soon as it holds this much.
    """
    work = step_units() * sum(network.flops) * batch / gpu.rate
    fixed = network.kernels * max(gpu.kernel, gpu.launch - work / network.kernels)
    if ranks == 1:
        return Step(work, fixed, 0.0, 0.0)
    backward = (work + fixed) * BACKWARD_UNITS / step_units()
    synced = 2 if ascent_sync == "global" else 1
    gradients = synced * exposed_seconds(buckets(network, bytes_each, bucket_bytes), backward, ranks, cluster)
    small = [8 * sum(network.channels), CONTROL_BYTES]
    if sync_batch_norm:
        small += [8 * channels for channels in network.channels] * 2 * SYNCED_PASSES
    return Step(work, fixed, gradients, sum(all_reduce_seconds(count, ranks, cluster) for count in small))


def largest_share(global_batch: int, ranks: int) -> int:
    """Images of the rank that has most; the others wait for it."""
    return -(-global_batch // ranks)


def strong_efficiency(network: Network, global_batch: int, ranks: int, gpu: Gpu, cluster: Cluster, **how: Any) -> float:
    """How much of N times one GPU's rate N GPUs reach on the same batch."""
    alone = step(network, global_batch, 1, gpu, cluster, **how).seconds
    return alone / ranks / step(network, largest_share(global_batch, ranks), ranks, gpu, cluster, **how).seconds


def weak_efficiency(network: Network, batch: int, ranks: int, gpu: Gpu, cluster: Cluster, **how: Any) -> float:
    """The same with `batch` images on every GPU."""
    alone = step(network, batch, 1, gpu, cluster, **how).seconds
    return alone / step(network, batch, ranks, gpu, cluster, **how).seconds


def limits(alone: Step, ranks: int, now: Step) -> str:
    """The part of a step that costs most beyond its share of one GPU's step."""
    lost = {
        "uneven shares": now.work - alone.work / ranks,
        "kernels": now.fixed - alone.fixed / ranks,
        "gradients": now.gradients,
        "small all-reduces": now.small,
    }
    return max(lost, key=lambda part: lost[part])


def memory(network: Network, batch: int, ranks: int, *, sharded: bool) -> dict[str, float]:
    """Bytes on a GPU in fp16 training: what a rank holds at the descent's last backward pass.

    Args:
        network: the classifier.
        batch: images on this GPU.
        ranks: GPUs.
        sharded: FSDP2: masters, momentum, copy and gradients in N parts, two layers whole at a time.
    """
    count, parts = sum(network.parameters), ranks if sharded else 1
    gathered = 2 * 2 * 2 * max(network.parameters) if sharded and ranks > 1 else 0
    return {
        "masters and momentum": 8 * count / parts,
        "fp16 copy": 2 * count / parts + gathered,
        # the buckets that travel are the gradients' own memory
        "fp16 gradients": 2 * count / parts,
        "activations": 2.0 * network.kept * batch,
    }


def fit_gpu(network: Network, points: Sequence[tuple[int, float]], launch: float = 0.0) -> Gpu:
    """The GPU on which steps of some batch sizes took so long.

    Args:
        network: the classifier.
        points: images a step, and its seconds in a CUDA graph.
        launch: as in `Gpu`.

    Raises:
        ValueError: as `fit_line`.
    """
    line, _ = fit_line([(step_units() * sum(network.flops) * batch, seconds) for batch, seconds in points])
    return Gpu(rate=line.bandwidth, kernel=line.latency / network.kernels, launch=launch)


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[Line, float]:
    """The line through (bytes, seconds) whose squared relative errors are least, and the largest of these.

    A latency below zero is none: the line then goes through the origin.

    Raises:
        ValueError: fewer than two different sizes, a time that is not above 0, or times that do not grow.
    """
    if len({count for count, _ in points}) < 2 or min(seconds for _, seconds in points) <= 0:
        raise ValueError("expected times above 0 of two sizes or more")
    # weighted by 1 / t^2: minimise sum((a + b n - t)^2 / t^2)
    w = [1 / t**2 for _, t in points]
    s, sn, snn = (sum(v * n**k for v, (n, _) in zip(w, points, strict=True)) for k in range(3))
    st, snt = (sum(v * n**k * t for v, (n, t) in zip(w, points, strict=True)) for k in range(2))
    slope = (s * snt - sn * st) / (s * snn - sn**2)
    latency = (st - slope * sn) / s
    if latency < 0:
        latency, slope = 0.0, snt / snn
    if slope <= 0:
        raise ValueError("expected times that grow with the bytes")
    line = Line(latency, 1 / slope)
    return line, max(abs(line.seconds(n) / t - 1) for n, t in points)

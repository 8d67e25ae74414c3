"""Times every implementation of every operation beside what a user could call instead.

    OMP_NUM_THREADS=2 pytest bench --benchmark-enable -o addopts= --benchmark-json=bench.json
    python -m bench.report bench.json --out plots

The operations on weights run over the tensors of models, and over lists of 1e3 to 1e9 elements (`--sizes 1e5,1e7`), as
far as memory goes. On a GPU machine the GPU is timed (`--device cpu` times the CPU
there). Implementations take turns, `--passes` times, so that a noisy neighbour disturbs all of them; `report.py` forms
ratios inside a pass. Before each call the inputs are put back and a large copy empties the caches, as a forward and
backward pass would; the copy's bandwidth is the yardstick. What pytest-benchmark reports is the time on the host's
clock until the result is there. On GPUs `device_ms` is the time on the device alone, between two events, with all
launches queued beforehand.

On the CPU temporaries cost most where their memory must first be had from the system, which depends on what ran before:
`page_faults` counts it, and `--trim-heap` puts every call where a new process stands.
"""

import ctypes
import os
import resource
import statistics
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from awp_kernels import _backend, use_backend
from bench.clocks import HEAD_START_CYCLES, seconds
from bench.ops import image_operations, update_operations, weight_operations
from bench.ops.weight_lists import Latest, TooLargeError, sizes
from bench.ops.workload import Workload, own_implementations

# twice the last cache of the devices at hand: 32 MiB (EPYC), 60 MiB (H200)
COPY_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
_WORKLOADS = Latest()
_BEGAN = time.monotonic()


@dataclass(frozen=True)
class Case:
    """One bar of the plot, in one pass."""

    device: str
    operation: str
    inputs: str
    implementation: str
    attempt: int

    def __str__(self) -> str:
        return "-".join((self.operation, self.inputs, self.implementation, str(self.attempt))).replace(" ", "_")

    def workload(self) -> Workload:
        """The inputs, shared by neighbouring cases.

        Raises:
            TooLargeError: they do not fit in memory.
        """
        if self.operation in weight_operations.ALTERNATIVES:
            return _WORKLOADS.get(weight_operations.weight_workload, self.operation, self.inputs, self.device)
        if self.operation in update_operations.ALTERNATIVES:
            return _WORKLOADS.get(update_operations.update_workload, self.operation, self.inputs, self.device)
        return _WORKLOADS.get(image_operations.image_workload, self.operation, self.device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Inputs one after the other; inside, operations; inside, passes; inside, implementations."""
    option = metafunc.config.option
    device: str = option.device
    try:
        lists = ["preact-resnet-18", *(["wrn-34-10"] if device == "cuda" else []), *sizes(option.sizes, device)]
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    over_weights = weight_operations.ALTERNATIVES | update_operations.ALTERNATIVES
    groups = [(o, inputs, names) for inputs in lists for o, names in over_weights.items()]
    groups += [(o, image_operations.inputs(o), names) for o, names in image_operations.ALTERNATIVES.items()]
    cases = [
        Case(device, operation, inputs, implementation, attempt)
        for operation, inputs, names in groups
        for attempt in range(option.passes)
        for implementation in own_implementations(device) + names
        if implementation != "compile" or option.with_compile
        if implementation in names
        or _backend.problem(implementation, device, operation.split()[0].removesuffix("_")) is None
    ]
    metafunc.parametrize("case", cases, ids=str)


class CacheFlush:
    """Copies a block larger than the caches, and notes the bandwidth in bytes a second."""

    def __init__(self, device: str) -> None:
        self.source = torch.rand(COPY_BYTES[device] // 4, device=device)
        self.target = torch.empty_like(self.source)
        self.bandwidths: list[float] = []

    def __call__(self) -> None:
        """Empty the caches once."""
        device = self.source.device.type
        # one launch needs no long head start
        self.bandwidths.append(2 * COPY_BYTES[device] / seconds(self.copy, device, HEAD_START_CYCLES // 50))

    def copy(self) -> None:
        """Counted as bytes read plus bytes written."""
        self.target.copy_(self.source)


def page_faults() -> int:
    """Pages that this process was given so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.fixture(scope="module")
def flush(request: pytest.FixtureRequest) -> CacheFlush:
    return CacheFlush(request.config.option.device)


# libraries that are compared warn about their own things
@pytest.mark.filterwarnings("default")
@torch.no_grad()
def test_speed(benchmark: Any, case: Case, flush: CacheFlush, request: pytest.FixtureRequest) -> None:
    limit: float | None = request.config.option.seconds
    if limit is not None and time.monotonic() - _BEGAN > limit:
        pytest.skip(f"not begun within --seconds {limit:g}")
    try:
        workload = case.workload()
    except TooLargeError as error:
        pytest.skip(str(error))
    if case.implementation in workload.missing:
        pytest.skip(workload.missing[case.implementation])
    call = workload.calls[case.implementation]
    own = case.implementation in own_implementations(case.device)

    def finished() -> None:
        call()
        if case.device == "cuda":
            torch.cuda.synchronize()

    trim_heap = request.config.option.trim_heap
    before: list[int] = []
    faults: list[int] = []

    def prepare() -> None:
        faults.append(page_faults() - before[-1] if before else 0)
        workload.reset()
        flush()
        if trim_heap:
            ctypes.CDLL(None).malloc_trim(0)
        before.append(page_faults())

    with use_backend(case.implementation if own else None):
        workload.check(case.implementation)
        flush.bandwidths.clear()
        rounds: int = request.config.option.rounds
        benchmark.group = f"{case.operation} {case.inputs}"
        benchmark.pedantic(finished, setup=prepare, rounds=rounds, iterations=1, warmup_rounds=3)
        if benchmark.stats is None:
            return
        best = benchmark.stats.stats.median
        if case.device == "cuda":
            on_device = []
            for _ in range(rounds):
                prepare()
                on_device.append(seconds(call, case.device))
            best = statistics.median(on_device)
            benchmark.extra_info["device_ms"] = best * 1e3

    copy = statistics.median(flush.bandwidths)
    benchmark.extra_info |= {
        "device": case.device,
        "operation": case.operation,
        "inputs": case.inputs,
        "implementation": case.implementation,
        "own": own,
        "attempt": case.attempt,
        "bytes_moved": workload.bytes_moved,
        "gb_per_s": workload.bytes_moved / best / 1e9,
        "copy_gb_per_s": copy / 1e9,
        "share_of_copy": workload.bytes_moved / best / copy,
        "page_faults": statistics.median(faults),
        "load_average": os.getloadavg()[0],
    }

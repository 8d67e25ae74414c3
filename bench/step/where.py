"""Where the time of a training step goes on the device, by kernel: torch.profiler over a few steps of the engine.

    python -m bench.step.where --model wrn-34-10 --batch-size 128 --device cuda --json where.json --table where.txt

Steps are taken plainly, as a graph's launches would hide what they launch; the shares are of the device's busy time.
"""

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from awp_engine.cli.command_line import OneLineParser
from awp_engine.files.text import json_text
from bench.machine import describe_machine
from bench.step.arms import Settings
from bench.step.arms.engine import engine_arm
from bench.step.turns import WARM_UP, random_batches

# the first that matches a kernel's name
_KINDS = {
    "weights and images, this package": r"awp::|perturb_|sgd_|pgd_|norm_sums|norm_total|restore_copy|_kernel_.*triton",
    "convolution": r"conv|cudnn.*(engine|xmma|cutlass)|xmma|implicit|wgrad|dgrad|fprop|winograd",
    "matrix product": r"gemm|cublas|cutlass|gemv|::mm|addmm|linear",
    "batch normalisation": r"bn_|batch_norm|batchnorm",
    "copies": r"memcpy|memset|copy|nchwToNhwc|nhwcToNchw",
    "element by element, sums": r"elementwise|reduce|foreach|softmax|relu|add|threshold|pool|mean|mul|sum",
}


def kind_of(name: str) -> str:
    """What a kernel serves, by its name."""
    found = (kind for kind, pattern in _KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def measure(settings: Settings, steps: int) -> tuple[dict[str, Any], str]:
    """Shares by kind and the largest kernels of some steps; and the profiler's own table."""
    cuda = settings.device == "cuda"
    arm, batches = engine_arm(settings, settings.build_model()), random_batches(settings)

    def take(count: int, first: int) -> None:
        for index, batch in zip(range(first, first + count), batches, strict=False):
            arm.step(batch._replace(images=batch.images.contiguous(memory_format=arm.memory_format)), index)
        if cuda:
            torch.cuda.synchronize()

    warm_up = WARM_UP[settings.device]
    take(warm_up, 0)
    begin = time.perf_counter()
    take(steps, warm_up)
    seconds = (time.perf_counter() - begin) / steps
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities, acc_events=True) as recorded:
        take(steps, warm_up + steps)
    averages = recorded.key_averages()
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    kernels = [event for event in averages if event.device_type.name == ("CUDA" if cuda else "CPU")]
    times = {event.key: (getattr(event, own) / 1e3 / steps, event.count / steps) for event in kernels}
    kinds: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, (milliseconds, count) in times.items():
        kinds[kind_of(name)][0] += milliseconds
        kinds[kind_of(name)][1] += count
    busy = sum(milliseconds for milliseconds, _ in times.values())
    largest = sorted(times.items(), key=lambda item: -item[1][0])[:25]
    result = {
        "kind": "where",
        "settings": vars(settings),
        "machine": describe_machine(settings.device),
        "steps": steps,
        "step_ms": seconds * 1e3,
        "busy_ms": busy,
        "kinds_ms": {name: value[0] for name, value in sorted(kinds.items(), key=lambda item: -item[1][0])},
        "launches": {name: value[1] for name, value in kinds.items()},
        "largest_ms": [{"kernel": name[:200], "ms": value[0], "launches": value[1]} for name, value in largest],
    }
    return result, averages.table(sort_by=own, row_limit=40, max_name_column_width=90)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    parser = OneLineParser(prog="where.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wrn-34-10", help="a name of bench/step/step.py's")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--method", choices=("at", "at-awp", "trades-awp"), default="at-awp")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=3, help="how many are recorded")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--table", type=Path, help="file that the profiler's table is added to")
    arguments = parser.parse_args(argv)
    settings = Settings(
        model=arguments.model,
        method=arguments.method,
        batch_size=arguments.batch_size,
        device=arguments.device,
        engine={"cuda_graphs": False},
    )
    result, table = measure(settings, arguments.steps)
    print(f"{arguments.model}: {result['step_ms']:.1f} ms a step, the device busy for {result['busy_ms']:.1f} of them")
    print("| kind | ms | launches |\n|---|---|---|")
    for kind, milliseconds in result["kinds_ms"].items():
        print(f"| {kind} | {milliseconds:.2f} | {result['launches'][kind]:.0f} |")
    if arguments.table:
        with arguments.table.open("a") as file:
            file.write(f"{arguments.model}\n{table}\n")
    if arguments.json:
        arguments.json.write_text(json_text(result, indent=1))


if __name__ == "__main__":
    main()

"""How an AT-AWP step scales: a cost model for 1 to 1,024 GPUs, its terms measured where this machine can.

the model's tables:
    python -m bench.scaling.scaling
gloo's all-reduce and JPEG decoding here:
    python -m bench.scaling.scaling --measure --json scaling.json
training steps against the prediction:
    python -m bench.scaling.scaling --measure-training --ranks 2 --json scaling.json
what was measured beside the model:
    python -m bench.scaling.scaling --json scaling.json --plot docs/scaling.png

The tables assume an H200 as `GPU` says; `--gpu-steps` takes its place by what bench/step/step.py measured at two batch
sizes or more. The model is bench/scaling/cost.py.
"""

import argparse
import datetime
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from awp_engine.cli.command_line import OneLineParser, fail
from awp_engine.config.presets import build_preset
from awp_engine.files.text import json_text
from awp_engine.train.cost import forward_units
from bench.machine import ROOT, commit, describe_machine, sources_digest
from bench.scaling.cost import (
    ATTACK_STEPS,
    CONTROL_BYTES,
    SYNCED_PASSES,
    Cluster,
    Gpu,
    Line,
    Network,
    describe,
    fit_gpu,
    fit_line,
    largest_share,
    limits,
    memory,
    step,
    step_units,
    strong_efficiency,
    weak_efficiency,
)
from bench.scaling.gloo_times import all_reduce_times
from bench.tables import machine_line, markdown

MODELS = ("preact-resnet-18", "wrn-28-10", "wrn-34-10", "wrn-70-16")
# docs/performance.md's targets for an H200, 12 ms and 100 ms a step: not measured; 10 ms of launches without graphs
GPU = Gpu(rate=450e12, kernel=2e-6, launch=5.5e-6)
# 80% and 90% of NVLink 4 and of the network cards
NVLINK = Line(3e-6, 360e9)
CLUSTERS = (
    Cluster("400 Gbit/s a GPU", 8, NVLINK, Line(10e-6, 45e9)),
    Cluster("100 Gbit/s a node", 8, NVLINK, Line(20e-6, 11.25e9 / 8)),
)
RANKS = tuple(2**k for k in range(11))
GLOBAL_BATCHES = (128, 512, 1024)
BATCH = 128
GLOO_RANKS = (2, 4)
WIDTHS = (16, 64)
TRAINING_BATCH = 128
COMPUTE_BATCHES = (32, 64, 128)
_PROG = "scaling.py"

Result = dict[str, Any]


def model_tables(networks: Sequence[Network], gpu: Gpu) -> str:
    """All that the model says, as Markdown."""
    return "\n\n".join(
        [
            _networks_table(networks, gpu),
            *(_weak_table(networks, gpu, cluster) for cluster in CLUSTERS),
            *(_strong_table(networks, gpu, cluster) for cluster in CLUSTERS),
            _batch_norm_table(networks, gpu),
            _memory_table(networks),
        ]
    )


def _networks_table(networks: Sequence[Network], gpu: Gpu) -> str:
    headings = ["model", "parameters / tensors", "F, GFLOP", "kernels a step", "kept an image", "step, 1 GPU"]
    headings += ["images/s", "gradients"]
    rows = []
    for network in networks:
        seconds, count = step(network, BATCH, 1, gpu, CLUSTERS[0]).seconds, sum(network.parameters)
        rows.append(
            [
                network.name,
                f"{count / 1e6:.2f}M / {network.tensors}",
                f"{sum(network.flops) / 1e9:.4g}",
                f"{network.kernels:,}",
                f"{network.kept * 2 / 1e6:.1f} MB",
                f"{seconds * 1e3:.1f} ms",
                f"{BATCH / seconds:,.0f}",
                f"{2 * count / 1e6:.0f} MB",
            ]
        )
    return markdown(headings, rows)


def _weak_table(networks: Sequence[Network], gpu: Gpu, cluster: Cluster) -> str:
    headings = [cluster.name, "8 GPUs", "64", "1,024", "1,024, local", "images/s, 1,024", "most is lost to"]
    rows = []
    for network in networks:
        alone, most = step(network, BATCH, 1, gpu, CLUSTERS[0]), step(network, BATCH, 1024, gpu, cluster)
        parts = {"gradients": most.gradients, "small all-reduces": most.small}
        largest = max(parts, key=lambda part: parts[part])
        rows.append(
            [
                network.name,
                *(f"{weak_efficiency(network, BATCH, ranks, gpu, cluster):.1%}" for ranks in (8, 64, 1024)),
                f"{weak_efficiency(network, BATCH, 1024, gpu, cluster, ascent_sync='local'):.1%}",
                f"{1024 * BATCH / most.seconds:,.0f}",
                f"{largest}, {parts[largest] * 1e3:.1f} of {alone.seconds * 1e3:.1f} ms",
            ]
        )
    return markdown(headings, rows)


def useful_ranks(network: Network, global_batch: int, gpu: Gpu, cluster: Cluster, least: float = 0.8) -> int:
    """The largest power of two of GPUs that still works at `least` of one GPU's efficiency."""
    fitting = [ranks for ranks in RANKS if ranks <= global_batch]
    good = [r for r in fitting if strong_efficiency(network, global_batch, r, gpu, cluster) >= least]
    return max(good)


def _strong_table(networks: Sequence[Network], gpu: Gpu, cluster: Cluster) -> str:
    headings = [cluster.name, *(f"batch {global_batch:,}" for global_batch in GLOBAL_BATCHES)]
    rows = []
    for network in networks:
        cells = []
        for global_batch in GLOBAL_BATCHES:
            ranks = useful_ranks(network, global_batch, gpu, cluster)
            alone = step(network, global_batch, 1, gpu, cluster)
            now, more = (
                step(network, largest_share(global_batch, count), count, gpu, cluster) for count in (ranks, 2 * ranks)
            )
            efficiency = alone.seconds / (2 * ranks) / more.seconds
            text = f"{ranks} ({now.seconds * 1e3:.1f} ms; {efficiency:.0%}, {limits(alone, 2 * ranks, more)})"
            cells.append(text)
        rows.append([network.name, *cells])
    return markdown(headings, rows)


def _batch_norm_table(networks: Sequence[Network], gpu: Gpu) -> str:
    headings = ["SyncBN, milliseconds a step", "all-reduces", "8 GPUs", "64", "1,024", "of the step at 64"]
    rows = []
    for network in networks:
        costs = []
        for ranks in (8, 64, 1024):
            plain, synced = (
                step(network, BATCH, ranks, gpu, CLUSTERS[0], sync_batch_norm=on).small for on in (False, True)
            )
            costs.append(synced - plain)
        share = costs[1] / step(network, BATCH, 64, gpu, CLUSTERS[0], sync_batch_norm=True).seconds
        count = 2 * len(network.channels) * SYNCED_PASSES
        rows.append([network.name, str(count), *(f"{cost * 1e3:.1f}" for cost in costs), f"{share:.0%}"])
    return markdown(headings, rows)


def _memory_table(networks: Sequence[Network]) -> str:
    parts = list(memory(networks[0], BATCH, 8, sharded=False))
    headings = ["GB a GPU", *parts, "sum", "FSDP2 over 8", "over 1,024"]
    rows = []
    for network in networks:
        held = memory(network, BATCH, 8, sharded=False)
        sharded = [sum(memory(network, BATCH, ranks, sharded=True).values()) for ranks in (8, 1024)]
        values = [*held.values(), sum(held.values()), *sharded]
        rows.append([network.name, *(f"{value / 1e9:.2f}" for value in values)])
    return markdown(headings, rows)


def decode_rate() -> dict[str, float]:
    """Photographs of 500x375 pixels that Pillow decodes a second on one core, and a file's bytes."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    # blurred noise of a few scales takes as many bytes as ImageNet's average file, 110 KB
    scales = [generator.integers(0, 256, (375 // k, 500 // k, 3), dtype=np.uint8) for k in (2, 8, 32)]
    grown = [np.asarray(Image.fromarray(s).resize((500, 375), Image.Resampling.BICUBIC), np.float32) for s in scales]
    weights = (0.3, 0.3, 0.4)
    pixels = sum(w * image for w, image in zip(weights, grown, strict=True))
    encoded = io.BytesIO()
    Image.fromarray(np.asarray(pixels).astype(np.uint8)).save(encoded, "JPEG", quality=92)
    content, times = encoded.getvalue(), []
    for _ in range(50):
        began = time.perf_counter()
        Image.open(io.BytesIO(content)).load()
        times.append(time.perf_counter() - began)
    return {"images_per_second": 1 / statistics.median(times), "bytes": len(content)}


def step_seconds(ranks: int, batch: int, width: int, *, beside: int = 1, ascent_sync: str = "global") -> float:
    """Median over epochs of a training step's seconds, by the trainer itself, one thread a process.

    Args:
        ranks: processes of one run.
        batch: images a step, all ranks together.
        width: of the digits' model.
        beside: runs of this kind at the same time.
        ascent_sync: as the trainer's flag.

    Raises:
        RuntimeError: a run failed; the message ends with what it wrote.
    """
    images = 4 * TRAINING_BATCH
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for index in range(beside):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command += [str(ROOT / "engine" / "train.py"), "digits", "--device", "cpu", "--epochs", "6"]
            command += ["--global-batch-size", str(batch), "--model.width", str(width)]
            command += ["--data.train-limit", str(images), "--run-dir", f"{folder}/{index}"]
            command += ["--evaluation.steps", "1", "--evaluation.held-out-limit", "16", "--evaluation.test-limit", "16"]
            if ranks > 1:
                command += ["--distributed.ascent-sync", ascent_sync]
            output = Path(folder, f"output{index}").open("w+")  # noqa: SIM115 closed with its process
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
            runs.append((process, output))
        for process, output in runs:
            process.wait()
            output.seek(0)
            said = output.read()
            output.close()
            if process.returncode:
                raise RuntimeError(f"{shlex.join(map(str, process.args))} failed: {said[-2000:]}")
        epochs = [
            json.loads(line)["images_per_second"]
            for index in range(beside)
            # the first epoch allocates
            for line in Path(folder, str(index), "metrics.jsonl").read_text().splitlines()[1:]
        ]
    return batch / statistics.median(epochs)


def predict(network: Network, beside: float, line: Line, ascent_sync: str) -> float:
    """Seconds of a step of several processes, from those of as many runs that do not talk.

    Nothing overlaps: each rank's one core both computes and copies.

    Args:
        network: the classifier.
        beside: seconds of a rank's share of the batch with the other cores as busy.
        line: of an all-reduce between so many ranks.
        ascent_sync: as the trainer's flag.
    """
    synced = 2 if ascent_sync == "global" else 1
    small = (8 * sum(network.channels), CONTROL_BYTES)
    return beside + synced * line.seconds(4 * sum(network.parameters)) + sum(map(line.seconds, small))


def measure_compute() -> list[Result]:
    """Steps of one process at several batch sizes."""
    rows: list[Result] = []
    for width in WIDTHS:
        network = digits_model(width)
        rows.append(
            {
                "width": width,
                "parameters": sum(network.parameters),
                "image_flop": forward_units(build_preset("digits")) * sum(network.flops),
                "steps": [(batch, step_seconds(1, batch, width)) for batch in COMPUTE_BATCHES],
            }
        )
        print(json_text(rows[-1]), end="", file=sys.stderr, flush=True)
    return rows


def digits_model(width: int) -> Network:
    """What `--model.width` makes of the digits' preset."""
    return describe("preact-resnet-digits", width=width, image=(1, 8, 8))


def measure_training(ranks: Sequence[int], gloo: Mapping[str, Any]) -> list[Result]:
    """Steps of several ranks, measured and predicted."""
    rows: list[Result] = []
    for width in WIDTHS:
        network = digits_model(width)
        for count in ranks:
            beside = step_seconds(1, TRAINING_BATCH // count, width, beside=count)
            line, _ = fit_line([(n, t) for n, t in gloo[str(count)]])
            for ascent_sync in ("global", "local"):
                rows.append(
                    {
                        "width": width,
                        "parameters": sum(network.parameters),
                        "ranks": count,
                        "ascent_sync": ascent_sync,
                        "beside_seconds": beside,
                        "predicted_seconds": predict(network, beside, line, ascent_sync),
                        "measured_seconds": step_seconds(count, TRAINING_BATCH, width, ascent_sync=ascent_sync),
                    }
                )
                print(json_text(rows[-1]), end="", file=sys.stderr, flush=True)
    return rows


def measured_tables(result: Result) -> str:
    """What was measured on this machine."""
    texts = [machine_line(result)]
    if "gloo" in result:
        rows = []
        for ranks, points in result["gloo"].items():
            line, error = fit_line([(n, t) for n, t in points])
            times = dict(points)
            chosen = [f"{times[size] * 1e3:.2f}" for size in (64, 65536, 1 << 20, 25 << 20)]
            fitted = [f"{line.latency * 1e3:.2f} ms", f"{line.bandwidth / 1e9:.2f} GB/s", f"{error:.0%}"]
            rows.append([f"{ranks} ranks", *chosen, *fitted])
        headings = ["gloo all-reduce, ms", "64 B", "64 KiB", "1 MiB", "25 MiB", "latency", "bytes a second"]
        texts.append(markdown([*headings, "furthest point off"], rows))
    if "decode" in result:
        decode = result["decode"]
        texts.append(
            f"Pillow decodes {decode['images_per_second']:.0f} JPEG files of 500x375 pixels and {decode['bytes']:,} "
            "bytes a second on one core."
        )
    if "compute" in result:
        rows = []
        for row in result["compute"]:
            line, error = fit_line([(n, t) for n, t in row["steps"]])
            steps = [f"{seconds * 1e3:.1f}" for _, seconds in row["steps"]]
            fitted = [f"{line.latency * 1e3:.1f}", f"{1e3 / line.bandwidth:.2f}", f"{error:.0%}"]
            rate = f"{line.bandwidth * row['image_flop'] / 1e9:.1f}"
            rows.append([f"{row['parameters']:,}", *steps, *fitted, rate])
        headings = ["parameters, one process", *(f"batch {n}, ms" for n in COMPUTE_BATCHES), "fixed", "an image"]
        texts.append(markdown([*headings, "furthest point off", "GFLOP/s"], rows))
    if "training" in result:
        rows = [
            [
                f"{row['parameters']:,}",
                str(row["ranks"]),
                row["ascent_sync"],
                *(f"{row[f'{kind}_seconds'] * 1e3:.1f}" for kind in ("beside", "predicted", "measured")),
                f"{row['measured_seconds'] / row['predicted_seconds']:.2f}",
            ]
            for row in result["training"]
        ]
        headings = ["parameters", "ranks", "ascent", "a share alone, ms", "predicted", "measured", "ratio"]
        texts.append(markdown(headings, rows))
    return "\n\n".join(texts)


def plot(networks: Sequence[Network], gpu: Gpu, result: Result | None, path: Path) -> None:
    """Efficiency over the number of GPUs, weak and strong, and the all-reduces measured here."""
    gloo = (result or {}).get("gloo")
    figure = Figure(figsize=(13.5 if gloo else 9, 4.2), layout="constrained")
    panels = figure.subplots(1, 3 if gloo else 2)
    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
    strong_batch = GLOBAL_BATCHES[-1]
    for network, colour in zip(networks, colours, strict=False):
        for cluster, style in zip(CLUSTERS, ("-", "--"), strict=True):
            weak = [100 * weak_efficiency(network, BATCH, ranks, gpu, cluster) for ranks in RANKS]
            strong = [100 * strong_efficiency(network, strong_batch, ranks, gpu, cluster) for ranks in RANKS]
            label = f"{network.name}, {cluster.name}"
            panels[0].plot(RANKS, weak, style, color=colour, label=label)
            panels[1].plot(RANKS, strong, style, color=colour)
    panels[0].set_title(f"{BATCH} images a GPU", loc="left", fontsize=10)
    panels[1].set_title(f"{strong_batch:,} images on all GPUs", loc="left", fontsize=10)
    for axes in panels[:2]:
        axes.set(xscale="log", xlabel="GPUs", ylabel="efficiency in %", ylim=(0, 103))
        axes.set_xticks(RANKS[::2], [f"{ranks:,}" for ranks in RANKS[::2]])
    if gloo:
        for (ranks, points), colour in zip(gloo.items(), colours, strict=False):
            line, _ = fit_line([(n, t) for n, t in points])
            sizes = [n for n, _ in points]
            panels[2].plot(sizes, [t * 1e3 for _, t in points], "o", color=colour, label=f"{ranks} ranks, median")
            panels[2].plot(sizes, [line.seconds(n) * 1e3 for n in sizes], color=colour, label="latency + bytes / rate")
        panels[2].set(xscale="log", yscale="log", xlabel="bytes", ylabel="ms")
        panels[2].set_title("gloo all-reduce, measured", loc="left", fontsize=10)
        panels[2].legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.grid(alpha=0.25, which="major")
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8
    )
    text = f"cost model of an AT-AWP PGD-{ATTACK_STEPS} step, {gpu.rate / 1e12:.0f} TFLOP/s a GPU; not measured on GPUs"
    figure.suptitle(
        text + (f"\ngloo: {machine_line(result)}" if result and gloo else ""), fontsize=9, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=120)


def read_gpu(paths: Sequence[Path]) -> Gpu:
    """The GPU that results of bench/step/step.py are of.

    Raises:
        ValueError: naming the file or the flag.
    """
    points, models = [], set()
    for path in paths:
        try:
            found = json.loads(path.read_text())
            settings, arm = found["settings"], found["arms"][0]
            if (settings["method"], settings["steps"], arm["name"]) != ("at-awp", ATTACK_STEPS, "engine"):
                raise ValueError(f"expected the engine's at-awp step with PGD-{ATTACK_STEPS}")
            points.append((settings["batch_size"], arm["seconds"]["median"]))
            models.add(settings["model"])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}: not a result of bench/step/step.py for an AT-AWP step: {error}") from None
    if len(models) != 1:
        raise ValueError(f"--gpu-steps: expected steps of one model, got {', '.join(sorted(models))}")
    try:
        return fit_gpu(describe(models.pop()), points, GPU.launch)
    except ValueError as error:
        raise ValueError(f"--gpu-steps: {error}") from None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: 2 after one line that names what is wrong.
    """
    parser = OneLineParser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="time gloo's all-reduce and JPEG decoding here")
    parser.add_argument("--measure-training", action="store_true", help="time training steps here; takes minutes")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2], help="of --measure-training: 2, 4, both or none")
    parser.add_argument("--gpu-steps", type=Path, nargs="+", metavar="FILE", help="results of bench/step/step.py")
    parser.add_argument("--json", type=Path, help="what was measured: read if it is there, written after measuring")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="file for the plot")
    arguments = parser.parse_args(argv)
    for ranks in arguments.ranks:
        if ranks not in GLOO_RANKS:
            fail(f"--ranks: expected 2 or 4, got {ranks}", prog=_PROG)
    if (arguments.measure or arguments.measure_training) and arguments.json is None:
        fail("--json: expected a file to keep what is measured, got nothing", prog=_PROG)
    # before minutes of measuring
    for name in ("json", "plot"):
        path = getattr(arguments, name)
        if path is not None and not path.absolute().parent.is_dir():
            fail(f"--{name}: expected a file in a directory that exists, got {str(path)!r}", prog=_PROG)
    return arguments


def read_result(path: Path | None) -> Result | None:
    """What an earlier call measured.

    Raises:
        ValueError: naming the file.
    """
    if path is None or not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        if result["kind"] != "scaling":
            raise ValueError(f"it is a result of kind {result['kind']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--json: {path}: not a result of bench/scaling/scaling.py: {error}") from None
    return result


def measure(arguments: argparse.Namespace, earlier: Result | None) -> Result:
    """`earlier` with what this call measures in its place.

    Raises:
        ValueError: training is to be predicted, and no all-reduce was measured.
    """
    result = dict(earlier or {})
    loads = [*result.get("load_average", {}).values(), os.getloadavg()[0]]
    if arguments.measure:
        result["gloo"] = {str(ranks): all_reduce_times(ranks) for ranks in GLOO_RANKS}
        result["decode"] = decode_rate()
    if arguments.measure_training:
        if "gloo" not in result and arguments.ranks:
            raise ValueError("--measure-training: expected --measure as well, or before: no all-reduce was timed yet")
        result["compute"] = measure_compute()
        if arguments.ranks:
            result["training"] = measure_training(arguments.ranks, result["gloo"])
    loads.append(os.getloadavg()[0])
    told = ["--measure"] if arguments.measure else []
    if arguments.measure_training:
        told += ["--measure-training", "--ranks", *map(str, arguments.ranks)]
    return result | {
        "kind": "scaling",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commands": [*result.get("commands", []), f"python -m bench.scaling.scaling {shlex.join(told)}"],
        "machine": describe_machine("cpu") | {"threads": 1},
        "load_average": {"least": min(loads), "most": max(loads)},
        "commit": commit(),
        "sources_sha256": sources_digest(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    arguments = parse(argv)
    try:
        gpu = read_gpu(arguments.gpu_steps) if arguments.gpu_steps else GPU
        result = read_result(arguments.json)
        if arguments.measure or arguments.measure_training:
            result = measure(arguments, result)
            arguments.json.write_text(json_text(result, indent=1))
    except ValueError as error:
        fail(str(error), prog=_PROG)
    except RuntimeError as error:
        fail(str(error), code=1, prog=_PROG)
    networks = [describe(name) for name in MODELS]
    print(f"{step_units():.0f} F a step; {gpu.rate / 1e12:.0f} TFLOP/s and {gpu.kernel * 1e6:.1f} us a kernel\n")
    print(model_tables(networks, gpu))
    if result is not None:
        print("\n" + measured_tables(result))
    if arguments.plot is not None:
        plot(networks, gpu, result, arguments.plot)


if __name__ == "__main__":
    main()

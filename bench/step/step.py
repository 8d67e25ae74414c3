"""Times one whole training step of several programs that compute the same, and says where the time goes.

    python -m bench.step.step --model wrn-34-10 --batch-size 128 --method at-awp --against both --json step.json
    python -m bench.report step.json

The arms are the engine, the public loop of 2020 (`public`), what plain PyTorch with mixed precision gives in an
afternoon (`eager`), and that with its model under torch.compile (`compile`); see bench/step/arms/. Each has a process
of its own, and they take turns, A B C A B C, so that a noisy neighbour disturbs all of them. The result is the median
over the rounds of the ratio of their times. Images are random and lie on the device; PGD-10, Linf 8/255, step 2/255;
gamma 0.005; SGD 0.1, momentum 0.9, weight decay 5e-4.
"""

import argparse
import datetime
import json
import os
import shlex
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awp_engine.cli.command_line import OneLineParser, fail
from awp_engine.config import ConfigError
from awp_engine.files.text import json_text

METHODS = ("at", "at-awp", "trades-awp")
AGAINST = {
    "none": [],
    "public": ["public"],
    "eager": ["eager"],
    "compile": ["compile"],
    "both": ["public", "eager"],
    "all": ["public", "eager", "compile"],
}
# what the update cannot do without, in fp32: SGD with momentum reads w, g, m and writes w, m
UPDATE_BYTES = 20
_PROG = "step.py"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, extremes and number of some values."""
    lower, _, upper = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "q1": lower,
        "q3": upper,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def forward_flops(settings: Any) -> int:
    """Floating-point operations of one forward pass for one image; a multiplication and an addition count as two."""
    import torch

    from awp_engine.observe import throughput

    with torch.device("meta"):
        model = settings.build_model()
    return throughput.forward_flops(model, settings.image_shape)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: 2 after one line that names what is wrong.
    """
    parser = OneLineParser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="wrn-34-10", help="preact-resnet-18, preact-resnet-digits or wrn-DEPTH-WIDTH"
    )
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--method", default="at-awp", help=", ".join(METHODS))
    parser.add_argument("--against", choices=AGAINST, default="both", help="what the engine is compared with")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one"
    )
    parser.add_argument("--precision", help="of the engine's attack, ascent and descent; the other arms have their own")
    parser.add_argument(
        "--engine", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the engine, such as compile=true"
    )
    parser.add_argument("--repeats", type=int, default=10, help="rounds in which every arm has one turn")
    parser.add_argument("--threads", type=int, help="threads of the CPU; none means torch's choice")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args(argv)
    if arguments.method not in METHODS:
        fail(f"--method: expected one of {', '.join(METHODS)}, got {arguments.method!r}", prog=_PROG)
    for setting in arguments.engine:
        if "=" not in setting:
            fail(f"--engine: expected KEY=VALUE such as compile=true, got {setting!r}", prog=_PROG)
    for name in ("batch_size", "repeats", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            fail(f"--{name.replace('_', '-')}: expected a whole number >= 1, got {value}", prog=_PROG)
    # before minutes of measuring
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        fail(f"--json: expected a file in a directory that exists, got {str(arguments.json)!r}", prog=_PROG)
    return arguments


def command_line(arguments: argparse.Namespace) -> str:
    """The command that gives such a result again, without the file that it was written to."""
    words = ["python -m bench.step.step"]
    for name, value in vars(arguments).items():
        if name != "json" and value not in (None, []):
            text = shlex.join(value) if isinstance(value, list) else value
            words.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(words)


def engine_settings(arguments: argparse.Namespace) -> dict[str, object]:
    """What the engine alone is told, by its dotted names."""
    given: dict[str, object] = {}
    if arguments.precision is not None:
        given = {f"precision.{part}": arguments.precision for part in ("attack", "ascent", "descent")}
    for setting in arguments.engine:
        name, _, text = setting.partition("=")
        try:
            given[name] = json.loads(text)
        except json.JSONDecodeError:
            given[name] = text
    return given


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all arms; the fields of the result file.

    Raises:
        ConfigError: a setting cannot be used.
        ArmError: an arm failed.
    """
    from awp_engine.device import choose_device
    from bench.machine import commit, sources_digest
    from bench.step.arms import Settings, engine_config, necessary_units
    from bench.step.turns import STEPS, WARM_UP, Turns

    device = choose_device(arguments.device).type
    settings = Settings(
        model=arguments.model,
        method=arguments.method,
        batch_size=arguments.batch_size,
        device=device,
        engine=engine_settings(arguments),
    )
    engine_config(settings)
    flops, units = forward_flops(settings), necessary_units(settings)
    work = units * flops * settings.batch_size

    probe = Turns("ceilings", settings, arguments.threads)
    try:
        machine, ceilings = probe.ask("describe"), probe.ask("ceilings")
    finally:
        probe.close()

    names = ["engine", *AGAINST[arguments.against]]
    runners: list[Turns] = []
    rounds: dict[str, list[list[Any]]] = {name: [] for name in names}
    loads: list[float] = []
    prepared: dict[str, Any] = {}
    finished: dict[str, Any] = {}
    convolutions: dict[str, float] | None = None
    try:
        # all import torch meanwhile
        runners += [Turns(name, settings, arguments.threads) for name in names]
        for runner in runners:
            print(f"{runner.name}: building, first steps", file=sys.stderr, flush=True)
            prepared[runner.name] = runner.ask("prepare")
        try:
            for index in range(arguments.repeats):
                for runner in runners:
                    rounds[runner.name].append(runner.ask("turn"))
                loads.append(os.getloadavg()[0])
                last = ", ".join(f"{name} {rounds[name][-1][-1].seconds * 1e3:.1f} ms" for name in names)
                print(f"round {index + 1} of {arguments.repeats}: {last}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            # whole rounds are a result; bench/gpu.sh interrupts what takes too long
            if not loads:
                raise
            rounds = {name: turns[: len(loads)] for name, turns in rounds.items()}
        # an interrupt that comes now would lose what was measured
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for runner in runners:
            finished[runner.name] = runner.ask("finish")
        if len(loads) == arguments.repeats:
            # after an interrupt there is no time for it
            convolutions = runners[0].ask("convolutions")
    finally:
        for runner in runners:
            runner.close()

    return {
        "kind": "step",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(arguments),
        "machine": machine,
        "load_average": {"least": min(loads), "median": statistics.median(loads), "most": max(loads)},
        "commit": commit(),
        "sources_sha256": sources_digest(),
        "settings": vars(settings) | {"repeats": len(loads), "warm_up": WARM_UP[device], "turn": STEPS[device]},
        "work": {
            "forward_gflop_an_image": flops / 1e9,
            "forward_units": units,
            "step_tflop": work / 1e12,
            "floor_seconds": work / 1e12 / max(ceilings["matmul_tflops"].values()),
        },
        "ceilings": ceilings,
        "convolution_seconds": convolutions,
        "arms": [
            arm_result(name, rounds[name], work, prepared[name]["parameters"], ceilings)
            | prepared[name]
            | finished[name]
            for name in names
        ],
        "ratios": {name: ratio(rounds[name], rounds["engine"]) for name in names[1:]},
    }


def arm_result(
    name: str, rounds: list[list[Any]], work: int, parameters: int, ceilings: dict[str, Any]
) -> dict[str, Any]:
    """Times, rates and shares of one arm, over all its timed steps."""
    timings = [timing for turn in rounds for timing in turn]
    seconds = spread([timing.seconds for timing in timings])
    split = [(timing.seconds, timing.components) for timing in timings if timing.components is not None]
    components: dict[str, list[float]] = {}
    for part in dict.fromkeys(part for _, parts in split for part in parts):
        components[part] = [parts.get(part, 0.0) for _, parts in split]
    if split:
        components["other"] = [total - sum(parts.values()) for total, parts in split]
    rate = work / 1e12 / seconds["median"]
    update = statistics.median(components["update"]) if "update" in components else None
    bandwidth = UPDATE_BYTES * parameters / update / 1e9 if update else None
    return {
        "name": name,
        "seconds": seconds,
        "components": {part: spread(values) for part, values in components.items()},
        "tflops": rate,
        "share_of_matmul": {form: rate / most for form, most in ceilings["matmul_tflops"].items()},
        "update_gb_per_s": bandwidth,
        "update_share_of_copy": bandwidth / ceilings["copy_gb_per_s"] if bandwidth else None,
        "rounds": [[timing.seconds for timing in turn] for turn in rounds],
    }


def ratio(other: list[list[Any]], engine: list[list[Any]]) -> dict[str, float]:
    """How many times as long as the engine's a step takes: a ratio a round, and that of all medians."""

    def medians(rounds: list[list[Any]]) -> list[float]:
        return [statistics.median(timing.seconds for timing in turn) for turn in rounds]

    def overall(rounds: list[list[Any]]) -> float:
        return statistics.median(timing.seconds for turn in rounds for timing in turn)

    pairs = zip(medians(other), medians(engine), strict=True)
    return spread([a / b for a, b in pairs]) | {"of_medians": overall(other) / overall(engine)}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    # before torch loads OpenMP, as train.py does: threads that spin while they wait disturb the other arms
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = parse(argv)
    from bench.step.turns import ArmError
    from bench.tables import step_tables

    try:
        result = measure(arguments)
    except (ConfigError, ValueError) as error:
        fail(str(error), prog=_PROG)
    except ArmError as error:
        line, _, trace = str(error).partition("\n")
        print(trace, file=sys.stderr)
        fail(line, code=1, prog=_PROG)
    except KeyboardInterrupt:
        fail("interrupted", code=130, prog=_PROG)
    print(step_tables(result))
    if arguments.json is not None:
        arguments.json.write_text(json_text(result, indent=1))


if __name__ == "__main__":
    main()

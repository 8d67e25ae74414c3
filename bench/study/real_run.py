"""AT and AT-AWP side by side on real images, in a given time: PreActResNet-18, PGD-10, one seed.

    python -m bench.study.real_run cifar10-jpeg.tar.xz --seconds 390 --json real-run.json

The data are a folder, or an archive of one, with train/<class>/ and test/<class>/. Both arms train at once, each in a
process of its own, for as many epochs as the measured times of a step allow; the rate falls after half and three
quarters of them, and PGD-20 on held-out images is measured after each. Where the time is over before that, what both
have reached is compared. Results are written after every epoch. One seed is an illustration.
"""

import argparse
import dataclasses
import datetime
import io
import json
import lzma
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from awp_engine.cli.command_line import OneLineParser, fail
from awp_engine.config import Config, DataConfig
from awp_engine.config.presets import build_preset
from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.text import json_text
from awp_engine.observe.metrics import read_metrics

_PROG = "real_run.py"
ARMS = {"at": 0.0, "at-awp": 0.01}
# start, images, graphs, and the last measurement on the test split
RESERVE_SECONDS = 55.0
# evaluation after each epoch, and the loader
OVERHEAD = 1.08
_CLOSING_SECONDS = 4.0


def run_config(arm: str, arguments: argparse.Namespace, epochs: int) -> Config:
    """What one arm is told: the preset's recipe, shortened."""
    config = build_preset(f"cifar10-preact-resnet18-{arm}")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, name="shards", root=arguments.data),
        awp=dataclasses.replace(config.awp, gamma=ARMS[arm]),
        evaluation=dataclasses.replace(config.evaluation, steps=20, evaluate_every=1, test_limit=2000),
        epochs=epochs,
        seed=0,
        device=arguments.device,
        # at the end; a run of minutes is not resumed
        checkpoint_every=epochs,
        run_dir=arguments.work / arm,
    )
    if not arguments.small:
        return config
    return dataclasses.replace(
        config,
        data=DataConfig(name="shards", root=arguments.data, held_out_fraction=0.2),
        model=dataclasses.replace(config.model, width=8),
        attack=dataclasses.replace(config.attack, steps=2),
        evaluation=dataclasses.replace(config.evaluation, steps=2, held_out_limit=16, test_limit=16),
        global_batch_size=32,
    )


def step_seconds(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of each arm alone: as told, or measured."""
    if arguments.step_ms:
        return {arm: value / 1e3 for arm, value in zip(ARMS, arguments.step_ms, strict=True)}
    from bench.step.arms import Settings
    from bench.step.turns import Turns

    device = arguments.device
    settings = {
        arm: Settings(
            model="preact-resnet-digits" if arguments.small else "preact-resnet-18",
            method=arm,
            batch_size=16 if arguments.small else 128,
            device=device,
        )
        for arm in ARMS
    }
    runners = {arm: Turns("engine", own, None) for arm, own in settings.items()}
    try:
        found = {}
        for arm, runner in runners.items():
            runner.ask("prepare")
            found[arm] = statistics.median(timing.seconds for _ in range(3) for timing in runner.ask("turn"))
        return found
    finally:
        for runner in runners.values():
            runner.close()


def planned_epochs(seconds: float, steps: int, times: dict[str, float]) -> int:
    """How many fit where two processes take turns on the device."""
    return max(1, int(seconds / (steps * sum(times.values()) * OVERHEAD)))


def steps_of(arguments: argparse.Namespace) -> int:
    """Steps of an epoch, from the labels alone."""
    images = len(numpy.load(arguments.data / "train" / "labels-00000.npy", mmap_mode="r"))
    config = run_config("at", arguments, 1)
    kept = images - round(images * config.data.held_out_fraction)
    return -(-kept // config.global_batch_size)


def images_in(data: Path) -> Iterator[tuple[str, str, bytes]]:
    """Part, class and content of every image in a folder, or in an archive of one, which is read as a stream."""
    if data.is_dir():
        for path in sorted(data.glob("t*/*/*")):
            yield path.parts[-3], path.parts[-2], path.read_bytes()
        return
    with tarfile.open(data, "r|*") as archive:
        for member in archive:
            part, label, _ = ["", "", *Path(member.name).parts][-3:]
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                yield part, label, content.read()


def prepare_data(data: Path, root: Path, *, small: bool = False) -> Path:
    """All images, decoded once for both arms, as shards in `root`; files by the ten thousand take some disks minutes.

    Args:
        data: a folder or an archive.
        root: what is written.
        small: some hundred images of each part are enough.

    Raises:
        SystemExit: there are none.
    """
    found: dict[str, list[tuple[str, bytes]]] = {"train": [], "test": []}
    try:
        for part, label, content in images_in(data):
            if part in found:
                found[part].append((label, content))
    except (OSError, tarfile.TarError, lzma.LZMAError) as error:
        fail(f"DATA: {data} cannot be read: {error}", prog=_PROG)
    classes = sorted({label for label, _ in found["train"]})
    if not classes or {label for label, _ in found["test"]} != set(classes):
        fail(f"DATA: expected train/<class>/ and test/<class>/ of the same classes in {data}", prog=_PROG)
    for part, images in found.items():
        chosen = images[:: max(1, len(images) // 100)] if small else images
        (root / part).mkdir(parents=True)
        with ThreadPoolExecutor() as pool:
            pixels = numpy.stack(list(pool.map(lambda image: decoded(image[1]), chosen)))
        numpy.save(root / part / "images-00000.npy", pixels)
        numpy.save(root / part / "labels-00000.npy", numpy.array([classes.index(label) for label, _ in chosen]))
    (root / "classes.json").write_text(json.dumps(classes))
    return root


def decoded(content: bytes) -> numpy.ndarray:
    """uint8 [H, W, C]"""
    return numpy.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def train(arm: str, arguments: argparse.Namespace) -> None:
    """One arm, in its own process, without a command line of its own."""
    from awp_engine.train.trainer import Trainer

    Trainer(run_config(arm, arguments, arguments.epochs)).run()


@dataclasses.dataclass
class _Running:
    """One arm's process, and where it leaves what it says."""

    process: subprocess.Popen[bytes]
    log: Path
    begin: float
    seconds: float | None = None

    def state(self, run_dir: Path) -> dict[str, Any]:
        """What is known of it now."""
        report = run_dir / "report.json"
        code = self.process.poll()
        if code is not None and self.seconds is None:
            self.seconds = time.monotonic() - self.begin
        tail = self.log.read_text(errors="replace").splitlines()[-15:] if code else []
        return {
            "exit_code": code,
            "seconds": self.seconds,
            "epochs": read_metrics(run_dir),
            "report": json.loads(report.read_text()) if report.exists() else None,
            "log_tail": tail,
        }


def start(arm: str, arguments: argparse.Namespace, epochs: int) -> _Running:
    """Begin to train one arm."""
    log = arguments.work / f"{arm}.log"
    words = [sys.executable, "-m", "bench.study.real_run", str(arguments.data), "--device", arguments.device]
    words += ["--arm", arm]
    words += ["--epochs", str(epochs), "--work", str(arguments.work), *(["--small"] if arguments.small else [])]
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    return _Running(process, log, time.monotonic())


def compared(states: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Both arms after as many epochs as both have measured."""
    epochs = min(len(state["epochs"]) for state in states.values())
    names = ("held_out_clean_accuracy", "held_out_pgd_accuracy", "train_pgd_accuracy", "loss")
    last = {arm: {n: s["epochs"][epochs - 1].get(n) for n in names} for arm, s in states.items()} if epochs else {}
    return {"epochs": epochs, "last": last}


def table(result: dict[str, Any]) -> str:
    """What came out, as Markdown."""
    head = "| arm | epochs | held-out clean | held-out PGD-20 | train PGD | test clean | test PGD-20 |"
    lines = [f"{result['data']}, {result['planned_epochs']} epochs planned, seed 0", "", head, "|---" * 7 + "|"]
    for arm, state in result["arms"].items():
        at, report = result["equal_epochs"]["last"].get(arm, {}), state["report"] or {}
        values = [at.get(n) for n in ("held_out_clean_accuracy", "held_out_pgd_accuracy", "train_pgd_accuracy")]
        values += [report.get("clean_accuracy"), report.get(f"pgd{result['pgd_steps']}_accuracy")]
        shown = " | ".join("" if value is None else f"{value:.2%}" for value in values)
        lines.append(f"| {arm} | {len(state['epochs'])} | {shown} |")
        lines += [f"{arm} ended with {state['exit_code']}:", *state["log_tail"]] if state["exit_code"] else []
    return "\n".join(lines)


def conduct(arguments: argparse.Namespace) -> int:
    """Measure, plan, train both arms, write as it goes; 1 if an arm did not come to its end."""
    from bench.machine import commit, describe_machine, sources_digest

    begin = time.monotonic()
    end = begin + arguments.seconds - _CLOSING_SECONDS
    archive = arguments.data
    arguments.data = prepare_data(archive, arguments.work / "images", small=arguments.small)
    print(f"images are there after {time.monotonic() - begin:.1f} s", flush=True)
    times, steps = step_seconds(arguments), steps_of(arguments)
    left = arguments.seconds - (time.monotonic() - begin)
    epochs = arguments.epochs or planned_epochs(left - RESERVE_SECONDS, steps, times)
    result: dict[str, Any] = {
        "kind": "real_run",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "data": "CIFAR-10 (JPEG)" if "cifar10-jpeg" in archive.name else archive.name,
        "machine": describe_machine(arguments.device),
        "commit": commit(),
        "sources_sha256": sources_digest(),
        "small": arguments.small,
        "step_ms": {arm: value * 1e3 for arm, value in times.items()},
        "steps_an_epoch": steps,
        "planned_epochs": epochs,
        "pgd_steps": run_config("at", arguments, epochs).evaluation.steps,
    }
    print(f"{', '.join(f'{arm} {t * 1e3:.1f} ms' for arm, t in times.items())} a step: {epochs} epochs", flush=True)
    running = {arm: start(arm, arguments, epochs) for arm in ARMS}
    seen: list[int] = []
    try:
        while True:
            states = {arm: process.state(arguments.work / arm) for arm, process in running.items()}
            over = time.monotonic() > end or all(state["exit_code"] is not None for state in states.values())
            reached = [len(state["epochs"]) for state in states.values()]
            if reached != seen or over:
                seen = reached
                result |= {"arms": states, "equal_epochs": compared(states), "seconds": time.monotonic() - begin}
                if arguments.json is not None:
                    atomic_write_text(arguments.json, json_text(result, indent=1))
                print(", ".join(f"{arm}: epoch {n}" for arm, n in zip(ARMS, reached, strict=True)), flush=True)
            if over:
                break
            time.sleep(0.2)
    finally:
        for process in running.values():
            if process.process.poll() is None:
                os.killpg(process.process.pid, signal.SIGKILL)
                process.process.wait()
    print(table(result))
    return int(any(state["exit_code"] != 0 for state in result["arms"].values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse; conduct both, or train one."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = OneLineParser(prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA", help="folder or archive of train/<class>/ and test/<class>/")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=390.0, help="for all of it")
    parser.add_argument("--step-ms", type=float, nargs=2, metavar=("AT", "AWP"), help="of a step; none measures them")
    parser.add_argument("--epochs", type=int, help="none means what fits")
    parser.add_argument("--small", action="store_true", help="a small model and few images: a rehearsal")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--work", type=Path, help="folder for images and runs; none means a temporary one")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.arm:
        train(arguments.arm, arguments)
        return 0
    # an end by `timeout` is an interrupt, which leaves no process behind
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as temporary:
        arguments.work = arguments.work or Path(temporary)
        return conduct(arguments)


if __name__ == "__main__":
    sys.exit(main())

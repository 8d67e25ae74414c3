"""Kill, stop and signal real training runs at random moments, and compare what they end with.

python tests/soak/kill_runs.py --kills 500 --json kills.json      SIGKILL, one process
python tests/soak/kill_runs.py --signals 100                      SIGTERM, SIGUSR1, SIGINT, one process
python tests/soak/kill_runs.py --torchrun 50                      SIGKILL and SIGSTOP of one rank of 2 or 4, by torchrun
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import math
import mmap
import os
import random
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import forked

from awp_engine import checkpoint
from awp_engine.cli.command_line import parse_train
from awp_engine.observe.regions import listening

TRAIN = Path(__file__).parents[2] / "engine" / "train.py"
EPOCHS, STEPS = 4, 7  # of a run, of an epoch
# every kind of state that a run has, a save after every step, and a second or two from start to end
SMALL = (
    f"digits --epochs {EPOCHS} --global-batch-size 64 --data.train-limit 400 --data.pad 1 --data.cutout 2 "
    "--data.cutmix 0.5 "
    "--model.width 2 --attack.steps 2 --attack.epsilon 0.05 --awp.gamma 0.005 --average.kind ema --average.decay 0.9 "
    "--average.bn-images 64 --evaluation.steps 2 --evaluation.evaluate-every 1 --evaluation.held-out-limit 64 "
    "--evaluation.test-limit 64 --evaluation.batch-size 16 --checkpoint-steps 1 --deterministic --log-interval 1e-9"
).split()
# of reports and metrics: what the clock says
_TIMES = {"seconds", "images_per_second", "tflops", "share_of_matmul", "memory_gb"}
# one thread, as torchrun's ranks have, and gloo over loopback: the host's own name may resolve to nothing
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}
_REGIONS = ("data", "attack", "ascent", "descent", "update", "average", "evaluation")
_PARTS = ("start", *(part for name in _REGIONS for part in (name, f"after {name}")))
# the ascent has moved the weights, and the update has not begun to put them back
_PERTURBED = ("after ascent", "descent", "after descent")
_LONGEST = 120.0


class RunError(AssertionError):
    """A run that did what it must not; the message says what, and where its output is."""


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a run leaves and that must be the same to the bit: the newest checkpoint, weights, metrics, report."""
    checkpoints = run_dir / "checkpoints"
    folder = checkpoints / (checkpoints / "latest").read_text().strip()
    for name in checkpoint.names(checkpoints):
        if damage := checkpoint.damage(checkpoints / name):
            raise RunError(f"{checkpoints / name}: {damage}")
    found: dict[str, Any] = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    exported = (run_dir / "model.safetensors").read_bytes()
    # safetensors writes metadata in any order
    end = 8 + int.from_bytes(exported[:8], "little")
    found["exported"] = json.loads(exported[8:end]), exported[end:]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [_timeless(line) for line in lines]
    for name, path in (("state", folder / "state.json"), ("report", run_dir / "report.json")):
        found[name] = _timeless(json.loads(path.read_text()))
    return found


def _timeless(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in _TIMES}


def differences(run_dir: Path, whole: dict[str, Any]) -> list[str]:
    """What of a run is not as in an undisturbed one."""
    found = outcome(run_dir)
    return [name for name in sorted(found.keys() | whole.keys()) if found.get(name) != whole.get(name)]


def _require_undisturbed(run_dir: Path, whole: dict[str, Any], after: object) -> None:
    """Raise RunError, with what was done to the run, if it left anything else than `whole`."""
    if differs := differences(run_dir, whole):
        raise RunError(f"{run_dir}: after {after}: other than undisturbed: {differs}")


@contextlib.contextmanager
def _noted(wrong: list[str], run_dir: Path) -> Iterator[None]:
    """A block whose error is added to `wrong`, and whose run is kept then, else removed."""
    try:
        yield
    except (RunError, OSError, ValueError) as error:
        wrong.append(str(error))
    else:
        shutil.rmtree(run_dir)


class Board:
    """Where a run is, in a file that outlives it: written by the run at every part of a step, read by this process."""

    _LAYOUT = struct.Struct("<4q")

    def __init__(self, path: Path) -> None:
        path.touch()
        os.truncate(path, self._LAYOUT.size)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self._LAYOUT.size)

    def write(self, part: str, epoch: int, step: int, updates: int) -> None:
        """`epoch` and `step` as of `Progress`; `updates` ended in this process."""
        self._LAYOUT.pack_into(self._memory, 0, _PARTS.index(part), epoch, step, updates)

    def read(self) -> tuple[str, int, int, int]:
        """What was written last."""
        part, epoch, step, updates = self._LAYOUT.unpack_from(self._memory)
        return _PARTS[part], epoch, step, updates


def _note(board: Board, where: Callable[[], tuple[int, int]]) -> Callable[[str, bool], None]:
    updates = 0

    def note(name: str, begins: bool) -> None:
        nonlocal updates
        updates += name == "update" and not begins
        board.write(name if begins else f"after {name}", *where(), updates)

    return note


def _into(output: Path) -> None:
    """Have this process write its output into a file."""
    with output.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _train(flags: list[str], board: Path, output: Path) -> None:
    """A child: `Trainer.run`, which tells where it is."""
    _into(output)
    import torch

    from awp_engine.train.trainer import Trainer

    torch.set_num_threads(1)
    trainer = Trainer(parse_train(flags))
    where = lambda: (trainer.progress.epoch, trainer.progress.step)  # noqa: E731
    with listening(_note(Board(board), where)):
        trainer.run()


def _train_command(flags: list[str], board: Path, output: Path, environment: dict[str, str], script: Path) -> None:
    """A child: all of train.py, with the signals of a process that a terminal starts."""
    _into(output)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [str(script), *flags]
    with listening(_note(Board(board), lambda: (0, 0))):
        runpy.run_path(str(script), run_name="__main__")


class Run:
    """A training process, forked from a server that has imported everything."""

    def __init__(
        self,
        child: Callable[..., None],
        run_dir: Path,
        *arguments: Any,
        flags: tuple[str, ...] = (),
        given: list[str] | None = None,
    ) -> None:
        self.run_dir = run_dir
        name = f"{run_dir.name}{uuid.uuid4().hex[:4] if arguments else ''}"
        self.output, path = run_dir.with_name(f"{name}.out"), run_dir.with_name(f"{name}.board")
        self.board = Board(path)
        self.board.write("start", 0, 0, 0)
        given = given or [*SMALL, *flags, "--run-dir", str(run_dir)]
        self.began = time.monotonic()
        self.process = forked.context().Process(target=child, args=(given, path, self.output, *arguments), daemon=True)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ended(self, seconds: float) -> bool:
        """Whether it ends by itself within so many seconds of its start."""
        self.process.join(max(self.began + seconds - time.monotonic(), 0))
        return self.process.exitcode is not None

    def kill(self) -> None:
        """SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.join()

    def end(self) -> int:
        """The exit code; a run that hangs is killed, and is an error."""
        if not self.ended(_LONGEST):
            self.kill()
            raise RunError(f"{self.run_dir}: not done after {_LONGEST:g} s, last in {self.board.read()}")
        code = self.process.exitcode
        assert code is not None
        return code

    def said(self) -> str:
        """Its output, and that of the runs before it in its directory."""
        return self.output.read_text() if self.output.exists() else ""


@functools.cache
def undisturbed(run_dir: Path) -> tuple[dict[str, Any], float]:
    """What a run ends with that nobody disturbs, and the seconds that it takes."""
    _require_done(Run(_train, run_dir))
    # again, and timed, now that the server is there
    again = run_dir.with_name(f"{run_dir.name}-again")
    run = Run(_train, again)
    _require_done(run)
    seconds = time.monotonic() - run.began
    whole = outcome(run_dir)
    if differs := differences(again, whole):
        raise RunError(f"{again}: other than the same run before: {differs}")
    return whole, seconds


def _require_done(run: Run) -> None:
    if (code := run.end()) != 0:
        raise RunError(f"{run.run_dir}: exit code {code}\n{run.said()[-3000:]}")


def _saves(run_dir: Path) -> set[str]:
    """Names that a save in progress adds to the checkpoints: half of one, or a whole one that `latest` is behind."""
    directory = run_dir / "checkpoints"
    entries = {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()
    places = {name: place for name in entries if (place := checkpoint.position(name)) is not None}
    latest = places.get((directory / "latest").read_text().strip()) if "latest" in entries else None
    newer = {name for name, place in places.items() if latest is None or place > latest}
    return newer | {name for name in entries if name.startswith(".tmp-")}


def kill(run: Run, steps: int, seconds: float) -> dict[str, Any] | None:
    """SIGKILL a run so many seconds after it made so many steps; returns what that hit, None if it had ended."""
    before = _saves(run.run_dir)
    wait_until(lambda: run.board.read()[-1] >= steps or run.process.exitcode is not None, f"{run.run_dir}: steps")
    run.process.join(seconds)
    if run.process.exitcode is not None:
        return None
    run.kill()
    if run.process.exitcode == 0:
        return None
    part, epoch, step, updates = run.board.read()
    hit = {"after_seconds": round(time.monotonic() - run.began, 3), "after_steps": updates, "part": part}
    return hit | {
        "epoch": epoch,
        "step": step,
        "save": bool(_saves(run.run_dir) - before),
        "perturbed": part in _PERTURBED,
    }


def moment(draw: random.Random, seconds: float) -> tuple[int, float]:
    """When to strike: so many steps after the start, and so many seconds after that.

    Two in three times within a step not far off, else anywhere in a run of so many seconds, or early, at any order of
    magnitude.
    """
    kind = draw.random()
    if kind < 0.15:
        return 0, math.exp(draw.uniform(math.log(0.01), math.log(seconds)))
    if kind < 0.33:
        return 0, draw.uniform(0, seconds)
    return draw.randint(0, STEPS), draw.uniform(0, seconds / (EPOCHS * STEPS))


def kill_runs(kills: int, seed: int, directory: Path, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Kill runs, let each that outlives its kills end, and compare it, until there were so many kills.

    Args:
        kills: how many.
        seed: of the moments.
        directory: for the runs; those that are right are removed.
        tell: progress.

    Returns:
        Every moment, and totals.
    """
    draw = random.Random(seed)
    whole, seconds = undisturbed(directory / "undisturbed")
    moments: list[dict[str, Any]] = []
    wrong: list[str] = []
    runs = 0
    while len(moments) < kills and not wrong:
        runs += 1
        run_dir, hits = directory / f"killed-{runs}", []
        while True:
            run = Run(_train, run_dir)
            hit = kill(run, *moment(draw, seconds)) if len(moments) < kills else None
            if hit is None:
                break
            hits.append(hit)
            moments.append({"run": runs, **hit})
        with _noted(wrong, run_dir):
            _require_done(run)
            _require_undisturbed(run_dir, whole, hits)
        tell(f"{len(moments)} kills, {runs} runs, {len(wrong)} wrong")
    parts = collections.Counter(hit["part"] for hit in moments)
    return {
        "kills": len(moments),
        "runs": runs,
        "wrong": wrong,
        "undisturbed_seconds": round(seconds, 2),
        "during_a_save": sum(hit["save"] for hit in moments),
        "weights_perturbed": sum(hit["perturbed"] for hit in moments),
        "both": sum(hit["save"] and hit["perturbed"] for hit in moments),
        "parts": dict(parts.most_common()),
        "moments": moments,
    }


def _status(pid: int, field: str) -> str:
    with contextlib.suppress(OSError):
        return re.findall(rf"^{field}:\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0]
    return ""


def wait_until(true: Callable[[], Any], what: str, seconds: float = _LONGEST) -> None:
    """Wait, and raise if it takes longer."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise RunError(f"{what}: not within {seconds:g} s")
        time.sleep(0.002)


def handles(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    caught = _status(pid, "SigCgt")
    return bool(caught) and bool(int(caught, 16) >> (number - 1) & 1)


def signal_run(
    run: Run, number: signal.Signals, there: Callable[[str, int], bool], seconds: float
) -> dict[str, Any] | None:
    """Ask a fresh run to stop, so many seconds after `there` is true of its part and updates.

    Returns:
        What that did, None if it had ended.

    Raises:
        RunError: it did not stop within a step, with its exit code and one line.
    """

    def asked() -> bool:
        part, _, _, updates = run.board.read()
        # before its first part a signal ends it at once
        return run.process.exitcode is not None or (part != "start" and there(part, updates))

    wait_until(asked, f"{run.run_dir}: a moment to stop it")
    run.process.join(seconds)
    if run.process.exitcode is not None:
        return None
    # stopped while its place is read: it cannot move on before the signal is there
    os.kill(run.pid, signal.SIGSTOP)
    wait_until(lambda: _status(run.pid, "State")[:1] in "TZ", f"{run.run_dir}: stopping")
    part, _, _, updates = run.board.read()
    os.kill(run.pid, number)
    os.kill(run.pid, signal.SIGCONT)
    code, said = run.end(), run.said()
    if code == 0 and (run.run_dir / "report.json").exists() and part in ("evaluation", "after evaluation"):
        return None
    expected = 130 if number == signal.SIGINT else 75
    lines = [line for line in said.splitlines() if line.startswith("train.py: error: ")]
    pattern = rf"train\.py: error: stopped by {number.name}: (\S+) is written; to go on: python \S+ .*--run-dir \S+"
    found = re.fullmatch(pattern, "\n".join(lines))
    if code != expected or found is None or "Traceback" in said:
        raise RunError(
            f"{run.run_dir}: {number.name} in {part} after {updates} steps: exit code {code}\n{said[-2000:]}"
        )
    place = checkpoint.position(Path(found[1]).name)
    assert place is not None
    saved = place.epoch * STEPS + place.step
    if not updates <= saved <= updates + 1 or checkpoint.damage(Path(found[1])):
        raise RunError(f"{run.run_dir}: {number.name} in {part}, {updates} steps: {found[1]}")
    return {"signal": number.name, "part": part, "updates": updates, "saved": saved, "code": code}


def _after(steps: int, evaluating: bool) -> Callable[[str, int], bool]:
    """Whether a run has made so many steps and, if asked for, is being evaluated."""
    return lambda part, updates: updates >= steps and (part == "evaluation" or not evaluating)


def signal_runs(count: int, seed: int, directory: Path, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Ask runs to stop, one signal each, and let them go on to their end."""
    draw = random.Random(seed)
    whole, seconds = undisturbed(directory / "undisturbed")
    stops: list[dict[str, Any]] = []
    wrong: list[str] = []
    runs = 0
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    step_seconds = seconds / (EPOCHS * STEPS)
    while len(stops) < count and not wrong:
        runs += 1
        run_dir = directory / f"stopped-{runs}"
        number, steps, later = numbers[len(stops) % 3], draw.randrange(EPOCHS * STEPS), draw.uniform(0, step_seconds)
        with _noted(wrong, run_dir):
            stop = signal_run(
                Run(_train_command, run_dir, {}, TRAIN), number, _after(steps, len(stops) % 4 == 3), later
            )
            if stop is not None:
                stops.append(stop)
                _require_done(Run(_train_command, run_dir, {}, TRAIN))
            _require_undisturbed(run_dir, whole, stop)
        tell(f"{len(stops)} stopped, {runs} runs, {len(wrong)} wrong")
    late = collections.Counter(stop["saved"] - stop["updates"] for stop in stops)
    return {
        "stopped": len(stops),
        "runs": runs,
        "wrong": wrong,
        "steps_late": {str(steps): late[steps] for steps in sorted(late)},
        "parts": dict(collections.Counter(stop["part"] for stop in stops).most_common()),
        "stops": stops,
    }


def _serve(pipe: Any) -> None:
    """A child: the store that torchrun keeps for its ranks."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True)
    pipe.send(store.port)
    signal.pause()


def store_server() -> tuple[Any, int]:
    """A process that keeps a store as torchrun does, and its port."""
    context = forked.context()
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    return process, ours.recv()


def ranks(
    world: int,
    run_dir: Path,
    *flags: str,
    script: Path = TRAIN,
    given: list[str] | None = None,
    port: int | None = None,
) -> list[Run]:
    """The processes that torchrun would start, quicker, and restarted by nobody.

    Args:
        world: how many.
        run_dir: of the run.
        flags: beside those of small runs.
        script: what they run.
        given: all arguments, in place of those flags.
        port: of a `store_server`; without one the first rank keeps the store.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(world), **_ENVIRONMENT}
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place["MASTER_PORT"] = str(free.getsockname()[1])
    else:
        place |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return [
        Run(
            _train_command,
            run_dir,
            place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            script,
            flags=flags,
            given=given,
        )
        for rank in range(world)
    ]


FAULTY = """
import os, runpy, sys, time
from awp_engine.observe.regions import listening

kind, rank, after, train, *arguments = sys.argv[1:]
seen = 0

def fault_on_purpose(part, begins):
    global seen
    seen += part == "update"
    if seen == int(after) and os.environ["RANK"] == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        while kind == "hang":
            time.sleep(1)
        raise ValueError("raised on purpose")

sys.argv = [train, *arguments]
with listening(fault_on_purpose):
    runpy.run_path(train, run_name="__main__")
"""


class Torchrun:
    """A job of several ranks, with everything that it leaves behind ended at the end of a `with` block."""

    def __init__(self, world: int, output: Path, *flags: str, restarts: int = 3, script: Path = TRAIN) -> None:
        self.world, self.output = world, output
        self._mark = f"KILL_RUNS={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        with output.open("ab") as file:
            self.process = subprocess.Popen(
                [*command, f"--max-restarts={restarts}", str(script), *flags],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | _ENVIRONMENT | {name: value},
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.process.pid, *self.all_ranks()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _marked(self) -> Iterator[tuple[int, dict[str, str]]]:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    text = (entry / "environ").read_bytes().decode(errors="replace")
                    fields = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
                    if self._mark in text and int(entry.name) != self.process.pid:
                        yield int(entry.name), fields

    def all_ranks(self) -> list[int]:
        """Processes of this job that are alive, torchrun's own left out."""
        return [pid for pid, _ in self._marked() if _status(pid, "State")[:1] != "Z"]

    def ranks(self) -> dict[int, int]:
        """Rank -> process, once all are there."""
        found = {int(fields["RANK"]): pid for pid, fields in self._marked() if "RANK" in fields}
        return found if len(found) == self.world else {}

    def wait_ranks(self, other_than: dict[int, int], seconds: float = _LONGEST) -> dict[int, int]:
        """The ranks, all of them new ones; nothing if the job ends."""
        found: dict[int, int] = {}

        def there() -> bool:
            found.clear()
            found.update(self.ranks())
            new = len(found) == self.world and not set(found.values()) & set(other_than.values())
            return new or self.process.poll() is not None

        wait_until(there, f"{self.output}: new ranks", seconds)
        return found if self.process.poll() is None else {}

    def said(self) -> str:
        """What all of it wrote."""
        return self.output.read_text()

    def steps(self) -> int:
        """How many steps the first rank has logged, over all restarts."""
        return self.said().count(" img/s ")

    def wait_steps(self, count: int) -> None:
        """Until so many steps were logged, or the job has ended."""
        wait_until(lambda: self.steps() >= count or self.process.poll() is not None, f"{self.output}: {count} steps")

    def end(self, seconds: float = _LONGEST) -> int:
        """The exit code; a job that hangs is an error."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RunError(f"{self.output}: not done after {seconds:g} s\n{self.said()[-3000:]}") from None


# two epochs, as starting the ranks takes longest; the watchdog waits 5 seconds
RANKS = ("--epochs", "2", "--distributed.timeout", "5")


def disturb(job: Torchrun, draw: random.Random, faults: int) -> list[dict[str, Any]]:
    """SIGKILL or SIGSTOP a rank of a job, so many times; returns what was done, and how long a restart took.

    Raises:
        RunError: no restart and no end within 60 seconds.
    """
    done: list[dict[str, Any]] = []
    ranks: dict[int, int] = {}
    for _ in range(faults):
        ranks = job.wait_ranks(other_than=ranks)
        if not ranks:
            break
        before = job.steps()
        rank, number = draw.randrange(job.world), draw.choice([signal.SIGKILL, signal.SIGSTOP])
        # most faults meet training, some the start, in which nobody watches yet for ranks that stand still
        if number == signal.SIGSTOP or draw.random() < 0.8:
            job.wait_steps(before + draw.randint(1, STEPS))
            time.sleep(draw.uniform(0, 0.1))
        else:
            time.sleep(draw.uniform(0, 4))
        if job.process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[rank], number)
        began = time.monotonic()
        steps = job.steps()
        job.wait_ranks(other_than=ranks, seconds=60)
        done.append(
            {
                "fault": number.name,
                "rank": rank,
                "step": steps,
                "restart_seconds": round(time.monotonic() - began, 1),
            }
        )
    return done


def _job(number: int, draw: random.Random, world: int, run_dir: Path) -> list[dict[str, Any]]:
    """One disturbed job, to its end; one in five has a rank that hangs, or raises, by itself."""
    output, flags = run_dir.with_suffix(".out"), [*SMALL, *RANKS, "--run-dir", str(run_dir)]
    kind = {3: "hang", 4: "raise"}.get(number % 10, "signal")
    if kind == "signal":
        with Torchrun(world, output, *flags) as job:
            faults = disturb(job, draw, draw.choice([1, 1, 2]))
            _require_ended(job, faults)
        return faults
    script = run_dir.with_suffix(".py")
    script.write_text(FAULTY)
    rank, after = draw.randrange(world), draw.randint(2, 2 * STEPS)
    began = time.monotonic()
    with Torchrun(world, output, kind, str(rank), str(after), str(TRAIN), *flags, script=script) as job:
        first = job.wait_ranks({})
        job.wait_ranks(first)
        seconds = time.monotonic() - began
        fault = {"fault": kind, "rank": rank, "step": after, "start_and_restart_seconds": round(seconds, 1)}
        _require_ended(job, [fault])
        for words in ["fault_on_purpose", f"because of rank {rank} (runs" if kind == "hang" else "raised on purpose"]:
            if words not in job.said():
                raise RunError(f"{run_dir}: {fault}: {words!r} was not said\n{job.said()[-3000:]}")
    return [fault]


def _require_ended(job: Torchrun, faults: list[dict[str, Any]]) -> None:
    if (code := job.end()) != 0:
        raise RunError(f"{job.output}: exit code {code} after {faults}\n{job.said()[-3000:]}")
    if left := job.all_ranks():
        raise RunError(f"{job.output}: processes are left: {left}")


def undisturbed_ranks(world: int, run_dir: Path) -> dict[str, Any]:
    """What a run of so many ranks ends with that nobody disturbs."""
    for run in ranks(world, run_dir, *RANKS):
        _require_done(run)
    return outcome(run_dir)


def torchrun_runs(count: int, seed: int, directory: Path, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Disturb jobs of 2 and, one in five times, 4 ranks, and compare what they end with."""
    draw = random.Random(seed)
    whole: dict[int, dict[str, Any]] = {}
    jobs: list[dict[str, Any]] = []
    wrong: list[str] = []
    while len(jobs) < count and not wrong:
        number = len(jobs) + 1
        world = 4 if number % 5 == 0 else 2
        run_dir = directory / f"disturbed-{number}"
        began = time.monotonic()
        with _noted(wrong, run_dir):
            if world not in whole:
                whole[world] = undisturbed_ranks(world, directory / f"undisturbed-{world}")
            faults = _job(number, draw, world, run_dir)
            _require_undisturbed(run_dir, whole[world], faults)
            jobs.append({"ranks": world, "seconds": round(time.monotonic() - began, 1), "faults": faults})
            tell(f"{len(jobs)} jobs, {jobs[-1]}")
    faults = [fault for job in jobs for fault in job["faults"]]
    return {
        "jobs": len(jobs),
        "faults": dict(collections.Counter(fault["fault"] for fault in faults)),
        "wrong": wrong,
        "longest_end_or_restart_seconds": max((fault.get("restart_seconds", 0) for fault in faults), default=0),
        "disturbed": jobs,
    }


@dataclasses.dataclass(frozen=True)
class _Kind:
    run: Callable[..., dict[str, Any]]
    help: str


_KINDS = {
    "kills": _Kind(kill_runs, "SIGKILL one process so many times"),
    "signals": _Kind(signal_runs, "ask so many runs of one process to stop"),
    "torchrun": _Kind(torchrun_runs, "kill or stop ranks of so many torchrun jobs"),
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind in _KINDS.items():
        parser.add_argument(f"--{name}", type=int, default=0, help=kind.help)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; what they hit depends on the machine")
    parser.add_argument("--json", type=Path, help="where to write every moment and the totals")
    parser.add_argument("--directory", type=Path, help="for the runs; what goes wrong stays there")
    arguments = parser.parse_args()
    os.environ.update(_ENVIRONMENT)
    directory = arguments.directory or Path(tempfile.mkdtemp(prefix="kill-runs-"))
    directory.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    failed: list[str] = []
    for name, kind in _KINDS.items():
        count = getattr(arguments, name)
        if not count:
            continue
        began = time.monotonic()
        found = kind.run(count, arguments.seed, directory, lambda line: print(line, flush=True))
        repeat = f"python tests/soak/kill_runs.py --{name} {count} --seed {arguments.seed}"
        results[name] = {"repeat": repeat, "wall_seconds": round(time.monotonic() - began), **found}
        summary = {key: value for key, value in results[name].items() if not isinstance(value, list)}
        print(json.dumps(summary, indent=1))
        if found["wrong"]:
            print(*found["wrong"], sep="\n", file=sys.stderr)
            failed.append(repeat)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results) + "\n")
    if failed:
        raise SystemExit(f"what went wrong is in {directory}; to do so again: {'; '.join(failed)}")
    if arguments.directory is None:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()

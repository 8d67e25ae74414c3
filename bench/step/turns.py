"""One process an arm, and the processes take turns: neither torch's settings nor a memory peak are shared."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from awp_engine.data import Augmentation, Batch, Split, train_batches
from awp_engine.observe.regions import region
from bench.clocks import StepClock, Timing
from bench.machine import describe_machine
from bench.step.arms import ARMS, NUM_CLASSES, Settings, engine_config
from bench.step.arms.engine import EngineArm
from bench.step.ceilings import measure_ceilings
from bench.step.convolutions import convolution_seconds

# images made, in batches; several, so that no batch is in a cache from its last use
_SET_BATCHES = 50
# steps before the timed ones: compilation, choice of convolutions, capture of graphs
WARM_UP = {"cpu": 2, "cuda": 6}
# timed steps of a turn
STEPS = {"cpu": 1, "cuda": 3}


class ArmError(RuntimeError):
    """An arm could not do what it was asked; the message is one line."""


def random_batches(settings: Settings) -> Iterator[Batch]:
    """Endless batches of a random set, made once and kept on the device as uint8, without augmentation."""
    generator = torch.Generator().manual_seed(0)
    size = _SET_BATCHES * settings.batch_size
    split = Split(
        images=torch.randint(0, 256, (size, *settings.image_shape), dtype=torch.uint8, generator=generator),
        labels=torch.randint(0, NUM_CLASSES, (size,), generator=generator),
        ids=torch.arange(size),
    ).to(torch.device(settings.device))
    for epoch in count(1):
        yield from train_batches(split, Augmentation(), batch_size=settings.batch_size, seed=0, epoch=epoch)


def _status(field: str) -> int:
    """Bytes that Linux reports of this process: VmRSS is its resident memory now, VmHWM the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) << 10


class _Memory:
    """The most memory that an arm holds.

    CUDA: what torch's allocator has handed out. A CUDA graph's memory shows while it is captured, in the warm-up. CPU:
    resident memory of the process, less what it had before data and model were made (interpreter, torch, libraries).
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.base = 0 if self.cuda else _status("VmRSS")
        self.warm_up = 0

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM") - self.base

    def end_warm_up(self) -> None:
        """Begin anew with what is held now."""
        self.warm_up = self._peak()
        self.reset = True
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.reset = False

    def report(self) -> dict[str, int | None]:
        """Bytes."""
        timed = self._peak()
        return {
            "peak_bytes": max(timed, self.warm_up),
            "peak_bytes_timed": timed if self.reset else None,
            "reserved_bytes": torch.cuda.max_memory_reserved() if self.cuda else None,
            "base_bytes": self.base,
        }


class _Worker:
    """What runs in the process of its own: one arm, or with the name "ceilings" the measurement of the machine."""

    def __init__(self, name: str, settings: Settings, threads: int | None) -> None:
        self.name, self.settings = name, settings
        if threads is not None:
            torch.set_num_threads(threads)
        self.index = 0

    def describe(self) -> dict[str, Any]:
        return describe_machine(self.settings.device)

    def ceilings(self) -> dict[str, object]:
        return measure_ceilings(self.settings.device).to_json()

    def prepare(self) -> dict[str, Any]:
        """Builds the arm and warms it up."""
        device = self.settings.device
        self.memory = _Memory(device)
        self.batches = random_batches(self.settings)
        self.arm = ARMS[self.name](self.settings, self.settings.build_model())
        self.clock = StepClock(device)
        times = [self.clock.run(self.step) for _ in range(WARM_UP[device])]
        self.memory.end_warm_up()
        return {
            "first_step_seconds": times[0],
            "warm_up_seconds": sum(times),
            "parameters": sum(parameter.numel() for parameter in self.arm.model.parameters()),
            "torch_settings": {
                "cudnn.benchmark": torch.backends.cudnn.benchmark,
                "cudnn.allow_tf32": torch.backends.cudnn.allow_tf32,
                "float32_matmul_precision": torch.get_float32_matmul_precision(),
            },
        }

    def step(self) -> None:
        self.arm.step(self._batch(), self.index)
        self.index += 1

    def _batch(self) -> Batch:
        with region("data"):
            batch = next(self.batches)
            return batch._replace(images=batch.images.contiguous(memory_format=self.arm.memory_format))

    def turn(self) -> list[Timing]:
        return self.clock.time(self.step, STEPS[self.settings.device])

    def convolutions(self) -> dict[str, float] | None:
        """Those of the engine's step: see `convolution_seconds`; None where it is compiled, and calls no layers."""
        arm = self.arm
        assert isinstance(arm, EngineArm)
        if engine_config(self.settings).compile is True:
            return None
        return convolution_seconds(lambda: arm.plainly(self._batch(), self.index), self.settings.device)

    def finish(self) -> dict[str, Any]:
        """Memory, and whether weights and statistics are still numbers."""
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in self.arm.model.state_dict().values())
        return {"memory": self.memory.report(), "finite": finite, "steps_made": self.index}


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # an interrupt is the parent's affair
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = make(*arguments)
    while True:
        try:
            request = connection.recv()
            try:
                answer = (getattr(worker, request)(), None, None)
            except Exception as error:
                answer = (None, f"{type(error).__name__}: {error}", traceback.format_exc())
            connection.send(answer)
        except (EOFError, OSError):
            # the parent has gone
            return


class Turns:
    """The parent's hold on one process.

    Args:
        name: of the arm.
        settings: of the step.
        threads: OpenMP's; None leaves them.
        worker: what does the work there, made of (name, settings, threads).
    """

    def __init__(self, name: str, settings: Any, threads: int | None, worker: Callable[..., Any] = _Worker) -> None:
        self.name = name
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)
        # fork would share the parent's memory
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # not a daemon: those may not have the children that torch.compile starts
        self._process = context.Process(target=_serve, args=(theirs, worker, (name, settings, threads)))
        self._process.start()
        self._waiting = False
        theirs.close()

    def ask(self, request: str) -> Any:
        """Have the worker do one thing, and wait for it.

        Raises:
            ArmError: it failed, or its process is gone.
        """
        try:
            if self._waiting:
                # an interrupt came before the last answer
                self._connection.recv()
            self._connection.send(request)
            self._waiting = True
            result, error, trace = self._connection.recv()
            self._waiting = False
        except (EOFError, OSError):
            self._process.join(5)
            raise ArmError(
                f"{self.name}: its process ended with code {self._process.exitcode} (-9: killed, mostly for memory)"
            ) from None
        if error is not None:
            raise ArmError(f"{self.name}: {error}\n{trace}")
        return result

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()

"""Programs in processes of their own, forked from one that has imported what all of them import: seconds saved each.

A process as a user starts it, with its imports, is had in the tests of the command line, of examples and of signals.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

# the server imports these once and computes nothing: OpenMP has no threads there to lose
_PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "awp_engine.train.trainer",
    "awp_engine.evaluation",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "tensorboard.summary.writer.record_writer",
    "tensorboard.plugins.text.summary_v2",
]


def context() -> Any:
    """Of `multiprocessing`, whose processes are forked from that server."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(_PRELOADED)
    return found


class Program:
    """One that runs, as `subprocess.Popen([sys.executable, *arguments], text=True)` does, with one thread.

    Args:
        arguments: a script or `-m` and a module or `-c` and code, and theirs.
        cwd: to start in; this process's.
        env: its whole environment; this process's. What the interpreter reads at its start has no effect.
    """

    def __init__(self, *arguments: object, cwd: str | Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self._given = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("out", "err")]
        place = str(cwd or Path.cwd()), dict(os.environ if env is None else env), self._outputs
        self.process = context().Process(target=_child, args=(self._given, *place), daemon=True)
        self.process.start()

    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.exitcode is None

    def said(self) -> tuple[str, str]:
        """What it has written so far, to either stream."""
        out, err = (path.read_text() if path.exists() else "" for path in self._outputs)
        return out, err

    def end(self, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """Its end, within so many seconds.

        Raises:
            AssertionError: it has not ended in time, and is killed; with what it said.
        """
        self.process.join(timeout)
        late = self.runs()
        self.process.kill()
        self.process.join()
        said = self.said()
        self._folder.cleanup()
        assert not late, f"{self._given}: not done after {timeout:g} s\n{said[0]}\n{said[1]}"
        return subprocess.CompletedProcess([sys.executable, *self._given], self.process.exitcode, *said)

    def kill(self) -> None:
        """SIGKILL, which it must not have ended before."""
        self.process.kill()
        assert self.end().returncode == -signal.SIGKILL


def run(*arguments: object, timeout: float = 240, **place: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`; see `Program`."""
    return Program(*arguments, **place).end(timeout)


def _child(given: list[str], cwd: str, environment: dict[str, str], outputs: list[Path]) -> NoReturn:
    import torch

    for number, path in enumerate(outputs, 1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _program(given)
    finally:
        # multiprocessing leaves this out
        atexit._run_exitfuncs()
    sys.exit(0)


def _program(given: list[str]) -> None:
    if given[0] == "-m":
        sys.argv, sys.path[0:0] = given[1:], [""]
        runpy.run_module(given[1], run_name="__main__", alter_sys=True)
    elif given[0] == "-c":
        sys.argv, sys.path[0:0] = ["-c", *given[2:]], [""]
        exec(compile(given[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0:0] = given, [str(Path(given[0]).parent)]
        runpy.run_path(given[0], run_name="__main__")

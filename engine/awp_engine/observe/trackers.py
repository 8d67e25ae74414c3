"""Where a run's numbers go beside metrics.jsonl: `--log tensorboard wandb mlflow trackio`.

wandb, mlflow and trackio live in a process each (`tracker_process.py`), which a lane writes to: an import that takes
seconds, a network that hangs or a client that crashes costs the training nothing but one warning.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from awp_engine.config import ConfigError
from awp_engine.files.atomic import atomic_write_text
from awp_engine.files.text import one_line
from awp_engine.observe.lane import Lane
from awp_engine.observe.tensorboard import TensorBoard

# of a service that is imported, and then answers whether it can be used
_CHECK_SECONDS = 60.0
_PROCESS = Path(__file__).with_name("tracker_process.py")
# module -> what pip installs
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny", "trackio": "trackio"}


class Tracker(Protocol):
    """One place that numbers go to; no call waits but `close`, and none raises."""

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        """Take an epoch's numbers."""
        ...

    def finish(self, epoch: int, values: Mapping[str, float], files: Sequence[Path]) -> None:
        """Take the report's numbers, and its files: JSON and PNG."""
        ...

    def close(self, seconds: float) -> None:
        """Wait for what is still to be written, `seconds` at most."""
        ...


def _start_process(name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        # -P: modules beside it have names of the standard library
        [sys.executable, "-P", str(_PROCESS), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # a Ctrl-C at the terminal is not for it, and it may send what is left after the training has ended
        start_new_session=True,
    )


def require_trackers(names: Sequence[str]) -> None:
    """Make sure, before hours of training, that every service of `--log` can be used.

    Raises:
        ConfigError: a package is missing or broken, or nobody is logged in.
    """
    missing = [name for name in names if name in _PACKAGES and importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(_PACKAGES[name] for name in missing)
        raise ConfigError(f"--log {' '.join(missing)}: not installed; pip install {packages}, or leave it out")
    for name in names:
        if name not in _PACKAGES:
            continue
        with _start_process(name) as process:
            try:
                answer, _ = process.communicate(json.dumps({"do": "check"}) + "\n", timeout=_CHECK_SECONDS)
                problem = json.loads(answer).get("error")
            except subprocess.TimeoutExpired:
                process.kill()
                problem = f"does not answer within {_CHECK_SECONDS:.0f} s"
            except ValueError:
                problem = f"its process ended with code {process.wait()}"
        if problem:
            raise ConfigError(f"--log {name}: {one_line(problem)}")


class ServiceTracker:
    """wandb, mlflow or trackio in a process of its own, which goes on with the run that the directory names.

    Nothing waits for an answer: what the process was told it does, even where the training has ended meanwhile.

    Args:
        name: of the service.
        run_dir: keeps `NAME.json`, which says the service's own name of the run, and where it is.
        config: the run's settings.
        warn: is told, in a line, of what was lost.
    """

    def __init__(self, name: str, run_dir: Path, config: dict[str, Any], warn: Callable[[str], None]) -> None:
        self._name, self._path, self._config, self._warn = name, run_dir / f"{name}.json", config, warn
        self._process: subprocess.Popen[str] | None = None
        self._finished, self._ended = False, threading.Event()
        self._lane = Lane(name, warn)
        self._lane.put(self._start)

    def _start(self) -> None:
        try:
            run = json.loads(self._path.read_text())["run"]
        except (OSError, ValueError, TypeError, KeyError):
            run = None
        self._process = _start_process(self._name)
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        self._tell("start", run_dir=str(self._path.parent.absolute()), config=self._config, run=run)

    def _tell(self, do: str, **more: Any) -> None:
        # why it has ended says `_listen`
        with contextlib.suppress(BrokenPipeError):
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
                self._process.stdin.flush()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        """What the process answers, on a thread of its own."""
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                answer = json.loads(line)
                problem = answer.get("error")
                if "run" in answer:
                    try:
                        atomic_write_text(self._path, line)
                    except OSError as error:
                        problem = str(error)
                if problem:
                    self._lost(one_line(problem))
        if code := process.wait():
            self._lost(f"its process ended with code {code}")
        self._ended.set()

    def _lost(self, why: str) -> None:
        self._warn(f"{self._name}: cannot be written, training goes on: {why}")

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        """Hand on an epoch's numbers; never waits."""
        self._lane.put(self._tell, "log", epoch=epoch, values=dict(values))

    def finish(self, epoch: int, values: Mapping[str, float], files: Sequence[Path]) -> None:
        """Hand on the report; never waits."""
        self._finished = True
        paths = [str(path.absolute()) for path in files]
        self._lane.put(self._tell, "finish", epoch=epoch, values=dict(values), files=paths)

    def close(self, seconds: float) -> None:
        """End the service's run; where that takes longer, its process goes on alone."""
        self._lane.put(self._end)
        if self._lane.close(seconds) and self._process is not None and not self._ended.wait(seconds):
            self._warn(f"{self._name}: takes longer than the training; its process ends alone, in minutes")

    def _end(self) -> None:
        self._tell("close", done=self._finished)
        with contextlib.suppress(BrokenPipeError):
            if self._process is not None and self._process.stdin is not None:
                self._process.stdin.close()


def open_trackers(
    names: Sequence[str], run_dir: Path, start_epoch: int, config_text: str, warn: Callable[[str], None]
) -> list[Tracker]:
    """Those of `--log`.

    Args:
        names: of tensorboard, wandb, mlflow and trackio.
        run_dir: of the run.
        start_epoch: epochs done before.
        config_text: the settings, JSON.
        warn: is told, in a line, of what was lost.
    """
    trackers: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            trackers.append(TensorBoard(run_dir / "tensorboard", start_epoch, config_text, warn))
        elif name in _PACKAGES:
            trackers.append(ServiceTracker(name, run_dir, json.loads(config_text), warn))
    return trackers

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

    Args:
        name: of the service.
        run_dir: keeps `NAME.json`, which says the service's own name of the run, and where it is.
        config: the run's settings.
        warn: is told, in a line, of what was lost.
    """

    def __init__(self, name: str, run_dir: Path, config: dict[str, Any], warn: Callable[[str], None]) -> None:
        self._name, self._run_dir, self._config = name, run_dir, config
        self._process: subprocess.Popen[str] | None = None
        self._finished = False
        self._lane = Lane(name, warn)
        self._lane.put(self._start)

    def _start(self) -> None:
        path = self._run_dir / f"{self._name}.json"
        try:
            run = json.loads(path.read_text())["run"]
        except (OSError, ValueError, TypeError, KeyError):
            run = None
        self._process = _start_process(self._name)
        where = self._run_dir.absolute()
        try:
            found = self._ask("start", run_dir=str(where), config=self._config, run=run)
        except Exception:
            self._leave()
            raise
        atomic_write_text(path, json.dumps(found) + "\n")

    def _ask(self, do: str, **more: Any) -> dict[str, Any]:
        # where it did not start, that was said
        if self._process is None:
            return {}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"its process ended with code {self._process.wait()}")
        if problem := json.loads(line).get("error"):
            raise RuntimeError(one_line(problem))
        return json.loads(line)

    def add(self, epoch: int, values: Mapping[str, float]) -> None:
        """Hand on an epoch's numbers; never waits."""
        self._lane.put(self._ask, "log", epoch=epoch, values=dict(values))

    def finish(self, epoch: int, values: Mapping[str, float], files: Sequence[Path]) -> None:
        """Hand on the report; never waits."""
        self._finished = True
        paths = [str(path.absolute()) for path in files]
        self._lane.put(self._ask, "finish", epoch=epoch, values=dict(values), files=paths)

    def close(self, seconds: float) -> None:
        """End the service's run; where that takes longer, its process goes on alone."""
        self._lane.put(self._end)
        self._lane.close(seconds)

    def _end(self) -> None:
        try:
            self._ask("close", done=self._finished)
        finally:
            self._leave()

    def _leave(self) -> None:
        """Wait for the process to end, which it does when nothing can come any more."""
        process, self._process = self._process, None
        # it may have ended before
        with contextlib.suppress(BrokenPipeError):
            if process is not None:
                process.__exit__(None, None, None)


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

"""A process that hands a run's numbers to wandb, mlflow or trackio; `observe/trackers.py` starts it and talks to it.

It imports nothing of this package, reads a JSON object a line on standard input and answers each with one: whatever the
service's client prints, waits for or dies of stays in here.
"""

import contextlib
import importlib.util
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

_PROJECT = "awp-engine"
# for what is still to be sent when the training has ended
_LAST_SECONDS = 600.0
# of params in one call of mlflow
_MOST_PARAMS = 100


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


class Service:
    """What the three have in common.

    Args:
        run_dir: of the training.
        config: its settings.
        run: the service's own name of a run to go on with.

    Attributes:
        identity: the service's name of the run, and where it is.
    """

    identity: dict[str, str]

    def __init__(self, run_dir: Path, config: dict[str, Any], run: str | None) -> None: ...

    @staticmethod
    def check() -> str | None:
        """What is missing, None where nothing is; an import that fails says it too."""

    def log(self, epoch: int, values: dict[str, float]) -> None:
        """Take an epoch's numbers."""

    def finish(self, epoch: int, values: dict[str, float], files: Sequence[Path]) -> None:
        """Take the numbers and files of the report."""

    def close(self, *, done: bool) -> None:
        """End the service's run; `done`: the training came to its end."""


class _Wandb(Service):
    """Weights & Biases; online, or offline as WANDB_MODE or `wandb offline` says."""

    @staticmethod
    def check() -> str | None:
        """What is missing, None where nothing is: asking for a key would wait for somebody to type it."""
        wandb: Any = import_module("wandb")

        # another mode needs no account, and a network that is down must not keep a run from going on
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            return "not logged in: run `wandb login`, or set WANDB_MODE=offline and later run `wandb sync`"
        return None

    def __init__(self, run_dir: Path, config: dict[str, Any], run: str | None) -> None:
        wandb: Any = import_module("wandb")

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.name),
            dir=run_dir,
            id=run or os.environ.get("WANDB_RUN_ID"),
            resume="allow" if run else None,
            config=config,
            settings=wandb.Settings(console="off", silent=True),
            # a resumed run may change its device, say
            allow_val_change=True,
        )
        self.identity = {"run": self._run.id, "where": self._run.url or str(Path(self._run.dir).parent)}

    def log(self, epoch: int, values: dict[str, float]) -> None:
        self._run.log(values, step=epoch)

    def finish(self, epoch: int, values: dict[str, float], files: Sequence[Path]) -> None:
        self._run.summary.update(values)
        images = {path.stem: self._wandb.Image(str(path)) for path in files if path.suffix == ".png"}
        if images:
            self._run.log(images, step=epoch)

    def close(self, *, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class _Mlflow(Service):
    """MLflow: at MLFLOW_TRACKING_URI, or in the run directory: a database, or files where mlflow-skinny has none."""

    @staticmethod
    def check() -> str | None:
        import_module("mlflow")
        return None

    def __init__(self, run_dir: Path, config: dict[str, Any], run: str | None) -> None:
        store = os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None
        if store is None:
            folder = run_dir.absolute() / "mlflow"
            folder.mkdir(exist_ok=True)
            if importlib.util.find_spec("sqlalchemy") and importlib.util.find_spec("alembic"):
                store, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
            else:
                os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
                store = folder.as_uri()
        client = self._client = import_module("mlflow").MlflowClient(tracking_uri=store)
        if run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
            found = client.get_experiment_by_name(name)
            experiment = client.create_experiment(name, artifacts) if found is None else found.experiment_id
            run = client.create_run(experiment, run_name=run_dir.name).info.run_id
            params = list(_flat(config).items())
            for start in range(0, len(params), _MOST_PARAMS):
                client.log_batch(run, params=[self._param(*pair) for pair in params[start : start + _MOST_PARAMS]])
        else:
            client.update_run(run, status="RUNNING")
        self._run, self.identity = run, {"run": run, "where": store}

    @staticmethod
    def _param(key: str, value: object) -> Any:
        return import_module("mlflow.entities").Param(key, str(value))

    def log(self, epoch: int, values: dict[str, float]) -> None:
        kind, now = import_module("mlflow.entities").Metric, time.time_ns() // 10**6
        self._client.log_batch(self._run, [kind(name, value, now, epoch) for name, value in values.items()])

    def finish(self, epoch: int, values: dict[str, float], files: Sequence[Path]) -> None:
        self.log(epoch, values)
        for path in files:
            self._client.log_artifact(self._run, str(path))

    def close(self, *, done: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if done else "KILLED")


class _Trackio(Service):
    """Trackio, in its own place on this machine (TRACKIO_DIR), where `trackio show` finds all runs."""

    @staticmethod
    def check() -> str | None:
        import_module("trackio")
        return None

    def __init__(self, run_dir: Path, config: dict[str, Any], run: str | None) -> None:
        trackio: Any = import_module("trackio")

        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        self._trackio = trackio
        # it knows a run by its name alone: two runs of one folder's name must not become one
        name = run or f"{run_dir.name}-{os.urandom(3).hex()}"
        trackio.init(
            project=project,
            name=name,
            config=_flat(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.identity = {"run": name, "where": f"project {project} in {trackio.TRACKIO_DIR}"}

    def log(self, epoch: int, values: dict[str, float]) -> None:
        self._trackio.log(values, step=epoch)

    def finish(self, epoch: int, values: dict[str, float], files: Sequence[Path]) -> None:
        images = {path.stem: self._trackio.Image(path) for path in files if path.suffix == ".png"}
        self._trackio.log({**values, **images}, step=epoch)

    def close(self, *, done: bool) -> None:
        self._trackio.finish()


SERVICES = {"wandb": _Wandb, "mlflow": _Mlflow, "trackio": _Trackio}


def _answers(service: Any, do: Callable[[Any, dict[str, Any]], dict[str, Any]]) -> None:
    """Answer every line on standard input by what `do` returns, or by what it raises."""
    # the service's own words go nowhere: standard output is for answers
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    for line in sys.stdin:
        try:
            answer = do(service, json.loads(line))
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers, flush=True)


class Session:
    """What the lines of one run say."""

    def __init__(self) -> None:
        self.open: Any = None

    def __call__(self, service: Any, message: dict[str, Any]) -> dict[str, Any]:
        """Do what a line says; returns the answer."""
        do = message["do"]
        if do == "check":
            return {"error": problem} if (problem := service.check()) else {}
        if do == "start":
            self.open = service(Path(message["run_dir"]), message["config"], message["run"])
            return self.open.identity
        # where it did not start, that was said
        if self.open is None:
            return {}
        finite = {name: value for name, value in message.get("values", {}).items() if math.isfinite(value)}
        if do == "log":
            self.open.log(message["epoch"], finite)
        elif do == "finish":
            self.open.finish(message["epoch"], finite, [Path(path) for path in message["files"]])
        elif do == "close":
            self.close(done=message["done"])
        return {}

    def close(self, *, done: bool) -> None:
        """End the service's run, if it has begun."""
        if self.open is not None:
            service, self.open = self.open, None
            service.close(done=done)


def _outlive(parent: int) -> None:
    """End this process some minutes after the training's, whatever a client still waits for."""
    while os.getppid() == parent:
        time.sleep(5)
    time.sleep(_LAST_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_outlive, args=(os.getppid(),), daemon=True).start()
    session = Session()
    _answers(SERVICES[sys.argv[1]], session)
    # the training ended without a word
    session.close(done=False)

"""The run directory: made, or recognised as this run's."""

import contextlib
import json
from typing import Any

from awp_engine.config import Config, ConfigError, config_hash, load_config, require_same_run, to_json
from awp_engine.files.atomic import TEMPORARY, atomic_write_text
from awp_engine.files.locking import LOCK
from awp_engine.files.run_places import CONFIG_FILE, MODEL_FILE
from awp_engine.observe.report import REPORT
from awp_engine.train.inputs import require_same_as_reported

# of the settings before the run was given more epochs
_BEFORE = "config-{}-epochs.json"


def require_own_run_dir(config: Config) -> None:
    """Make sure that a run directory, if there is one, belongs to this configuration.

    Raises:
        ConfigError: the directory holds another run.
    """
    saved = config.resolved_run_dir / CONFIG_FILE
    try:
        if saved.exists():
            require_same_run(load_config(saved), config, config.resolved_run_dir)
    except OSError as error:
        raise _unusable(config, error) from None


def _unusable(config: Config, error: OSError) -> ConfigError:
    return ConfigError(f"--run-dir: {config.resolved_run_dir} cannot be used: {error.strerror or error}")


def prepare_run_dir(config: Config) -> None:
    """Make the run directory, if there is none of this run's yet.

    Raises:
        ConfigError: the directory holds something else, or cannot be written.
    """
    run_dir = config.resolved_run_dir
    saved = run_dir / CONFIG_FILE
    try:
        if saved.exists():
            return
        if run_dir.exists() and not run_dir.is_dir():
            raise ConfigError(f"--run-dir: expected a directory, {run_dir} is a file; choose another")
        # a run that was killed while it wrote its first file has left nothing but that, and its lock
        if run_dir.exists() and any(not entry.name.startswith((TEMPORARY, LOCK)) for entry in run_dir.iterdir()):
            raise ConfigError(f"--run-dir: {run_dir} is not empty and holds no config.json of a run; choose another")
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write_text(saved, to_json(config))
    except OSError as error:
        raise _unusable(config, error) from None


def record_settings(config: Config) -> str | None:
    """Write config.json anew where the run was given more epochs, and keep the one before.

    Returns:
        What to tell the user, None where nothing changed.

    Raises:
        ConfigError: the directory cannot be written.
    """
    run_dir = config.resolved_run_dir
    saved = run_dir / CONFIG_FILE
    before = load_config(saved)
    if before.epochs == config.epochs:
        return None
    try:
        atomic_write_text(run_dir / _BEFORE.format(before.epochs), to_json(before))
        atomic_write_text(saved, to_json(config))
    except OSError as error:
        raise _unusable(config, error) from None
    return f"{config.epochs} epochs, where {before.epochs} were planned before"


def known_hashes(config: Config) -> set[str]:
    """Of the settings that checkpoints of this run may have been written under: these, and with fewer epochs."""
    run_dir, found = config.resolved_run_dir, {config_hash(config)}
    for path in (run_dir / CONFIG_FILE, *run_dir.glob(_BEFORE.format("*"))):
        with contextlib.suppress(ConfigError):
            before = load_config(path)
            require_same_run(before, config, run_dir)
            found.add(config_hash(before))
    return found


def finished_report(config: Config) -> dict[str, Any] | None:
    """The report of a run that has ended under these settings, None where there is something left to do.

    Raises:
        ConfigError: the run directory belongs to other settings, or was of other images or files.
        DataError: the images cannot be had.
    """
    run_dir = config.resolved_run_dir
    if not all((run_dir / name).is_file() for name in (CONFIG_FILE, REPORT, MODEL_FILE)):
        return None
    require_same_run(load_config(run_dir / CONFIG_FILE), config, run_dir)
    try:
        report = json.loads((run_dir / REPORT).read_bytes())
        pgd = f"pgd{config.evaluation.steps}_accuracy"
        shown = [report[name] for name in ("clean_accuracy", pgd, "train_pgd_accuracy", "seconds")]
        shown.append(report["last"][pgd])
        same = report["config_hash"] == config_hash(config) and report["test_limit"] == config.evaluation.test_limit
        whole = all(type(report[name]) is int for name in ("selected_epoch", "epochs"))
        whole = whole and isinstance(report["data"], dict)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        # nobody's, or of an earlier version: it is measured again
        return None
    if not same or not whole or any(type(value) not in (int, float) for value in shown):
        return None
    require_same_as_reported(report, config)
    return report

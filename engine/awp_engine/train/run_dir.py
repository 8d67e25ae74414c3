"""The run directory: made, or recognised as this run's."""

from awp_engine.config import Config, ConfigError, load_config, require_same_run, to_json
from awp_engine.files.atomic import TEMPORARY, atomic_write_text
from awp_engine.files.locking import LOCK


def prepare_run_dir(config: Config) -> None:
    """Make the run directory, or make sure that the one there belongs to this configuration.

    Raises:
        ConfigError: the directory holds something else, or cannot be written.
    """
    run_dir = config.resolved_run_dir
    saved = run_dir / "config.json"
    try:
        if saved.exists():
            require_same_run(load_config(saved), config, run_dir)
            return
        if run_dir.exists() and not run_dir.is_dir():
            raise ConfigError(f"--run-dir: expected a directory, {run_dir} is a file; choose another")
        # a run that was killed while it wrote its first file has left nothing but that, and its lock
        if run_dir.exists() and any(not entry.name.startswith((TEMPORARY, LOCK)) for entry in run_dir.iterdir()):
            raise ConfigError(f"--run-dir: {run_dir} is not empty and holds no config.json of a run; choose another")
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write_text(saved, to_json(config))
    except OSError as error:
        raise ConfigError(f"--run-dir: {run_dir} cannot be used: {error.strerror or error}") from None

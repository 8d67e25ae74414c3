"""What makes two runs of the same settings differ: their images, and files that the settings name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from awp_engine.config import Config, ConfigError
from awp_engine.config.model_names import is_code
from awp_engine.data import Dataset, class_weights, load_data, load_extra
from awp_engine.models.class_names import difference
from awp_engine.models.factories import load_factory


def fingerprints(config: Config, data: Dataset, extra: str | None) -> dict[str, Any]:
    """What a checkpoint and a report hold of it; `extra` is the fingerprint of the extra images."""
    found: dict[str, Any] = {"data_fingerprint": data.fingerprint, "extra_fingerprint": extra}
    if config.data.class_weights != "none":
        # another file of the same name makes another run
        found["class_weights"] = class_weights(config.data.class_weights, data)
    if is_code(config.method):
        # so does another loss
        found["method_code"] = load_factory(config.method, flag="--method")[1].sha256
    return found


def model_code(config: Config) -> str | None:
    """SHA-256 of the file of somebody's own model; None of others, and of an object that `fit` was given."""
    name = config.model.name
    return load_factory(name)[1].sha256 if is_code(name) and not name.startswith("awp_engine.") else None


def require_same(
    before: Mapping[str, Any], now: Mapping[str, Any], config: Config, data: Dataset, names: tuple[str, ...] | None
) -> None:
    """Refuses what was trained on other inputs.

    Args:
        before: what a checkpoint or a report says.
        now: what of it is to be the same.
        config: of now.
        data: the images of now.
        names: of the classes before, where they had names.

    Raises:
        ConfigError: naming what differs.
    """
    others = {name for name, value in now.items() if before.get(name) != value}
    if not others:
        return
    run_dir = f"--run-dir: {config.resolved_run_dir}"
    if others & {"data_fingerprint", "extra_fingerprint"}:
        other = difference(data.class_names, names) if names is not None and data.named else ""
        classes = f", of other classes: the data now have {other}" if other else ""
        raise ConfigError(f"{run_dir} was trained on other images{classes}; restore the data or choose another")
    if "class_weights" in others:
        raise ConfigError(
            f"--data.class-weights: {config.resolved_run_dir} was trained with other weights than "
            f"{config.data.class_weights} has now; restore the file or choose another --run-dir"
        )
    for name, flag, value in (
        ("method_code", "--method", config.method),
        ("model_code", "--model.name", config.model.name),
    ):
        if name in others:
            raise ConfigError(
                f"{run_dir} was trained by other code of {flag} {value}; restore that file or choose another"
            )
    raise ConfigError(
        f"{run_dir} has ended, and was measured on other test images; restore them, choose another, or measure it on "
        "these: awp evaluate"
    )


def require_same_as_reported(report: Mapping[str, Any], config: Config) -> None:
    """Refuses the report of a run that has ended where the images, or the code that it names, are others now.

    Images are opened and listed. Files of them are not decoded, but for a sample: their digest is that of names, sizes
    and contents, of 1,000 files' contents beyond 256 MB.

    Raises:
        ConfigError: naming what differs.
        DataError: the images cannot be had.
    """
    data = load_data(dataclasses.replace(config.data, loader="torch"))
    extra = None if config.data.extra is None else load_extra(config.data.extra, like=data).store.digest()
    # reports of earlier versions lack some of it
    more = {"test_fingerprint": data.test_fingerprint, "model_code": model_code(config)}
    before = report["data"]
    now = fingerprints(config, data, extra) | {name: value for name, value in more.items() if name in before}
    require_same(before, now, config, data, None)

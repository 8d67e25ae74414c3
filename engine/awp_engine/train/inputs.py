"""What makes two runs of the same settings differ: their images, and files that the settings name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awp_engine.config import Config, ConfigError
from awp_engine.config.model_names import is_code, optimizer_source
from awp_engine.data import Dataset, class_weights, load_data, load_extra
from awp_engine.files.digest import sha256_of
from awp_engine.models import build_model
from awp_engine.models.class_names import difference
from awp_engine.models.user_code import load_code
from awp_engine.train.teacher import teacher_sha256

_FLAGS = {"model": "--model.name", "data": "--data.name", "method": "--method", "optimizer": "--optimizer.kind"}


def fingerprints(config: Config, data: Dataset, extra: str | None) -> dict[str, Any]:
    """What a checkpoint and a report hold of it; `extra` is the fingerprint of the extra images."""
    found: dict[str, Any] = {"data_fingerprint": data.fingerprint, "extra_fingerprint": extra}
    if config.data.class_weights != "none":
        # another file of the same name makes another run
        found["class_weights"] = class_weights(config.data.class_weights, data)
    return found


def code_digests(config: Config, ended: Mapping[str, Any] | None = None) -> dict[str, str]:
    """SHA-256 of the user's own code, which is run: of "model", "data", "method", "optimizer", where they are such.

    And of the "teacher"'s weights, which are no less a part of what is trained. `ended`: the same, as the report of a
    run says that has ended: it learns from nobody any more, and what it says stands for weights that are gone.
    """
    named = {"model": config.model.name, "data": config.data.name, "method": config.method}
    own = {part: name for part, name in named.items() if is_code(name)}
    if optimizer_source(config.optimizer.kind) == "code":
        own["optimizer"] = config.optimizer.kind
    found = {part: load_code(name, _FLAGS[part])[1].sha256 for part, name in own.items()}
    if config.teacher.weights is not None:
        try:
            found["teacher"] = teacher_sha256(config.teacher)
        except ConfigError:
            if ended is None or "teacher" not in ended:
                raise
            found["teacher"] = ended["teacher"]
    return found


def made_by(config: Config, before: Mapping[str, Any] | None) -> dict[str, str]:
    """`code_digests`, and SHA-256 of the files of class weights and of weights to start from.

    Args:
        config: of the run.
        before: the same, as the checkpoint says that the run goes on from: it has started from those weights.
    """
    found, weights, pretrained = code_digests(config), config.data.class_weights, config.model.pretrained
    if weights not in ("none", "balanced"):
        found["class_weights"] = sha256_of(Path(weights))
    if before is not None:
        return found | {key: value for key, value in before.items() if key == "pretrained"}
    if pretrained is not None and not config.model.published:
        found["pretrained"] = sha256_of(pretrained)
    return found


def said(of: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a checkpoint or a report has as `made_by`; those of earlier versions say nothing."""
    found = of.get("made_by")
    return found if isinstance(found, Mapping) else {}


def require_same_code(before: Mapping[str, Any], now: Mapping[str, str], config: Config) -> None:
    """Refuses what other code of model, method or optimizer trained, or another teacher; images have fingerprints.

    Args:
        before: what a checkpoint or a report has said.
        now: the same.
        config: of now.

    Raises:
        ConfigError: naming what differs.
    """
    named = {"model": config.model.name, "method": config.method, "optimizer": config.optimizer.kind}
    for part, name in named.items():
        if before.get(part, now.get(part)) != now.get(part):
            raise ConfigError(
                f"--run-dir: {config.resolved_run_dir} was trained by other code of {_FLAGS[part]} {name}; restore "
                "it, and all that it imports, or choose another"
            )
    if before.get("teacher") != now.get("teacher"):
        raise ConfigError(
            f"--teacher.weights: {config.resolved_run_dir} learnt from other weights than {config.teacher.weights} "
            "holds now; restore them, or choose another --run-dir"
        )


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
    before, more = report["data"], {"test_fingerprint": data.test_fingerprint}
    now = fingerprints(config, data, extra) | {name: value for name, value in more.items() if name in before}
    require_same(before, now, config, data, None)
    if is_code(config.model.name):
        # its code may import more when it is called, as it did then
        _, *size = data.train.shape
        build_model(config.model.name, len(data.class_names), data.mean, data.std, image_size=(size[0], size[1]))
    require_same_code(said(report), code_digests(config, said(report)), config)

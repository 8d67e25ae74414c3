"""A trained model as a folder for the Hugging Face Hub: weights, settings, and a model card made from the receipt."""

import dataclasses
import json
import os
import shutil
import time
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from awp_engine.checkpoint import CheckpointError, export_model, read_file
from awp_engine.config import Config, to_json
from awp_engine.config.identity import from_flat, key_types, to_flat
from awp_engine.config.model_names import is_code
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.evaluation.model.loaded_model import LoadedModel
from awp_engine.files.atomic import atomic_write_text, replace_file
from awp_engine.files.text import printable
from awp_engine.models.hub import SETTINGS, WEIGHTS, is_address
from awp_engine.models.trained import TAMPERED, ModelDescription, read_trained
from awp_engine.observe.report import CURVES

CARD = "README.md"
# what the Hub calls the data sets that it has
_DATA_SETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "svhn": "ufldl-stanford/svhn",
    "imagenet": "ILSVRC/imagenet-1k",
    "tiny-imagenet": "zh-plus/tiny-imagenet",
}
# of the description, what is about this machine
_PRIVATE = frozenset({"code", "seal"})
# settings whose type is text
_MAY_BE_PATHS = {"model.name", "data.name", "data.class_weights", "method", "optimizer.kind", "teacher.weights"}
_MANY_CLASSES = 20
_LARGEST_PICTURE = 1 << 26


def export_folder(
    loaded: LoadedModel,
    folder: Path,
    *,
    repository: str = "OWNER/NAME",
    say: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Writes what `huggingface_hub.upload_folder` takes: model.safetensors, config.json, README.md, learning curves.

    The settings are the run's. Files, those of code too, are named without their directories, so that nobody learns
    how this machine is laid out. The card's accuracies are those of the run's newest evaluation, where that is of these
    very weights. A link to weights is the user's own, and followed; curves that are a link, which could lead to any
    file, are refused.

    Args:
        loaded: the model, as `open_model` gives it.
        folder: to be made, or empty.
        repository: where it will be, for the card.
        say: is told what is left to do, one line at a time.

    Returns:
        The files.

    Raises:
        EvaluationError: the folder holds something.
        CheckpointError: the weights cannot be read, or a file of the run is a link.
        OSError: a file cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EvaluationError(f"--hub: {folder} is there already, and not an empty folder; choose another")
    if loaded.description is not None:
        weights, description, read = loaded.model.state_dict(), loaded.description, None
        metadata: Mapping[str, Any] = description.to_metadata()
    else:
        assert loaded.source is not None
        weights, metadata, description, read = read_trained(loaded.source)
    held = json.loads(str(metadata["model"]))
    shown = {key: value for key, value in held.items() if key not in _PRIVATE} | {"name": _bare(held["name"])}
    plain = {key: str(metadata[key]) for key in ("epoch", "config_hash", "class_names", TAMPERED) if key in metadata}
    report, measured = _report(loaded, say)
    curves = None if loaded.run_dir is None else loaded.run_dir / CURVES
    picture = None if curves is None or not os.path.lexists(curves) else read_file(curves, limit=_LARGEST_PICTURE)
    public = dataclasses.replace(loaded, config=None if loaded.config is None else without_paths(loaded.config))
    card = model_card(
        dataclasses.replace(description, name=shown["name"]),
        public,
        report,
        measured,
        repository,
        curves=picture is not None,
        # of the weights that an unfinished run has selected so far, beside those of its last epoch
        epoch=metadata.get("best_epoch" if loaded.name == "best" else "epoch", metadata.get("epoch")),
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / WEIGHTS]
    if read == loaded.weights and shown == held:
        # the very file that was measured
        shutil.copyfile(loaded.weights, folder / WEIGHTS)
    else:
        export_model(folder / WEIGHTS, weights, {"model": json.dumps(shown)} | plain)
    if public.config is not None:
        written.append(folder / SETTINGS)
        atomic_write_text(folder / SETTINGS, to_json(public.config))
    if picture is not None:
        written.append(folder / CURVES)
        replace_file(folder / CURVES, picture)
    written.append(folder / CARD)
    atomic_write_text(folder / CARD, card)
    say(f"no license is named: add one to the head of {folder / CARD}, such as license: apache-2.0")
    return written


def _bare(text: str) -> str:
    """A path, or file.py:NAME, without directories; an address of the Hub says nothing of a machine."""
    return text if is_address(text) else text.rstrip("/").rpartition("/")[2]


def without_paths(config: Config) -> Config:
    """Settings that say nothing of the machine: of files their names alone, of other places nothing."""
    values, kinds = to_flat(config), key_types()
    places = {key for key, kind in kinds.items() if Path in (kind, *typing.get_args(kind))}
    values |= {key: _bare(values[key]) for key in places | _MAY_BE_PATHS if values[key] is not None}
    return from_flat(values | {"run_dir": None, "data.root": None})


def _report(loaded: LoadedModel, say: Callable[[str], None]) -> tuple[Mapping[str, Any] | None, str]:
    """The newest evaluation of these weights, and the day it was written; None without one."""
    if loaded.run_dir is None:
        return None, ""
    place = "evaluation" if loaded.name == "best" else f"evaluation-{loaded.name}"
    path = loaded.run_dir / place / "evaluation.json"
    if not path.is_file():
        command = f"awp evaluate {loaded.run_dir}" + ("" if loaded.name == "best" else f" --checkpoint {loaded.name}")
        say(f"no accuracies in the card: there is no {path}; {command} makes it")
        return None, ""
    try:
        report = json.loads(read_file(path))
        of = report["receipt"]["checkpoint"]["sha256"]
        # all that the card takes from it
        _accuracies(report, "")
        _index("", report)
    except (CheckpointError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        say(f"no accuracies in the card: {path} is not a report of awp evaluate")
        return None, ""
    if of != loaded.sha256:
        say(f"no accuracies in the card: {path} is of other weights; awp evaluate {loaded.run_dir} measures these")
        return None, ""
    return report, time.strftime("%Y-%m-%d", time.gmtime(path.stat().st_mtime))


def model_card(
    description: ModelDescription,
    loaded: LoadedModel,
    report: Mapping[str, Any] | None,
    measured: str,
    repository: str,
    *,
    curves: bool,
    epoch: str | int | None = None,
) -> str:
    """README.md: what the Hub reads at its head, and what people read below.

    Args:
        description: of the model.
        loaded: the weights, and their run.
        report: what evaluation.json holds; None leaves accuracies out.
        measured: the day.
        repository: OWNER/NAME.
        curves: whether there is a picture of the learning curves.
        epoch: of the run, that the weights are of.
    """
    config = loaded.config
    method = "image classifier" if config is None else config.title
    data = None if config is None else config.data.name
    title = f"{description.name}, {method}" + (f" on {data}" if data else "")
    head: dict[str, Any] = {
        "library_name": "awp-engine",
        "pipeline_tag": "image-classification",
        "tags": [
            "adversarial-robustness",
            *(["adversarial-training"] * (config is None or config.attack.training_epsilon > 0)),
            *(["adversarial-weight-perturbation"] * _has_awp(config)),
        ],
    }
    if data in _DATA_SETS:
        head["datasets"] = [_DATA_SETS[data]]
    if report is not None:
        head["metrics"] = ["accuracy"]
        head["model-index"] = [_index(title, report)]
    # JSON is YAML
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {title}", ""]
    lines += _facts(description, loaded, epoch)
    lines += ["", "## Accuracy", "", *_accuracies(report, measured)]
    if curves:
        lines += ["", f"![Learning curves]({CURVES})"]
    names = [] if description.class_names is None else [printable(name) for name in description.class_names]
    # digits are named by their numbers
    if len(names) <= _MANY_CLASSES and names != [str(number) for number in range(len(names))]:
        lines += ["", "## Classes", "", ", ".join(f"{number} {name}" for number, name in enumerate(names))]
    lines += [
        "",
        "## Use",
        "",
        "    pip install huggingface_hub    # beside awp-engine",
        "",
        "```python",
        "from awp_engine import load_model",
        "",
    ]
    # which is not run because a file says so
    code = is_code(description.name)
    own = f', model="{printable(description.name)}"' if code else ""
    lines += [f'model = load_model("hf://{repository}"{own})  # maps images in [0, 1] to logits', "```", ""]
    root = "" if data == "digits" else " --data.root DIR"
    lines += [f"    awp evaluate hf://{repository}{root} --attacks clean pgd20 autoattack", ""]
    lines += ["The weights are safetensors; nothing in this repository is run."]
    return "\n".join(lines) + "\n"


def _has_awp(config: Config | None) -> bool:
    return config is not None and config.awp.enabled and config.awp.scale == "relative"


def _facts(description: ModelDescription, loaded: LoadedModel, epoch: str | int | None) -> list[str]:
    """What it is and how it was trained, as a list."""
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    mean, std = (f"({', '.join(f'{value:.4g}' for value in values)})" for values in (description.mean, description.std))
    facts = [
        f"Architecture: {description.name}, {parameters:,} parameters, {description.num_classes} classes, activation "
        f"{description.activation}",
        f"Images: in [0, 1]; the model normalises them by mean {mean} and deviation {std}",
    ]
    if loaded.origin is not None:
        facts.append(f"Weights: those of {printable(loaded.weights.name)}, SHA-256 {loaded.sha256}")
    if loaded.config is not None:
        config = loaded.config
        attack = "without an attack"
        if config.attack.training_epsilon:
            length = "Auto-PGD" if config.attack.kind == "apgd" else config.attack.step_size
            attack = f"{config.attack.balls}, {config.attack.steps} steps of {length}"
            if config.attack.step_warmup:
                attack += f", which grow over the first {config.attack.step_warmup} epochs"
            attack += ", both lengths growing with the epoch" * (config.attack.ramp != "none")
            if config.method == "oaat":
                attack += "; in a ball that grows with the epoch, in the last quarter also in a larger one, or less how"
                attack += " different images look"
            if (stronger := config.attack.stronger) is not None:
                attack += f", from epoch {stronger.after + 1} on epsilon {config.attack.stronger_epsilon} and "
                attack += f"{stronger.steps} steps"
        if config.attack.noise:
            attack += f", noise of {config.attack.noise:g}"
        gamma = f", gamma {config.awp.gamma:g}" if config.awp.enabled else ""
        of = "" if epoch is None else f" (weights of epoch {printable(str(epoch))})"
        facts.append(f"Training: {config.title}{gamma}, {attack}, {config.epochs} epochs{of}, seed {config.seed}")
        if config.model.pretrained is not None:
            facts.append(f"Started from the weights {config.model.pretrained.name}")
        if config.teacher.weights is not None:
            facts.append(f"Learnt from the network {_bare(config.teacher.weights)}, which was frozen")
    return [f"- {fact}" for fact in facts]


def _computed(receipt: Mapping[str, Any]) -> str:
    """What to add where the model was rounded to 16 bits; earlier versions knew nothing of it."""
    precision = receipt["precision"].get("computes_in", "fp32")
    return "" if precision == "fp32" else f", computed in {precision}"


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(row["attack"], row["accuracy_percent"]) for row in report["attacks"]]
    worst = report["robust_to_all"]
    return [*rows, (f"worst of {', '.join(worst['over'])}", worst["accuracy_percent"])]


def _accuracies(report: Mapping[str, Any] | None, measured: str) -> list[str]:
    if report is None:
        return ["Not measured."]
    receipt, data = report["receipt"], _bare(report["receipt"]["data"]["name"])
    versions = ", ".join(f"{name} {version}" for name, version in receipt["versions"].items() if version is not None)
    ball = f"{receipt['norm']} epsilon {receipt['epsilon']}{_computed(receipt)}"
    gates = {None: "not run", True: "passed", False: "FAILED"}[(report["gates"] or {}).get("passed")]
    of = f"{receipt['data']['images']:,} of {receipt['data']['images_in_split']:,} images"
    return [
        f"On {of} of the test split of {data}, {ball}, measured by `awp evaluate` on {measured} "
        f"({versions}), on weights whose file has the SHA-256 {receipt['checkpoint']['sha256']}. An image counts as "
        f"right under attack only if it is right without one too. Sanity gates: {gates}.",
        "",
        *(f"**Unreliable**: {printable(doubt)}" for doubt in report["doubts"]),
        *([""] if report["doubts"] else []),
        "| attack | accuracy |",
        "|---|---:|",
        *(f"| {name} | {percent}% |" for name, percent in _rows(report)),
    ]


def _index(title: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """Results as the Hub reads them."""
    receipt = report["receipt"]
    ball, computed = f"{receipt['norm']} epsilon {receipt['epsilon']}", _computed(receipt)
    name = _bare(receipt["data"]["name"])
    data = {"name": name, "type": name, "split": "test"}
    metrics = [
        {
            "type": "accuracy",
            "name": ("accuracy" if row["attack"] == "clean" else f"accuracy under {row['attack']}, {ball}") + computed,
            "value": float(row["accuracy_percent"]),
        }
        for row in report["attacks"]
    ]
    result = {"task": {"type": "image-classification"}, "dataset": data, "metrics": metrics}
    return {"name": title, "results": [result]}

"""The audits of a module and images that are objects of Python, in a notebook or a script."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from awp_engine.audit.concepts import run as concepts_run
from awp_engine.audit.data import run as data_run
from awp_engine.audit.weights import run as weights_run
from awp_engine.config.schema import did_you_mean
from awp_engine.evaluation.asked import Asked
from awp_engine.evaluation.attacks.named import EvaluationError
from awp_engine.evaluation.reports.files import Reported
from awp_engine.objects import as_asked


def audit_concepts(
    models: Mapping[str, nn.Module],
    images: Any,
    labels: Any,
    *,
    concepts: Sequence[str],
    layers: Sequence[str],
    classes: Sequence[str],
    class_names: Sequence[str] | None = None,
    settings: concepts_run.Settings | None = None,
    output: Path | str = "audit",
    **more: Any,
) -> dict[str, Reported]:
    """Test which concepts each model's decision for a class leans on, as `awp audit concepts` does of each alone.

    Args:
        models: by name; each gives logits [N, classes] of images [N, C, H, W] in [0, 1], and normalises them itself.
        images: test images, of which concepts are made, too; as `awp_engine.evaluate` takes them.
        labels: whole numbers [N].
        concepts: as `--concepts`.
        layers: as `--layers`; of a module of your own by its own names.
        classes: as `--classes`.
        class_names: in the order of the labels; those that the model has if not given.
        settings: how.
        output: directory of the reports, in which each model has its own.
        more: the other fields of `Asked` (device, batch_size), and say, bar and tell.

    Raises:
        EvaluationError, ConfigError, DataError: one line that says what is wrong.
    """
    settings, done = settings or concepts_run.Settings(), {}
    _require_known("audit_concepts", more, ("say", "bar", "tell"))
    if not models or any(not name or "/" in name or name.startswith(".") for name in models):
        raise EvaluationError(f"models: expected modules by plain names, got {', '.join(models)[:80] or 'none'}")
    told = {name: more.pop(name) for name in ("say", "bar", "tell") if name in more}
    for name, model in models.items():
        with as_asked(model, class_names, test=(images, labels)) as asked:
            ask = Asked(path=None, **asked, **more, seed=settings.seed, output=Path(output) / name)
            done[name] = concepts_run.audit_concepts(
                [ask], concepts=concepts, layers=layers, classes=classes, settings=settings, **told
            )
    return done


def audit_weights(
    model: nn.Module,
    train: Any,
    test: Any,
    *,
    class_names: Sequence[str] | None = None,
    settings: weights_run.Settings | None = None,
    output: Path | str = "audit",
    **more: Any,
) -> Reported:
    """Find how small an edit of a module's weights hides a backdoor, as `awp audit weights` does.

    Args:
        model: as in `audit_concepts`; it is not changed.
        train: what edits are made with: (images, labels), or a data set of such pairs.
        test: what they are measured on.
        class_names: in the order of the labels; those that the model has if not given.
        settings: how.
        output: directory of the reports.
        more: as in `audit_concepts`.

    Raises:
        EvaluationError, ConfigError, DataError: one line that says what is wrong.
    """
    _require_known("audit_weights", more, ("say", "bar", "tell"))
    with as_asked(model, class_names, train=train, test=test) as asked:
        return weights_run.audit_weights(None, settings, **asked, output=Path(output), **more)


def audit_data(
    model: nn.Module,
    images: Any,
    labels: Any,
    *,
    screening: data_run.Screening | None = None,
    class_names: Sequence[str] | None = None,
    output: Path | str = "audit",
    **more: Any,
) -> Reported:
    """List the images that do not look like their class by a module's features, as `awp audit data` does.

    Args:
        model: as in `audit_concepts`; its last layer is linear.
        images: what is screened, as `awp_engine.evaluate` takes them.
        labels: whole numbers [N].
        screening: by which methods; by default isolation forest and one-class SVM.
        class_names: in the order of the labels; those that the model has if not given.
        output: directory of the reports.
        more: as in `audit_concepts`; also classes and keep.

    Raises:
        EvaluationError, ConfigError, DataError: one line that says what is wrong.
    """
    _require_known("audit_data", more, ("say", "bar", "tell", "classes", "keep"))
    with as_asked(model, class_names, train=(images, labels), test=(images, labels)) as asked:
        return data_run.audit_data(None, screening, **asked, output=Path(output), **more)


def _require_known(function: str, more: Mapping[str, Any], own: Sequence[str]) -> None:
    known = [*own, *(field.name for field in fields(Asked))]
    if unknown := next((name for name in more if name not in known), None):
        hint = did_you_mean(unknown, known, "settings and screening hold what flags say")
        raise EvaluationError(f"{function}: has no argument {unknown!r}; {hint}")

"""Training and evaluating objects of Python, in a notebook or a script: a model and images in place of their names.

They go to the same trainer and the same evaluation as on the command line, under the names of `models/given.py`.
"""

import contextlib
import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Never

from torch import nn

from awp_engine.audit.concepts import run as concepts_run
from awp_engine.audit.data import run as data_run
from awp_engine.audit.weights import run as weights_run
from awp_engine.config import Config, ConfigError, load_config
from awp_engine.config.data_sets import GIVEN_IMAGES
from awp_engine.config.identity import from_flat, key_types, to_flat
from awp_engine.config.presets import build_preset
from awp_engine.config.schema import coerce, did_you_mean
from awp_engine.distributed.ranks import joined
from awp_engine.distributed.signals import StoppedError, StopRequest, stop_requests
from awp_engine.evaluation.asked import DEFAULT_ATTACKS, Asked, AttacksAsked
from awp_engine.evaluation.attacks.named import EvaluationError, Norm
from awp_engine.evaluation.model.external import ExternalModel
from awp_engine.evaluation.reports.files import Reported
from awp_engine.evaluation.run import Evaluated, evaluate_checkpoint
from awp_engine.files.run_places import CONFIG_FILE
from awp_engine.files.text import printable
from awp_engine.models import NormalizedClassifier, WrappedClassifier
from awp_engine.models.given import given, name_of
from awp_engine.models.trained import load_model
from awp_engine.observe.report import as_text
from awp_engine.train.results import result_row, result_title
from awp_engine.train.run import train as train_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """What `fit` leaves.

    Attributes:
        model: the weights that were selected, in eval mode; takes images in [0, 1].
        report: what report.json holds.
        run_dir: the run directory.
    """

    model: NormalizedClassifier
    report: dict[str, Any]
    run_dir: Path

    def __str__(self) -> str:
        """The table that `awp train` prints."""
        config = load_config(self.run_dir / CONFIG_FILE)
        table = as_text([result_row(config.title, config, self.report)], title=result_title(config))
        return f"{table}\nresults in {printable(str(self.run_dir))}"


def fit(
    model: Callable[..., nn.Module] | nn.Module,
    train: Any,
    test: Any,
    *,
    run_dir: Path | str,
    preset: str = "digits",
    class_names: Sequence[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    **unknown: Never,
) -> Fitted:
    """Train a model that is a Python object on images that are Python objects, as `awp train` does.

    The same call again goes on where it was stopped, or gives the results of a run that has ended.

    Args:
        model: a module, which is copied and starts from its own weights; or a function that makes one, called with
            those of num_classes, in_chans and img_size that it takes. It gives logits of images that are normalised in
            front of it by the training images' mean and deviation, unless it normalises them itself.
        train: what images are learnt from, and the held-out ones: a data set of (image, label), or a pair of arrays,
            as `--data.name FILE.py:NAME` takes them; uint8, or floating point in [0, 1].
        test: images that are looked at once, at the end.
        run_dir: where the results go.
        preset: all other settings, as the first argument of `awp train`.
        class_names: in the order of the labels, if the data have none.
        settings: over the preset, by the names of the flags: {"attack.epsilon": "8/255", "epochs": 30}.
        unknown: refused.

    Raises:
        ConfigError, DataError: one line that says what is wrong.
        TrainingError: training cannot go on.
        KeyboardInterrupt: after a checkpoint was written.
    """
    if unknown:
        name = next(iter(unknown))
        hint = did_you_mean(name, inspect.signature(fit).parameters, "settings={...} has what flags say")
        raise ConfigError(f"fit: has no argument {name!r}; {hint}")
    parts = {"train": train, "test": test, **({} if class_names is None else {"class_names": class_names})}
    with given(model, parts) as make:
        names = {"model.name": name_of(model), "data.name": GIVEN_IMAGES}
        config = _config(preset, {**(settings or {}), "run_dir": run_dir, **names})
        # Python gives signals to the main thread alone
        main = threading.current_thread() is threading.main_thread()
        stopping = stop_requests() if main else contextlib.nullcontext(StopRequest())
        try:
            with joined(config.device, config.distributed.timeout) as ranks, stopping as stop:
                _, report, ended = train_run(config, ranks, stop)
        except StoppedError as stopped:
            raise KeyboardInterrupt(str(stopped)) from None
        if ended:
            print(f"{config.resolved_run_dir} has ended before: these are its results", flush=True)
        trained = load_model(config.resolved_run_dir, model=make)
    return Fitted(model=trained, report=report, run_dir=config.resolved_run_dir)


def _config(preset: str, settings: Mapping[str, Any]) -> Config:
    known = key_types()
    values = to_flat(build_preset(preset)) | {"model.width": None, "model.activation": "relu"}
    for name, value in settings.items():
        key = name.replace("-", "_")
        if key not in known:
            raise ConfigError(f"settings: unknown name {name!r}; {did_you_mean(key, known, 'awp train --help-all')}")
        values[key] = coerce(known[key], str(value) if isinstance(value, Path) else value, key)
    return from_flat(values)


def evaluate(
    model: nn.Module,
    images: Any,
    labels: Any = None,
    *,
    epsilon: str,
    norm: Norm = "linf",
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    class_names: Sequence[str] | None = None,
    output: Path | str = "evaluation",
    **more: Any,
) -> Evaluated:
    """Measure a module, as `awp evaluate` does, with the same checks, reports and receipt.

    Args:
        model: gives logits [N, classes] of images [N, C, H, W] in [0, 1]; it normalises them itself.
        images: uint8, or floating point in [0, 1]: [N, C, H, W] tensors, or [N, H, W, C] arrays; or a data set of
            (image, label), without labels.
        labels: whole numbers [N].
        epsilon: radius of the ball, exact: "8/255".
        norm: "linf", "l2" or "l1".
        attacks: as `--attacks`.
        class_names: in the order of the labels; those that the model has if not given.
        output: directory of the reports.
        more: as `evaluate_checkpoint` takes it: limit, restarts, seed, batch_size, device, save_images and others;
            gates_limit=None leaves the checks of the evaluation out.

    Raises:
        EvaluationError, ConfigError, DataError: one line that says what is wrong.
    """
    known = {*inspect.signature(evaluate).parameters, *inspect.signature(evaluate_checkpoint).parameters}
    known |= {field.name for field in dataclasses.fields(AttacksAsked)}
    if unknown := next((name for name in more if name not in known), None):
        hint = "gates_limit=None leaves the gates out" if "gates" in unknown else did_you_mean(unknown, known, "")
        raise ConfigError(f"evaluate: has no argument {unknown!r}; {hint}".removesuffix("; "))
    with as_asked(model, class_names, test=images if labels is None else (images, labels)) as asked:
        return evaluate_checkpoint(
            None, **asked, epsilon=epsilon, norm=norm, attacks=attacks, output=Path(output), **more
        )


@contextlib.contextmanager
def as_asked(model: nn.Module, class_names: Sequence[str] | None = None, **parts: Any) -> Iterator[dict[str, Any]]:
    """A block in which a module and images go by names; gives the arguments of `Asked` that say them.

    Args:
        model: gives logits [N, classes] of images [N, C, H, W] in [0, 1]; it normalises them itself.
        class_names: in the order of the labels; those that the model has if not given.
        parts: train and test: images and labels, or a data set of (image, label).
    """
    if class_names is None and isinstance(model, NormalizedClassifier):
        class_names = model.class_names
    names = {} if class_names is None else {"class_names": class_names}
    # one of this package's has its own in front of it, others do it inside
    normalize = "model" if isinstance(model, WrappedClassifier) else "none"
    with given(model, parts | names):
        yield {
            "external": ExternalModel(name=name_of(model), normalize=normalize, is_object=True),
            "data_name": GIVEN_IMAGES,
        }


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
    known = [*own, *(field.name for field in dataclasses.fields(Asked))]
    if unknown := next((name for name in more if name not in known), None):
        hint = did_you_mean(unknown, known, "settings and screening hold what flags say")
        raise EvaluationError(f"{function}: has no argument {unknown!r}; {hint}")

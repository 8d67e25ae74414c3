"""Anybody's weights into a model: what fits its names is taken, and what a user should know is said."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from awp_engine.checkpoint import CheckpointError
from awp_engine.config.schema import show
from awp_engine.models.class_names import to_json
from awp_engine.models.layers import ActivatedBatchNorm, Activation, NormalizedClassifier
from awp_engine.models.layouts import Network, networks, pairs, state_dicts, wrappers
from awp_engine.models.normalisation import shown
from awp_engine.models.weights_file import read_weights
from awp_engine.models.wide_resnet import WideResNet
from awp_engine.models.wrapped import WrappedClassifier

# parts of a training module beside its network
_MEASURES = re.compile(r"(?:^|[._])(?:criterion|loss|loss_fn|metrics?|acc|accuracy)(?:[._]|$)")
_SHOWN = 3
_Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """What was loaded, and what a user should know of it.

    Attributes:
        notes: for the user: what was taken, what was left out, and the normalisation.
        taken: the first of them, which weights of the file these are.
        mean, std: of images in [0, 1], one value a channel, where the file holds them.
        in_front: whether these are now what the model normalises images by in front of its network.
        key: of the dictionary that held the weights; empty where the file is that dictionary.
        stripped: what stood before the model's names, such as "module.".
        left_out: names in that dictionary that were not needed.
        kept: the model's names that were left as they were: its classifier's, where the file's is for other classes.
        sha256: of the file, hexadecimal; None where there was no file.
        metadata: of a safetensors file's header; this program's files describe their model there.
    """

    notes: list[str]
    taken: str = ""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    in_front: bool = False
    key: str = ""
    stripped: str = ""
    left_out: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    sha256: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def front(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """What the file says of mean and deviation in front of the network; None where it says nothing of that."""
        return (self.mean, self.std) if self.in_front and self.mean is not None and self.std is not None else None


def load_weights(model: nn.Module, source: Path | str | Mapping[str, Any], *, key: str | None = None) -> LoadedWeights:
    """Load weights of any usual layout, by name and strictly.

    The model's names decide what is stripped: the dictionary around the weights, and what wrappers put before names,
    such as `module.`, `_orig_mod.` or `1.`. Where several networks fit, averaged weights (EMA, SWA) are taken first,
    then those under `state_dict`, `model_state_dict`, `model` or `net`; the notes say which, and what else there is.
    Mean and standard deviation in the file become the model's.

    Args:
        model: any module; one of `build_model` takes mean and standard deviation in as well.
        source: a safetensors file, one of `torch.save` (.pt, .pth, .bin, .tar), or what such a file holds. Nothing that
            a file says is imported or run.
        key: which weights to take, by a name that the notes or an error gave, such as "state_dict" or "teacher".

    Raises:
        CheckpointError: a file that cannot be read, or does not fit; one line, and the model is unchanged.
        ValueError: the same of a mapping.
    """
    return _loaded(model, source, key)


def load_public_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """`load_weights` of a mapping, for those who need no result.

    Raises:
        ValueError: names or shapes differ; the message names the first few, and the model is unchanged.
    """
    # by the names of this package, whatever model they belong to
    _into(model, state_dict, None, deepminds=None)


def load_pretrained(model: nn.Module, path: Path, class_names: tuple[str, ...] | None = None) -> LoadedWeights:
    """`load_weights` to start from: the classifier is left as it is for other classes, and named in `kept`.

    Other classes are another number of them, or other names, or the same ones in another order.

    Args:
        model: written in place, on any device.
        path: as `load_weights` takes it.
        class_names: of the model's logits, where they have names.

    Raises:
        CheckpointError: as `load_weights`.
    """
    return _loaded(model, path, None, class_names, classifier=_classifier(model))


def _loaded(
    model: nn.Module,
    source: Path | str | Mapping[str, Any],
    key: str | None,
    class_names: tuple[str, ...] | None = None,
    classifier: Sequence[str] = (),
) -> LoadedWeights:
    if isinstance(source, Mapping):
        return _into(model, source, key)
    if (inside := Path(source) / "model.safetensors").is_file():
        raise CheckpointError(f"{source}: is a run directory; expected a file of weights: give {inside}")
    file = read_weights(Path(source))
    theirs = file.metadata.get("class_names")
    others = class_names is not None and theirs is not None and theirs != to_json(class_names)
    try:
        loaded = _into(
            model,
            file.document,
            key,
            classifier,
            others=others,
            described=_described(file.metadata),
            deepminds='"name": "dm-' in file.metadata.get("model", ""),
        )
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}{_of_what(file.metadata)}") from None
    _require_activation(model, file.metadata, source)
    if file.inert:
        telling = sorted(file.inert, key=lambda name: name.startswith(("numpy.", "collections.", "torch.")))
        loaded.notes.append(f"left out, and not run: objects of {_some(telling)}")
    return replace(loaded, sha256=file.sha256, metadata=file.metadata)


def _described(metadata: Mapping[str, str]) -> _Statistics | None:
    """Mean and std in the header of a file of this program."""
    held = _header(metadata)
    try:
        mean, std = (tuple(float(value) for value in held[name]) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        return None
    return mean, std


def _header(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a file of this program says of its model; nothing of any other file."""
    try:
        held = json.loads(metadata["model"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return held if isinstance(held, dict) else {}


def _of_what(metadata: Mapping[str, str]) -> str:
    """The model that the header of a file of this program names, to say beside weights that do not fit another."""
    held = _header(metadata)
    if not {"name", "width"} <= held.keys():
        return ""
    wide = f" of width {show(held['width'])}" if held["width"] else ""
    return f"; the file says that it holds {show(held['name'])}{wide}"


def _require_activation(model: nn.Module, metadata: Mapping[str, str], source: Path | str) -> None:
    """Refuse weights of a file of this program that says another activation, which fit as well and answer otherwise."""
    told = _header(metadata).get("activation")
    own = {layer.kind for layer in model.modules() if isinstance(layer, ActivatedBatchNorm)}
    if own and told in get_args(Activation) and told not in own:
        raise CheckpointError(
            f"{source}: holds weights of a network with the activation {told}, the model has {own.pop()}: expected "
            f"--model.activation {told}"
        )


def _classifier(model: nn.Module) -> tuple[str, ...]:
    """Names of the last layer's weight and bias."""
    if isinstance(model, NormalizedClassifier):
        return model.classifier_names
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    return tuple(name for name in model.state_dict() if [name.rpartition(".")[0]] == last)


def _into(
    model: nn.Module,
    document: Any,
    key: str | None,
    classifier: Sequence[str] = (),
    *,
    others: bool = False,
    described: _Statistics | None = None,
    deepminds: bool | None = False,
) -> LoadedWeights:
    """Find the network that fits, and load it.

    `classifier` may be for another number of classes, or is for `others`. `deepminds`: whether it is DeepMind's
    WideResNet though its names are ours; None where that is known to fit.
    """
    own = model.state_dict()
    found = networks(own, document, deepmind=isinstance(model, WideResNet))
    if key is not None:
        found = [network for network in found if key in network.called]
    if not found:
        raise ValueError(_nothing(model, document, key))

    def misfits(network: Network) -> list[str]:
        return _misfits(network, own, _kept(network, own, classifier, others=others))

    network, *more = sorted(found, key=lambda network: (len(network.missing), len(misfits(network)), network.order()))
    if isinstance(model, WideResNet):
        _require_padding(model, network.deepmind or deepminds)
    kept = _kept(network, own, classifier, others=others)
    left_out, unexpected = _divided(model, network, found, chosen=key is not None)
    problems = [
        *_describe("missing", network.missing),
        *_describe("unexpected", unexpected),
        *_describe("wrong shape", _misfits(network, own, kept)),
    ]
    if problems:
        hint = _hint(model, network, unexpected, document)
        raise ValueError(f"state_dict does not fit {type(model).__name__}: {'; '.join(problems)}{hint}")
    alternatives = [o.label for o in more if not o.missing and not misfits(o) and not network.same(o)]
    notes = [_taken(network, wrappers(document, network.key), alternatives)]
    copies = {name for other in found if other.key == network.key for name in other.sources}
    if named := [name for name in left_out if name not in copies and network.rest[name].numel() > 1]:
        notes.append(f"left out: {_some(named)}")
    floats = {str(v.dtype).removeprefix("torch.") for n, v in network.taken.items() if v.dtype != own[n].dtype}
    if floats:
        notes.append(f"stored as {', '.join(sorted(floats))}")
    if network.deepmind:
        notes.append("DeepMind's WideResNet; the file does not say its activation: published ones have silu (swish)")
    statistics = _statistics(_beside(network, document) | network.rest, notes)
    # a header's are those in front of the network, whatever that holds itself
    in_front = statistics is None
    statistics = statistics or described
    buffers = [] if statistics is None else _normalise(model, own, statistics, notes, in_front=in_front)
    mean, std = statistics or (None, None)
    with torch.no_grad():
        model.load_state_dict({name: own[name] if name in kept else v for name, v in network.taken.items()})
        for buffer, values in buffers:
            buffer.copy_(values)
    return LoadedWeights(
        notes=notes,
        taken=notes[0],
        mean=mean,
        std=std,
        in_front=bool(buffers) and buffers[0][0] is getattr(model, "mean", None),
        key=network.key,
        stripped=network.prefix,
        left_out=tuple(left_out),
        kept=tuple(kept),
    )


def _require_padding(model: WideResNet, deepminds: bool | None) -> None:
    """The same names do not make the same network."""
    if deepminds and not model.same_padding:
        raise ValueError(
            "weights of DeepMind's WideResNet, whose convolutions of stride 2 pad images at the right and the bottom "
            "alone, not on every side: give --model.name dm-wrn-DEPTH-WIDTH, and --model.activation silu for swish"
        )
    if deepminds is False and model.same_padding:
        raise ValueError(
            "weights of a WideResNet that pads on every side, by their names; DeepMind's, which was asked for, pads "
            "at the right and the bottom alone in convolutions of stride 2: give --model.name wrn-DEPTH-WIDTH"
        )


def _kept(network: Network, own: Mapping[str, Tensor], classifier: Sequence[str], *, others: bool) -> Sequence[str]:
    """The classifier's names, where the file's is for other classes and nothing else differs."""
    shapes = [getattr(network.taken.get(name), "shape", None) for name in classifier]
    alike = all(s is not None and s[1:] == own[n].shape[1:] for n, s in zip(classifier, shapes, strict=True))
    differ = others or any(s != own[n].shape for n, s in zip(classifier, shapes, strict=True))
    return classifier if alike and differ else ()


def _misfits(network: Network, own: Mapping[str, Tensor], kept: Sequence[str]) -> list[str]:
    found = []
    for name, value in network.taken.items():
        wanted = own[name]
        if not isinstance(value, Tensor):
            found.append(f"{name} {type(value).__name__}, expected {list(wanted.shape)}")
        elif value.layout != wanted.layout or value.is_quantized:
            found.append(f"{name} {'quantised' if value.is_quantized else value.layout}, expected {wanted.layout}")
        elif value.shape != wanted.shape and name not in kept:
            found.append(f"{name} {list(value.shape)}, expected {list(wanted.shape)}")
        # averages of whole state dicts make counters of batches floats
        elif value.is_floating_point() != wanted.is_floating_point() and not name.endswith("num_batches_tracked"):
            found.append(f"{name} of {value.dtype}, expected {wanted.dtype}")
    return found


def _divided(
    model: nn.Module, network: Network, found: Sequence[Network], *, chosen: bool
) -> tuple[list[str], list[str]]:
    """What else is beside the network: names that may be left out, and those that may not."""
    means = pairs(network.rest)
    known = {*means, *means.values()}.union(*(other.sources for other in found if other.key == network.key))
    left_out, unexpected = [], []
    for name, value in network.rest.items():
        if name in means or name in means.values():
            continue
        harmless = (
            name in known
            or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point())
            or _MEASURES.search(name) is not None
            # TRADES' network holds a block that its forward pass never uses
            or (isinstance(model, WideResNet) and name.removeprefix(network.prefix).startswith("sub_block1."))
            or (chosen and not name.startswith(network.prefix))
        )
        (left_out if harmless else unexpected).append(name)
    return left_out, unexpected


def _taken(network: Network, wrapped: Sequence[str], alternatives: Sequence[str]) -> str:
    """Which weights, in words."""
    where = f"weights of {network.key!r}" if network.key else "weights at the top of the file"
    stripped = [*wrapped, *([network.prefix] if network.prefix else ())]
    prefix = f", names without {' and '.join(map(repr, stripped))}" if stripped else ""
    kind = ", an average over training" if network.averaged == 0 else ""
    other = f"; also there, and not taken: {_some(alternatives)} (--weights-key chooses)" if alternatives else ""
    return f"{where}{prefix}{kind}{other}"


def _beside(network: Network, document: Any) -> dict[str, Any]:
    """What is saved beside the dictionary that holds the network."""
    outermost = dict(state_dicts(document)).get("", {}) if network.key else {}
    return {name: value for name, value in outermost.items() if "." not in name}


def _statistics(held: Mapping[str, Any], notes: list[str]) -> _Statistics | None:
    """Mean and standard deviation in the file, for images in [0, 1]."""
    found: dict[_Statistics, str] = {}
    for name, other in pairs(held).items():
        mean, std = (tuple(held[one].flatten().tolist()) for one in (name, other))
        found.setdefault((mean, std), name)
    # 0 and 1 do nothing: what is there if none was asked for
    found = {
        (mean, std): name for (mean, std), name in found.items() if len(found) == 1 or {*mean} != {0} or {*std} != {1}
    }
    if not found:
        return None
    if len(found) > 1:
        raise ValueError(
            f"holds {len(found)} different normalisations, {_some(list(found.values()))}, and which of them images go "
            "through is not clear: load it by a factory of your own, --model.name FILE.py:NAME"
        )
    (((mean, std), name),) = found.items()
    if not all(0 < value < float("inf") for value in std) or not all(abs(value) < float("inf") for value in mean):
        raise ValueError(f"{name}: mean {mean}, std {std}; expected finite means, positive deviations")
    if max((*mean, *std)) > 2:
        notes.append(f"{name} is for pixels from 0 to 255: divided by 255")
        mean, std = tuple(value / 255 for value in mean), tuple(value / 255 for value in std)
    return mean, std


def _normalise(
    model: nn.Module,
    own: Mapping[str, Tensor],
    statistics: _Statistics,
    notes: list[str],
    *,
    in_front: bool,
) -> list[tuple[Tensor, Tensor]]:
    """The model's buffers that the file's mean and std belong into, with their values; says what they were."""
    said = "mean {}, std {}".format(*map(_rounded, statistics))
    inside = {} if in_front else pairs(own)
    if isinstance(model, WrappedClassifier) and not in_front:
        # names alone say little of anybody's layers
        names = [] if model.normaliser is None else [f"network.{name}" for name in model.normaliser.names]
        inside = {names[0]: names[1]} if names and {*names} <= own.keys() else {}
        if names and not inside:
            notes.append(f"normalisation in the file: {said}; not taken, as {model.name} has numbers of its own")
            return []
    if isinstance(model, NormalizedClassifier) and not inside:
        buffers = [model.mean, model.std]
    elif len(inside) == 1:
        buffers = [own[name] for pair in inside.items() for name in pair]
    else:
        notes.append(f"normalisation in the file: {said}; the model has no place for it: normalise images by it")
        return []
    values = [torch.tensor(numbers, dtype=torch.float64) for numbers in statistics]
    if any(value.numel() not in (1, buffer.numel()) for value, buffer in zip(values, buffers, strict=True)):
        raise ValueError(f"normalisation in the file: {said}; expected {buffers[0].numel()} channels")
    placed = [(b, v.to(b).expand(b.numel()).reshape(b.shape)) for b, v in zip(buffers, values, strict=True)]
    before = [tuple(buffer.flatten().tolist()) for buffer in buffers]
    # 0 and 1: none was asked for
    differs = ({*before[0]}, {*before[1]}) != ({0.0}, {1.0}) and any(
        not torch.allclose(buffer, value, rtol=0, atol=1e-4) for buffer, value in placed
    )
    was = ", not the model's mean {}, std {}".format(*map(_rounded, before)) if differs else ""
    notes.append(f"normalisation of the file: {said}{was}")
    return placed


def _rounded(values: Sequence[float]) -> str:
    return f"({shown(values)})"


def _nothing(model: nn.Module, document: Any, key: str | None) -> str:
    """What to say where no name fits."""
    held = dict(state_dicts(document))
    if not held:
        return "holds no tensors by name; expected a state dict, or a dictionary around one"
    if key is not None:
        return f"--weights-key {key}: no such weights that fit; it has {_some(list(held))}"
    names = max(held.values(), key=len)
    return (
        f"state_dict does not fit {type(model).__name__}: it has {_some(list(names))}, the model "
        f"{_some(list(model.state_dict()))}: weights of another architecture?"
    )


def _hint(model: nn.Module, network: Network, unexpected: Sequence[str], document: Any) -> str:
    """What else can be said of weights that do not fit."""
    names = {name for _, held in state_dicts(document) for name in held}
    if any(name.endswith("conv_2d.weight") for name in names) and any("batchnorm_0" in name for name in names):
        return "; DeepMind's PreActResNet has 3x3 convolutions as shortcuts: give its module as FILE.py:NAME"
    if len(network.missing) > len(network.sources):
        return "; weights of another architecture?"
    if not network.missing and not unexpected:
        return "; another width, size of images, or number of classes?"
    outside = unexpected and network.prefix and not any(name.startswith(network.prefix) for name in unexpected)
    return f"; --weights-key {network.prefix.rstrip('.')} takes {network.prefix}* alone" if outside else ""


def _some(names: Sequence[str], shown: int = _SHOWN) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(name or "the top of the file" for name in names[:shown]) + rest


def _describe(kind: str, names: Sequence[str]) -> list[str]:
    return [f"{kind}: {_some(names)}"] if names else []

"""How other projects lay out a checkpoint: where its networks are, and what stands before a model's names.

The names are those of TRADES, AWP, RobustBench, MadryLab's robustness, MAIR, DM-Improves-AT, Lightning, timm, and of
torch's DataParallel, compile and AveragedModel.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from awp_engine.models.weights_file import saved_module

# what wrappers put into a name, wherever it is
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# mean and standard deviation of images: the last part of their names
PAIRS = (
    ("mean", "std"),
    ("mu", "sigma"),
    ("mu", "std"),
    ("new_mean", "new_std"),
    ("_mean", "_std"),
    ("image_mean", "image_std"),
)
_MOST_CHANNELS = 16
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|wa|avg|averaged?)(?:[._]|$)")
_NOT_AVERAGED = re.compile(r"(?:^|[._])(?:un|non_?|not_)averaged?(?:[._]|$)")
# in the order in which they are preferred
_USUAL = ("", "state_dict", "model_state_dict", "model", "net", "network", "rmodel", "module", "best")
_DEEPEST = 3


@dataclass(frozen=True, kw_only=True)
class Network:
    """The weights of one network in a file.

    Attributes:
        key: of the dictionary that holds them; empty where the file is that dictionary.
        prefix: what stands before the model's names there.
        taken: by the model's names.
        sources: the names in that dictionary.
        rest: what else that dictionary holds.
        missing: the model's names that are not there.
        averaged: 0 for an average of weights, 1 where nothing says so, 2 for what is said not to be one.
        deepmind: the names were those of DeepMind's WideResNet.
    """

    key: str
    prefix: str
    taken: dict[str, Any]
    sources: frozenset[str]
    rest: dict[str, Any]
    missing: list[str] = field(default_factory=list)
    averaged: int = 1
    deepmind: bool = False

    @property
    def label(self) -> str:
        """What a user calls it."""
        return ".".join(part for part in (self.key, self.prefix.rstrip(".")) if part)

    @property
    def called(self) -> tuple[str, ...]:
        """All that a user may call it."""
        return self.label, self.key, self.prefix.rstrip(".")

    def same(self, other: "Network") -> bool:
        """Whether the weights are equal to the bit."""
        pairs = [(value, other.taken.get(name)) for name, value in self.taken.items()]
        return all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs)

    def order(self) -> tuple[int, int, int, int]:
        """What is preferred, before all else that fits: averages, usual places, short ways."""
        place = _USUAL.index(self.key) if self.key in _USUAL else len(_USUAL)
        return self.averaged, place, self.key.count("."), self.prefix.count(".")


def state_dicts(
    document: Any, key: str = "", depth: int = 0, *, bare: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary of tensors by name inside of what was saved, with the keys that lead there.

    `bare`: names are without what wrappers put into them.
    """
    document = saved_module(document) or document
    if not isinstance(document, Mapping) or depth > _DEEPEST or not all(isinstance(name, str) for name in document):
        return
    if any(isinstance(value, Tensor) for value in document.values()):
        own = {
            name: value
            for name, value in document.items()
            if isinstance(value, Tensor)
            or ("." in name and not isinstance(value, Mapping) and not name.endswith("_extra_state"))
        }
        short = {_WRAPPERS.sub("", name): value for name, value in own.items()}
        # two names that differ by a wrapper alone stay two
        yield key, short if bare and len(short) == len(own) else own
    for name, value in document.items():
        yield from state_dicts(value, f"{key}.{name}" if key else name, depth + 1, bare=bare)


def wrappers(document: Any, key: str) -> list[str]:
    """What wrappers put into the names of the dictionary at `key`, such as "_orig_mod."."""
    held = dict(state_dicts(document, bare=False))[key]
    return sorted({found for name in held for found in _WRAPPERS.findall(name)})


def pairs(weights: Mapping[str, Any]) -> dict[str, str]:
    """Names of means of images, with those of their standard deviations, the shortest first."""
    found = {}
    for name in sorted(weights, key=lambda name: name.count(".")):
        head, dot, last = name.rpartition(".")
        for mean, std in PAIRS:
            values = [weights[name], weights.get(other := head + dot + std)]
            if last == mean and all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
                sizes = {value.numel() for value in values}
                if len(sizes) == 1 and 1 <= sizes.pop() <= _MOST_CHANNELS:
                    found[name] = other
    return found


def networks(own: Mapping[str, Tensor], document: Any, *, deepmind: bool) -> list[Network]:
    """Every network in a file that has all of a model's names; without one, the nearest of every dictionary.

    Args:
        own: the model's state dict. Counters of batches, and mean and standard deviation, may be missing in the file.
        document: what was saved.
        deepmind: translate the names of DeepMind's WideResNet to those of the public one.
    """
    found = [network for key, held in state_dicts(document) for network in _in_one(own, key, held, deepmind=deepmind)]
    whole = [network for network in found if not network.missing]
    return whole or sorted(found, key=lambda network: len(network.missing))


def _in_one(own: Mapping[str, Tensor], key: str, held: dict[str, Any], *, deepmind: bool) -> Iterator[Network]:
    normalisation = pairs(own)
    means = {*normalisation, *normalisation.values()}
    optional = [name for name in own if name in means or name.endswith("num_batches_tracked")]
    names = [name for name in own if name not in optional]
    wrapped = _common(names)
    short = {name[len(wrapped) :]: name for name in names}
    translated = _translated(held) if deepmind else None
    renamed = held if translated is None else translated
    counts = Counter(prefix for name in renamed for prefix in _before(name, short))
    most = max(counts.values(), default=0)
    for prefix, count in counts.items():
        if count < most:
            continue
        theirs, ours = _apart(prefix, wrapped)
        sources = {name: prefix + inner for inner, name in short.items() if prefix + inner in renamed}
        for name in optional:
            inner = theirs + name.removeprefix(ours)
            if name.startswith(ours) and inner in renamed:
                sources[name] = inner
        taken = {name: renamed[source] for name, source in sources.items()}
        label = f"{key}.{prefix}"
        averages = [value for name, value in held.items() if name.rpartition(".")[2] == "n_averaged"]
        averaged = 0 if _AVERAGED.search(label) or averages else 1
        if _NOT_AVERAGED.search(label) or any(int(count) == 0 for count in averages):
            averaged = 2
        used = frozenset(sources.values())
        yield Network(
            key=key,
            prefix=theirs,
            taken=taken | {name: own[name] for name in optional if name not in taken},
            sources=used,
            rest={name: value for name, value in renamed.items() if name not in used},
            missing=[name for name in names if name not in taken],
            averaged=averaged,
            deepmind=translated is not None,
        )
        if count < len(short):
            return


def _common(names: Sequence[str]) -> str:
    """The modules that all names begin with, with the last dot."""
    ways = [name.split(".")[:-1] for name in names]
    depth = 0
    while ways and all(len(way) > depth for way in ways) and len({way[depth] for way in ways}) == 1:
        depth += 1
    return "".join(f"{part}." for part in ways[0][:depth]) if ways else ""


def _apart(first: str, second: str) -> tuple[str, str]:
    """Two ways without the modules that both end with: module.1. and network.1. are module. and network."""
    ways = first.split(".")[:-1], second.split(".")[:-1]
    while all(ways) and ways[0][-1] == ways[1][-1]:
        for way in ways:
            way.pop()
    theirs, ours = ("".join(f"{part}." for part in way) for way in ways)
    return theirs, ours


def _before(name: str, short: Mapping[str, str]) -> Iterator[str]:
    """What stands in `name` before each end of it that is one of `short`."""
    at = 0
    while at >= 0:
        if name[at:] in short:
            yield name[:at]
        at = name.find(".", at) + 1 or -1


def _translated(held: Mapping[str, Any]) -> dict[str, Any] | None:
    """DeepMind's names as the public WideResNet's (Gowal et al. 2020); None where they are not those."""
    first = next((name for name in held if name.endswith("init_conv.weight")), None)
    if first is None:
        return None
    prefix = first.removesuffix("init_conv.weight")
    if f"{prefix}layer.0.block.0.batchnorm_0.weight" not in held:
        return None
    inside = ((name.removeprefix(prefix) if name.startswith(prefix) else None, name) for name in held)
    return {name if inner is None else prefix + _public(inner): held[name] for inner, name in inside}


def _public(name: str) -> str:
    block = re.fullmatch(r"layer\.(\d+)\.block\.(\d+)\.(batchnorm|conv|shortcut)(?:_(\d+))?\.(\w+)", name)
    if block is not None:
        stage, number, kind, position, last = block.groups()
        layer = (
            "convShortcut" if kind == "shortcut" else {"batchnorm": "bn", "conv": "conv"}[kind] + str(int(position) + 1)
        )
        return f"block{int(stage) + 1}.layer.{number}.{layer}.{last}"
    head, dot, last = name.rpartition(".")
    return {"init_conv": "conv1", "batchnorm": "bn1", "logits": "fc"}.get(head, head) + dot + last

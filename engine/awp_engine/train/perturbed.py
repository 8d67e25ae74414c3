"""Which parameters the weight perturbation moves: chosen by patterns, and told."""

import fnmatch
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from awp_engine.config import ConfigError
from awp_kernels import AdversarialWeightPerturbation

_SHOWN = 3


def _public(name: str) -> str:
    """A parameter's name as the wrapped network itself has it."""
    return name.removeprefix("network.")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def choice(model: nn.Module, patterns: Sequence[str]) -> Callable[[str, Tensor], bool]:
    """What `AdversarialWeightPerturbation` takes as `select`: parameters that one of the patterns matches.

    Raises:
        ConfigError: a pattern that matches no trainable parameter.
    """

    def matches(name: str, pattern: str) -> bool:
        return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(_public(name), pattern)

    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            known = _listed([_public(name) for name in names])
            raise ConfigError(f"--awp.layers: no trainable parameter matches {pattern!r}; there are {known}")
    return lambda name, parameter: any(matches(name, pattern) for pattern in patterns)


def perturbed_message(title: str, perturbation: AdversarialWeightPerturbation) -> str:
    """How many tensors and what part of the parameters move, and which do not."""
    moved = perturbation.parameters
    every = dict(perturbation.model.named_parameters())
    share = sum(p.numel() for p in moved.values()) / sum(p.numel() for p in every.values())
    left = [_public(name) for name in every if name not in moved]
    rest = f"; left out: {_listed(left)}" if left else ""
    return f"{title.rpartition('-')[2]} perturbs {len(moved)} of {len(every)} tensors, {share:.1%} of parameters{rest}"

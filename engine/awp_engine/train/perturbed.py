"""Which parameters the weight perturbation moves: chosen by patterns, and told."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from awp_engine.models.chosen import chosen, listed, public_name
from awp_kernels import AdversarialWeightPerturbation


def choice(model: nn.Module, patterns: Sequence[str]) -> Callable[[str, Tensor], bool]:
    """What `AdversarialWeightPerturbation` takes as `select`: parameters that one of the patterns matches.

    Raises:
        ConfigError: a pattern that matches no trainable parameter.
    """
    names = chosen(model, patterns, "--awp.layers")
    return lambda name, parameter: name in names


def perturbed_message(title: str, perturbation: AdversarialWeightPerturbation) -> str:
    """How many tensors and what part of the parameters move, and which do not."""
    moved = perturbation.parameters
    every = dict(perturbation.model.named_parameters())
    share = sum(p.numel() for p in moved.values()) / sum(p.numel() for p in every.values())
    left = [public_name(name) for name in every if name not in moved]
    rest = f"; left out: {listed(left)}" if left else ""
    return f"{title.rpartition('-')[2]} perturbs {len(moved)} of {len(every)} tensors, {share:.1%} of parameters{rest}"

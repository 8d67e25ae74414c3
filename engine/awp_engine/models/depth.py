"""How deep in a model each parameter lies, for learning rates by layer."""

from typing import Any

from torch import nn

from awp_engine.config import ConfigError
from awp_engine.models.build import blocks
from awp_engine.models.import_timm import import_timm
from awp_engine.models.wrapped import told_in_one_line


def layer_numbers(model: nn.Module, name: str) -> dict[str, int]:
    """The layer of every parameter, by its name: 0 for what the images go into, the largest for what gives the logits.

    Models of timm's say by `group_matcher` which parameters form a layer, as for timm's own learning rates by layer.
    Others of `build_model` have a layer a residual block, one before them and one behind them.

    Args:
        model: a classifier of `awp_engine.models`.
        name: of the model, for messages.

    Raises:
        ConfigError: a model of another kind, without a `group_matcher`, or whose own fails.
    """
    network: Any = getattr(model, "network", None)
    if callable(matcher := getattr(network, "group_matcher", None)):
        group_parameters = import_timm().models.group_parameters
        with told_in_one_line(name, "group_matcher"):
            return {f"network.{key}": n for key, n in group_parameters(network, matcher(), reverse=True).items()}
    owner = {id(p): n for n, block in enumerate(blocks(model), start=1) for p in block.parameters()}
    if not owner:
        raise ConfigError(
            f"--optimizer.layer-decay: expected 1 with --model.name {name}, which does not say how its layers follow "
            "each other: built-in models do, and those with timm's group_matcher"
        )
    numbers, behind = {}, 0
    for key, parameter in model.named_parameters():
        if id(parameter) in owner:
            behind = max(owner.values()) + 1
        numbers[key] = owner.get(id(parameter), behind)
    return numbers

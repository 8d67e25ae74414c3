"""Presets: the published recipes, and small ones that run anywhere; a module for each family."""

import dataclasses

from awp_engine.config.presets import (
    augmented,
    digits,
    distillation,
    divergence,
    fast,
    fast_benchmark,
    generated,
    imagenet,
    imagenet_timm,
    lbgat,
    norms,
    oaat,
    paper,
    perturbed,
    score,
    taught,
)
from awp_engine.config.presets.preset import Preset
from awp_engine.config.schema import ConfigError, did_you_mean, show
from awp_engine.config.settings import Config

DEFAULT = "digits"

_ALL: dict[str, Preset] = {}
_FAMILIES = (
    *(digits, paper, perturbed, divergence, fast, fast_benchmark, imagenet, imagenet_timm),
    *(generated, augmented, distillation, score, taught, norms, lbgat, oaat),
)
for _family in _FAMILIES:
    _ALL |= _family.PRESETS

PRESETS: dict[str, str] = {name: summary for name, (summary, _) in _ALL.items()}
"""Every preset with a line about it."""


def build_preset(name: str) -> Config:
    """The configuration of a preset.

    Raises:
        ConfigError: for a name that is not in `PRESETS`, with the nearest one.
    """
    if name in _ALL:
        return dataclasses.replace(_ALL[name][1](), preset=name)
    # of a beginning some that begin so
    longer = [preset for preset in PRESETS if name and preset.startswith(name)][:3]
    hint = f"did you mean {', '.join(longer)}? " if longer else did_you_mean(name, PRESETS, "")
    told = f"{hint.rstrip()} there is no {show(name)}".lstrip()
    raise ConfigError(f"preset: {told}; awp train --presets lists all {len(PRESETS)}")

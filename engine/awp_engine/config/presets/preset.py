"""What a preset is."""

from collections.abc import Callable
from typing import TypeAlias

from awp_engine.config.settings import Config

Preset: TypeAlias = tuple[str, Callable[[], Config]]
"""A line about it, and what makes its settings."""

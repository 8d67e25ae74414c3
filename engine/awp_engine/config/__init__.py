"""What a run is: settings, checked when they are made; presets; and what tells two runs apart. Imports no torch."""

from awp_engine.config.identity import (
    config_hash,
    decisive,
    flags,
    from_json,
    load_config,
    require_same_run,
    to_json,
)
from awp_engine.config.rules import choose_speed, own_images
from awp_engine.config.schema import ConfigError, expectation, flag, parse_amount, show
from awp_engine.config.settings import (
    AttackConfig,
    AverageConfig,
    AwpConfig,
    Config,
    DataConfig,
    DistributedConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    TeacherConfig,
)

__all__ = [
    "AttackConfig",
    "AverageConfig",
    "AwpConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "TeacherConfig",
    "choose_speed",
    "config_hash",
    "decisive",
    "expectation",
    "flag",
    "flags",
    "from_json",
    "load_config",
    "own_images",
    "parse_amount",
    "require_same_run",
    "show",
    "to_json",
]

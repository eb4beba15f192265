"""The configuration: its keys, and reading it from files and words of the command."""
from .model import ModelConfig
from .schema import Config
from .sections import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    MaskConfig,
    OptimConfig,
    ParallelConfig,
    RuntimeConfig,
    TrainConfig,
    ValidationConfig,
)
from .values import PATH, ConfigError, Duration, Section, parse_duration

__all__ = ['PATH', 'AugmentConfig', 'CheckpointConfig', 'Config', 'ConfigError', 'DataConfig', 'Duration', 'LogConfig',
           'MaskConfig', 'ModelConfig', 'OptimConfig', 'ParallelConfig', 'RuntimeConfig', 'Section', 'TrainConfig',
           'ValidationConfig', 'parse_duration']

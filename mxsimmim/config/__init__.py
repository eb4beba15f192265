"""The configuration: its keys, and reading it from files and words of the command."""
from .schema import (
                     PATH,
                     AugmentConfig,
                     CheckpointConfig,
                     Config,
                     ConfigError,
                     DataConfig,
                     Duration,
                     LogConfig,
                     MaskConfig,
                     ModelConfig,
                     OptimConfig,
                     ParallelConfig,
                     RuntimeConfig,
                     Section,
                     TrainConfig,
                     ValidationConfig,
                     parse_duration,
)

__all__ = ['PATH', 'AugmentConfig', 'CheckpointConfig', 'Config', 'ConfigError', 'DataConfig', 'Duration', 'LogConfig',
           'MaskConfig', 'ModelConfig', 'OptimConfig', 'ParallelConfig', 'RuntimeConfig', 'Section', 'TrainConfig',
           'ValidationConfig', 'parse_duration']

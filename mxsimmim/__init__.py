"""SimMIM pre-training of vision transformers on Apache MXNet Gluon."""

__version__ = '0.1.0'
